"""What one attack gave, on the disk as soon as it is there: an audit that was broken off goes on from these files.

They hold figures, and (unless texts are off) the few worst reconstructions as token ids; so they have mode 0600.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from splitfl.audit.attack import Attack, Finds
from splitfl.audit.controls import Control
from splitfl.audit.intervals import Estimate
from splitfl.audit.scoring import Figures, main_name
from splitfl.audit.view import Sent
from splitfl.errors import DataError
from splitfl.files import replace_text
from splitfl.metrics import Result

Traffic: TypeAlias = Literal["as it crossed", "undefended"]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What an attack took."""

    seconds: float
    peak_rss_bytes: int
    """The most memory that this process held meanwhile."""
    queries: float | None = None
    """Passes of the bottom or model, where the attack counts them."""
    auxiliary_tokens: int = 0
    """Of the attacker's own text."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One reconstruction beside its original, as token ids."""

    dataset: str
    row: int
    share: float
    """Of its tokens that are right."""
    original: tuple[int, ...]
    guess: tuple[int, ...]
    """-1 where there is no guess."""
    special: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One attack with one knowledge, scored."""

    attack: str
    title: str
    source: str
    finds: Finds
    weak_point: str
    knowledge: str
    traffic: Traffic
    domain: str
    records: int
    sends: int
    figures: Figures
    cost: Cost
    notes: dict[str, float] = field(default_factory=dict)
    shown: tuple[Shown, ...] = ()
    negative: Control | None = None
    """What the same guesses score on shuffled targets."""

    @property
    def main(self) -> Estimate | None:
        """The figure that it is ranked by."""
        return self.figures.get(self.metric)

    @property
    def metric(self) -> str:
        """The name of `main`."""
        return main_name(self.finds, self.figures)

    @property
    def name(self) -> str:
        """For people and for files."""
        return f"{self.attack} {self.knowledge}"


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """What was not tested, and why."""

    attack: str
    knowledge: str
    why: str


def named(attack: Attack, **more: Any) -> dict[str, Any]:
    """The fields of an `Outcome` that say which attack it is."""
    words = ("title", "source", "finds", "weak_point")
    return {"attack": attack.name, **{word: getattr(attack, word) for word in words}, **more}


def digest(sent: Iterable[Sent], *more: object) -> str:
    """Of the traffic and of whatever else a result depends on."""
    total = hashlib.sha256(json.dumps([str(each) for each in more]).encode())
    for each in sent:
        for tensor in (each.hidden, each.output, each.gradient, each.returned):
            if tensor is not None:
                total.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


# ---- files


def keep(path: Path, key: str, outcome: Any) -> None:
    """Write an `Outcome`, a `Control` or an `Examined`, to be found again under the same key; mode 0600."""
    replace_text(path, json.dumps({"key": key, "result": dataclasses.asdict(outcome)}, indent=1) + "\n")
    path.chmod(0o600)


def find_outcome(path: Path, key: str) -> Outcome | None:
    """The outcome in this file, if it was made under the same key."""
    found = read_kept(path, key)
    if found is None or "facts" in found:  # or an `Examined`
        return None
    try:
        return Outcome(
            **{
                **found,
                "figures": {name: Estimate(**each) for name, each in found["figures"].items()},
                "cost": Cost(**found["cost"]),
                "shown": tuple(Shown(**{k: _tuple(v) for k, v in each.items()}) for each in found["shown"]),
                "negative": None if found["negative"] is None else _control(found["negative"]),
            }
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise unreadable(path, error) from error


def find_control(path: Path, key: str) -> Control | None:
    """The control in this file, if it was made under the same key."""
    found = read_kept(path, key)
    try:
        return None if found is None else _control(found)
    except (KeyError, TypeError) as error:
        raise unreadable(path, error) from error


def _control(found: Mapping[str, Any]) -> Control:
    return Control(**{**found, "found": None if found["found"] is None else Estimate(**found["found"])})


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def read_kept(path: Path, key: str) -> dict[str, Any] | None:
    """The fields of what `keep` wrote to this file, if it was made under the same key.

    Raises:
        DataError: the file holds something else.
    """
    if not path.is_file():
        return None
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        same, result = held["key"] == key, held["result"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise unreadable(path, error) from error
    return dict(result) if same else None


def unreadable(path: Path, error: Exception) -> DataError:
    """What to say of a file that is no result."""
    return DataError(
        f"{path} is no result of an audit ({type(error).__name__}).", hint="remove it, and that attack is run again"
    )


# ---- figures for --json


def as_results(outcomes: Sequence[Outcome], controls: Sequence[Control]) -> list[Result]:
    """Every figure; where there is an undefended twin its figure is the reference."""
    twins = {
        (each.name, metric): figure.value
        for each in outcomes
        if each.traffic == "undefended"
        for metric, figure in each.figures.items()
    }
    results = []
    for each in outcomes:
        case = f"{each.name}, {each.traffic}"

        def add(metric: str, value: float | None, unit: str, reference: float | None = None, case: str = case) -> None:
            results.append(Result(case=case, metric=metric, value=value, unit=unit, reference=reference))

        for metric, figure in each.figures.items():
            beside = twins.get((each.name, metric)) if each.traffic == "as it crossed" else None
            add(metric, figure.value, "share", beside)
            add(f"{metric}, low", figure.low, "share")
            add(f"{metric}, high", figure.high, "share")
        add("records", each.records, "records")
        add("rows as sent", each.sends, "rows")
        add("time", each.cost.seconds, "s")
        add("peak memory", each.cost.peak_rss_bytes, "B")
        add("queries", each.cost.queries, "passes")
        add("auxiliary text", each.cost.auxiliary_tokens, "tokens")
    for control in controls:
        case = f"control, {control.name}: {control.attack} {control.knowledge}"
        value = None if control.found is None else control.found.value
        results.append(Result(case=case, metric=control.expected, value=value, unit="share"))
        results.append(Result(case=case, metric="works", value=int(control.works), unit="yes or no"))
    return results
