"""`splitfl bench aggregation` and `bench rounds`: the arithmetic of ratios and reaches, tables, and small runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from splitfl.aggregation.factors import Layout
from splitfl.bench import aggregation_goals as goals
from splitfl.bench import aggregation_table as table
from splitfl.bench.aggregation import bench_aggregation, results_of_factors, results_of_sums
from splitfl.bench.aggregation_factors import stack_factors
from splitfl.bench.aggregation_goals import GOALS, figure, verdict
from splitfl.bench.aggregation_orders import StackFactors
from splitfl.bench.aggregation_sums import TENSORS, Ground, many_tensors, measure_mask, one_tensor, plain_sum
from splitfl.bench.rounds import figures_of_memory, figures_of_rounds, plan
from splitfl.bench.rounds_run import Course, Federation, bare_seconds, run_federation
from splitfl.bench.run import bench
from splitfl.config import BenchSettings
from splitfl.errors import DataError, InternalError, UsageError
from splitfl.metrics import write_results

CASE = "mask: 10 parties, 1,000,000 values"


def turn(**changes):
    """The figures of one turn, as its process says them."""
    figures = {"plain.coordinator": 5.0}
    for name in ("mask", "bfv public", "bfv seeded"):
        figures |= {
            f"{name}.up": 4_000_400.0, f"{name}.up ratio": 1.0, f"{name}.party": 9.0, f"{name}.one tensor": 10.0,
            f"{name}.many tensors": 10.5, f"{name}.coordinator": 10.0, f"{name}.opening": 1.0, f"{name}.wrong": 0.0,
        }  # fmt: skip
    figures |= {"mask.coordinator ratio": 2.0, "mask.signed": 19.0}
    figures |= {"nvflare.up": 58e6, "nvflare.down": 4e7, "nvflare.party": 800.0, "nvflare.coordinator": 2700.0,
                "nvflare.many tensors": 900.0, "nvflare.many tensors up": 63e6}  # fmt: skip
    return {**figures, **changes}


def found(turns, kind, metric, *, full=True):
    results = results_of_sums(turns, 10, 1_000_000, 0.0, full=full)
    return next(r for r in results if goals.kind_of(r.case) == kind and r.metric == metric)


# ---- reaches


@pytest.mark.parametrize(
    ("metric", "value", "ratio", "said"),
    [
        (goals.BYTES, 4.1, 1.0, "met"),
        (goals.BYTES, 4.11, 1.0, "missed"),
        (goals.COORDINATOR, 100.0, 2.0, "met"),
        (goals.COORDINATOR, 1.0, 2.01, "missed"),
        (goals.PARTY, 9.99, None, "met"),
        (goals.PARTY, 10.5, None, "missed"),
        (goals.WRONG, 0, None, "met"),
        (goals.WRONG, 1, None, "missed"),
        (goals.OPENING, 1.0, None, ""),
    ],
)
def test_a_reach_bounds_the_figure_or_its_ratio(metric, value, ratio, said):
    assert verdict(figure(CASE, metric, value, "", ratio=ratio)) == said


def test_a_small_run_has_no_reach_and_a_ratio_without_a_reference_no_verdict():
    assert verdict(figure(CASE, goals.PARTY, 99.0, "ms", full=False)) == ""
    assert verdict(figure(CASE, goals.COORDINATOR, 99.0, "ms")) == ""


def test_the_aims_are_those_that_are_written_down():
    assert GOALS["bfv public key", goals.BYTES].bound == 16.2
    assert GOALS["bfv seeded", goals.BYTES].bound == 8.2
    assert GOALS["bfv seeded", goals.BYTES_NVFLARE].bound == pytest.approx(1 / 3.5, abs=1e-3)
    assert GOALS["bfv public key", goals.COORDINATOR_NVFLARE].bound == 1 / 8
    assert GOALS["plain, 2 parties", goals.ROUND_BYTES].bound == 17e6


# ---- figures


def test_ratios_are_taken_within_a_turn():
    """A machine that is twice as slow in one turn must not move the ratio."""
    turns = [turn(), turn(), turn(**{"bfv public.coordinator": 40.0, "plain.coordinator": 20.0})]
    result = found(turns, "bfv public key", goals.COORDINATOR)
    assert (result.value, result.reference, result.ratio) == (10.0, 5.0, 2.0)
    beside = found(turns, "bfv public key", goals.COORDINATOR_NVFLARE)
    assert (beside.reference, beside.ratio) == (2700.0, pytest.approx(10 / 2700))
    assert verdict(beside) == "met"


def test_one_wrong_value_in_one_turn_is_told():
    result = found([turn(), turn(**{"mask.wrong": 3.0}), turn()], "mask", goals.WRONG)
    assert (result.value, verdict(result)) == (3.0, "missed")


def test_bytes_are_a_value_and_beside_nvflare():
    assert found([turn()], "bfv seeded", goals.BYTES).value == pytest.approx(4.0004)
    assert found([turn()], "bfv seeded", goals.BYTES_NVFLARE).ratio == pytest.approx(4.0004 / 58)


def test_what_was_not_measured_is_left_out():
    only = {name: value for name, value in turn().items() if name.startswith(("plain", "mask"))}
    kinds = {goals.kind_of(r.case) for r in results_of_sums([only], 10, 1_000_000, 0.0, full=True)}
    assert kinds == {"plain float32 sum", "mask", "machine"}


def test_memory_is_what_large_updates_cost_beyond_small_ones():
    federation = Federation(sum="mask", parties=50, values=1_000_000, rounds=4, together=True)
    large = Course(seconds=(9.0, 2.0, 3.0), sizes=(9, 5, 7), error=0.0, left=2, peak=112, early=104, cpu=0.3)
    small = Course(seconds=(1.0,), sizes=(1,), error=0.0, left=0, peak=100, early=100, cpu=0.1)
    memory = {r.metric: r for r in figures_of_memory(federation, large, small, full=True)}
    assert (memory[goals.HELD].value, memory[goals.HELD].reference) == (12, 8_000_000)
    assert memory[goals.GROWTH].value == 8
    assert verdict(memory[goals.LEFT]) == "missed"
    rounds = {r.metric: r for r in figures_of_rounds(federation, large, 0.1, full=True)}
    assert rounds[goals.ROUND_TIME].value == 2.5, "the first round warms up"
    assert rounds[goals.ROUND_BYTES].reference == 2 * 4 * 1_000_000 * 50


def test_what_is_run():
    names = [federation.case for federation in plan(BenchSettings(name="rounds"), encrypted=False)]
    assert names == [
        "plain, 2 parties: 1,000,000 values, each party a process",
        "mask, 3 parties: 1,000,000 values, each party a process",
        "mask, 50 parties: 1,000,000 values, parties in one process",
    ]
    quick = plan(BenchSettings(name="rounds", quick=True), encrypted=True)
    assert len(quick) == 4
    assert max(federation.values for federation in quick) == 20_000


# ---- what is measured


def test_an_adapter_of_88_tensors_holds_the_same_values_as_one_tensor():
    vector = np.arange(16_000, dtype=np.float32)
    many, one = many_tensors(vector), one_tensor(vector)
    assert sum(2 for _ in many.pairs) == TENSORS
    np.testing.assert_array_equal(Layout.of(many).to_vector(many), vector)
    np.testing.assert_array_equal(Layout.of(one).to_vector(one), vector)


def test_the_masked_sum_is_compared_value_by_value(monkeypatch):
    ground = Ground(3, 800)
    assert measure_mask(ground)["mask.wrong"] == 0
    ground.whole[1][17] += 1  # one step of one value of one party
    assert measure_mask(ground)["mask.wrong"] == 1


def test_the_reference_is_the_float32_sum():
    ground = Ground(3, 800)
    total = ground.vectors[0] + ground.vectors[1] + ground.vectors[2]
    np.testing.assert_array_equal(np.frombuffer(plain_sum(ground.blobs), np.float32), total)


def test_fra_is_watched_for_the_largest_tensor():
    order = StackFactors(parties=3, modules=2, width=128, rank=2)
    measured = stack_factors(order)
    assert measured["fra.product"] == 128 * 128
    assert 128 * 3 * 2 <= measured["fra.largest"] < 128 * 128 / 4
    results = {r.metric: r for r in results_of_factors(measured, order, full=False)}
    assert results[goals.LARGEST].ratio < 0.25


def test_bare_sockets_take_some_time():
    assert 0 < bare_seconds(Federation(sum="plain", parties=2, values=1000, rounds=1)) < 10


# ---- tables and pages


def record(tmp_path, name="aggregation", file="figures.json"):
    path = tmp_path / file
    write_results(path, "bench", BenchSettings(name=name), results_of_sums([turn()], 10, 1_000_000, 0.5, full=True))
    return path


def test_the_table_says_reach_and_verdict(capsys):
    table.print_table(results_of_sums([turn(**{"mask.party": 11.0})], 10, 1_000_000, 0.5, full=True))
    printed = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert "party 11.00 ms 800.0 ms 0.014 ≤ 10 ms missed" in lines
    assert "coordinator 10.00 ms 5.000 ms 2.000 ≤ 2 x met" in lines
    assert "Other programs kept 0.5 cores busy meanwhile." in printed


def test_a_page_is_written_between_its_marks_and_another_page_is_refused(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n", encoding="utf-8")
    assert table.main([str(record(tmp_path)), "--into", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| mask: 10 parties, 1,000,000 values | wrong values | 0 |" in text
    page.write_text("no marks", encoding="utf-8")
    assert table.main([str(record(tmp_path)), "--into", str(page)]) != 0
    assert "no place for figures" in capsys.readouterr().err


def test_figures_of_another_benchmark_are_refused(tmp_path):
    with pytest.raises(DataError, match="other figures"):
        table.read_record(record(tmp_path, name="split"))
    with pytest.raises(DataError, match="not a file of figures"):
        table.read_record(tmp_path / "none.json")


def test_an_option_of_another_benchmark_is_refused():
    with pytest.raises(UsageError, match="--models has no effect"):
        BenchSettings(name="aggregation", models=("S",)).check()
    with pytest.raises(UsageError, match="--resume has no effect"):
        BenchSettings(name="rounds", resume=True).check()
    BenchSettings(name="rounds", steps=3, quick=True).check()


# ---- runs


@pytest.mark.slow
@pytest.mark.long
def test_a_quick_run_of_aggregation(tmp_path, capsys):
    path = tmp_path / "figures.json"
    bench(BenchSettings(name="aggregation", quick=True, steps=1, json=path))
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    by = {(goals.kind_of(r["case"]), r["metric"]): r for r in results}
    assert by["mask", goals.WRONG]["value"] == 0
    assert by["mask", goals.BYTES]["value"] < 4.1
    assert 0 < by["fra", goals.LARGEST]["ratio"] < 0.1
    assert all(r["reach"] is None for r in results), "small sizes are not judged"
    assert "mask" in capsys.readouterr().out
    assert bench_aggregation is not None


@pytest.mark.slow
@pytest.mark.long
def test_a_round_between_processes(tmp_path):
    federation = Federation(sum="mask", parties=3, values=2_000, rounds=2, together=True)
    course = run_federation(federation, tmp_path)
    assert (len(course.seconds), course.left) == (2, 0)
    assert 0 < course.cpu < 60
    assert 0 < course.error < 1e-6
    assert min(course.sizes) > 2 * 4 * 2_000 * 3
    assert course.peak >= course.early > 10_000_000


@pytest.mark.slow
@pytest.mark.long
def test_a_wrong_mean_has_no_speed(tmp_path, monkeypatch):
    monkeypatch.setattr("splitfl.bench.rounds_run._ERROR", 1e-12)
    with pytest.raises(InternalError, match="has no speed"):
        run_federation(Federation(sum="plain", parties=2, values=500, rounds=1), Path(tmp_path))
