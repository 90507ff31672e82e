"""Which tokens of a row make up a content word, or an entity that points to a person.

A word or an entity counts as recovered where every one of its tokens is. Names, numbers and dates are found by simple
rules, unless the rows themselves say where they stand: rules find too many (the first word of a sentence) and too few
(names in lower case), and the report says that they are rules.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import torch

Places: TypeAlias = tuple[int, ...]
"""Positions of tokens in their row."""

_WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")
_ENTITY = re.compile(
    r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+"  # an e-mail address
    r"|\d+(?:[.,:/-]\d+)*"  # a number, a date in digits, a time
    r"|(?:January|February|March|April|May|June|July|August|September|October|November|December)(?:\s+\d{1,2})?\b"
)
_NAME = re.compile(r"[A-Z][\w'\u2019-]+(?:\s+[A-Z][\w'\u2019-]+)*")
_TITLES = ("Dr.", "Mr.", "Mrs.", "Ms.", "Prof.", "St.")
_ENGLISH = (
    "a about above after again against all also am an and any are as at be because been before being below between "
    "both but by can could did do does doing down during each either else few for from further had has have having he "
    "her here hers him his how i if in into is it its itself just less many may me might mine more most much must my "
    "no nor not now of off on once one only or other our ours out over own per same shall she should since so some "
    "such than that the their theirs them then there these they this those though through to too under until up upon "
    "us very was we were what when where whether which while who whom whose why will with within without would you "
    "your yours"
)
_FUNCTION_WORDS = frozenset(_ENGLISH.split())
"""English; rows in other languages have more content words than they should."""


@dataclass(frozen=True, kw_only=True)
class Marked:
    """What is worth more than its tokens in one row."""

    words: tuple[Places, ...]
    """Content words."""
    entities: tuple[Places, ...]
    ruled: bool
    """Whether entities were found by rules; else the rows say them."""


def mark(ids: torch.Tensor, special: torch.Tensor, tokenizer: Any, told: Sequence[str] | None = None) -> Marked:
    """Find content words and entities in a row.

    Args:
        ids: [T] token ids.
        special: [T] bool: what is no text.
        tokenizer: turns ids into text.
        told: values of the entities, where the row file has them; None to go by rules.
    """
    text, spans = spell(ids.tolist(), special.tolist(), tokenizer)
    words = [m.span() for m in _WORD.finditer(text) if len(m[0]) > 1 and m[0].lower() not in _FUNCTION_WORDS]
    found = _by_rules(text) if told is None else _where(text, told)
    return Marked(words=_places(words, spans), entities=_places(found, spans), ruled=told is None)


def spell(ids: Sequence[int], special: Sequence[bool], tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """The text of a row, and from which character to which each token reaches; special tokens end a line."""
    text, spans = "", []
    at = 0
    while at < len(ids):
        if special[at]:
            text += "\n"
            spans.append((len(text), len(text)))
            at += 1
            continue
        end = next((k for k in range(at, len(ids)) if special[k]), len(ids))
        begin, whole = len(text), _decoded(tokenizer, ids[at:end])
        edges = [0]
        for k in range(at + 1, end + 1):  # what a token adds depends on those before it
            edges.append(max(edges[-1], min(len(whole), len(_decoded(tokenizer, ids[at:k])))))
        edges[-1] = len(whole)
        spans += [(begin + low, begin + high) for low, high in pairwise(edges)]
        text, at = text + whole, end
    return text, spans


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _by_rules(text: str) -> list[tuple[int, int]]:
    found = [m.span() for m in _ENTITY.finditer(text)]
    for match in _NAME.finditer(text):
        begin, end = match.span()
        if f"{match[0]}." in _TITLES:
            continue
        if _opens_a_sentence(text, begin):  # its capital says nothing; what follows it may be a name all the same
            first, _, rest = match[0].partition(" ")
            begin = begin + len(first) + 1 if rest else end
        if begin < end and not any(low < end and begin < high for low, high in found):
            found.append((begin, end))
    return sorted(found)


def _opens_a_sentence(text: str, at: int) -> bool:
    before = text[:at].rstrip(" \"'(\u201c\u2018")
    return not before or (before[-1] in ".!?:\n" and not before.endswith(_TITLES))


def _where(text: str, values: Sequence[str]) -> list[tuple[int, int]]:
    wanted = sorted({value.strip() for value in values} - {""}, key=len, reverse=True)
    if not wanted:
        return []
    return [m.span() for m in re.finditer("|".join(map(re.escape, wanted)), text)]


def _places(wanted: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> tuple[Places, ...]:
    def within() -> Iterator[Places]:
        for begin, end in wanted:
            yield tuple(at for at, (low, high) in enumerate(spans) if low < end and begin < high)

    return tuple(places for places in within() if places)
