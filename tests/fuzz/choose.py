"""Which inputs of a guided run to keep: few and small ones that together reach every line that all of them reach."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from tests.fuzz.packing import unpack
from tests.fuzz.targets import TARGETS

Line = tuple[str, int, int]
"""File, line before, line."""

_CODE = str(Path(__file__).resolve().parents[2] / "splitfl")


def choose(inputs: Sequence[bytes], known: Sequence[bytes], most_bytes: int) -> tuple[list[bytes], set[Line]]:
    """Inputs that reach what `known` ones do not, small ones first, up to `most_bytes`; and all that is reached."""
    reached: set[Line] = set()
    for data in known:
        reached |= lines_of(data)
    chosen, held = [], 0
    for data in sorted(inputs, key=len):
        fresh = lines_of(data) - reached
        if fresh and held + len(data) <= most_bytes:
            chosen.append(data)
            held += len(data)
            reached |= fresh
    return chosen, reached


def lines_of(data: bytes) -> set[Line]:
    """The steps from line to line that one input takes through the code of the decoders."""
    seen: set[Line] = set()
    number, frames = unpack(data)
    with _watched(seen), contextlib.suppress(Exception):  # a finding reaches lines too
        TARGETS[number % len(TARGETS)].read(frames)
    return seen


@contextlib.contextmanager
def _watched(seen: set[Line]) -> Iterator[None]:
    last: dict[int, int] = {}

    def watch(frame: FrameType, event: str, _: Any) -> Any:
        file = frame.f_code.co_filename
        if not file.startswith(_CODE):
            return None
        if event == "line":
            before = last.get(id(frame), 0)
            seen.add((file, before, frame.f_lineno))
            last[id(frame)] = frame.f_lineno
        elif event == "call":
            last[id(frame)] = 0
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)
