"""What a grid file says: data sets, protocols, mechanisms, seeds and prices. Everything is checked before a run.

[grid]            seeds, and those of --quick
[prices]          of an hour and a gigabyte
[data.NAME]       rows, model, cuts and how they are trained; the same for every design
[mechanism.NAME]  options of `splitfl tune` that go with a protocol, or sizes relative to what crosses
[protocol.NAME]   how a protocol is run, and with which mechanisms
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from splitfl.config import TuneSettings
from splitfl.config_common import NOT_EMPTY
from splitfl.config_federation import FEDERATED_PROTOCOLS
from splitfl.errors import UsageError, nearest, printable
from splitfl.options import Check, Settings, above, at_least, fields_of, load_table, read_part

S = TypeVar("S", bound=Settings)

SHIPPED = Path(__file__).with_name("grid.toml")
NONE = "none"
_CUT = Check(test=lambda text: is_cut(text), expected="BOTTOM+TOP, such as 2+2")
_TABLES = ("grid", "prices", "data", "mechanism", "protocol")
_SET_HERE = frozenset(
    ("kit", "out", "resume", "emulator", "json", "owner", "owner_key", "key", "insecure_loopback", "train", "eval",
     "columns", "device", "threads", "seed", "ledger", "federate", "coordinator_key", "peers", "model", "public",
     "local_steps", "max_steps", "num_train_epochs", "dp_rounds", "protocol", "record")
)  # fmt: skip
"""Options of `splitfl tune` that the comparison itself gives."""


def is_cut(text: str) -> bool:
    """Whether `text` is BOTTOM+TOP."""
    bottom, plus, top = text.partition("+")
    return plus == "+" and bottom.isascii() and bottom.isdigit() and top.isascii() and top.isdigit()


@dataclass(frozen=True, kw_only=True)
class Course(Settings):
    """The table `grid`."""

    seeds: Annotated[tuple[int, ...], "Seeds of every run.", at_least(0)] = (0, 1, 2)
    quick_seeds: Annotated[tuple[int, ...], "Seeds with --quick.", at_least(0)] = (0,)
    parties: Annotated[int, "Parties of a federation; they share the training rows evenly.", at_least(2)] = 3
    distil_steps: Annotated[int, "Steps of distillation of an emulator.", at_least(0)] = 200
    quick_distil_steps: Annotated[int, "The same with --quick.", at_least(0)] = 40
    records: Annotated[int, "Rows that `splitfl audit` attacks of a run.", at_least(1)] = 100
    quick_records: Annotated[int, "The same with --quick.", at_least(1)] = 12
    knowledge: Annotated[tuple[str, ...], "What the attackers know: K0 to K3.", NOT_EMPTY] = ("K1", "K3")
    quick_knowledge: Annotated[tuple[str, ...], "The same with --quick.", NOT_EMPTY] = ("K1",)
    attacks: Annotated[tuple[str, ...], "Attacks of `splitfl audit`. Default: all that fit.", NOT_EMPTY] = ()
    quick_attacks: Annotated[tuple[str, ...], "The same with --quick.", NOT_EMPTY] = ()


@dataclass(frozen=True, kw_only=True)
class Prices(Settings):
    """The table `prices`."""

    currency: Annotated[str, "What the prices are in.", NOT_EMPTY] = "USD"
    cpu_hour: Annotated[float, "An hour of a processor core.", at_least(0)] = 0.05
    gpu_hour: Annotated[float, "An hour of the device, where one is used.", at_least(0)] = 2.0
    gigabyte: Annotated[float, "10^9 bytes sent or received by a party.", at_least(0)] = 0.09


@dataclass(frozen=True, kw_only=True)
class Task(Settings):
    """A table `data.NAME`."""

    title: Annotated[str, "What the rows are, for people.", NOT_EMPTY]
    model: Annotated[str, "embedded, minilm, or a model directory.", NOT_EMPTY]
    train: Annotated[str, "File of training rows; shared:PATH and shipped:FILE are known places.", NOT_EMPTY]
    held_out: Annotated[str, "File of held-out rows.", NOT_EMPTY]
    fallback_train: Annotated[str | None, "Training rows where the first file is not there.", NOT_EMPTY] = None
    fallback_held_out: Annotated[str | None, "Held-out rows likewise.", NOT_EMPTY] = None
    fields: Annotated[tuple[str, ...], "Names of text and label, or prompt and completion, in the files."]
    classes: Annotated[int, "Number of classes; 0 for a language model.", at_least(0)] = 0
    rows: Annotated[tuple[int, ...], "Most training and held-out rows.", at_least(1)]
    quick_rows: Annotated[tuple[int, ...], "The same with --quick.", at_least(1)]
    public_rows: Annotated[int, "Rows that every party of fed-kd has; taken from the training file.", at_least(1)] = 48
    cuts: Annotated[tuple[str, ...], "BOTTOM+TOP, layers that the party holds.", _CUT]
    keep: Annotated[int, "Layers of the trunk in an emulator.", at_least(1)]
    max_length: Annotated[int, "Longest row, in tokens.", at_least(2)]
    batch: Annotated[int, "Rows in a batch.", at_least(1)] = 8
    steps: Annotated[int, "Training steps of every run.", at_least(1)]
    quick_steps: Annotated[int, "The same with --quick.", at_least(1)]
    learning_rate: Annotated[float, "Peak learning rate.", above(0)]
    metric: Annotated[Literal["loss", "accuracy", "macro_f1"], "Score that designs are compared by."]

    def check(self) -> None:
        """Two numbers of rows, two fields, and a score that the task has."""
        for name in ("rows", "quick_rows", "fields"):
            if len(getattr(self, name)) != 2:
                raise UsageError(f"{name} has {len(getattr(self, name))} entries.", expected="two")
        if (self.metric == "macro_f1") > bool(self.classes):
            raise UsageError("macro_f1 is no score of a language model.", expected="loss or accuracy")

    @property
    def kind(self) -> Literal["causal-lm", "sequence-classification"]:
        """As `splitfl kit --task` has it."""
        return "sequence-classification" if self.classes else "causal-lm"

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger score is the better one."""
        return self.metric != "loss"


