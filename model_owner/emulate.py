"""`splitfl emulator`: choose layers, distil them, make them smaller, write them; say what is given away.

Read from top to bottom. Beside OUT stands OUT.distil/: what a distillation leaves, and resumes from.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from model_owner.distil import DistilOptions, Outcome, distil
from model_owner.distil_progress import write_curve
from model_owner.emulate_report import print_emulator, print_sensitivity, results
from model_owner.emulate_text import Text, read_text
from model_owner.sensitivity import Sensitivity, measure_sensitivity, most_missed
from model_owner.student import Figures, Pair, copied
from splitfl.compression import check_extra, compressed, expanded, prune_smallest
from splitfl.config_offsite import EmulatorSettings
from splitfl.cut import module_at
from splitfl.emulator import Emulator, check_out, open_emulator, uniform_layers, write_emulator
from splitfl.errors import INTERRUPTED_EXIT_CODE, ModelError, ResourceError, UsageError
from splitfl.files import replace_text
from splitfl.kit import DTYPES, Kit, open_kit, write_kit
from splitfl.load import fingerprint_trunk, load_config, load_party_side
from splitfl.metrics import write_results


@dataclass(kw_only=True)
class Making:
    """An emulator under way: what was chosen and what was measured."""

    settings: EmulatorSettings
    kit: Kit
    pair: Pair
    kept: tuple[int, ...]
    text: Text | None
    sensitivity: Sensitivity | None = None
    outcome: Outcome | None = None
    stages: dict[str, Figures] = field(default_factory=dict)
    """Held-out figures after each step that was taken, in order; empty without a text."""

    def measure(self, stage: str) -> None:
        """Note what the student is worth now."""
        if self.text is not None:
            self.stages[stage] = self.text.measure(self.pair, self.settings.batch_size)


def make_emulator(settings: EmulatorSettings) -> int:
    """Write the emulator that the settings describe and print what it gives away; returns the exit code.

    Raises:
        ModelError: the kit is of another model, or `out` holds something.
        UsageError: no layer or all of them, a distillation to resume that is not there, or one in the way.
        DataError: a text that cannot be read, or is too short.
        ResourceError: a device that this machine lacks.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    check_out(settings.out)
    if settings.bits is not None:
        check_extra()
    record = _Record(settings.out.with_name(settings.out.name + ".distil"))
    record.check(settings)
    with _kit(settings) as kit:
        return _make(settings, kit, record)


def _make(settings: EmulatorSettings, kit: Kit, record: _Record) -> int:
    _refuse_all_or_nothing(kit, settings.keep)
    text = None if settings.text is None else read_text(settings, kit)
    model = _load(settings, kit)
    making = _choose(settings, kit, model, text, record)
    if settings.distil_steps and not _distil(making, record):
        return INTERRUPTED_EXIT_CODE
    emulator = _write(making)
    print_emulator(making, emulator)
    if settings.json is not None:
        write_results(settings.json, "emulator", settings, results(making, emulator))
    return 0


# ---- what is asked


@contextmanager
def _kit(settings: EmulatorSettings) -> Iterator[Kit]:
    """The kit, or the one that this cut would give, for as long as the block runs; either way of this very model."""
    folder = Path(settings.model)
    if settings.kit is not None:
        yield _kit_of(folder, settings.kit)
        return
    bottom, top = cast("int", settings.bottom), cast("int", settings.top)
    with tempfile.TemporaryDirectory(prefix="splitfl-kit-") as made:
        write_kit(
            folder, Path(made), bottom=bottom, top=top, task=settings.task or "causal-lm", dtype=settings.dtype,
            overwrite=True,
        )  # fmt: skip
        yield open_kit(Path(made))


def _kit_of(folder: Path, path: Path) -> Kit:
    """The kit at `path`, if it was cut from the model in `folder`.

    Raises:
        ModelError: it was not.
    """
    kit = open_kit(path)
    config = load_config(folder)
    if config.model_type != kit.plan.model_type:
        raise ModelError(
            f"The kit {path} was cut from a {kit.plan.model_type} model, {folder} holds a {config.model_type}.",
            hint="give the model that the kit was written from, or write the kit again",
        )
    found = fingerprint_trunk(folder, kit.plan)
    if found != kit.plan.trunk:
        raise ModelError(
            f"The kit {path} was cut from trunk {kit.plan.trunk}, the model {folder} has trunk {found}.",
            hint="give the model that the kit was written from, or write the kit again",
        )
    return kit


