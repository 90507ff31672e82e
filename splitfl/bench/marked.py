"""What the programs that write figures into a page share: a ``--json`` file read, and the place between two marks."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from splitfl.errors import DataError
from splitfl.files import replace_text


def read_bench(path: Path, names: Collection[str]) -> dict[str, Any]:
    """A ``--json`` file of ``splitfl bench`` under one of these names.

    Raises:
        DataError: it cannot be read, or is of another command.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        command, name = record["command"], record["settings"]["name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a file of figures ({type(error).__name__}).") from error
    if command != "bench" or name not in names:
        wanted = " or ".join(f"`{each}`" for each in names)
        raise DataError(f"{path} holds other figures.", expected=f"those of `splitfl bench`: {wanted}")
    return dict(record)


def put_between(page: Path, begin: str, text: str, end: str) -> None:
    """Replace what stands between the two marks of `page`.

    Raises:
        DataError: the page has no such marks.
    """
    before, first, rest = page.read_text(encoding="utf-8").partition(begin)
    _, last, after = rest.partition(end)
    if not first or not last:
        raise DataError(f"{page} has no place for figures.", expected=f"the lines {begin} and {end}")
    replace_text(page, f"{before}{begin}\n\n{text}\n{end}{after}")
