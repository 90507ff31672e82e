"""What the ledger writes down: a release, whose data it is, and what a unit has spent.

Accounts are kept apart by data set, group of channels, adversary and unit. Inside one account rho of zero-concentrated
differential privacy (zCDP) adds up (Bun and Steinke, "Concentrated Differential Privacy", 2016, lemma 7), unit by unit:
what an account shows is the unit that has spent the most. A limit that was set beforehand also holds for
releases that were chosen after seeing earlier ones (Feldman and Zrnic, "Individual Privacy Accounting via a Renyi
Filter", 2021). Neighbours always differ by *replacing* one unit; see `splitfl.privacy.calibration` for epsilon.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from splitfl.errors import UsageError, nearest, printable

Unit: TypeAlias = Literal["row", "person", "token", "data set"]
Group: TypeAlias = Literal["cut", "adapter", "sketch"]
UNITS: tuple[str, ...] = get_args(Unit)
GROUPS: dict[str, tuple[str, ...]] = {
    "cut": ("activations", "gradients", "labels"),
    "adapter": ("adapter",),
    "sketch": ("sketch",),
}
"""Channels whose releases add up; those of different groups never do."""
GROUP_WORDS = {
    "cut": "what the owner saw",
    "adapter": "what the adapter reveals",
    "sketch": "what a sketch of the rows reveals",
}
NEIGHBOURS = "replace one"
SLACK = 1e-9
"""A sum of floats may pass its budget by this share before it counts as beyond: rounding, not spending."""
_NAME = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_LONGEST = 200


def group_of(channel: str) -> str:
    """The group that a channel belongs to.

    Raises:
        UsageError: there is no such channel.
    """
    for group, channels in GROUPS.items():
        if channel in channels:
            return group
    allowed = [name for channels in GROUPS.values() for name in channels]
    raise UsageError(f"There is no channel {printable(channel, 40)!r}.", hint=nearest(channel, allowed))


def check_dataset(fingerprint: str) -> str:
    """`fingerprint`, if it can name a data set.

    Raises:
        UsageError: it cannot.
    """
    if not isinstance(fingerprint, str) or _NAME.fullmatch(fingerprint) is None:
        raise UsageError(
            f"{printable(str(fingerprint), 40)!r} cannot be the fingerprint of a data set.",
            expected="1 to 128 letters, digits and . : - _ as `splitfl.data.fingerprint` gives them",
        )
    return fingerprint


def check_adversary(adversary: str) -> str:
    """The name of an adversary as it is kept: lower case, single spaces. A budget must meet its releases.

    Raises:
        UsageError: the name is empty, too long or not printable.
    """
    return check_text("adversary", adversary).lower()


def check_text(name: str, text: str) -> str:
    """`text` with single spaces.

    Raises:
        UsageError: it is empty, longer than 200 characters, or not printable.
    """
    plain = " ".join(text.split()) if isinstance(text, str) else ""
    if not plain or len(plain) > _LONGEST or not plain.isprintable():
        raise UsageError(f"The {name} cannot be written down.", expected=f"1 to {_LONGEST} printable characters")
    return plain


def check_choice(name: str, value: str, allowed: Sequence[str]) -> str:
    """`value`, if it is one of `allowed`.

    Raises:
        UsageError: it is not.
    """
    if value not in allowed:
        raise UsageError(f"There is no {name} {printable(str(value), 40)!r}.", hint=nearest(str(value), allowed))
    return value


@dataclass(frozen=True, kw_only=True)
class Release:
    """One thing that is about to leave, charged before it does.

    With `unit` "person" the units are persons. If several rows of one person are in one release, name the person once
    and give the `sensitivity` (and `rho`) for replacing all of them: group privacy is the caller's arithmetic, and the
    ledger cannot check it. With "token" the units are the rows whose tokens are sent; each token of such a row spends
    `rho`. Unit 7 and unit "7" are the same one.
    """

    release_id: str
    """Names this release for good: a retry that sends the same bytes carries the same one."""
    dataset: str
    """Fingerprint of the data set (`splitfl.data.fingerprint`)."""
    unit: Unit
    units: Sequence[str | int] | None = field(repr=False)
    """Whose data it is, each named once; None for every unit of the data set."""
    channel: str
    """``activations``, ``gradients``, ``labels``, ``adapter`` or ``sketch``."""
    mechanism: str
    sensitivity: float | None
    """L2, replace-one."""
    sigma: float | None
    """Standard deviation of the noise, in the units of `sensitivity`."""
    rho: float | None
    """zCDP of this one release, for each unit in it; None where there is no formal bound."""
    adversary: str
    run: str

    def __post_init__(self) -> None:
        check_dataset(self.dataset)
        check_choice("unit", self.unit, UNITS)
        group_of(self.channel)
        for name in ("release_id", "mechanism", "run"):
            check_text(name, getattr(self, name))
        object.__setattr__(self, "adversary", check_adversary(self.adversary))
        for name in ("sensitivity", "sigma", "rho"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _positive(name, value))
        self._check_units()
        self._check_rho()

    def _check_units(self) -> None:
        if self.units is None:
            return
        if isinstance(self.units, str) or len(self.units) == 0:
            raise UsageError("A release was to be charged to no unit.", expected="a list of units, or None for all")
        if any(isinstance(unit, bool) or not isinstance(unit, str | int) for unit in self.units):
            raise UsageError("A unit of a release is neither a number nor a text.", expected="row numbers, or names")
        twice = len(self.units) - len({str(unit) for unit in self.units})
        if twice:
            raise UsageError(
                f"A release lists {twice} of its {len(self.units)} units again.",
                expected="each unit once, with the sensitivity of all that it sends",
                hint="list a person once, whatever number of rows; send a row twice as two releases",
            )

    def _check_rho(self) -> None:
        # Nothing amplifies what is seen of a row that was sent (subsampling does for adapters, which are left out).
        if None in (self.rho, self.sensitivity, self.sigma) or self.group == "adapter":
            return
        least = gaussian_rho(self.sensitivity or 0.0, self.sigma or 1.0)
        if (self.rho or 0.0) < least * (1 - SLACK):
            raise UsageError(
                f"A release claims rho {self.rho:.6g}, less than its noise gives.",
                expected=f"sensitivity^2 / (2 sigma^2) = {least:.6g} or more",
            )

    @property
    def group(self) -> str:
        """The group of channels it is counted in."""
        return group_of(self.channel)

    @property
    def unit_count(self) -> int | None:
        """How many units it names; None for all of them."""
        return None if self.units is None else len(self.units)

    @property
    def words(self) -> str:
        """What it is, for a message: no unit is named."""
        bound = "no formal bound" if self.rho is None else f"rho {self.rho:.4g}"
        noise = "" if self.sigma is None else f", sigma {self.sigma:.4g}"
        return f"{self.channel} under {self.mechanism} ({bound}{noise})"


def gaussian_rho(sensitivity: float, sigma: float) -> float:
    """zCDP of one release of the (discrete) Gaussian mechanism: sensitivity^2 / (2 sigma^2)."""
    return sensitivity * sensitivity / (2 * sigma * sigma)


def _positive(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UsageError(f"The {name} of a release is not a positive number.", expected="more than 0, and finite")
    return float(value)


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What one unit has spent in one account."""

    releases: int = 0
    rho: float = 0.0
    unbounded: int = 0
    """Releases among them without a formal bound: its rho is then no bound at all."""

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            releases=self.releases + other.releases,
            rho=self.rho + other.rho,
            unbounded=self.unbounded + other.unbounded,
        )

    @property
    def words(self) -> str:
        """For a message."""
        rho = f"{self.unbounded} of them without a formal bound" if self.unbounded else f"rho {self.rho:.4g}"
        return f"{self.releases} releases, {rho}" if self.releases != 1 else f"1 release, {rho}"


def short_name(dataset: str, label: str | None) -> str:
    """`rows.jsonl (1a2b3c4d5e6f)`, or the short fingerprint alone."""
    return f"{label} ({dataset[:12]})" if label else dataset[:12]
