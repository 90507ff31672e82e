"""A recording on disk: what crossed, byte by byte, and in a stream of its own which rows it came from.

    RECORDING/key              the file key, wrapped (`splitfl.audit.recording_keys`); without it nothing can be read
    RECORDING/000001.traffic   what crossed, as it was before CURVE
    RECORDING/000001.truth     of each forward, the data set and the numbers of its rows; neither ids nor text

Each start of a run appends a segment, a pair of files. A file is a header and records, one after the other:

    header   "splitfl recording 1\\n", stream (1 byte), number of the segment (4), salt (16)
    record   length (4), then AES-256-GCM of: length of the head (4), head (msgpack), frames end to end

Key of a file: HKDF-SHA256 of the file key, the salt, and the whole header. Nonce and associated data of a record: its
place in the file, from 0. So a record cannot be altered, left out, moved or taken into another file; the last one says
that it is the last, and a file without it was broken off: by a crash, or by whoever cut it there. Integers are
big-endian.

A file grows by one `write` a record, without a sync: a killed process loses nothing, a machine without power may.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from splitfl.errors import DataError
from splitfl.wire.codecs import Frame, nbytes

Stream: TypeAlias = Literal["traffic", "truth"]
Way: TypeAlias = Literal["sent", "received"]
"""As seen from the side that recorded."""
Role: TypeAlias = Literal["train", "held-out"]

_MAGIC = b"splitfl recording 1\n"
_STREAMS: dict[Stream, bytes] = {"traffic": b"T", "truth": b"N"}
_HEADER = struct.Struct(f">{len(_MAGIC)}scI16s")
_LENGTH = struct.Struct(">I")
_PLACE = struct.Struct(">IQ")  # 12 bytes, as GCM wants its nonce
_TAG = 16
_LARGEST_RECORD = 2**32 - 1
_FOR_THE_END = 256  # bytes of the limit that closing a file may take


class Head(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of what stands at the head of a record."""


class About(Head, frozen=True, kw_only=True, tag="about"):
    """The first record of a file: what is the same for all that follow."""

    side: Literal["party", "owner"]
    protocol: str
    hidden: dict[str, str | float] = {}
    """Mechanism on activations: its name, sigma, clip and unit."""
    gradient: dict[str, str | float] = {}
    """The same on gradients."""
    datasets: dict[Role, str] = {}
    """Digests of the examples in their order; in the stream of truth alone."""
    weights: int = -1
    """Optimiser steps made when the segment began; -1 where nobody counts them. In the stream of truth alone."""
    trains_bottom: bool = True


class Crossed(Head, frozen=True, kw_only=True, tag="crossed"):
    """One message; behind it its frames, header first."""

    way: Way
    time: float
    """Seconds since 1970."""
    kind: str
    """Its tag on the wire; ``unreadable`` if it has none."""
    session: int
    step: int | None
    sizes: tuple[int, ...]
    """Bytes of each frame."""
    again: bool = False
    """A message of this session, kind and step crossed before: a retry."""


class Origin(Head, frozen=True, kw_only=True, tag="origin"):
    """Which rows a forward was made of."""

    session: int
    step: int
    dataset: Role | None
    """None where nobody said."""
    rows: tuple[int, ...]
    """Numbers of the examples, from 0, in the order of the batch."""
    weights: int
    """Optimiser steps made before it; -1 where nobody counts them."""


class Probed(Head, frozen=True, kw_only=True, tag="probed"):
    """A forward of the owner check: no row, but made from one that had crossed, or from random numbers."""

    session: int
    step: int


class Left(Head, frozen=True, kw_only=True, tag="left"):
    """An update that left for a coordinator in the clear. Frames: the common state before it, and its values."""

    time: float
    number: int
    """Of the sum, from 0."""
    round: int
    """Of the rule."""
    stage: int
    """Sum of the rule's round."""
    sizes: tuple[int, ...]


class End(Head, frozen=True, kw_only=True, tag="end"):
    """The last record of a file."""

    records: int
    """Those before it."""
    full: bool = False
    """Whether there was more, for which the limit left no room."""


Record: TypeAlias = About | Crossed | Origin | Probed | Left | End
_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(Record)


class Room:
    """Bytes that a recording may still take; shared by all of its files.

    Args:
        limit: for all together.
        used: what is there already.
        on_full: called once, with a reason, when no more is recorded: for want of room here or on the disk.
    """

    def __init__(self, limit: int, used: int = 0, on_full: Callable[[str], None] = lambda why: None) -> None:
        self.limit, self.used, self.is_full, self._on_full = limit, used, False, on_full

    def take(self, size: int, spare: int = 0) -> bool:
        """Whether there was room for `size` bytes, and `spare` beside them; from the first no on there is none."""
        if not self.is_full and self.used + size + spare > self.limit:
            self.stop(f"its limit of {self.limit:,} bytes is reached")
        if not self.is_full:
            self.used += size
        return not self.is_full

    def stop(self, why: str) -> None:
        """Record no more."""
        if not self.is_full:
            self.is_full = True
            self._on_full(why)


