"""A worker of `splitfl bench utility`: ``python -m party.utility_side``. Imports the libraries once, then does runs.

Each run is `party.tune.tune` as `splitfl tune` calls it, or the reference: LoRA on every layer of the whole model in
this process, with the same rows, batches, steps, optimiser and evaluator, and no owner.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import msgspec
import torch
from peft import PeftModel

from party.evaluate import Score, evaluate
from party.model import open_model
from party.offline import WITH_EMULATOR
from party.rundir import RunDirectory
from party.trainer import SplitTrainer
from party.tune import Data, _training_arguments, read_data, tune
from party.whole import whole_with_lora
from splitfl.bench.orders import Line
from splitfl.bench.side import own_output
from splitfl.bench.utility_cases import FIGURES, SCORES
from splitfl.bench.utility_orders import CutMeasured, MeasureCut, Trained, UtilityOrder, UtilityReady
from splitfl.config import TuneSettings
from splitfl.errors import SplitflError, printable
from splitfl.kit import Kit, open_kit
from splitfl.link import TrunkRequest
from splitfl.options import read_config
from splitfl.quiet import silence_library_warnings

_BATCH = 16  # rows that pass the bottom together when the cut is measured


def settings_in(file: Path) -> TuneSettings:
    """The settings that `splitfl tune --config FILE` would have."""
    values = read_config(file, TuneSettings)
    given: Any = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return TuneSettings(**given)


# ---- the cut


class _Seen(Exception):
    """Leaves the model's forward pass at the cut: nothing above it is needed, and there is no owner to ask."""


class _Measure:
    """A `splitfl.link.TrunkLink` that notes how large activations are and sends nothing."""

    def __init__(self) -> None:
        self.mask = torch.empty(0)
        self.tokens: list[float] = []
        self.rows: list[float] = []

    def forward(self, request: TrunkRequest) -> tuple[torch.Tensor, int]:
        assert isinstance(request.hidden, torch.Tensor)  # noqa: S101
        norms = request.hidden.float().norm(dim=-1) * self.mask
        self.tokens += norms[self.mask.bool()].tolist()
        self.rows += norms.norm(dim=-1).tolist()
        raise _Seen

    def backward(self, step: int, gradient: object) -> torch.Tensor:
        raise AssertionError("nothing was sent")

    def release(self, *, caches: tuple[int, ...] = (), steps: tuple[int, ...] = ()) -> None:
        """Nothing is held."""


def measure_cut(settings: TuneSettings, rows: int) -> CutMeasured:
    """Sizes of the activations that a run would send of its training rows, before anything is trained or sent."""
    kit = open_kit(settings.kit)
    data = read_data(settings, kit)
    link = _Measure()
    model = open_model(kit, link, dtype=settings.dtype)
    for start in range(0, min(rows, len(data.train)), _BATCH):
        batch = data.collator(data.train[start : min(start + _BATCH, rows)])
        batch.pop("labels")
        link.mask = batch["attention_mask"]
        try:
            with torch.no_grad():
                model(**batch)
        except _Seen:
            pass
    return CutMeasured(
        norm=math.sqrt(statistics.fmean(norm * norm for norm in link.tokens)),
        row_norms=tuple(link.rows),
        median_length=statistics.median(len(example["input_ids"]) for example in data.train),
        train_rows=len(data.train),
        held_out_rows=0 if data.held_out is None else len(data.held_out),
        vocabulary=int(kit.config.get_text_config().vocab_size),
    )


# ---- runs


def train_cell(settings: TuneSettings, whole: Path | None) -> dict[str, float]:
    """Do the run; metric to value.

    Raises:
        SplitflError: whatever the run was refused for.
    """
    if whole is not None:
        return train_whole(settings, whole)
    code = tune(settings)
    if code:
        raise KeyboardInterrupt  # the only other way in which `tune` returns
    assert settings.json is not None  # noqa: S101
    return _from_results(json.loads(settings.json.read_text(encoding="utf-8"))["results"])


def _from_results(results: list[dict[str, Any]]) -> dict[str, float]:
    """The figures of ``splitfl tune --json`` under the benchmark's names."""
    named = {r["metric"].removesuffix(f" ({WITH_EMULATOR})"): r for r in results}
    figures = {name: r["value"] for name, r in named.items() if name in FIGURES}
    figures |= {f"{name} before": r["reference"] for name, r in named.items() if name in SCORES}
    return figures


def train_whole(settings: TuneSettings, model_dir: Path, *, everywhere: bool = True) -> dict[str, float]:
    """The reference: plain PEFT on the model in one piece.

    Args:
        settings: of the run that it is compared with; what concerns the owner and protection is not looked at.
        model_dir: the whole model; a head that it lacks is the kit's.
        everywhere: LoRA on every layer; False puts it on the party's layers alone, for comparisons with `split`.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    kit = open_kit(settings.kit)
    data = read_data(settings, kit)
    started = time.monotonic()
    plan = None if everywhere else kit.plan
    model = whole_with_lora(settings, kit, model_dir, plan)
    run = RunDirectory(settings.out)
    trainer = SplitTrainer(
        model=model,
        args=_training_arguments(settings, run),  # the very arguments of the runs that this one is compared with
        train_dataset=data.train,
        run=run,
        plan=kit.plan,
        collator=data.collator,
        held_out=None,
    )
    before = _score(settings, kit, data, model)
    trainer.train()
    after = _score(settings, kit, data, model)
    figures: dict[str, float] = {"steps": trainer.state.global_step, "bytes sent": 0, "bytes received": 0}
    figures["seconds"] = time.monotonic() - started
    for name in SCORES:
        field = name.removeprefix("held-out ")
        now, then = getattr(after, field), getattr(before, field)
        if now is not None:
            figures |= {name: now, f"{name} before": then}
    return figures


def _score(settings: TuneSettings, kit: Kit, data: Data, model: PeftModel) -> Score:
    assert data.held_out is not None  # noqa: S101  every run of the benchmark has held-out rows
    size = settings.per_device_eval_batch_size
    return evaluate(model, data.held_out, data.collator, task=kit.plan.task, batch_size=size, device=settings.device)


# ---- orders


def answer(order: UtilityOrder) -> Line:
    """Do what was asked."""
    settings = settings_in(Path(order.settings))
    if isinstance(order, MeasureCut):
        return measure_cut(settings, order.rows)
    try:
        return Trained(figures=train_cell(settings, None if order.whole is None else Path(order.whole)))
    except SplitflError as error:
        return Trained(figures={}, failed=printable(" ".join(str(error).split())))


def _say(answers: TextIO, line: Line) -> None:
    answers.write(msgspec.json.encode(line).decode() + "\n")
    answers.flush()


def main() -> None:
    """Run until standard input ends, which it also does when the measuring process is gone."""
    silence_library_warnings()
    answers = own_output()
    _say(answers, UtilityReady(pid=os.getpid()))
    decoder = msgspec.json.Decoder(UtilityOrder)
    for line in sys.stdin:
        _say(answers, answer(decoder.decode(line)))


if __name__ == "__main__":
    main()
