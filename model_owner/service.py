"""Step 9 of the journey: one checked request becomes work for a worker, in its party's turn and lane.

All of this runs on the thread that owns the sockets and session state, but for what is handed to the scheduler.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache

from model_owner import refusals
from model_owner.answer import Answerer, Outcome, check_finite
from model_owner.batching import Batcher, Kind, Pending
from model_owner.quotas import Quotas
from model_owner.refusals import Refusal
from model_owner.scheduler import Joint, Lane, Scheduler
from model_owner.sessions import HeldSession
from model_owner.trunk import Kept
from splitfl.link import TrunkRequest
from splitfl.wire import frames as wire
from splitfl.wire.codecs import Frame
from splitfl.wire.messages import Backward, Forward, kind

_FEW = 8  # new positions a row, from a filled cache: decoding, or checking a draft; more is a prompt in pieces


@dataclass(frozen=True, kw_only=True)
class Service:
    """Has forwards and backwards of any session computed.

    Args:
        answerer: computes.
        scheduler: says when.
        quotas: say how much a party weighs.
        is_open: whether a session is still one.
        deadline_s: how long a party waits without asking again.
        batcher: shares passes between sessions; None never does.
    """

    answerer: Answerer
    scheduler: Scheduler
    quotas: Quotas
    is_open: Callable[[HeldSession], bool]
    deadline_s: float
    batcher: Batcher | None = None

    async def forward(self, held: HeldSession, message: Forward, frames: Sequence[Frame]) -> Outcome:
        """The answer to a forward; a step that was to be kept is in the session afterwards.

        Raises:
            Refusal: as `Answerer.forward` does, or nobody waits for it any more.
        """
        if message.cache is None:
            work = functools.partial(self._forward_on_worker, held, message, frames)
            shares = held.recompute or not message.keep  # a graph that is kept is one session's alone
            joint = self._joint("forward" if shares else None, held, message, frames, work)
            outcome = await self._schedule(held, message, Lane.TRAINING, work, joint=joint)
        else:
            outcome = await self._forward_cached(held, message, frames)
        if outcome.kept is not None:
            if self.is_open(held) and message.step in held.talk.kept_steps():
                held.keep(message.step, outcome.kept, outcome.reserved)
            else:  # closed or released meanwhile
                held.budget.give_back(outcome.reserved)
        held.served_tokens += positions_of(message)
        return outcome

    async def backward(self, held: HeldSession, message: Backward, frames: Sequence[Frame]) -> Outcome:
        """The answer to a backward; its step is not held any more afterwards.

        Raises:
            Refusal: as `Answerer.backward` does, or nobody waits for it any more.
        """
        if message.step not in held.kept:
            raise Refusal(
                f"Step {message.step} is not held here any more.",
                code="unknown_step",
                hint="send its forward again, then the backward",
            )
        kept, _ = held.kept[message.step]
        work = functools.partial(self._backward_on_worker, held, message, frames, kept)
        try:
            joint = self._joint("backward" if kept.output is None else None, held, message, frames, work, kept=kept)
            outcome = await self._schedule(held, message, Lane.TRAINING, work, weighs=2, joint=joint)
        except BaseException:
            held.spend_step(message.step)
            raise
        held.drop_step(message.step)
        return outcome

    async def _forward_cached(self, held: HeldSession, message: Forward, frames: Sequence[Frame]) -> Outcome:
        assert message.cache is not None  # noqa: S101
        async with held.cache_turn:
            if not self.is_open(held):
                raise refusals.ended()
            cache = self.answerer.open_cache(held, message)
            decoding = message.past > 0 and positions_of(message) <= _FEW * message.tensors[0].shape[0]
            try:
                work = functools.partial(self._forward_on_worker, held, message, frames, cache)
                joint = self._joint("decode" if decoding else None, held, message, frames, work, cache=cache)
                lane = Lane.DECODE if decoding else Lane.PREFILL
                return await self._schedule(held, message, lane, work, joint=joint)
            except BaseException:
                held.drop_cache(message.cache)  # it may be half written
                raise
            finally:
                held.touch_cache(message.cache)

    async def _schedule(
        self, held: HeldSession, message: Forward | Backward, lane: Lane, work: Callable[[], Outcome], *,
        weighs: int = 1, joint: Joint | None = None,
    ) -> Outcome:  # fmt: skip
        return await self.scheduler.run(
            held.payer,
            weighs * positions_of(message),
            work,
            lane=lane,
            weight=self.quotas.of(held.party).weight,
            wanted=functools.partial(self._is_wanted, held, (kind(message), message.step)),
            joint=joint,
        )

    def _joint(
        self, sort: Kind | None, held: HeldSession, message: Forward | Backward, frames: Sequence[Frame],
        work: Callable[[], Outcome], *, cache: Cache | None = None, kept: Kept | None = None,
    ) -> Joint | None:  # fmt: skip
        """How it may share a pass with other sessions; None if it may not."""
        if self.batcher is None or sort is None:
            return None
        rows, length, _ = next(spec.shape for spec in message.tensors if spec.name in ("hidden", "gradient"))
        return self.batcher.joint(
            Pending(
                kind=sort,
                held=held,
                message=message,
                rows=rows,
                length=length,
                past=message.past if isinstance(message, Forward) else 0,
                prepare=functools.partial(self._prepare, message, frames, kept),
                alone=work,
                cache=cache,
                kept=kept,
            )
        )

    def _prepare(
        self, message: Forward | Backward, frames: Sequence[Frame], kept: Kept | None
    ) -> tuple[TrunkRequest, torch.Tensor | None]:
        tensors = wire.tensors_of(message, frames)
        if isinstance(message, Forward):
            return self.answerer.request_of(message, tensors), None
        assert kept is not None  # noqa: S101
        check_finite(tensors["gradient"], "gradient")
        return kept.request, tensors["gradient"]

    def _is_wanted(self, held: HeldSession, request: tuple[str, int]) -> bool:
        """Whether anybody still waits for an answer. Asked by workers."""
        asked = held.under_way.get(request)
        return self.is_open(held) and asked is not None and time.monotonic() - asked < self.deadline_s

    def _forward_on_worker(
        self, held: HeldSession, message: Forward, frames: Sequence[Frame], cache: Cache | None = None
    ) -> Outcome:
        """Codes are read here, not on the thread that owns the sockets."""
        return self.answerer.forward(held, message, wire.tensors_of(message, frames), cache)

    def _backward_on_worker(self, held: HeldSession, message: Backward, frames: Sequence[Frame], kept: Kept) -> Outcome:
        return self.answerer.backward(held, message, kept, wire.tensors_of(message, frames)["gradient"])


def positions_of(message: Forward | Backward | Any) -> int:
    """Rows times new positions of a request; 0 of what is not computed."""
    wanted = "hidden" if isinstance(message, Forward) else "gradient"
    return next((spec.shape[0] * spec.shape[1] for spec in message.tensors if spec.name == wanted), 0)


def tokens_of(message: Forward | Backward | Any) -> int:
    """What a request is charged: a step to be kept pays for its backward in advance, so that it is always served."""
    if not isinstance(message, Forward):
        return 0
    return positions_of(message) * (2 if message.keep else 1)