class Writer:
    """Appends records to a new file, which nobody else can read (mode 0600).

    Args:
        path: of the file, which must not be there.
        key: the file key, 32 bytes.
        stream: what the file holds.
        number: of the segment.
        room: what it may take. Without room, and after a failed write, records are dropped; nothing is raised.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, path: Path, key: bytes, *, stream: Stream, number: int, room: Room) -> None:
        header = _HEADER.pack(_MAGIC, _STREAMS[stream], number, os.urandom(16))
        self.path, self.room, self._box, self._place = path, room, AESGCM(_key_of(key, header)), 0
        self._open = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
        self._closed = self._cut = False
        """Whether it is closed, and whether a record was dropped."""
        room.used += len(header)
        os.write(self._open, header)

    def write(self, head: Record, frames: Sequence[Frame] = ()) -> bool:
        """Append a record; whether it is in the file."""
        return not self._closed and self._append(head, frames, spare=2 * _FOR_THE_END)

    def close(self) -> None:
        """Append the closing record, and close. May be called twice."""
        if self._closed:
            return
        self._closed = True
        try:
            self._put(self._sealed(_ENCODER.encode(End(records=self._place, full=self._cut)), ()))
            os.fsync(self._open)
        except OSError as error:
            self.room.stop(f"{self.path.name} cannot be written: {error.strerror}")
        finally:
            os.close(self._open)

    def _append(self, head: Record, frames: Sequence[Frame], spare: int) -> bool:
        packed = _ENCODER.encode(head)
        size = 2 * _LENGTH.size + len(packed) + sum(map(nbytes, frames)) + _TAG
        if size > _LARGEST_RECORD:
            self.room.stop("one message is too large for a record")
        if not self.room.take(size, spare):
            self._cut = True
            return False
        try:
            self._put(self._sealed(packed, frames))
        except OSError as error:
            self._cut = True
            self.room.stop(f"{self.path.name} cannot be written: {error.strerror}")
            return False
        return True

    def _sealed(self, packed: bytes, frames: Sequence[Frame]) -> bytes:
        place = _PLACE.pack(0, self._place)
        content = b"".join([_LENGTH.pack(len(packed)), packed, *frames])
        sealed = self._box.encrypt(place, content, place)
        return _LENGTH.pack(len(sealed)) + sealed

    def _put(self, record: bytes) -> None:
        """Whole, or not at all: what was half written is taken back, so that what comes later can be read."""
        start = os.lseek(self._open, 0, os.SEEK_END)
        rest = memoryview(record)
        try:
            while rest:
                rest = rest[os.write(self._open, rest) :]
        except OSError:
            os.ftruncate(self._open, start)
            raise
        self._place += 1


@dataclass(kw_only=True)
class Reader:
    """The records of one file, in order.

    Raises:
        DataError: on the way, if the file was altered or is none of this key.
    """

    path: Path
    key: bytes
    """The file key."""
    stream: Stream
    number: int
    end: End | None = None
    """The closing record, once everything has been read; None if the file was broken off."""

    def __iter__(self) -> Iterator[tuple[Record, tuple[bytes, ...]]]:
        """Head and frames of each record but the closing one."""
        self.end = None
        try:
            with self.path.open("rb") as file:
                yield from self._records(file.read, os.fstat(file.fileno()).st_size)
        except OSError as error:
            raise DataError(f"The recording {self.path} cannot be read: {error.strerror}.") from error

    def _records(self, read: Callable[[int], bytes], size: int) -> Iterator[tuple[Record, tuple[bytes, ...]]]:
        header = read(_HEADER.size)
        if header[: len(_MAGIC) + 5] != _MAGIC + _STREAMS[self.stream] + struct.pack(">I", self.number):
            if _MAGIC.startswith(header):
                return  # broken off before there was anything
            raise DataError(f"{self.path} is not part {self.number} of a recording of {self.stream}.")
        if len(header) < _HEADER.size:
            return
        box, place, left = AESGCM(_key_of(self.key, header)), 0, size - len(header)
        while left >= _LENGTH.size:
            if self.end is not None:
                raise self._altered("something stands behind its last record")
            (length,) = _LENGTH.unpack(read(_LENGTH.size))
            left -= _LENGTH.size + length
            if left < 0:
                return  # broken off in the middle of a record
            head, frames = self._opened(box, read(length), place)
            place += 1
            if isinstance(head, End):
                if head.records != place - 1:
                    raise self._altered("its last record counts others than there are")
                self.end = head
            else:
                yield head, frames
        if left and self.end is not None:
            raise self._altered("something stands behind its last record")

    def _opened(self, box: AESGCM, sealed: bytes, place: int) -> tuple[Record, tuple[bytes, ...]]:
        bound = _PLACE.pack(0, place)
        try:
            content = box.decrypt(bound, sealed, bound)
        except (InvalidTag, ValueError):
            raise self._altered(f"record {place} does not open") from None
        (length,) = _LENGTH.unpack_from(content)
        begin = _LENGTH.size + length
        try:
            head: Record = _DECODER.decode(memoryview(content)[_LENGTH.size : begin])
        except msgspec.MsgspecError as error:
            raise DataError(f"{self.path} was written by another version of splitfl.") from error
        frames = []
        for each in getattr(head, "sizes", ()):
            frames.append(content[begin : begin + each])
            begin += each
        return head, tuple(frames)

    def _altered(self, what: str) -> DataError:
        return DataError(
            f"The recording {self.path} was altered, or belongs to another key: {what}.",
            hint="what it says cannot be relied on; record the run again",
        )


def _key_of(key: bytes, header: bytes) -> bytes:
    return HKDF(SHA256(), length=32, salt=header[-16:], info=b"splitfl recording file" + header).derive(key)
