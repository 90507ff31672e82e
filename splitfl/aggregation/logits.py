"""What models say about rows that all parties have, as bytes, and its mean: the shared knowledge of `fed-kd`.

Per *position* (a predicted token of a public row, or a public row of a classifier) a party sends the k likeliest of V
tokens or classes with their log-probabilities at temperature t, l_k(v) = log softmax(z_k / t)(v). Summed over the
parties S(v) that sent entry v, and over nobody else:

    m(v) = sum over S(v) of w_k l_k(v)  /  sum over S(v) of w_k          q(v) = softmax of m over what anybody sent

A party that left v out says that v is less likely than its k-th, not that it is impossible, so nothing is put in its
place. Why log-probabilities and not logits: models differ by a constant in each position, which would count wherever
S(v) differs. Why not probabilities: an even 16-bit grid of logarithms has one relative error for all of them, and with
k = V q is the softmax of the mean of the logits, which is the published average.

    upload      header; ids [P, k] (left out where k = V); values uint16 [P, k]
    knowledge   header; how many entries each position has uint32 [P]; ids; values uint16 (no numbers, no ids where all
                have all)

Little-endian; ids are uint16 up to 65,536 classes, else uint32, and rise within a position. A value q stands for
-floor q / 65535 nats; what is less likely than that is sent as -floor.

Legend: P positions, V tokens or classes, k kept of them, n parties.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from splitfl.aggregation.rule import Rule, Summation
from splitfl.aggregation.sums import RoundTerms, Vector
from splitfl.errors import PeerError, UsageError, WireError

RULE = "kd"
TOP = 65535
"""The lowest value on the grid."""
_UPLOAD = struct.Struct("<4sQIIddd")
_KNOWLEDGE = struct.Struct("<4sQIIddIQ")
_UPLOAD_MARK, _KNOWLEDGE_MARK = b"KDu1", b"KDk1"
_COUNT = np.dtype("<u4")
_MOST_ENTRIES = 1 << 36
_CHUNK = 1 << 20  # entries that are averaged at once
_HIDDEN: tuple[Summation, ...] = ("mask+hidden", "bfv", "ckks")

Ids: TypeAlias = npt.NDArray[Any]
Steps: TypeAlias = npt.NDArray[np.uint16]


@dataclass(frozen=True, kw_only=True)
class Distilled(Rule):
    """The place that rules of combining adapters have in a round: one training, one sum, no adapter sent."""

    name: ClassVar[str] = RULE
    source: ClassVar[str] = "KD-FedLLM (Yan et al., 2501.04436); top-k without padding: 2509.01750"
    says: ClassVar[str] = "mean of what each model says about public rows, entry by entry over those that sent it"
    same_bits: ClassVar[bool] = True
    no_global: ClassVar[str] = "every party keeps a model of its own"


def check_sum(summation: Summation, *, dense: bool = True) -> None:
    """Refuse a sum that cannot be made of logits, or would not hide what it seems to.

    Raises:
        UsageError: with the reason.
    """
    if summation in _HIDDEN:
        raise UsageError(
            f"--rule {RULE} cannot be used with --sum {summation}: the coordinator hands the mean to parties that come "
            "late, unsealed, and so would read what this sum is to keep from it.",
            expected="--sum plain, or --sum mask where every party sends every class",
        )
    if summation != "plain" and not dense:
        raise UsageError(
            f"--sum {summation} cannot be used with the largest logits alone: which entries a party sends differs from "
            "party to party, and a sum of vectors has one place for each.",
            expected="--sum plain, or every class (--kd-top-k 0)",
        )


@dataclass(frozen=True, kw_only=True)
class LogitLayout:
    """What is sent, the same at every party.

    Raises:
        UsageError: figures that make no sense.
    """

    positions: int
    """P: predicted tokens, or rows of a classifier."""
    classes: int
    """V."""
    keep: int
    """k, from 2; V sends everything."""
    temperature: float
    floor: float = 24.0
    """Nats below certainty at which a log-probability is cut."""

    def __post_init__(self) -> None:
        if self.positions < 1 or not 2 <= self.keep <= self.classes < 1 << 32:
            raise UsageError(
                f"{self.keep} of {self.classes} classes at {self.positions} positions cannot be sent.",
                expected="at least one position, and 2 classes or more: of one alone there is nothing to compare",
            )
        if not 0 < self.temperature < math.inf or not 0 < self.floor < math.inf:
            raise UsageError("A temperature or floor of logits is out of range.", expected="finite and above 0")

    @property
    def dense(self) -> bool:
        """Whether all classes are sent, so that the mean is a mean of vectors."""
        return self.keep == self.classes

    @property
    def id_type(self) -> np.dtype[Any]:
        """Of one id."""
        return np.dtype("<u2" if self.classes <= 1 << 16 else "<u4")

    @property
    def upload_bytes(self) -> int:
        """Of one upload, header included."""
        return _UPLOAD.size + self.positions * self.keep * (2 + (0 if self.dense else self.id_type.itemsize))

    @property
    def words(self) -> int:
        """The same in values of four bytes, without the header: the length of an update to the federation."""
        return -(-(self.upload_bytes - _UPLOAD.size) // 4)

    @property
    def digest(self) -> str:
        """64 hexadecimal digits."""
        return hashlib.blake2b(f"splitfl logits 1 {astuple(self)}".encode(), digest_size=32).hexdigest()

    def steps(self, log_probabilities: npt.NDArray[np.float64] | npt.NDArray[np.float32]) -> Steps:
        """Log-probabilities (0 and below) as steps of the grid."""
        nats = np.clip(-log_probabilities.astype(np.float64), 0.0, self.floor)
        return np.rint(nats * (TOP / self.floor)).astype(np.uint16)

    def nats(self, steps: npt.NDArray[np.generic]) -> npt.NDArray[np.float64]:
        """The log-probabilities that steps stand for."""
        return steps.astype(np.float64) * (-self.floor / TOP)

    # ---- as a vector, for sums that hide each party's own

    def to_vector(self, steps: Steps, clip: float) -> Vector:
        """Dense steps [P, V] as float32 [P V], spread over what the federation's clip allows."""
        return ((1.0 - steps.reshape(-1).astype(np.float64) * (2.0 / TOP)) * clip).astype(np.float32)

    def from_vector(self, mean: Vector, clip: float) -> npt.NDArray[np.float64]:
        """The mean log-probabilities [P V] of vectors made by `to_vector`."""
        return np.clip((mean.astype(np.float64) / clip - 1.0) * (self.floor / 2.0), -self.floor, 0.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Upload:
    """What one party says."""

    ids: Ids
    """[P, k], rising in each row; of any whole type, as a large upload stays as it came."""
    steps: Steps
    """[P, k]."""
    weight: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Knowledge:
    """What all together say; entries of one position stand side by side."""

    counts: Ids
    """Entries of each position, [P]."""
    ids: Ids
    """[entries], rising within a position."""
    log_probabilities: npt.NDArray[np.float64]
    """[entries], not yet normalised over a position."""
    parties: int
    weight: float = 0.0


# ---- a party's upload


def pack_upload(layout: LogitLayout, ids: Ids, steps: Steps, weight: float) -> bytes:
    """An upload as it leaves; ids [P, k] must rise in each row."""
    mark = _UPLOAD.pack(_UPLOAD_MARK, *_sizes(layout), layout.keep, layout.temperature, layout.floor, weight)
    told = b"" if layout.dense else ids.astype(layout.id_type).tobytes()
    return mark + told + steps.astype("<u2").tobytes()


def read_upload(blob: bytes, *, layout_digest: str, max_weight: float) -> tuple[LogitLayout, Upload]:
    """An upload, checked: sizes first, then the layout that all have agreed on, then what is in it.

    Raises:
        WireError: it is not one of this federation.
    """
    if len(blob) < _UPLOAD.size:
        raise WireError("An upload of logits is too short.", expected=f"at least {_UPLOAD.size} bytes")
    mark, positions, classes, keep, temperature, floor, weight = _UPLOAD.unpack_from(blob)
    layout = _layout(mark == _UPLOAD_MARK, positions, classes, keep, temperature, floor)
    if layout.digest != layout_digest:
        raise WireError("An upload of logits is of another layout than the federation's.",
                        hint="the same --public, --kd-top-k and --kd-temperature at every party")  # fmt: skip
    if len(blob) != layout.upload_bytes:
        raise WireError(f"An upload of logits has {len(blob)} bytes.", expected=f"{layout.upload_bytes}")
    if not 0 < weight <= max_weight:
        raise WireError("An upload of logits has a weight out of range.", expected=f"above 0, up to {max_weight:g}")
    count, shape = positions * keep, (positions, keep)
    if layout.dense:
        ids, start = np.broadcast_to(np.arange(classes, dtype=np.int64), shape), _UPLOAD.size
    else:
        raw = np.frombuffer(blob, dtype=layout.id_type, count=count, offset=_UPLOAD.size).reshape(shape)
        ids, start = raw, _UPLOAD.size + count * layout.id_type.itemsize
        if raw.max() >= classes or not (raw[:, 1:] > raw[:, :-1]).all():
            raise WireError("The ids in an upload of logits are not sound.", expected=f"rising, below {classes}")
    steps = np.frombuffer(blob, dtype="<u2", count=count, offset=start).reshape(shape)
    return layout, Upload(ids=ids, steps=steps, weight=weight)


# ---- the mean


def masked_mean(layout: LogitLayout, uploads: Sequence[Upload]) -> Knowledge:
    """The weighted mean of each entry over those that sent it, in float64 and in the order given.

    Its memory is a few chunks of positions and the result.
    """
    rows = max(1, _CHUNK // (layout.keep * max(1, len(uploads))))
    parts = [_mean_of(layout, uploads, begin, begin + rows) for begin in range(0, layout.positions, rows)]
    counts, ids, values = (np.concatenate(each) for each in zip(*parts, strict=True))
    return Knowledge(
        counts=counts, ids=ids, log_probabilities=values, parties=len(uploads),
        weight=math.fsum(upload.weight for upload in uploads),
    )  # fmt: skip


def _mean_of(
    layout: LogitLayout, uploads: Sequence[Upload], begin: int, end: int
) -> tuple[Ids, Ids, npt.NDArray[np.float64]]:
    """Counts, ids and means of positions `begin` to `end`."""
    some = uploads[0].ids[begin:end]
    place = np.arange(len(some), dtype=np.int64)[:, None] * layout.classes
    keys = np.concatenate([(place + upload.ids[begin:end].astype(np.int64)).reshape(-1) for upload in uploads])
    found, where = np.unique(keys, return_inverse=True)
    weights = np.concatenate([np.full(some.size, upload.weight) for upload in uploads])
    values = np.concatenate([layout.nats(upload.steps[begin:end].reshape(-1)) for upload in uploads])
    total = np.bincount(where, weights=weights * values, minlength=len(found))
    mean = total / np.bincount(where, weights=weights, minlength=len(found))
    counts = np.bincount(found // layout.classes, minlength=len(some))
    return counts.astype(np.int64), found % layout.classes, mean


# ---- the coordinator, where it reads every upload


def check_upload(terms: RoundTerms, party: str, update: bytes) -> None:
    """Whether an upload can be part of the mean.

    Raises:
        PeerError: it cannot.
    """
    read_upload(update, layout_digest=terms.layout, max_weight=terms.max_weight)


def combine_uploads(terms: RoundTerms, updates: Mapping[str, bytes]) -> bytes:
    """The knowledge out of every party's upload; nobody but the coordinator sees one of them."""
    read = [
        read_upload(blob, layout_digest=terms.layout, max_weight=terms.max_weight)
        for _, blob in sorted(updates.items())
    ]
    if not read:
        raise PeerError("There is no upload to combine.")
    layout = read[0][0]
    return pack_knowledge(layout, masked_mean(layout, [upload for _, upload in read]))


# ---- knowledge as bytes


def pack_knowledge(layout: LogitLayout, knowledge: Knowledge) -> bytes:
    """What all parties get; the same knowledge gives the same bytes."""
    total = len(knowledge.ids)
    mark = _KNOWLEDGE.pack(
        _KNOWLEDGE_MARK, *_sizes(layout), layout.keep, layout.temperature, layout.floor, knowledge.parties, total
    )
    values = layout.steps(knowledge.log_probabilities).astype("<u2").tobytes()
    if total == layout.positions * layout.classes:
        return mark + values
    return mark + knowledge.counts.astype(_COUNT).tobytes() + knowledge.ids.astype(layout.id_type).tobytes() + values


def read_knowledge(blob: bytes, layout: LogitLayout) -> Knowledge:
    """Knowledge that came from the coordinator.

    Raises:
        WireError: it is not of this layout, or not sound.
    """
    if len(blob) < _KNOWLEDGE.size:
        raise WireError("The coordinator's knowledge is too short.", expected=f"at least {_KNOWLEDGE.size} bytes")
    mark, positions, classes, keep, temperature, floor, parties, total = _KNOWLEDGE.unpack_from(blob)
    if _layout(mark == _KNOWLEDGE_MARK, positions, classes, keep, temperature, floor) != layout or parties < 1:
        raise WireError("The coordinator's knowledge is of another layout than this party's.")
    full = total == positions * classes
    width, head = layout.id_type.itemsize, _KNOWLEDGE.size
    expected = head + 2 * total + (0 if full else _COUNT.itemsize * positions + width * total)
    if not positions * keep <= total <= positions * min(classes, parties * keep) or len(blob) != expected:
        raise WireError(f"The coordinator's knowledge has {len(blob)} bytes and {total} entries, which do not agree.")
    steps = np.frombuffer(blob, dtype="<u2", count=total, offset=len(blob) - 2 * total)
    if full:
        counts = np.full(positions, classes, dtype=np.int64)
        ids = np.tile(np.arange(classes, dtype=np.int64), positions)
    else:
        counts = np.frombuffer(blob, dtype=_COUNT, count=positions, offset=head).astype(np.int64)
        ids = np.frombuffer(blob, dtype=layout.id_type, count=total, offset=head + 4 * positions).astype(np.int64)
        _check_entries(layout, counts, ids)
    return Knowledge(counts=counts, ids=ids, log_probabilities=layout.nats(steps), parties=parties)


def _check_entries(layout: LogitLayout, counts: Ids, ids: Ids) -> None:
    sound = counts.min() >= layout.keep and counts.max() <= layout.classes and counts.sum() == len(ids)
    if sound:
        first = np.zeros(len(ids), dtype=bool)
        first[np.cumsum(counts)[:-1]] = True
        first[0] = True
        sound = ids.max() < layout.classes and bool(((np.diff(ids, prepend=-1) > 0) | first).all())
    if not sound:
        raise WireError("The coordinator's knowledge is not sound.", expected="rising ids in each position")


# ---- pieces


def largest(log_probabilities: npt.NDArray[np.float32], layout: LogitLayout) -> tuple[Ids, Steps]:
    """The k largest of each row of [p, V] and their steps, in the order of their ids."""
    if layout.dense:
        ids = np.broadcast_to(np.arange(layout.classes, dtype=np.int64), log_probabilities.shape)
    else:
        chosen = np.argpartition(log_probabilities, -layout.keep, axis=1)[:, -layout.keep :]
        ids = np.sort(chosen, axis=1).astype(np.int64)
    chosen_values: npt.NDArray[np.float32] = np.take_along_axis(log_probabilities, ids, axis=1)
    return ids, layout.steps(chosen_values)


def positions_of(knowledge: Knowledge) -> Iterator[slice]:
    """Where the entries of each position lie."""
    ends = np.cumsum(knowledge.counts)
    for count, end in zip(knowledge.counts.tolist(), ends.tolist(), strict=True):
        yield slice(end - count, end)


def _sizes(layout: LogitLayout) -> tuple[int, int]:
    return layout.positions, layout.classes


def _layout(marked: bool, positions: int, classes: int, keep: int, temperature: float, floor: float) -> LogitLayout:
    if not marked or positions * max(keep, 1) > _MOST_ENTRIES:
        raise WireError("What came are no logits.")
    try:
        return LogitLayout(positions=positions, classes=classes, keep=keep, temperature=temperature, floor=floor)
    except UsageError as error:
        raise WireError("Logits of a layout came that cannot be.") from error
