"""`python -m tests.model_owner.state.dies PATH ROUNDS SEED`: kill -9 at random points, on one state, round after round.

Each round forks a process that serves (in words alone), and says in a pipe what it began and what was acknowledged to
it. It is killed at a random moment; after each round the state is compared with what was said. The last line of the
output is the outcome as JSON, or the difference. One process that imports everything, and forks from there, does in
milliseconds what a fresh one would take seconds for.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import func, select, text

from model_owner.observer import Served, SessionFacts
from model_owner.state import Database, Keeper, keeper
from model_owner.state.schema import CHARGES, SESSIONS, USAGE
from model_owner.state.spending import RESERVE_SHARE

PARTIES = ("hospital", "clinic", "lab")
TOKENS = 97


def serve(place: str, turn: int, out: int, seed: int) -> None:
    """Serve until killed."""
    keeper.FLUSH_S = 0.02  # so that some rounds meet it
    chance = random.Random(seed)

    def say(*words: object) -> None:
        os.write(out, (" ".join(map(str, words)) + "\n").encode())

    say("start")
    one = Keeper(Database(place, server="owner"), "owner")
    say("open")
    number = 0
    while True:
        party, name = chance.choice(PARTIES), f"{turn}-{number}"
        facts = SessionFacts(name=name, party=party, fingerprint=party, protocol="split", wire_dtype="float32")
        say("begin", name)
        one.session_opened(facts)
        for _ in range(chance.randrange(4)):
            say("charge", party)
            one.charge(party, TOKENS)
            one.request_served(
                Served(session=name, party=party, work="forward", tokens=TOKENS, bytes_in=1, bytes_out=1, seconds=0)
            )
            asyncio.run(one.secured(party))
            say("charged", party)
        one.session_ended(facts, "closed", 0.0)
        if chance.random() < 0.4:
            say("ended", name)
            one.flush()
            say("flushed")
        number += 1


@dataclass
class Said:
    """What the rounds have said: of `begun` and `charged` the last one alone, of the rest all."""

    begun: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTIES, 0))
    charged: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTIES, 0))
    names: set[str] = field(default_factory=set)
    finished: set[str] = field(default_factory=set)
    """Sessions whose end was acknowledged."""
    acknowledged: int = 0
    tokens: int = 0
    reserved: int = 0
    """Counted and never spent, since a kill came between."""
    before: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTIES, 0))
    """Charges in the state when the last round began."""

    def read(self, lines: list[str]) -> None:
        self.begun, self.charged, ended = dict.fromkeys(PARTIES, 0), dict.fromkeys(PARTIES, 0), None
        names: list[str] = []
        for line in lines:
            word, _, rest = line.partition(" ")
            match word:
                case "begin":
                    names.append(rest)
                case "charge":
                    self.begun[rest] += TOKENS
                case "charged":
                    self.charged[rest] += TOKENS
                    self.tokens += TOKENS
                    self.acknowledged += 1
                case "ended":
                    ended = rest
                case "flushed":
                    self.finished |= set(names[: names.index(ended) + 1])
                    self.acknowledged += 1
        self.names |= set(names)


def compare(place: str, said: Said) -> None:
    """The state is what was acknowledged, and nothing that was not begun; nothing stands in it twice."""
    with Database(place) as database, database.engine.connect() as db:
        if not database.is_sqlite:  # a commit that the dead owner had sent may come through just now
            db.execution_options(isolation_level="REPEATABLE READ")
        else:
            assert db.execute(text("PRAGMA integrity_check")).scalar() == "ok"
        rows = {row["name"]: row for row in db.execute(select(SESSIONS)).mappings()}
        charges = dict.fromkeys(PARTIES, 0) | {row.party: row.tokens for row in db.execute(select(CHARGES))}
        usage: dict[str, Any] = {
            row.party: (int(row.tokens), int(row.requests), int(row.sessions))
            for row in db.execute(
                select(USAGE.c.party, func.sum(USAGE.c.tokens_forward).label("tokens"),
                       func.sum(USAGE.c.requests).label("requests"), func.sum(USAGE.c.sessions).label("sessions"))
                .group_by(USAGE.c.party)
            )
        }  # fmt: skip
    assert said.finished <= set(rows) <= said.names, "a session is missing, or was never begun"
    assert all(rows[name]["why"] == "closed" for name in said.finished), "an end is missing"
    for party in PARTIES:
        more = charges[party] - said.before[party]
        reserve = said.begun[party] // RESERVE_SHARE
        assert said.charged[party] <= more <= said.begun[party] + reserve, f"charges of {party}"
        said.reserved += max(more - said.begun[party], 0)
        own = [row for row in rows.values() if row["party"] == party]
        sums = sum(row["tokens_forward"] for row in own), sum(row["requests"] for row in own), len(own)
        assert usage.get(party, (0, 0, 0)) == sums, f"sums of {party} are not those of its sessions"
        assert charges[party] - sums[0] >= 0, f"{party} was served more than it was charged"
    said.before = charges


def rounds(place: str, count: int, seed: int) -> dict[str, int]:
    """Kill so often; figures of the whole."""
    chance, said, early = random.Random(seed), Said(), 0
    for turn in range(count):
        read, write = os.pipe()
        number = os.fork()
        if number == 0:
            try:
                os.close(read)
                serve(place, turn, write, seed * 100_003 + turn)
            finally:
                os._exit(1)
        os.close(write)
        lines = listen(read, chance, number)
        os.close(read)
        early += "open" not in lines
        said.read(lines)
        if "://" not in place and not os.path.exists(place):
            assert not said.acknowledged
            continue
        compare(place, said)
    return {
        "rounds": count, "killed while it opened": early, "acknowledged": said.acknowledged,
        "sessions": len(said.names), "tokens acknowledged": said.tokens,
        "tokens counted in all": sum(said.before.values()), "of them reserves that a kill left": said.reserved,
    }  # fmt: skip


def listen(read: int, chance: random.Random, number: int) -> list[str]:
    """Let it come to a random point, kill it there, and read to the end."""
    wanted, came = chance.choice([0, 0, 1, 2, 3, 5, 8, 13, 21]), b""
    try:
        while came.count(b"charged ") + came.count(b"flushed") < wanted:
            piece = os.read(read, 1 << 16)
            assert piece, f"it ended by itself: {came.decode()}"
            came += piece
        time.sleep(chance.uniform(0, 0.03 if wanted == 0 else 0.004))
    finally:
        os.kill(number, signal.SIGKILL)
        _, status = os.waitpid(number, 0)
    assert os.WIFSIGNALED(status), "it ended by itself"
    while piece := os.read(read, 1 << 16):
        came += piece
    return came.decode().split("\n")[:-1]


if __name__ == "__main__":
    print(json.dumps(rounds(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
