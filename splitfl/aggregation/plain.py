"""A sum in the clear: the coordinator reads every update.

    submission   d values float32; weight float64; terms digest 32
    result       d values float32, the mean; sum of the weights float64; number of updates uint64; terms digest 32

Little-endian. The sum runs in float64, so that the order of the parties moves the mean by less than a float32 rounding.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import ClassVar, NoReturn

import numpy as np
import numpy.typing as npt

from splitfl.aggregation.grid import check_vector, check_weight, float32_within, within
from splitfl.aggregation.identity import short
from splitfl.aggregation.sealed import KEY, check_length, check_terms, terms_digest
from splitfl.aggregation.sums import Opened, RoundTerms, Stage, Vector
from splitfl.errors import InternalError, WireError

_KIND = b"plain"
_WEIGHT, _SUMS = struct.Struct("<d"), struct.Struct("<dQ")
_CHUNK = 1 << 15


class PlainSealer:
    """A party's side of one round.

    Args:
        terms: of the round.

    Raises:
        UsageError: terms that cannot be.
    """

    stages: ClassVar[tuple[Stage, ...]] = ("submit",)

    def __init__(self, terms: RoundTerms) -> None:
        check_terms(terms)
        self.terms = terms
        self._binding = terms_digest(terms, _KIND)

    def advertise(self) -> bytes:
        """Not needed."""
        _left_out("advertise")

    def share(self, adverts: Mapping[str, bytes]) -> Mapping[str, bytes]:
        """Not needed."""
        _left_out("share")

    def submit(self, vector: Vector, weight: float, adverts: Mapping[str, bytes], shares: Mapping[str, bytes]) -> bytes:
        """The update, cut to the clip.

        Raises:
            DataError: another shape, a value that is not finite, or a weight out of range.
        """
        check_vector(vector, self.terms.length)
        check_weight(weight, self.terms.max_weight)
        values = within(vector, float32_within(self.terms.clip)).astype("<f4", copy=False)
        return values.tobytes() + _WEIGHT.pack(weight) + self._binding

    def agree(self, survivors: Sequence[str]) -> bytes:
        """Not needed."""
        _left_out("agree")

    def reveal(self, survivors: Sequence[str], agreements: Mapping[str, bytes]) -> bytes:
        """Not needed."""
        _left_out("reveal")

    def open(self, result: bytes) -> Opened:
        """The mean.

        Raises:
            WireError: not a result of this round and attempt, or not a mean of clipped updates.
        """
        return _open(result, self.terms, self._binding)


class PlainSummer:
    """The coordinator's side of one round. It holds the sum (float64 [d]) and one submission at a time.

    Args:
        terms: of the round.

    Raises:
        UsageError: terms that cannot be.
    """

    opens: ClassVar[bool] = True

    def __init__(self, terms: RoundTerms) -> None:
        check_terms(terms)
        self.terms = terms
        self._binding = terms_digest(terms, _KIND)
        self._sum: npt.NDArray[np.float64] = np.zeros(0)
        self._weights: dict[str, float] = {}

    def accept(self, party: str, blob: bytes) -> None:
        """Add one update.

        Raises:
            WireError: not of the round, there already, another length, from another round or attempt, a weight out of
                range, or values that are not finite or beyond the clip. The sum is as it was before.
        """
        if party not in self.terms.parties:
            raise WireError(f"Party {short(party)} is not of this round.")
        if party in self._weights:
            raise WireError(f"The update of party {short(party)} is in the sum already.", expected="one update a party")
        size = 4 * self.terms.length
        check_length(blob, size + _WEIGHT.size + KEY, "submit", party)
        if blob[-KEY:] != self._binding:
            raise WireError(f"The update of party {short(party)} is for another round or attempt.")
        (weight,) = _WEIGHT.unpack_from(blob, size)
        if not 0 < weight <= self.terms.max_weight:
            raise WireError(
                f"Party {short(party)} sent a weight out of range.",
                expected=f"above 0, up to {self.terms.max_weight:g}",
            )
        values = np.frombuffer(blob, dtype="<f4", count=self.terms.length)
        _check_values(values, self.terms.clip, f"The update of party {short(party)}")
        if not self._weights:
            self._sum = np.zeros(self.terms.length)
        self._add(values, weight)
        self._weights[party] = weight

    def _add(self, values: npt.NDArray[np.float32], weight: float) -> None:
        held = np.empty(min(_CHUNK, len(values)))  # stays in the second-level cache
        for start in range(0, len(values), _CHUNK):
            part = values[start : start + _CHUNK]
            self._sum[start : start + _CHUNK] += np.multiply(part, weight, out=held[: len(part)], dtype=np.float64)

    @property
    def survivors(self) -> tuple[str, ...]:
        """Whose updates are in the sum, sorted."""
        return tuple(sorted(self._weights))

    def finish(self, reveals: Mapping[str, bytes]) -> bytes:
        """The mean, its weight and its number of updates.

        Raises:
            WireError: nobody submitted.
        """
        if not self._weights:
            raise WireError("Nobody submitted an update.", hint="the round needs another attempt")
        weight = math.fsum(self._weights.values())
        mean = (self._sum / weight).astype("<f4")
        return mean.tobytes() + _SUMS.pack(weight, len(self._weights)) + self._binding

    def open(self, result: bytes) -> Opened:
        """The mean; errors as at a party."""
        return _open(result, self.terms, self._binding)


def _open(result: bytes, terms: RoundTerms, binding: bytes) -> Opened:
    size = 4 * terms.length
    if len(result) != size + _SUMS.size + KEY or result[-KEY:] != binding:
        raise WireError("What the coordinator sent is not a result of this round and attempt.")
    weight, parties = _SUMS.unpack_from(result, size)
    if not 1 <= parties <= len(terms.parties) or not 0 < weight <= parties * terms.max_weight * (1 + 1e-12):
        raise WireError("The coordinator's result has a weight that its parties cannot have.")
    mean = np.frombuffer(result, dtype="<f4", count=terms.length).astype(np.float32)
    _check_values(mean, terms.clip, "The coordinator's mean")
    return Opened(mean=mean, weight=weight, parties=parties)


def _check_values(values: npt.NDArray[np.float32], clip: float, what: str) -> None:
    low, high = float(values.min()), float(values.max())  # NaN wins in both
    # the mean is rounded to float32: by up to 2^-24 of itself beyond the clip
    if not (-clip * (1 + 2.0**-23) <= low and high <= clip * (1 + 2.0**-23)):
        raise WireError(
            f"{what} has values that are not finite or beyond the clip.",
            expected=f"magnitudes up to {clip:g}",
            hint="the round goes on without it, or is dropped",
        )


def _left_out(stage: str) -> NoReturn:
    raise InternalError(f"A plain sum has no stage {stage!r}.")