@dataclass(frozen=True, kw_only=True)
class Size(Settings):
    """What a mechanism may say beside options of `splitfl tune`."""

    ratio: Annotated[float | None, "r / sigma: a token's norm at the cut over the noise's deviation.", above(0)] = None
    title: Annotated[str | None, "For tables. Default: its name.", NOT_EMPTY] = None


@dataclass(frozen=True, kw_only=True)
class Use(Settings):
    """What a protocol table may say beside options of `splitfl tune`."""

    mechanisms: Annotated[tuple[str, ...], "Mechanisms to run it with.", NOT_EMPTY] = (NONE,)
    rounds: Annotated[int, "Rounds of a federation; the steps are shared among them.", at_least(1)] = 4
    data: Annotated[tuple[str, ...], "Data sets to run it on. Default: all.", NOT_EMPTY] = ()
    learning_rate_factor: Annotated[float, "Times the data set's learning rate.", above(0)] = 1.0


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """A mechanism with its options of `splitfl tune`."""

    name: str
    size: Size = field(default_factory=Size)
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A protocol as it is run, with its options of `splitfl tune`."""

    name: str
    use: Use
    options: Mapping[str, Any]

    @property
    def federated(self) -> bool:
        """Whether several parties run it in rounds."""
        return self.name in FEDERATED_PROTOCOLS


@dataclass(frozen=True, kw_only=True)
class Grid:
    """All that a grid file says."""

    path: Path
    course: Course
    prices: Prices
    data: Mapping[str, Task]
    mechanisms: Mapping[str, Mechanism]
    protocols: Mapping[str, Protocol]

    def digest(self, *parts: object) -> str:
        """A short digest of `parts`, which have to be records of settings or plain values."""
        plain = [vars(part) if dataclasses.is_dataclass(part) else part for part in parts]
        return hashlib.blake2b(json.dumps(plain, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


def read_grid(path: Path) -> Grid:
    """Read and check a grid file.

    Raises:
        UsageError: it cannot be read, or a table, key or value is not one that there is.
    """
    told = load_table(path)
    for name, table in told.items():
        if name not in _TABLES:
            raise UsageError(f"{path}: there is no table {printable(str(name), 40)!r}.", hint=nearest(name, _TABLES))
        if not isinstance(table, dict):
            raise UsageError(f"{path}: {name!r} is no table.", expected=f"[{name}]")
    grid = Grid(
        path=path,
        course=_record(path, "grid", told.get("grid", {}), Course),
        prices=_record(path, "prices", told.get("prices", {}), Prices),
        data={name: _record(path, f"data.{name}", table, Task) for name, table in _named(path, told, "data")},
        mechanisms={NONE: Mechanism(name=NONE), **{m.name: m for m in _mechanisms(path, told)}},
        protocols={p.name: p for p in _protocols(path, told)},
    )
    _check_names(grid)
    return grid


def _named(path: Path, told: Mapping[str, Any], kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, table in told.get(kind, {}).items():
        if not isinstance(table, dict):
            raise UsageError(f"{path}: {kind}.{name} is no table.", expected=f"[{kind}.{name}]")
        if not name or not str(name).replace("-", "").replace("_", "").isalnum():
            raise UsageError(f"{path}: {printable(str(name), 40)!r} is no name.", expected="letters, digits and dashes")
        yield name, table


def _record(path: Path, place: str, table: Mapping[str, Any], kind: type[S]) -> S:
    try:
        values: Any = read_part(path, table, kind)
        return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    except TypeError as error:
        needed = [f.name for f in fields_of(kind) if f.default is dataclasses.MISSING and f.name not in values]
        raise UsageError(f"{path}: [{place}] lacks {', '.join(needed)}.") from error
    except UsageError as error:
        raise UsageError(f"[{place}] {error.problem}", expected=error.expected, hint=error.hint) from error


def _mixed(path: Path, place: str, table: Mapping[str, Any], kind: type[S]) -> tuple[S, dict[str, Any]]:
    """A table in which keys of `kind` stand beside options of `splitfl tune`."""
    own = {field.name for field in fields_of(kind)}
    mine = {key: value for key, value in table.items() if str(key).replace("-", "_") in own}
    rest = {key: value for key, value in table.items() if key not in mine}
    record = _record(path, place, mine, kind)
    try:
        options = read_part(path, rest, TuneSettings)
    except UsageError as error:
        raise UsageError(f"[{place}] {error.problem}", expected=error.expected, hint=error.hint) from error
    for name in options:
        if name in _SET_HERE:
            raise UsageError(f"{path}: [{place}] gives {name}, which the comparison sets itself.", hint="leave it out")
    return record, {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


def _mechanisms(path: Path, told: Mapping[str, Any]) -> Iterator[Mechanism]:
    for name, table in _named(path, told, "mechanism"):
        if name == NONE:
            raise UsageError(f"{path}: the mechanism {NONE!r} is there already, and does nothing.")
        size, options = _mixed(path, f"mechanism.{name}", table, Size)
        if size.ratio is not None and options.get("noise") != "gauss":
            raise UsageError(f"{path}: [mechanism.{name}] has a ratio.", expected='noise = "gauss" beside it')
        yield Mechanism(name=name, size=size, options=options)


def _protocols(path: Path, told: Mapping[str, Any]) -> Iterator[Protocol]:
    for name, table in _named(path, told, "protocol"):
        use, options = _mixed(path, f"protocol.{name}", table, Use)
        yield Protocol(name=name, use=use, options=options)


def _check_names(grid: Grid) -> None:
    for kind in ("data", "protocols"):
        if not getattr(grid, kind):
            raise UsageError(f"{grid.path} names no {'data set' if kind == 'data' else 'protocol'}.")
    for protocol in grid.protocols.values():
        for names, known in ((protocol.use.mechanisms, grid.mechanisms), (protocol.use.data, grid.data)):
            for name in names:
                if name not in known:
                    raise UsageError(
                        f"{grid.path}: [protocol.{protocol.name}] names {printable(name, 40)!r}, which is not there.",
                        hint=nearest(name, known),
                    )
