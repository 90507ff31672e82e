"""Which steps of a session are open, kept or answered: what the table in `session` cannot say. No I/O.

- A new step's number is above every earlier one. A `forward` with an earlier number is a *retry*.
- A `backward` is legal for a step that is kept: its `forward` had ``keep=True`` and was answered, and no backward has
  been answered yet. The same backward again is a retry.
- A refused backward leaves its step kept, unless the refusal says ``unknown_step``. Then the party sends the forward
  again with ``keep=True``, which makes the step kept once more; this is how it recovers from an owner that restarted.
- An answer belongs to a request that is still open. The same answer again (a request was sent twice, and both were
  answered) is a retry, to be dropped; so is an answer after a refusal (sent twice, one refused, one answered).
- All tensors of one step have one shape [B, T, D], whatever their direction.
- A `fetch` takes its step from the same numbers as a `forward`. The same number again is a retry, and asks for the same
  part. Its answer is that part.

Memory is bounded by `MAX_OPEN` open requests, as many kept steps, and `MAX_ANSWERED` answered or refused requests.
What the owner reads for one session at a time is bounded by `MAX_FETCHES`.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias

from splitfl.wire.frames import Violation
from splitfl.wire.messages import (
    AnyMessage,
    Backward,
    BackwardDone,
    Fetch,
    Forward,
    ForwardDone,
    Piece,
    Refused,
    Release,
    kind,
)
from splitfl.wire.pieces import answers, part_of

MAX_OPEN = 256
MAX_ANSWERED = 1024
MAX_FETCHES = 8

Shape: TypeAlias = tuple[int, ...]
"""Of a step's tensors; of a fetch, the part that it asks for."""
Request: TypeAlias = tuple[str, int]
"""Kind and step: ``("forward", 7)``."""

_ANSWERS = {"forward_done": "forward", "backward_done": "backward", "piece": "fetch"}


class Turn(Enum):
    """What to make of a message that is allowed."""

    NEW = "new"
    RETRY = "retry"
    """Said before. The owner answers it again, from memory if it can; the party drops it."""


class NotAllowed(Violation):
    """The table, the disclosure, the terms or the steps do not allow this message. Nothing has changed."""


