"""`splitfl bench chaos`, `soak` and `hostile`: schedules, verdicts, what a refusal costs, and short runs of each."""

from __future__ import annotations

import dataclasses
import json

import pytest

from splitfl.bench import chaos, hostile, soak, soak_page
from splitfl.bench.bad_frames import BAD_FRAMES
from splitfl.bench.chaos_cases import CASES, schedule
from splitfl.bench.chaos_run import Outcome
from splitfl.bench.soak_loops import Score
from splitfl.config import BenchSettings
from splitfl.errors import DataError, InternalError, UsageError
from splitfl.metrics import write_results

EVERYTHING = next(case for case in CASES if case.name == "split, everything")
ONCE = next(case for case in CASES if case.once)
WHOLE = Outcome(adapter="a", losses=((1, 2.0),), forms=9, booked=9, text="[]")


def wrong(results):
    return {r.metric for r in results if r.reach is not None and r.value != r.reach}


# ---- chaos


def test_a_schedule_follows_from_case_and_seed():
    assert schedule(EVERYTHING, 3) == schedule(EVERYTHING, 3) != schedule(EVERYTHING, 4)
    for case in CASES:
        events = schedule(case, 0)
        assert [event.share for event in events] == sorted(event.share for event in events)
        counts = [sum(event.what == what for event in events) for what in ("link", "owner", "party")]
        assert counts == [case.link_faults, case.owner_kills, case.party_kills]


def test_every_fault_is_drawn_somewhere():
    kinds = {str(event.fault).split(" for")[0] for seed in range(20) for event in schedule(EVERYTHING, seed)}
    assert {"cut", "cut in a frame", "half open", "delay", "trickle", "refuse"} <= kinds


@pytest.mark.parametrize(
    ("case", "changes", "found"),
    [
        (EVERYTHING, {}, set()),
        (EVERYTHING, {"code": 7}, {"exit code"}),
        (EVERYTHING, {"adapter": "b"}, {"another adapter or other losses"}),
        (EVERYTHING, {"losses": ((1, 2.5),)}, {"another adapter or other losses"}),
        (EVERYTHING, {"altered": 1}, {"requests said again in other bytes"}),
        (EVERYTHING, {"forms": 10}, {"hidden states that left in another form"}),
        (EVERYTHING, {"booked": 12}, set()),  # steps behind the last checkpoint leave again, in the same bytes
        (ONCE, {"adapter": "b"}, set()),
        (ONCE, {"forms": 10}, {"hidden states that left in another form"}),
        (ONCE, {"booked": 10}, {"releases booked beyond those of an undisturbed run"}),
    ],
)
def test_what_is_wrong_with_a_run_is_found(case, changes, found):
    assert wrong(chaos.judged(case, 0, dataclasses.replace(WHOLE, **changes), WHOLE)) == found


def test_a_run_without_an_adapter_is_never_right():
    empty = Outcome(forms=9, booked=9)
    assert wrong(chaos.judged(EVERYTHING, 0, empty, empty)) == {"another adapter or other losses"}


# ---- soak


def test_memory_is_compared_with_that_after_ten_minutes():
    memory = soak.Memory([(60.0 * minute, 100 + (minute > 9) + 9 * (minute > 50)) for minute in range(61)])
    [first, *minutes] = soak._of_memory("owner, steady", memory)
    assert (first.value, first.reference, first.reach) == (110, 101, 1.05)
    assert first.ratio == pytest.approx(110 / 101)
    assert len(minutes) == 61
    assert soak._of_memory("owner, killed", memory)[0].reach is None


def test_a_lost_step_is_a_problem():
    score = Score()
    score.failed("why")
    assert (score.lost, score.problems) == (1, ["why"])


