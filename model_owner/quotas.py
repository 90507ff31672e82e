"""What each party may use of the owner: weight, rate, sessions, bytes under way, hours, and a budget of tokens in all.

They stand in a TOML file; a party that is not named has what ``[default]`` says, or no limits but the owner's own:

    [default]
    tokens_per_second = 2000
    [parties.hospital]
    weight = 2
    hours = ["22:00-06:00"]       # UTC; may go over midnight
    total_tokens = 5_000_000      # a budget of queries: what it learns of the trunk is bounded by it

A token is one position of one row, in one direction: a step that is kept for its backward is charged twice when its
forward is admitted, and its backward is never refused. A request that fails, or whose session ends before its answer
leaves, is not charged. An answer that is sent a second time is not charged a second time.

Rates are a token bucket that may go into debt (a request is admitted whenever the bucket holds anything, whatever its
own size), so a large batch is possible at any rate and the average holds. Where waiting helps the refusal is ``busy``
with the seconds to wait; where it does not, ``quota``.
"""

from __future__ import annotations

import logging
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec

from model_owner.observer import Account, PassingAccount
from model_owner.refusals import Refusal
from splitfl.errors import UsageError

log = logging.getLogger("splitfl.owner")

BURST_S = 2.0
"""What a bucket holds at most, in seconds of its rate."""
_DAY_S = 86_400
_SOON_S = 0.5  # until something that is under way may be done
FILE_NAME = "parties.toml"

_Window = Annotated[str, msgspec.Meta(pattern=r"^([01]\d|2[0-3]):[0-5]\d-(([01]\d|2[0-3]):[0-5]\d|24:00)$")]
_Positive = Annotated[float, msgspec.Meta(gt=0)]
_AtLeastOne = Annotated[int, msgspec.Meta(ge=1)]


