"""What keeps a party within the bound on its updates: so many sums, one federation, and each update made once.

A bound is worked out for a number of sums before the first of them, and booked in the ledger whole. What is kept in the
run directory (`bounded-updates.json`) says which federation it is for and which update left last; an update is noted
before anybody hears of it, and one of a sum that was noted is only ever sent again, never made again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from party.bookkeeping import DataSet
from party.offline import ADVERSARY
from party.opening import say
from party.round_files import Note, RoundFiles
from party.rounds import RoundClient
from party.rundir import RunDirectory
from splitfl.aggregation.encrypted import EncryptedSealer
from splitfl.aggregation.masks import MaskSealer
from splitfl.aggregation.noise import NoisePlan, space_of
from splitfl.aggregation.noiser import Noiser
from splitfl.aggregation.sums import Opened, RoundTerms, Sealer, Stage, Vector
from splitfl.config import TuneSettings
from splitfl.errors import DataError, UsageError, WireError
from splitfl.files import replace_text
from splitfl.privacy.calibration import gaussian_epsilon
from splitfl.privacy.ledger import Release

RECORD = "bounded-updates.json"
_COHORTS = (3, 10, 100)
_APART = (
    ", and not the coordinator, which together with any one party reads each update under that party's share of the "
    "noise alone"
)


class _Kept(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    terms: dict[str, Any]
    federation: str = ""
    last: int = -1


@dataclass(frozen=True, kw_only=True)
class Promise:
    """A bound on everything that a party hands over in one federation."""

    sums: int
    """How many it is for."""
    claim: str
    """In words, with all its parts."""
    release: Release
    """As it is booked: once, before the first update leaves."""
    terms: Mapping[str, Any]
    """What all updates must have in common for the bound to hold."""
    units: int | None = None
    """The weight of this party, where it may be told; None: all weigh the same, and no number of rows is told."""


class Keeper:
    """Holds a party to its `Promise`, over all processes that the run has.

    Args:
        run: its directory.
        promise: what is promised.
        resume: whether the run was begun before.

    Raises:
        UsageError: the run has handed over updates under another promise, or under none.
    """

    def __init__(self, run: RunDirectory, promise: Promise, *, resume: bool) -> None:
        self.path, self.promise = run.path / RECORD, promise
        self._kept = _Kept(terms=dict(promise.terms))
        before = _read(self.path)
        if before is None:
            if resume and (run.path / "federation" / "update.json").exists():
                raise UsageError(
                    "Updates of this run have left without the bound that is asked for now.",
                    hint="resume with the settings that it began with, or begin another run with --out",
                )
            return
        other = [name for name in self._kept.terms if before.terms.get(name) != self._kept.terms[name]]
        if other or before.terms.keys() != self._kept.terms.keys():
            raise UsageError(
                "The updates that this run has handed over were bounded otherwise: other are "
                f"{', '.join(other) or 'the options'}.",
                expected="the settings that the run began with",
                hint="resume with those, or begin another run with --out",
            )
        self._kept = before

    def enter(self, client: RoundClient) -> None:
        """Before the first round.

        Raises:
            UsageError: the federation has more sums than were promised, or is another one than before.
        """
        assert client.entered is not None  # noqa: S101  inside the with block
        entered = client.entered
        if entered.rounds > self.promise.sums:
            raise UsageError(
                f"The federation goes over {entered.rounds} sums, and the bound is for {self.promise.sums}.",
                expected="no more than were planned for; nothing has been sent",
                hint="raise --dp-rounds to the coordinator's --rounds in a new run; epsilon grows with it",
            )
        if self._kept.federation not in ("", entered.federation):
            raise UsageError(
                "This run's updates went to another federation, and the bound holds for one.",
                hint="begin another run with --out; the ledger adds the two",
            )
        self._kept.federation = entered.federation
        self._write()
        client.files = _NotedFiles(client.files.folder, self)

    def admit(self, number: int) -> None:
        """Before an update of sum `number` is made.

        Raises:
            UsageError: it is beyond the plan, or one of that sum or a later one has left already.
        """
        if number >= self.promise.sums:
            raise UsageError(
                f"The coordinator asks for sum {number + 1}, and the bound is for {self.promise.sums}.",
                hint="plan for more rounds in a new run; epsilon grows with them",
            )
        if number <= self._kept.last:
            raise UsageError(
                f"An update for sum {number + 1} has left this party already, or one for a later sum; another one "
                "would be a release that the bound does not hold for.",
                hint="the coordinator has gone back, or this run's files were removed: begin another run with --out",
            )

    def note(self, number: int) -> None:
        """The update of that sum lies on the disk and may leave; no other one will be made."""
        if number > self._kept.last:
            self._kept.last = number
            self._write()

    def weight(self, largest: float) -> float:
        """Of this party's updates."""
        return largest if self.promise.units is None else min(float(self.promise.units), largest)

    def _write(self) -> None:
        replace_text(self.path, msgspec.json.encode(self._kept).decode() + "\n")


