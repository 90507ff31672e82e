"""Steps 5 to 7 and their way back, at the party: a request becomes frames, goes out, and its answer comes in.

The calling thread does the talking: training and generation wait for the trunk anyway. Micro-batches of a pipelined
step let each other have their turn between a request and its answer (`party.turns`), so several requests may be under
way; an answer that comes while another one is waited for is kept for its own turn.

What goes out once goes out the same way again: after a lost link, a long silence or an owner that restarted, the very
same bytes are sent, so nothing a mechanism drew at random is ever drawn twice for one request. Each request is said
again when its own answer is waited for, however many were lost together.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from party import refused
from party.again import SentForwards
from party.conversation import Conversation, Memory, Received, Tap
from party.turns import meanwhile, still_wanted
from splitfl.errors import RefusedError, ResourceError
from splitfl.link import TrunkRequest
from splitfl.wire import frames as wire
from splitfl.wire.codecs import Frame
from splitfl.wire.coding import Coded
from splitfl.wire.messages import (
    Backward,
    BackwardDone,
    Closed,
    Fetch,
    Forward,
    ForwardDone,
    Piece,
    Refused,
    Release,
    TensorName,
    kind,
)
from splitfl.wire.pieces import Part
from splitfl.wire.session import Turn

__all__ = ["LARGEST_BATCH_TOKENS", "Memory", "Session", "Tap"]

Pieces: TypeAlias = dict[int, tuple[Piece, torch.Tensor]]
"""Step of a fetch to what answered it."""

FETCHES_AT_ONCE = 4  # on a long road the next part is asked for before the last one has come; see MAX_FETCHES
LARGEST_BATCH_TOKENS = 65_536  # B x T; what the party takes from an owner in one message is sized by it


_LOOK_UP_S = 1.0  # how often a long wait looks whether anybody still wants its answer

Came: TypeAlias = dict[TensorName, torch.Tensor] | Refused
"""What a request has brought."""


@dataclass
class _Asked:
    """A request under way."""

    message: Forward | Backward
    frames: list[Frame]
    opening: int
    """Which opening of the session it was said in: an owner of a later one has never heard it."""
    links: int
    """How often the link had come up by then: what was under way on an earlier one may be lost."""
    came: Came | None = None


class Session(Conversation):
    """A `splitfl.link.TrunkLink` over the network. For the arguments see `party.conversation.Conversation`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._steps = 0
        self._lock = threading.RLock()
        self._to_release: deque[tuple[tuple[int, ...], tuple[int, ...]]] = deque()
        self._sent = SentForwards()
        self._filled_again = (-1, -1)
        self._under_way: dict[tuple[str, int], _Asked] = {}

    def forward(self, request: TrunkRequest) -> tuple[torch.Tensor, int]:
        """See `splitfl.link.TrunkLink`.

        Raises:
            ResourceError: the batch is beyond the session's limits; nothing was sent.
            RefusedError, UnreachableError, WireError: as their names say.
        """
        with self._lock:
            self._listen()
            self._flush_releases()
            self._check_size(request)
            self._steps += 1
            step = self._steps
            message = Forward(
                session=self.terms.session,
                step=step,
                keep=request.keep,
                cache=request.cache,
                past=request.past,
                rows=request.rows,
            )
            tensors: dict[TensorName, torch.Tensor | Coded] = {"hidden": request.hidden}
            if request.mask is not None:
                tensors["mask"] = request.mask
            if request.positions is not None:
                tensors["positions"] = request.positions
            asked = self._ask(message, tensors)
            self._sent.note(message, asked.frames)
        if request.overlap:
            self._let_others(asked)
        return self._answer(asked)["hidden"], step

    def backward(self, step: int, gradient: torch.Tensor | Coded) -> torch.Tensor:
        """See `splitfl.link.TrunkLink`."""
        with self._lock:
            self._listen()
            message = Backward(session=self.terms.session, step=step)
            self._hold_again(step)
            asked = self._ask(message, {"gradient": gradient})
        self._let_others(asked)
        result = self._answer(asked)["gradient"]
        self._sent.drop(steps=(step,))
        return result

    def release(self, *, caches: tuple[int, ...] = (), steps: tuple[int, ...] = ()) -> None:
        """See `splitfl.link.TrunkLink`. Goes out with the next request: garbage collection may call this anywhere."""
        self._to_release.append((caches, steps))

    def fetch(self, parts: Iterable[Part]) -> Iterator[tuple[Piece, torch.Tensor]]:
        """The answer to each of `parts` and its bytes, uint8 [N], in their order; a few are on their way at a time.

        Raises:
            RefusedError, UnreachableError, WireError: as their names say.
        """
        self._listen()
        left, asked, came = iter(parts), dict[int, list[Frame]](), Pieces()
        while True:
            for file, offset, length in itertools.islice(left, FETCHES_AT_ONCE - len(asked)):
                self._steps += 1
                message = Fetch(session=self.terms.session, step=self._steps, file=file, offset=offset, length=length)
                asked[self._steps] = self._send(message, {})
            if not asked:
                return
            first = next(iter(asked))
            self._await_piece(first, asked, came)
            del asked[first]
            yield came.pop(first)

    # ---- sending

    def _check_size(self, request: TrunkRequest) -> None:
        assert self.welcome is not None  # noqa: S101  `open` came first
        rows, new, _ = request.hidden.shape
        total = rows * (request.past + new)
        limit = min(self.welcome.max_tokens, LARGEST_BATCH_TOKENS)
        if total > limit or request.past + new > self.welcome.max_length:
            raise ResourceError(
                f"A batch of {rows} rows x {request.past + new} positions is beyond what the owner allows.",
                expected=f"at most {limit} rows x positions, and {self.welcome.max_length} positions",
                hint="lower the batch size or --max-length, or ask the owner for a larger --max-tokens",
            )

    def _flush_releases(self) -> None:
        caches: list[int] = []
        steps: list[int] = []
        while self._to_release:
            more_caches, more_steps = self._to_release.popleft()
            caches += more_caches
            steps += more_steps
        self._sent.drop(caches=tuple(caches), steps=tuple(steps))
        if caches or steps:
            self._send(Release(session=self.terms.session, caches=tuple(caches), steps=tuple(steps)), {})

    # ---- waiting

    def _ask(self, message: Forward | Backward, tensors: dict[TensorName, torch.Tensor | Coded]) -> _Asked:
        """Send a request, whose answer `_answer` waits for."""
        return self._note(message, self._send(message, tensors))

    def _note(self, message: Forward | Backward, frames: list[Frame]) -> _Asked:
        asked = _Asked(message, frames, self.openings, self.socket.links)
        self._under_way[kind(message), message.step] = asked
        return asked

    def _let_others(self, asked: _Asked) -> None:
        """Other micro-batches have their turn, if there are any, while this request is under way."""
        try:
            meanwhile()
        except BaseException:
            self._forget(asked)
            raise

    def _forget(self, asked: _Asked) -> None:
        self._under_way.pop((kind(asked.message), asked.message.step), None)

    def _answer(self, asked: _Asked) -> dict[TensorName, torch.Tensor]:
        """The tensors of the answer, whatever it takes within the time allowed."""
        try:
            with self._lock:
                return self._await(asked)
        finally:
            self._forget(asked)

    def _say_and_await(self, message: Forward, frames: list[Frame]) -> None:
        """Repeat a forward, for what it leaves at the owner."""
        self._say(frames)
        self._answer(self._note(message, frames))

    def _await(self, asked: _Asked) -> dict[TensorName, torch.Tensor]:
        deadline = time.monotonic() + self.timeout_s
        resend_at = self._resend_at(deadline)
        while True:
            still_wanted()
            if isinstance(asked.came, dict):
                return asked.came
            if asked.came is not None:
                said, asked.came = asked.came, None
                self._recover(said, asked, deadline)
            elif asked.opening != self.openings:
                self._say_again(asked)
            now = time.monotonic()
            if now >= resend_at or self.socket.links > asked.links:
                self._put(asked.frames)
                resend_at, asked.links = now + self.resend_after_s, self.socket.links
            got = self._receive(min(deadline, resend_at, now + _LOOK_UP_S))
            if got is not None:
                self._take(got, asked, deadline)
            if asked.came is None and time.monotonic() >= deadline:
                # An owner that talks of other things all the time is as good as silent.
                raise refused.silence(self.socket.address, kind(asked.message), self.timeout_s)

    def _await_piece(self, first: int, asked: dict[int, list[Frame]], came: Pieces) -> None:
        """Receive into `came` what was `asked`, until step `first` is there."""
        deadline = time.monotonic() + self.timeout_s
        resend_at = self._resend_at(deadline)
        while first not in came:
            links = self.socket.links
            got = self._receive(min(deadline, resend_at))
            again = got is not None and self._take_piece(got, asked, came, deadline)
            now = time.monotonic()
            if first not in came and now >= deadline:
                raise refused.silence(self.socket.address, "fetch", self.timeout_s)
            if again or (got is None and (now >= resend_at or self.socket.links > links)):
                resend_at = now + self.resend_after_s
                for frames in (frames for step, frames in asked.items() if step not in came):
                    self.talk.send(wire.open_header(frames, sender="party"))
                    self._put(frames)

    def _take_piece(self, got: Received, asked: dict[int, list[Frame]], came: Pieces, deadline: float) -> bool:
        """Note what came; whether everything has to be asked for again."""
        answer, frames, _ = got
        if isinstance(answer, Closed):
            self._come_back(deadline)
        elif isinstance(answer, Refused):
            self._make_peace(answer, deadline)
        elif isinstance(answer, Piece) and answer.step in asked:
            came[answer.step] = answer, wire.tensors_of(answer, frames)["piece"]
        return isinstance(answer, Refused | Closed)

    def _take(self, got: Received, asked: _Asked, deadline: float) -> None:
        """Keep an answer for the request that it belongs to, or do what a message of another kind calls for."""
        message = got[0]
        if isinstance(message, Closed):
            self._come_back(deadline)
        elif isinstance(message, Refused) and message.step is None:
            self._recover(message, asked, deadline)
        else:
            self._keep(got)

    def _keep(self, got: Received) -> None:
        """Keep an answer, or a refusal that names its step, until its turn."""
        message, frames, turn = got
        step = getattr(message, "step", None)
        if isinstance(message, Refused):
            found = self._under_way.get(("forward", step or 0)) or self._under_way.get(("backward", step or 0))
            if found is not None and not isinstance(found.came, dict):
                found.came = message
        elif turn is Turn.NEW and isinstance(message, ForwardDone | BackwardDone):
            found = self._under_way.get((kind(message).removesuffix("_done"), message.step))
            if found is not None:
                found.came = wire.tensors_of(message, frames)

    def _listen(self) -> None:
        """Hear what the owner has said since the last answer: that it stops, that the key is revoked, or answers."""
        while (got := self._receive(0.0)) is not None:
            if isinstance(got[0], Closed):
                self._come_back(time.monotonic() + self.timeout_s)
            elif isinstance(got[0], Refused) and got[0].code == "revoked":
                raise refused.as_error(got[0])
            elif isinstance(got[0], Refused) and got[0].step is None and self._under_way:
                self._make_peace(got[0], time.monotonic() + self.timeout_s)
            else:
                self._keep(got)

    # ---- when the owner has lost something, or goes

    def _start_over(self, deadline: float) -> None:
        self._asked_before = self._steps
        super()._start_over(deadline)

    def _recover(self, said: Refused, asked: _Asked, deadline: float) -> None:
        """Do what a refusal allows to be done about it, or raise it."""
        message = asked.message
        if said.code == "unknown_cache":
            lost = (
                isinstance(message, Forward)
                and message.past > 0
                and (self.openings, message.step) != self._filled_again
            )
        else:
            lost = said.code == "unknown_step" and isinstance(message, Backward)
        if lost or self._make_peace(said, deadline):
            self._say_again(asked)
        else:
            self._say(asked.frames)

    def _say_again(self, asked: _Asked) -> None:
        """Repeat a request, and before it whatever the owner needs to be able to answer it."""
        message = asked.message
        if isinstance(message, Backward):
            self._hold_again(message.step)
        elif message.past:
            self._fill_again(message)
        self._say(asked.frames)
        asked.opening, asked.links = self.openings, self.socket.links

    def _fill_again(self, message: Forward) -> None:
        """Fill the cache that `message` goes on from: all that went into it, again."""
        filled = self._sent.before(message)
        if message.past and not filled:
            raise RefusedError(
                "The owner no longer holds the cache of this generation, and what filled it is not at hand any more.",
                code="unknown_cache",
                hint="generate again",
            )
        for frames in filled:
            earlier = wire.open_header(frames, sender="party")
            assert isinstance(earlier, Forward)  # noqa: S101
            self._say_and_await(earlier, frames)
        self._filled_again = (self.openings, message.step)

    def _hold_again(self, step: int) -> None:
        """Make the owner hold `step` for its backward if it does not: send the forward's bytes again."""
        if step in self.talk.kept_steps():
            return
        forward = self._sent.kept(step)
        if forward is None:
            raise RefusedError(
                f"The owner no longer holds step {step}, and its forward is not at hand any more.",
                code="unknown_step",
                hint="go backward through a batch once, or start again with --resume",
            )
        message = wire.open_header(forward, sender="party")
        assert isinstance(message, Forward)  # noqa: S101
        self._say_and_await(message, forward)
