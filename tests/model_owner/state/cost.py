"""`python -m tests.model_owner.state.cost [PLACE]`: what keeping a state costs the owner that serves; figures as JSON.

PLACE is a path or URL as for `--state`; by default a file in a temporary folder.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from model_owner.observer import Served, SessionFacts
from model_owner.state import Database, Keeper

TURNS = 200


def measure(place: str) -> dict[str, float]:
    """Seconds that the serving thread spends on a request, and that an answer waits for its charge."""
    keeper = Keeper(Database(place, server="cost"), "cost")
    facts = SessionFacts(name="s", party="p", fingerprint="f", protocol="split", wire_dtype="float32")
    served = Served(session="s", party="p", work="decode", tokens=1, bytes_in=900, bytes_out=900, seconds=0.01)
    keeper.session_opened(facts)
    begun = time.perf_counter()
    for _ in range(20_000):
        keeper.request_served(served)
        keeper.charge("p", 1)
    told = (time.perf_counter() - begun) / 20_000
    waits: list[float] = []

    async def answer(party: str, turns: int) -> None:
        for _ in range(turns):
            started = time.perf_counter()
            keeper.charge(party, 1)
            await keeper.secured(party)
            waits.append(time.perf_counter() - started)

    async def together(count: int, spent: int) -> None:
        parties = [f"{spent} {n}" for n in range(count)]
        for party in parties:
            keeper.charge(party, spent)
            await keeper.secured(party)
        waits.clear()
        await asyncio.gather(*(answer(party, TURNS) for party in parties))

    found = {"telling, microseconds a request": told * 1e6}
    for count, spent in ((1, 0), (16, 0), (1, 100_000), (16, 100_000)):
        asyncio.run(together(count, spent))
        case = f"an answer of one token waits, {count} parties, {spent:,} tokens spent before"
        found[f"{case}: mean, ms"] = statistics.mean(waits) * 1e3
        found[f"{case}: median, ms"] = statistics.median(waits) * 1e3
    keeper.session_ended(facts, "closed", 1.0)
    keeper.close()
    return {name: round(value, 3) for name, value in found.items()}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(sys.argv[1] if len(sys.argv) > 1 else str(Path(folder) / "state.sqlite")), indent=1))
