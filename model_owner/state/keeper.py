"""One thread writes, in batches; whoever serves only adds to a sum in memory.

What is acknowledged:

- Sessions, usage and parties are on the disk at most `FLUSH_S` (and one write) after they happened. A kill loses no
  more than that, and never half of a batch.
- Tokens charged are on the disk once `secured` has returned. Mostly they are there before: a party's durable figure
  runs ahead by a reserve (`spending`). Where they are not, a write begins at once, and takes with it all that came
  meanwhile.

Held back: where nothing can be written, sums go on growing in memory (by party and day, not by request), and every
answer to a party with a budget is refused until it can.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from sqlalchemy import select

from model_owner.observer import Ended, Served, SessionFacts
from model_owner.state.database import Database
from model_owner.state.pending import Pending, Running
from model_owner.state.schema import CHARGES
from model_owner.state.spending import Spent
from model_owner.state.writing import begin_run, write
from splitfl.errors import ResourceError, SplitflError

log = logging.getLogger("splitfl.owner")

FLUSH_S = 1.0
"""Longest time that anything waits to be written."""
SECURE_S = 30.0
"""Longest time that an answer waits for its charge to be written."""
_BOOK_S = 60.0  # seconds of a session in which nothing happens are booked so often
_RETRY_S, _RETRY_MAX_S = 0.1, 5.0


class Keeper:
    """Keeps what the server tells (an `Observer`), and what parties have spent (an `Account`).

    Args:
        database: open for writing; closed with this.
        server: name of this owner among those that share the database.
        clock: seconds since 1970.

    Raises:
        ResourceError, DataError: the database cannot be used.
    """

    def __init__(self, database: Database, server: str = "owner", clock: Callable[[], float] = time.time) -> None:
        self.database, self.server = database, server
        self.failure: str | None = None
        """Why the last write failed; None while all is well."""
        self._clock, self._run = clock, secrets.token_hex(8)
        self._news = threading.Condition()
        self._pending, self._running = Pending(), dict[str, Running]()
        self._written, self._number = 0, 0
        self._urgent, self._closing, self._idle = False, False, False
        self._waiting: list[tuple[str, int, Future[None]]] = []
        with database.explained(), database.engine.begin() as db:
            begin_run(db, server, self._run)
            self._spent = {row.party: Spent(elsewhere=row.tokens) for row in db.execute(select(CHARGES))}
        self._thread = threading.Thread(target=self._work, name="state-writer", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write what is left, and close the database.

        Raises:
            ResourceError: it could not be written.
        """
        with self._news:
            for party, spent in self._spent.items():
                if rest := spent.rest():
                    self._pending.charge(party, rest)
            self._closing = True
            self._news.notify_all()
        self._thread.join()
        self.database.close()
        if self._pending:
            raise ResourceError(f"The last seconds could not be written to {self.database.place}: {self.failure}")

    # ---- what an observer is told

    def session_opened(self, facts: SessionFacts) -> None:
        """Keep a session."""
        with self._news:
            now = self._clock()
            self._running[facts.name] = Running(facts, now)
            self._pending.open(facts, self.server, now)
            self._wake()

    def session_ended(self, facts: SessionFacts, why: Ended, seconds: float) -> None:
        """Keep how it ended."""
        with self._news:
            running = self._running.pop(facts.name, None)
            if running is not None:
                now = self._clock()
                self._pending.book(running, now)
                self._pending.ended[facts.name] = now, why
                self._wake()

    def request_served(self, served: Served) -> None:
        """Add to the usage of its session and party."""
        with self._news:
            self._pending.serve(served, self._clock())
            self._wake()

    def refused(self, code: str, session: str | None) -> None:
        """Not kept."""

    def work_done(self, waited_s: float, took_s: float) -> None:
        """Not kept."""

    def batch_done(self, requests: int, rows: int, tokens: int) -> None:
        """Not kept."""

    # ---- budgets

    def spent_tokens(self, party: str) -> int:
        """Tokens charged so far. What other owners charged (their reserves with it) is known from the last write on."""
        with self._news:
            return self._spent[party].total if party in self._spent else 0

    def spent_of_all(self) -> dict[str, int]:
        """The same for every party that was ever charged."""
        with self._news:
            return {party: spent.total for party, spent in self._spent.items()}

    def charge(self, party: str, tokens: int) -> None:
        """Charge tokens; returns at once."""
        with self._news:
            more = self._spent.setdefault(party, Spent()).charge(tokens)
            if more:
                self._pending.charge(party, more)
                self._wake()

    async def secured(self, party: str) -> None:
        """Return once all that was charged to `party` is on the disk.

        Raises:
            Refusal: it is not, after `SECURE_S` seconds (code ``busy``).
        """
        with self._news:
            spent = self._spent.get(party)
            if spent is None:
                return
            if party in self._pending.charges:  # at once, so that the next ones need not wait
                self._urgent = True
                self._news.notify_all()
            if spent.here <= spent.written:
                return
            done: Future[None] = Future()
            self._waiting.append((party, spent.here, done))
        try:
            await asyncio.wait_for(asyncio.wrap_future(done), SECURE_S)
        except TimeoutError:
            from model_owner.refusals import Refusal  # and torch with it, which `splitfl usage` does without

            raise Refusal("The owner cannot write down what was used.", code="busy", hint="try again later") from None

    def flush(self, timeout_s: float = SECURE_S) -> None:
        """Wait until all that happened so far is on the disk. Not for the thread that serves.

        Raises:
            ResourceError: it is not, after `timeout_s` seconds.
        """
        with self._news:
            batch = self._number + 1 if self._pending else self._number
            self._urgent = True
            self._news.notify_all()
            if not self._news.wait_for(lambda: self._written >= batch, timeout_s):
                raise ResourceError(f"{self.database.place} cannot be written: {self.failure or 'it takes too long'}")

    def _wake(self) -> None:
        """Let the writer know that there is something; not for each request, when it knows already."""
        if self._idle:
            self._news.notify_all()

    # ---- the thread that writes

    def _work(self) -> None:
        last, pause = time.monotonic(), _RETRY_S
        while True:
            with self._news:
                self._wait(last + FLUSH_S)
                if not self._pending and self._closing:
                    return
                if not self._pending:
                    last = time.monotonic()
                    continue
                batch, self._pending = self._take(), Pending()
                self._number, self._urgent = self._number + 1, False
                number = self._number
            while not self._try(batch, number):
                with self._news:
                    if self._closing:
                        self._pending = batch  # for `close` to see
                        return
                    self._news.wait_for(lambda: self._closing, pause)
                pause = min(2 * pause, _RETRY_MAX_S)
            last, pause = time.monotonic(), _RETRY_S

    def _wait(self, until: float) -> None:
        """Until there is something to write and it is time to, or the end."""
        while not self._closing and not (self._pending and (self._urgent or time.monotonic() >= until)):
            self._idle = not self._pending
            self._news.wait(FLUSH_S if self._idle else max(until - time.monotonic(), 0))
            self._idle = False
            self._book_idle()

    def _book_idle(self) -> None:
        now = self._clock()
        for running in self._running.values():
            if now - running.booked >= _BOOK_S:
                self._pending.book(running, now)

    def _take(self) -> Pending:
        """The batch, with the seconds of the sessions in it."""
        batch, now = self._pending, self._clock()
        for name in batch.sums:
            running = self._running.get(name)
            if running is not None:
                batch.book(running, now)
        return batch

    def _try(self, batch: Pending, number: int) -> bool:
        try:
            with self.database.explained(), self.database.engine.begin() as db:
                totals = write(db, batch, number, self.server, self._run)
        except SplitflError as error:
            if self.failure is None:
                log.error("the state cannot be written: %s", error.problem)
            self.failure = error.problem
            return False
        except Exception as error:  # or nothing would ever be written again
            if self.failure is None:
                log.exception("the state cannot be written")
            self.failure = type(error).__name__
            return False
        if self.failure is not None:
            log.info("the state is written again")
        with self._news:
            self.failure, self._written = None, number
            for party, total in totals.items():  # others may have charged it too
                self._spent.setdefault(party, Spent()).confirm(batch.charges.get(party, 0), total)
            ready = [one for one in self._waiting if one[1] <= self._spent[one[0]].written]
            self._waiting = [one for one in self._waiting if one not in ready]
            self._news.notify_all()
        for _, _, done in ready:
            with contextlib.suppress(Exception):  # nobody waits for it any more
                done.set_result(None)
        return True
