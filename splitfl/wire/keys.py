"""CURVE keys on disk, and the list of parties that an owner admits.

A pair is two files in ZeroMQ's certificate format, so that `zmq.auth.load_certificate` reads them too:

    NAME.key          the public key; give it to the other side
    NAME.key_secret   both keys; mode 0600 from the moment it exists, and it never leaves this machine

NAME.key also holds the party's signing key (see `splitfl.wire.signing`), which follows from the secret.

An allow-list is a folder of public files, one a party: the file name is the party's name, removing the file revokes it.

What CURVE gives: the other side holds the secret to the key that is pinned here, and nobody between reads or changes a
byte. What it does not give: a chain of trust (compare fingerprints over another road), hiding of sizes and timing,
safety against a quantum computer, and nothing at all against the other side itself: that is what protocols are for.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from splitfl.errors import KeyFileError, UsageError, printable
from splitfl.wire.signing import checked_lines, metadata_lines, public_half
from splitfl.wire.z85 import z85_decode as z85_decode

PUBLIC_SUFFIX, SECRET_SUFFIX = ".key", ".key_secret"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_KEY_LINE = re.compile(r'\s*(public-key|secret-key)\s*=\s*"([^"]*)"\s*')
_MAX_FILE_BYTES = 16 * 1024


@dataclass(frozen=True, kw_only=True)
class KeyPair:
    """One side's CURVE keys, in Z85 (40 ASCII bytes each). Printing it does not show the secret."""

    public: bytes
    secret: bytes = field(repr=False)


# ---- one pair


def new_keys(name: str, folder: Path, *, force: bool = False) -> tuple[Path, Path]:
    """Make a key pair.

    Args:
        name: letters, digits, ``.``, ``_`` and ``-``; the files are called after it.
        folder: where to write; made with mode 0700 if it does not exist.
        force: replace a pair of that name.

    Returns:
        The paths of the public and the secret file.

    Raises:
        UsageError: `name` is not usable.
        KeyFileError: a file of that name exists, or the folder cannot be written.
    """
    # The generator is libzmq's, and only `channel` imports zmq; `channel` in turn needs this file.
    from splitfl.wire.channel import curve_keypair

    stem = folder / check_name(name)
    public_path, secret_path = Path(f"{stem}{PUBLIC_SUFFIX}"), Path(f"{stem}{SECRET_SUFFIX}")
    for path in (public_path, secret_path):
        if path.exists() and not force:
            raise KeyFileError(
                f"There is a key file {path} already.", hint="choose another name; whoever knows the old key needs it"
            )
    keys = curve_keypair()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write(secret_path, _certificate(keys.public, keys.secret), mode=0o600)
        _write(public_path, _public_certificate(keys), mode=0o644)
    except OSError as error:
        raise KeyFileError(f"The key pair {stem} cannot be written: {error.strerror}.") from error
    return public_path, secret_path


def renew_public(secret_path: Path) -> Path:
    """Write NAME.key beside NAME.key_secret again: as `new_keys` does, with the signing key.

    Returns:
        The path of the public file.

    Raises:
        KeyFileError: the secret file cannot be used, a public file of that name holds another key, or the folder
            cannot be written.
    """
    if secret_path.suffix != SECRET_SUFFIX:
        raise KeyFileError(f"{secret_path} is not a secret key file.", expected=f"NAME{SECRET_SUFFIX}")
    keys = load_keys(secret_path)
    path = secret_path.with_name(f"{check_name(secret_path.stem)}{PUBLIC_SUFFIX}")
    if path.exists() and load_public(path) != keys.public:
        raise KeyFileError(f"{path} holds another key than {secret_path}.", hint="move one of them away")
    try:
        _write(path, _public_certificate(keys), mode=0o644)
    except OSError as error:
        raise KeyFileError(f"{path} cannot be written: {error.strerror}.") from error
    return path


def load_keys(path: Path) -> KeyPair:
    """The pair in a secret key file.

    Raises:
        KeyFileError: the file is missing, malformed, holds only the public key, or can be read by others.
    """
    text = _read(path)
    _check_private(path)
    public, secret = _parse(path, text)
    if secret is None:
        raise KeyFileError(
            f"The key file {path} holds only a public key.",
            expected=f"the secret file, usually called {path.stem}{SECRET_SUFFIX}",
        )
    return KeyPair(public=public, secret=secret)


