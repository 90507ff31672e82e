"""The run directory: what `splitfl tune` writes, and what later commands remember from it.

config.toml        the settings as resolved
disclosure.json    the protocol's disclosure
run.jsonl          losses, rates, bytes
replies/           the trunk's replies, for a protocol that sends each row once
recording/         what crossed, encrypted, where `--record` was given
adapter/           the tuned adapter, an ordinary PEFT directory
checkpoints/       to resume from
report.html        for people
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from protocols import protocol_named
from splitfl.config import TuneSettings
from splitfl.cut import Plan
from splitfl.errors import ModelError, UsageError
from splitfl.files import replace_text
from splitfl.metrics import read_run
from splitfl.options import read_config, to_toml
from splitfl.privacy.labels import randomise_labels
from splitfl.rows import FormName

_COMPLETE = "splitfl.json"  # written last into a checkpoint: one without it was never finished


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run."""

    path: Path

    @property
    def config(self) -> Path:
        """The settings as resolved."""
        return self.path / "config.toml"

    @property
    def log(self) -> Path:
        """One JSON object a line."""
        return self.path / "run.jsonl"

    @property
    def adapter(self) -> Path:
        """The tuned adapter, a PEFT directory."""
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints stand."""
        return self.path / "checkpoints"

    def check(self, *, resume: bool) -> None:
        """Before anything is done: is there a run to resume, or room for a new one?

        Raises:
            UsageError: a run is already there and `--resume` was not given, or the other way round.
        """
        if self.config.exists() and not resume:
            raise UsageError(
                f"{self.path} already holds a run.", hint="add --resume to continue it, or choose another --out"
            )
        if resume and not self.config.exists():
            raise UsageError(f"{self.path} holds no run to resume.", hint="leave --resume out to start one")

    @property
    def replies(self) -> Path:
        """Where the trunk's replies are kept, for a protocol that sends each row once."""
        return self.path / "replies"

    @property
    def recording(self) -> Path:
        """What crossed, encrypted, where `--record` was given."""
        return self.path / "recording"

    def randomised_labels(self, labels: torch.Tensor, classes: int, epsilon: float) -> torch.Tensor:
        """Randomised response on `labels` [N]; drawn once and kept, so that a resumed run tells nothing new."""
        kept = self.path / "randomised_labels.json"
        if kept.is_file():
            return torch.tensor(json.loads(kept.read_text(encoding="utf-8")))
        drawn = randomise_labels(labels, classes, epsilon)
        self.path.mkdir(parents=True, exist_ok=True)
        replace_text(kept, json.dumps(drawn.tolist()) + "\n")
        kept.chmod(0o600)
        return drawn

    def prepare(self, settings: TuneSettings, bounds: Mapping[tuple[str, str], str] | None = None) -> None:
        """Make the directory and write what is known before training. Only a run that begins leaves a directory."""
        self.path.mkdir(parents=True, exist_ok=True)
        to_toml(_from_anywhere(settings), self.config)
        record = protocol_named(settings.protocol).disclosure.with_bounds(bounds or {})
        disclosure = {"protocol": settings.protocol, **record.to_json()}
        replace_text(self.path / "disclosure.json", json.dumps(disclosure, indent=2) + "\n")

    def settings(self) -> TuneSettings:
        """The settings that the run was started with.

        Raises:
            UsageError: not a run directory.
        """
        if not self.config.is_file():
            raise UsageError(
                f"{self.path} is not a run directory: it has no config.toml.", hint="give the --out of `splitfl tune`"
            )
        self._refuse_another_commands()
        values = read_config(self.config, TuneSettings)
        given: Any = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return TuneSettings(**given)

    def _refuse_another_commands(self) -> None:
        """A run of peers without an owner has a configuration of its own, and a whole model to be used with."""
        disclosure = self.path / "disclosure.json"
        if disclosure.is_file() and json.loads(disclosure.read_text(encoding="utf-8")).get("protocol") == "fedmod":
            raise UsageError(
                f"{self.path} is a run of `splitfl fedmod`, whose model is in one piece and needs no owner.",
                expected="a run of `splitfl tune`",
                hint="its figures are in run.jsonl; PeftModel.from_pretrained(MODEL, RUN/adapter) is the tuned model",
            )

    def form(self) -> FormName:
        """The form of the rows that the run was trained on; prompts are to be rendered like them."""
        start = next((r for r in read_run(self.log) if r["event"] == "start"), {})
        return cast("FormName", start.get("form", "prompt-completion"))

    def mark_complete(self, checkpoint: Path, plan: Plan) -> None:
        """Say that `checkpoint` is whole, and of which plan."""
        replace_text(checkpoint / _COMPLETE, json.dumps({"plan": plan.digest, "trunk": plan.trunk}) + "\n")

    def latest_checkpoint(self, plan: Plan) -> Path | None:
        """The newest whole checkpoint, or None if there is none.

        Raises:
            ModelError: it belongs to another plan.
        """
        numbered = [
            (int(path.name.removeprefix("checkpoint-")), path)
            for path in self.checkpoints.glob("checkpoint-*")
            if path.name.removeprefix("checkpoint-").isdigit() and (path / _COMPLETE).is_file()
        ]
        if not numbered:
            return None
        newest = max(numbered)[1]
        held = json.loads((newest / _COMPLETE).read_text(encoding="utf-8"))
        if held["plan"] != plan.digest:
            raise ModelError(
                f"Checkpoint {newest} belongs to plan {held['plan']} (trunk {held['trunk']}).",
                expected=f"plan {plan.digest} (trunk {plan.trunk}), that of the kit given",
                hint="resume with the kit that the run was started with, or start a new run",
            )
        return newest

    def drop_unfinished(self) -> None:
        """Remove checkpoints that a crash left half written."""
        for path in self.checkpoints.glob("checkpoint-*"):
            if not (path / _COMPLETE).is_file():
                with contextlib.suppress(OSError):
                    shutil.rmtree(path)


def _from_anywhere(settings: TuneSettings) -> TuneSettings:
    """The settings with absolute paths: a later command that remembers them may be given in another directory."""
    paths: Any = {name: value.absolute() for name, value in vars(settings).items() if isinstance(value, Path)}
    return dataclasses.replace(settings, **paths)
