"""Steps 5 to 7 and their way back, at the party: a request becomes frames, goes out, and its answer comes in.

The calling thread does the talking: training and generation wait for the trunk anyway. What goes out once goes out the
same way again: after a lost link, a long silence or an owner that restarted, the very same bytes are sent, so nothing a
mechanism drew at random is ever drawn twice for one request.
"""

from __future__ import annotations

import itertools
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal, TypeAlias, cast

import torch

from party import refused
from splitfl.cut import Plan
from splitfl.errors import RefusedError, ResourceError, SplitflError
from splitfl.link import TrunkRequest
from splitfl.privacy.disclosure import Disclosure
from splitfl.wire import frames as wire
from splitfl.wire.channel import PartySocket
from splitfl.wire.codecs import Frame
from splitfl.wire.coding import Coded
from splitfl.wire.messages import (
    Backward,
    Bye,
    Closed,
    CodingName,
    DtypeName,
    Fetch,
    Forward,
    FromOwner,
    FromParty,
    Piece,
    Refused,
    Release,
    TensorName,
    Welcome,
    kind,
)
from splitfl.wire.pieces import Part
from splitfl.wire.session import PartySession, State, Terms, Turn

Memory: TypeAlias = Literal["keep", "recompute"]
Tap: TypeAlias = Callable[[str, Sequence[Frame]], None]
"""Sees every message that crosses: ``"sent"`` or ``"received"``, and its frames."""

Received: TypeAlias = tuple[FromOwner, Sequence[Frame], Turn]
Pieces: TypeAlias = dict[int, tuple[Piece, torch.Tensor]]
"""Step of a fetch to what answered it."""

_RESEND_AFTER_S = 60.0
_GOODBYE_S = 2.0
FETCHES_AT_ONCE = 4  # on a long road the next part is asked for before the last one has come; see MAX_FETCHES
LARGEST_BATCH_TOKENS = 65_536  # B x T; what the party takes from an owner in one message is sized by it


