"""An owner that can be killed and comes back at the same address, and its files: for `bench soak` and `bench chaos`."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from splitfl.bench.children import Owner, run_to_end
from splitfl.wire.keys import AllowList, new_keys

BOTTOM, TOP = 2, 2


@dataclass(frozen=True, kw_only=True)
class Home:
    """What an owner and its parties have on disk."""

    model: Path
    kit: Path
    keys: Path
    logs: Path

    def link(self, party: str, address: str) -> list[str]:
        """Options by which a command of `party` reaches the owner at `address`."""
        return [
            "--kit", str(self.kit), "--owner", address, "--owner-key", str(self.keys / "owner.key"),
            "--key", str(self.keys / f"{party}.key_secret"),
        ]  # fmt: skip


def assets() -> Path:
    """The directory of the embedded model and its rows."""
    return Path(str(resources.files("splitfl") / "assets"))


def furnish(folder: Path, parties: Sequence[str]) -> Home:
    """Keys, an allow-list and a kit of the embedded model in `folder`.

    Raises:
        ResourceError: the kit could not be written.
    """
    home = Home(model=assets() / "model", kit=folder / "kit", keys=folder / "keys", logs=folder)
    for name in ("owner", *parties):
        new_keys(name, home.keys)
    allow = AllowList(home.keys / "parties")
    for name in parties:
        allow.add(home.keys / f"{name}.key")
    cut = ["--bottom", str(BOTTOM), "--top", str(TOP), "--no-verify"]
    run_to_end(["splitfl", "kit", str(home.kit), "--model", str(home.model), *cut], log=folder / "kit.log")
    return home


class Served:
    """A real ``splitfl serve`` with one thread; a context. Started again, it has the address that it had.

    Args:
        home: its files.
        name: for its log.
        options: more for ``splitfl serve``.
    """

    def __init__(self, home: Home, name: str, options: Sequence[str] = ()) -> None:
        self.home, self.name, self._options = home, name, list(options)
        self.address = "tcp://127.0.0.1:0"
        self.starts = 0
        self._owner: Owner | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def start(self) -> None:
        """Start, and wait until it can be used.

        Raises:
            ResourceError, UnreachableError: it ended, or did not get ready.
        """
        with self._lock:
            home = self.home
            words = ["--model", str(home.model), "--kit", str(home.kit), "--bind", self.address, *self._options]
            words += ["--key", str(home.keys / "owner.key_secret"), "--parties", str(home.keys / "parties")]
            self._owner = Owner(words, threads=1, log=home.logs / f"{self.name}.log")
            self.address = self._owner.address()
            self.starts += 1

    def kill(self) -> None:
        """SIGKILL, at once."""
        with self._lock:
            if self._owner is not None:
                self._owner.process.kill()
                self._owner.end()
                self._owner = None

    def kill_and_restart(self) -> None:
        """Both; returns when it serves again."""
        self.kill()
        self.start()

    def end(self) -> None:
        """Tell it to stop, as one does."""
        with self._lock:
            if self._owner is not None:
                self._owner.end()
                self._owner = None

    def resident(self) -> int | None:
        """Bytes that it holds in memory; None while there is none."""
        owner = self._owner
        return None if owner is None else resident(owner.process.pid)

    def cpu_seconds(self) -> float:
        """Processor time of the present one."""
        owner = self._owner
        return 0.0 if owner is None else owner.cpu_seconds()


def resident(pid: int) -> int | None:
    """Resident memory of a process in bytes; None if it is gone."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return None
