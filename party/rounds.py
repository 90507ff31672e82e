"""A party's side of a federation: round after round, train, hand an update over, open the result, report.

    with RoundClient(socket, facts, work_dir, sealer_factory=...) as rounds:
        for task in rounds:
            start = task.state                       # bytes that a party made of an earlier round; None at the first
            vector = task.saved_vector               # an update of this round that is sent again, or None
            if vector is None:
                vector = train(start)
            opened = task.submit(vector, weight)     # None: the round goes on, or ends, without this party
            if opened is not None:
                task.finish(next_state(start, opened), personal=..., common=..., rows=...)
    rounds.outcome                                   # which round was best, and its state

Every party computes the next state from the same result, so all of them report the same digest; a round in which most
do not is dropped by the coordinator. A party that was killed and is started again with the same folder sends the same
update; if its way of summing had secrets, these are gone with its process, and it comes back at the next attempt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from party.round_files import RoundFiles, from_bytes, to_bytes
from party.round_link import RoundLink
from party.round_stages import Attempt, IsOver, over
from splitfl.aggregation.sums import Opened, RoundTerms, Sealer, Vector
from splitfl.errors import RefusedError, SplitflError, UsageError, WireError, printable
from splitfl.wire.channel import PartySocket
from splitfl.wire.round_messages import Ask, Entered, Facts, Finished, Got, Leave, Ready, Report, Task

_REASON = 500
_WAIT_S = 10.0  # one question may wait so long for its answer, before it is asked again
SealerFactory = Callable[[RoundTerms], Sealer]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a federation ended, as the coordinator tells it."""

    rounds: int
    reason: str
    state: bytes | None
    """The last state; None if no round was kept."""
    best_round: int | None
    best_state: bytes | None
    """The state with the best validation score; None if nobody reported a score."""


