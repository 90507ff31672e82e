"""Settings of `splitfl audit`. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from splitfl.config_common import NOT_EMPTY, Columns, JsonFile, Threads
from splitfl.errors import UsageError
from splitfl.options import Check, Panel, Settings, at_least
from splitfl.options.values import parse_pairs

ATTACKER = Panel("The attacker")
REPORT = Panel("The report")
RECORDING = Panel("The recording")
KNOWLEDGE = ("K0", "K1", "K2", "K3")
_KNOWN = Check(test=lambda name: name in KNOWLEDGE, expected="K0, K1, K2 or K3")


@dataclass(frozen=True, kw_only=True)
class AuditSettings(Settings):
    """Attack what a run sent, as it was recorded, and write a report card of one page."""

    run: Annotated[Path, typer.Argument(help="Run directory of `splitfl tune --record`.")]
    json: JsonFile = None
    records: Annotated[int, "Rows to attack, drawn from those that crossed.", at_least(1)] = 200
    quick: Annotated[bool, "Less effort and fewer rows for a first look; the report says so."] = False
    seed: Annotated[int, "Seed of the choice of rows, of the attacks and of the intervals.", at_least(0)] = 0
    threads: Threads = None

    attack: Annotated[
        tuple[str, ...], "Attack to run. May be repeated. Default: all that fit the run.", NOT_EMPTY, ATTACKER
    ] = ()
    knowledge: Annotated[
        tuple[str, ...],
        "K0 architecture, K1 base weights, K2 and the adapter's seed, K3 the very bottom. May be repeated. Default: "
        "K1 and K3.",
        _KNOWN,
        ATTACKER,
    ] = ()
    auxiliary: Annotated[
        Path | None, "Rows that the attacker has of its own. Default: rows of another domain, which come with splitfl.",
        ATTACKER,
    ] = None  # fmt: skip
    domain: Annotated[
        Literal["none", "other", "same"] | None,
        "Whether --auxiliary is of the rows' domain; none takes its text away. Default: other.",
        ATTACKER,
    ] = None
    columns: Columns = ()
    model: Annotated[
        Path | None,
        "Directory of the whole model, which an owner has: for attacks with a language model, and to say what the "
        "model guesses alone.",
        ATTACKER,
    ] = None

    canaries: Annotated[
        Path | None,
        "Secrets that were planted in the rows: canaries.jsonl of `python -m splitfl.audit.canaries`.",
        ATTACKER,
    ] = None

    out: Annotated[Path | None, "Directory for the report card and what it is made of. Default: RUN/audit.", REPORT] = (
        None
    )
    texts: Annotated[bool, "Show the worst reconstructions beside their originals. Such a page holds rows.", REPORT] = (
        True
    )

    reference: Annotated[
        Path | None,
        "Run directory of the same tuning without protection: the report says what protection gave up.",
        REPORT,
    ] = None

    kit: Annotated[Path | None, "Kit directory. Default: as in the run.", RECORDING] = None
    key: Annotated[
        Path | None, "Your own secret key, which opens the recording. Default: as in the run.", RECORDING
    ] = None
    traffic: Annotated[
        Path | None, "A recording of the owner (`splitfl serve --record`): attack that one instead.", RECORDING
    ] = None
    owner_key: Annotated[Path | None, "The owner's secret key, which opens --traffic.", RECORDING] = None
    forget: Annotated[bool, "Attack nothing: destroy the run's recording.", RECORDING] = False

    def check(self) -> None:
        """Refuse options that contradict one another."""
        self.column_map()
        if self.domain == "none" and self.auxiliary is not None:
            raise UsageError("--domain none and --auxiliary contradict each other.", hint="give one of the two")
        if self.domain == "same" and self.auxiliary is None:
            raise UsageError(
                "--domain same needs text of the rows' domain.", hint="name a file of such rows with --auxiliary"
            )
        if self.owner_key is not None and self.traffic is None:
            raise UsageError("--owner-key opens --traffic, which was not given.", hint="name the owner's recording")
        if self.columns and self.auxiliary is None:
            raise UsageError("--columns names columns of --auxiliary, which was not given.")
        for option, given in (("--attack", self.attack), ("--traffic", self.traffic), ("--json", self.json)):
            if self.forget and given:
                raise UsageError(f"--forget attacks nothing, so {option} has no effect.", hint="give one of the two")
        if len(set(self.attack)) < len(self.attack) or len(set(self.knowledge)) < len(self.knowledge):
            raise UsageError("--attack or --knowledge names the same one twice.")

    def column_map(self) -> dict[str, str]:
        """Our name of a field to the file's name of its column."""
        return parse_pairs(self.columns, "--columns")

    @property
    def folder(self) -> Path:
        """Where the report goes."""
        return self.run / "audit" if self.out is None else self.out
