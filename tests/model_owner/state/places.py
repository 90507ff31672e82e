"""Databases for tests: a SQLite file, and a PostgreSQL server where one is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


@contextmanager
def postgres() -> Iterator[str]:
    """The URL of an empty database: of the server that is named, or of one that lives as long as the block.

    The server listens on a socket file alone. It refuses to run as root, and is somebody else's process then.
    """
    given = os.environ.get("SPLITFL_TEST_POSTGRES")
    if given:
        yield given
        return
    user = NOBODY if os.getuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="splitfl-pg-") as name:
        folder = Path(name)
        if user is not None:
            os.chown(folder, user, user)
        data, log = folder / "data", folder / "log"
        who = {} if user is None else {"user": user, "group": user, "extra_groups": []}
        words = ["initdb", "-D", data, "-U", "splitfl", "--auth=trust", "--no-sync", "-E", "UTF8", "--locale=C"]
        subprocess.run(words, check=True, capture_output=True, timeout=120, cwd=folder, **who)
        options = f"-c listen_addresses='' -k {folder} -c fsync=off"
        control = ["pg_ctl", "-D", data, "-w", "-t", "60"]
        subprocess.run(
            [*control, "-o", options, "-l", log, "start"], check=True, timeout=120, cwd=folder,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **who,
        )  # fmt: skip
        try:
            yield f"postgresql+psycopg://splitfl@/postgres?host={folder}"
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], check=True, capture_output=True, timeout=120,
                           cwd=folder, **who)  # fmt: skip
