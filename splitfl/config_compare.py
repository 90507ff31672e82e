"""Settings of `splitfl compare`. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from splitfl.config_common import NOT_EMPTY, SIZE, Device, JsonFile
from splitfl.options import Panel, Settings, above, at_least, between

CHOICE = Panel("Which cells of the grid")
LIMITS = Panel("Advice: limits that a design has to keep")


@dataclass(frozen=True, kw_only=True)
class Limits(Settings):
    """What a design must not exceed; every limit that is given counts."""

    advise: Annotated[
        str | None,
        'Limits in words, with commas: "no gradient leaves, under 1 GB, at most 2 points lost". Also: no activation '
        "leaves; the model stays; at most 60 seconds; at most 10 % recovered; no attack works; at most 0.5 in money.",
        LIMITS,
    ] = None  # fmt: skip
    no_gradient: Annotated[bool, "No gradient of a row may leave.", LIMITS] = False
    no_activation: Annotated[bool, "No activation of a row may leave.", LIMITS] = False
    model_stays: Annotated[bool, "The owner hands out no whole model.", LIMITS] = False
    max_bytes: Annotated[str | None, "All that a party sends and receives, kit included, such as 1GB.", SIZE,
                         LIMITS] = None  # fmt: skip
    max_loss: Annotated[float | None, "Points lost to full LoRA: 0.01 of accuracy or macro F1, for text of a nat.",
                        at_least(0), LIMITS] = None  # fmt: skip
    max_seconds: Annotated[float | None, "Processor seconds of a party.", above(0), LIMITS] = None
    max_money: Annotated[float | None, "Cost at the grid's prices.", above(0), LIMITS] = None
    max_recovery: Annotated[
        float | None, "Advantage of the best attack over guessing, 0 to 1.", between(0, 1), LIMITS
    ] = None
    no_attack: Annotated[bool, "No attack that was run may do better than guessing.", LIMITS] = False
    on: Annotated[tuple[str, ...], "Data set that the limits are for. May be repeated. Default: all.", NOT_EMPTY,
                  LIMITS] = ()  # fmt: skip

    @property
    def any_limit(self) -> bool:
        """Whether advice was asked for."""
        given = (self.advise, self.max_bytes, self.max_loss, self.max_seconds, self.max_money, self.max_recovery)
        flags = (self.no_gradient, self.no_activation, self.model_stays, self.no_attack)
        return any(flags) or any(value is not None for value in given)


@dataclass(frozen=True, kw_only=True)
class CompareSettings(Limits):
    """Protocols, mechanisms, cuts, seeds and data sets from one file: utility, privacy, cost, and what to choose.

    Each cell is a real run in processes of its own, attacked afterwards. With limits, and an --out that holds cells
    already, nothing is run: the advice is read from them.
    """

    grid: Annotated[Path | None, typer.Argument(help="Grid file, TOML or YAML. Default: the one that comes along.")] = (
        None
    )
    out: Annotated[Path, "Directory for cells, table and page."] = Path("compare-out")
    json: JsonFile = None
    jobs: Annotated[int, "Cells at the same time, each process with one thread.", at_least(1)] = 2
    quick: Annotated[bool, "The grid's quick rows, steps and seeds.", CHOICE] = False
    resume: Annotated[bool, "Leave out the cells that --out holds already."] = False
    keep: Annotated[bool, "Keep the run directories, recordings included."] = False
    audit: Annotated[bool, "Attack every run.", CHOICE] = True
    data: Annotated[tuple[str, ...], "Only this data set. May be repeated.", NOT_EMPTY, CHOICE] = ()
    protocols: Annotated[tuple[str, ...], "Only this protocol. May be repeated.", NOT_EMPTY, CHOICE] = ()
    mechanisms: Annotated[tuple[str, ...], "Only this mechanism. May be repeated.", NOT_EMPTY, CHOICE] = ()
    seeds: Annotated[tuple[int, ...], "Only this seed. May be repeated.", at_least(0), CHOICE] = ()
    plan: Annotated[bool, "Print the cells, and run nothing."] = False
    device: Device = "cpu"
