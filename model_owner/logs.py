"""The owner's log: lines of text or JSON, on stderr or in a file. Sessions have the owner's names, never a key."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from splitfl.errors import ResourceError


class JsonLines(logging.Formatter):
    """One JSON object a line: time (UTC), level, message; session and trace where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """`record` as JSON."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        session = getattr(record, "session", None)
        if session is not None:
            entry["session"] = session
        if record.exc_info:
            entry["trace"] = self.formatException(record.exc_info)
        return json.dumps(entry)


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        session = getattr(record, "session", None)
        record.about = "" if session is None else f"[{session}] "
        return super().format(record)


@contextlib.contextmanager
def logging_to(
    file: Path | None = None, *, level: str = "info", form: Literal["text", "json"] = "text"
) -> Iterator[None]:
    """The log of `splitfl` goes there while the block runs; afterwards all is as it was, for whoever called.

    A file is opened again when it was moved away: `logrotate` needs no signal.

    Raises:
        ResourceError: the file cannot be written.
    """
    try:
        handler = logging.StreamHandler(sys.stderr) if file is None else _file_handler(file)
    except OSError as error:
        raise ResourceError(f"The log {file} cannot be written: {error.strerror}.") from error
    handler.setFormatter(JsonLines() if form == "json" else _Lines("%(asctime)s %(levelname)s %(about)s%(message)s"))
    root = logging.getLogger("splitfl")
    before = root.level, root.propagate
    root.addHandler(handler)
    set_level(level)
    root.propagate = False
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()
        root.setLevel(before[0])
        root.propagate = before[1]


def set_level(level: str) -> None:
    """How much to log from now on."""
    logging.getLogger("splitfl").setLevel(level.upper())


def _file_handler(file: Path) -> logging.Handler:
    from logging.handlers import WatchedFileHandler

    file.parent.mkdir(parents=True, exist_ok=True)
    return WatchedFileHandler(file, encoding="utf-8")
