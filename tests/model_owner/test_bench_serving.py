"""`splitfl bench serving`: what it compares, and the parties that it plays against a real owner."""

from __future__ import annotations

import time

import pytest

from splitfl.bench.serving import NO_SLOWER_REACH, TOTAL_REACH, Turn, _ms, plan
from splitfl.bench.serving_orders import PROMPT, TURN, Go, Leave, Loaded, LoadStart, Open
from splitfl.bench.serving_side import Players
from splitfl.config import BenchSettings
from splitfl.errors import UsageError
from tests.live.owner import PARTIES
from tests.model_owner.serving import serving


def test_crowds_are_compared_with_one_party_and_batching_with_none():
    cases = {case.name: case for case in plan(BenchSettings(name="serving", crowd=(3, 5)))}
    crowd = cases["train, 5 parties"]
    assert (crowd.ours.parties, crowd.reference.parties, crowd.reach) == (5, 1, TOTAL_REACH)
    shared = [case for case in cases.values() if "batching" in case.name]
    assert all(case.ours.parties == case.reference.parties for case in shared)
    assert all(case.reference.batching == "off" and case.ours.batching != "off" for case in shared)
    assert [case.reach for case in shared if "8x128" in case.name] == [NO_SLOWER_REACH]
    assert len(plan(BenchSettings(name="serving", quick=True))) == 2


def test_options_of_another_benchmark_are_refused():
    with pytest.raises(UsageError, match="--turns has no effect"):
        BenchSettings(name="split", turns=2).check()


def test_percentiles():
    turns = [Turn(rate=1, per_processor=1, least=1, latencies=[n / 1000 for n in range(1, 51)]),
             Turn(rate=1, per_processor=1, least=1, latencies=[n / 1000 for n in range(51, 101)])]  # fmt: skip
    assert (_ms(turns, 0.5), _ms(turns, 0.99), _ms([], 0.5)) == (50.0, 99.0, None)


@pytest.mark.parametrize(("work", "memory"), [("train", "keep"), ("train", "recompute"), ("decode", "keep")])
def test_players_ask_as_fast_as_they_are_answered(trunk, tmp_path, tiny_llama, work, memory):
    with serving(trunk, tmp_path, max_length=PROMPT + TURN) as owner:
        keys = tuple(str(owner.keys / f"{party}.key_secret") for party in PARTIES)
        start = LoadStart(kit=str(tiny_llama[1]), owner_key=str(owner.keys / "owner.key"), keys=keys)
        players = Players(start, trunk.plan)
        order = Open(owner=owner.address, parties=2, work=work, rows=2, length=4, memory=memory)
        assert players.answer(order).problem is None
        now = time.monotonic()
        loaded = players.answer(Go(begin=now + 0.1, end=now + 0.8))
        assert isinstance(loaded, Loaded)
        assert loaded.problem is None
        assert all(len(latencies) > 3 for latencies in loaded.latencies)
        assert all(0 < seconds < 0.8 for latencies in loaded.latencies for seconds in latencies)
        players.answer(Leave())
        owner.until(lambda: not owner.budget.used)


def test_a_party_without_answers_is_told(trunk, tmp_path, tiny_llama):
    with serving(trunk, tmp_path, max_sessions=1) as owner:
        keys = tuple(str(owner.keys / f"{party}.key_secret") for party in PARTIES)
        start = LoadStart(kit=str(tiny_llama[1]), owner_key=str(owner.keys / "owner.key"), keys=keys)
        players = Players(start, trunk.plan)
        done = players.answer(Open(owner=owner.address, parties=2, work="train", rows=1, length=4, memory="keep"))
        assert "sessions of this party" in done.problem
        players.answer(Leave())
