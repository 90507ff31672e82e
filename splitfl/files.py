"""Files that are never half written."""

from __future__ import annotations

import os
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file as a whole: a reader sees the old one or the new one, also after a crash.

    Args:
        path: the file; its directory is made if it is missing.
        text: all of what the file is to hold.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
