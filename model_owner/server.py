"""Step 8 of the journey: the owner's loop. Receive, check, schedule, reply; one party's trouble stays its own.

One asyncio thread owns the sockets and all session state. Each request becomes a task that waits for its worker, so a
slow request delays nobody's admission. Checks come in the order of docs/wire.md: the sender's key, the session found
under it, frame sizes, the state table and the protocol's disclosure, then the budget.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from dataclasses import dataclass, field
from typing import Protocol, cast

import splitfl
from model_owner.answer import Answerer, Outcome, Refusal
from model_owner.scheduler import Scheduler
from model_owner.sessions import HeldSession, SessionTable
from protocols import PROTOCOLS
from splitfl.cut import Plan
from splitfl.errors import SplitflError, printable
from splitfl.wire import frames as wire
from splitfl.wire.channel import Envelope, OwnerSocket
from splitfl.wire.codecs import Frame
from splitfl.wire.messages import Backward, Bye, Closed, Forward, FromParty, Hello, Refused, Release, Welcome, kind
from splitfl.wire.session import OwnerSession, Terms, Turn

log = logging.getLogger("splitfl.owner")

_HOUSEKEEPING_S = 0.5


class Admission(Protocol):
    """Who may speak: the allow-list, or everyone on an insecure loopback channel."""

    def allowed(self, public_key: bytes) -> str | None:
        """The party's name, or None if this key is not admitted."""

    def reload(self) -> None:
        """Look at the list again."""


class Everyone:
    """Admission for an insecure loopback channel, where there are no keys."""

    def allowed(self, public_key: bytes) -> str | None:
        """Anybody, under one name."""
        return "loopback"

    def reload(self) -> None:
        """Nothing ever changes."""


@dataclass(frozen=True, kw_only=True)
class ServerLimits:
    """What the owner allows any session."""

    max_tokens: int
    max_length: int
    max_sessions: int
    lease_s: float
    recompute: bool


@dataclass
class Counters:
    """What happened so far; logged when the server stops."""

    sessions: int = 0
    forwards: int = 0
    backwards: int = 0
    tokens: int = 0
    refusals: dict[str, int] = field(default_factory=dict)