class Session:
    """A `splitfl.link.TrunkLink` over the network.

    Args:
        socket: opened by `open`, closed by `close`.
        plan: of the kit.
        disclosure: of the protocol; nothing else leaves.
        protocol: its name.
        wire_dtype: of hidden and gradient frames, both ways.
        memory: what the owner shall hold between forward and backward.
        hidden_coding: how the mechanism of this session codes hidden frames; ``raw`` without one.
        gradient_coding: the same for gradient frames.
        timeout_s: longest wait for one answer.
        tap: sees every frame; for recordings and tests.
    """

    def __init__(
        self, socket: PartySocket, plan: Plan, *, disclosure: Disclosure, protocol: str, wire_dtype: DtypeName,
        memory: Memory = "keep", hidden_coding: CodingName = "raw", gradient_coding: CodingName = "raw",
        timeout_s: float = 120.0, tap: Tap | None = None,
    ) -> None:  # fmt: skip
        self.socket, self.plan, self.timeout_s, self.tap = socket, plan, timeout_s, tap
        self.terms = Terms(
            session=secrets.randbits(62),
            protocol=protocol,
            trunk=plan.trunk,
            plan=plan.digest,
            wire_dtype=wire_dtype,
            memory=memory,
            hidden_coding=hidden_coding,
            gradient_coding=gradient_coding,
        )
        self.disclosure = disclosure
        self.talk = PartySession(self.terms, disclosure)
        self.welcome: Welcome | None = None
        self._steps = 0
        self._lock = threading.RLock()
        self._to_release: deque[tuple[tuple[int, ...], tuple[int, ...]]] = deque()
        self._sent_forwards: dict[int, list[Frame]] = {}

    # ---- opening and closing

    def open(self) -> Welcome:
        """Reach the owner and say hello.

        Raises:
            UnreachableError: nobody answers.
            RefusedError: the owner does not admit this key, this kit or this protocol.
        """
        self.socket.open(min(self.timeout_s, 30.0))
        return self._say_hello()

    def close(self) -> None:
        """Say goodbye if the link allows it, and close the socket."""
        try:
            if self.welcome is not None and self.socket.connected and self.talk.state is not State.CLOSED:
                self._send(Bye(session=self.terms.session), {}, timeout_s=_GOODBYE_S)
                self._receive(time.monotonic() + _GOODBYE_S)
        except SplitflError:
            pass  # the owner drops the session when its lease ends
        finally:
            self.socket.close()

    def __enter__(self) -> Session:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def bytes_sent(self) -> int:
        """Payload bytes sent so far, headers included."""
        return self.socket.bytes_sent

    @property
    def bytes_received(self) -> int:
        """Payload bytes received so far, headers included."""
        return self.socket.bytes_received

    # ---- the link

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
            frames = self._send(message, tensors)
            if request.keep:
                self._sent_forwards[step] = frames
            return self._await(message, frames)["hidden"], step

    def backward(self, step: int, gradient: torch.Tensor | Coded) -> torch.Tensor:
        """See `splitfl.link.TrunkLink`."""
        with self._lock:
            self._listen()
            message = Backward(session=self.terms.session, step=step)
            self._hold_again(step)
            frames = self._send(message, {"gradient": gradient})
            result = self._await(message, frames)["gradient"]
            self._sent_forwards.pop(step, None)
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
        for step in steps:
            self._sent_forwards.pop(step, None)
        if caches or steps:
            self._send(Release(session=self.terms.session, caches=tuple(caches), steps=tuple(steps)), {})

    def _send(
        self, message: FromParty, tensors: Mapping[TensorName, torch.Tensor | Coded], timeout_s: float | None = None
    ) -> list[Frame]:
        described = wire.describe(message, tensors, self.terms.wire_dtype)
        self.talk.send(described)
        frames = wire.encode(described, tensors, self.terms.wire_dtype)
        self._put(frames, timeout_s)
        return frames

    def _put(self, frames: list[Frame], timeout_s: float | None = None) -> None:
        if self.tap is not None:
            self.tap("sent", frames)
        self.socket.send(frames, timeout_s=self.timeout_s if timeout_s is None else timeout_s)

    # ---- waiting

    def _await(self, message: Forward | Backward, frames: list[Frame]) -> dict[TensorName, torch.Tensor]:
        """The tensors of the answer to `message`, whatever it takes within the time allowed."""
        deadline = time.monotonic() + self.timeout_s
        resend_at = time.monotonic() + _RESEND_AFTER_S
        while True:
            links = self.socket.links
            got = self._receive(min(deadline, resend_at))
            tensors = None if got is None else self._take(got, message, frames)
            if tensors is not None:
                return tensors
            now = time.monotonic()
            if now >= deadline:  # an owner that talks of other things all the time is as good as silent
                raise refused.silence(self.socket.address, kind(message), self.timeout_s)
            if got is None and (now >= resend_at or self.socket.links > links):
                self._put(frames)
                resend_at = now + _RESEND_AFTER_S

    def _await_piece(self, first: int, asked: dict[int, list[Frame]], came: Pieces) -> None:
        """Receive into `came` what was `asked`, until step `first` is there."""
        deadline = time.monotonic() + self.timeout_s
        resend_at = time.monotonic() + _RESEND_AFTER_S
        while first not in came:
            links = self.socket.links
            got = self._receive(min(deadline, resend_at))
            again = got is not None and self._take_piece(got, asked, came)
            now = time.monotonic()
            if first not in came and now >= deadline:
                raise refused.silence(self.socket.address, "fetch", self.timeout_s)
            if again or (got is None and (now >= resend_at or self.socket.links > links)):
                resend_at = now + _RESEND_AFTER_S
                for frames in (frames for step, frames in asked.items() if step not in came):
                    self.talk.send(wire.open_header(frames, sender="party"))
                    self._put(frames)

    def _take_piece(self, got: Received, asked: dict[int, list[Frame]], came: Pieces) -> bool:
        """Note what came; whether everything has to be asked for again."""
        answer, frames, _ = got
        if isinstance(answer, Closed):
            raise refused.closed()
        if isinstance(answer, Refused):
            if answer.code != "unknown_session":
                raise refused.as_error(answer)
            self._start_over()
        elif isinstance(answer, Piece) and answer.step in asked:
            came[answer.step] = answer, wire.tensors_of(answer, frames)["piece"]
        return isinstance(answer, Refused)

    def _take(
        self, got: Received, message: Forward | Backward, frames: list[Frame]
    ) -> dict[TensorName, torch.Tensor] | None:
        """The tensors, if what came is the answer to `message`; otherwise do what it calls for."""
        answer, answer_frames, turn = got
        if isinstance(answer, Refused):
            self._recover(answer, message, frames)
        elif isinstance(answer, Closed):
            raise refused.closed()
        elif turn is Turn.NEW and getattr(answer, "step", None) == message.step:
            return wire.tensors_of(answer, answer_frames)
        return None

    def _listen(self) -> None:
        """Hear what the owner said unasked since the last answer: that it stops, or that the key is revoked."""
        while (got := self._receive(0.0)) is not None:
            if isinstance(got[0], Closed):
                raise refused.closed()
            if isinstance(got[0], Refused) and got[0].code == "revoked":
                raise refused.as_error(got[0])

    def _receive(self, until: float) -> Received | None:
        """The next message of the owner, checked; None if none came in time."""
        frames = self.socket.receive(max(0.0, until - time.monotonic()))
        if frames is None:
            return None
        if self.tap is not None:
            self.tap("received", frames)
        message = wire.decode(frames, sender="owner", limits=self._limits())
        if isinstance(message, Refused) and message.session != self.terms.session:
            return message, frames, Turn.NEW  # our header did not even parse there
        if isinstance(message, Refused) and message.code == "unknown_session" and self.talk.state is State.GREETING:
            return message, frames, Turn.RETRY  # of what was sent before the hello; a hello is never refused so
        turn = self.talk.receive(message)
        return cast("FromOwner", message), frames, turn

    def _limits(self) -> wire.Limits:
        return wire.Limits(
            width=self.plan.width,
            max_tokens=self.welcome.max_tokens if self.welcome else 1,
            max_length=self.welcome.max_length if self.welcome else 1,
            wire_dtype=self.terms.wire_dtype,
            hidden_coding=self.terms.hidden_coding,
            gradient_coding=self.terms.gradient_coding,
        )

    def _recover(self, said: Refused, message: Forward | Backward, frames: list[Frame]) -> None:
        """Do what a refusal allows to be done about it, or raise it."""
        if said.code == "unknown_session":  # the owner restarted, or the lease ran out
            self._start_over()
        elif said.code != "unknown_step" or not isinstance(message, Backward):
            raise refused.as_error(said)
        if isinstance(message, Backward):
            self._hold_again(message.step)
        elif message.cache is not None and message.past:
            raise RefusedError(
                "The owner restarted or its lease ran out, and the cache of this generation is gone.",
                code="unknown_cache",
                hint="generate again",
            )
        self.talk.send(wire.open_header(frames, sender="party"))
        self._put(frames)

    def _start_over(self) -> None:
        """The same session again, at an owner that has forgotten it."""
        self.talk = PartySession(self.terms, self.disclosure)
        self._say_hello()

    def _hold_again(self, step: int) -> None:
        """Make the owner hold `step` for its backward if it does not: send the forward's bytes again."""
        if step in self.talk.kept_steps():
            return
        forward = self._sent_forwards.get(step)
        if forward is None:
            raise RefusedError(
                f"The owner no longer holds step {step}, and its forward is not at hand any more.",
                code="unknown_step",
                hint="go backward through a batch once, or start again with --resume",
            )
        message = wire.open_header(forward, sender="party")
        assert isinstance(message, Forward)  # noqa: S101
        self.talk.send(message)
        self._put(forward)
        self._await(message, forward)

    def _say_hello(self) -> Welcome:
        self._send(self.terms.hello(), {})
        deadline = time.monotonic() + min(self.timeout_s, 30.0)
        while True:
            links = self.socket.links
            got = self._receive(deadline)
            if got is not None and isinstance(got[0], Welcome):
                self.welcome = got[0]
                return got[0]
            if got is not None and isinstance(got[0], Refused) and got[2] is Turn.NEW:
                raise refused.as_error(got[0])
            if time.monotonic() >= deadline:
                raise refused.silence(self.socket.address, "hello", self.timeout_s)
            if got is None and self.socket.links > links:
                self._send(self.terms.hello(), {})
