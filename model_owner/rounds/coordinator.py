"""The coordinator's loop: receive, check, let the engine decide, answer. One party's trouble stays its own.

Order of checks for each message: libzmq (the key is on the allow-list, no frame is longer than a piece); the header
and the piece's extent (`splitfl.wire.round_frames`); the key is still on the list; the session is entered under this
key; the round, attempt and stage (`splitfl.rounds.machine`); the announced size against what the round can have. Only
then is a byte kept, and only of a blob that this very party is to hand over now.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeAlias, TypeVar

from model_owner.rounds import answers
from model_owner.rounds.engine import Engine
from model_owner.rounds.room import Contact, Patience, Room
from model_owner.rounds.vault import Upload
from splitfl.errors import printable
from splitfl.rounds import events
from splitfl.rounds.records import Scores
from splitfl.wire import round_frames as wire
from splitfl.wire.channel import Envelope, OwnerSocket
from splitfl.wire.keys import AllowList
from splitfl.wire.round_frames import RoundViolation
from splitfl.wire.round_messages import (
    Ask,
    Enter,
    Entered,
    FromCoordinator,
    FromParty,
    Get,
    Got,
    Leave,
    Piece,
    Put,
    Ready,
    Refused,
    Report,
)

Work: TypeAlias = Callable[[], Coroutine[Any, Any, FromCoordinator]]
T = TypeVar("T")

log = logging.getLogger("splitfl.federation")

_TICK_S = 0.05
_MAX_WAITING = 32  # requests of one party that wait for their turn


class Coordinator:
    """Runs the rounds of one federation on one socket.

    Args:
        socket: started; closed by whoever started it.
        engine: decides.
        allow: who may take part.
        pinned: facts that every party must state, by name; the others are those of the first that enters.
        patience: the time limits.
        max_update: bytes of one update.
    """

    def __init__(
        self, socket: OwnerSocket, engine: Engine, allow: AllowList, *, pinned: Mapping[str, object],
        patience: Patience, max_update: int,
    ) -> None:  # fmt: skip
        self.socket, self.engine, self.allow = socket, engine, allow
        self.pinned, self.max_update = pinned, max_update
        self.room = Room(engine, allow, patience)
        self.refusals: dict[str, int] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._nudge = asyncio.Event()
        engine.listeners.append(self._news)

    async def run(self) -> None:
        """Until the federation is finished and its parties know it, or until cancelled; nothing is lost then.

        Raises:
            ResourceError: the disk or the database does not take what has to be kept.
        """
        upkeep = [asyncio.create_task(self._receive()), asyncio.create_task(self._keep_time())]
        try:
            ended, _ = await asyncio.wait([*upkeep, self._broken], return_when=asyncio.FIRST_COMPLETED)
            for each in ended:
                each.result()
        finally:
            open_tasks = [*upkeep, *self._tasks]
            for task in open_tasks:
                task.cancel()
            await asyncio.gather(*open_tasks, return_exceptions=True)
            self._broken.cancel()
            for contact in self.room.contacts.values():
                if contact.upload is not None:
                    contact.upload[1].drop()

    # ---- one message

    async def _receive(self) -> None:
        while True:
            envelope = await self.socket.receive()
            if envelope is not None:
                self._take(envelope)

    def _take(self, envelope: Envelope) -> None:
        """Check one message and answer it, or start what will."""
        session, request = 0, 0
        try:
            message, frame = wire.decode(envelope.frames, sender="party")
            assert not isinstance(message, FromCoordinator)  # noqa: S101  decoded as a party's
            session, request = message.session, message.request
            if self.allow.allowed(envelope.sender.encode()) is None:
                raise RoundViolation(
                    "This key is not on the allow-list.", code="revoked", hint="ask for: splitfl keys allow NAME.key"
                )
            contact = self.room.heard(envelope.sender)
            if not isinstance(message, Enter):
                self._check_session(envelope.sender, message)
            match message:
                case Ask():
                    self._ask(envelope, message, contact)
                case Get():
                    self._get(envelope, message)
                case Put():
                    self._put(envelope, message, frame, contact)
                case _:
                    self._start(envelope, message, contact, lambda: self._change(envelope.sender, message))
        except RoundViolation as violation:
            self._refuse(envelope.route, session, request, violation)

    def _check_session(self, party: str, message: FromParty) -> None:
        present = self.engine.standing.present.get(party)
        if present is None or present.session != message.session:
            raise RoundViolation("No such session is entered for this key.", code="unknown_session", hint="enter first")

    def _start(self, envelope: Envelope, message: FromParty, contact: Contact, work: Work) -> None:
        """Do what changes something as a task of its own: it may have to wait for its turn."""
        if contact.waiting >= _MAX_WAITING:
            raise RoundViolation("Too many requests of this party wait for their answer.", code="busy")
        contact.waiting += 1
        self._run(self._answer(envelope, message, contact, work))

    def _run(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _answer(self, envelope: Envelope, message: FromParty, contact: Contact, work: Work) -> None:
        try:
            self._send(envelope.route, await work())
        except RoundViolation as violation:
            self._refuse(envelope.route, message.session, message.request, violation)
        except Exception as error:  # what was to be kept could not be: go no further, so that nothing is lost
            if not self._broken.done():
                self._broken.set_exception(error)
        finally:
            contact.waiting -= 1

    # ---- what changes something

    async def _change(self, party: str, message: FromParty) -> FromCoordinator:
        session = message.session
        match message:
            case Enter():
                return await self._enter(party, message)
            case Ready():
                event: events.Event = events.IsReady(
                    party=party, session=session, round=message.round, attempt=message.attempt
                )
            case Report():
                event = events.Reports(
                    party=party, session=session, round=message.round, attempt=message.attempt,
                    scores=Scores(
                        state=message.state, personal=message.personal, common=message.common, rows=message.rows
                    ),
                )  # fmt: skip
            case Leave():
                now = (self.engine.standing.round, self.engine.standing.attempt)
                only_attempt = message.round is not None
                if only_attempt and (message.round, message.attempt) != now:
                    return Got(session=session, request=message.request, done=True)  # that one is over anyway
                event = events.Leaves(
                    party=party, session=session, why=printable(message.why, 120), only_attempt=only_attempt
                )
            case _:
                raise AssertionError("handled elsewhere")
        await self.engine.apply(event)
        return Got(session=session, request=message.request, done=True)

    async def _enter(self, party: str, message: Enter) -> Entered:
        facts = answers.check_facts(self.engine, message.facts, self.pinned, self.max_update)
        event = events.Enters(party=party, session=message.session, rows=message.rows)
        await self.engine.apply(event, facts=facts if self.engine.facts is None else None)
        return answers.entered(self.engine, message, len(self.allow.names()))

    # ---- blobs

    def _put(self, envelope: Envelope, message: Put, frame: wire.Frame, contact: Contact) -> None:
        """Take a piece; the last one is answered when the whole is on the disk."""
        session, request = message.session, message.request
        key = (message.session, message.round, message.attempt, message.item, message.total, message.digest)
        if key in contact.handing:  # a retry, while the first is being dealt with
            self._start(
                envelope, message, contact, functools.partial(self._await_handing, contact.handing[key], message)
            )
            return
        if self.engine.check_put(envelope.sender, message):
            self._send(envelope.route, Got(session=session, request=request, next=message.total, done=True))
            return
        if contact.upload is None or contact.upload[0] != key:
            if contact.upload is not None:
                contact.upload[1].drop()
            contact.upload = (key, self.engine.vault.upload())
        upload = contact.upload[1]
        if message.offset == upload.size and (len(frame) or not message.total):
            upload.write(frame)
            if upload.size == message.total:
                contact.upload = None
                self._complete(envelope, message, contact, key, upload)
                return
        self._send(envelope.route, Got(session=session, request=request, next=upload.size))

    def _complete(
        self, envelope: Envelope, message: Put, contact: Contact, key: tuple[object, ...], upload: Upload
    ) -> None:
        if upload.digest() != message.digest:
            upload.drop()
            raise RoundViolation("The bytes that came do not have the announced digest.", code="mismatch")
        done = self._run(self._hand(envelope.sender, message, upload))
        contact.handing[key] = done

        def forget(ended: asyncio.Task[None]) -> None:
            contact.handing.pop(key, None)
            if not ended.cancelled():
                ended.exception()  # whoever waits is told; nobody may, if the link is gone

        done.add_done_callback(forget)
        self._start(envelope, message, contact, functools.partial(self._await_handing, done, message))

    async def _hand(self, party: str, message: Put, upload: Upload) -> None:
        try:
            if message.item == "state":
                await self.engine.store_state(party, upload)
                return
            event = events.Hands(
                party=party, session=message.session, round=message.round, attempt=message.attempt,
                stage=message.item, digest=message.digest,
            )  # fmt: skip
            await self.engine.hand(event, upload)
        finally:
            upload.drop()  # does nothing to what was kept

    async def _await_handing(self, done: asyncio.Future[None], message: Put) -> Got:
        await asyncio.shield(done)
        return Got(session=message.session, request=message.request, next=message.total, done=True)

    def _get(self, envelope: Envelope, message: Get) -> None:
        digest = self.engine.find(envelope.sender, message)
        total = self.engine.vault.size(digest)
        if message.offset > total or (message.offset == total and total > 0):
            raise wire.malformed("A piece was asked for beyond the end of its blob", f"an offset below {total}")
        piece = self.engine.vault.piece(digest, message.offset, message.size)
        answer = Piece(
            session=message.session, request=message.request, offset=message.offset, total=total, digest=digest
        )
        self.socket.send(envelope.route, wire.encode(answer, piece))

    # ---- what is to be done

    def _ask(self, envelope: Envelope, message: Ask, contact: Contact) -> None:
        """Answer at once if there is something to do; otherwise when there is, or when the question's time is over."""
        contact.parked = (envelope.route, message, time.monotonic() + message.wait_s)
        if self.engine.standing.phase == "gathering":
            self._nudge.set()
        self._answer_parked(envelope.sender, contact)

    def _answer_parked(self, party: str, contact: Contact) -> None:
        if contact.parked is None:
            return
        route, question, until = contact.parked
        if self.engine.standing.phase == "finished":
            answer: FromCoordinator = answers.finished(self.engine, question)
        else:
            answer = answers.task(self.engine, party, question, self.room.seconds_left)
            if answer.task == "wait" and time.monotonic() < until:
                return
        contact.parked, contact.heard = None, time.monotonic()
        self._send(route, answer)

    # ---- time

    async def _keep_time(self) -> None:
        while True:
            self._news()
            phase = self.engine.standing.phase
            if phase == "finished":
                if self.room.everybody_knows() or self.room.seconds_left < 0:
                    return
            elif phase == "gathering":
                await self.engine.begin(self.room.who_begins)
            elif self.room.seconds_left < 0:
                await self.engine.deadline(self.room.is_over)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._nudge.wait(), _TICK_S)
            self._nudge.clear()

    def _news(self, *_: object) -> None:
        """Something may have changed: whoever waits for it hears of it now."""
        self.room.look()
        for party, contact in self.room.contacts.items():
            self._answer_parked(party, contact)

    # ---- answers

    def _send(self, route: bytes, answer: FromCoordinator) -> None:
        if not self.socket.send(route, wire.encode(answer)):
            log.debug("an answer found no peer; the party asks again")

    def _refuse(self, route: bytes, session: int, request: int, violation: RoundViolation) -> None:
        self.refusals[violation.code] = self.refusals.get(violation.code, 0) + 1
        log.debug("refused: %s (%s)", violation.code, violation.problem)
        refused = Refused(
            session=session, request=request, code=violation.code, problem=violation.problem,
            expected=violation.expected, hint=violation.hint,
        )  # fmt: skip
        self._send(route, refused)
