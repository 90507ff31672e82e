"""Step 8 of the journey: the owner's loop. Receive, check, schedule, reply; one party's trouble stays its own.

One asyncio thread owns the sockets and all session state. Each request becomes a task that waits for its worker, so a
slow request delays nobody's admission. Checks come in the order of docs/wire.md: the sender's key, the session found
under it, frame sizes, the state table and the protocol's disclosure, then the budget.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, cast

import splitfl
from model_owner import refusals
from model_owner.admission import Admission, ServerLimits, check_offer, make_room, new_session
from model_owner.answer import Answerer
from model_owner.batching import Batcher
from model_owner.handout import Handout
from model_owner.memory import GREED
from model_owner.observer import Ended, NoObserver, Observer
from model_owner.quotas import Charge, Quotas
from model_owner.refusals import Refusal
from model_owner.scheduler import Scheduler
from model_owner.service import Service, positions_of, tokens_of
from model_owner.sessions import HeldSession, SessionTable
from splitfl.cut import Plan
from splitfl.wire import frames as wire
from splitfl.wire.channel import Envelope, OwnerSocket
from splitfl.wire.codecs import Frame, dtype_name, nbytes
from splitfl.wire.messages import (
    LONGEST_PAUSE_S,
    Backward,
    Bye,
    Closed,
    Fetch,
    Forward,
    FromParty,
    Hello,
    Refused,
    Release,
    Welcome,
    kind,
)
from splitfl.wire.session import Turn

log = logging.getLogger("splitfl.owner")

Request: TypeAlias = Forward | Backward | Fetch

_HOUSEKEEPING_S = 0.5
_DRAIN_S = 30.0
_LINES = 20  # in the log, of what parties bring about, each time the house is kept


@dataclass
class Counters:
    """What happened so far; logged when the server stops."""

    sessions: int = 0
    forwards: int = 0
    backwards: int = 0
    tokens: int = 0
    pieces: int = 0
    piece_bytes: int = 0
    refusals: dict[str, int] = field(default_factory=dict)


class Server:
    """Serves one trunk on one socket until `stop` is called."""

    def __init__(
        self, socket: OwnerSocket, plan: Plan, answerer: Answerer, scheduler: Scheduler, admission: Admission,
        limits: ServerLimits, handout: Handout | None = None, observer: Observer | None = None,
        quotas: Quotas | None = None, batcher: Batcher | None = None,
    ) -> None:  # fmt: skip
        self.socket, self.plan, self.answerer, self.scheduler = socket, plan, answerer, scheduler
        self.admission, self.limits, self.handout = admission, limits, handout
        self.observer: Observer = observer or NoObserver()
        self.quotas, self.batcher = quotas or Quotas(), batcher
        self.table = SessionTable(limits.lease_s)
        self.counters = Counters()
        self.draining = False
        self.waiting_bytes = 0
        self._lines = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._greeting_limits = wire.Limits(width=plan.width, max_tokens=1, max_length=1, wire_dtype="float32")

    async def run(self) -> None:
        """Serve until cancelled; then finish what is under way, say goodbye and return. A second time: do not wait."""
        upkeep = [asyncio.create_task(self._receive()), asyncio.create_task(self._keep_house())]
        try:
            try:
                ended, _ = await asyncio.wait(upkeep, return_when=asyncio.FIRST_COMPLETED)
                for task in ended:  # neither ends by itself
                    task.result()
            except asyncio.CancelledError:
                await self._drain()
        finally:
            for task in upkeep:
                task.cancel()
            await asyncio.gather(*upkeep, return_exceptions=True)

    def reload_admission(self) -> None:
        """Read the allow-list and the quotas again, and end the sessions of keys that are no longer on the list."""
        self.admission.reload()
        self.quotas.reload()
        self._end_revoked()

    # ---- one message

    async def _receive(self) -> None:
        while True:
            envelope = await self.socket.receive()
            if envelope is not None:
                self._take(envelope)

    def _take(self, envelope: Envelope) -> None:
        """Check one message and start its task; whatever is wrong with it is answered, never raised."""
        number = 0
        try:
            message = wire.open_header(envelope.frames, sender="party")
            number = message.session
            party = self.admission.allowed(envelope.sender.encode())
            if party is None:
                raise refusals.revoked()
            if isinstance(message, Hello):
                self._greet(envelope, message, party)
            else:
                self._dispatch(envelope, cast("FromParty", message))
        except wire.Violation as violation:
            self._refuse([envelope.route], number, violation)
        except Exception:
            log.exception("a request could not be handled")
            self._refuse([envelope.route], number, refusals.internal())

    def _greet(self, envelope: Envelope, message: Hello, party: str) -> None:
        wire.check_frames(message, envelope.frames, self._greeting_limits)
        held = self.table.find((envelope.sender, message.session))
        is_new = held is None
        if held is None:
            if self.draining:
                raise refusals.draining()
            held = self._open(envelope, message, party)
        held.talk.receive(message)
        held.heard(envelope.route)
        welcome = Welcome(
            session=message.session,
            version=message.version,
            max_tokens=self.limits.max_tokens,
            max_length=self.limits.max_length,
            memory="recompute" if held.recompute else "keep",
            lease_s=self.limits.lease_s,
            server=splitfl.__version__,
            compute=dtype_name(self.answerer.trunk.dtype),
        )
        held.talk.send(welcome)
        self.table.add(held)
        self._send([envelope.route], wire.encode(welcome, {}))
        if is_new:
            self.counters.sessions += 1
            self.observer.session_opened(held.facts)
            terms = party, message.protocol, message.wire_dtype
            self._note("session open: party %s, protocol %s, %s", *terms, session=held.name)

    def _open(self, envelope: Envelope, message: Hello, party: str) -> HeldSession:
        """A session for a first hello, not yet entered in the table; a forgotten one may have to give way to it."""
        check_offer(message, self.plan)
        self.quotas.check_session(party)
        forgotten = make_room(self.table, envelope.sender, self.limits, self.quotas.of(party).max_sessions)
        if forgotten is not None:
            self._note("a silent session of %s gives way to its next one", forgotten.party, session=forgotten.name)
            self._end(forgotten, "gave way")
        share = self.table.share(envelope.sender, self.answerer.budget)
        return new_session(message, party, envelope, self.limits, self.plan.width, share)

    def _dispatch(self, envelope: Envelope, message: FromParty) -> None:
        held = self.table.find((envelope.sender, message.session))
        if held is None:
            raise Refusal("No such session is open for this key.", code="unknown_session", hint="say hello first")
        try:
            wire.check_frames(message, envelope.frames, held.limits)
            turn = held.talk.receive(message)
        except wire.Violation as violation:
            # The party waits for this very step: the refusal names it.
            self._refuse([envelope.route], message.session, violation, step=getattr(message, "step", None))
            return
        held.heard(envelope.route)
        match message:
            case Forward() | Backward() | Fetch():
                self._start(held, message, envelope, turn)
            case Release():
                for step in message.steps:
                    held.drop_step(step)
                for number in message.caches:
                    held.drop_cache(number)
            case Bye():
                self._say_closed(held)
                told = held.party, held.served_tokens, held.handed_out
                self._note("session closed: party %s, %d tokens served, %d bytes handed out", *told, session=held.name)

    def _start(self, held: HeldSession, message: Request, envelope: Envelope, turn: Turn) -> None:
        request = (kind(message), message.step)
        if turn is Turn.RETRY and request in held.under_way:
            held.under_way[request] = time.monotonic()
            return  # its answer is on the way, and goes to the route heard last
        if turn is Turn.RETRY and request in held.replies:
            self._send([envelope.route], held.replies[request])
            return
        size = message.length if isinstance(message, Fetch) else sum(map(nbytes, envelope.frames))
        try:
            if self.draining:
                raise refusals.draining()
            self._check_room(held, size)
            charge = self.quotas.admit(held.party, tokens_of(message), size)
        except wire.Violation as problem:
            self._refuse([envelope.route], message.session, problem, step=message.step, held=held)
            return
        held.under_way[request] = time.monotonic()
        self.waiting_bytes += size
        task = asyncio.create_task(self._serve(held, message, envelope, charge))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _check_room(self, held: HeldSession, size: int) -> None:
        """Whether a request of `size` bytes may wait: a party that has nothing under way always may.

        As with memory, what a party has waiting is at most `GREED` times what it leaves free.
        """
        own, free = self.quotas.bytes_in_flight(held.party), self.limits.max_waiting_bytes - self.waiting_bytes - size
        if own and own + size > GREED * max(free, 0):
            raise refusals.too_much_waits()

    async def _serve(self, held: HeldSession, message: Request, envelope: Envelope, charge: Charge) -> None:
        """Schedule one request and answer it; if its session has ended meanwhile, nobody is told."""
        request = (kind(message), message.step)
        started = time.monotonic()
        try:
            match message:
                case Forward():
                    frames = (await self._service().forward(held, message, envelope.frames)).frames
                    self.counters.forwards += 1
                    self.counters.tokens += positions_of(message)
                case Backward():
                    frames = (await self._service().backward(held, message, envelope.frames)).frames
                    self.counters.backwards += 1
                case Fetch():
                    frames = await self._fetch(held, message)
            if self._is_open(held):
                await self.quotas.settle(charge)
            if self._is_open(held):
                held.talk.send(wire.open_header(frames, sender="owner"))
                if not isinstance(message, Fetch):  # a file can be read again
                    held.remember(request, frames)
                self._send(held.routes, frames)
                self.observer.request_served(held.told(message, charge.size, frames, time.monotonic() - started))
        except wire.Violation as violation:
            if self._is_open(held):
                self._refuse(held.routes, held.key[1], violation, step=message.step, held=held)
        except Exception:
            log.exception("a %s could not be served", kind(message), extra={"session": held.name})
            if self._is_open(held):
                self._refuse(held.routes, held.key[1], refusals.internal(), step=message.step, held=held)
        finally:
            self.waiting_bytes -= charge.size
            self.quotas.cancel(charge)
            held.under_way.pop(request, None)
            held.last_heard = time.monotonic()  # the lease begins when there is something to hold
            if not self._is_open(held):
                self._end(held)  # once more, for what the request has left behind

    def _service(self) -> Service:
        return Service(
            answerer=self.answerer,
            scheduler=self.scheduler,
            quotas=self.quotas,
            is_open=self._is_open,
            deadline_s=self.limits.deadline_s,
            batcher=self.batcher,
        )

    async def _fetch(self, held: HeldSession, message: Fetch) -> list[Frame]:
        if self.handout is None:
            raise refusals.nothing_to_fetch()
        piece, content = await self.handout.read(message)
        held.handed_out += content.numel()
        self.counters.pieces += 1
        self.counters.piece_bytes += content.numel()
        return wire.encode(piece, {"piece": content})

    # ---- replies

    def _send(self, routes: Sequence[bytes], frames: list[Frame]) -> None:
        if not any(self.socket.send(route, frames) for route in reversed(routes)):
            log.debug("a reply found no peer; it is kept until the party asks again")

    def _refuse(
        self, routes: Sequence[bytes], number: int, violation: wire.Violation, *, step: int | None = None,
        held: HeldSession | None = None,
    ) -> None:  # fmt: skip
        self.counters.refusals[violation.code] = self.counters.refusals.get(violation.code, 0) + 1
        self.observer.refused(violation.code, held.name if held else None)
        self._note("refused: %s (%s)", violation.code, violation.problem, session=held.name if held else None)
        refused = Refused(
            session=number,
            code=violation.code,
            problem=violation.problem,
            expected=violation.expected,
            hint=violation.hint,
            step=step,
            retry_after_s=_pause(violation),
        )
        if held is not None:
            with contextlib.suppress(wire.Violation):
                held.talk.send(refused)
        self._send(routes, wire.encode(refused, {}))

    def _say_closed(self, held: HeldSession, why: Ended = "closed") -> None:
        closed = Closed(session=held.key[1])
        with contextlib.suppress(wire.Violation):
            held.talk.send(closed)
        self._send(held.routes, wire.encode(closed, {}))
        self._end(held, why)

    def _is_open(self, held: HeldSession) -> bool:
        return self.table.find(held.key) is held

    def _end(self, held: HeldSession, why: Ended = "closed") -> None:
        """Forget a session and give back what it holds."""
        if self._is_open(held):
            self.observer.session_ended(held.facts, why, time.monotonic() - held.opened)
        self.table.remove(held)

    def _note(self, text: str, *facts: object, session: str | None = None) -> None:
        """Log what a party brought about, but not more lines than anybody would read."""
        self._lines += 1
        level = logging.INFO if self._lines <= _LINES else logging.DEBUG
        log.log(level, text, *facts, extra={"session": session})

    # ---- upkeep

    async def _keep_house(self) -> None:
        while True:
            await asyncio.sleep(_HOUSEKEEPING_S)
            if self._lines > _LINES:
                log.info("%d more lines were left out", self._lines - _LINES)
            self._lines = 0
            try:
                self._end_revoked()
                self._end_expired()
            except Exception:  # upkeep must go on, or nobody could be revoked any more
                log.exception("a round of upkeep failed")

    def _end_revoked(self) -> None:
        for held in self.table:
            if self.admission.allowed(held.key[0].encode()) is None:
                log.info("session of %s ended: its key was revoked", held.party, extra={"session": held.name})
                self._refuse(held.routes, held.key[1], refusals.revoked())
                self._end(held, "revoked")

    def _end_expired(self) -> None:
        """No goodbye: a party that comes back is told that its session is unknown, and opens it again by itself."""
        for held in self.table.expired():
            told = held.party, self.limits.lease_s
            self._note("session of %s expired after %.0f s of silence", *told, session=held.name)
            self._end(held, "expired")
        lease = self.limits.cache_lease_s
        for held in self.table:
            if lease is not None and (dropped := held.drop_idle_caches(lease)):
                self._note("%d idle caches of %s were dropped", dropped, held.party, session=held.name)

    async def _drain(self) -> None:
        """Finish what is under way, then close every session. Messages are read all the time, to say no to them."""
        self.draining = True
        waiting = [task for task in self._tasks if not task.done()]
        if waiting:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait(waiting, timeout=_DRAIN_S)
        for held in self.table:
            self._say_closed(held, "stopped")
        c = self.counters
        log.info("stopped: %d sessions, %d forwards, %d backwards, %d tokens, %d bytes handed out", c.sessions,
                 c.forwards, c.backwards, c.tokens, c.piece_bytes)  # fmt: skip


def _pause(violation: wire.Violation) -> float | None:
    pause = violation.retry_after_s if isinstance(violation, Refusal) else None
    return None if pause is None else min(pause, LONGEST_PAUSE_S)
