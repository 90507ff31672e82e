"""A training step in micro-batches that overlap: one computes while another one is on its way.

    party    F1 F2 F3 F4 | T1 T2 T3 T4 | B1 B2 B3 B4     F bottom, T top, loss and its gradient, B bottom's gradient
    owner       f1 f2 f3 f4 b1 b2 b3 b4                    forward, backward

A training batch is split by rows. Each micro-batch goes through the model in a thread of its own, and they take turns
(`party.turns`) at the two places where an answer is waited for. The order above is fixed in advance: nothing depends on
how fast an answer comes. With a bound on what is in flight, micro-batches go in waves of as many as it allows, and the
next one starts when an earlier one has ended.

The sum over micro-batches is what the plain step computes: losses are divided by what the whole batch counts. It is the
same number up to the order of additions (tested to 1e-6, relative, in float32). Dropout draws other masks than in one
pass, and the same ones in every run with the same seed and settings.

The graph is cut at the trunk: the top's backward ends at the trunk's output, and the bottom's begins with the gradient
that came back. So no thread of autograd ever waits for the network, on whatever device the party computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from party.turns import Turns, one_pause
from splitfl.link import TrunkLink, TrunkRequest

T = TypeVar("T")

AUTO = 4
"""What ``auto`` stands for, where a batch has as many rows; see docs/performance.md for what was measured."""
MOST = 12
"""Micro-batches in flight at most: a link queues 16 messages (`splitfl.wire.channel.QUEUE`)."""


# ---- the batch


@dataclass(frozen=True, kw_only=True)
class Split:
    """A batch in micro-batches."""

    parts: list[dict[str, Any]]
    order: torch.Tensor
    """int64 [B]: which row of the batch stands where, all parts one after the other."""

    def joined(self, parts: Sequence[torch.Tensor], length: int) -> torch.Tensor:
        """Tensors of the parts, each [b, t, D], as one [B, `length`, D] in the batch's order; zeros where t ended."""
        padded = [torch.nn.functional.pad(part, (0, 0, 0, length - part.shape[1])) for part in parts]
        return torch.cat(padded)[torch.argsort(self.order).to(parts[0].device)]


def split_batch(batch: dict[str, Any], count: int, *, trim: bool = True) -> Split:
    """Rows of similar length together, padding on the right that nobody needs taken away.

    Args:
        batch: tensors [B, ...]; `attention_mask` [B, T] is 1 where there is a token.
        count: parts; fewer where there are fewer rows.
        trim: False leaves order and padding as they are, for whoever hides lengths.

    Returns:
        The parts, from short rows to long ones; one part, the batch itself, where it cannot be split by rows.
    """
    mask = batch["attention_mask"]
    rows, length = mask.shape
    lengths = mask.sum(1)
    order = torch.argsort(lengths, stable=True) if trim else torch.arange(rows)
    count = min(count, rows)
    if count < 2 or not all(isinstance(value, torch.Tensor) and len(value) == rows for value in batch.values()):
        return Split(parts=[batch], order=torch.arange(rows))
    parts = []
    for chosen in order.split(sizes_of(rows, count)):
        # Positions on the left count: without position ids some families number them from the first column on.
        used = int(mask[chosen].any(0).nonzero().max()) + 1 if trim else length
        parts.append({name: _taken(value, chosen, length, used) for name, value in batch.items()})
    return Split(parts=parts, order=order)


def sizes_of(rows: int, count: int) -> list[int]:
    """How many rows each part has: about as many, and half of that in the first and the last where there are enough.

    The owner waits for the first bottom and the last gradient, whatever else overlaps: so these two are small. (M at
    8x128: parts of 1, 3, 3, 1 rows took 2.03 s where 2, 2, 2, 2 took 2.16.)
    """
    edge = max(1, round(rows / (2 * count - 2))) if count > 2 else 0
    inner = rows - 2 * edge
    if count < 3 or inner < count - 2:
        return [len(part) for part in torch.arange(rows).tensor_split(count)]
    return [edge, *(len(part) for part in torch.arange(inner).tensor_split(count - 2)), edge]


def _taken(tensor: torch.Tensor, rows: torch.Tensor, length: int, used: int) -> torch.Tensor:
    chosen = tensor[rows]
    return chosen[:, :used].contiguous() if chosen.ndim > 1 and chosen.shape[1] == length else chosen


# ---- one micro-batch


