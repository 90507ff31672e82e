"""A party's side of noise on a sum: what it adds, what it keeps of it between attempts, and one opened sum a round.

`splitfl.aggregation.noise` says how much noise there has to be, and why.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from splitfl.aggregation.grid import EXTRA, Grid, Whole
from splitfl.aggregation.noise import NoisePlan
from splitfl.aggregation.sealed import digest
from splitfl.aggregation.sums import RoundTerms, Vector
from splitfl.aggregation.wide_noise import draw
from splitfl.errors import DataError, ResourceError, WireError


class Noiser:
    """Encodes and noises a party's update once a round, and gives the same numbers to each further attempt.

    Args:
        folder: where the noised update of the latest round is kept, in files of mode 0600; made if it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def encode(self, terms: RoundTerms, grid: Grid, plan: NoisePlan, vector: Vector, weight: float, out: Whole) -> None:
        """The noised update on the grid, into `out` (int32 [d + EXTRA]).

        Raises:
            DataError: values that cannot be sent; a weight other than the largest, which would tell how much data there
                is; another update in the same round.
            ResourceError: it cannot be kept.
        """
        if weight != terms.max_weight:
            raise DataError(
                f"With noise, a weight of {weight:g} would itself say something about the data.",
                expected=f"the largest weight, {terms.max_weight:g}, at every party",
            )
        path = self._folder / f"noised-{_name(terms)}"
        stamp = digest(terms.layout.encode("utf-8"), plan.descriptor(), struct.pack("<d", weight), vector.tobytes())
        if self._load(path, stamp, out):
            return
        grid.encode(_shortened(vector, plan.norm) if plan.unit == "party" else vector, weight, out)
        values = out[:-EXTRA].view(np.uint32)
        values += draw(plan.sigma, len(values)).astype(np.uint32)  # modulo 2^32
        self._write(path, stamp, out.tobytes())
        self._forget(terms)

    def note_opened(self, terms: RoundTerms, survivors: Iterable[str]) -> None:
        """Before this party helps to open a sum of noised updates: over whom it is.

        Raises:
            WireError: one over others was opened in this round.
            ResourceError: it cannot be kept.
        """
        over, path = digest(*(party.encode("ascii") for party in sorted(survivors))), self._opened(terms)
        before = self._read(path)
        if before is None:
            self._write(path, over)
        elif before != over:
            raise WireError(
                "In this round a sum over other parties was opened in an earlier attempt. The same noise is on both, "
                "and their difference would be single updates with one share of it.",
                expected="the same survivors as before",
                hint="the round is dropped here",
            )

    def was_opened(self, terms: RoundTerms) -> bool:
        """Whether a sum of this round was opened with this party's help."""
        return self._read(self._opened(terms)) is not None

    def _opened(self, terms: RoundTerms) -> Path:
        return self._folder / f"opened-{_name(terms)}"

    def _load(self, path: Path, stamp: bytes, out: Whole) -> bool:
        found = self._read(path)
        if found is None:
            return False
        if found[: len(stamp)] != stamp or len(found) != len(stamp) + out.nbytes:
            raise DataError(
                "Another update was noised in this round already; a second one would be a second release.",
                expected="the same update at every attempt of a round",
                hint="keep the update until the round is over",
            )
        out[:] = np.frombuffer(found, dtype="<i4", offset=len(stamp))
        return True

    def _read(self, path: Path) -> bytes | None:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ResourceError(f"{path} cannot be read: {error.strerror}.") from error

    def _write(self, path: Path, *parts: bytes) -> None:
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.writelines(parts)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise ResourceError(f"The noised update cannot be kept in {path.parent}: {error.strerror}.") from error

    def _forget(self, terms: RoundTerms) -> None:
        """What is kept of other rounds of this federation."""
        for kind in ("noised", "opened"):
            for path in self._folder.glob(f"{kind}-{_name(terms).rpartition('-')[0]}-*"):
                if path.name != f"{kind}-{_name(terms)}":
                    path.unlink(missing_ok=True)


def _name(terms: RoundTerms) -> str:
    """Of the files of one round; nothing in it is as a peer wrote it."""
    return f"{digest(terms.federation.encode('utf-8')).hex()[:16]}-{terms.round}"


def _shortened(vector: Vector, norm: float) -> Vector:
    """`vector`, scaled down to an L2 norm of at most `norm`."""
    squares = (np.dot(part, part) for part in _pieces(vector))
    length = math.sqrt(float(sum(squares)))
    if not math.isfinite(length):
        raise DataError("The update holds a value that is not finite.", expected="finite values only")
    # a little below: scaling in float32 rounds each value by up to 2^-24 of itself
    return vector if length <= norm * (1 - 1e-6) else vector * np.float32(norm * (1 - 1e-6) / length)


def _pieces(vector: Vector) -> list[np.ndarray]:
    size = 1 << 20
    return [vector[start : start + size].astype(np.float64) for start in range(0, len(vector), size)]
