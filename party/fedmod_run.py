"""The run directory of `splitfl fedmod`, and what is kept to go on after a crash.

config.toml        the settings as resolved
disclosure.json    what crosses
run.jsonl          losses, neighbours, weights, figures
sketch.json        the released sketch: the same bytes for everybody and after every restart; mode 0600
checkpoint/        adapter, head and optimiser after the latest round, written whole or not at all
adapter/           the tuned adapter with the head, an ordinary PEFT directory
thresholds.json    this server's own offsets of the logits
report.html        for people
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from party.fedmod_train import LocalTrainer
from party.rundir import RunDirectory
from protocols import PEER_PROTOCOLS
from splitfl.config_mesh import FedmodSettings
from splitfl.errors import ModelError
from splitfl.files import replace_text
from splitfl.options import to_toml
from splitfl.sketch import Codes, Sketch, SketchPlan, release

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands."""

    step: int
    """Steps of local training taken."""
    mixed: int
    """Exchanges that are over: what was averaged is in the adapter."""


@dataclass(frozen=True)
class FedmodRun(RunDirectory):
    """Paths of one run."""

    @property
    def checkpoint(self) -> Path:
        """What to go on from."""
        return self.path / "checkpoint"

    def begin(self, settings: FedmodSettings, bound: str | None) -> None:
        """Make the directory and write what is known before training.

        Args:
            settings: of the run.
            bound: on what the sketch reveals; None where none is released.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        to_toml(settings, self.config)
        record = PEER_PROTOCOLS["fedmod"].disclosure
        if bound is not None:
            record = record.with_bounds({("sketch", "sketch"): bound})
        text = json.dumps({"protocol": "fedmod", **record.to_json()}, indent=2)
        replace_text(self.path / "disclosure.json", text + "\n")

    def sketch(self, codes: Codes, plan: SketchPlan) -> Sketch:
        """The sketch that was released before, else a new one, kept before anybody gets it.

        Args:
            codes: int64 [N, K], what each row adds.
            plan: the noise.
        """
        kept = self.path / "sketch.json"
        if kept.is_file():
            found = json.loads(kept.read_text(encoding="utf-8"))
            return Sketch(values=np.array(found["values"], dtype=np.int32), rows=found["rows"], grid=found["grid"])
        made = release(codes, plan)
        replace_text(kept, json.dumps({"values": made.values.tolist(), "rows": made.rows, "grid": made.grid}) + "\n")
        kept.chmod(0o600)
        return made

    def keep_thresholds(self, offsets: torch.Tensor, label2id: Mapping[str, int]) -> None:
        """Write this server's own offsets [C] of the logits, by name of the class."""
        named = {name: round(float(offsets[number]), 6) for name, number in label2id.items()}
        replace_text(self.path / "thresholds.json", json.dumps({"logit_offsets": named}, indent=2) + "\n")

    # ---- checkpoints

    def save(self, trainer: LocalTrainer, mixed: int, facts: dict[str, Any]) -> None:
        """Write a checkpoint in place of the last one.

        Args:
            trainer: its model, optimiser and step.
            mixed: exchanges that are over.
            facts: what a run that goes on has to agree with.
        """
        tensors = {f"p.{name}": p.detach().clone() for name, p in trainer.parameters.items()}
        steps = {}
        for name, parameter in trainer.parameters.items():
            state = trainer.optimiser.state.get(parameter, {})
            if state:
                steps[name] = float(state["step"])
                tensors |= {f"{moment}.{name}": state[moment].clone() for moment in _MOMENTS}
        staging, old = self.path / ".checkpoint.new", self.path / ".checkpoint.old"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        save_file(tensors, staging / "state.safetensors")
        record = {"step": trainer.step, "mixed": mixed, "steps": steps, "facts": facts}
        replace_text(staging / "state.json", json.dumps(record) + "\n")
        shutil.rmtree(old, ignore_errors=True)
        if self.checkpoint.exists():
            os.replace(self.checkpoint, old)
        os.replace(staging, self.checkpoint)
        shutil.rmtree(old, ignore_errors=True)

    def restore(self, trainer: LocalTrainer, facts: dict[str, Any]) -> Progress:
        """Load the checkpoint into `trainer`; a run that has none begins at its first step.

        Raises:
            ModelError: it was made with other rows, another model or other settings.
        """
        folder = self.checkpoint
        if not folder.exists():  # between the two renames of `save`
            folder = self.path / ".checkpoint.old"
        if not folder.exists():
            return Progress(step=0, mixed=0)
        record = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        differ = sorted(name for name in facts if record["facts"].get(name) != facts[name])
        if differ:
            raise ModelError(
                f"The checkpoint in {self.path} was made with another {differ[0]}.",
                expected="the rows, the model and the options that the run began with",
                hint="give it those, or begin another run with --out",
            )
        tensors = load_file(folder / "state.safetensors")
        with torch.no_grad():
            for name, parameter in trainer.parameters.items():
                parameter.copy_(tensors[f"p.{name}"])
                if name in record["steps"]:
                    trainer.optimiser.state[parameter] = {
                        "step": torch.tensor(record["steps"][name]),
                        **{moment: tensors[f"{moment}.{name}"] for moment in _MOMENTS},
                    }
        trainer.step = int(record["step"])
        return Progress(step=trainer.step, mixed=int(record["mixed"]))
