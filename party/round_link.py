"""A party's talk with a coordinator: one question, one answer, and the same question again after a lost link.

Blobs go and come in pieces, a few of them under way at a time. Every answer names its request, so that one which comes
late, after the question was asked again, is told from the one that is waited for.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable
from typing import cast

from msgspec.structs import replace

from splitfl.errors import RefusedError, UnreachableError, WireError, printable
from splitfl.wire import round_frames as wire
from splitfl.wire.channel import PartySocket
from splitfl.wire.round_messages import (
    ROUNDS_VERSION,
    Enter,
    Entered,
    Facts,
    FromCoordinator,
    FromParty,
    Get,
    GetItem,
    Got,
    Piece,
    Put,
    PutItem,
    Refused,
    kind,
)

_AGAIN_S = 20.0  # of silence, beyond what was asked for


class RoundLink:
    """One party's link to one coordinator. Used by one thread.

    Args:
        socket: opened by `open`, closed by `close`.
        facts: what this party states when it enters.
        rows: its training rows, for the coordinator's display.
        timeout_s: longest wait for an answer, a coordinator that is started again in between included.
    """

    def __init__(self, socket: PartySocket, facts: Facts, *, rows: int = 0, timeout_s: float = 120.0) -> None:
        self.socket, self.facts, self.rows, self.timeout_s = socket, facts, rows, timeout_s
        self.session = secrets.randbits(62)
        self._requests, self._piece_bytes = 0, wire.PIECE_BYTES
        self.on_put: Callable[[PutItem, bytes], None] | None = None
        """Sees each blob that is handed over; for recordings."""

    def open(self) -> Entered:
        """Reach the coordinator and enter.

        Raises:
            UnreachableError: nobody answers.
            RefusedError: the coordinator does not admit this key, or these facts.
            KeyFileError: another coordinator than the pinned one answers.
        """
        self.socket.open(min(self.timeout_s, 30.0))
        return self.enter()

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()

    def enter(self) -> Entered:
        """Say who this is and what it would sum."""
        answer, _ = self.ask(
            Enter(session=self.session, request=0, version=ROUNDS_VERSION, facts=self.facts, rows=self.rows)
        )
        if not isinstance(answer, Entered):
            raise _unexpected(answer, "enter")
        self._piece_bytes = answer.piece_bytes
        return answer

    # ---- one question

    def ask(self, message: FromParty, *, patience_s: float = 0.0) -> tuple[FromCoordinator, wire.Frame]:
        """The answer to `message`, and its raw frame.

        Args:
            message: its request number is set here.
            patience_s: how long the coordinator may keep silent by right.

        Raises:
            RefusedError: the coordinator said no.
            UnreachableError: no answer within the time allowed.
            WireError: what came is not an answer.
        """
        return self._await(deque([self._sent(message, b"")]), patience_s)

    def _sent(self, message: FromParty, frame: wire.Frame) -> tuple[FromParty, list[wire.Frame]]:
        """`message` under a number of its own, on its way."""
        self._requests += 1
        message = replace(message, session=self.session, request=self._requests)
        frames = wire.encode(message, frame if isinstance(message, Put) else None)
        self.socket.send(frames, timeout_s=self.timeout_s)
        return message, frames

    def _await(
        self, under_way: deque[tuple[FromParty, list[wire.Frame]]], patience_s: float = 0.0
    ) -> tuple[FromCoordinator, wire.Frame]:
        """The answer to the first that is `under_way`; all of them are sent again when the link was lost."""
        message, _ = under_way[0]
        deadline = time.monotonic() + self.timeout_s + patience_s
        again = time.monotonic() + _AGAIN_S + patience_s
        while True:
            links = self.socket.links
            came = self.socket.receive(max(0.0, min(deadline, again) - time.monotonic()))
            if came is not None:
                answer, frame = wire.decode(came, sender="coordinator")
                if answer.request in (message.request, 0):
                    return self._checked(cast("FromCoordinator", answer), frame, message, under_way)
                continue
            now = time.monotonic()
            if now >= deadline:
                raise self._silence(message)
            if now >= again or self.socket.links > links:
                for _, frames in under_way:
                    self.socket.send(frames, timeout_s=max(1.0, deadline - now))
                again = now + _AGAIN_S + patience_s

    def _checked(
        self, answer: FromCoordinator, frame: wire.Frame, message: FromParty,
        under_way: deque[tuple[FromParty, list[wire.Frame]]],
    ) -> tuple[FromCoordinator, wire.Frame]:  # fmt: skip
        """`answer`, if it is one to go on with."""
        if not isinstance(answer, Refused):
            under_way.popleft()
            return answer, frame
        if answer.code == "unknown_session" and not isinstance(message, Enter):  # its state was set up anew
            self.drain(under_way)
            self.enter()
        raise RefusedError(
            f"The coordinator refused: {printable(answer.problem)}",
            code=answer.code,
            expected=printable(answer.expected) if answer.expected else None,
            hint=printable(answer.hint) if answer.hint else None,
        )

    def drain(self, under_way: deque[tuple[FromParty, list[wire.Frame]]]) -> None:
        """Forget what is under way: answers to it are passed over when they come."""
        under_way.clear()

    def _silence(self, message: FromParty) -> UnreachableError:
        return UnreachableError(
            f"The coordinator at {self.socket.address} did not answer {kind(message)!r} within {self.timeout_s:.0f} s.",
            hint="see whether it still runs and the link is up, then start again: the round goes on where it was",
        )

    # ---- blobs

    def put(self, round_: int, attempt: int, item: PutItem, blob: bytes) -> None:
        """Hand a blob over; when this returns the coordinator has it on its disk.

        Raises:
            RefusedError, UnreachableError, WireError: as for `ask`.
        """
        if self.on_put is not None:
            self.on_put(item, blob)
        view, total, digest = memoryview(blob), len(blob), wire.digest_of(blob)
        under_way: deque[tuple[FromParty, list[wire.Frame]]] = deque()
        acknowledged = sent = 0
        while True:
            while len(under_way) < wire.WINDOW and (sent < total or (total == 0 and not under_way)):
                piece = view[sent : sent + self._piece_bytes]
                message = Put(
                    session=0, request=0, round=round_, attempt=attempt, item=item, offset=sent, total=total,
                    digest=digest,
                )  # fmt: skip
                under_way.append(self._sent(message, piece))
                sent += len(piece)
            answer, _ = self._await(under_way)
            if not isinstance(answer, Got):
                raise _unexpected(answer, "put")
            if answer.done:
                return
            expected = min(acknowledged + self._piece_bytes, total)
            if answer.next != expected or (not under_way and sent >= total):  # a piece was lost: go on where it was
                self.drain(under_way)
                sent = min(answer.next, total)
            acknowledged = answer.next

    def get(self, round_: int, attempt: int, item: GetItem, *, largest: int, digest: str = "") -> bytes:
        """Fetch a blob.

        Args:
            round_: of the attempt.
            attempt: likewise.
            item: what it is.
            largest: bytes that it may have; nothing is allocated for more.
            digest: of the state that is wanted.

        Raises:
            RefusedError, UnreachableError: as for `ask`.
            WireError: it is larger than that, or not what its digest says.
        """
        first = self._first_piece(
            Get(
                session=0,
                request=0,
                round=round_,
                attempt=attempt,
                item=item,
                offset=0,
                size=self._piece_bytes,
                digest=digest,
            )
        )
        head, frame = first
        if head.total > largest:
            raise WireError(f"The coordinator's {item!r} has {head.total} bytes.", expected=f"at most {largest}")
        if digest and head.digest != digest:
            raise WireError(f"The coordinator's {item!r} is another one than was asked for.")
        blob = bytearray(head.total)
        blob[: len(frame)] = frame
        self._rest(blob, len(frame), head, lambda offset: Get(
            session=0, request=0, round=round_, attempt=attempt, item=item, offset=offset, size=self._piece_bytes,
            digest=digest
        ))  # fmt: skip
        whole = bytes(blob)
        if wire.digest_of(whole) != head.digest:
            raise WireError(f"The coordinator's {item!r} does not have the digest that it names.")
        return whole

    def _rest(self, blob: bytearray, filled: int, head: Piece, question: Callable[[int], Get]) -> None:
        """Fill `blob` from `filled` on."""
        under_way: deque[tuple[FromParty, list[wire.Frame]]] = deque()
        asked = filled
        while filled < head.total:
            while len(under_way) < wire.WINDOW and asked < head.total:
                under_way.append(self._sent(question(asked), b""))
                asked += self._piece_bytes
            answer, frame = self._await(under_way)
            if not isinstance(answer, Piece):
                raise _unexpected(answer, "get")
            wanted = min(self._piece_bytes, head.total - filled)
            if (answer.offset, answer.total, answer.digest, len(frame)) != (filled, head.total, head.digest, wanted):
                raise WireError("A piece came that does not continue what was asked for.")
            blob[filled : filled + wanted] = frame
            filled += wanted

    def _first_piece(self, message: Get) -> tuple[Piece, wire.Frame]:
        answer, frame = self.ask(message)
        if not isinstance(answer, Piece):
            raise _unexpected(answer, "get")
        if answer.offset != 0 or len(frame) != min(self._piece_bytes, answer.total):
            raise WireError("A first piece came that is not the beginning of its blob.")
        return answer, frame


def _unexpected(answer: FromCoordinator, question: str) -> WireError:
    return WireError(f"The coordinator answered {kind(answer)!r} to {question!r}.")
