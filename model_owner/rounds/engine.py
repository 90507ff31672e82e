"""The coordinator's rounds without the network: events in, standings on disk, blobs where parties can fetch them.

Order of everything that changes something: the pure step (may it happen, and what follows), then the blobs that the
new phase needs, then one transaction, and only then anybody hears of it. A process that is killed anywhere in between
begins again from the last transaction; the running sum is made again from the updates that it names.

Memory: one running sum and one update, which is read from its file when it is complete.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias, TypeVar

from msgspec.structs import replace

from model_owner.rounds.store import Cost, RoundStore
from model_owner.rounds.vault import Upload, Vault
from splitfl.aggregation.sums import STAGES, RoundTerms, Summer
from splitfl.errors import PeerError, SplitflError, printable
from splitfl.rounds import events, machine
from splitfl.rounds.records import Course, Standing
from splitfl.rounds.sizes import item_bytes, part_bytes
from splitfl.wire.round_frames import RoundViolation, pack_names, pack_parts, too_large, unpack_parts
from splitfl.wire.round_messages import Facts, Get, Put

SummerFactory: TypeAlias = Callable[[RoundTerms], Summer]
T = TypeVar("T")

log = logging.getLogger("splitfl.federation")


class Engine:
    """The rounds of one federation.

    Args:
        course: what the operator has chosen.
        store: where each standing is written.
        vault: where blobs lie.
        summer_factory: makes the coordinator's side of a sum for the terms of an attempt.
        clip: largest magnitude of one value.
        max_weight: largest weight of one party.
        max_state: bytes of a state.
        traffic: bytes received and sent so far.
    """

    def __init__(
        self, course: Course, store: RoundStore, vault: Vault, summer_factory: SummerFactory, *, clip: float,
        max_weight: float, max_state: int,
        traffic: Callable[[], tuple[int, int]],
    ) -> None:  # fmt: skip
        self.course, self.store, self.vault = course, store, vault
        self.standing, self.facts = store.standing(), store.facts()
        self.clip, self.max_weight, self.max_state = clip, max_weight, max_state
        self._factory, self._traffic = summer_factory, traffic
        self.listeners: list[Callable[[Standing, Standing], None]] = []
        """Called after each change with the standing before it and after it."""
        self._summer: Summer | None = None
        self._summed: tuple[int, int] | None = None
        self._lock = asyncio.Lock()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="rounds")
        self._round_began: tuple[float, int, int] | None = None
        vault.keep(self.standing.needed())

    def close(self) -> None:
        """End the worker, after what it is doing."""
        self._worker.shutdown(wait=True, cancel_futures=True)

    def terms(self, standing: Standing) -> RoundTerms:
        """Of the attempt under way in `standing`, once its parties are fixed."""
        assert self.facts is not None  # noqa: S101  somebody has entered
        lengths = self.facts.lengths
        return RoundTerms(
            federation=standing.federation,
            round=standing.round,
            attempt=standing.attempt,
            parties=standing.parties,
            length=lengths[standing.round % len(lengths)],
            clip=self.clip,
            max_weight=self.max_weight,
            layout=self.facts.layout,
        )

    # ---- events

    async def apply(self, event: events.Event, *, facts: Facts | None = None) -> None:
        """Let `event` happen; when this returns it is on the disk.

        Raises:
            RoundViolation: it may not happen now.
        """
        async with self._lock:
            await self._commit(machine.step(self.course, self.standing, event), facts)

    async def hand(self, event: events.Hands, upload: Upload) -> None:
        """A party's blob of a stage is complete: check it, add it to the sum if it is an update, and keep it.

        Raises:
            RoundViolation: it may not come now, or it is not what this stage takes.
        """
        async with self._lock:
            after = machine.step(self.course, self.standing, event)
            if after is self.standing:
                upload.drop()
                return
            await self._on_worker(lambda: self.vault.take(upload))
            await self._check(event)
            await self._commit(after, None)

    async def store_state(self, party: str, upload: Upload) -> None:
        """A state has come from the party that was asked for it.

        Raises:
            RoundViolation: nobody asks for it any more.
        """
        async with self._lock:
            standing = self.standing
            if not self._asks(party) or (standing.phase == "storing" and upload.digest() != standing.agreed):
                raise RoundViolation("Nobody asks for this state any more.", code="late")
            digest = await self._on_worker(lambda: self.vault.take(upload))
            await self._commit(machine.step(self.course, self.standing, events.Stored(digest=digest)), None)

    async def begin(self, parties: Callable[[], Sequence[str]]) -> None:
        """Begin an attempt with whoever `parties` names once it is this event's turn; nothing if that is nobody."""
        async with self._lock:
            chosen = parties() if self.standing.phase == "gathering" else ()
            if chosen:
                event = events.Begins(parties=tuple(chosen))
                await self._commit(machine.step(self.course, self.standing, event), None)

    async def deadline(self, is_over: Callable[[], bool]) -> None:
        """The deadline of the phase has passed, if `is_over` still says so once it is this event's turn."""
        async with self._lock:
            if is_over() and self.standing.phase in machine.ALLOWED[events.Late]:
                await self._commit(machine.step(self.course, self.standing, events.Late()), None)

    # ---- what may come and go

    def check_put(self, party: str, message: Put) -> bool:
        """Whether this blob is acknowledged already; if not, whether it may come at all.

        Raises:
            RoundViolation: ``late``, ``not_in_round``, ``conflict`` or ``too_large``; nothing was kept of it.
        """
        standing = self.standing
        if message.item == "state":
            fits = standing.phase == "proposing" or message.digest == standing.agreed
            if not (fits and self._asks(party) and (message.round, message.attempt) == _place(standing)[:2]):
                if message.digest in (standing.state, standing.shown.get("proposal")):
                    return True
                raise RoundViolation("Nobody has asked this party for that state.", code="late")
        else:
            event = events.Hands(
                party=party, session=message.session, round=message.round, attempt=message.attempt,
                stage=message.item, digest=message.digest,
            )  # fmt: skip
            if machine.step(self.course, standing, event) is standing:
                return True
        assert self.facts is not None  # noqa: S101
        largest = item_bytes(
            self.facts.sum, message.item, length=self.terms(standing).length, parties=len(standing.parties),
            max_state=self.max_state,
        )  # fmt: skip
        if message.total > largest:
            raise too_large(f"{message.item!r} of {message.total} bytes was announced", f"at most {largest} bytes")
        return False

    def _asks(self, party: str) -> bool:
        """Whether a state is asked from this party now."""
        return self.standing.phase in ("proposing", "storing") and self.standing.asked[-1:] == (party,)

    def find(self, party: str, message: Get) -> str:
        """Digest of the blob that a party wants and may have.

        Raises:
            RoundViolation: ``unknown_item``, ``late`` or ``not_in_round``.
        """
        standing = self.standing
        if message.item == "state":
            known = {standing.state, standing.best.state if standing.best is not None else None}
            if message.digest not in known:
                raise RoundViolation("This state is not held here (any more).", code="unknown_item")
            return message.digest
        member = standing.members.get(party)
        if (message.round, message.attempt) != (standing.round, standing.attempt):
            raise RoundViolation(
                "This belongs to another round or attempt than the one under way.", code="late", hint="ask again"
            )
        if member is None or member.session != message.session or member.out:
            raise RoundViolation("This party is not in this attempt.", code="not_in_round", hint="wait for the next")
        name = f"shares/{party}" if message.item == "shares" else message.item
        if name not in standing.shown:
            raise RoundViolation(f"There is no item {message.item!r} in this phase.", code="unknown_item")
        return standing.shown[name]

    # ---- inside the lock

    async def _commit(self, after: Standing, facts: Facts | None) -> None:
        before = self.standing
        if after is before and facts is None:
            return
        if facts is not None:
            self.facts = facts
        after = await self._prepare(before, after)
        cost = self._cost(before, after)
        self.store.commit(after, facts=facts, cost=cost)
        self.standing = after
        if after.phase not in STAGES:
            self._summer, self._summed = None, None
        if _place(before)[:2] != _place(after)[:2] or after.phase == "finished":
            self.vault.keep(after.needed())
        for listener in self.listeners:
            listener(before, after)

    def _cost(self, before: Standing, after: Standing) -> Cost | None:
        """What the round took, if one has ended with this; counted from when its first attempt began here."""
        if self._round_began is None and after.phase != "gathering":
            self._round_began = (asyncio.get_running_loop().time(), *self._traffic())
        if before.last is after.last:
            return None
        if self._round_began is None:  # it was nearly over when this process began
            return Cost()
        began, came, went = self._round_began
        self._round_began = None
        came_now, went_now = self._traffic()
        seconds = asyncio.get_running_loop().time() - began
        return Cost(seconds=seconds, bytes_in=came_now - came, bytes_out=went_now - went)

    async def _prepare(self, before: Standing, after: Standing) -> Standing:
        """`after` with everything shown that its phase needs; further on at once where nobody has to be waited for."""
        while _place(before) != _place(after):
            before = after
            if after.phase in ("share", "submit", "agree", "reveal"):
                shown = {**after.shown, **await self._on_worker(functools.partial(self._to_show, after))}
                after = replace(after, shown=shown)
            elif after.phase == "summing":
                after = await self._sum(after)
        return after

    async def _sum(self, after: Standing) -> Standing:
        try:
            digest = await self._on_worker(lambda: self._finish(after))
        except SplitflError as error:
            return machine.step(self.course, after, events.Fails(reason=printable(error.problem)))
        except Exception as error:  # a rule's own code may fail in any way; the attempt ends, the federation does not
            log.exception("the sum could not be made")
            reason = f"the sum could not be made ({type(error).__name__})"
            return machine.step(self.course, after, events.Fails(reason=reason))
        return machine.step(self.course, after, events.Summed(digest=digest))

    def _finish(self, standing: Standing) -> str:
        reveals = {
            party: self.vault.read(member.items["reveal"])
            for party, member in standing.members.items()
            if "reveal" in member.items
        }
        return self.vault.put(self._ready_summer(standing).finish(reveals))

    async def _check(self, event: events.Hands) -> None:
        """The contents of a blob that has come, as far as the coordinator can see them."""
        if event.stage == "share":
            await self._on_worker(lambda: self._check_shares(event))
        if event.stage != "submit":
            return
        try:
            await self._on_worker(lambda: self._add(event))
        except PeerError as error:
            raise RoundViolation(error.problem, code="rejected", expected=error.expected, hint=error.hint) from None
        except Exception as error:  # whatever a peer's bytes bring about ends here; the sum is made again without them
            self._summer = None
            log.warning("an update could not be added: %s", type(error).__name__, exc_info=True)
            raise RoundViolation("The coordinator could not add this update.", code="internal") from None

    def _add(self, event: events.Hands) -> None:
        blob = self.vault.read(event.digest)
        self._ready_summer(self.standing).accept(event.party, blob)

    def _check_shares(self, event: events.Hands) -> None:
        assert self.facts is not None  # noqa: S101
        standing = self.standing
        others = [party for party in self._advertised(standing) if party != event.party]
        unpack_parts(self.vault.read(event.digest), names=others, largest=part_bytes(self.facts.sum))

    def _advertised(self, standing: Standing) -> Sequence[str]:
        """Whom shares are made for: those whose adverts are shown."""
        if "adverts" not in standing.shown:
            return standing.parties
        assert self.facts is not None  # noqa: S101
        return sorted(unpack_parts(self.vault.read(standing.shown["adverts"]), largest=part_bytes(self.facts.sum)))

    def _ready_summer(self, standing: Standing) -> Summer:
        """The running sum of this attempt; after a restart made again from the updates that were acknowledged."""
        place = (standing.round, standing.attempt)
        if self._summer is None or self._summed != place:
            summer = self._factory(self.terms(standing))
            for party in standing.survivors():
                summer.accept(party, self.vault.read(standing.members[party].items["submit"]))
            self._summer, self._summed = summer, place
        return self._summer

    def _to_show(self, standing: Standing) -> dict[str, str]:
        """What the parties may fetch in this phase, put where they can."""
        inside = standing.inside()
        if standing.phase in ("share", "submit"):
            shown = {}
            if "advertise" in self.course.stages:
                shown["adverts"] = self.vault.put(pack_parts(self._blobs(standing, "advertise", inside)))
            if standing.phase == "submit" and "share" in self.course.stages:
                shown |= self._shares(standing, inside)
            return shown
        shown = {"survivors": self.vault.put(pack_names(standing.survivors()))}
        if standing.phase == "reveal" and "agree" in self.course.stages:
            agreed = [party for party, member in standing.members.items() if "agree" in member.items]
            shown["agreements"] = self.vault.put(pack_parts(self._blobs(standing, "agree", agreed)))
        return shown

    def _shares(self, standing: Standing, inside: Sequence[str]) -> dict[str, str]:
        """For each party what the others have sealed for it. Read again for each one, so that only one is in memory."""
        assert self.facts is not None  # noqa: S101
        largest, shown = part_bytes(self.facts.sum), {}
        for party in inside:
            parts = {}
            for other in inside:
                if other != party:
                    blob = self.vault.read(standing.members[other].items["share"])
                    parts[other] = unpack_parts(blob, largest=largest)[party]
            shown[f"shares/{party}"] = self.vault.put(pack_parts(parts))
        return shown

    def _blobs(self, standing: Standing, stage: str, parties: Sequence[str]) -> dict[str, bytes]:
        return {party: self.vault.read(standing.members[party].items[stage]) for party in parties}

    def _on_worker(self, work: Callable[[], T]) -> Awaitable[T]:
        return asyncio.get_running_loop().run_in_executor(self._worker, work)


def _place(standing: Standing) -> tuple[int, int, str]:
    return standing.round, standing.attempt, standing.phase
