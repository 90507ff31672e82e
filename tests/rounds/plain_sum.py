"""A plain sum in a few lines, so that rounds can be tested whatever becomes of the real ones."""

from __future__ import annotations

import numpy as np

from splitfl.aggregation.sums import Opened
from splitfl.errors import PeerError


class PlainSealer:
    stages = ("submit",)

    def __init__(self, terms):
        self.terms = terms

    def submit(self, vector, weight, adverts, shares):
        return np.float64(weight).tobytes() + np.clip(vector, -self.terms.clip, self.terms.clip).tobytes()

    def open(self, result):
        weight, parties = np.frombuffer(result, np.float64, 2)
        mean = np.frombuffer(result, np.float32, offset=16)
        if np.abs(mean).max(initial=0.0) > self.terms.clip * (1 + 1e-6):
            raise PeerError("The mean is larger than any update may be.")
        return Opened(mean=mean, weight=float(weight), parties=int(parties))


class PlainSummer:
    opens = True

    def __init__(self, terms):
        self.terms, self.weight, self.came = terms, 0.0, []
        self.sum = np.zeros(terms.length)

    def accept(self, party, blob):
        if party not in self.terms.parties or party in self.came:
            raise PeerError("An update came that is not expected.")
        if len(blob) != 8 + 4 * self.terms.length:
            raise PeerError("An update came of a wrong size.", expected=f"{8 + 4 * self.terms.length} bytes")
        weight, vector = float(np.frombuffer(blob, np.float64, 1)[0]), np.frombuffer(blob, np.float32, offset=8)
        if not (0 < weight <= self.terms.max_weight and np.isfinite(vector).all()):
            raise PeerError("An update holds a weight or values that no update may have.")
        self.sum += weight * np.clip(vector, -self.terms.clip, self.terms.clip)
        self.weight += weight
        self.came.append(party)

    @property
    def survivors(self):
        return tuple(sorted(self.came))

    def finish(self, reveals):
        mean = (self.sum / self.weight).astype(np.float32)
        return np.array([self.weight, len(self.came)], np.float64).tobytes() + mean.tobytes()

    def open(self, result):
        return PlainSealer(self.terms).open(result)