class Server:
    """Serves one trunk on one socket until `stop` is called."""

    def __init__(
        self, socket: OwnerSocket, plan: Plan, answerer: Answerer, scheduler: Scheduler, admission: Admission,
        limits: ServerLimits,
    ) -> None:  # fmt: skip
        self.socket, self.plan, self.answerer, self.scheduler = socket, plan, answerer, scheduler
        self.admission, self.limits = admission, limits
        self.table = SessionTable(limits.lease_s)
        self.counters = Counters()
        self._draining = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._greeting_limits = wire.Limits(width=plan.width, max_tokens=1, max_length=1, wire_dtype="float32")

    async def run(self) -> None:
        """Serve until `stop`; then finish what is under way, say goodbye and return."""
        housekeeping = asyncio.create_task(self._keep_house())
        try:
            while True:
                envelope = await self.socket.receive()
                if envelope is not None:
                    self._take(envelope)
        except asyncio.CancelledError:
            await self._drain()
        finally:
            housekeeping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await housekeeping

    def reload_admission(self) -> None:
        """Read the allow-list again and end the sessions of keys that are no longer on it."""
        self.admission.reload()
        for held in self.table:
            if self.admission.allowed(held.key[0].encode()) is None:
                log.info("session of %s ended: its key was revoked", held.party)
                self._refuse(held.route, held.key[1], _revoked())
                self.table.remove(held)

    # ---- one message

    def _take(self, envelope: Envelope) -> None:
        """Check one message and start its task; whatever is wrong with it is answered, never raised."""
        number = 0
        try:
            message = wire.open_header(envelope.frames, sender="party")
            number = message.session
            party = self.admission.allowed(envelope.sender.encode())
            if party is None:
                raise _revoked()
            if isinstance(message, Hello):
                self._greet(envelope, message, party)
            else:
                self._dispatch(envelope, cast("FromParty", message))
        except wire.Violation as violation:
            self._refuse(envelope.route, number, violation)
        except Exception:
            log.exception("a request could not be handled")
            self._refuse(envelope.route, number, _internal())

    def _greet(self, envelope: Envelope, message: Hello, party: str) -> None:
        wire.check_frames(message, envelope.frames, self._greeting_limits)
        held = self.table.find((envelope.sender, message.session)) or self._open(envelope, message, party)
        turn = held.talk.receive(message)
        self._heard(held, envelope)
        welcome = Welcome(
            session=message.session,
            version=message.version,
            max_tokens=self.limits.max_tokens,
            max_length=self.limits.max_length,
            memory="recompute" if held.recompute else "keep",
            lease_s=self.limits.lease_s,
            server=splitfl.__version__,
        )
        held.talk.send(welcome)
        self.table.add(held)
        self._send(envelope.route, wire.encode(welcome, {}))
        if turn is Turn.NEW:
            self.counters.sessions += 1
            log.info("session open: party %s, protocol %s, %s", party, message.protocol, message.wire_dtype)

    def _open(self, envelope: Envelope, message: Hello, party: str) -> HeldSession:
        """A session for a first hello, not yet entered in the table."""
        if self._draining:
            raise _draining()
        if message.protocol not in PROTOCOLS:
            raise Refusal(
                f"Protocol {printable(message.protocol, 40)!r} is not served here.",
                code="protocol",
                expected=", ".join(PROTOCOLS),
            )
        if (message.trunk, message.plan) != (self.plan.trunk, self.plan.digest):
            raise Refusal(
                f"The kit was cut from trunk {printable(message.trunk, 40)} with plan {printable(message.plan, 40)}.",
                code="plan",
                expected=f"trunk {self.plan.trunk} with plan {self.plan.digest}",
                hint="ask the owner for the kit that belongs to the model served here",
            )
        if len(self.table) >= self.limits.max_sessions:
            raise Refusal(
                f"{len(self.table)} sessions are open already.",
                code="busy",
                expected=f"at most {self.limits.max_sessions}",
                hint="try again later",
            )
        recompute = self.limits.recompute or message.memory == "recompute"
        terms = Terms(
            session=message.session,
            protocol=message.protocol,
            trunk=message.trunk,
            plan=message.plan,
            wire_dtype=message.wire_dtype,
            memory=message.memory,
        )
        return HeldSession(
            key=(envelope.sender, message.session),
            party=party,
            talk=OwnerSession(terms, PROTOCOLS[message.protocol].disclosure),
            limits=wire.Limits(
                width=self.plan.width,
                max_tokens=self.limits.max_tokens,
                max_length=self.limits.max_length,
                wire_dtype=message.wire_dtype,
            ),
            recompute=recompute,
            route=envelope.route,
            budget=self.answerer.budget,
        )

    def _dispatch(self, envelope: Envelope, message: FromParty) -> None:
        held = self.table.find((envelope.sender, message.session))
        if held is None:
            raise Refusal("No such session is open for this key.", code="unknown_session", hint="say hello first")
        try:
            wire.check_frames(message, envelope.frames, held.limits)
            turn = held.talk.receive(message)
        except wire.Violation as violation:
            # The party waits for this very step: the refusal names it.
            self._refuse(envelope.route, message.session, violation, step=getattr(message, "step", None))
            return
        self._heard(held, envelope)
        match message:
            case Forward() | Backward():
                self._start(held, message, envelope, turn)
            case Release():
                for step in message.steps:
                    held.drop_step(step)
                for number in message.caches:
                    held.drop_cache(number)
            case Bye():
                self._say_closed(held)
                log.info("session closed: party %s, %d tokens served", held.party, held.served_tokens)

    def _start(self, held: HeldSession, message: Forward | Backward, envelope: Envelope, turn: Turn) -> None:
        request = (kind(message), message.step)
        if turn is Turn.RETRY and request in held.under_way:
            return  # its answer is on the way, and goes to the route heard last
        if turn is Turn.RETRY and request in held.replies:
            self._send(envelope.route, held.replies[request])
            return
        held.under_way.add(request)
        task = asyncio.create_task(self._serve(held, message, envelope))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, held: HeldSession, message: Forward | Backward, envelope: Envelope) -> None:
        """Schedule one request and answer it."""
        request = (kind(message), message.step)
        try:
            if isinstance(message, Forward):
                outcome = await self._forward(held, message, envelope)
            else:
                outcome = await self._backward(held, message, envelope)
            reply = wire.open_header(outcome.frames, sender="owner")
            held.talk.send(reply)
            held.remember(request, outcome.frames)
            self._send(held.route, outcome.frames)
        except wire.Violation as violation:
            self._refuse(held.route, held.key[1], violation, step=message.step, held=held)
        except Exception:
            log.exception("a %s could not be served", kind(message))
            self._refuse(held.route, held.key[1], _internal(), step=message.step, held=held)
        finally:
            held.under_way.discard(request)

    async def _forward(self, held: HeldSession, message: Forward, envelope: Envelope) -> Outcome:
        if self._draining:
            raise _draining()
        tensors = wire.tensors_of(message, envelope.frames)
        tokens = tensors["hidden"].shape[0] * tensors["hidden"].shape[1]
        work = functools.partial(self.answerer.forward, held, message, tensors)
        async with held.cache_turn if message.cache is not None else contextlib.nullcontext():
            outcome = await self.scheduler.run(held.key, tokens, work)
        if outcome.kept is not None:
            if self.table.find(held.key) is held:
                held.keep(message.step, outcome.kept, outcome.reserved)
            else:  # closed meanwhile
                self.answerer.budget.give_back(outcome.reserved)
        held.served_tokens += tokens
        self.counters.forwards += 1
        self.counters.tokens += tokens
        return outcome

    async def _backward(self, held: HeldSession, message: Backward, envelope: Envelope) -> Outcome:
        if message.step not in held.kept:
            raise Refusal(
                f"Step {message.step} is not held here any more.",
                code="unknown_step",
                hint="send its forward again, then the backward",
            )
        kept, _ = held.kept[message.step]
        gradient = wire.tensors_of(message, envelope.frames)["gradient"]
        work = functools.partial(self.answerer.backward, held, message, kept, gradient)
        outcome = await self.scheduler.run(held.key, 2 * gradient.shape[0] * gradient.shape[1], work)
        held.drop_step(message.step)
        self.counters.backwards += 1
        return outcome

    # ---- replies

    def _heard(self, held: HeldSession, envelope: Envelope) -> None:
        held.last_heard = time.monotonic()
        held.route = envelope.route

    def _send(self, route: bytes, frames: list[Frame]) -> None:
        if not self.socket.send(route, frames):
            log.debug("a reply found no peer; it is kept until the party asks again")

    def _refuse(
        self, route: bytes, number: int, violation: wire.Violation, *, step: int | None = None,
        held: HeldSession | None = None,
    ) -> None:  # fmt: skip
        self.counters.refusals[violation.code] = self.counters.refusals.get(violation.code, 0) + 1
        log.info("refused: %s (%s)", violation.code, violation.problem)
        refused = Refused(
            session=number,
            code=violation.code,
            problem=violation.problem,
            expected=violation.expected,
            hint=violation.hint,
            step=step,
        )
        if held is not None:
            with contextlib.suppress(wire.Violation):
                held.talk.send(refused)
        self._send(route, wire.encode(refused, {}))

    def _say_closed(self, held: HeldSession) -> None:
        closed = Closed(session=held.key[1])
        with contextlib.suppress(wire.Violation):
            held.talk.send(closed)
        self._send(held.route, wire.encode(closed, {}))
        self.table.remove(held)
        self.scheduler.forget(held.key)

    # ---- upkeep

    async def _keep_house(self) -> None:
        while True:
            await asyncio.sleep(_HOUSEKEEPING_S)
            try:
                self.reload_admission()
                for held in self.table.expired():
                    log.info("session of %s expired after %.0f s of silence", held.party, self.limits.lease_s)
                    self._say_closed(held)
            except SplitflError as error:
                log.warning("%s", error)

    async def _drain(self) -> None:
        """Finish what is under way, then close every session."""
        self._draining = True
        waiting = [task for task in self._tasks if not task.done()]
        if waiting:
            await asyncio.wait(waiting, timeout=30)
        for held in self.table:
            self._say_closed(held)
        c = self.counters
        log.info("stopped: %d sessions, %d forwards, %d backwards, %d tokens", c.sessions, c.forwards, c.backwards,
                 c.tokens)  # fmt: skip


def _revoked() -> Refusal:
    return Refusal(
        "This key is not on the owner's allow-list.", code="revoked", hint="ask the owner to run `splitfl keys allow`"
    )


def _draining() -> Refusal:
    return Refusal(
        "The owner is shutting down.", code="draining", hint="start again with --resume once the owner is back"
    )


def _internal() -> Refusal:
    return Refusal("The owner met an error of its own.", code="internal", hint="ask the owner to look at its log")
