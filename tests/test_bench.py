"""`splitfl bench split`: what it plans, compares, refuses, shows and keeps. Runs of it: `test_bench_live`."""

from __future__ import annotations

import json

import numpy as np
import pytest

from splitfl.bench import page
from splitfl.bench.agreement import Disagreement, compare_losses, compare_texts
from splitfl.bench.cases import BYTES, PARTY_MEMORY, RATE, STEP, plan_cases, reach_of, verdict
from splitfl.bench.course import Course
from splitfl.bench.figures import Figures, quarters
from splitfl.bench.run import bench, earlier_results
from splitfl.bench.sizes import SIZES, size_named
from splitfl.bench.split import in_turns
from splitfl.bench.table import in_words, print_table, remarks, row
from splitfl.config import BenchSettings
from splitfl.errors import DataError, UsageError
from splitfl.metrics import Result, write_results


def settings(**given):
    return BenchSettings(name="split", **given)


def case_of(**given):
    return plan_cases(settings(**given), cores=1)[0]


# ---- cases, bytes, reaches


def test_cases_cover_both_shapes_both_thread_counts_and_both_batches():
    names = [case.name for case in plan_cases(settings(models=("M",)), cores=2)]
    assert names == [
        "train M 8x128 float32 1 thread",
        "train M 4x512 float32 1 thread",
        "generate M batch 1 float32 1 thread",
        "generate M batch 4 float32 1 thread",
        "train M 8x128 float32 2 threads",
        "train M 4x512 float32 2 threads",
        "generate M batch 1 float32 2 threads",
        "generate M batch 4 float32 2 threads",
    ]
    assert len(set(names)) == len(names)


def test_one_core_is_measured_with_one_thread_and_what_is_asked_for_is_what_is_measured():
    assert {case.threads for case in plan_cases(settings(), cores=1)} == {1}
    assert {case.threads for case in plan_cases(settings(threads=(4,)), cores=1)} == {4}
    only = plan_cases(settings(models=("S", "S"), work="generate", new_tokens=8), cores=1)
    assert [(case.size.name, case.rows, case.new_tokens) for case in only] == [("S", 1, 8), ("S", 4, 8)]


@pytest.mark.parametrize(
    ("given", "said"),
    [({"models": ("XL",)}, "no model size 'XL'"), ({"shapes": ("1x2000",)}, "2000 tokens is too long")],
)
def test_what_cannot_be_measured_is_refused_before_anything_starts(given, said):
    with pytest.raises(UsageError, match=said):
        plan_cases(settings(**given), cores=1)


def test_an_unknown_benchmark_is_refused_with_the_nearest():
    with pytest.raises(UsageError) as refused:
        bench(BenchSettings(name="splat"))
    assert refused.value.hint == "did you mean 'split'?"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"models": ("M",)}, 4 * 8 * 128 * 512 * 4),
        ({"models": ("M",), "dtype": "bfloat16"}, 4 * 8 * 128 * 512 * 2),
        ({"models": ("L",), "shapes": ("4x512",)}, 4 * 4 * 512 * 1024 * 4),
    ],
)
def test_a_step_costs_four_cut_tensors_at_the_wire_dtype(given, expected):
    assert case_of(**given).bytes_a_step() == expected


def test_the_sizes_have_the_parameters_they_say():
    import torch
    from transformers import AutoModelForCausalLM

    from splitfl.bench.checkpoint import configuration

    for size in SIZES.values():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(configuration(size))
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(size.parameters, rel=0.01)
        assert model.config.num_hidden_layers == size.layers
        dropout = {name: value for name, value in vars(model.config).items() if "drop" in name and value}
        assert set(dropout) <= {"summary_first_dropout"}, "dropout would make the two sides differ"


@pytest.mark.parametrize(
    ("metric", "size", "ratio", "said"),
    [
        (STEP, "M", 1.05, "met"),
        (STEP, "L", 1.051, "missed"),
        (STEP, "S", 3.0, ""),
        (BYTES, "S", 1.0101, "missed"),
        (PARTY_MEMORY, "L", 0.45, "met"),
        (PARTY_MEMORY, "M", 0.99, ""),
        (RATE, "M", 0.84, "missed"),
        (RATE, "M", 1.2, "met"),
        ("cores busy elsewhere", "M", 9.0, ""),
    ],
)
def test_verdicts(metric, size, ratio, said):
    reach = reach_of(metric, size_named(size))
    assert verdict(Result(case="c", metric=metric, value=1, unit="", ratio=ratio, reach=reach)) == said


