"""What `splitfl emulator` prints and what its `--json` holds: what is given away, and what it is worth."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from model_owner.sensitivity import Sensitivity
from model_owner.student import Figures
from splitfl.emulator import Emulator
from splitfl.load import parameter_count
from splitfl.metrics import Result
from splitfl.report import as_size

if TYPE_CHECKING:
    from model_owner.emulate import Making


def print_sensitivity(sensitivity: Sensitivity, kept: tuple[int, ...]) -> None:
    """A table: what each layer's absence costs, and which ones are kept."""
    table = Table(title="held-out text with one layer of the trunk left out", title_justify="left")
    for column in ("layer", "loss", "harm", "distance", "kept"):
        table.add_column(column, justify="right")
    for index, one in sensitivity.without.items():
        loss = "" if one.lm is None else f"{one.lm:.4f}"
        table.add_row(
            str(index), loss, f"{sensitivity.harm(index):+.4f}", f"{one.kd:.4f}", "yes" if index in kept else ""
        )
    Console(highlight=False).print(table)


def print_emulator(making: Making, emulator: Emulator) -> None:
    """What is in it, what share of the trunk that is, and what it does on held-out text."""
    plan, cut, settings = emulator.plan, making.kit.plan, making.settings
    trunk = trunk_parameters(making)
    share = f"{100 * plan.parameters / trunk:.1f} % of the trunk's {trunk:,}"
    print(f"emulator {settings.out}  ({as_size(emulator.bytes)})")
    print(f"model    {cut.model_type}, {cut.layers} layers, {cut.task}, {cut.dtype}")
    print(
        f"gives    layers {', '.join(map(str, plan.kept))} of the trunk (chosen by: {plan.chosen_by}): "
        f"{plan.parameters:,} parameters, {share}"
    )
    print(f"keeps    layers {', '.join(str(i) for i in cut.trunk_layers if i not in plan.kept)}")
    if made := _made(making):
        print(f"changed  {'; '.join(made)}")
    print(f"trunk    {plan.trunk}")
    print(f"plan     {plan.plan}")
    if making.stages:
        _print_stages(making.stages)
        _warn_of_margin(making.stages)


def _made(making: Making) -> list[str]:
    settings, outcome = making.settings, making.outcome
    made = []
    if outcome is not None:
        made.append(f"distilled: the state of step {outcome.best_step} of {settings.distil_steps}")
    if settings.prune:
        made.append(f"{100 * settings.prune:g} % of each matrix set to zero")
    if settings.rank is not None:
        made.append(f"matrices of rank {settings.rank} where that is fewer values")
    if settings.bits is not None:
        made.append(f"matrices in {settings.bits} bits")
    return made


def _print_stages(stages: dict[str, Figures]) -> None:
    table = Table(title="on held-out public text", title_justify="left")
    for column in ("after", "loss", "perplexity", "distance to the trunk's output"):
        table.add_column(column, justify="left" if column == "after" else "right")
    for name, one in stages.items():
        words = ("", "") if one.lm is None else (f"{one.lm:.4f}", f"{math.exp(min(one.lm, 700.0)):.2f}")
        table.add_row(name, *words, f"{one.kd:.4f}")
    Console(highlight=False).print(table)


def _warn_of_margin(stages: dict[str, Figures]) -> None:
    """Say so where the emulator predicts the text as well as the model: then it is worth as much on such text."""
    full, given = stages["full model"].lm, list(stages.values())[-1].lm
    if full is not None and given is not None and given <= full:
        print(
            "note     on this text the emulator is no worse than the full model: whoever holds it needs the model no "
            "more for text of this kind"
        )


def trunk_parameters(making: Making) -> int:
    """Parameters of the whole trunk."""
    return sum(parameter_count(layer) for layer in making.pair.full.values())


def results(making: Making, emulator: Emulator) -> list[Result]:
    """The figures of `--json`; held-out figures stand beside those of the full model."""
    plan, trunk = emulator.plan, trunk_parameters(making)
    width = {"float32": 4}.get(plan.dtype, 2)

    def one(metric: str, value: float | int | None, unit: str, reference: float | None = None) -> Result:
        return Result(case="emulator", metric=metric, value=value, unit=unit, reference=reference)

    found = [
        one("layers given", len(plan.kept), "layers", len(making.kit.plan.trunk_layers)),
        one("parameters given", plan.parameters, "parameters", trunk),
        one("size", emulator.bytes, "bytes", trunk * width),
    ]
    full = making.stages.get("full model")
    for stage, figures in making.stages.items():
        if figures.lm is not None and full is not None:
            found.append(one(f"held-out loss, {stage}", figures.lm, "nats", full.lm))
        found.append(one(f"distance, {stage}", figures.kd, "relative squared error"))
    if making.sensitivity is not None:
        for index in making.sensitivity.without:
            found.append(one(f"harm without layer {index}", making.sensitivity.harm(index), "of the loss"))
    if making.outcome is not None:
        found.append(one("distilled steps", making.outcome.best_step, "steps", making.settings.distil_steps))
        found.append(one("distillation", making.outcome.seconds, "s"))
        found.append(one("tokens distilled on", making.outcome.tokens, "tokens"))
    return found
