"""When requests of several sessions are computed in one pass (`model_owner.joint`), and when one by one.

What is allowed is a setting. A pass with other rows can differ from a pass alone in the last bit, and a run that is
resumed would then not end with the same adapter bit for bit. So by default (``auto``) training is batched only where a
probe at the start found no bit different on this machine, and decoding always; ``exact`` asks that of decoding too.

Whether it gains is measured: for each size of work, the time of a pass of n requests beside that of n passes. What
loses is left alone, and tried again ever more rarely. On a CPU whose cores one large batch fills, it loses; small rows
gain, since most of their time goes into calling the layers.

A decode may wait up to `WINDOW_S` for others, if others have decoded just before and such waits have brought some.

Whatever fails in a pass is done again one by one, so that each session gets its own answer or its own refusal.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from transformers import Cache

from model_owner.answer import Answerer, Outcome
from model_owner.joint import Snapshot, backward_together, decode_together, forward_together, joinable
from model_owner.observer import NoObserver, Observer
from model_owner.scheduler import Joint
from model_owner.sessions import HeldSession
from model_owner.trunk import Kept, Trunk
from splitfl.config_sharing import Batching
from splitfl.link import TrunkRequest
from splitfl.wire.messages import Backward, Forward

log = logging.getLogger("splitfl.owner")

Kind: TypeAlias = Literal["forward", "backward", "decode"]
KINDS: tuple[Kind, ...] = ("forward", "backward", "decode")

WINDOW_S = 0.0015
_RECENT_S = 0.1  # who decoded so lately is expected to go on
_WORTH = 0.4  # of the waits have to bring somebody, or only every `_LOOK_AGAIN`th is tried
MAX_ROWS, MAX_TOKENS = 64, 4096  # of one pass, what was filled up included
_FILLING = 1.5  # positions of a pass, beside those that were asked for
_LONG_S = 0.1  # a forward or backward that takes longer alone is full of arithmetic: nothing to gain
_GAIN = 0.97  # a pass together has to take less than this of the time alone
_FORGET = 0.15  # weight of a new measurement
_LOOK_AGAIN, _RARELY = 64, 8192  # passes until what lost is tried again, at first and at most
_REFRESH = 200  # passes together until one alone shows how that does now


@dataclass
class Pending:
    """One request that may share a pass."""

    kind: Kind
    held: HeldSession
    message: Forward | Backward
    rows: int
    length: int
    """New positions of a row."""
    past: int
    prepare: Callable[[], tuple[TrunkRequest, torch.Tensor | None]]
    """Reads and checks the tensors: what is asked of the trunk, and the gradient of a backward."""
    alone: Callable[[], Outcome]
    cache: Cache | None = None
    kept: Kept | None = None
    waited: bool = False
    """Whether it stood in a window."""

    @property
    def tokens(self) -> int:
        """Rows times new positions."""
        return self.rows * self.length


@dataclass
class _Measured:
    """Passes together of one size, beside passes alone."""

    ratio: float | None = None
    again_at: int = 0
    pause: int = _LOOK_AGAIN


@dataclass
class Judge:
    """Whether to share a pass, from the times that passes took. Asked by several workers."""

    passes: int = 0
    alone: dict[tuple[Kind, int], float] = field(default_factory=dict)
    """Kind and size of a request -> its seconds alone."""
    shared: dict[tuple[Kind, int, int], _Measured] = field(default_factory=dict)
    """Kind, size of the first, number of requests, both as powers of two -> what sharing gave."""

    def pays(self, items: Sequence[Pending]) -> bool:
        """Whether these together take less time than one by one, as far as is known; now and then to find out."""
        self.passes += 1
        alone = [self.alone.get(_alone_key(item)) for item in items]
        if None in alone or self.passes % _REFRESH == 0:
            return False
        if items[0].kind != "decode" and any(seconds is not None and seconds > _LONG_S for seconds in alone):
            return False
        found = self.shared.setdefault(_shared_key(items), _Measured())
        if found.ratio is None:
            return not self._smaller_lost(items)
        if found.ratio < _GAIN:
            return True
        return self.passes >= found.again_at

    def took(self, items: Sequence[Pending], seconds: float) -> None:
        """Note the time of a pass."""
        if len(items) == 1:
            key = _alone_key(items[0])
            before = self.alone.get(key)
            self.alone[key] = seconds if before is None else before + _FORGET * (seconds - before)
            return
        expected = sum(self.alone.get(_alone_key(item), 0.0) for item in items)
        if expected <= 0:
            return
        found = self.shared.setdefault(_shared_key(items), _Measured())
        ratio = seconds / expected
        lost = found.ratio is None or found.ratio >= _GAIN  # then this was a try, and it decides
        found.ratio = ratio if lost or found.ratio is None else found.ratio + _FORGET * (ratio - found.ratio)
        if found.ratio >= _GAIN:
            found.again_at, found.pause = self.passes + found.pause, min(2 * found.pause, _RARELY)
        else:
            found.pause = _LOOK_AGAIN

    def _smaller_lost(self, items: Sequence[Pending]) -> bool:
        """Whether the same with fewer requests, or smaller ones, is known to lose: then this does too, for now."""
        kind, size, count = _shared_key(items)
        return any(
            one.ratio is not None and one.ratio >= _GAIN and self.passes < one.again_at
            for (other, smaller, fewer), one in self.shared.items()
            if other == kind and smaller <= size and fewer <= count
        )


class Batcher:
    """Makes several requests one pass: a `model_owner.scheduler.Together`.

    Args:
        answerer: computes.
        mode: what is allowed.
        observer: is told of each pass that was shared.
        always: share whatever may be shared, measured or not; for tests and measurements.
    """

    def __init__(
        self, answerer: Answerer, mode: Batching, observer: Observer | None = None, *, always: bool = False
    ) -> None:
        self.answerer, self.mode, self.always = answerer, mode, always
        self.observer: Observer = observer or NoObserver()
        self.kinds = allowed(answerer.trunk, mode)
        self.judge = Judge()
        self._lock = threading.Lock()
        self._decoded: dict[int, float] = {}
        self._windows, self._came = (
            0,
            0.5,
        )  # how often there was reason to wait; share of the waits that brought somebody

    def joint(self, item: Pending) -> Joint | None:
        """How `item` may be done together with others; None if it may not."""
        if item.kind not in self.kinds or item.rows > MAX_ROWS or item.tokens > MAX_TOKENS:
            return None
        message = item.message if isinstance(item.message, Forward) else None
        shape = tuple(spec.name for spec in message.tensors) if message is not None else ()
        if item.kind == "decode":
            with self._lock:
                now = time.monotonic()
                self._decoded[id(item.held)] = now
                if len(self._decoded) > 2 * MAX_ROWS:
                    self._decoded = {one: at for one, at in self._decoded.items() if now - at < _RECENT_S}
            return Joint(key=("decode", item.length), item=item, together=self)
        return Joint(key=(item.kind, "positions" in shape), item=item, together=self)

    # ---- called by workers

    def window_s(self, item: Pending, waiting: int) -> float:
        """A moment for a decode, while fewer wait than have decoded just before, and such moments bring something."""
        if item.kind != "decode":
            return 0.0
        now = time.monotonic()
        with self._lock:
            recent = sum(now - at < _RECENT_S for at in self._decoded.values())
            if waiting + 1 >= min(recent, MAX_ROWS):
                return 0.0
            self._windows += not item.waited
            worth = self.always or item.waited or self._came > _WORTH or self._windows % _LOOK_AGAIN == 0
        item.waited = worth
        return WINDOW_S if worth else 0.0

    def choose(self, item: Pending, others: list[Pending]) -> list[int]:
        """As many of the others as fit beside `item` and pay; none if none do."""
        chosen: list[int] = []
        group = [item]
        for index, other in enumerate(others):
            if _fits([*group, other]) and other.held is not item.held:
                chosen.append(index)
                group.append(other)
        with self._lock:
            if item.waited:
                self._came += _FORGET * ((len(group) > 1) - self._came)
            while len(group) > 1 and not self.always and not self.judge.pays(group):
                half = len(group) // 2
                group, chosen = group[:half], chosen[: half - 1]
        return chosen if len(group) > 1 else []

    def run(self, items: list[Pending]) -> list[Outcome | BaseException]:
        """The outcome of each, or what it met."""
        results: dict[int, Outcome | BaseException] = {}
        ready: dict[int, tuple[TrunkRequest, torch.Tensor | None]] = {}
        for index, item in enumerate(items):
            try:
                asked = item.prepare()
                if joinable(self.answerer.trunk, asked[0], item.cache):
                    ready[index] = asked
            except Exception as error:
                results[index] = error
        before = {index: Snapshot.of(cache) for index in ready if (cache := items[index].cache) is not None}
        results |= self._pass({index: (items[index], *asked) for index, asked in ready.items()}, before)
        for index, item in enumerate(items):
            if index not in results:
                results[index] = _attempt(item.alone)
        return [results[index] for index in range(len(items))]

    def took(self, items: list[Pending], seconds: float) -> None:
        """Note it."""
        with self._lock:
            self.judge.took(items, seconds)

    def _pass(
        self, asked: dict[int, tuple[Pending, TrunkRequest, torch.Tensor | None]], before: dict[int, Snapshot]
    ) -> dict[int, Outcome | BaseException]:
        """The outcomes of one pass; those that are missing are to be found alone, from caches as they were."""
        found: dict[int, Outcome | BaseException] = {}
        if len(asked) > 1:
            try:
                outputs = self._compute(list(asked.values()))
                for (index, (item, request, _)), output in zip(asked.items(), outputs, strict=True):
                    found[index] = _attempt(functools.partial(self._reply, item, request, output))
                rows = sum(item.rows for item, _, _ in asked.values())
                self.observer.batch_done(len(asked), rows, sum(item.tokens for item, _, _ in asked.values()))
            except Exception:
                log.warning("a pass of %d requests failed; they are computed one by one", len(asked), exc_info=True)
        good: dict[int, Outcome | BaseException] = {n: one for n, one in found.items() if isinstance(one, Outcome)}
        for index in before:
            if index not in good:
                before[index].restore()
        return good

    def _compute(self, asked: list[tuple[Pending, TrunkRequest, torch.Tensor | None]]) -> list[torch.Tensor]:
        trunk, kind = self.answerer.trunk, asked[0][0].kind
        requests = [request for _, request, _ in asked]
        if kind == "decode":
            return decode_together(trunk, requests, [item.cache for item, _, _ in asked if item.cache is not None])
        if kind == "backward":
            kept = [item.kept for item, _, _ in asked if item.kept is not None]
            return backward_together(trunk, kept, [gradient for _, _, gradient in asked if gradient is not None])
        return forward_together(trunk, requests)

    def _reply(self, item: Pending, request: TrunkRequest, output: torch.Tensor) -> Outcome:
        """The answer from one session's part of a pass."""
        if isinstance(item.message, Forward) and item.message.keep:
            return self.answerer.outcome_kept(item.held, item.message, request, output)
        return self.answerer.outcome(item.held, item.message, output)


