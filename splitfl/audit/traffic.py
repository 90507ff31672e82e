"""A recording read again as its receiver read it: frames become tensors, rows lose their padding, halves are joined.

Everything is decoded by the code that decoded it when it came (`splitfl.wire.frames`), under the limits that hello and
welcome agreed on. A row keeps the positions that the mask says are tokens; where no mask crossed, all of them. Forward
and backward of one step make one `Sent` a row. Rows are numbered in the order in which they crossed; what was sent
again, what came of the owner check, and what belongs to a KV cache is counted and gets no number.

Legend: B rows, T positions of the batch, D width of the cut.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from splitfl.audit.recording import About, Crossed, Left, Reader
from splitfl.audit.view import Sent
from splitfl.errors import DataError
from splitfl.wire import frames as wire
from splitfl.wire.messages import (
    AnyMessage,
    Backward,
    BackwardDone,
    Forward,
    ForwardDone,
    Hello,
    TensorName,
    Welcome,
)

Request: TypeAlias = tuple[int, int]
"""Session and step."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a numbered row stood."""

    request: Request
    place: int
    """Row within its batch."""
    tokens: int
    """T of its `Sent`."""
    segment: int


@dataclass(kw_only=True)
class Tally:
    """What was counted; messages and bytes without those that were sent again."""

    messages: dict[str, int] = field(default_factory=lambda: {"sent": 0, "received": 0})
    """By direction, as the party sees it."""
    bytes: dict[str, int] = field(default_factory=lambda: {"sent": 0, "received": 0})
    retries: int = 0
    changed_retries: int = 0
    probes: int = 0
    generations: int = 0
    broken_off: int = 0
    full: bool = False
    """Whether a segment stopped at its limit."""


@dataclass(kw_only=True)
class Replay:
    """What a recording of traffic holds."""

    about: About | None = None
    """Of the latest segment."""
    sent: list[Sent] = field(default_factory=list)
    """In order; those that were wanted."""
    places: list[Place] = field(default_factory=list)
    """By number: of every row that crossed."""
    left: list[tuple[Left, tuple[bytes, ...]]] = field(default_factory=list)
    """Updates, with their frames."""
    tally: Tally = field(default_factory=Tally)


def replay(
    segments: Iterable[Reader], width: int, *, left_out: Set[Request] = frozenset(),
    wanted: Callable[[int], bool] = lambda number: True, counts_padding: bool = True,
) -> Replay:  # fmt: skip
    """Decode a recording.

    Args:
        segments: streams of traffic, in order; a reader whose file is missing counts as broken off.
        width: D, of the plan.
        left_out: forwards of the owner check.
        wanted: which numbers to make a `Sent` of.
        counts_padding: whether the family's positions go on over padding where none crossed, as in most.

    Raises:
        DataError: a file was altered, or what crossed does not decode.
    """
    decoder = _Decoder(width, left_out, wanted, counts_padding)
    for index, reader in enumerate(segments):
        decoder.segment = index
        if not reader.path.is_file():
            decoder.found.tally.broken_off += 1
            continue
        for head, frames in reader:
            if isinstance(head, About):
                decoder.found.about = head
            elif isinstance(head, Crossed):
                decoder.take(head, frames)
            elif isinstance(head, Left):
                decoder.found.left.append((head, frames))
        decoder.found.tally.broken_off += reader.end is None
        decoder.found.tally.full |= reader.end is not None and reader.end.full
    return decoder.finish()


@dataclass(kw_only=True)
class _Row:
    """A row under way."""

    number: int
    place: int
    training: bool
    hidden: torch.Tensor
    positions: torch.Tensor | None
    output: torch.Tensor | None = None
    gradient: torch.Tensor | None = None
    returned: torch.Tensor | None = None


@dataclass(kw_only=True)
class _Step:
    """A forward, and the rows of it that are wanted."""

    tokens: torch.Tensor | None
    """[B, T] bool: which positions the mask says are tokens; None without a mask."""
    rows: list[_Row]

    def cut(self, values: torch.Tensor, place: int) -> torch.Tensor:
        """Row `place` of `values` [B, T, ...] without its padding, in memory of its own."""
        row = values[place]
        return row.clone() if self.tokens is None else row[self.tokens[place]]


