"""kill -9 at the coordinator and at parties: what was acknowledged is kept, and no sum is ever a wrong one."""

from __future__ import annotations

import json
import os
import random

import numpy as np
import pytest

from model_owner.rounds.store import Charter, RoundStore
from splitfl.aggregation.sums import STAGES
from tests.live.child import child
from tests.rounds.forks import next_state, update
from tests.rounds.places import CLIP, MAX_WEIGHT, Place, mean_of

POINTS = int(os.environ.get("SPLITFL_CRASH_POINTS", "20"))
BRISK = {"deadline": 3.0, "stage_deadline": 3.0, "wait": 1.0, "farewell": 3.0}

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs fork and SIGKILL")


def run(tmp_path, parties, **spec):
    """Run a specification to its end; the place, how every round ended, and the number of kills."""
    place = Place(tmp_path / "place", parties)
    full = {
        "path": str(place.path), "parties": parties, "rounds": 3, "sum": "plain", "min_parties": 2, "seconds": BRISK,
        "kills": {}, "for_good": [], **spec,
    }  # fmt: skip
    (tmp_path / "spec.json").write_text(json.dumps(full), encoding="utf-8")
    with child(["-m", "tests.rounds.forks", tmp_path / "spec.json"], tmp_path) as running:
        assert running.wait() == 0, running.stderr.text
    stages = STAGES if full["sum"] == "mask" else ("submit",)
    charter = Charter(sum="plain", rule="fedit", stages=stages, clip=CLIP, max_weight=MAX_WEIGHT)
    store = RoundStore(place.path / "state" / "rounds.sqlite", charter, resume=True)
    try:
        rounds, standing = [ended for ended, _ in store.rounds()], store.standing()
    finally:
        store.close()
    assert standing.phase == "finished"
    assert [ended.round for ended in rounds] == list(range(full["rounds"]))
    return place, rounds, int(running.stdout.text.split()[1])


def check(place, rounds, tolerance):
    """Every mean that any party opened is the one that follows from who was summed, and from the rounds before."""
    numbers = {place.key(name): number for number, name in enumerate(place.names)}
    seen = {}
    for name in place.names:
        path = place.path / f"{name}.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            one = json.loads(line)
            seen.setdefault(one["round"], []).append(one)
    state = None
    for ended in rounds:
        if not ended.kept:
            continue
        who = [numbers[party] for party in ended.summed]
        expected = mean_of([update(n, state) for n in who], [n + 1.0 for n in who])
        right = [one for one in seen[ended.round] if one["parties"] == len(who)]
        assert 2 * len(right) > len(who)
        for one in right:
            np.testing.assert_allclose(one["mean"], expected, atol=tolerance)
            assert one["weight"] == pytest.approx(sum(n + 1.0 for n in who), rel=1e-4)
        state = next_state(np.array(right[0]["mean"], np.float32))
        assert ended.state is not None


@pytest.mark.slow
def test_a_coordinator_killed_again_and_again_ends_with_the_right_sums(tmp_path):
    points = random.Random(5)
    kills = [points.randint(1, 25) for _ in range(POINTS)]
    place, rounds, died = run(tmp_path, 3, kills={"coordinator": kills}, rounds=max(3, POINTS // 4))
    assert died >= POINTS // 2
    assert all(ended.kept for ended in rounds), [ended.reason for ended in rounds]
    check(place, rounds, 1e-5)
    assert {len(ended.summed) for ended in rounds} <= {2, 3}
    assert sum(len(ended.summed) for ended in rounds) > 2 * len(rounds)


@pytest.mark.slow
@pytest.mark.parametrize("sum_name", ["plain", "mask"])
def test_five_processes_of_which_two_are_killed_for_good(tmp_path, sum_name):
    kills = {"p01": [6 if sum_name == "plain" else 14], "p03": [17 if sum_name == "plain" else 26]}
    place, rounds, died = run(
        tmp_path,
        5,
        sum=sum_name,
        min_parties=3,
        kills=kills,
        for_good=["p01", "p03"],
        seconds={**BRISK, "deadline": 2.0},
    )
    assert died == 2
    assert all(ended.kept for ended in rounds), [ended.reason for ended in rounds]
    check(place, rounds, 1e-5)
    assert len(rounds[-1].summed) == 3


@pytest.mark.slow
def test_parties_killed_in_every_phase_come_back(tmp_path):
    kills = {"p00": [3, 5, 7, 9, 11], "p01": [4, 6, 8, 10], "p02": [13, 17]}
    place, rounds, died = run(tmp_path, 4, kills=kills, rounds=5)
    assert died >= 8
    assert any(ended.kept for ended in rounds)
    check(place, rounds, 1e-5)
    assert len(rounds[-1].summed) >= 3
