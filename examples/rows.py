"""What the recipes share: reading, choosing and writing rows."""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from splitfl.errors import DataError

SKIPPED = 77
"""Exit code of a recipe whose data or weights are not on this machine, as test drivers know it."""

Record = dict[str, Any]


def need(data: Path, *names: str) -> None:
    """End with `SKIPPED` and a message where a data set is not in the folder that the user named."""
    for name in names:
        if not (data / name).is_dir():
            print(f"skipped: {name} is not in {data}; its README says where it comes from", file=sys.stderr)
            raise SystemExit(SKIPPED)


def read(folder: Path, split: str) -> list[Record]:
    """The rows of ``SPLIT.jsonl`` or ``SPLIT.jsonl.gz``.

    Raises:
        DataError: neither is there.
    """
    plain, packed = folder / f"{split}.jsonl", folder / f"{split}.jsonl.gz"
    if not plain.is_file() and not packed.is_file():
        raise DataError(f"{folder} has no {plain.name}", expected=f"{plain.name} or {packed.name}")
    with plain.open(encoding="utf-8") if plain.is_file() else gzip.open(packed, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def drawn(rows: Iterable[Record], count: int, salt: str = "") -> list[Record]:
    """At most `count` rows, drawn by a hash of what they hold: the same ones whatever their order. Each row once."""

    def rank(row: Record) -> bytes:
        return hashlib.sha256((salt + json.dumps(row, sort_keys=True)).encode()).digest()

    return [row for _, row in sorted({rank(row): row for row in rows}.items())[:count]]


def write(path: Path, rows: Sequence[Record]) -> None:
    """Rows as JSON Lines; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def lines(path: Path) -> list[Record]:
    """The rows of a file of JSON Lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def named(pairs: Sequence[str]) -> dict[str, Path]:
    """``NAME=PATH`` words as a mapping.

    Raises:
        SystemExit: a word without ``=``.
    """
    for pair in pairs:
        if "=" not in pair:
            raise SystemExit(f"{pair!r} is not NAME=PATH")
    return {name: Path(path) for name, path in (pair.split("=", 1) for pair in pairs)}
