"""Databases for tests: a SQLite file, and a PostgreSQL server where one is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NOBODY = 65534


def missing_postgres() -> str | None:
    """Why there is no PostgreSQL to test with; None if there is."""
    try:
        import psycopg  # noqa: F401
    except ImportError:
        return "psycopg is not installed (extra postgres)"
    if os.environ.get("SPLITFL_TEST_POSTGRES") or (shutil.which("initdb") and shutil.which("postgres")):
        return None
    return "no server in SPLITFL_TEST_POSTGRES, and neither initdb nor postgres is on the PATH"


class Server:
    """A server of PostgreSQL that listens on a socket file alone, in this folder."""

    def __init__(self, folder: Path, who: dict[str, Any]) -> None:
        self.url = f"postgresql+psycopg://splitfl@/postgres?host={folder}"
        self._folder, self._who = folder, who

    def start(self) -> None:
        options = f"-c listen_addresses='' -k {self._folder} -c fsync=off"
        self._control("-o", options, "-l", self._folder / "log", "start")

    def stop(self) -> None:
        """At once, as a crash would: it recovers when it is started again."""
        self._control("-m", "immediate", "stop")

    def _control(self, *words: Any) -> None:
        subprocess.run(
            ["pg_ctl", "-D", self._folder / "data", "-w", "-t", "60", *words], check=True, timeout=120,
            cwd=self._folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            **self._who,
        )  # fmt: skip


@contextmanager
def postgres() -> Iterator[str]:
    """The URL of an empty database: of the server that is named, or of one that lives as long as the block."""
    given = os.environ.get("SPLITFL_TEST_POSTGRES")
    if given:
        yield given
        return
    with own_server() as server:
        yield server.url


@contextmanager
def own_server() -> Iterator[Server]:
    """A running server. It refuses to run as root, and is somebody else's process then."""
    user = NOBODY if os.getuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="splitfl-pg-") as name:
        folder = Path(name)
        if user is not None:
            os.chown(folder, user, user)
        who: dict[str, Any] = {} if user is None else {"user": user, "group": user, "extra_groups": []}
        words = ["initdb", "-D", folder / "data", "-U", "splitfl", "--auth=trust", "--no-sync", "-E", "UTF8"]
        subprocess.run([*words, "--locale=C"], check=True, capture_output=True, timeout=120, cwd=folder, **who)
        server = Server(folder, who)
        server.start()
        try:
            yield server
        finally:
            server.stop()
