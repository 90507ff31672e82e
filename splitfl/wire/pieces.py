"""Parts of a file that is handed out: what may be asked for, and what answers it. No I/O.

N bytes of a file travel as one tensor frame of uint8. Both sides hold to the same three rules: a fetch asks for 1 to
`MAX_PIECE` bytes; a piece has as many bytes as were asked for, or fewer where it reaches the end of its file; and it
belongs to the file and the offset that its fetch named. How long a file is, its first piece says, and who asks has to
judge whether it can be (`party.fetch`).
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from splitfl.wire.messages import MAX_PIECE, Fetch, Piece

Part: TypeAlias = tuple[int, int, int]
"""File, offset and length."""


class Flaw(NamedTuple):
    """What is wrong with a message, with a code from `REFUSAL_CODES`."""

    code: str
    problem: str
    expected: str


def flaw(message: Fetch | Piece) -> Flaw | None:
    """What is wrong with the numbers of a message, whatever was said before it; None if nothing is.

    A piece must have been looked at as far as that it has one tensor of one dimension.
    """
    most = f"1 to {MAX_PIECE} bytes"
    if isinstance(message, Fetch):
        if message.length < 1:
            return Flaw("malformed", "A fetch asks for no byte at all.", most)
        if message.length > MAX_PIECE:
            return Flaw("too_large", "A fetch asks for too many bytes at once.", most)
        return None
    if size_of(message) > MAX_PIECE:
        return Flaw("too_large", "A piece of a file is too long.", most)
    if message.offset + size_of(message) > message.total:
        return Flaw("malformed", "A piece goes beyond the end of its file.", f"at most {message.total} bytes in all")
    return None


def size_of(piece: Piece) -> int:
    """N, the bytes that `piece` says it has."""
    return piece.tensors[0].shape[0]


def part_of(fetch: Fetch) -> Part:
    """What `fetch` asks for."""
    return fetch.file, fetch.offset, fetch.length


def answers(piece: Piece, part: Part) -> bool:
    """Whether `piece` is what was asked for: those bytes, and fewer only at the end of the file."""
    file, offset, length = part
    return (piece.file, piece.offset) == (file, offset) and size_of(piece) == min(length, piece.total - offset)


def parts_of(file: int, start: int, total: int) -> list[Part]:
    """The parts in which bytes `start` to `total` of a file are fetched."""
    return [(file, offset, min(MAX_PIECE, total - offset)) for offset in range(start, total, MAX_PIECE)]