@dataclass
class Steps:
    """The record of one session; each entry with the shape of its tensors."""

    highest: int = -1
    opened: dict[Request, Shape] = field(default_factory=dict)
    kept: dict[int, Shape] = field(default_factory=dict)
    answered: OrderedDict[Request, Shape] = field(default_factory=OrderedDict)
    refused: OrderedDict[Request, Shape] = field(default_factory=OrderedDict)

    def judge(self, message: AnyMessage) -> Turn:
        """Whether the steps allow `message`; changes nothing.

        Raises:
            NotAllowed: with code ``unknown_step``, ``out_of_order``, ``too_large`` or ``malformed``.
        """
        match message:
            case Forward():
                return self._judge_forward(message)
            case Backward():
                return self._judge_backward(message)
            case Fetch():
                return self._judge_fetch(message)
            case ForwardDone() | BackwardDone() | Piece():
                return self._judge_answer(message)
            case _:
                return Turn.NEW

    def apply(self, message: AnyMessage) -> None:
        """Take note of a message that `judge` has allowed."""
        match message:
            case Forward():
                self.highest = max(self.highest, message.step)
                self.opened["forward", message.step] = _shape(message)
                if message.keep and not self._known(("backward", message.step)):
                    self.kept[message.step] = _shape(message)
            case Backward():
                self.kept.pop(message.step, None)
                self.opened["backward", message.step] = _shape(message)
            case Fetch():
                self.highest = max(self.highest, message.step)
                self.opened["fetch", message.step] = part_of(message)
            case ForwardDone() | BackwardDone() | Piece():
                self._answer((_ANSWERS[kind(message)], message.step))
            case Refused(step=int(step)):
                self._refuse(step, lost=message.code == "unknown_step")
            case Release():
                for released in message.steps:
                    self.kept.pop(released, None)

    def _known(self, request: Request) -> Shape | None:
        return self.opened.get(request) or self.answered.get(request)

    def _judge_forward(self, message: Forward) -> Turn:
        request = ("forward", message.step)
        _check_shape(message, self._known(request) or self.kept.get(message.step))
        self._check_room(request)
        if message.keep and message.step not in self.kept and len(self.kept) >= MAX_OPEN:
            raise _too_many("steps await their backward")
        return Turn.NEW if message.step > self.highest else Turn.RETRY

    def _judge_backward(self, message: Backward) -> Turn:
        request, forward = ("backward", message.step), ("forward", message.step)
        _check_shape(message, self.kept.get(message.step) or self._known(request))
        self._check_room(request)
        if forward in self.opened and forward not in self.answered:
            raise NotAllowed(
                f"A backward was sent for step {message.step} before its forward was answered.",
                code="out_of_order",
                expected="forward, its answer, then backward",
            )
        if self._known(request):
            return Turn.RETRY
        if message.step in self.kept:
            return Turn.NEW
        raise NotAllowed(
            f"Step {message.step} is not held for a backward.",
            code="unknown_step",
            expected="a step whose forward asked to keep it, once",
            hint="send its forward again with keep, then the backward",
        )

    def _judge_fetch(self, message: Fetch) -> Turn:
        request = ("fetch", message.step)
        if (self._known(request) or part_of(message)) != part_of(message):
            raise NotAllowed(
                f"A fetch asks for another part than step {message.step} did.",
                code="malformed",
                expected="the same request, or a new number",
            )
        self._check_room(request)
        if request not in self.opened and sum(word == "fetch" for word, _ in self.opened) >= MAX_FETCHES:
            raise _too_many("fetches await their answer", MAX_FETCHES)
        return Turn.NEW if message.step > self.highest else Turn.RETRY

    def _judge_answer(self, message: ForwardDone | BackwardDone | Piece) -> Turn:
        request = (_ANSWERS[kind(message)], message.step)
        shape = self._known(request) or self.refused.get(request)
        if shape is None:
            raise NotAllowed(
                f"A {kind(message)!r} message answers step {message.step}, for which nothing was asked.",
                code="out_of_order",
                expected="one answer to each request",
            )
        if isinstance(message, Piece):
            _check_piece(message, shape)
        else:
            _check_shape(message, shape)
        return Turn.NEW if request in self.opened else Turn.RETRY

    def _check_room(self, request: Request) -> None:
        if request not in self.opened and len(self.opened) >= MAX_OPEN:
            raise _too_many("requests await their answer")

    def _answer(self, request: Request) -> None:
        if (shape := self.opened.pop(request, None)) is not None:
            _remember(self.answered, request, shape)

    def _refuse(self, step: int, *, lost: bool) -> None:
        """Close the earlier of the step's open requests, for the owner works through them in order."""
        forward, backward, fetch = ("forward", step), ("backward", step), ("fetch", step)
        request = next((each for each in (forward, fetch) if each in self.opened), backward)
        shape = self.opened.pop(request, None)
        if shape is not None:
            _remember(self.refused, request, shape)
        if request == fetch:
            return
        if request == forward:
            if forward not in self.answered:
                self.kept.pop(step, None)
        elif lost:
            self.answered.pop(backward, None)
            self.kept.pop(step, None)
        elif shape is not None and backward not in self.answered:
            self.kept[step] = shape


def _remember(book: OrderedDict[Request, Shape], request: Request, shape: Shape) -> None:
    book[request] = shape
    book.move_to_end(request)
    while len(book) > MAX_ANSWERED:
        book.popitem(last=False)


def _shape(message: AnyMessage) -> Shape:
    """Shape of the hidden or gradient tensor."""
    return next((spec.shape for spec in message.tensors if spec.name in ("hidden", "gradient")), ())


def _check_shape(message: AnyMessage, shape: Shape | None) -> None:
    if shape is not None and _shape(message) != shape:
        raise NotAllowed(
            f"A {kind(message)!r} message has another shape than its step.", code="malformed", expected=str(list(shape))
        )


def _check_piece(message: Piece, asked: Shape) -> None:
    file, offset, length = asked
    if not answers(message, (file, offset, length)):
        raise NotAllowed(
            f"A piece is not the part of a file that step {message.step} asked for.",
            code="malformed",
            expected=f"file {file}, {length} bytes from {offset} on, or up to its end",
        )


def _too_many(what: str, most: int = MAX_OPEN) -> NotAllowed:
    return NotAllowed(
        f"{most} {what}.",
        code="too_large",
        expected=f"at most {most}",
        hint="wait for answers, or release steps",
    )
