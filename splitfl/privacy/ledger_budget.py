"""How much a unit may spend, and the refusal of what goes beyond it: what was spent, what was asked, what would fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from splitfl.errors import UsageError
from splitfl.privacy.ledger_records import GROUP_WORDS, NEIGHBOURS, SLACK, Release, Spent


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The most that any one unit may spend in one account; None where there is no limit of that kind."""

    unit: str
    rho: float | None = None
    epsilon: float | None = None
    """What `rho` was worked out from, with `delta`."""
    delta: float | None = None
    releases: int | None = None

    def room(self, spent: Spent, rho: float | None) -> float:
        """How many more releases of this rho fit, a whole number or infinity.

        Args:
            spent: what the unit has spent.
            rho: of one release; None has no bound, and fits no limit on rho.
        """
        room = math.inf if self.releases is None else max(0, self.releases - spent.releases)
        if self.rho is None:
            return room
        if rho is None or spent.unbounded:
            return 0
        return min(room, max(0, math.floor((self.rho * (1 + SLACK) - spent.rho) / rho)))

    def left(self, spent: Spent) -> tuple[int | None, float | None]:
        """Releases and rho that are left, each None where it has no limit."""
        releases = None if self.releases is None else max(0, self.releases - spent.releases)
        if self.rho is None:
            return releases, None
        return releases, 0.0 if spent.unbounded else max(0.0, self.rho - spent.rho)

    @property
    def words(self) -> str:
        """For a message; an epsilon never stands without delta, unit and neighbours."""
        parts = [] if self.releases is None else [f"{self.releases} releases of each {self.unit}"]
        if self.rho is not None:
            rho = f"rho {self.rho:.4g} for each {self.unit}, neighbours: {NEIGHBOURS}"
            parts.append(rho + (f" (epsilon {self.epsilon:g} at delta {self.delta:g})" if self.epsilon else ""))
        return ", and ".join(parts)


def rho_for(epsilon: float, delta: float) -> float:
    """The largest rho of zCDP that implies (epsilon, delta), to one part in 10^9, never rounded up.

    Raises:
        UsageError: `epsilon` or `delta` out of range.
    """
    _check_epsilon(epsilon, delta)
    from splitfl.privacy.calibration import zcdp_epsilon

    low, high = 0.0, epsilon
    while zcdp_epsilon(high, delta) <= epsilon:
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if zcdp_epsilon(middle, delta) <= epsilon else (low, middle)
        if high < 1e-30:
            raise UsageError(f"No noise gives epsilon {epsilon:g} at delta {delta:g}.", expected="a larger delta")
    return low


def _check_epsilon(epsilon: float, delta: float | None) -> None:
    if not 0 < epsilon < float("inf"):
        raise UsageError(f"A budget was given as epsilon {epsilon:g}.", expected="more than 0, and finite")
    if delta is None or not 0 < delta < 1:
        came = "without delta" if delta is None else f"at delta {delta:g}"
        raise UsageError(f"Epsilon {epsilon:g} was given {came}.", expected="delta above 0 and below 1, such as 1e-6")


def make_budget(
    unit: str,
    epsilon: float | None,
    delta: float | None,
    rho: float | Callable[[float, float], float] | None,
    releases: int | None,
) -> Budget:
    """A budget, from what `Ledger.set_budget` was given.

    Raises:
        UsageError: a value out of range, or none at all.
    """
    if epsilon is None and rho is None and releases is None:
        raise UsageError("A budget was given without a limit.", expected="epsilon and delta, rho, or releases")
    if epsilon is not None:
        _check_epsilon(epsilon, delta)
        rho = rho_for if rho is None else rho
    elif delta is not None:
        raise UsageError("Delta was given without epsilon.", expected="both, or neither")
    if callable(rho):
        rho = rho(epsilon or 0.0, delta or 0.0)
    if rho is not None and not 0 <= rho < float("inf"):
        raise UsageError(f"A budget was given as rho {rho:g}.", expected="0 or more, and finite")
    if releases is not None and (isinstance(releases, bool) or not isinstance(releases, int) or releases < 0):
        raise UsageError(f"A budget was given as {releases!r} releases.", expected="a whole number, 0 or more")
    return Budget(unit=unit, epsilon=epsilon, delta=delta, rho=rho, releases=releases)


class BudgetError(UsageError):
    """A release beyond the budget of one of its units. Nothing was charged, and nothing may be sent.

    Args:
        fits_releases: how many such releases still fit, for every unit of this one.
        fits_sigma: the smallest sigma at which the releases asked for would fit; None where no noise would help.
    """

    def __init__(
        self, problem: str, *, expected: str, hint: str, fits_releases: int = 0, fits_sigma: float | None = None
    ) -> None:
        super().__init__(problem, expected=expected, hint=hint)
        self.fits_releases, self.fits_sigma = fits_releases, fits_sigma


def refusal(
    release: Release, name: str, budget: Budget, spent: Sequence[Spent], *, times: int = 1
) -> BudgetError | None:
    """Why `times` such releases are refused, or None if they fit.

    Args:
        release: what is asked for.
        name: of the data set, for people.
        budget: the budget of its account.
        spent: what each unit of the release has spent; for a release of all units, the most that one has.
        times: how often it is to be released.
    """
    rooms = [budget.room(each, release.rho) for each in spent]
    over = sum(room < times for room in rooms)
    if not over:
        return None
    room = int(min(rooms))
    worst = spent[min(range(len(spent)), key=lambda i: (rooms[i], -spent[i].rho))]
    who = "every unit" if release.units is None else f"{over} of its {len(spent)} units"
    sigma = _enough_noise(release, budget, spent, times)
    return BudgetError(
        f"{release.words} would take {name} beyond its budget: {who} had no room for {_count(times)}. "
        f"Adversary: {release.adversary}; {GROUP_WORDS[release.group]}. The fullest unit has spent: {worst.words}. "
        "Nothing was charged.",
        expected=f"at most {budget.words}",
        hint=_what_fits(release, budget, room, sigma, times, len(spent) - over),
        fits_releases=room,
        fits_sigma=sigma,
    )


def _enough_noise(release: Release, budget: Budget, spent: Sequence[Spent], times: int) -> float | None:
    """The smallest sigma at which `times` releases fit: rho goes with 1 / sigma^2."""
    if release.rho is None or release.sigma is None or budget.rho is None:
        return None
    if budget.releases is not None and any(each.releases + times > budget.releases for each in spent):
        return None
    if any(each.unbounded for each in spent):
        return None
    left = min(budget.rho - each.rho for each in spent)
    return release.sigma * math.sqrt(release.rho * times / left) if left > budget.rho * SLACK else None


def _what_fits(
    release: Release, budget: Budget, room: int, sigma: float | None, times: int, others: int
) -> str:  # fmt: skip
    if release.rho is None and budget.rho is not None:
        return "use a mechanism with a formal bound, or give the data set a budget in releases (--releases)"
    parts = [f"{_count(room)} would still fit" + (" at this sigma" if release.sigma is not None else "")]
    if sigma is not None:
        # Rounded up, so that the number printed does fit.
        parts.append(f"{_count(times)} would fit with sigma {_rounded_up(sigma)} or more")
    if others:
        parts.append(f"{others} of its units have room")
    return "; ".join(parts) + "; see `splitfl ledger show`"


def _rounded_up(value: float, digits: int = 4) -> str:
    scale = 10.0 ** (digits - 1 - math.floor(math.log10(value)))
    return f"{math.ceil(value * scale) / scale:.{digits}g}"


def _count(number: int) -> str:
    return f"{number} release" + ("" if number == 1 else "s")