class RoundClient:
    """Takes part in the rounds of one federation.

    Args:
        socket: not yet open; closed at the end.
        facts: what all parties must have in common.
        work_dir: keeps this round's update and the last state; the same one after a restart.
        sealer_factory: makes this party's side of a sum; None where only `RoundTask.exchange` is used.
        rows: training rows, for the coordinator's display.
        timeout_s: longest wait for an answer, a coordinator that is started again in between included.
        max_state: largest state that is fetched, in bytes.
    """

    def __init__(
        self, socket: PartySocket, facts: Facts, work_dir: Path, *, sealer_factory: SealerFactory | None = None,
        rows: int = 0, timeout_s: float = 120.0, max_state: int = 1 << 30,
    ) -> None:  # fmt: skip
        self.link = RoundLink(socket, facts, rows=rows, timeout_s=timeout_s)
        self.facts, self.files = facts, RoundFiles(work_dir)
        self.sealer_factory, self.max_state = sealer_factory, max_state
        self.entered: Entered | None = None
        self.outcome: Outcome | None = None
        self.kept_last = True
        """Whether the last round was kept, once the federation is finished."""

    def __enter__(self) -> Self:
        try:
            self.entered = self.link.open()
        except BaseException:
            self.link.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self.link.socket.connected and (kind is None or issubclass(kind, KeyboardInterrupt | SplitflError)):
                self.link.timeout_s = 2.0
                self.link.ask(Leave(session=0, request=0))
        except SplitflError:
            pass  # the coordinator finds out by its deadlines
        finally:
            self.link.close()

    def __iter__(self) -> Iterator[RoundTask]:
        """Each round that this party is to take part in; ends when the federation is finished."""
        while (task := self.wait()) is not None:
            if task.task == "store":  # an earlier process had reported this state
                self._store_again(task)
                continue
            round_task = RoundTask(self, task)
            if task.task != "train" and round_task.saved is None:
                self.sit_out(task, "it came back without its update")
                continue
            yield round_task

    def wait(self) -> Task | None:
        """The next thing to do, whenever it comes; None if the federation is finished."""
        while True:
            answer = self.look(_WAIT_S)
            if answer is None or answer.task != "wait":
                return answer

    def wait_in(self, attempt: Task) -> Task:
        """The next thing to do in this attempt.

        Raises:
            IsOver: there will be none.
        """
        while True:
            task = self.look(_WAIT_S)
            if task is None or (task.round, task.attempt) != (attempt.round, attempt.attempt):
                raise IsOver("The attempt has ended.")
            if task.task != "wait":
                return task

    def wait_for_round(self, attempt: Task) -> Task | None:
        """The next thing to do in this round, in whatever attempt; None if the round has ended."""
        while True:
            task = self.look(_WAIT_S)
            if task is None or task.round != attempt.round:
                return None
            if task.task != "wait":
                return task

    def look(self, wait_s: float) -> Task | None:
        """What there is to be done, perhaps nothing; None if the federation is finished."""
        try:
            answer, _ = self.link.ask(Ask(session=0, request=0, wait_s=wait_s), patience_s=wait_s)
        except RefusedError as error:
            if error.code == "unknown_session":  # the link has entered again
                return self.look(wait_s)
            raise
        if isinstance(answer, Finished):
            self.kept_last = answer.kept
            self.outcome = self.outcome or self._outcome(answer)
            return None
        if not isinstance(answer, Task):
            raise WireError("The coordinator did not say what is to be done.")
        return answer

    def sit_out(self, task: Task, why: str) -> None:
        """Tell the coordinator that this attempt goes on without this party."""
        self.link.ask(Leave(session=0, request=0, round=task.round, attempt=task.attempt, why=why[:_REASON]))

    def _store_again(self, task: Task) -> None:
        """Hand over the state that an earlier process of this party reported, if it lies in the folder."""
        state = self.files.last_state()
        try:
            if state is not None:
                self.link.put(task.round, task.attempt, "state", state)
                return
        except RefusedError as error:
            if error.code != "late":  # it is another state
                raise
        self.sit_out(task, "it came back without its state")

    def terms(self, task: Task) -> RoundTerms:
        """What the sum of this attempt is about."""
        assert self.entered is not None  # noqa: S101  inside the with block
        return RoundTerms(
            federation=self.entered.federation,
            round=task.round,
            attempt=task.attempt,
            parties=task.parties,
            length=self.facts.lengths[task.round % len(self.facts.lengths)],
            clip=self.entered.clip,
            max_weight=self.entered.max_weight,
            layout=self.facts.layout,
        )

    def fetch_state(self, digest: str) -> bytes:
        """A state of the federation, from this party's own folder if it is there."""
        blob = self.files.state(digest)
        if blob is None:
            blob = self.link.get(0, 0, "state", largest=self.max_state, digest=digest)
        return blob

    def _outcome(self, finished: Finished) -> Outcome:
        state = self.fetch_state(finished.state) if finished.state else None
        best = state if finished.best_state == finished.state else None
        if finished.best_state and best is None:
            best = self.fetch_state(finished.best_state)
        return Outcome(
            rounds=finished.rounds,
            reason=printable(finished.reason),
            state=state,
            best_round=finished.best_round,
            best_state=best,
        )


