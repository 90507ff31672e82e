"""What can be guessed without looking at the traffic: an attack is worth what it gets beyond that.

Two guessers. One knows how often each token stands at each place, from all *other* records of the audit: more than an
outsider knows, so an advantage over it is not flattered. The other is the language model itself, told every token
before the one that it guesses; where an attack reads with a model's help, this is what the help alone is worth.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from splitfl.audit.truth import TrueRow
from splitfl.load import quiet_library

NOTHING = -1
_IGNORED = -100


def by_frequency(truths: Sequence[TrueRow], what: str = "ids") -> dict[int, torch.Tensor]:
    """For each row the token that stands most often at each place in the other records.

    Args:
        truths: the rows, several of which may be one record.
        what: ``ids`` or ``labels``.

    Returns:
        [T] int64 by number; `NOTHING` where no other record says anything.
    """
    rows = {(row.dataset, row.row): _values(row, what) for row in truths}
    places: dict[int, Counter[int]] = {}
    everywhere: Counter[int] = Counter()
    for values in rows.values():
        for at, value in values.items():
            places.setdefault(at, Counter())[value] += 1
            everywhere[value] += 1
    guessed: dict[tuple[str, int], torch.Tensor] = {}
    for name, values in rows.items():
        length = max(values, default=-1) + 1
        guess = torch.full((length,), NOTHING, dtype=torch.int64)
        usual = _likeliest(everywhere, NOTHING, 0)
        for at, value in values.items():
            guess[at] = _likeliest(places[at], value, usual)
        guessed[name] = guess
    return {row.number: guessed[row.dataset, row.row] for row in truths}


def _values(row: TrueRow, what: str) -> dict[int, int]:
    """Place to token, of what counts."""
    if what == "labels":
        labels = row.labels if isinstance(row.labels, torch.Tensor) else torch.empty(0, dtype=torch.int64)
        return {at: value for at, value in enumerate(labels.tolist()) if at and value != _IGNORED}
    return {
        at: value
        for at, (value, special) in enumerate(zip(row.ids.tolist(), row.special.tolist(), strict=True))
        if not special
    }


def _likeliest(counts: Counter[int], own: int, otherwise: int) -> int:
    """The most frequent value once one `own` is taken away."""
    best, most = otherwise, 0
    for value, count in counts.most_common(2):
        left = count - (value == own)
        if left > most:
            best, most = value, left
    return best


def bag_by_frequency(truths: Sequence[TrueRow], size: int) -> list[int]:
    """A bag of `size` tokens in the proportions of all records; the largest remainders fill it up."""
    counts: Counter[int] = Counter()
    for row in truths:
        counts.update(_values(row, "ids").values())
    total = counts.total()
    if not total:
        return []
    whole = {token: size * count // total for token, count in counts.items()}
    rest = sorted(counts, key=lambda token: -(size * counts[token] % total))[: size - sum(whole.values())]
    return list((Counter(whole) + Counter(rest)).elements())


def commonest_class(truths: Sequence[TrueRow]) -> dict[int, int]:
    """For each row the class that most other records have."""
    rows = {(row.dataset, row.row): row.labels for row in truths if isinstance(row.labels, int)}
    counts = Counter(rows.values())
    return {
        row.number: _likeliest(counts, rows[row.dataset, row.row], NOTHING)
        for row in truths
        if (row.dataset, row.row) in rows
    }


@torch.no_grad()
def by_model(truths: Sequence[TrueRow], model: Path) -> dict[int, torch.Tensor]:
    """For each row what the whole model would put at each place, told all places before it.

    Args:
        truths: the rows.
        model: directory of the whole causal model.

    Returns:
        [T] int64 by number; `NOTHING` at the first place.
    """
    from transformers import AutoModelForCausalLM

    with quiet_library():
        whole: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, local_files_only=True).eval()
    guessed: dict[tuple[str, int], torch.Tensor] = {}
    for row in truths:
        if (row.dataset, row.row) not in guessed:
            likeliest = whole(input_ids=row.ids[None], use_cache=False).logits[0].argmax(-1)
            guessed[row.dataset, row.row] = torch.cat([torch.tensor([NOTHING]), likeliest[:-1]])
    return {row.number: guessed[row.dataset, row.row] for row in truths}


def found_at(guess: Mapping[int, torch.Tensor], row: TrueRow, length: int, nothing: int = NOTHING) -> torch.Tensor:
    """A guess as [T] int64, `nothing` where it says nothing: too short, or there is none."""
    said = guess.get(row.number)
    full = torch.full((length,), nothing, dtype=torch.int64)
    if said is not None:
        some = said.to(torch.int64)[:length]
        full[: len(some)] = some
    return full
