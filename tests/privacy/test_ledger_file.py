"""The ledger's file: where it is, who may read it, what can be wrong with it, and several processes at once."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from splitfl.errors import DataError, ResourceError, UsageError
from splitfl.privacy.ledger import BudgetError, Ledger, default_path
from tests.privacy.test_ledger import DATA, RHO, only, release

ROOT = Path(__file__).parents[2]
COMMON = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from splitfl.errors import ResourceError, UsageError
from splitfl.privacy.ledger import BudgetError, Ledger, Release
def release(name, units):
    return Release(release_id=name, dataset={DATA!r}, unit="row", units=units, channel="activations",
                   mechanism="gauss", sensitivity=2.0, sigma=10.0, rho={RHO!r}, adversary="owner", run="run-1")
path, number = sys.argv[1], sys.argv[2]
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "books" / "ledger.sqlite"


@contextmanager
def children(script: str, path: Path, count: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that run `script`, each stopped where it first reads a line; killed at the end."""
    words = [sys.executable, "-c", COMMON + script, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([*words, str(number)], **pipes) for number in range(count)]
    try:
        yield started
    finally:
        for child in started:
            child.kill()
            child.communicate()


def together(script: str, path: Path, count: int) -> list[list[str]]:
    """What each of `count` processes printed, after all of them were let go at the same moment."""
    with children(script, path, count) as started:
        for child in started:
            assert child.stdout.readline() == "ready\n"
        for child in started:
            child.stdin.write("go\n")
            child.stdin.flush()
        printed = [child.communicate(timeout=120)[0].split() for child in started]
        assert [child.returncode for child in started] == [0] * count
    return printed


# ---- where it is


def test_the_default_place(monkeypatch, tmp_path):
    monkeypatch.setenv("SPLITFL_LEDGER", str(tmp_path / "mine.db"))
    assert default_path() == tmp_path / "mine.db"
    monkeypatch.delenv("SPLITFL_LEDGER")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_path() == tmp_path / "splitfl" / "ledger.sqlite"
    monkeypatch.setenv("XDG_DATA_HOME", "relative/is/ignored")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_path() == tmp_path / ".local" / "share" / "splitfl" / "ledger.sqlite"


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_only_its_owner_can_read_it(path, umask):
    before = os.umask(umask)
    try:
        with Ledger(path) as ledger:
            ledger.charge(release("a"))
            files = sorted(each.name for each in path.parent.iterdir())
            assert files == ["ledger.sqlite", "ledger.sqlite-shm", "ledger.sqlite-wal"]
            assert [stat.S_IMODE(each.stat().st_mode) for each in path.parent.iterdir()] == [0o600] * 3
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        path.chmod(0o644)
        Ledger(path).close()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        os.umask(before)


def test_every_commit_is_written_through(path, monkeypatch):
    opened, plain = [], sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **words: opened.append(plain(*args, **words)) or opened[-1])
    with Ledger(path) as ledger:
        db = opened[-1]
        statements = []
        for action in (lambda: ledger.charge(release("a")), lambda: ledger.confirm("a"), lambda: None):
            action()
            assert db.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL, also after one that need not be
        assert db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        db.set_trace_callback(statements.append)
        ledger.charge(release("b"))
        assert statements[0] == "BEGIN IMMEDIATE"
        assert statements[-1] == "COMMIT"


# ---- what can be wrong with it


@pytest.fixture
def filled(path):
    """A ledger of many pages."""
    with Ledger(path) as ledger:
        for number in range(20):
            ledger.charge(release(f"r{number}", range(20 * number, 20 * number + 40)))
    assert path.stat().st_size > 10 * 4096
    return path


def refused(path, error, words, **options):
    """The error that opening meets; the file is as it was before."""
    before = path.read_bytes()
    with pytest.raises(error, match=words) as caught:
        Ledger(path, **options)
    assert path.read_bytes() == before
    assert str(path) in str(caught.value)
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize("left", [0, 1, 100, 1000, 4096, 5000, 0.5, -4096, -1])
def test_a_truncated_ledger_is_damaged(filled, left):
    size = filled.stat().st_size
    os.truncate(filled, int(left * size) if isinstance(left, float) else left if left >= 0 else size + left)
    error = refused(filled, DataError, "damaged.*kept as it is")
    assert error.exit_code == 3


