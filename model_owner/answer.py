"""The owner's side of one request: from checked message to reply, or to a refusal that says why.

Sizes were checked before; here values are: a number that would make the model fail, or fail for others, stops here.
Work on tensors runs on a worker; sessions and their caches are changed by the thread that owns the sockets alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from transformers import Cache

from model_owner.memory import Costs, MemoryBudget
from model_owner.parallel import RankLostError
from model_owner.refusals import Refusal
from model_owner.sessions import HeldCache, HeldSession
from model_owner.trunk import CacheMismatchError, Kept, Trunk
from splitfl.link import TrunkRequest, decoded
from splitfl.wire.codecs import TORCH_DTYPES, Frame
from splitfl.wire.frames import encode
from splitfl.wire.messages import Backward, BackwardDone, Forward, ForwardDone, TensorName

_MAX_CACHES = 256  # a session; each costs some memory even if it holds next to nothing


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a worker hands back."""

    frames: list[Frame]
    kept: Kept | None = None
    reserved: int = 0


class Answerer:
    """Answers forwards and backwards of any session with one trunk under one byte budget."""

    def __init__(self, trunk: Trunk, budget: MemoryBudget, costs: Costs) -> None:
        self.trunk, self.budget, self.costs = trunk, budget, costs
        table = getattr(trunk.base.config.get_text_config(), "max_position_embeddings", None)
        self._positions = table if isinstance(table, int) and table > 0 else None

    def open_cache(self, held: HeldSession, message: Forward) -> Cache:
        """The cache that `message` names, with its bytes reserved. Called where sessions live, with the cache's turn.

        Raises:
            Refusal: there is no such cache, it does not fit, or there is no room.
        """
        assert message.cache is not None  # noqa: S101
        rows, new, _ = next(spec.shape for spec in message.tensors if spec.name == "hidden")
        if not self.costs.cache:
            raise Refusal("This model is served without caches.", code="unknown_cache", hint="send whole sequences")
        if message.keep:
            raise _malformed("A step to be kept names a cache", "one of the two")
        entry = held.caches.get(message.cache)
        if message.past:
            if entry is None:
                raise Refusal(
                    "This cache is not held here.", code="unknown_cache", hint="start the generation from its prompt"
                )
            _check_fit(entry, message, rows)
        else:
            if message.rows is not None:
                raise _malformed("An empty cache was to be reordered", "`rows` only with `past`")
            if entry is None and len(held.caches) >= _MAX_CACHES:
                raise _no_room(f"more than {_MAX_CACHES} caches of one session")
            entry = HeldCache(self.trunk.new_cache(), reserved=0 if entry is None else entry.reserved)
            held.caches[message.cache] = entry
        # Reordering comes before cutting back, so for a moment there are so many rows of the old length.
        needed = rows * max(message.past + new, entry.length) * self.costs.cache
        if needed > entry.reserved:
            if not held.budget.take(needed - entry.reserved):
                held.drop_cache(message.cache)
                raise _no_room("the cache")
            entry.reserved = needed
        entry.rows, entry.length = rows, message.past + new
        entry.steps.append(message.step)
        return entry.cache

    def forward(
        self, held: HeldSession, message: Forward, tensors: dict[TensorName, torch.Tensor], cache: Cache | None = None
    ) -> Outcome:
        """Run the trunk. Called on a worker.

        Raises:
            Refusal: values that are not finite or out of range, no room, or a cache that does not fit.
        """
        request = self.request_of(message, tensors)
        with _refusing_what_does_not_fit():
            if message.keep:
                return self._forward_kept(held, message, request)
            try:
                output = self.trunk.forward(request, cache)
            except CacheMismatchError:
                raise
            except Exception:
                if cache is not None:  # some layers may have taken the new positions: it goes on from nothing
                    cache.layers = self.trunk.new_cache().layers
                raise
            return self.outcome(held, message, output)

    def backward(self, held: HeldSession, message: Backward, kept: Kept, gradient: torch.Tensor) -> Outcome:
        """Carry a gradient through a kept step. Called on a worker. Whatever it raises, the graph may be used up.

        Raises:
            Refusal: not finite, or no room.
        """
        check_finite(gradient, "gradient")
        with _refusing_what_does_not_fit():
            return self.outcome(held, message, self.trunk.backward(kept, gradient))

    def request_of(self, message: Forward, tensors: dict[TensorName, torch.Tensor]) -> TrunkRequest:
        """What is asked of the trunk. Called on a worker.

        Raises:
            Refusal: values that are not finite or out of range.
        """
        self._check_values(message, tensors)
        return TrunkRequest(
            hidden=tensors["hidden"],
            mask=tensors.get("mask"),
            positions=tensors.get("positions"),
            keep=message.keep,
            cache=message.cache,
            past=message.past,
            rows=message.rows,
        )

    def outcome(self, held: HeldSession, message: Forward | Backward, result: torch.Tensor) -> Outcome:
        """The answer that carries the trunk's output, or the gradient at its input.

        Raises:
            Refusal: it is not finite.
        """
        if isinstance(message, Forward):
            done = ForwardDone(session=held.key[1], step=message.step)
            return Outcome(frames=self._reply(held, done, "hidden", result))
        back = BackwardDone(session=held.key[1], step=message.step)
        return Outcome(frames=self._reply(held, back, "gradient", result))

    def outcome_kept(self, held: HeldSession, message: Forward, request: TrunkRequest, output: torch.Tensor) -> Outcome:
        """The same for a step that is kept as its input alone.

        Raises:
            Refusal: not finite, or no room for the input.
        """
        size = decoded(request.hidden).nbytes
        if not held.budget.take(size):
            raise _no_room("the step's input")
        try:
            found = self.outcome(held, message, output)
        except BaseException:
            held.budget.give_back(size)
            raise
        return replace(found, kept=Kept(request=request, entry=None, output=None), reserved=size)

    def _forward_kept(self, held: HeldSession, message: Forward, request: TrunkRequest) -> Outcome:
        hidden = decoded(request.hidden)
        rows, length, _ = hidden.shape
        for recompute in [True] if held.recompute else [False, True]:
            size = hidden.nbytes if recompute else self.costs.of_graph(rows, length)
            if not held.budget.take(size):
                continue
            try:
                output, kept = self.trunk.forward_kept(request, recompute=recompute)
                done = ForwardDone(session=held.key[1], step=message.step)
                return Outcome(frames=self._reply(held, done, "hidden", output), kept=kept, reserved=size)
            except BaseException:
                held.budget.give_back(size)
                raise
        raise _no_room("the step's input")

    def _check_values(self, message: Forward, tensors: dict[TensorName, torch.Tensor]) -> None:
        check_finite(tensors["hidden"], "hidden state")
        mask, positions = tensors.get("mask"), tensors.get("positions")
        if mask is not None:
            total = message.past + tensors["hidden"].shape[1]
            if mask.shape[1] != total:
                raise _malformed("The mask does not fit the positions", f"{total} columns, cached positions included")
            if bool((mask > 1).any()):
                raise _malformed("The mask holds something else than 0 and 1", "1 where there is a token, 0 elsewhere")
        if positions is not None:
            low, high = int(positions.min()), int(positions.max())
            if low < 0 or (self._positions is not None and high >= self._positions):
                raise _malformed("A position is out of range", f"0 to {(self._positions or 2**31) - 1}")

    def _reply(
        self, held: HeldSession, message: ForwardDone | BackwardDone, name: TensorName, result: torch.Tensor
    ) -> list[Frame]:
        sent = result.to(TORCH_DTYPES[held.limits.wire_dtype])  # before the check: a narrow dtype makes infinities
        check_finite(sent, "trunk's result")
        return encode(message, {name: sent}, held.limits.wire_dtype)


