"""Blobs on disk, each under the digest of what is in it. A blob that is there is whole, also after a crash.

No name comes from a peer: a blob is called after the digest that was computed here.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Set
from pathlib import Path

from splitfl.errors import ResourceError
from splitfl.wire.round_frames import Frame

_DIGEST_BYTES = 32


class Upload:
    """A blob that is coming in, piece by piece, in order."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("xb")
        self._hash = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        self.size = 0

    def write(self, piece: Frame) -> None:
        """Add the next piece.

        Raises:
            ResourceError: the disk does not take it.
        """
        try:
            self._file.write(piece)
        except OSError as error:
            raise _disk(self._path.parent, error) from error
        self._hash.update(piece)
        self.size += len(piece)

    def digest(self) -> str:
        """Of all that has come."""
        return self._hash.hexdigest()

    def settle(self, target: Path) -> None:
        """Put it on the disk for good, as `target`."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._path, target)
            _sync_folder(target.parent)
        except OSError as error:
            raise _disk(target.parent, error) from error

    def drop(self) -> None:
        """Forget it."""
        with contextlib.suppress(OSError):
            self._file.close()
        self._path.unlink(missing_ok=True)


class Vault:
    """The blobs of one federation.

    Args:
        folder: made with mode 0700 if it does not exist. Uploads that a crash left unfinished are removed.

    Raises:
        ResourceError: the folder cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._incoming = folder, folder / "incoming"
        self._count = 0
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            shutil.rmtree(self._incoming, ignore_errors=True)
            self._incoming.mkdir(mode=0o700)
        except OSError as error:
            raise _disk(folder, error) from error

    def upload(self) -> Upload:
        """A place for a blob to come in."""
        self._count += 1
        try:
            return Upload(self._incoming / str(self._count))
        except OSError as error:
            raise _disk(self.folder, error) from error

    def take(self, upload: Upload) -> str:
        """Keep what has come in; its digest. When this returns it is on the disk."""
        digest = upload.digest()
        upload.settle(self._path(digest))
        return digest

    def put(self, blob: bytes) -> str:
        """Keep a blob of our own; its digest."""
        upload = self.upload()
        try:
            upload.write(blob)
            return self.take(upload)
        except BaseException:
            upload.drop()
            raise

    def holds(self, digest: str) -> bool:
        """Whether a blob is here."""
        return self._path(digest).is_file()

    def size(self, digest: str) -> int:
        """Bytes of a blob.

        Raises:
            ResourceError: it is gone.
        """
        try:
            return self._path(digest).stat().st_size
        except OSError as error:
            raise _disk(self.folder, error) from error

    def read(self, digest: str) -> bytes:
        """A whole blob.

        Raises:
            ResourceError: it is gone.
        """
        try:
            return self._path(digest).read_bytes()
        except OSError as error:
            raise _disk(self.folder, error) from error

    def piece(self, digest: str, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on; fewer at the end of the blob."""
        try:
            with self._path(digest).open("rb", buffering=0) as file:
                file.seek(offset)
                return file.read(size) or b""
        except OSError as error:
            raise _disk(self.folder, error) from error

    def keep(self, needed: Set[str]) -> None:
        """Remove every blob that is not `needed`."""
        with os.scandir(self.folder) as entries:
            unneeded = [entry.name for entry in entries if entry.is_file() and entry.name not in needed]
        for name in unneeded:
            (self.folder / name).unlink(missing_ok=True)

    def _path(self, digest: str) -> Path:
        return self.folder / digest


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _disk(folder: Path, error: OSError) -> ResourceError:
    return ResourceError(
        f"The federation's blobs in {folder} cannot be read and written: {error.strerror}.",
        hint="check the disk, and that you may write there; then start again with --resume",
    )
