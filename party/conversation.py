"""The party's end of a session: frames out and in, hello, and hello again when the owner has gone or forgotten.

An owner that was killed answers `unknown_session` when it is back; one that is told to stop says `draining` or `closed`
first. Both are waited for, as long as an answer may take: a rolling restart ends no run.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Self, TypeAlias, cast

import torch

from party import refused
from splitfl.cut import Plan
from splitfl.errors import RefusedError, SplitflError
from splitfl.privacy.disclosure import Disclosure
from splitfl.wire import frames as wire
from splitfl.wire.channel import PartySocket
from splitfl.wire.codecs import Frame
from splitfl.wire.coding import Coded
from splitfl.wire.messages import (
    BackwardDone,
    Bye,
    Closed,
    CodingName,
    DtypeName,
    ForwardDone,
    FromOwner,
    FromParty,
    Refused,
    TensorName,
    Welcome,
    kind,
)
from splitfl.wire.session import PartySession, State, Terms, Turn

Memory: TypeAlias = Literal["keep", "recompute"]
Tap: TypeAlias = Callable[[str, Sequence[Frame]], None]
"""Sees every message that crosses: ``"sent"`` or ``"received"``, and its frames."""

Received: TypeAlias = tuple[FromOwner, Sequence[Frame], Turn]

log = logging.getLogger("splitfl.party")

_GOODBYE_S = 2.0
_PAUSE_S = 0.5  # before an owner without room, or on its way out, is asked again


class Conversation:
    """A session that opens, and opens again; what is said in it is another matter.

    What has no answer is said again when the link was lost and is up again, and after `resend_after_s` of silence (or
    half of the time there is): a message can be lost without its link, where a queue was full.

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

    resend_after_s = 60.0

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
        self.openings = 0
        """How often the session was opened again at an owner that had forgotten it."""
        self._asked_before = -1
        """Highest step that was asked for before the session was opened again."""

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
                self._say_goodbye(time.monotonic() + _GOODBYE_S)
        except SplitflError:
            pass  # the owner drops the session when its lease ends
        finally:
            self.socket.close()

    def _say_goodbye(self, deadline: float) -> None:
        """Twice if need be: a session whose goodbye was lost would keep one of the party's few places for a minute."""
        for until in (self._resend_at(deadline), deadline):
            self._send(Bye(session=self.terms.session), {}, timeout_s=_GOODBYE_S)
            while (got := self._receive(until)) is not None:  # answers to what is not waited for any more come before
                if isinstance(got[0], Closed | Refused):
                    return

    def __enter__(self) -> Self:
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

    # ---- sending and receiving

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

    def _say(self, frames: list[Frame]) -> None:
        self.talk.send(wire.open_header(frames, sender="party"))
        self._put(frames)

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
        if isinstance(message, ForwardDone | BackwardDone) and self._is_late(message):
            return message, frames, Turn.RETRY  # it will be asked for again
        turn = self.talk.receive(message)
        return cast("FromOwner", message), frames, turn

    def _is_late(self, message: ForwardDone | BackwardDone) -> bool:
        """Whether an answer is to what was asked before the session was opened again, and has not been repeated."""
        request = (kind(message).removesuffix("_done"), message.step)
        return message.step <= self._asked_before and request not in self.talk.open_requests()

    def _limits(self) -> wire.Limits:
        return wire.Limits(
            width=self.plan.width,
            max_tokens=self.welcome.max_tokens if self.welcome else 1,
            max_length=self.welcome.max_length if self.welcome else 1,
            wire_dtype=self.terms.wire_dtype,
            hidden_coding=self.terms.hidden_coding,
            gradient_coding=self.terms.gradient_coding,
        )

    # ---- hello, and hello again

    def _say_hello(self, deadline: float | None = None) -> Welcome:
        self._send(self.terms.hello(), {})
        deadline = time.monotonic() + min(self.timeout_s, 30.0) if deadline is None else deadline
        resend_at = self._resend_at(deadline)
        while True:
            links = self.socket.links
            got = self._receive(min(deadline, resend_at))
            if got is not None and isinstance(got[0], Welcome):
                self.welcome = got[0]
                return got[0]
            if got is not None and isinstance(got[0], Refused) and got[2] is Turn.NEW:
                raise refused.as_error(got[0])
            now = time.monotonic()
            if now >= deadline:
                raise refused.silence(self.socket.address, "hello", self.timeout_s)
            if got is None and (now >= resend_at or self.socket.links > links):
                self._send(self.terms.hello(), {})
                resend_at = now + self.resend_after_s

    def _resend_at(self, deadline: float) -> float:
        """When to say something again that has no answer by then."""
        now = time.monotonic()
        return now + min(self.resend_after_s, max(deadline - now, 0.0) / 2)

    def _make_peace(self, said: Refused, deadline: float) -> bool:
        """Wait, or open the session again, as the refusal calls for; whether the owner has forgotten everything.

        Raises:
            RefusedError: nothing can be done about it, or not in time.
        """
        if said.code == "unknown_session":  # the owner restarted, or the lease ran out
            self._start_over(deadline)
            return True
        if said.code == "draining":
            self._come_back(deadline)
            return True
        pause = _PAUSE_S if said.retry_after_s is None else said.retry_after_s
        if said.code != "busy" or time.monotonic() + pause >= deadline:
            raise refused.as_error(said)
        time.sleep(pause)
        return False

    def _come_back(self, deadline: float) -> None:
        """The owner stops: wait until it, or the one that takes its place, answers at the same address."""
        left = max(deadline - time.monotonic(), 0.0)
        log.warning("the owner stops; waiting up to %.0f s for it to come back", left)
        while True:
            time.sleep(_PAUSE_S)  # it may still be there, saying no to everybody
            try:
                return self._start_over(deadline)
            except RefusedError as error:
                if error.code not in ("draining", "busy") or time.monotonic() >= deadline:
                    raise

    def _start_over(self, deadline: float) -> None:
        """The same session again, at an owner that has forgotten it."""
        self.talk = PartySession(self.terms, self.disclosure)
        self.openings += 1
        self._say_hello(deadline)