@pytest.mark.parametrize("place", ["all", "start", "middle"])
def test_a_ledger_of_other_bytes_is_damaged(filled, place):
    content = bytearray(filled.read_bytes())
    start = {"all": 0, "start": 0, "middle": 4096 * (len(content) // 8192)}[place]
    size = len(content) if place == "all" else 4096
    content[start : start + size] = random.Random(0).randbytes(size)
    filled.write_bytes(content)
    refused(filled, DataError, "damaged.*kept as it is")


def test_a_file_that_is_no_ledger(tmp_path):
    other = tmp_path / "other.sqlite"
    with closing(sqlite3.connect(other)) as db:
        db.execute("CREATE TABLE totals (account, unit)")
        db.commit()
    refused(other, DataError, "is an SQLite file, but no ledger")
    text = tmp_path / "rows.jsonl"
    text.write_text('{"text": "a row of somebody"}\n' * 100)
    assert "somebody" not in str(refused(text, DataError, "does not begin as a ledger does"))
    with pytest.raises(ResourceError):
        Ledger(tmp_path)  # a folder


def test_a_ledger_of_a_newer_schema(filled):
    with closing(sqlite3.connect(filled)) as db:
        db.execute("PRAGMA user_version = 7")
        db.commit()
    error = refused(filled, DataError, r"newer splitfl \(schema 7\)")
    assert "schema 1" in error.expected
    assert "update" in error.hint


def test_a_ledger_that_is_not_there(path):
    with pytest.raises(DataError, match="There is no ledger"):
        Ledger(path, create=False)
    assert not path.parent.exists()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot be kept there") as caught:
        Ledger(tmp_path / "file" / "ledger.sqlite")
    assert caught.value.exit_code == 6
    if os.geteuid() != 0:  # root may write anywhere
        tmp_path.chmod(0o500)
        with pytest.raises(ResourceError, match="cannot be kept there"):
            Ledger(tmp_path / "ledger.sqlite")


def test_no_link_can_be_made(path, monkeypatch):
    def link(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)  # as on a memory stick's file system
    with pytest.raises(ResourceError, match="cannot be kept there"):
        Ledger(path)
    assert list(path.parent.iterdir()) == []


def test_a_locked_ledger(path):
    with Ledger(path, timeout_s=0.2) as ledger, closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        started = time.monotonic()
        with pytest.raises(ResourceError, match=r"locked .* more than 0.2 s. Nothing was charged"):
            ledger.charge(release("a"))
        assert time.monotonic() - started >= 0.2
        assert ledger.summary() == []  # looking is still possible
        other.execute("ROLLBACK")
        assert ledger.charge(release("a")) is True


def test_a_ledger_that_is_locked_before_it_is_opened(path):
    Ledger(path).close()
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(ResourceError, match="locked"):
            Ledger(path, timeout_s=0.1)
        other.execute("ROLLBACK")


def test_a_ledger_that_is_moved_while_it_is_open(path):
    moved, copy = path.with_name("moved"), path.with_name("copy")
    Ledger(path).close()
    shutil.copy(path, copy)
    with Ledger(path) as ledger:
        ledger.charge(release("a"))
        path.rename(moved)
        with pytest.raises(ResourceError, match="moved, deleted or replaced"):
            ledger.charge(release("b"))
        with pytest.raises(DataError, match=r"gone, but its log ledger\.sqlite-wal is still"):
            Ledger(path)  # a new file would be given the old one's log
        copy.rename(path)
        with pytest.raises(ResourceError, match="moved, deleted or replaced"):
            ledger.charge(release("b"))
    moved.rename(path)
    with Ledger(path) as ledger:  # the log had stayed
        assert only(ledger).releases == 1


def test_a_closed_ledger(path):
    ledger = Ledger(path)
    ledger.close()
    ledger.close()
    with pytest.raises(UsageError, match="closed"):
        ledger.charge(release("a"))


DISK_FULL = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
ledger = Ledger(path)
size = os.path.getsize(path)
resource.setrlimit(resource.RLIMIT_FSIZE, (16 * size, 16 * size))  # writing beyond fails, as on a full disk
charged = 0
try:
    for charged in range(100_000):
        ledger.charge(release(f"r{charged}", range(20)))
except ResourceError as error:
    print(charged, "Nothing" in error.problem or "cannot be" in error.problem)
"""


def test_what_cannot_be_written_is_not_charged(path):
    with children(DISK_FULL, path, 1) as (child,):
        charged, words = child.communicate(timeout=100)[0].split()
    assert (int(charged) > 10, words) == (True, "True")
    with Ledger(path) as ledger:
        ledger.verify()
        assert only(ledger).releases in (int(charged), int(charged) + 1)  # the last may have come through, unsent


def test_totals_that_are_not_the_sums_are_found(filled):
    for change in (
        "UPDATE totals SET rho = rho / 2 WHERE unit = (SELECT max(unit) FROM totals)",
        "DELETE FROM totals WHERE unit = (SELECT min(unit) FROM totals)",
        "UPDATE accounts SET most_releases = 1",
        "UPDATE accounts SET all_rho = 1",
        "UPDATE accounts SET releases = releases - 1",
    ):
        with closing(sqlite3.connect(filled)) as db, Ledger(filled) as ledger:
            ledger.verify()
            db.execute(change)
            db.commit()
            with pytest.raises(DataError, match="totals are not those of its entries"):
                ledger.verify()
        filled.unlink()
        with Ledger(filled) as ledger:
            for number in range(3):
                ledger.charge(release(f"r{number}", [1, 2, 3]))


# ---- several at once

HAMMER = """
print("ready", flush=True)
sys.stdin.readline()
ledger = Ledger(path)  # one of them makes it
accepted = 0
for i in range(60):
    try:
        accepted += ledger.charge(release(f"{number}:{i}", [0, f"own {number}"] if i % 5 else None))
    except BudgetError:
        pass
print(accepted)
"""
REPEAT = """
ledger = Ledger(path)
print("ready", flush=True)
sys.stdin.readline()
print(*(ledger.charge(release(f"r{i}", [i % 7])) for i in range(40)))
"""


@pytest.mark.parametrize("limit", [{"releases": 100}, {"rho": 100.5 * RHO}])
def test_processes_at_once_cannot_overspend(path, limit):
    with Ledger(path) as ledger:
        ledger.set_budget(DATA, unit="row", adversary="owner", **limit)
    accepted = [int(each) for (each,) in together(HAMMER, path, 4)]
    assert sum(accepted) == 100
    with Ledger(path) as ledger:
        ledger.verify()
        assert only(ledger).releases == only(ledger).most.releases == 100


def test_processes_that_make_the_ledger_at_once_make_one(path):
    accepted = [int(each) for (each,) in together(HAMMER, path, 4)]
    assert accepted == [60] * 4
    with Ledger(path) as ledger:
        ledger.verify()
        assert only(ledger).most.releases == 240  # row 0 has one hash in all of them
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_one_release_in_several_processes_is_charged_once(path):
    Ledger(path).close()
    answers = zip(*together(REPEAT, path, 3), strict=True)
    assert [sorted(each) for each in answers] == [["False", "False", "True"]] * 40
    with Ledger(path) as ledger:
        ledger.verify()
        assert only(ledger).releases == 40


def test_threads_at_once_cannot_overspend(path):
    accepted = []
    with Ledger(path) as one, Ledger(path) as two:
        one.set_budget(DATA, unit="row", adversary="owner", releases=50)
        barrier = threading.Barrier(8)

        def work(ledger: Ledger, number: int) -> None:
            barrier.wait()
            for i in range(10):
                try:
                    accepted.append(ledger.charge(release(f"{number}:{i}", [0])))
                except BudgetError:
                    accepted.append(False)

        threads = [threading.Thread(target=work, args=((one, two)[n % 2], n)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        one.verify()
        assert (len(accepted), sum(accepted), only(two).releases) == (80, 50, 50)


FORK = """
ledger = Ledger(path)
for attempt in (lambda: ledger.charge(release("child", [1])), lambda: Ledger(path)):
    if os.fork() == 0:
        try:
            attempt()
            print("came through", flush=True)
        except UsageError as error:
            print("forked" in error.problem, flush=True)
        os._exit(0)
    os.wait()
print(ledger.charge(release("parent", [1])))
ledger.close()
if os.fork() == 0:
    print(Ledger(path).charge(release("later", [1])), flush=True)
    os._exit(0)
os.wait()
"""


def test_a_fork_does_not_share_it(path):
    with children(FORK, path, 1) as (child,):
        assert child.communicate(timeout=60)[0].split() == ["True"] * 4
    with Ledger(path) as ledger:
        assert only(ledger).releases == 2
