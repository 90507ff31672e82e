"""One attempt of a round at a party: each stage of the sum as the coordinator asks for it, up to the result.

The secrets of an attempt live in its `Sealer` and end with it. What a stage hands over is made once, and goes out again
as it is if the link was lost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from party.round_files import Note, from_bytes
from splitfl.aggregation.sums import Opened, Sealer
from splitfl.errors import PeerError, RefusedError, UnreachableError, WireError
from splitfl.rounds.sizes import part_bytes, update_bytes
from splitfl.wire.round_frames import pack_parts, unpack_names, unpack_parts
from splitfl.wire.round_messages import GetItem, PutItem, Task

if TYPE_CHECKING:
    from party.rounds import RoundClient

_OVER = ("late", "not_in_round", "unknown_item", "unknown_session")
"""Refusals after which this party is out of the attempt, and nothing else is wrong."""
_SIGNATURE_BYTES = 1 << 12


class IsOver(Exception):
    """The attempt has ended, or goes on without this party."""


class Attempt:
    """One attempt.

    Args:
        client: the link, the facts and the limits.
        task: the first stage that this party was asked for.
        sealer: of this attempt; None to send the saved bytes as they are.
        saved: this party's update of the round.
    """

    def __init__(self, client: RoundClient, task: Task, sealer: Sealer | None, saved: tuple[Note, bytes]) -> None:
        self.client, self.task, self.sealer = client, task, sealer
        self.note, self.update = saved
        self._adverts: dict[str, bytes] = {}
        self._shares: dict[str, bytes] = {}
        self._survivors: tuple[str, ...] = ()

    def run(self) -> bytes:
        """Every stage; the result.

        Raises:
            IsOver: the attempt has ended before there was one, or goes on without this party.
            RefusedError, WireError, UnreachableError: as their names say.
        """
        task = self.task
        while task.task not in ("settle", "propose"):
            try:
                self.client.link.put(task.round, task.attempt, cast("PutItem", task.task), self._blob(task))
            except RefusedError as error:
                raise over(error) from error
            task = self.client.wait_in(task)
        self.task = task
        try:
            return self._get("result", 2 * self._update_limit() if self.sealer is not None else self.client.max_state)
        except RefusedError as error:
            raise over(error) from error

    def open(self, result: bytes) -> Opened:
        """The mean in `result`.

        Raises:
            IsOver: it is none; the coordinator was told so.
        """
        assert self.sealer is not None  # noqa: S101  `run` was called with one
        try:
            return self.sealer.open(result)
        except PeerError as error:
            raise self._give_up(self.task, error) from error

    # ---- stages

    def _blob(self, task: Task) -> bytes:
        """What this party hands over in this stage."""
        if self.sealer is None:
            return self.update
        try:
            return self._made(task, self.sealer)
        except (RefusedError, UnreachableError):
            raise
        except PeerError as error:  # a signature, a share or a set of survivors is not sound
            raise self._give_up(task, error) from error

    def _made(self, task: Task, sealer: Sealer) -> bytes:
        """What `sealer` makes of this stage, and of what the coordinator shows for it."""
        match task.task:
            case "advertise":
                return sealer.advertise()
            case "share":
                self._adverts = self._parts("adverts", part_bytes(self.client.facts.sum))
                return pack_parts(sealer.share(self._adverts))
            case "submit":
                if "advertise" in sealer.stages:
                    self._adverts = self._parts("adverts", part_bytes(self.client.facts.sum))
                if "share" in sealer.stages:
                    self._shares = self._parts("shares", part_bytes(self.client.facts.sum))
                return sealer.submit(from_bytes(self.update), self.note.weight, self._adverts, self._shares)
            case "agree":
                return sealer.agree(self._learnt_survivors())
            case "reveal":
                agreements = self._parts("agreements", _SIGNATURE_BYTES) if "agree" in sealer.stages else {}
                return sealer.reveal(self._learnt_survivors(), agreements)
        raise WireError(f"The coordinator asks for {task.task!r} in the middle of a sum.")

    def _learnt_survivors(self) -> tuple[str, ...]:
        """Whose updates are in the sum; fetched once, so that a party never signs two sets."""
        if not self._survivors:
            blob = self._get("survivors", 64 * len(self.task.parties) + 64)
            names = unpack_names(blob)
            if not set(names) <= set(self.task.parties):
                raise WireError("The coordinator names survivors that are not in the round.")
            self._survivors = names
        return self._survivors

    def _parts(self, item: GetItem, largest: int) -> dict[str, bytes]:
        parts = unpack_parts(self._get(item, len(self.task.parties) * (largest + 64) + 64), largest=largest)
        if not set(parts) <= set(self.task.parties):
            raise WireError(f"The coordinator's {item} are of parties that are not in the round.")
        return parts

    def _get(self, item: GetItem, largest: int) -> bytes:
        return self.client.link.get(self.task.round, self.task.attempt, item, largest=largest)

    def _update_limit(self) -> int:
        return update_bytes(self.client.facts.sum, self.client.terms(self.task).length)

    def _give_up(self, task: Task, error: PeerError) -> IsOver:
        """This party will not go on with what came from the others; it says so and waits for the next attempt."""
        self.client.sit_out(task, error.problem)
        return IsOver(error.problem)


def over(error: RefusedError) -> Exception:
    """A refusal as the end of this attempt, or as the error that it is."""
    return IsOver(error.problem) if error.code in _OVER else error