def allowed(trunk: Trunk, mode: Batching) -> frozenset[Kind]:
    """The kinds of work that may share a pass under a setting."""
    if mode == "off":
        return frozenset()
    if mode == "on":
        return frozenset(KINDS)
    equal = frozenset(kind for kind in KINDS if is_equal(trunk, kind))
    return equal | {"decode"} if mode == "auto" else equal


def is_equal(trunk: Trunk, kind: Kind) -> bool:
    """Whether a few passes together give, to the bit, what they give alone. A sample: other shapes may differ."""
    generator = torch.Generator().manual_seed(0)
    longest = min(trunk.plan.max_length or 64, 64)
    shapes = [(1, longest // 2), (2, longest // 2), (1, longest // 4 + 1), (4, longest // 2)]
    requests = [
        TrunkRequest(hidden=torch.randn(rows, length, trunk.plan.width, generator=generator)) for rows, length in shapes
    ]
    try:
        if kind == "forward":
            alone = [trunk.forward(request) for request in requests]
            together = forward_together(trunk, requests)
        elif kind == "backward":
            kept = [Kept(request=request, entry=None, output=None) for request in requests]
            gradients = [request.hidden for request in requests if isinstance(request.hidden, torch.Tensor)]
            alone = [trunk.backward(one, above) for one, above in zip(kept, gradients, strict=True)]
            together = backward_together(trunk, kept, gradients)
        else:
            alone, together = _decoded(trunk, requests)
    except Exception:
        log.warning("requests of kind %s cannot share a pass of this model", kind, exc_info=True)
        return False
    return all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def _decoded(trunk: Trunk, requests: list[TrunkRequest]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    steps: list[TrunkRequest] = []
    caches: list[Cache] = []
    twins: list[Cache] = []
    for request in requests:
        hidden = request.hidden
        assert isinstance(hidden, torch.Tensor)  # noqa: S101
        for kept in (caches, twins):
            kept.append(trunk.new_cache())
            trunk.forward(TrunkRequest(hidden=hidden[:, :-1]), kept[-1])
        steps.append(TrunkRequest(hidden=hidden[:, -1:], past=hidden.shape[1] - 1))
    alone = [trunk.forward(step, cache) for step, cache in zip(steps, twins, strict=True)]
    return alone, decode_together(trunk, steps, caches)


def _attempt(work: Callable[[], Outcome]) -> Outcome | BaseException:
    try:
        return work()
    except Exception as error:
        return error


def _fits(items: Sequence[Pending]) -> bool:
    """Whether a pass of these is within bounds, and not mostly filling."""
    rows = sum(item.rows for item in items)
    extents = [item.past + item.length for item in items]
    wanted = sum(item.rows * extent for item, extent in zip(items, extents, strict=True))
    if items[0].kind == "decode":  # filling costs a copy and some attention there, not a layer's work
        return rows <= MAX_ROWS and rows * max(extents) <= 4 * _FILLING * wanted
    filled = rows * max(extents)
    return rows <= MAX_ROWS and filled <= MAX_TOKENS and filled <= _FILLING * wanted


def _alone_key(item: Pending) -> tuple[Kind, int]:
    """Kind and size of a request: its tokens, and for decoding its cache, as powers of two."""
    size = item.tokens.bit_length() * 32 + (item.past.bit_length() if item.kind == "decode" else 0)
    return item.kind, size


def _shared_key(items: Sequence[Pending]) -> tuple[Kind, int, int]:
    kind, size = _alone_key(items[0])
    return kind, size, len(items).bit_length()