def refuse_unbounded(run: RunDirectory) -> None:
    """A run that began with a bound does not go on without one.

    Raises:
        UsageError: this one would.
    """
    if (run.path / RECORD).exists():
        raise UsageError(
            "This run's updates were bounded so far, and what is asked for now has no bound.",
            hint="resume with the settings that it began with, or begin another run with --out",
        )


class _NotedFiles(RoundFiles):
    """Notes an update as soon as it is on the disk, so before it is announced."""

    def __init__(self, folder: Path, keeper: Keeper) -> None:
        super().__init__(folder)
        self._keeper = keeper

    def save(self, federation: str, round_: int, kind: str, blob: bytes, weight: float) -> tuple[Note, bytes]:
        saved = super().save(federation, round_, kind, blob, weight)
        self._keeper.note(round_)
        return saved


def _read(path: Path) -> _Kept | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Kept)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError as error:
        raise DataError(
            f"{path} is damaged: which updates have left is not known.", hint="begin another run with --out"
        ) from error


# ---- noise on the sum


def promise_of_sum(settings: TuneSettings, sums: int, data: DataSet, run: str) -> Promise:
    """The bound of `--sum-noise`: unit one party, so each of its rows as well.

    rho is that of the Gaussian mechanism, 1 / (2 multiplier^2) a sum.
    """
    multiplier, colluders = settings.sum_noise, settings.sum_colluders
    assert multiplier is not None  # noqa: S101  the settings saw to it
    assert settings.sum_delta is not None  # noqa: S101
    epsilon = _up(gaussian_epsilon(settings.sum_delta, sensitivity=1.0, sigma=multiplier, releases=sums))
    return Promise(
        sums=sums,
        claim=f"noise on the sums: epsilon {epsilon:g}; delta {settings.sum_delta:g}; unit: one party, with all its "
        f"rows; neighbours: replace one; adversary: whoever sees the sums, with up to {colluders} of the other "
        f"parties{_APART if space_of(settings.sum).shared_key else ''}; up to "
        f"{settings.sum_dropouts} dropouts a sum, sums with more are not opened; releases: {sums} "
        "sums, and every adapter made of them; not in it: scores on held-out rows",
        release=Release(
            release_id=f"sums:{run}", dataset=data.fingerprint, unit=data.unit, units=None, channel="adapter",
            mechanism=f"noise on the sum {multiplier:g} x, {sums} sums, up to {colluders} colluding",
            sensitivity=None, sigma=None, rho=sums / (2 * multiplier**2), adversary=ADVERSARY, run=run,
        ),
        terms={
            name: getattr(settings, name)
            for name in ("sum_noise", "sum_norm", "sum_delta", "sum_colluders", "sum_dropouts", "sum")
        } | {"sums": sums},
    )  # fmt: skip