def _refuse_all_or_nothing(kit: Kit, keep: int) -> None:
    count = len(kit.plan.trunk_layers)
    if count == 1:
        raise UsageError(
            "The trunk has one layer: an emulator of it would keep none of it or all of it.",
            hint="cut the model with fewer layers below and above",
        )
    if not 1 <= keep < count:
        what = (
            "give the whole trunk away: it is the model itself" if keep == count else "need layers that are not there"
        )
        raise UsageError(
            f"An emulator that keeps {keep} of the trunk's {count} layers would {what}.", expected=f"1 to {count - 1}"
        )


class _Record:
    """What a distillation was started with, `OUT.distil/settings.json`: a resumed one must be the same."""

    _SAME = ("keep", "choose", "max_length", "distil_steps", "learning_rate", "batch_size", "eval_steps",
             "save_steps", "logging_steps", "seed")  # fmt: skip

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "settings.json"

    def check(self, settings: EmulatorSettings) -> None:
        """Before anything is done: is there a distillation to resume, or room for a new one?

        Raises:
            UsageError: one is in the way, or none is there.
        """
        if not settings.distil_steps:
            return
        if self.file.exists() and not settings.resume:
            raise UsageError(
                f"{self.folder} already holds a distillation.",
                hint="add --resume to continue it, or remove it to start again",
            )
        if settings.resume and not self.file.exists():
            raise UsageError(f"{self.folder} holds no distillation to resume.", hint="leave --resume out to start one")

    def kept(self) -> tuple[int, ...] | None:
        """Layers that the distillation to be resumed trains; None if it is a new one."""
        if not self.file.exists():
            return None
        held = json.loads(self.file.read_text(encoding="utf-8"))
        return tuple(int(index) for index in held["kept"])

    def begin(self, settings: EmulatorSettings, kit: Kit, kept: tuple[int, ...], text: Text) -> None:
        """Write what is asked, or compare it with what was asked before.

        Raises:
            UsageError: names what differs.
        """
        asked: dict[str, Any] = {name: getattr(settings, name) for name in self._SAME}
        asked |= {"plan": kit.plan.digest, "kept": list(kept), "text": text.fingerprint}
        if not self.file.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_text(self.file, json.dumps(asked, indent=2) + "\n")
            return
        before = json.loads(self.file.read_text(encoding="utf-8"))
        other = [name for name in asked if before.get(name) != asked[name]]
        if other:
            raise UsageError(
                f"The distillation in {self.folder} was started with another {', '.join(other)}.",
                expected=", ".join(f"{name} {before.get(name)}" for name in other),
                hint="resume with what it was started with, or remove it to start again",
            )


# ---- the model


def _load(settings: EmulatorSettings, kit: Kit) -> PreTrainedModel:
    """The whole model, frozen; in float32 where something is to be trained or measured."""
    if settings.device.startswith("cuda") and not torch.cuda.is_available():
        raise ResourceError(
            f"--device {settings.device} was asked for, but torch finds no CUDA device here.",
            expected="cpu",
            hint="install a CUDA build of torch and check the driver with nvidia-smi, or leave --device out",
        )
    model = load_party_side(
        Path(settings.model),
        kit.plan,
        dtype=torch.float32 if settings.text is not None else DTYPES[kit.plan.dtype],
        config=kit.config,
        new_head=kit.plan.task == "sequence-classification",
        also=kit.plan.trunk_layers,
    )
    model.config.use_cache = False
    return model.requires_grad_(False).eval().to(settings.device)


# ---- the steps


def _choose(settings: EmulatorSettings, kit: Kit, model: PreTrainedModel, text: Text | None, record: _Record) -> Making:
    """Which layers; a resumed distillation keeps those that it began with."""
    sensitivity = None
    kept = record.kept() if settings.resume else None
    if kept is None and settings.choose == "sensitivity" and text is not None:
        sensitivity = measure_sensitivity(model, kit.plan, text.held_out, text.collator, batch_size=settings.batch_size)
        kept = most_missed(kit.plan, settings.keep, sensitivity)
        print_sensitivity(sensitivity, kept)
    kept = kept or uniform_layers(kit.plan.trunk_layers, settings.keep)
    pair = Pair(model, kit.plan, {})
    making = Making(settings=settings, kit=kit, pair=pair, kept=kept, text=text, sensitivity=sensitivity)
    making.measure("full model")
    pair.student = copied(model, kit.plan, kept)
    making.measure("layers left out")
    return making


