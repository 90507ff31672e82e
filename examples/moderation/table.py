"""Print what `splitfl fedmod` said about each server.

python -m examples.moderation.table SERVER...      in the folder of the run
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

CASES = ("before", "local", "after", "local, own thresholds", "after, own thresholds")
METRIC = "held-out macro F1"


def macro_f1(file: Path) -> dict[str, float]:
    """Macro F1 of each case in a file that ``--json`` wrote."""
    results = json.loads(file.read_text(encoding="utf-8"))["results"]
    return {one["case"]: one["value"] for one in results if one["metric"] == METRIC}


def table(servers: list[str], folder: Path) -> Table:
    """One line a case, one column a server, and the mean."""
    found = {server: macro_f1(folder / f"{server}.json") for server in servers}
    shown = Table("macro F1, held out", *servers, "mean")
    for case in CASES:
        values = [found[server][case] for server in servers if case in found[server]]
        if len(values) == len(servers):
            shown.add_row(case, *(f"{value:.2f}" for value in values), f"{sum(values) / len(values):.2f}")
    return shown


if __name__ == "__main__":
    Console(width=100).print(table(sys.argv[1:], Path()))
