"""The key of a recording: drawn at random, wrapped by one that follows from its holder's secret, destroyed on request.

    RECORDING/key             magic, kind (1 byte), salt (16), nonce (12), AES-256-GCM of the file key (32 + 16)
    RECORDING/recording.key   where a run has no keys: what the file key is wrapped by, in hexadecimal

The wrapping key is HKDF-SHA256 of the CURVE secret (32 bytes) and the salt. What is gone with `key` is gone for good,
also for whoever holds the secret: so forgetting begins there. An overwritten block may survive below the file system
(flash memory, snapshots, backups); where that matters, the recording belongs on an encrypted disk.
"""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from splitfl.audit.recording import Reader, Room, Stream, Writer
from splitfl.errors import DataError, KeyFileError, UsageError
from splitfl.wire.keys import KeyPair
from splitfl.wire.z85 import z85_decode

KEY_FILE, OPEN_KEY_FILE = "key", "recording.key"
_MAGIC = b"splitfl recording key 1\n"
_CURVE, _OPEN = b"C", b"L"
_SIZE = len(_MAGIC) + 1 + 16 + 12 + 32 + 16
_SUFFIXES: tuple[Stream, ...] = ("traffic", "truth")


@dataclass(frozen=True, kw_only=True)
class Vault:
    """A folder of recorded files and the key to them."""

    folder: Path
    key: bytes = field(repr=False)

    @property
    def size(self) -> int:
        """Bytes of all that is there."""
        return sum(path.stat().st_size for path in self.folder.iterdir() if path.is_file())

    def numbers(self) -> list[int]:
        """Of the segments of a run, in order."""
        stems = {path.stem for suffix in _SUFFIXES for path in self.folder.glob(f"*.{suffix}")}
        return sorted(int(stem) for stem in stems if stem.isdigit())

    def path(self, stream: Stream, number: int) -> Path:
        """Where a stream of a segment stands."""
        return self.folder / f"{number:06d}.{stream}"

    def writer(self, stream: Stream, number: int, room: Room) -> Writer:
        """A new file."""
        return Writer(self.path(stream, number), self.key, stream=stream, number=number, room=room)

    def reader(self, stream: Stream, number: int) -> Reader:
        """The records of a file."""
        return Reader(path=self.path(stream, number), key=self.key, stream=stream, number=number)


def open_vault(folder: Path, keys: KeyPair | None) -> Vault:
    """The vault in `folder`.

    Args:
        folder: of the recording.
        keys: the CURVE pair of whoever recorded; None where there was none.

    Raises:
        UsageError: there is no recording, or it was forgotten.
        KeyFileError: another key is needed.
        DataError: the file of the key is damaged.
    """
    try:
        wrapped = (folder / KEY_FILE).read_bytes()
    except FileNotFoundError:
        if folder.is_dir() and any(path.suffix in (".traffic", ".truth") for path in folder.iterdir()):
            raise UsageError(
                f"The key of the recording {folder} has been destroyed: nobody can read it any more.",
                hint="remove the folder, and record again",
            ) from None
        raise UsageError(f"There is no recording in {folder}.", hint="run it with --record") from None
    except OSError as error:
        raise KeyFileError(f"{folder / KEY_FILE} cannot be read: {error.strerror}.") from error
    if len(wrapped) != _SIZE or not wrapped.startswith(_MAGIC):
        raise DataError(f"{folder / KEY_FILE} is not the key of a recording.")
    kind, rest = wrapped[len(_MAGIC) :][:1], wrapped[len(_MAGIC) + 1 :]
    if kind == _CURVE and keys is None:
        raise KeyFileError(
            f"The recording {folder} was made by the holder of a key.", hint="name the secret file with --key"
        )
    secret = z85_decode(keys.secret) if kind == _CURVE and keys is not None else _open_secret(folder)
    salt, nonce, sealed = rest[:16], rest[16:28], rest[28:]
    try:
        key = AESGCM(_wrapping(secret, salt)).decrypt(nonce, sealed, _MAGIC + kind)
    except InvalidTag:
        raise KeyFileError(
            f"This key does not open the recording {folder}, or its key file was altered.",
            expected="the secret key under which it was recorded",
        ) from None
    return Vault(folder=folder, key=key)


def make_vault(folder: Path, keys: KeyPair | None) -> Vault:
    """The vault in `folder`; a new one (mode 0700) where there is none.

    Raises:
        KeyFileError, DataError: as for `open_vault`.
        UsageError: what is there was forgotten, or begun under a key that is gone.
        OSError: it cannot be made.
    """
    if (folder / KEY_FILE).exists() or (folder.is_dir() and any(folder.glob("*.traf*"))):
        return open_vault(folder, keys)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    kind = _OPEN if keys is None else _CURVE
    if keys is None:
        _write_private(folder / OPEN_KEY_FILE, secrets.token_hex(32).encode() + b"\n")
    secret = _open_secret(folder) if keys is None else z85_decode(keys.secret)
    key, salt, nonce = secrets.token_bytes(32), secrets.token_bytes(16), secrets.token_bytes(12)
    sealed = AESGCM(_wrapping(secret, salt)).encrypt(nonce, key, _MAGIC + kind)
    _write_private(folder / KEY_FILE, _MAGIC + kind + salt + nonce + sealed)
    return Vault(folder=folder, key=key)


def forget(folder: Path) -> int:
    """Destroy a recording: its key first, overwritten and removed, then what it opened. Nothing has to be there.

    Returns:
        Bytes that were removed.

    Raises:
        OSError: something is there that cannot be removed.
    """
    removed = 0
    if not folder.is_dir():
        return removed
    for name in (KEY_FILE, OPEN_KEY_FILE):
        for path in (folder / name, *folder.glob(f".{name}.*")):
            removed += _destroy(path)
    _sync(folder)
    for suffix in _SUFFIXES:
        for path in folder.glob(f"*.{suffix}"):
            with suppress(FileNotFoundError):
                removed += path.lstat().st_size
                path.unlink()
    with suppress(OSError):  # other people's files stay where they are
        folder.rmdir()
    return removed


# ---- files


def _destroy(path: Path) -> int:
    try:
        size = path.lstat().st_size
        if not path.is_symlink():
            with path.open("r+b") as file:
                file.write(os.urandom(size))
                file.flush()
                os.fsync(file.fileno())
        path.unlink()
    except FileNotFoundError:
        return 0
    return size


def _sync(folder: Path) -> None:
    """So that no crash brings a removed name back."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _wrapping(secret: bytes, salt: bytes) -> bytes:
    return HKDF(SHA256(), length=32, salt=salt, info=b"splitfl recording key").derive(secret)


def _open_secret(folder: Path) -> bytes:
    path = folder / OPEN_KEY_FILE
    try:
        if os.name == "posix" and stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise KeyFileError(f"{path} can be used by others.", expected="mode 0600", hint=f"chmod 600 {path}")
        secret = bytes.fromhex(path.read_text(encoding="ascii").strip())
    except OSError as error:
        raise KeyFileError(f"The key {path} cannot be read: {error.strerror}.") from error
    except ValueError:
        secret = b""
    if len(secret) != 32:
        raise KeyFileError(f"{path} is not the key of a recording.", expected="64 hexadecimal digits")
    return secret


def _write_private(path: Path, content: bytes) -> None:
    """Whole or not at all; the file has its mode before it has any content."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
