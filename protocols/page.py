"""`python -m protocols.page`: docs/protocols.md, written from the protocols' own records."""

from __future__ import annotations

from collections.abc import Iterator

from protocols import PROTOCOLS
from protocols.record import Protocol

_HEAD = """\
# Protocols

Written by `make docs` from the records in `protocols/`. The same records are enforced: a session refuses every message
and every tensor that its protocol does not list here.
"""


def page() -> str:
    """The whole page as Markdown."""
    return "\n".join([_HEAD, *(line for protocol in PROTOCOLS.values() for line in _section(protocol))])


def _section(protocol: Protocol) -> Iterator[str]:
    disclosure = protocol.disclosure
    yield f"## `{protocol.name}`\n"
    yield f"Source: {protocol.source}.\n"
    yield f"The party trains {protocol.party_trains}. The owner trains {protocol.owner_trains}.\n"
    yield "| message | tensor | direction | what it is | how often | proven bound |"
    yield "|---|---|---|---|---|---|"
    for c in disclosure.crossings:
        yield f"| {c.message} | {c.tensor or 'header only'} | {c.direction} | {c.content} | {c.how_often} | {c.bound} |"
    yield "\nNever crosses: " + "; ".join(disclosure.never) + ".\n"
    yield f"In plain words: {disclosure.in_plain_words}\n"


if __name__ == "__main__":
    print(page(), end="")
