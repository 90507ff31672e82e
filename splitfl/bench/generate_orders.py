"""What `splitfl bench generate` says to the process that writes, and its answers: JSON lines."""

from __future__ import annotations

from splitfl.bench.orders import Line


class WriterStart(Line, frozen=True, kw_only=True):
    """First argument of the process."""

    kit: str
    emulator: str
    owner: str
    owner_key: str
    key: str
    prompts: str
    """A JSON Lines file with a ``prompt`` in each row."""
    threads: int


class WriteText(Line, frozen=True, kw_only=True):
    """Continue each of the first prompts greedily."""

    prompts: int
    new_tokens: int
    draft: str | None = None
    """``emulator``, ``ends``, or None for one token a pass."""
    guesses: int = 0


class TextWritten(Line, frozen=True, kw_only=True):
    """All prompts together."""

    seconds: float
    tokens: list[list[int]]
    passes: int
    guessed: int
    kept: int
    sent: int
    """Bytes, headers too."""
    received: int