class _Decoder:
    """Takes one message after the other."""

    def __init__(self, width: int, left_out: Set[Request], wanted: Callable[[int], bool], counts_padding: bool) -> None:
        self.width, self.left_out, self.wanted, self.counts_padding = width, left_out, wanted, counts_padding
        self.found, self.segment = Replay(), 0
        self._limits: dict[int, wire.Limits] = {}
        self._hellos: dict[int, Hello] = {}
        self._steps: dict[Request, _Step] = {}
        self._rows: list[_Row] = []
        self._seen: dict[tuple[str, int, str, int | None], bytes] = {}

    def take(self, head: Crossed, frames: tuple[bytes, ...]) -> None:
        """One message, counted and, if it holds what is looked for, decoded."""
        side = "party" if self.found.about is None else self.found.about.side
        from_party = (head.way == "sent") == (side == "party")
        direction, tally = "sent" if from_party else "received", self.found.tally
        is_new = self._is_new(direction, head, frames)
        if not is_new:
            tally.retries += 1
            return
        tally.messages[direction] += 1
        tally.bytes[direction] += sum(map(len, frames))
        if head.kind == "unreadable":
            return
        try:
            self._read(wire.open_header(frames, sender="party" if from_party else "owner"), frames)
        except wire.Violation as error:
            raise DataError(f"A {head.kind!r} message in the recording does not decode: {error.problem}") from error

    def _is_new(self, direction: str, head: Crossed, frames: tuple[bytes, ...]) -> bool:
        """Whether these bytes cross for the first time."""
        if head.step is None:
            return not head.again
        key = direction, head.session, head.kind, head.step
        total = hashlib.blake2b(digest_size=16)
        for frame in frames:
            total.update(frame)
        before = self._seen.setdefault(key, total.digest())
        if not head.again or before == total.digest():
            return not head.again
        self.found.tally.changed_retries += direction == "sent"
        return True

    def _read(self, message: AnyMessage, frames: tuple[bytes, ...]) -> None:
        match message:
            case Hello():
                self._hellos[message.session] = message
            case Welcome() if message.session in self._hellos:
                self._limits[message.session] = self._agreed(self._hellos[message.session], message)
            case Forward():
                self._forward(message, frames)
            case Backward() | ForwardDone() | BackwardDone():
                self._add(message, frames)

    def _agreed(self, hello: Hello, welcome: Welcome) -> wire.Limits:
        return wire.Limits(
            width=self.width,
            max_tokens=welcome.max_tokens,
            max_length=welcome.max_length,
            wire_dtype=hello.wire_dtype,
            hidden_coding=hello.hidden_coding,
            gradient_coding=hello.gradient_coding,
        )

    def _tensors(
        self, message: Forward | Backward | ForwardDone | BackwardDone, frames: tuple[bytes, ...]
    ) -> dict[TensorName, torch.Tensor]:
        limits = self._limits.get(message.session)
        if limits is None:
            raise DataError("The recording holds tensors of a session whose beginning it does not hold.")
        wire.check_frames(message, frames, limits)
        return wire.tensors_of(message, frames)

    def _forward(self, message: Forward, frames: tuple[bytes, ...]) -> None:
        request = message.session, message.step
        if message.cache is not None:
            self.found.tally.generations += 1
            return
        if request in self.left_out:
            self.found.tally.probes += 1
            return
        tensors = self._tensors(message, frames)
        hidden, mask = tensors["hidden"].float(), tensors.get("mask")
        step = _Step(tokens=None if mask is None else mask.bool(), rows=[])
        positions = tensors.get("positions")
        if positions is None and self.counts_padding:
            positions = torch.arange(hidden.shape[1])[None]
        for place in range(len(hidden)):
            number = len(self.found.places)
            count = hidden.shape[1] if step.tokens is None else int(step.tokens[place].sum())
            self.found.places.append(Place(request=request, place=place, tokens=count, segment=self.segment))
            if self.wanted(number):
                step.rows.append(
                    _Row(
                        number=number,
                        place=place,
                        training=message.keep,
                        hidden=step.cut(hidden, place),
                        positions=_unusual(step, positions, place, len(hidden)),
                    )
                )
        self._steps[request] = step
        self._rows += step.rows

    def _add(self, message: Backward | ForwardDone | BackwardDone, frames: tuple[bytes, ...]) -> None:
        """What belongs to a step that has crossed: its answer, or its backward."""
        step = self._steps.get((message.session, message.step))
        if step is None or not step.rows:
            return
        tensors = self._tensors(message, frames)
        for row in step.rows:
            match message:
                case ForwardDone():
                    row.output = step.cut(tensors["hidden"].float(), row.place)
                case Backward():
                    row.gradient = step.cut(tensors["gradient"].float(), row.place)
                case BackwardDone():
                    row.returned = step.cut(tensors["gradient"].float(), row.place)

    def finish(self) -> Replay:
        """All of it."""
        self.found.sent = [
            Sent(
                number=row.number,
                step=self.found.places[row.number].request[1],
                place=row.place,
                training=row.training,
                hidden=row.hidden,
                output=row.output,
                gradient=row.gradient,
                returned=row.returned,
                positions=row.positions,
            )
            for row in self._rows
        ]
        return self.found


def _unusual(step: _Step, positions: torch.Tensor | None, place: int, rows: int) -> torch.Tensor | None:
    """Positions [T] int64 of one row, where they are others than 0, 1, 2, ...; `positions` is [B or 1, T]."""
    if positions is None:
        return None
    own = step.cut(positions.expand(rows, -1), place).long()
    return None if torch.equal(own, torch.arange(len(own))) else own