def _distil(making: Making, record: _Record) -> bool:
    """Distil; False if somebody interrupted it."""
    settings, text = making.settings, cast("Text", making.text)
    record.begin(settings, making.kit, making.kept, text)
    options = DistilOptions(
        max_steps=settings.distil_steps,
        learning_rate=settings.learning_rate,
        batch_size=settings.batch_size,
        eval_steps=settings.eval_steps,
        save_steps=settings.save_steps,
        logging_steps=settings.logging_steps,
        seed=settings.seed,
        device=settings.device,
    )
    making.outcome = outcome = distil(
        making.pair, making.kept, text.train, text.held_out, text.collator, record.folder, options,
        resume=settings.resume,
    )  # fmt: skip
    if outcome.interrupted:
        print(
            f"Stopped at step {outcome.steps} of {settings.distil_steps}. The checkpoint is kept; continue with "
            "--resume.",
            file=sys.stderr,
        )
        return False
    if outcome.diverged is not None:
        print(
            f"Distillation diverged and was stopped after step {outcome.steps}. {outcome.diverged} The state of step "
            f"{outcome.best_step}, the best on held-out text, is used. A lower --learning-rate may help.",
            file=sys.stderr,
        )
    try:
        write_curve(record.folder)
    except UsageError as error:  # the extra is not installed; the record is complete without a drawing
        print(error, file=sys.stderr)
    making.measure("distilled")
    return True


def _write(making: Making) -> Emulator:
    """Make it smaller, write it, open it again and measure what was handed out; nothing is left where that fails."""
    settings, kit, pair = making.settings, making.kit, making.pair
    layers = [pair.student[index] for index in making.kept]
    dtype, bits = DTYPES[kit.plan.dtype], None if settings.bits is None else int(settings.bits)
    if settings.prune:
        prune_smallest(_matrices(layers), settings.prune)
        making.measure("pruned")
    if settings.rank is not None and making.text is not None:
        with _as_stored(layers, dtype, rank=settings.rank, bits=None):
            making.measure(f"rank {settings.rank}")
    if bits is not None and making.text is not None:
        with _as_stored(layers, dtype, rank=settings.rank, bits=bits):
            making.measure(f"{bits} bits")
    with pair.with_student() as model:
        write_emulator(
            model.to("cpu", dtype),
            kit,
            settings.out,
            kept=making.kept,
            chosen_by=settings.choose,
            pruned=settings.prune,
            rank=settings.rank,
            bits=bits,
            distilled_steps=making.outcome.best_step if making.outcome is not None else 0,
        )
    try:
        return _checked(making)
    except BaseException:
        shutil.rmtree(settings.out)  # nobody shall receive an emulator that cannot be opened
        raise


def _checked(making: Making) -> Emulator:
    """The emulator as a data holder finds it, measured once more."""
    kit, pair, text = making.kit, making.pair, making.text
    emulator = open_emulator(making.settings.out)
    opened = emulator.load(kit, torch.float32 if text is not None else None)
    if text is not None:
        pair.model.float()
        pair.model.to(making.settings.device)
        layers = module_at(opened.to(making.settings.device).base_model, kit.plan.stack)
        pair.student = {index: layers[index] for index in kit.plan.trunk_layers}
        making.measure("as handed out")
    return emulator


def _matrices(layers: list[nn.Module]) -> list[nn.Module]:
    return [module for layer in layers for module in layer.modules() if isinstance(module, nn.Linear | Conv1D)]


@contextmanager
def _as_stored(layers: list[nn.Module], dtype: torch.dtype, *, rank: int | None, bits: int | None) -> Iterator[None]:
    """The layers' matrices as they will be once they were written and opened; inside the block."""
    before = [(p, p.data) for layer in layers for p in layer.parameters() if p.ndim == 2]
    try:
        for parameter, value in before:
            stored = compressed({"x": value.to("cpu", dtype)}, rank=rank, bits=bits)
            parameter.data = expanded(stored)["x"].to(value)
        yield
    finally:
        for parameter, value in before:
            parameter.data = value
