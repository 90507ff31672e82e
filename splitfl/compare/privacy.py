"""What is recovered from what left: `splitfl audit` on what was recorded, membership on an adapter that was given away.

Each channel has its attack, and a channel without one is said to have none: an attack that fails says nothing of what
it did not look at.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from splitfl.bench.children import Child, run_to_end
from splitfl.compare.orders import Membership, MembershipTold
from splitfl.compare.result import Attacked
from splitfl.errors import SplitflError, printable

RECORDED = ("hidden", "gradient")
RELEASED = ("adapter", "update")
_LIMIT_S = 1800.0
_ROWS = 400
_CASE = ", as it crossed"
_BEYOND = "beyond frequency"
_EXTRACTION, _TAKEN = "extract", "share of the trunk's use recovered"
_MAIN = ("token recovery", "answer recovery", "class accuracy", "AUC", "bag F1")


def attack_run(
    run: Path, model: Path, rows: Mapping[str, Path], sends: Sequence[str], folder: Path, options: Sequence[str]
) -> tuple[list[Attacked], str]:
    """Attack every channel of a run that there is an attack for.

    Args:
        run: its directory, recorded where activations cross.
        model: the whole model.
        rows: files of ``members`` and ``others``.
        sends: tensors that leave.
        folder: for logs.
        options: of `splitfl audit`: which rows, attacks and knowledge.

    Returns:
        What each attack came to, and what was not attacked and why: an audit that fails does not undo a run.
    """
    found: list[Attacked] = []
    missing: list[str] = []
    if any(tensor in RECORDED for tensor in sends):
        _note(found, missing, "activations", lambda: _audit(run, folder, options))
    if any(tensor in RELEASED for tensor in sends):
        _note(found, missing, "the adapter", lambda: _membership(run, model, rows, folder))
    if "logits" in sends:
        missing.append("answers to public rows: no attack here reads them")
    return found, "; ".join(missing)


def _note(found: list[Attacked], missing: list[str], channel: str, attack: Any) -> None:
    try:
        mine = attack()
    except SplitflError as error:
        missing.append(f"{channel}: {printable(' '.join(str(error).split()), 300)}")
        return
    found += mine
    if not mine:
        missing.append(f"{channel}: no attack fits")


# ---- what was recorded


def _audit(run: Path, folder: Path, options: Sequence[str]) -> list[Attacked]:
    file = folder / "audit.json"
    words = ["splitfl", "audit", str(run), "--no-texts", "--threads", "1", "--json", str(file)]
    run_to_end([*words, *options], log=folder / "audit.log", limit_s=_LIMIT_S)
    return read_audit(json.loads(file.read_text(encoding="utf-8"))["results"])


def read_audit(results: Sequence[Mapping[str, Any]]) -> list[Attacked]:
    """The main figure of each attack, from the results of ``splitfl audit --json``.

    What it is beyond guessing comes from the audit itself, on the same records; for an AUC guessing is a half.
    """
    cases: dict[str, dict[str, float]] = {}
    for result in results:
        case, value = str(result["case"]), result["value"]
        if case.endswith(_CASE) and isinstance(value, int | float):
            cases.setdefault(case.removesuffix(_CASE), {})[str(result["metric"])] = float(value)
    found = []
    for case, figures in cases.items():
        name, _, knowledge = case.rpartition(" ")
        metric = next((metric for metric in _MAIN if metric in figures), None)
        if metric is None or not name:
            continue
        value, low, high = (figures[f"{metric}{end}"] for end in ("", ", low", ", high"))
        if metric == "AUC":
            beyond = (value - 0.5, low - 0.5, high - 0.5)
        elif _BEYOND in figures:
            beyond = (figures[_BEYOND], figures[f"{_BEYOND}, low"], figures[f"{_BEYOND}, high"])
        else:
            continue
        found.append(
            Attacked(name=name, knowledge=knowledge, metric=metric, value=value, low=low, high=high,
                     baseline=value - beyond[0], beyond=beyond[0], beyond_low=beyond[1], beyond_high=beyond[2])
        )  # fmt: skip
    return found + _extraction(results)


def _extraction(results: Sequence[Mapping[str, Any]]) -> list[Attacked]:
    """What a student of the owner's trunk is worth, trained on all that came back; no trunk at all is 0. One student:
    no interval."""
    shares = [r["value"] for r in results if r["case"] == _EXTRACTION and str(r["metric"]).startswith(_TAKEN)]
    shares = [float(share) for share in shares if isinstance(share, int | float)]
    if not shares:
        return []
    value = shares[-1]
    return [
        Attacked(name=_EXTRACTION, knowledge="holder", metric=_TAKEN, value=value, low=value, high=value, baseline=0.0,
                 beyond=value, beyond_low=value, beyond_high=value, side="owner")
    ]  # fmt: skip


# ---- an adapter that was given away


def _membership(run: Path, model: Path, rows: Mapping[str, Path], folder: Path) -> list[Attacked]:
    order = Membership(
        run=str(run), model=str(model), members=str(rows["members"]), others=str(rows["others"]), rows=_ROWS
    )
    words = ["party.compare_side", msgspec.json.encode(order).decode()]
    with Child("attack on the adapter", words, threads=1, log=folder / "membership.log") as child:
        told = msgspec.json.decode(child.line(_LIMIT_S), type=MembershipTold)
    return read_membership(told)


def read_membership(told: MembershipTold) -> list[Attacked]:
    """Its scores; guessing has an area of a half. An area below it is guessing too: nobody knows which way to turn."""
    return [
        Attacked(name=f"membership, {one.score}", knowledge="K1", metric="AUC", value=one.value, low=one.low,
                 high=one.high, baseline=0.5, beyond=one.value - 0.5, beyond_low=one.low - 0.5,
                 beyond_high=one.high - 0.5)
        for one in told.scores
    ]  # fmt: skip
