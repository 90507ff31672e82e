"""What an owner remembers: written in batches by a thread of its own, in SQLite and in PostgreSQL."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import threading
import time

import pytest
from sqlalchemy import select, text

from model_owner.observer import Served, SessionFacts
from model_owner.refusals import Refusal
from model_owner.state import Database, Keeper, keeper
from model_owner.state.pending import Pending
from model_owner.state.reading import parties, usage
from model_owner.state.schema import CHARGES, METADATA, SESSIONS, migrate
from model_owner.state.spending import MOST_RESERVE, RESERVE_SHARE, Spent
from model_owner.state.writing import begin_run, write
from splitfl.errors import ResourceError

NOON = 1_793_534_400.0  # 2026-11-01 12:00 UTC


def facts(name, party="hospital"):
    return SessionFacts(name=name, party=party, fingerprint=f"SHA256:{party}", protocol="split", wire_dtype="float32")


def served(session, party="hospital", work="forward", tokens=10):
    return Served(session=session, party=party, work=work, tokens=tokens, bytes_in=100, bytes_out=120, seconds=0.1)


class Clock:
    def __init__(self, now=NOON):
        self.now = now

    def __call__(self):
        return self.now


def kept(place, clock=time.time, server="owner"):
    return Keeper(Database(place, server=server), server, clock)


def sessions_in(place):
    with Database(place, write=False) as database, database.engine.begin() as db:
        return {row["name"]: dict(row) for row in db.execute(select(SESSIONS)).mappings()}


def test_what_a_session_did_is_there_afterwards(place):
    clock = Clock()
    one = kept(place, clock)
    one.session_opened(facts("a"))
    clock.now += 30
    for work in ("forward", "backward", "decode", "fetch"):
        one.request_served(served("a", work=work, tokens=0 if work == "fetch" else 10))
    clock.now += 30
    one.session_ended(facts("a"), "closed", 60.0)
    one.charge("hospital", 30)
    one.close()
    row = sessions_in(place)["a"]
    assert row == {
        "name": "a", "server": "owner", "party": "hospital", "fingerprint": "SHA256:hospital", "protocol": "split",
        "wire_dtype": "float32", "opened": NOON, "ended": NOON + 60, "why": "closed", "seconds": 60.0,
        "tokens_forward": 10, "tokens_backward": 10, "tokens_decode": 10, "bytes_in": 400, "bytes_out": 480,
        "requests": 4, "steps": 1,
    }  # fmt: skip
    with Database(place, write=False) as database:
        (used,) = usage(database)
        (party,) = parties(database, "2026-11-01")
    assert (used.party, used.day) == ("hospital", "2026-11-01")
    assert used.sums == {
        "sessions": 1, "session_seconds": 60.0, "tokens_forward": 10, "tokens_backward": 10, "tokens_decode": 10,
        "bytes_in": 400, "bytes_out": 480, "requests": 4, "steps": 1,
    }  # fmt: skip
    assert (party.keys, party.first_seen, party.last_seen, party.spent_tokens) == (1, NOON, NOON + 60, 30)
    assert party.open_sessions == 0


def test_usage_goes_to_the_day_in_utc_and_days_add_up(place):
    clock = Clock(NOON + 12 * 3600 - 1)
    one = kept(place, clock)
    one.session_opened(facts("a"))
    one.request_served(served("a", tokens=5))
    clock.now += 2
    one.request_served(served("a", tokens=7))
    one.session_ended(facts("a"), "closed", 2.0)
    one.close()
    with Database(place, write=False) as database:
        assert {each.day: each.sums["tokens_forward"] for each in usage(database)} == {"2026-11-01": 5, "2026-11-02": 7}
        assert [each.sums["tokens_forward"] for each in usage(database, by_day=False)] == [12]
        assert [each.day for each in usage(database, "2026-11-02")] == ["2026-11-02"]
        assert [each.day for each in usage(database, None, "2026-11-01")] == ["2026-11-01"]


def test_charges_outlive_the_owner_and_are_known_at_once(place):
    one = kept(place)
    one.charge("hospital", 5)
    assert one.spent_tokens("hospital") == 5
    asyncio.run(one.secured("hospital"))
    with Database(place, write=False) as database, database.engine.begin() as db:  # before it is closed
        assert db.execute(text("SELECT tokens FROM charges")).scalar() == 5
    one.charge("hospital", 6)
    one.close()
    again = kept(place)
    assert (again.spent_tokens("hospital"), again.spent_tokens("clinic")) == (11, 0)
    again.close()


def test_what_nobody_waits_for_is_written_within_the_time_stated(place):
    one = kept(place)
    one.charge("hospital", 1)
    one.flush()
    begun = time.monotonic()
    one.session_opened(facts("a"))
    while "a" not in sessions_in(place):
        assert time.monotonic() - begun < keeper.FLUSH_S + 5
    one.session_ended(facts("a"), "closed", 0.0)
    one.close()


def test_many_who_wait_share_few_writes(tmp_path):
    one = kept(str(tmp_path / "s"))

    async def ask():
        async def answer(party):
            for _ in range(20):
                one.charge(party, 1)
                await one.secured(party)

        await asyncio.gather(*(answer(f"p{n}") for n in range(16)))

    asyncio.run(ask())
    assert one._number < 16 * 20 / 4, "each waited for a write of its own"
    assert [one.spent_tokens(f"p{n}") for n in range(16)] == [20] * 16
    one.close()


def test_a_session_that_a_kill_left_open_is_marked_as_lost(place):
    clock = Clock()
    first = kept(place, clock)
    first.session_opened(facts("a"))
    clock.now += 5
    first.request_served(served("a"))
    first.flush()
    with first.database.engine.begin() as db:  # as a new process would, the first one being dead
        begin_run(db, "owner", "another")
    row = sessions_in(place)["a"]
    assert (row["why"], row["ended"]) == ("lost", NOON + 5)
    first._pending = Pending()
    first.close()


def test_a_batch_whose_commit_was_not_heard_of_is_not_written_twice(place):
    with Database(place) as database:
        batch = Pending()
        batch.open(facts("a"), "owner", NOON)
        batch.serve(served("a"), NOON)
        batch.charge("hospital", 10)
        with database.engine.begin() as db:
            begin_run(db, "owner", "run")
        for _ in range(3):
            with database.engine.begin() as db:
                assert write(db, batch, 1, "owner", "run") == {"hospital": 10}
        (used,) = usage(database)
        assert used.sums["tokens_forward"] == 10
        with database.engine.begin() as db, pytest.raises(ResourceError, match="Another owner writes"):
            write(db, batch, 3, "owner", "run")
        with database.engine.begin() as db, pytest.raises(ResourceError, match="Another owner writes"):
            write(db, batch, 1, "owner", "of somebody else")


def test_where_nothing_can_be_written_answers_with_a_budget_wait_and_then_are_refused(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(keeper, "SECURE_S", 0.3)
    one = kept(str(tmp_path / "s"))
    with sqlite3.connect(tmp_path / "s", isolation_level=None) as other:
        other.execute("ALTER TABLE charges RENAME TO hidden")
        one.charge("hospital", 5)
        with pytest.raises(Refusal) as refused:
            asyncio.run(one.secured("hospital"))
        assert refused.value.code == "busy"
        assert one.failure is not None
        other.execute("ALTER TABLE hidden RENAME TO charges")
    other.close()
    asyncio.run(asyncio.wait_for(_until(lambda: one.failure is None), 30))
    asyncio.run(one.secured("hospital"))
    assert one.spent_tokens("hospital") == 5
    one.close()
    assert caplog.text.count("the state cannot be written") == 1
    assert "hospital" not in caplog.text


def charges_in(place):
    with Database(place, write=False) as database, database.engine.begin() as db:
        return {row.party: row.tokens for row in db.execute(select(CHARGES))}


def test_few_answers_wait_once_a_party_has_spent_some(tmp_path):
    """The durable figure runs ahead by a bounded reserve; at the end it is given back, after a kill it is not."""
    one = kept(str(tmp_path / "s"))
    one.charge("hospital", 64_000)
    asyncio.run(one.secured("hospital"))
    writes = one._number
    for number in range(800):
        one.charge("hospital", 1)
        asyncio.run(one.secured("hospital"))
        if number % 80 == 0:
            ahead = charges_in(tmp_path / "s")["hospital"] - one.spent_tokens("hospital")
            assert 0 <= ahead <= 64_800 // RESERVE_SHARE
    assert one._number - writes <= 4
    killed = charges_in(tmp_path / "s")["hospital"]
    assert 64_800 <= killed <= 64_800 + 64_800 // RESERVE_SHARE
    one.close()
    assert charges_in(tmp_path / "s") == {"hospital": 64_800}


def test_what_was_spent_stays_within_what_is_written():
    chance, spent, told, durable = random.Random(3), Spent(), [], 0
    for _ in range(5000):
        more = spent.charge(chance.choice([0, 1, 7, 2048]))
        assert spent.here <= spent.asked
        assert spent.asked - spent.here <= min(spent.here // RESERVE_SHARE, MOST_RESERVE)
        if more:
            told.append(more)
        if told and chance.random() < 0.3:
            durable += told[0]
            spent.confirm(told.pop(0), durable)
            assert spent.elsewhere == 0
        assert spent.written == durable
    durable += sum(told) + spent.rest()
    assert durable == spent.here == spent.total


async def _until(condition):
    while not condition():
        await asyncio.sleep(0.02)


def test_what_cannot_be_written_at_the_end_is_an_error(tmp_path):
    one = kept(str(tmp_path / "s"))
    with sqlite3.connect(tmp_path / "s", isolation_level=None) as other:
        other.execute("DROP TABLE charges")
    other.close()
    one.charge("hospital", 5)
    with pytest.raises(ResourceError, match="last seconds"):
        one.close()


def test_the_thread_that_serves_does_not_wait_for_the_disk(tmp_path):
    one = kept(str(tmp_path / "s"))
    with sqlite3.connect(tmp_path / "s", isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")  # for as long as this holds, every write waits
        begun = time.monotonic()
        one.session_opened(facts("a"))
        for _ in range(1000):
            one.request_served(served("a"))
            one.charge("hospital", 10)
        assert time.monotonic() - begun < 1.0
        other.execute("ROLLBACK")
    other.close()
    one.flush()
    assert sessions_in(tmp_path / "s")["a"]["tokens_forward"] == 10_000
    one.session_ended(facts("a"), "closed", 1.0)
    one.close()


def test_several_owners_add_to_the_same_parties(server, tmp_path):
    """Two threads here; with PostgreSQL they may as well be two machines."""
    with Database(server) as database, database.engine.begin() as db:
        METADATA.drop_all(db)
        migrate(db, "here")
    owners = [kept(server, server=name) for name in ("east", "west")]

    def work(owner):
        owner.session_opened(facts(owner.server))
        for _ in range(50):
            owner.request_served(served(owner.server))
            owner.charge("hospital", 3)
            owner.charge("clinic", 1)
            asyncio.run(owner.secured("hospital"))
        owner.session_ended(facts(owner.server), "closed", 1.0)
        owner.flush()

    threads = [threading.Thread(target=work, args=(owner,)) for owner in owners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    with pytest.raises(ResourceError, match="another owner called 'east'"):
        Database(server, server="east")
    east, west = owners
    for owner in owners:  # each hears of what the other charged, and holds in reserve, with its own next write
        owner.session_opened(facts(f"last {owner.server}"))
        owner.flush()
        assert 300 <= owner.spent_tokens("hospital") <= 300 + 300 // RESERVE_SHARE
    west.close()  # and gives its reserve back
    east.session_ended(facts("last east"), "closed", 1.0)
    east.flush()
    assert (east.spent_tokens("hospital"), east.spent_tokens("clinic")) == (300, 100)
    east.close()
    with Database(server, write=False) as database:
        (used,) = usage(database)
        assert used.sums["requests"] == 100
        assert used.sums["sessions"] == 4
        with database.engine.begin() as db:
            assert {row.party: row.tokens for row in db.execute(select(CHARGES))} == {"hospital": 300, "clinic": 100}