def sum_preview(settings: TuneSettings, values: int) -> list[str]:
    """How long the noise on the mean is, next to the longest change by one party; and how many parties it takes.

    Args:
        settings: with `--sum-noise`.
        values: in one update.
    """
    assert settings.sum_noise is not None  # noqa: S101
    lost = settings.sum_colluders + settings.sum_dropouts
    ratios = {
        parties: 2 * settings.sum_noise * math.sqrt(values / (parties * (parties - lost)))
        for parties in _COHORTS
        if parties > lost
    }
    told = ", ".join(f"{ratio:.3g} times with {parties} parties" for parties, ratio in ratios.items())
    lines = [f"noise on the mean of {values:,} values, over the longest update of one party: {told}"]
    if ratios.get(10, math.inf) > 1:
        needed = math.ceil(2 * settings.sum_noise * math.sqrt(values)) + lost
        lines.append(
            f"with 10 parties or fewer such a mean is noise and teaches nothing; about {needed:,} parties would bring "
            "the noise down to one update's length. For few parties bound each row instead: --dp-epsilon"
        )
    return lines


class SumNoiser:
    """Makes this party's side of a noised sum.

    Args:
        settings: with `--sum-noise`.
        folder: keeps the noised update of the latest round.
        sums: of the whole federation.
    """

    def __init__(self, settings: TuneSettings, folder: Path, sums: int) -> None:
        self.settings, self.noiser, self.sums = settings, Noiser(folder), sums
        self._told = ""

    def sealed(self, made: Any, terms: RoundTerms, *arguments: Any, **options: Any) -> Sealer:
        """The sealer of one attempt.

        Args:
            made: `MaskSealer`, or one like it.
            terms: of the attempt.
            arguments: the others that it takes.
            options: as well.
        """
        plan = self.settings.sum_plan(terms, self.sums, self.settings.sum)
        assert plan is not None  # noqa: S101
        self._tell(plan)
        sealer = made(terms, *arguments, noise=plan, noiser=self.noiser, allow_two=True, **options)
        return (_SameNoise if "agree" in sealer.stages else _SameEncryptedNoise)(sealer)

    def _tell(self, plan: NoisePlan) -> None:
        claim = plan.claim()
        if claim != self._told:
            self._told = claim
            say(f"bound on the sums with {plan.parties} parties: {claim}")


class _SameNoise:
    """A sealer that sits an attempt out in which this round's update would need other noise.

    How much noise a party adds depends on how many parties there are. If that number changes between two attempts,
    noising again would be a second release of the update; the round is left to be dropped instead.
    """

    stages: ClassVar[tuple[Stage, ...]] = MaskSealer.stages

    def __init__(self, sealer: Sealer) -> None:
        self._sealer = sealer

    def advertise(self) -> bytes:
        return self._sealer.advertise()

    def share(self, adverts: Mapping[str, bytes]) -> Mapping[str, bytes]:
        return self._sealer.share(adverts)

    def submit(self, vector: Vector, weight: float, adverts: Mapping[str, bytes], shares: Mapping[str, bytes]) -> bytes:
        try:
            return self._sealer.submit(vector, weight, adverts, shares)
        except DataError as error:
            raise WireError(f"This party cannot be in the attempt: {error.problem}") from error

    def agree(self, survivors: Sequence[str]) -> bytes:
        return self._sealer.agree(survivors)

    def reveal(self, survivors: Sequence[str], agreements: Mapping[str, bytes]) -> bytes:
        return self._sealer.reveal(survivors, agreements)

    def open(self, result: bytes) -> Opened:
        return self._sealer.open(result)


class _SameEncryptedNoise(_SameNoise):
    """The same for sums that have fewer stages."""

    stages: ClassVar[tuple[Stage, ...]] = EncryptedSealer.stages


def _up(epsilon: float) -> float:
    return math.ceil(epsilon * 1000) / 1000
