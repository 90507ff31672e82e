"""Limits in, the design that fits and the reasons against the others out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from splitfl.compare.result import MONEY, PARTY_S
from splitfl.compare.summary import Row
from splitfl.config_compare import Limits
from splitfl.errors import UsageError, printable
from splitfl.options import parse_size
from splitfl.report import as_duration, as_size

_NUMBER = r"(\d+(?:\.\d+)?)"
_MOST = r"(?:at most|under|below|less than|no more than|up to)"
_CLAUSES: tuple[tuple[str, str], ...] = (
    (r"no gradients? (?:leaves?|crosses)", "no_gradient"),
    (r"no activations? (?:leaves?|crosses)", "no_activation"),
    (r"(?:the )?model stays(?: with the owner)?", "model_stays"),
    (r"no attack (?:works|does better than guessing)", "no_attack"),
    (rf"{_MOST} {_NUMBER} points?(?: of \w+)?(?: lost)?", "max_loss"),
    (rf"{_MOST} {_NUMBER} ?s(?:ec(?:onds?)?)?", "max_seconds"),
    (rf"{_MOST} {_NUMBER} ?% (?:is )?recovered", "percent"),
    (rf"{_MOST} {_NUMBER} in money", "max_money"),
    (rf"{_MOST} ({_NUMBER} ?[kmgt]i?b)", "max_bytes"),
)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Every limit, from words and options together; None asks nothing."""

    no_gradient: bool = False
    no_activation: bool = False
    model_stays: bool = False
    no_attack: bool = False
    max_bytes: float | None = None
    max_loss: float | None = None
    max_seconds: float | None = None
    max_money: float | None = None
    max_recovery: float | None = None


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What was found."""

    chosen: Row | None
    fitting: tuple[Row, ...]
    """All that fit, the chosen one first."""
    reasons: Mapping[str, tuple[str, ...]]
    """By design and data set: why it does not fit, or why another that fits is better."""


def rules_of(limits: Limits) -> Rules:
    """The limits in words and in options.

    Raises:
        UsageError: words that say nothing that is known, or a limit that is given twice.
    """
    found: dict[str, bool | float] = {}
    for clause in (limits.advise or "").split(","):
        if clause.strip():
            name, value = _clause(clause)
            _put(found, name, value)
    for name in ("no_gradient", "no_activation", "model_stays", "no_attack"):
        if getattr(limits, name):
            found[name] = True
    for name in ("max_loss", "max_seconds", "max_money", "max_recovery"):
        if getattr(limits, name) is not None:
            _put(found, name, getattr(limits, name))
    if limits.max_bytes is not None:
        _put(found, "max_bytes", float(parse_size(limits.max_bytes)))
    return Rules(**found)  # type: ignore[arg-type]


def _put(found: dict[str, bool | float], name: str, value: bool | float) -> None:
    if name in found:
        raise UsageError(f"The limit {name.replace('_', ' ')} was given twice.", hint="give it once")
    found[name] = value


def _clause(text: str) -> tuple[str, bool | float]:
    words = " ".join(text.lower().removeprefix("and ").split()).removeprefix("and ")
    for pattern, name in _CLAUSES:
        match = re.fullmatch(pattern, words)
        if match is None:
            continue
        if name == "percent":
            return "max_recovery", float(match[1]) / 100
        if name == "max_bytes":
            return name, float(parse_size(match[1]))
        return name, float(match[1]) if match.groups() else True
    raise UsageError(
        f"The limit {printable(words, 60)!r} is not understood.",
        expected='for instance "no gradient leaves, under 1 GB, at most 2 points lost"',
        hint="each limit is also an option: see `splitfl compare --help`",
    )


# ---- who fits


_TESTS: tuple[Callable[[Row, Rules], str | None], ...] = (
    lambda row, rules: _sends(row, "gradient", "gradients of the rows leave") if rules.no_gradient else None,
    lambda row, rules: _sends(row, "hidden", "activations of the rows leave") if rules.no_activation else None,
    lambda row, rules: "the owner hands out the whole model" if rules.model_stays and row.hands == "model" else None,
    lambda row, rules: _beyond(row.bytes, rules.max_bytes, lambda value: f"{as_size(int(value))} sent and received"),
    lambda row, rules: (
        _unknown(row.lost, rules.max_loss, "what it loses is not known")
        or _beyond(row.lost or 0.0, rules.max_loss, lambda value: f"{value:.1f} points lost")
    ),
    lambda row, rules: _beyond(row.figures[PARTY_S], rules.max_seconds, lambda v: f"{as_duration(v)} at the party"),
    lambda row, rules: _beyond(row.figures[MONEY], rules.max_money, lambda value: f"costs {value:.4f}"),
    lambda row, rules: (
        _unknown(row.advantage, rules.max_recovery, _unattacked(row))
        or _beyond(row.advantage or 0.0, rules.max_recovery, lambda value: _attack(row, value))
    ),
    lambda row, rules: (
        _unknown(row.advantage, rules.no_attack or None, _unattacked(row))
        or (_attack(row, row.advantage or 0.0) if rules.no_attack and row.works else None)
    ),
)


def reasons_against(row: Row, rules: Rules) -> tuple[str, ...]:
    """Every limit that a row does not keep; empty where it fits."""
    return tuple(reason for test in _TESTS if (reason := test(row, rules)) is not None)


def _sends(row: Row, tensor: str, words: str) -> str | None:
    return words if tensor in row.sends else None


def _beyond(value: float, limit: float | None, words: Callable[[float], str]) -> str | None:
    return words(value) if limit is not None and value > limit else None


def _unknown(value: float | None, limit: object | None, words: str) -> str | None:
    return words if limit is not None and value is None else None


def _unattacked(row: Row) -> str:
    return f"it was not attacked ({row.not_attacked or 'no audit'}), so nothing is known of what it leaks"


def _attack(row: Row, advantage: float) -> str:
    best = row.best
    if best is None:
        return f"an attack gets {100 * advantage:.0f} % of what guessing leaves"
    return (
        f"attack {best.name} ({best.knowledge}) has {best.metric} {best.value:.2f}, where guessing has "
        f"{best.baseline:.2f}"
    )


def advise(rows: Sequence[Row], rules: Rules, on: Sequence[str]) -> dict[str, Advice]:
    """For each data set the design that fits and loses least; among equals the one that leaks and then costs least.

    Args:
        rows: of a comparison.
        rules: the limits.
        on: data sets; none means all.

    Raises:
        UsageError: a data set that has no row.
    """
    known = dict.fromkeys(row.data for row in rows)
    for name in on:
        if name not in known:
            raise UsageError(f"--on names {printable(name, 40)!r}.", expected=", ".join(known) or "a data set")
    return {name: _for(rows, rules, name) for name in (on or known)}


def _for(rows: Sequence[Row], rules: Rules, data: str) -> Advice:
    mine = [row for row in rows if row.data == data and not row.is_reference]
    against = {place(row): reasons_against(row, rules) for row in mine}
    fitting = sorted((row for row in mine if not against[place(row)]), key=_rank)
    for row in fitting[1:]:
        against[place(row)] = (_less_good(row, fitting[0]),)
    chosen = fitting[0] if fitting else None
    reasons = {name: found for name, found in against.items() if found}
    return Advice(chosen=chosen, fitting=tuple(fitting), reasons=reasons)


def place(row: Row) -> str:
    """A design, with its cut."""
    return f"{row.design} (cut {row.cut})"


def _rank(row: Row) -> tuple[float, float, float]:
    lost = row.lost if row.lost is not None else float("inf")
    advantage = row.advantage if row.advantage is not None else 1.0
    return round(max(lost, 0.0), 1), advantage, row.figures[MONEY]


def _less_good(row: Row, best: Row) -> str:
    mine, its = _rank(row), _rank(best)
    if mine[0] > its[0]:
        return f"fits, but loses {mine[0]:.1f} points against {its[0]:.1f}"
    if mine[1] > its[1]:
        leaks = "was not attacked" if row.advantage is None else f"leaks more (advantage {mine[1]:.2f} to {its[1]:.2f})"
        return f"fits, but {leaks}"
    return f"fits, but costs {mine[2]:.4f} against {its[2]:.4f}"


def in_words(data: str, advice: Advice) -> list[str]:
    """Lines for a person."""
    lines = [f"{data}:"]
    if advice.chosen is None:
        lines.append("  no design of this comparison keeps these limits.")
    else:
        row = advice.chosen
        kept = "" if row.kept is None else f", keeps {100 * row.kept.mean:.0f} % of full LoRA's gain"
        leak = "not attacked" if row.advantage is None else f"advantage of the best attack {row.advantage:.2f}"
        lines.append(f"  {place(row)} fits{kept}; {leak}; {as_size(int(row.bytes))}")
        if row.bound:
            lines.append(f"    proven: {row.bound}")
    lines += [f"  not {name}: {'; '.join(reasons)}" for name, reasons in advice.reasons.items()]
    return lines