class Part:
    """Where the graph of one micro-batch is cut."""

    def __init__(self) -> None:
        self._cuts: list[_Cut] = []

    def through(
        self, hidden: torch.Tensor, link: TrunkLink, request: TrunkRequest,
        on_hidden: Callable[[torch.Tensor], None] | None,
    ) -> torch.Tensor:  # fmt: skip
        """The trunk's output; others have their turn while it is under way.

        Args:
            hidden: out of the bottom [B, T, D], with its graph.
            link: the road to the trunk.
            request: made of `hidden`.
            on_hidden: is shown a leaf of the same numbers; the gradient that it is given is added to the trunk's.
        """
        shown = None
        if on_hidden is not None:
            shown = hidden.detach().requires_grad_(hidden.requires_grad)
            on_hidden(shown)
        with one_pause():  # also where nothing crosses a wire: the order stays the same
            output, step = link.forward(replace(request, overlap=True))
        output = output.to(hidden.device, hidden.dtype)
        if request.keep:
            output = output.detach().requires_grad_()
            self._cuts.append(_Cut(hidden=hidden, shown=shown, output=output, link=link, step=step))
        return output

    def finish(self) -> None:
        """Carry the gradient from the trunk's output through trunk and bottom, once the top's backward is done."""
        while self._cuts:
            self._cuts.pop().backward()

    def drop(self) -> None:
        """Tell the owner to forget steps whose gradient will not come."""
        while self._cuts:
            cut = self._cuts.pop()
            cut.link.release(steps=(cut.step,))


@dataclass(kw_only=True)
class _Cut:
    hidden: torch.Tensor
    shown: torch.Tensor | None
    output: torch.Tensor
    link: TrunkLink
    step: int

    def backward(self) -> None:
        gradient, self.output.grad = self.output.grad, None
        total = None if self.shown is None else self.shown.grad
        if gradient is None:  # the loss does not depend on the trunk
            self.link.release(steps=(self.step,))
        else:
            with one_pause():
                came = self.link.backward(self.step, gradient.contiguous())
            came = came.to(self.hidden.device, self.hidden.dtype)
            total = came if total is None else came + total
        if total is not None:
            self.hidden.backward(total)


_PART: ContextVar[Part | None] = ContextVar("part", default=None)


def current_part() -> Part | None:
    """The micro-batch that is computed here; None outside of `run_pipelined`."""
    return _PART.get()


# ---- the schedule


def run_pipelined(
    works: Sequence[Callable[[], T]], *, window: int = MOST, forwards_done: Callable[[], None] | None = None
) -> list[T]:
    """Forward, loss and backward of some micro-batches, overlapping; gradients add up in the parameters.

    Args:
        works: each does ``loss = ...; loss.backward()`` for its micro-batch, and returns what it likes.
        window: micro-batches that may be in flight at the same time.
        forwards_done: called when every bottom has computed and no gradient has gone back yet; needs a `window` that
            holds all of them.

    Returns:
        What the works returned, in their order.
    """
    window = max(1, min(window, MOST))
    with Turns([_in_a_part(work) for work in works]) as turns:
        for place, number in enumerate(schedule(len(works), window)):
            if forwards_done is not None and place == len(works):
                forwards_done()
            turns.resume(number)
        return turns.finish()


def schedule(count: int, window: int) -> Iterator[int]:
    """Whose turn it is, turn by turn: each micro-batch has three, F, T and B (see the top of this file)."""
    wave = range(min(window, count))
    yield from wave
    while wave:
        yield from wave
        for number in wave:
            yield number
            if number + window < count:
                yield number + window
        wave = range(wave.stop, min(wave.stop + window, count))


def _in_a_part(work: Callable[[], T]) -> Callable[[], T]:
    def whole() -> T:
        part = Part()
        _PART.set(part)  # in this thread's own context
        try:
            result = work()
            part.finish()
            return result
        except BaseException:
            part.drop()
            raise

    return whole


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """How a run's batches are pipelined."""

    micro_batches: int
    """0 for `AUTO`."""
    in_flight_bytes: int
    """Bound on the activations that are under way at a time, as they are sent."""
    width: int
    """D at the cut."""
    itemsize: int = 4
    """Bytes of a number on the wire."""
    trim: bool = True

    def split(self, batch: dict[str, Any], most: int | None = None) -> Split:
        """`batch` in micro-batches, `most` of them at most."""
        count = self.micro_batches or AUTO
        return split_batch(batch, count if most is None else min(count, most), trim=self.trim)

    def window(self, split: Split) -> int:
        """Micro-batches of `split` that may be in flight together: at least one, whatever the bound."""
        largest = max(part["attention_mask"].numel() for part in split.parts)
        return max(1, min(self.in_flight_bytes // (largest * self.width * self.itemsize), MOST))