# ---- comparisons


def test_equal_losses_pass_and_the_difference_is_told():
    assert compare_losses([9.0, 8.9, 8.7], [9.0, 8.9, 8.7], "float32") == 0
    assert compare_losses([9.0, 8.0], [9.0, 8.0008], "float32") == pytest.approx(1e-4, rel=0.01)


@pytest.mark.parametrize(
    ("monolith", "split", "metric"),
    [
        ([9.0, 8.9, 8.7], [9.0, 8.9, 8.71], "loss difference"),
        ([9.0, 8.9], [9.0, float("nan")], "loss difference"),
        ([float("nan"), 8.9], [float("nan"), 8.9], "loss difference"),
        ([9.0, 9.0001], [9.0, 9.0001], "movement of the loss"),
    ],
)
def test_losses_that_prove_nothing_or_differ_are_refused(monolith, split, metric):
    with pytest.raises(Disagreement) as found:
        compare_losses(monolith, split, "float32")
    assert found.value.metric == metric


def logits_for(tokens, *, vocabulary=50, height=8.0):
    """Logits [new, rows, vocabulary] whose largest entries are `tokens` [rows][new]."""
    values = np.random.default_rng(0).normal(size=(len(tokens[0]), len(tokens), vocabulary)).astype(np.float32)
    for place, line in enumerate(tokens):
        for step, token in enumerate(line):
            values[step, place, token] = height
    return values


def test_equal_texts_are_counted():
    tokens = [[1, 2, 3], [4, 5, 6]]
    logits = logits_for(tokens)
    same = compare_texts(tokens, tokens, logits, logits, "float32")
    assert (same.equal, same.total, same.logit_difference) == (6, 6, 0)


def test_a_row_may_part_where_two_logits_were_nearly_equal():
    whole, cut = [[1, 2, 3]], [[1, 7, 9]]
    whole_logits, cut_logits = logits_for(whole), logits_for(whole)
    whole_logits[1, 0, 7], cut_logits[1, 0, 7] = 8.0 - 1e-5, 8.0 + 1e-5
    cut_logits[2] = logits_for(cut)[2]  # after parting the two are free to differ
    same = compare_texts(whole, cut, whole_logits, cut_logits, "float32")
    assert (same.equal, same.total) == (1, 3)
    assert 0 < same.logit_difference < 1e-4


def test_other_texts_and_other_logits_are_refused():
    whole, cut = [[1, 2, 3]], [[1, 7, 3]]
    with pytest.raises(Disagreement, match="tokens differ"):
        compare_texts(whole, cut, logits_for(whole), logits_for(whole), "float32")
    with pytest.raises(Disagreement, match="logits"):
        compare_texts(whole, whole, logits_for(whole), logits_for(whole) + np.float32(0.1), "float32")


# ---- figures


def test_who_goes_first_changes_and_the_warm_up_is_included():
    went: list[str] = []

    def side(name):
        return lambda: went.append(name) or name

    done: list[int] = []
    pairs = in_turns(side("whole"), side("cut"), 2, lambda: done.append(1))
    assert went == ["whole", "cut", "cut", "whole", "whole", "cut", "cut", "whole"]
    assert pairs == [("whole", "cut")] * 4
    assert len(done) == 4


def test_the_ratio_is_that_of_pairs_so_a_drifting_machine_does_not_move_it():
    figures = Figures(case_of(models=("M",)))
    figures.add_times(STEP, "ms", [(1000, 1010), (2000, 2020), (4000, 4040), (8000, 8080)])
    assert figures.results[0].ratio == pytest.approx(1.01)
    assert figures.results[0].reach == 1.05
    assert figures.results[1].value == "1.010-1.010"
    assert quarters([1.0]) == (1.0, 1.0)


def sample():
    def one(metric, value, unit, **more):
        return Result(case="train L 8x128 float32 1 thread", metric=metric, value=value, unit=unit, **more)

    return [
        one(STEP, 13000.0, "ms", reference=12500.0, ratio=1.04, reach=1.05),
        one("middle half of the ratios", "1.030-1.045", "ratio"),
        one(BYTES, 16_800_000, "bytes", reference=16_777_216, reach=1.01),
        one(PARTY_MEMORY, 2e9, "bytes", reference=4e9, reach=0.45),
        one("cores busy elsewhere", 0.5, "cores"),
    ]


