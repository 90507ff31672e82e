"""`python -m splitfl.bench.frameworks_page FILE`: the table of `splitfl bench frameworks` in docs/federation.md.

FILE is what the benchmark wrote with ``--json``; the part of it that the table needs is kept as docs/frameworks.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from splitfl.bench.frameworks import FRAMEWORKS, HEAD, read_figures, table_rows
from splitfl.errors import DataError, UsageError
from splitfl.files import replace_text

BEGIN, END = "<!-- frameworks table -->", "<!-- end of the frameworks table -->"
SUMMARY = "frameworks.json"
_KEPT = ("rounds", "local_steps")


def section(record: Mapping[str, Any]) -> Iterator[str]:
    """The table as Markdown, from the summary."""
    size = record["size"]
    yield ""
    yield f"The embedded model; {size['parties']} parties with {size['rows']} questions and answers each, of a hospital"
    yield f"or a clinic; {size['rounds']} rounds of {size['local_steps']} steps; {size['public']} public rows;"
    yield f"{size['held_out']} held-out rows of both kinds. Means over the parties, one seed."
    yield ""
    yield "| " + " | ".join(("design", *HEAD)) + " |"
    yield "|" + "---|" * (len(HEAD) + 1)
    for name, cells in table_rows(record["results"]):
        yield "| " + " | ".join((f"{FRAMEWORKS[name]}: `{name}`", *cells)) + " |"
    yield ""


def compact(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the table needs of a file of figures.

    Raises:
        DataError: it holds no figures of this benchmark.
        UsageError: it holds those of ``--quick``, or not all three designs.
    """
    from splitfl.bench.frameworks import size_of
    from splitfl.config import BenchSettings

    try:
        given, results = record["settings"], record["results"]
        cases = {result["case"] for result in results}
        if given["name"] != "frameworks":
            raise DataError("The file holds figures of another benchmark.")
        chosen = {name: given[name] for name in _KEPT}
    except (KeyError, TypeError) as error:
        raise DataError(f"The file is not one of figures ({type(error).__name__}).") from error
    if given["quick"] or cases != FRAMEWORKS.keys():
        raise UsageError("The figures are not those of a whole run.", hint="splitfl bench frameworks --json FILE")
    kept = ("case", "metric", "value", "unit")
    return {
        "size": vars(size_of(BenchSettings(name="frameworks", **chosen))),
        "machine": record["machine"],
        "results": [{name: result[name] for name in kept} for result in results],
    }


def filled(page: str, record: Mapping[str, Any]) -> str:
    """The page with the section between its markers.

    Raises:
        DataError: it has not both markers, in their order.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise DataError(f"The page has no place for the section: {BEGIN} and {END}.")
    return f"{before}{BEGIN}\n" + "\n".join(section(record)) + f"\n{END}{after}"


def write_page(file: Path, docs: Path) -> None:
    """Write summary and section into `docs`; errors as for `compact` and `filled`."""
    record = compact(read_figures(file))
    page = docs / "federation.md"
    text = filled(page.read_text(encoding="utf-8"), record)
    replace_text(docs / SUMMARY, json.dumps(record, indent=1) + "\n")
    replace_text(page, text)


if __name__ == "__main__":
    write_page(Path(sys.argv[1]), Path(__file__).resolve().parents[2] / "docs")