class Quota(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one party may use; None is no limit."""

    weight: Annotated[float, msgspec.Meta(ge=0.001, le=1000)] = 1.0
    """Share of the workers, beside 1 for others."""
    tokens_per_second: _Positive | None = None
    max_sessions: _AtLeastOne | None = None
    max_bytes_in_flight: _AtLeastOne | None = None
    hours: tuple[_Window, ...] = ()
    """UTC windows in which it is served; none given is always."""
    total_tokens: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """Budget over all time, counted by the account."""

    def opens_in(self, now: float) -> float:
        """Seconds from `now` (Unix time) until it is served; 0 if it is."""
        if not self.hours:
            return 0.0
        moment = datetime.fromtimestamp(now, UTC)
        second = moment.hour * 3600 + moment.minute * 60 + moment.second + moment.microsecond / 1e6
        waits = []
        for window in self.hours:
            start, end = (_seconds(text) for text in window.split("-"))
            inside = start <= second < end if start < end else second >= start or second < end
            waits.append(0.0 if inside else (start - second) % _DAY_S)
        return min(waits)


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    default: Quota = Quota()
    parties: dict[str, Quota] = {}


@dataclass
class _Used:
    """What one party has of the owner at this moment."""

    level: float
    """Of its bucket, in tokens; below 0 it is in debt."""
    at: float
    """When the level was that, on the monotonic clock."""
    reserved: int = 0
    """Tokens of requests that are admitted and not yet charged."""
    bytes: int = 0
    requests: int = 0


@dataclass
class Charge:
    """A request that was admitted: to be settled once, by `Quotas.settle` or `Quotas.cancel`."""

    party: str
    tokens: int
    size: int
    settled: bool = field(default=False, init=False)


class Quotas:
    """Admits requests within what each party may use. Only for the thread that owns the sockets.

    Args:
        path: the TOML file; None for no limits.
        account: remembers what was spent of budgets.
        clock: Unix time, for hours.

    Raises:
        UsageError: the file cannot be used.
    """

    def __init__(
        self, path: Path | None = None, account: Account | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self.path, self.account, self._clock = path, account or PassingAccount(), clock
        self._file = _File() if path is None else read_quotas(path)
        self._used: dict[str, _Used] = {}

    def reload(self) -> None:
        """Read the file again; where it cannot be used, the log says why and the old values stay."""
        if self.path is None:
            return
        try:
            self._file = read_quotas(self.path)
        except UsageError as error:
            log.error("the parties' quotas were not read again, old values stay: %s", error.problem)

    def of(self, party: str) -> Quota:
        """What `party` may use."""
        return self._file.parties.get(party, self._file.default)

    def check_session(self, party: str) -> None:
        """Whether `party` may open a session now; how many, `admission.make_room` sees to.

        Raises:
            Refusal: ``busy``: not at this hour, or not yet; ``quota``: its budget is spent.
        """
        quota = self.of(party)
        self._check_hours(quota)
        if quota.total_tokens is not None and self.account.spent_tokens(party) >= quota.total_tokens:
            raise _spent(quota.total_tokens, 0)

    def admit(self, party: str, tokens: int, size: int) -> Charge:
        """Reserve what a request will use.

        Args:
            party: its name.
            tokens: positions of all rows, those of a backward to come included; 0 for what is not computed.
            size: bytes of the request.

        Raises:
            Refusal: ``busy`` with the seconds to wait, or ``quota``.
        """
        quota, used = self.of(party), self._now(party)
        if tokens:
            self._check_hours(quota)
            self._check_total(quota, used, party, tokens)
        self._check_bytes(quota, used, size)
        if tokens and quota.tokens_per_second is not None and used.level <= 0:
            raise Refusal(
                f"This party has used its {quota.tokens_per_second:g} tokens a second.",
                code="busy",
                hint="wait; a run with a larger --timeout waits longer by itself",
                retry_after_s=max(-used.level / quota.tokens_per_second, 0.001),
            )
        used.level -= tokens
        used.reserved += tokens
        used.bytes += size
        used.requests += 1
        return Charge(party=party, tokens=tokens, size=size)

    async def settle(self, charge: Charge) -> None:
        """Charge a request that was computed, before its answer leaves.

        Raises:
            Refusal: the charge could not be written down in time; the answer must not leave.
        """
        self._end(charge)
        if charge.tokens:
            self.account.charge(charge.party, charge.tokens)  # counts if the party is given a budget later
            if self.of(charge.party).total_tokens is not None:
                try:
                    await self.account.secured(charge.party)
                except BaseException:
                    self.account.charge(charge.party, -charge.tokens)  # its answer does not leave
                    raise

    def cancel(self, charge: Charge) -> None:
        """Give back what a request reserved that gets no answer; nothing if it was settled."""
        if not charge.settled:
            self._end(charge)
            self._used[charge.party].level += charge.tokens

    def bytes_in_flight(self, party: str) -> int:
        """Of requests of `party` that are under way."""
        return self._used[party].bytes if party in self._used else 0

    # ---- parts

    def _end(self, charge: Charge) -> None:
        used = self._used[charge.party]
        used.reserved -= charge.tokens
        used.bytes -= charge.size
        used.requests -= 1
        charge.settled = True

    def _now(self, party: str) -> _Used:
        """The party's use, with what has flowed into its bucket meanwhile."""
        rate = self.of(party).tokens_per_second
        most = 0.0 if rate is None else rate * BURST_S
        now = time.monotonic()
        used = self._used.setdefault(party, _Used(level=most, at=now))
        used.level = most if rate is None else min(used.level + (now - used.at) * rate, most)
        used.at = now
        return used

    def _check_hours(self, quota: Quota) -> None:
        wait = quota.opens_in(self._clock())
        if wait > 0:
            raise Refusal(
                "This party is not served at this hour.",
                code="busy",
                expected=f"{', '.join(quota.hours)} UTC",
                hint=f"try again in {wait / 60:.0f} minutes",
                retry_after_s=wait,
            )

    def _check_total(self, quota: Quota, used: _Used, party: str, tokens: int) -> None:
        if quota.total_tokens is None:
            return
        left = quota.total_tokens - self.account.spent_tokens(party)
        if tokens > left:
            raise _spent(quota.total_tokens, max(left, 0))
        if tokens > left - used.reserved:
            raise Refusal(
                "What is under way may use up this party's budget.",
                code="busy",
                hint="wait for its answers",
                retry_after_s=_SOON_S,
            )

    @staticmethod
    def _check_bytes(quota: Quota, used: _Used, size: int) -> None:
        most = quota.max_bytes_in_flight
        if most is None:
            return
        if size > most:
            raise Refusal(
                f"A request of {size} bytes is more than this party may have under way.",
                code="quota",
                expected=f"at most {most} bytes",
                hint="lower the batch size",
            )
        if used.bytes + size > most:
            raise Refusal(
                f"{used.bytes} bytes of this party are under way already.",
                code="busy",
                expected=f"at most {most}",
                hint="wait for answers before asking again",
                retry_after_s=_SOON_S,
            )


def read_quotas(path: Path) -> _File:
    """The quotas in a TOML file.

    Raises:
        UsageError: it cannot be read, or something in it is not as it should be.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        return msgspec.convert(content, _File)
    except OSError as error:
        raise UsageError(f"The quotas {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise UsageError(
            f"The quotas {path} cannot be used: {error}.",
            expected=f"tables [default] and [parties.NAME] with {', '.join(Quota.__struct_fields__)}",
        ) from error


def _seconds(text: str) -> int:
    hours, minutes = text.split(":")
    return int(hours) * 3600 + int(minutes) * 60


def _spent(total: int, left: int) -> Refusal:
    return Refusal(
        f"This party's budget of {total} tokens is spent: {left} are left, fewer than this request needs.",
        code="quota",
        hint="ask the owner for more; a checkpoint goes on with --resume once there is",
    )
