"""kill -9 at every step of charge, send and confirm: what left is in the ledger, and nothing is charged twice.

A child process charges release after release. It says in a pipe what it is about to do (each SQL statement included),
and it may be held at any of these steps until the test kills it or lets it go on. Writing `sent` into the pipe stands
for the bytes that leave: what the test reads there has left for good, whatever became of the child.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from splitfl.privacy.ledger import Ledger
from tests.privacy.test_ledger import DATA, RHO, only, release

ROOT = Path(__file__).parents[2]
CHILD = f"""
import os, sqlite3, sys
sys.path.insert(0, {str(ROOT)!r})
from splitfl.privacy.ledger import Ledger, Release

path, hold, start, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

def step(*words):
    os.write(1, (" ".join(words) + "\\n").encode())
    if words[0] == hold:
        os.read(0, 1)  # until the test lets go, or kills

connect = sqlite3.connect
def traced(*args, **options):
    db = connect(*args, **options)
    if hold != "never":
        db.set_trace_callback(lambda statement: step("sql", *statement.split()[:3]))
    return db
sqlite3.connect = traced

with Ledger(path) as ledger:
    for number in range(start, start + count):
        step("charge", str(number))
        first = ledger.charge(Release(
            release_id=str(number), dataset={DATA!r}, unit="row", units=range(number, number + 8),
            channel="activations", mechanism="gauss", sensitivity=2.0, sigma=10.0, rho={RHO!r}, adversary="owner",
            run="run-1"))
        step("charged", str(number), str(first))
        step("sent", str(number))
        step("answered", str(number))
        ledger.confirm(str(number))
        step("confirmed", str(number))
step("end")
"""


@dataclass
class Party:
    """The child, and everything that it has said."""

    process: subprocess.Popen[bytes]
    said: list[list[str]] = field(default_factory=list)

    def listen(self, until: str | None = None, limit_s: float = 60.0) -> bool:
        """Read until a line begins with `until` (True) or until the child is silent for good (False)."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            line = self.process.stdout.readline()
            if not line:
                return False
            self.said.append(line.decode().split())
            if self.said[-1][0] == until:
                return True
        raise AssertionError("the child neither speaks nor ends")

    def go_on(self) -> None:
        self.process.stdin.write(b".")
        self.process.stdin.flush()

    def kill(self) -> None:
        """SIGKILL; afterwards everything that it had said is known."""
        self.process.kill()
        self.process.wait()
        self.listen()

    def numbers(self, word: str) -> list[int]:
        return [int(line[1]) for line in self.said if line[0] == word]


@contextmanager
def party(path: Path, hold: str = "nothing", start: int = 0, count: int = 5) -> Iterator[Party]:
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path), hold, str(start), str(count)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield Party(process)
    finally:
        process.kill()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()
        process.wait()


def check(path: Path, sent: set[int], begun: set[int]) -> None:
    """What left was charged, nothing that was never begun was, and the totals are the sums of the entries."""
    with Ledger(path) as ledger:
        entries = [int(entry["release_id"]) for entry in ledger.export()["entries"]]
        assert len(entries) == len(set(entries))
        assert sent <= set(entries) <= begun
        ledger.verify()


def replay(path: Path, start: int, count: int, charged: set[int]) -> None:
    """The run starts again with the same ids: what was charged is not charged again, and the rest is."""
    with party(path, start=start, count=count) as again:
        assert not again.listen()
        firsts = {int(line[1]): line[2] == "True" for line in again.said if line[0] == "charged"}
    assert firsts == {number: number not in charged for number in range(start, start + count)}


def ids(path: Path) -> set[int]:
    with Ledger(path) as ledger:
        return {int(entry["release_id"]) for entry in ledger.export()["entries"]}


# What is killed: the words of the step that the child is held at, and how often it was let go on before.
STEPS = ["charge", "charged", "sent", "answered", "confirmed"]


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("word", STEPS)
def test_killed_between_two_steps(tmp_path, word, before):
    path = tmp_path / "ledger"
    with party(path, hold=word) as child:
        for _ in range(before):
            assert child.listen(until=word)
            child.go_on()
        assert child.listen(until=word)
        child.kill()
    assert child.process.returncode == -9
    assert child.numbers("charge")[-1] == before  # it came no further
    charged = set(child.numbers("charged"))
    assert charged == set(range(before + (word != "charge")))
    assert ids(path) == charged
    check(path, set(child.numbers("sent")), set(child.numbers("charge")))
    replay(path, 0, 5, charged)
    check(path, set(range(5)), set(range(5)))
    with Ledger(path) as ledger:
        assert (only(ledger).releases, only(ledger).confirmed, only(ledger).units) == (5, 5, 12)


