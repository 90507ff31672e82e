"""`python -m protocols.page`: docs/protocols.md, written from the protocols' own records."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from protocols import PEER_PROTOCOLS, PROTOCOLS
from protocols.record import Protocol
from splitfl.bench.utility_section import section as utility_section
from splitfl.privacy.disclosure import Crossing

_DOCS = Path(__file__).resolve().parents[1] / "docs"  # not part of an installed package
_UTILITY, _COMPARED = _DOCS / "utility.json", _DOCS / "compare.json"

_HEAD = """\
# Protocols

Written by `make docs` from the records in `protocols/`. The same records are enforced: a session refuses every message
and every tensor that its protocol does not list here. [wire.md](wire.md#messages) has the messages field by field,
[threat-model.md](threat-model.md) what can be done with what crosses, [compare.md](compare.md) what each design is
worth, leaks and costs.
"""


def page() -> str:
    """The whole page as Markdown."""
    sections = (line for protocol in (PROTOCOLS | PEER_PROTOCOLS).values() for line in _section(protocol))
    return "\n".join([_HEAD, *_overview(), *sections, *_utility(), *_compared()])


def _utility() -> Iterator[str]:
    """What protection costs, where it has been measured."""
    if _UTILITY.is_file():
        yield from utility_section(json.loads(_UTILITY.read_text(encoding="utf-8")))


def _compared() -> Iterator[str]:
    """What every design came to in the shipped comparison, where it has been run."""
    if not _COMPARED.is_file():
        return
    record = json.loads(_COMPARED.read_text(encoding="utf-8"))
    size = "quick rows and steps" if record["quick"] else "whole size"
    yield "## All designs beside each other\n"
    yield f"From `splitfl compare`, at its {size}; [compare.md](compare.md) says how, and what the rest costs."
    yield "Empirical: only against the attacks that were run.\n"
    for name, data in record["data"].items():
        yield f"### {name}: {data['title']} ({data['metric']})\n"
        yield "| design | leaves the holder | gain kept | best attack | guessing; beyond it | owner's side |"
        yield "|---|---|---|---|---|---|"
        for row in data["rows"]:
            star = "★ " if row["pareto"] else ""
            named = f"{star}`{row['design']}`" + (" (closed)" if row["closed"] else "")
            yield _row(named, row["leaves"], row["kept"], row["attack"], row["guessing"], row["side"])
        yield ""


def _overview() -> Iterator[str]:
    yield "| protocol | the party trains | tensors to the owner | tensors to the party |"
    yield "|---|---|---|---|"
    for protocol in PROTOCOLS.values():
        crossings = protocol.disclosure.crossings
        up, down = (_tensors(c for c in crossings if c.direction.startswith(side)) for side in ("party", "owner"))
        yield _row(f"[`{protocol.name}`](#{protocol.name})", protocol.party_trains, up, down)
    yield ""
    yield "| protocol without an owner | each peer trains | tensors between peers |"
    yield "|---|---|---|"
    for protocol in PEER_PROTOCOLS.values():
        between = _tensors(protocol.disclosure.crossings)
        yield _row(f"[`{protocol.name}`](#{protocol.name})", protocol.party_trains, between)
    yield ""


def _tensors(crossings: Iterable[Crossing]) -> str:
    return ", ".join(f"{c.tensor} ({c.message})" for c in crossings if c.tensor) or "none"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _section(protocol: Protocol) -> Iterator[str]:
    disclosure = protocol.disclosure
    yield f"## `{protocol.name}`\n"
    yield f"Source: {protocol.source}.\n"
    yield f"The party trains {protocol.party_trains}. The owner trains {protocol.owner_trains}.\n"
    yield "| message | tensor | direction | what it is | how often | proven bound |"
    yield "|---|---|---|---|---|---|"
    for c in disclosure.crossings:
        yield _row(c.message, c.tensor or "header only", c.direction, c.content, c.how_often, c.bound)
    yield "\nNever crosses: " + "; ".join(disclosure.never) + ".\n"
    yield f"In plain words: {disclosure.in_plain_words}\n"


if __name__ == "__main__":
    print(page(), end="")
