"""Every error a person can meet, and the exit code that belongs to it.

    SplitflError
    ├── UserError                what you asked for cannot be done as asked
    │   ├── UsageError       2   an option, a configuration key, a combination
    │   ├── DataError        3   rows: file, line and what was expected there
    │   ├── ModelError       4   a model, kit, plan, adapter or checkpoint that does not fit
    │   ├── KeyFileError     5   a CURVE key file: missing, malformed, readable by others
    │   └── ResourceError    6   disk, device, port, memory, a limit of this machine
    ├── PeerError                the other side, or the road to it
    │   ├── UnreachableError 7   nobody answered within the time allowed
    │   ├── RefusedError     8   the peer answered and said no (carries the peer's code)
    │   └── WireError        9   what came is not what the protocol allows
    └── InternalError        70  our own bug; please report it

A message says what was tried, what came, what is allowed and what to do next. It never carries a row, a tensor value or
a key; text that a peer chose is escaped by `printable` before it is shown.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

INTERRUPTED_EXIT_CODE = 130  # the shell's convention for Ctrl-C


class SplitflError(Exception):
    """Base of all errors raised on purpose.

    Args:
        problem: what was tried and what came, as one sentence.
        expected: what is allowed.
        hint: what to do next.
    """

    exit_code = 70

    def __init__(self, problem: str, *, expected: str | None = None, hint: str | None = None) -> None:
        self.problem, self.expected, self.hint = problem, expected, hint
        super().__init__(problem)

    def __str__(self) -> str:
        parts = [self.problem]
        if self.expected:
            parts.append(f"Expected: {self.expected}")
        if self.hint:
            parts.append(f"Next: {self.hint}")
        return "\n".join(parts)


class UserError(SplitflError):
    """What was asked for cannot be done as asked."""


class UsageError(UserError):
    """An option, a configuration key or a combination of them."""

    exit_code = 2


class DataError(UserError):
    """Rows that cannot be read or used; names the file and the line."""

    exit_code = 3


class ModelError(UserError):
    """A model, kit, plan, adapter or checkpoint that does not fit."""

    exit_code = 4


class KeyFileError(UserError):
    """A key file that is missing, malformed or readable by others."""

    exit_code = 5


class ResourceError(UserError):
    """Disk, device, port, memory or another limit of this machine."""

    exit_code = 6


class PeerError(SplitflError):
    """The other side of the wire, or the road to it."""


class UnreachableError(PeerError):
    """Nobody answered within the time allowed."""

    exit_code = 7


class RefusedError(PeerError):
    """The peer answered and said no.

    Args:
        code: one of `splitfl.wire.messages.REFUSAL_CODES`, chosen by the peer and checked against that list.
    """

    exit_code = 8

    def __init__(self, problem: str, *, code: str, expected: str | None = None, hint: str | None = None) -> None:
        super().__init__(problem, expected=expected, hint=hint)
        self.code = code


class WireError(PeerError):
    """Bytes or a message that the protocol does not allow."""

    exit_code = 9


class InternalError(SplitflError):
    """A bug of ours."""

    exit_code = 70


def nearest(word: str, allowed: Iterable[str]) -> str:
    """A hint naming the closest allowed word, or all of them when none is close."""
    choices = sorted(set(allowed))
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(choices)}"


def printable(text: str, limit: int = 300) -> str:
    """`text` from a peer, safe for a terminal and a log: no control characters, at most `limit` characters."""
    clean = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:limit])
    return clean + ("..." if len(text) > limit else "")