def load_public(path: Path) -> bytes:
    """The public key (Z85) in a key file of either kind.

    Raises:
        KeyFileError: the file is missing or malformed.
    """
    public, _ = _parse(path, _read(path))
    return public


def find_signing(path: Path) -> Ed25519PublicKey | None:
    """The signing key in a public key file, checked to belong to its CURVE key; None if the file has none.

    Raises:
        KeyFileError: the file is missing or malformed, or the signing key belongs to another key.
    """
    text = _read(path)
    return public_half(text, z85_decode(_parse(path, text)[0]))


def load_signing(path: Path) -> Ed25519PublicKey:
    """As `find_signing`, where there must be one.

    Raises:
        KeyFileError: as there, and where the file was made before there were signing keys.
    """
    key = find_signing(path)
    if key is None:
        raise KeyFileError(
            f"The key file {path} has no signing key, so its party cannot take part in a secure sum.",
            expected="the lines signing-key and signing-proof",
            hint=f"its owner runs `splitfl keys identity {path.stem}{SECRET_SUFFIX}` and hands out the new {path.name}",
        )
    return key


def fingerprint(public_key: bytes) -> str:
    """A short form of a public key, to be compared by eye or read out over the telephone.

    ``SHA256:`` and eight groups of four letters: the first 160 bits of the SHA-256 of the key's 32 bytes, in base32
    (A-Z and 2-7, so neither 0 nor 1 can be misread).

    Args:
        public_key: in Z85.
    """
    digest = hashlib.sha256(z85_decode(public_key)).digest()[:20]
    text = base64.b32encode(digest).decode("ascii")
    return "SHA256:" + "-".join(text[i : i + 4] for i in range(0, len(text), 4))


def check_name(name: str) -> str:
    """`name`, if it can be a party's name and a file's.

    Raises:
        UsageError: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{printable(name, limit=80)!r} cannot be the name of a key.",
            expected="1 to 64 letters, digits, '.', '_' or '-', the first a letter, a digit or '_'",
        )
    return name


# ---- the parties that an owner admits


class AllowList:
    """A folder of public key files, read again whenever it has changed. A missing folder admits nobody.

    A file that cannot be used is left out and named in `problems`; the others still count.

    Args:
        folder: holds NAME.key for each party admitted.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: dict[str, str] = {}
        """File name to what is wrong with it."""
        self._names: dict[bytes, str] = {}
        self._seen: frozenset[tuple[str, int, int, int]] | None = None
        self.reload()

    def allowed(self, public_key: bytes) -> str | None:
        """The name under which `public_key` (Z85) is admitted at this moment, or None."""
        if self._listing() != self._seen:
            self.reload()
        return self._names.get(public_key)

    def names(self) -> list[str]:
        """Every party admitted at this moment, sorted."""
        if self._listing() != self._seen:
            self.reload()
        return sorted(self._names.values())

    def reload(self) -> None:
        """Read the folder again. What cannot be read for want of file handles stays as it was, for the time being."""
        seen, before = self._listing(), self._names
        if seen is None:
            return
        self._seen, self._names, self.problems = seen, {}, {}
        for file_name in sorted(entry[0] for entry in seen):
            try:
                self._admit(self.folder / file_name)
            except (KeyFileError, UsageError) as error:
                if _is_out_of_handles(error.__cause__):
                    self._names, self._seen = before, None  # looked at again next time
                    return
                self.problems[file_name] = error.problem

    def add(self, path: Path) -> str:
        """Admit the party whose public file is at `path`, under that file's name.

        Returns:
            The party's name.

        Raises:
            KeyFileError: the file is not a public key file, or name or key are taken.
        """
        text = _read(path)
        public, secret = _parse(path, text)
        if secret is not None or path.suffix != PUBLIC_SUFFIX:
            raise KeyFileError(
                f"{path} is not a public key file.",
                expected=f"NAME{PUBLIC_SUFFIX}; the secret file stays with the party",
            )
        name, signing = check_name(path.stem), checked_lines(text, z85_decode(public))
        self.reload()
        holder = self._names.get(public)
        if holder == name and not signing:
            return name
        target = self.folder / f"{name}{PUBLIC_SUFFIX}"
        if holder not in (None, name):
            raise KeyFileError(f"This key is admitted already, as {holder!r}.")
        if holder is None and target.exists():
            raise KeyFileError(f"Another key is admitted as {name!r}.", hint="revoke it first, or choose another name")
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write(target, _certificate(public, metadata=signing), mode=0o644)
        except OSError as error:
            raise KeyFileError(f"The allow-list {self.folder} cannot be written: {error.strerror}.") from error
        self.reload()
        return name

    def revoke(self, name: str) -> None:
        """Take a party off the list: new connections are refused from now on.

        Raises:
            KeyFileError: no such party is admitted.
        """
        path = self.folder / f"{check_name(name)}{PUBLIC_SUFFIX}"
        try:
            path.unlink()
        except FileNotFoundError:
            admitted = ", ".join(self.names()) or "nobody"
            raise KeyFileError(f"No party called {name!r} is admitted.", expected=admitted) from None
        except OSError as error:
            raise KeyFileError(f"{path} cannot be removed: {error.strerror}.") from error
        self.reload()

    def _admit(self, path: Path) -> None:
        name = check_name(path.stem)
        public, secret = _parse(path, _read(path))
        if secret is not None:
            raise KeyFileError("It holds a secret key, which belongs to the party alone.")
        if public in self._names:
            raise KeyFileError(f"It holds the same key as {self._names[public]}{PUBLIC_SUFFIX}.")
        self._names[public] = name

    def _listing(self) -> frozenset[tuple[str, int, int, int]] | None:
        """Name, inode, size and time of change of each key file: differs whenever one of them was touched.

        What was seen last, if there is no file handle left to look with: otherwise anybody who opens connections
        until that is so would have every party revoked.
        """
        try:
            return frozenset(self._entries())
        except OSError as error:
            return self._seen if _is_out_of_handles(error) else frozenset()

    def _entries(self) -> Iterator[tuple[str, int, int, int]]:
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if not entry.name.endswith(PUBLIC_SUFFIX) or entry.name.startswith("."):
                    continue
                try:
                    found = entry.stat()
                except OSError:  # a dangling link, or gone since
                    yield entry.name, 0, 0, 0
                else:
                    yield entry.name, found.st_ino, found.st_size, found.st_mtime_ns


