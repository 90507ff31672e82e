"""What a party must not lose between two processes: its update of the round under way, and the state it begins from.

An update goes out with the same bytes however often the round is begun again: if a mechanism drew noise for it, drawing
again would be a second release. So it is on the disk before it is first announced.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import numpy as np

from splitfl.aggregation.sums import Vector
from splitfl.errors import DataError, ResourceError
from splitfl.wire.round_frames import digest_of


class Note(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which update lies in the folder."""

    federation: str
    round: int
    kind: str
    """``vector`` (float32, little-endian) or ``bytes``."""
    weight: float
    digest: str


class RoundFiles:
    """A party's folder.

    Args:
        folder: made with mode 0700 if it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise _disk(folder, error) from error

    # ---- the update

    def saved(self, federation: str, round_: int) -> tuple[Note, bytes] | None:
        """The update of that round, if it lies here whole."""
        try:
            note = msgspec.json.decode((self.folder / "update.json").read_bytes(), type=Note)
            blob = (self.folder / "update.bin").read_bytes()
        except FileNotFoundError:
            return None
        except (msgspec.MsgspecError, OSError) as error:
            raise _damaged(self.folder) from error
        if (note.federation, note.round) != (federation, round_):
            return None
        return (note, blob) if digest_of(blob) == note.digest else None

    def save(self, federation: str, round_: int, kind: str, blob: bytes, weight: float) -> tuple[Note, bytes]:
        """Keep an update; the one that is kept already for this round stays, and is given back."""
        before = self.saved(federation, round_)
        if before is not None:
            return before
        note = Note(federation=federation, round=round_, kind=kind, weight=weight, digest=digest_of(blob))
        self._write("update.bin", blob)
        self._write("update.json", msgspec.json.encode(note))
        return note, blob

    # ---- the state

    def last_state(self) -> bytes | None:
        """The state that was kept last, if there is one."""
        try:
            return (self.folder / "state.bin").read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _disk(self.folder, error) from error

    def state(self, digest: str) -> bytes | None:
        """The state of that digest, if it lies here."""
        blob = self.last_state()
        return blob if blob is not None and digest_of(blob) == digest else None

    def save_state(self, blob: bytes) -> str:
        """Keep a state in the place of the one before; its digest."""
        self._write("state.bin", blob)
        return digest_of(blob)

    def _write(self, name: str, blob: bytes) -> None:
        """Whole or not at all, and on the disk."""
        unfinished = self.folder / f".{name}.{os.getpid()}"
        try:
            handle = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(blob)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, self.folder / name)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise _disk(self.folder, error) from error


def to_bytes(vector: Vector, length: int) -> bytes:
    """A vector as float32, little-endian.

    Raises:
        DataError: it has not `length` values, or not only finite ones.
    """
    if vector.ndim != 1 or len(vector) != length:
        raise DataError(f"An update of shape {list(vector.shape)} was given.", expected=f"[{length}]")
    if not np.isfinite(vector).all():
        raise DataError(
            "An update holds NaN or infinity; nothing was sent.", hint="lower the learning rate, or clip the gradients"
        )
    return vector.astype("<f4", copy=False).tobytes()


def from_bytes(blob: bytes) -> Vector:
    """The vector of `to_bytes`."""
    return np.frombuffer(blob, dtype="<f4").astype(np.float32, copy=False)


def _damaged(folder: Path) -> DataError:
    return DataError(
        f"The round's files in {folder} are damaged.", hint="move the folder away; this round's update is made anew"
    )


def _disk(folder: Path, error: OSError) -> ResourceError:
    return ResourceError(f"The round's files in {folder} cannot be read and written: {error.strerror}.")