def test_the_table_names_verdicts_and_a_busy_machine(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    print_table(sample())
    text = capsys.readouterr().out
    lines = [line.rstrip() for line in text.splitlines()]
    assert lines[1] == "train L 8x128 float32 1 thread"
    assert lines[2].split() == ["step", "time", "13,000", "ms", "12,500", "ms", "1.040", "≤", "1.05", "met"]
    assert next(line for line in lines if "memory" in line).endswith("missed")
    assert "2 of the 3 figures" in text
    assert "quiet machine" in text
    assert row(sample()[2])[1:4] == ("16.8 MB", "16.8 MB", "1.001")
    assert in_words(sample()) == "13,000 ms against 12,500 ms, ratio 1.040"
    assert remarks([]) == []


def test_without_a_terminal_each_case_has_two_lines_and_the_time_left(capsys):
    first, second = plan_cases(settings(models=("L",), work="generate"), cores=1)
    with Course([first, second], steps=1) as course:
        course.begin(first)
        course.loaded()
        for _ in range(3):
            course.advance()
        course.end([])
        course.begin(second)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "[1/2] generate L batch 1 float32 1 thread"
    assert lines[1].startswith("[1/2] generate L batch 1 float32 1 thread: split and monolith did not compute the same")
    assert lines[2].startswith("[2/2] generate L batch 4 float32 1 thread  about ")
    assert lines[2].endswith(" left")


# ---- files


def kept(tmp_path, **given):
    path = tmp_path / "figures.json"
    write_results(path, "bench", settings(**given), sample())
    return path


def test_resuming_takes_the_figures_of_the_same_settings(tmp_path):
    path = kept(tmp_path, steps=4)
    assert earlier_results(settings(steps=4, json=path, resume=True)) == sample()
    assert earlier_results(settings(json=tmp_path / "none.json")) == []


def test_resuming_measures_again_what_had_no_speed(tmp_path):
    path = tmp_path / "figures.json"
    differing = Result(case="train M", metric="loss difference", value=0.2, unit="", reference=1e-4)
    write_results(path, "bench", settings(), [*sample(), differing])
    assert earlier_results(settings(json=path)) == sample()


@pytest.mark.parametrize("change", [{"steps": 5}, {"dtype": "bfloat16"}, {"new_tokens": 32}])
def test_resuming_from_other_settings_is_refused(tmp_path, change):
    with pytest.raises(UsageError, match="other settings"):
        earlier_results(settings(json=kept(tmp_path, steps=4), **{"steps": 4, **change}))


def test_resuming_from_another_machine_nothing_or_nonsense_is_refused(tmp_path):
    path = kept(tmp_path)
    record = json.loads(path.read_text(encoding="utf-8"))
    record["machine"]["cpu_count"] += 1
    path.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(UsageError, match="another machine"):
        earlier_results(settings(json=path))
    with pytest.raises(UsageError, match="needs the file"):
        earlier_results(settings(resume=True))
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(DataError, match="not a file of figures"):
        earlier_results(settings(json=path))


def test_the_page_is_written_between_its_marks(tmp_path):
    path, target = kept(tmp_path), tmp_path / "page.md"
    target.write_text(f"# Top\n\n{page.BEGIN}\nold\n{page.END}\n\nbelow\n", encoding="utf-8")
    assert page.main([str(path), "--into", str(target)]) == 0
    text = target.read_text(encoding="utf-8")
    assert text.startswith(f"# Top\n\n{page.BEGIN}\n")
    assert text.endswith(f"{page.END}\n\nbelow\n")
    assert "old" not in text
    cells = "12,500 ms | 13,000 ms | 1.040 | 1.030-1.045 | 1.001 | 0.500 | no: peak memory of the party (busy machine)"
    assert f"| train L 8x128 float32 1 thread | {cells} |" in text
    assert page.main([str(path), "--into", str(target)]) == 0
    assert target.read_text(encoding="utf-8") == text


def test_the_page_refuses_what_it_cannot_use(tmp_path, capsys):
    target = tmp_path / "page.md"
    target.write_text("# Top\n", encoding="utf-8")
    assert page.main([str(kept(tmp_path)), "--into", str(target)]) == DataError.exit_code
    other = tmp_path / "other.json"
    write_results(other, "tune", {"name": "x"}, [])
    assert page.main([str(other)]) == DataError.exit_code
    assert "holds other figures" in capsys.readouterr().err
    assert target.read_text(encoding="utf-8") == "# Top\n"
