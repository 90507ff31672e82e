"""Masked and encrypted sums beside the plain float32 sum, measured in one process, in turns.

The updates lie on the grid of the way of summing, so that its rounding has nothing to round and the sum that comes out
can be compared with the sum of whole numbers, value by value.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import psutil
import torch

from splitfl.aggregation.bfv import BfvSealer, BfvSummer
from splitfl.aggregation.encrypted import Shape
from splitfl.aggregation.factors import Layout, Pair, Update
from splitfl.aggregation.grid import Grid
from splitfl.aggregation.he_worker import Worker
from splitfl.aggregation.identity import signing_key
from splitfl.aggregation.lattice import BFV, Form
from splitfl.aggregation.mask_sums import MaskSummer
from splitfl.aggregation.masks import MaskSealer
from splitfl.aggregation.sums import Opened, RoundTerms, Sealer, Summer, Vector
from splitfl.wire.channel import curve_keypair

T = TypeVar("T")

TENSORS, RANK = 88, 8
_MASK_REPEATS = 7  # of a coordinator, in one turn
_STEP = 2.0**-31  # width of a grid step here: exact, as are the values that lie on it
_SPREAD, _LARGEST = 1 << 17, 1 << 20  # of the updates, in steps; ten of the largest stay exact in float32
_MAX_WEIGHT = 1000.0


class Ground:
    """Parties and their updates.

    Args:
        parties: n.
        values: d, a multiple of 8.
    """

    def __init__(self, parties: int, values: int) -> None:
        pairs = sorted((curve_keypair() for _ in range(parties)), key=lambda keys: keys.public)
        self.keys = {keys.public.decode("ascii"): keys for keys in pairs}
        self.identities = {party: signing_key(keys).public_key() for party, keys in self.keys.items()}
        self.values = values
        generator = np.random.default_rng(0)
        drawn = (generator.normal(0, _SPREAD, values).round() for _ in range(parties))
        self.whole = [np.clip(steps, -_LARGEST, _LARGEST).astype(np.int64) for steps in drawn]
        self.vectors: list[Vector] = [(steps * _STEP).astype(np.float32) for steps in self.whole]
        self.blobs = [vector.tobytes() for vector in self.vectors]
        self.adapters = [many_tensors(v) if number % 2 else one_tensor(v) for number, v in enumerate(self.vectors)]
        """Every second party's update comes as 88 tensors, the others' as one."""

    def terms(self, levels: int) -> RoundTerms:
        """Of a round whose grid has steps of `_STEP`."""
        return RoundTerms(
            federation="0" * 32, round=0, attempt=0, parties=tuple(self.keys), length=self.values,
            clip=levels * _STEP, max_weight=_MAX_WEIGHT, layout="a benchmark",
        )  # fmt: skip

    def wrong(self, opened: Opened) -> int:
        """Values of a mean that are not the sum of the whole numbers."""
        mean = np.multiply(sum(self.whole), _STEP / len(self.whole), dtype=np.float64)
        return int(np.count_nonzero(mean.astype(np.float32) != opened.mean))


def many_tensors(vector: Vector) -> Update:
    """The values of `vector` as the 88 factors of an adapter."""
    columns = len(vector) // RANK
    edges = np.linspace(0, columns, TENSORS + 1).astype(int) * RANK
    parts = [torch.from_numpy(vector[start:end]) for start, end in pairwise(edges)]
    pairs = {
        f"layers.{number:02d}": Pair(a.reshape(RANK, -1), b.reshape(-1, RANK), 2.0)
        for number, (a, b) in enumerate(zip(parts[::2], parts[1::2], strict=True))
    }
    return Update(pairs)


def one_tensor(vector: Vector) -> Update:
    """The values of `vector` as one tensor."""
    return Update({}, {"all": torch.from_numpy(vector)})


# ---- time


class Clock:
    """Milliseconds of the processor.

    Args:
        child: its time counts too.
    """

    def __init__(self, child: Callable[[], int | None] = lambda: None) -> None:
        self._child = child

    def time(self, work: Callable[[], T]) -> tuple[float, T]:
        """How long `work` took, and what it gave."""
        before = self.now()
        done = work()
        return 1000 * (self.now() - before), done

    def now(self) -> float:
        """Seconds so far."""
        pid = self._child()
        if pid is None:
            return time.process_time()
        times = psutil.Process(pid).cpu_times()
        return time.process_time() + float(times.user + times.system)


def plain_sum(blobs: Sequence[bytes]) -> bytes:
    """The reference: float32 updates in, their float32 sum out, nothing checked."""
    total: npt.NDArray[np.float32] = np.frombuffer(blobs[0], dtype="<f4").astype(np.float32)
    for blob in blobs[1:]:
        np.add(total, np.frombuffer(blob, dtype="<f4"), out=total)
    return total.tobytes()


# ---- ways of summing


def measure_mask(ground: Ground) -> dict[str, float]:
    """One attempt of `mask`; the coordinator's part again and again, in turns with the plain sum."""
    terms = ground.terms(Grid(clip=1.0, parties=len(ground.keys), max_weight=_MAX_WEIGHT).levels)
    sealers = {party: MaskSealer(terms, keys, ground.identities) for party, keys in ground.keys.items()}
    clock = Clock()
    blobs, figures = _submit(ground, sealers, clock, "mask")
    survivors = tuple(sorted(blobs))
    agreements = {party: sealer.agree(survivors) for party, sealer in sealers.items()}
    reveals = {party: sealer.reveal(survivors, agreements) for party, sealer in sealers.items()}
    plain, named, signed = [], [], []
    for _ in range(_MASK_REPEATS):
        plain.append(clock.time(lambda: plain_sum(ground.blobs))[0])
        # the channel says who sent what: each party's messages come under its CURVE key
        spent, result = clock.time(lambda: coordinate(MaskSummer(terms, None), blobs, reveals))
        named.append(spent)
        signed.append(clock.time(lambda: coordinate(MaskSummer(terms, ground.identities), blobs, reveals))[0])
    opening, opened = clock.time(lambda: next(iter(sealers.values())).open(result))
    return figures | {
        "plain.coordinator": statistics.median(plain),
        "mask.coordinator": statistics.median(named),
        "mask.coordinator ratio": statistics.median(n / p for n, p in zip(named, plain, strict=True)),
        "mask.signed": statistics.median(signed),
        "mask.opening": opening,
        "mask.wrong": ground.wrong(opened),
        "mask.down": len(result),
    }