def test_a_soak_is_drawn_and_tabled(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    memory = soak.Memory([(60.0 * minute, 200 << 20) for minute in range(12)])
    file = tmp_path / "soak.json"
    write_results(file, "bench", BenchSettings(name="soak"), soak._of_memory("owner, steady", memory))
    assert soak_page.main([str(file), "--picture", str(tmp_path / "soak.svg")]) == 0
    assert "| owner, steady | memory at the end" in capsys.readouterr().out
    assert "owner, steady" in (tmp_path / "soak.svg").read_text(encoding="utf-8")
    write_results(file, "bench", BenchSettings(name="split"), [])
    with pytest.raises(DataError, match="other figures"):
        soak_page.read(file)


# ---- hostile


@pytest.mark.parametrize("name", BAD_FRAMES)
def test_a_refusal_allocates_nothing_of_the_size_that_is_claimed(name):
    """Whatever is claimed, four kilobytes are enough: an exception, its text, and the header as it was decoded."""
    hostile.refuse(BAD_FRAMES[name])
    assert hostile.allocated(BAD_FRAMES[name]) < hostile.ALLOCATED_REACH


def test_a_sound_message_is_not_counted_as_refused():
    good = BAD_FRAMES["a frame too many"][:2]
    with pytest.raises(AssertionError, match="was taken"):
        hostile.refuse(good)


# ---- options


@pytest.mark.parametrize(
    ("name", "given"),
    [("split", {"minutes": 3.0}), ("chaos", {"minutes": 3.0}), ("soak", {"runs": 3}), ("soak", {"quick": True}),
     ("chaos", {"connections": 3}), ("hostile", {"seeds": (3,)})],
)  # fmt: skip
def test_options_of_other_benchmarks_are_refused(name, given):
    with pytest.raises(UsageError, match="no effect"):
        BenchSettings(name=name, **given)


def test_their_own_options_are_taken():
    assert BenchSettings(name="soak", minutes=2.5, seeds=(1,)).minutes == 2.5
    assert BenchSettings(name="chaos", runs=2, quick=True, seeds=(1, 2)).runs == 2
    assert BenchSettings(name="hostile", connections=10, quick=True).connections == 10


# ---- all of it, shortly


@pytest.mark.long
@pytest.mark.timeout(900)
def test_chaos_runs_and_goes_on_where_it_was(tmp_path):
    file = tmp_path / "chaos.json"
    settings = BenchSettings(name="chaos", quick=True, seeds=(0,), json=file)
    chaos.bench_chaos(settings)
    before = json.loads(file.read_text(encoding="utf-8"))["results"]
    assert {result["case"] for result in before} == {f"{name}, seed 0" for name in chaos.QUICK_CASES}
    chaos.bench_chaos(dataclasses.replace(settings, resume=True))
    assert json.loads(file.read_text(encoding="utf-8"))["results"] == before


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_short_soak(tmp_path):
    file = tmp_path / "soak.json"
    soak.bench_soak(BenchSettings(name="soak", minutes=1.5, json=file))
    results = json.loads(file.read_text(encoding="utf-8"))["results"]
    assert {r["value"] for r in results if r["metric"].startswith(("wrong", "lost"))} == {0}
    assert sum(r["value"] for r in results if r["metric"].endswith("compared")) > 20


@pytest.mark.long
@pytest.mark.timeout(900)
def test_hostile_load_is_measured(tmp_path):
    file = tmp_path / "hostile.json"
    hostile.bench_hostile(BenchSettings(name="hostile", quick=True, json=file))
    results = json.loads(file.read_text(encoding="utf-8"))["results"]
    rates = [r["ratio"] for r in results if r["metric"] == "rate of the honest party"]
    assert len(rates) == 4
    assert all(ratio > 0.1 for ratio in rates)


def test_a_wrong_result_of_a_soak_ends_it_with_an_error():
    class Loop:
        score = Score(problems=["party: step 3 brought another loss"])

    with pytest.raises(InternalError, match="step 3"):
        soak._judge(soak.Soak(owners={}, proxies={}, loops={"party": Loop()}))