# ---- files


def _is_out_of_handles(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)


def _public_certificate(keys: KeyPair) -> str:
    return _certificate(keys.public, metadata=metadata_lines(z85_decode(keys.public), z85_decode(keys.secret)))


def _certificate(public: bytes, secret: bytes | None = None, metadata: Sequence[str] = ()) -> str:
    what = "Secret key: it stays on this machine" if secret else "Public key: compare its fingerprint"
    lines = [f"#   CURVE certificate. {what}.", "", "metadata", *metadata, "curve"]
    lines.append(f'    public-key = "{public.decode("ascii")}"')
    if secret:
        lines.append(f'    secret-key = "{secret.decode("ascii")}"')
    return "\n".join(lines) + "\n"


def _write(path: Path, text: str, *, mode: int) -> None:
    """Write whole or not at all; the file has its mode before it has any content."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with suppress(FileNotFoundError):
        temporary.unlink()
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise KeyFileError(f"There is no key file {path}.", hint="make a pair with: splitfl keys new NAME") from None
    except OSError as error:
        raise KeyFileError(f"The key file {path} cannot be read: {error.strerror}.") from error
    if len(content) > _MAX_FILE_BYTES:
        raise KeyFileError(f"{path} is too long for a key file.", expected=f"at most {_MAX_FILE_BYTES} bytes")
    return content.decode("utf-8", "replace")


def _parse(path: Path, text: str) -> tuple[bytes, bytes | None]:
    """Public and, if there is one, secret key (Z85)."""
    found = {match[1]: match[2] for line in text.splitlines() if (match := _KEY_LINE.fullmatch(line))}
    try:
        keys = {name: value.encode("ascii") for name, value in found.items()}
        for key in keys.values():
            z85_decode(key)
        return keys["public-key"], keys.get("secret-key")
    except (KeyError, UnicodeEncodeError, KeyFileError):
        raise KeyFileError(
            f"{path} is not a CURVE key file.",
            expected='a line public-key = "..." with 40 characters of Z85',
            hint="make a pair with: splitfl keys new NAME",
        ) from None


def _check_private(path: Path) -> None:
    """Refuse a secret that others can read. Not on Windows, whose modes say nothing about it."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if os.name == "posix" and mode & 0o077:
        raise KeyFileError(
            f"The secret key file {path} can be used by others (mode {mode:04o}).",
            expected="mode 0600",
            hint=f"chmod 600 {path}",
        )