def measure_encrypted(ground: Ground, form: Form, worker: Worker) -> dict[str, float]:
    """One attempt of `bfv`."""
    draft = Shape(ground.terms(1 << 20), BFV, form)
    terms = ground.terms(draft.grid.levels)
    sealers = {
        party: BfvSealer(terms, keys, ground.identities, form=form, worker=worker)
        for party, keys in ground.keys.items()
    }
    clock, name = Clock(lambda: worker.pid), f"bfv {form}"
    worker.check()
    blobs, figures = _submit(ground, sealers, clock, name)
    adding, result = Clock().time(lambda: coordinate(BfvSummer(terms, None, form=form), blobs, {}))
    opening, opened = clock.time(lambda: next(iter(sealers.values())).open(result))
    return figures | {
        f"{name}.coordinator": adding,
        f"{name}.opening": opening,
        f"{name}.wrong": ground.wrong(opened),
        f"{name}.down": len(result),
    }


def coordinate(summer: Summer, blobs: Mapping[str, bytes], reveals: Mapping[str, bytes]) -> bytes:
    """All that the coordinator computes in a round."""
    for party, blob in blobs.items():
        summer.accept(party, blob)
    return summer.finish(reveals)


def _submit(
    ground: Ground, sealers: Mapping[str, Sealer], clock: Clock, name: str
) -> tuple[dict[str, bytes], dict[str, float]]:
    """What the parties submit, its bytes, and the processor time of a party."""
    adverts = {party: sealer.advertise() for party, sealer in sealers.items()}
    made = {party: sealer.share(adverts) for party, sealer in sealers.items()}
    blobs: dict[str, bytes] = {}
    own: list[float] = []
    whole: list[float] = []
    tensors: list[float] = []
    for number, (party, sealer) in enumerate(sealers.items()):
        shares = {sender: shared[party] for sender, shared in made.items() if sender != party}
        adapter = ground.adapters[number]
        layout = Layout.of(adapter)
        flat, vector = clock.time(lambda: layout.to_vector(adapter))  # noqa: B023  called at once
        sealing, blobs[party] = clock.time(lambda: sealer.submit(vector, _MAX_WEIGHT, adverts, shares))  # noqa: B023
        own.append(sealing)
        (tensors if number % 2 else whole).append(flat + sealing)
    sizes = {len(blob) for blob in blobs.values()}
    return blobs, {
        f"{name}.up": max(sizes),
        f"{name}.up ratio": max(sizes) / min(sizes),
        f"{name}.party": statistics.median(own),
        f"{name}.one tensor": statistics.median(whole),
        f"{name}.many tensors": statistics.median(tensors),
    }
