"""`splitfl bench rules`: what it plans, who holds which rows, what a federation computes, and what is made of it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from splitfl.aggregation.rules import RULES
from splitfl.bench import rules_page
from splitfl.bench.rules import bench_rules, cells_of
from splitfl.bench.rules_cases import (
    AFTER,
    ALL,
    BEFORE,
    DOWN,
    ERROR,
    HEAD,
    KEPT,
    LOCAL,
    MIXED,
    OWN,
    POOLED,
    REFERENCES,
    SAME,
    SECONDS,
    TASKS,
    UP,
    VALIDATION,
    WORST,
    Cell,
    Setting,
    chosen_rate,
    count_runs,
    of_round,
    parse_name,
    plan_settings,
    seeds_of,
)
from splitfl.bench.rules_figures import Outcomes
from splitfl.bench.rules_orders import RuleRun, TaskOpened
from splitfl.bench.rules_rows import Place, find_places, write_parties
from splitfl.bench.rules_section import row_from, section
from splitfl.bench.rules_table import collapse_words, print_tables, summarise
from splitfl.bench.run import bench
from splitfl.config import BenchSettings
from splitfl.errors import DataError, ResourceError, UsageError
from splitfl.metrics import write_results
from tests.live.models import read_jsonl, write_jsonl


def settings(**given):
    return BenchSettings(name="rules", **given)


# ---- what is run


def test_every_rule_is_run_with_the_references_and_those_for_mixed_ranks_again():
    planned = plan_settings(settings(), list(TASKS))
    assert len(planned) == len(set(planned))
    answers = [setting for setting in planned if setting.task == "answers"]
    assert {s.rule for s in answers if s.ranks == SAME} == {LOCAL, POOLED, *RULES} - {"fra"}, "fra is flexlora"
    assert {s.rule for s in answers if s.ranks == MIXED} == {"rbla", "hetlora", "flora", "flexlora"}
    assert HEAD in {s.rule for s in planned if s.task == "polarity"}, "a language model has no head of its own"
    assert "fra" in {s.rule for s in plan_settings(settings(rules=("fra",)), ["answers"])}


def test_rates_come_from_a_rule_that_trains_the_same_and_is_run_first():
    planned = plan_settings(settings(rules=("fedsvd", "fedex")), ["answers"])
    assert {s.rule for s in planned[:4]} == {LOCAL, POOLED, "fedit", "rolora"}
    assert [s.rule for s in planned[4:]] == ["fedsvd", "fedex"]
    by_rule = {setting.rule: setting for setting in planned}
    figures = {
        Cell(setting=by_rule["rolora"], rate=rate, seed=4).name: {VALIDATION: loss}
        for rate, loss in ((0.001, 3.0), (0.003, 2.0), (0.01, 2.5))
    }
    figures[Cell(setting=by_rule["rolora"], rate=0.1, seed=4).name] = {"failed": 1.0}
    assert chosen_rate(by_rule["fedsvd"], 4, figures) == 0.003
    assert chosen_rate(by_rule["fedsvd"], 5, figures) is None
    assert chosen_rate(by_rule["fedex"], 4, figures) is None
    given = settings(rules=("fedsvd", "fedex"), seeds=(4, 5))
    outcomes = Outcomes(settings=given, cells=figures)
    assert [c.rate for c in cells_of(given, by_rule["rolora"], 4, outcomes, choosing=True)] == [0.001, 0.003, 0.01]
    assert [c.rate for c in cells_of(given, by_rule["rolora"], 5, outcomes, choosing=False)] == [0.003]
    assert [c.rate for c in cells_of(given, by_rule["fedsvd"], 4, outcomes, choosing=True)] == [0.003]
    assert cells_of(given, by_rule["fedex"], 4, outcomes, choosing=True) == []
    assert count_runs(given, planned) == 4 * (3 + 1) + 2 * (1 + 1)


def test_names_of_runs_are_read_back_and_others_refused():
    for setting in plan_settings(settings(), list(TASKS)):
        cell = Cell(setting=setting, rate=0.003, seed=2)
        assert parse_name(cell.name) == cell
    for name in ("", "answers / fedit", "answers / mean / one rank / rate 1 / seed 0",
                 "answers / fedit / one rank / rate x / seed 0"):  # fmt: skip
        with pytest.raises(DataError, match="names no run"):
            parse_name(name)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rules": ("fedavg",)}, "no aggregation rule 'fedavg'"),
        ({"tasks": ("tweets",)}, "no task 'tweets' here"),
        ({"resume": True}, "--resume needs the file"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_starts(given, said):
    with pytest.raises(UsageError, match=said):
        bench(settings(**{"tasks": ("answers",), **given}))


@pytest.mark.parametrize(("name", "given"), [("rules", {"workers": 3}), ("utility", {"rounds": 3}),
                                             ("rules", {"max_steps": 3}), ("split", {"rules": ("ffa",)})])  # fmt: skip
def test_options_of_another_benchmark_are_refused(name, given):
    with pytest.raises(UsageError, match="has no effect with this benchmark"):
        BenchSettings(name=name, **given)


# ---- rows


def rows_of(files):
    return {what: read_jsonl(Path(getattr(files, what))) for what in files.__struct_fields__}


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    monkeypatch.setenv("SPLITFL_SHARED", str(tmp_path / "nowhere"))
    return tmp_path


def disjoint(parties, key):
    seen = [row[key] for party in parties for rows in party.values() for row in rows]
    return len(seen) == len(set(seen))


def test_labels_lie_askew_with_the_parties_and_evenly_with_all(shipped):
    place = Place(task=TASKS["polarity"], model=shipped, shared=None)
    parties = [rows_of(files) for files in write_parties(place, place.task, 4, shipped)]
    assert disjoint(parties, "text")
    for what in ("train", "validation", "held_out"):
        shares = [sum(row["label"] for row in party[what]) / len(party[what]) for party in parties]
        assert shares == pytest.approx([0.1, 11 / 30, 19 / 30, 0.9], abs=0.07)
        labels = Counter(row["label"] for party in parties for row in party[what])
        assert labels[0] == pytest.approx(labels[1], abs=2)


def test_sources_lie_with_a_party_each_in_their_own_size(shipped, monkeypatch):
    folder = shipped / "shared" / "data" / "medquad"
    folder.mkdir(parents=True)
    monkeypatch.setenv("SPLITFL_SHARED", str(shipped / "shared"))
    sources = {"NIH": 600, "CDC": 300, "few": 2, "NHS": 60}
    for name, part in (("train", 1), ("test", 10)):
        rows = [
            {"question": f"{name} {source} {n}?", "answer": f"{n}.", "source": source}
            for source, count in sources.items()
            for n in range(count // part)
        ]
        write_jsonl(folder / f"{name}.jsonl", rows)
    (place,), missing = find_places(("answers",))
    assert (missing, place.shared) == ([], folder)
    parties = [rows_of(files) for files in write_parties(place, place.task, 3, shipped)]
    assert [len(party["train"]) for party in parties] == [300, 150, 30]
    assert [len(party["held_out"]) for party in parties] == [16, 16, 6]
    assert all(f" {source} " in row["prompt"] for party, source in zip(parties, ("NIH", "CDC", "NHS"), strict=True)
               for rows in party.values() for row in rows)  # fmt: skip
    assert disjoint(parties, "prompt")
    with pytest.raises(DataError, match="4 parties need as many sources; 3 have"):
        write_parties(place, place.task, 4, shipped)
    (folder / "test.jsonl").write_text('{"question": "x"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="lacks a field"):
        write_parties(place, place.task, 2, shipped)


@pytest.mark.parametrize("parties", [2, 3, 6])
def test_shipped_rows_are_dealt_out_to_any_number_of_parties(shipped, parties):
    (place,), _ = find_places(("answers",))
    assert place.shared is None
    dealt = [rows_of(files) for files in write_parties(place, place.task, parties, shipped)]
    assert len(dealt) == parties
    assert disjoint(dealt, "prompt")


# ---- figures


def figures(score, losses, errors=(), **more):
    found = {
        BEFORE: 0.5,
        ALL: score,
        OWN: score,
        WORST: score - 0.1,
        AFTER: score,
        SECONDS: 2.0,
        VALIDATION: losses[-1],
    }
    gained = losses[0] - min(losses)
    found[KEPT] = (losses[0] - losses[-1]) / gained if gained > 0 else 0.0
    found |= {of_round(VALIDATION, number): loss for number, loss in enumerate(losses)}
    found |= {of_round(ERROR, number): error for number, error in enumerate(errors, start=1)}
    return found | ({UP: 100.0, DOWN: 200.0, "aggregator": 0.004} if errors else {}) | more


OPENED = TaskOpened(train_rows=(224, 40), validation_rows=(8, 8), held_out_rows=(16, 16), tuned_values=1000)


def filled(**given):
    """Outcomes of a whole grid: `fedit` best at the highest rate, `ffa` collapsed once, `rolora` idle once."""
    outcomes = Outcomes(settings=settings(**{name: value for name, value in given.items() if name != "json"}))
    for task in TASKS:
        outcomes.tell(task, OPENED, (2, 3), shipped=task == "answers")
    for setting in plan_settings(outcomes.settings, list(TASKS)):
        for seed in (0, 1, 2):
            for cell in cells_of(outcomes.settings, setting, seed, outcomes, choosing=seed == 0):
                losses, errors = [2.0, 1.5, 1.5 - cell.rate], (0.0, 0.25)
                if (setting.rule, seed) == ("ffa", 1):
                    losses = [2.0, 1.0, 1.9]
                if (setting.rule, seed) == ("rolora", 2):
                    losses = [2.0, 2.1, 2.2]
                if RULES.get(setting.rule) is None:
                    errors = ()
                run = RuleRun(figures=figures(0.6 + cell.rate + 0.01 * seed, losses, errors))
                if (setting.rule, setting.ranks, seed) == ("hetlora", MIXED, 1):
                    run = RuleRun(figures={}, failed="not finite")
                outcomes.note(cell.name, run)
    if "json" in given:  # once, and not after each of these many runs
        write_results(given["json"], "bench", settings(**given), outcomes.results())
    return outcomes


def test_rows_are_of_the_chosen_rate_over_the_seeds():
    rows = {(row.task, row.rule, row.ranks): row for row in summarise(filled().cells)}
    fedit = rows["polarity", "fedit", SAME]
    assert (fedit.rate, fedit.edge, fedit.seeds) == (0.01, "highest", 3)
    assert (fedit.every.median, fedit.every.low, fedit.every.high) == pytest.approx((0.62, 0.61, 0.63))
    assert rows["polarity", "fedex", SAME].edge == ""
    assert fedit.errors == (0.0, 0.25)
    assert rows["answers", LOCAL, SAME].errors == ()
    assert collapse_words(fedit) == "no"
    assert collapse_words(rows["answers", "ffa", SAME]) == "1 of 3"
    assert collapse_words(rows["answers", "rolora", SAME]) == "no gain in 1 of 3"
    mixed = rows["answers", "hetlora", MIXED]
    assert (mixed.seeds, mixed.failed, mixed.collapsed) == (3, 1, 1)
    assert [row.rule for row in summarise(filled().cells)][:3] == [LOCAL, POOLED, "rolora"]
    assert REFERENCES == (LOCAL, POOLED, HEAD)


def test_figures_are_read_again_and_others_refused(tmp_path):
    path = tmp_path / "figures.json"
    outcomes = filled(json=path)
    again = Outcomes.resumed(settings(json=path, resume=True))
    assert (again.told, again.cells) == (outcomes.told, outcomes.cells)
    assert Outcomes.resumed(settings(json=tmp_path / "none.json")).cells == {}
    for change in ({"rounds": 3}, {"local_steps": 9}, {"parties": 3}, {"quick": True}):
        with pytest.raises(UsageError, match="other settings"):
            Outcomes.resumed(settings(json=path, **change))
    with pytest.raises(UsageError, match="other rows or lengths"):
        again.tell("answers", OPENED, (2, 4), shipped=True)
    text = path.read_text(encoding="utf-8")
    for spoilt, said in (
        ("[]", "not a file of figures"), (text.replace('"name": "rules"', '"name": "split"'), "other figures"),
        (text.replace("answers / fedit", "answers / fedavg"), "names no run"),
    ):  # fmt: skip
        path.write_text(spoilt, encoding="utf-8")
        with pytest.raises(DataError, match=said):
            Outcomes.resumed(settings(json=path))


def test_the_table_fits_the_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    print_tables(filled().cells)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "answers, one rank: loss, nats a token; 0.500 before training; seeds: 3"
    found = [line.split() for line in lines]
    assert ["fedit", "0.01", "(highest)", "0.620", "0.620", "0.2500", "100", "no"] in found
    print_tables({})
    assert capsys.readouterr().out == ""


# ---- the page


def test_summary_picture_and_section(tmp_path, capsys):
    path, docs = tmp_path / "figures.json", tmp_path / "docs"
    filled(json=path)
    assert rules_page.main([str(path), "--docs", str(docs)]) == 0
    summary = json.loads((docs / "rules.json").read_text(encoding="utf-8"))
    picture = (docs / "images" / "rules.svg").read_text(encoding="utf-8")
    assert all(f">{name}<" in picture for name in RULES if name != "fra")
    rows = [row_from(entry) for entry in summary["rows"]]
    assert [(row.task, row.rule) for row in rows] == [(r.task, r.rule) for r in summarise(filled().cells)]
    text = "\n".join(section(summary))
    assert (
        "| [`fedit`](#fedit) | 0.01 (highest) | 0.620 | 0.610 to 0.630 | 0.620 | 0.520 | 0.620 | < 1e-5 | 0.2500 |"
        in text
    )
    assert (
        "- *answers*: collapsed or never gained on some seed: `rolora` (one rank), `ffa` (one rank), `hetlora`" in text
    )
    assert "2 rounds, 3 steps of each party in a round, 3 seeds" in text
    assert "images/rules.svg" in text


def test_a_page_of_nothing_or_of_quick_runs_is_refused(tmp_path, capsys):
    path = tmp_path / "figures.json"
    outcomes = Outcomes(settings=settings(json=path))
    outcomes.tell("answers", OPENED, (2, 3), shipped=True)
    outcomes.note(Cell(setting=Setting(task="answers", rule=LOCAL), rate=0.01, seed=0).name,
                  RuleRun(figures=figures(0.6, [2.0, 1.0])))  # fmt: skip
    assert rules_page.main([str(path), "--docs", str(tmp_path)]) != 0
    assert "holds no run to show" in capsys.readouterr().err
    filled(json=path, quick=True)
    assert rules_page.main([str(path), "--docs", str(tmp_path)]) != 0
    assert "is of --quick" in capsys.readouterr().err
    assert not (tmp_path / "rules.json").exists()


# ---- the command


@pytest.mark.slow
def test_the_command_runs_keeps_and_goes_on(shipped, capsys, monkeypatch):
    path = shipped / "figures.json"
    given = {"quick": True, "tasks": ("answers",), "rules": ("ffa", "rbla"), "json": path, "resume": True}
    bench(settings(**given))
    shown = capsys.readouterr()
    assert "[7/7] answers / rbla / mixed ranks / rate 0.003 / seed 0: loss" in shown.err
    cells = Outcomes.resumed(settings(**given)).cells
    assert {parse_name(name).setting.rule for name in cells} == {LOCAL, POOLED, "fedit", "rolora", "ffa", "rbla"}
    assert all(found[ALL] != found[BEFORE] for found in cells.values())

    def none(*args, **kwargs):
        raise AssertionError("nothing was left to do")

    monkeypatch.setattr("splitfl.bench.rules.Child", none)
    bench(settings(**given))
    assert "answers, mixed ranks" in capsys.readouterr().out


def test_a_rule_that_fails_at_every_rate_is_told(shipped, monkeypatch):
    def run(settings, places, planned, outcomes, work, course):
        for rate in (0.001, 0.003, 0.01):
            outcomes.note(Cell(setting=planned[0], rate=rate, seed=0).name, RuleRun(figures={}, failed="not finite"))

    monkeypatch.setattr("splitfl.bench.rules._run_all", run)
    with pytest.raises(
        ResourceError, match=r"settings have no rate at which training works; the first is .*not finite"
    ):
        bench_rules(settings(tasks=("answers",), rules=("fedit",)))
    assert seeds_of(settings(quick=True)) == (0,)