def _check_fit(entry: HeldCache, message: Forward, rows: int) -> None:
    """Whether `rows` new rows can go on from the cache as it is, or as `message.rows` reorders it."""
    if message.past > entry.length:
        raise Refusal(
            f"The cache holds {entry.length} positions, the request goes on from {message.past}.",
            code="unknown_cache",
            expected=f"at most {entry.length}",
        )
    order = message.rows
    if rows != (entry.rows if order is None else len(order)) or (order is not None and max(order) >= entry.rows):
        raise Refusal(
            f"The request's rows do not fit a cache of {entry.rows} rows.",
            code="unknown_cache",
            expected="as many rows as the cache has, or the number of one of them for each row",
        )


def check_finite(tensor: torch.Tensor, what: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        Refusal: there are some.
    """
    # A sum is quick, and finite only if all its terms are. It may overflow though they are, hence the second look.
    if not bool(torch.isfinite(tensor.sum())) and not bool(torch.isfinite(tensor).all()):
        raise Refusal(
            f"The {what} holds NaN or infinity.",
            code="not_finite",
            expected="finite numbers",
            hint="lower the learning rate, or compute and send in a wider dtype",
        )


@contextmanager
def _refusing_what_does_not_fit() -> Iterator[None]:
    """Say as a refusal what the trunk and the machine's memory cannot do."""
    try:
        yield
    except CacheMismatchError as error:
        raise Refusal(error.problem, code="unknown_cache", expected=error.expected, hint=error.hint) from error
    except RankLostError as error:
        raise Refusal(error.problem, code="draining", hint="wait for the owner to come back") from error
    except (MemoryError, RuntimeError) as error:  # torch says it in its own class on a GPU, and in words on a CPU
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # what others need is not held for the next try
        raise Refusal(
            "The owner's device has not enough memory to compute this request.",
            code="too_large",
            expected="fewer rows, or shorter ones, in one request",
            hint="lower --per-device-train-batch-size or --max-length, or split steps with --micro-batches; "
            "the session goes on",
        ) from error


def _malformed(problem: str, expected: str) -> Refusal:
    return Refusal(f"{problem}.", code="malformed", expected=expected)


def _no_room(what: str) -> Refusal:
    return Refusal(
        f"The owner's memory has no room for {what}.",
        code="busy",
        hint="try again later, send a smaller batch, or ask the owner for a larger --memory-budget",
    )