class RoundTask:
    """One round, for this party. Made by `RoundClient`."""

    def __init__(self, client: RoundClient, task: Task) -> None:
        self.client, self.task = client, task
        self.round = task.round
        self.kept, self.reason = task.kept, printable(task.reason)
        """Whether the round before this one was kept; if not, why."""
        assert client.entered is not None  # noqa: S101
        self.federation = client.entered.federation
        self.saved = client.files.saved(self.federation, task.round)
        """This party's update of this round, if it was made already."""
        self.result: bytes | None = None
        """What the coordinator made of the updates, once `submit` or `exchange` has returned it."""
        self._state: bytes | None = None

    @property
    def state(self) -> bytes | None:
        """What the round starts from: the bytes that a party handed to `finish`; None for the common start."""
        if self.task.state and self._state is None:
            self._state = self.client.fetch_state(self.task.state)
            self.client.files.save_state(self._state)
        return self._state

    @property
    def saved_vector(self) -> Vector | None:
        """The update of this round that will be sent, whatever `submit` is given; None if none was made yet."""
        return from_bytes(self.saved[1]) if self.saved is not None and self.saved[0].kind == "vector" else None

    def submit(self, vector: Vector, weight: float) -> Opened | None:
        """Hand the update over, walk through every stage, and open the sum; begin again as often as the coordinator.

        Args:
            vector: float32, of the length of this round. Ignored if an update of this round lies in the folder: what
                was announced once is what goes out.
            weight: of this party, above 0 and at most the federation's largest.

        Returns:
            The mean, or None if the round goes on or ends without this party.

        Raises:
            DataError: the vector has another length, or NaN or infinity; nothing was sent.
            UsageError: a weight out of range, or there is no sealer.
            PeerError: the coordinator, or what it sent, is not what it should be.
        """
        terms = self.client.terms(self.task)
        if self.client.sealer_factory is None:
            raise UsageError("An update cannot be sealed: this client was made without a sealer.")
        if not 0 < weight <= terms.max_weight:
            raise UsageError(f"A weight of {weight:g} was given.", expected=f"above 0 and at most {terms.max_weight:g}")
        if self.saved is None:
            blob = to_bytes(vector, terms.length)
            self.saved = self.client.files.save(self.federation, self.round, "vector", blob, weight)
        while True:
            try:
                return self._attempt()
            except IsOver:
                if not self._again():
                    return None

    def exchange(self, blob: bytes, weight: float = 1.0) -> bytes | None:
        """As `submit`, for rules that need every update in the clear: bytes out, the combined result's bytes back."""
        if self.saved is None:
            self.saved = self.client.files.save(self.federation, self.round, "bytes", blob, weight)
        while True:
            try:
                attempt = Attempt(self.client, self._announced(), None, self.saved)
                self.result, self.task = attempt.run(), attempt.task
                return self.result
            except IsOver:
                if not self._again():
                    return None

    def finish(
        self, state: bytes, *, personal: float | None = None, common: float | None = None, rows: int = 0,
        agrees: Callable[[bytes], bool] | None = None,
    ) -> bool:  # fmt: skip
        """Report how the round went, and hand the new state over if the coordinator asks this party for it.

        Args:
            state: what the next round would start from; the same bytes at every party.
            personal: score of this party's own model on its held-out rows, higher is better.
            common: the same of the model that all share.
            rows: held-out rows behind the scores.
            agrees: where another party proposes the next state: whether that one is as good as this party's own, which
                may differ in its last bits. Default: only the same bytes.

        Returns:
            Whether the round was kept.
        """
        try:
            state = self._agreed(state, agrees or state.__eq__)
            report = Report(
                session=0, request=0, round=self.round, attempt=self.task.attempt,
                state=self.client.files.save_state(state), personal=personal, common=common, rows=rows,
            )  # fmt: skip
            self.client.link.ask(report)
            return self._until_ended(state)
        except RefusedError as error:
            if not isinstance(over(error), IsOver):
                raise
            return False
        except IsOver:
            return False

    # ---- inside

    def _attempt(self) -> Opened:
        assert self.saved is not None  # noqa: S101  `submit` saved it
        assert self.client.sealer_factory is not None  # noqa: S101
        announced = self._announced()
        sealer = self.client.sealer_factory(self.client.terms(announced))
        attempt = Attempt(self.client, announced, sealer, self.saved)
        self.result = attempt.run()
        self.task = attempt.task
        return attempt.open(self.result)

    def _announced(self) -> Task:
        """Say that the update is ready, and wait until the sum begins."""
        if self.task.task == "train":
            try:
                answer, _ = self.client.link.ask(
                    Ready(session=0, request=0, round=self.round, attempt=self.task.attempt)
                )
            except RefusedError as error:
                raise over(error) from error
            if not isinstance(answer, Got):
                raise WireError("The coordinator did not take note of an update.")
        while True:
            task = self.client.wait_in(self.task)
            if task.task != "train":
                self.task = task
                return task

    def _again(self) -> bool:
        """Whether the coordinator begins this round again with this party."""
        task = self.client.wait_for_round(self.task)
        if task is None:
            return False
        self.task = task
        return True

    def _agreed(self, state: bytes, agrees: Callable[[bytes], bool]) -> bytes:
        """The state to report: the proposed one if it agrees with `state`, otherwise `state`."""
        if self.task.task == "propose":
            self.client.link.put(self.round, self.task.attempt, "state", state)
            self.task = self.client.wait_in(self.task)
        if not self.task.proposal:
            return state
        largest = self.client.max_state
        proposed = self.client.link.get(self.round, self.task.attempt, "proposal", largest=largest)
        return proposed if agrees(proposed) else state

    def _until_ended(self, state: bytes) -> bool:
        """Wait for the others' reports; hand the state over if asked."""
        while True:
            task = self.client.look(_WAIT_S)
            if task is None or task.round != self.round or task.attempt != self.task.attempt:
                return task.kept if task is not None else self.client.kept_last
            if task.task == "store":
                self.client.link.put(self.round, self.task.attempt, "state", state)