def statements(path: Path) -> list[list[str]]:
    """Every step of a whole conversation, SQL included, beginning at the first charge."""
    with party(path, count=2) as child:
        assert not child.listen()
    first = child.said.index(["charge", "0"])
    return child.said[first:]


def test_killed_before_each_statement(tmp_path):
    Ledger(tmp_path / "fresh").close()
    shutil.copy(tmp_path / "fresh", tmp_path / "counted")
    steps = statements(tmp_path / "counted")
    first_confirmed = steps.index(["confirmed", "0"])
    kills = [i for i, line in enumerate(steps) if line[0] == "sql" and i < first_confirmed]
    words = [steps[i][1] for i in kills]
    assert words.count("COMMIT") == words.count("BEGIN") == 2  # of the charge, and of the confirmation
    assert len(kills) > 12
    for number in range(len(kills)):
        path = tmp_path / f"ledger-{number}"
        shutil.copy(tmp_path / "fresh", path)
        with party(path, hold="sql", count=2) as child:
            while ["charge", "0"] not in child.said:  # statements of the opening
                assert child.listen(until="sql")
                if ["charge", "0"] not in child.said:
                    child.go_on()
            for _ in range(number):
                child.go_on()
                assert child.listen(until="sql")
            child.kill()
        assert child.said[child.said.index(["charge", "0"]) :] == steps[: kills[number] + 1]  # it was where it should
        committed = kills[number] > words.index("COMMIT") + 1
        assert ids(path) == ({0} if committed else set())
        check(path, set(child.numbers("sent")), {0})
        assert path.with_name(path.name + "-wal").exists() is False
    replay(path, 0, 2, {0})


def test_a_ledger_whose_making_is_killed(tmp_path):
    path = tmp_path / "books" / "ledger"
    for number in range(40):
        with party(path, hold="sql", count=1) as child:
            for _ in range(number):
                assert child.listen(until="sql")
                child.go_on()
            assert child.listen(until="sql")
            made = ["charge", "0"] in child.said
            child.kill()
        assert path.exists() or not made
        if made:
            break
        with Ledger(path) as ledger:
            ledger.verify()
        path.unlink()
    assert made


def rounds(path: Path, number: int, seed: int) -> None:
    """Kill a party that charges without a pause, at a random moment, again and again on one ledger."""
    chance, sent, begun = random.Random(seed), set(), set()
    start, least = 0, 0
    for _ in range(number):
        with party(path, hold="never", start=start, count=100_000) as child:
            assert child.listen(until="charge")
            for _ in range(chance.randrange(10)):
                assert child.listen(until="sent")
            time.sleep(chance.uniform(0, 0.002))
            child.kill()
        numbers = child.numbers("sent")
        least += len(numbers) - 1  # the first may be one that was sent in the round before
        sent |= set(numbers)
        begun |= set(child.numbers("charge"))
        repeated = {int(line[1]) for line in child.said if line[0] == "charged" and line[2] == "False"}
        assert repeated <= {start}  # only what was cut off in the round before may have been charged already
        start = child.numbers("charge")[-1]  # what was in the making is done again, under the same id
    assert len(sent) >= least > number
    check(path, sent, begun)


def test_killed_at_random(tmp_path):
    rounds(tmp_path / "ledger", 25, seed=1)


@pytest.mark.slow
def test_killed_at_random_very_often(tmp_path):
    for seed in range(3):
        rounds(tmp_path / f"ledger-{seed}", 100, seed=100 + seed)


def test_a_replay_in_this_process_after_a_crash(tmp_path):
    """The charge of a killed child is seen here as the same release, with the same units."""
    path = tmp_path / "ledger"
    with party(path, hold="charged") as child:
        assert child.listen(until="charged")
        child.kill()
    with Ledger(path) as ledger:
        assert ledger.charge(release("0", range(8))) is False
        assert ledger.charge(release("1", range(8))) is True
        assert only(ledger).most.releases == 2
