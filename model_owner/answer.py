"""The owner's side of one request: from checked message to reply, or to a refusal that says why.

Work that touches tensors runs on a worker (`Work`); everything else happens on the thread that owns the sockets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import Cache

from model_owner.memory import MemoryBudget
from model_owner.sessions import HeldCache, HeldSession
from model_owner.trunk import CacheMismatchError, Kept, Trunk
from splitfl.link import TrunkRequest
from splitfl.wire.codecs import Frame
from splitfl.wire.frames import Violation, encode
from splitfl.wire.messages import Backward, BackwardDone, Forward, ForwardDone, TensorName


class Refusal(Violation):
    """The owner cannot do what was asked, though it was well formed."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What one token takes, measured at start-up."""

    graph: int
    cache: int


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

    def forward(self, held: HeldSession, message: Forward, tensors: dict[TensorName, torch.Tensor]) -> Outcome:
        """Run the trunk. Called on a worker.

        Raises:
            Refusal: not finite, no room, or a cache that does not fit.
        """
        hidden = tensors["hidden"]
        _check_finite(hidden, "hidden state")
        request = TrunkRequest(
            hidden=hidden,
            mask=tensors.get("mask"),
            positions=tensors.get("positions"),
            keep=message.keep,
            cache=message.cache,
            past=message.past,
            rows=message.rows,
        )
        if message.keep:
            return self._forward_kept(held, message, request)
        cache = self._cache_for(held, message, request) if message.cache is not None else None
        try:
            output = self.trunk.forward(request, cache)
        except CacheMismatchError as error:
            raise Refusal(error.problem, code="unknown_cache", expected=error.expected, hint=error.hint) from error
        return Outcome(frames=self._reply(held, ForwardDone(session=held.key[1], step=message.step), "hidden", output))

    def backward(self, held: HeldSession, message: Backward, kept: Kept, gradient: torch.Tensor) -> Outcome:
        """Carry a gradient through a kept step. Called on a worker.

        Raises:
            Refusal: not finite.
        """
        _check_finite(gradient, "gradient")
        result = self.trunk.backward(kept, gradient)
        return Outcome(
            frames=self._reply(held, BackwardDone(session=held.key[1], step=message.step), "gradient", result)
        )

    def _forward_kept(self, held: HeldSession, message: Forward, request: TrunkRequest) -> Outcome:
        tokens = request.hidden.shape[0] * request.hidden.shape[1]
        for recompute in [True] if held.recompute else [False, True]:
            size = request.hidden.nbytes if recompute else tokens * self.costs.graph
            if not self.budget.take(size):
                continue
            try:
                output, kept = self.trunk.forward_kept(request, recompute=recompute)
                done = ForwardDone(session=held.key[1], step=message.step)
                return Outcome(frames=self._reply(held, done, "hidden", output), kept=kept, reserved=size)
            except BaseException:
                self.budget.give_back(size)
                raise
        raise _no_room("the step's input")

    def _cache_for(self, held: HeldSession, message: Forward, request: TrunkRequest) -> Cache:
        assert message.cache is not None  # noqa: S101
        entry = held.caches.get(message.cache)
        if entry is None:
            if message.past:
                raise Refusal(
                    "This cache is not held here.", code="unknown_cache", hint="start the generation from its prompt"
                )
            entry = held.caches[message.cache] = HeldCache(self.trunk.new_cache())
        rows, new, _ = request.hidden.shape
        needed = rows * (message.past + new) * self.costs.cache
        if needed > entry.reserved:
            if not self.budget.take(needed - entry.reserved):
                held.drop_cache(message.cache)
                raise _no_room("the cache")
            entry.reserved = needed
        return entry.cache

    def _reply(
        self, held: HeldSession, message: ForwardDone | BackwardDone, name: TensorName, result: torch.Tensor
    ) -> list[Frame]:
        _check_finite(result, "trunk's result")
        return encode(message, {name: result}, held.limits.wire_dtype)


def _check_finite(tensor: torch.Tensor, what: str) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise Refusal(
            f"The {what} holds NaN or infinity.",
            code="not_finite",
            expected="finite numbers",
            hint="lower the learning rate, or compute and send in a wider dtype",
        )


def _no_room(what: str) -> Refusal:
    return Refusal(
        f"The owner's memory budget has no room for {what}.",
        code="busy",
        hint="try again later, send a smaller batch, or ask the owner for a larger --memory-budget",
    )
