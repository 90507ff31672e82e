"""What comes of the cells: rows, the Pareto set, the verdict, advice, and the files a person gets."""

from __future__ import annotations

import csv
import json

import pytest

from splitfl.compare.advise import advise, in_words, rules_of
from splitfl.compare.cells import plan_cells
from splitfl.compare.command import compare, in_parallel
from splitfl.compare.page import compact, section
from splitfl.compare.pareto import dominates
from splitfl.compare.privacy import read_audit
from splitfl.compare.report import json_results, write_csv, write_page
from splitfl.compare.result import HANDED, PARTY_S, SENT, done_cells, read_outcome, write_outcome
from splitfl.compare.summary import summarise, verdict
from splitfl.config_compare import CompareSettings, Limits
from splitfl.errors import DataError, ResourceError, UsageError
from tests.compare.rows import DATA, REST, attacked, grid_of, outcome, reference

STRONG = attacked(0.9, 0.85, 0.95)
WEAK = attacked(0.12, 0.08, 0.16)
MEMBER = attacked(0.53, 0.47, 0.59, 0.5, name="membership, loss", metric="AUC")


@pytest.fixture
def grid(tmp_path):
    return grid_of(tmp_path)


@pytest.fixture
def outcomes():
    return [
        reference(),
        outcome("split", 0.88, attacks=[STRONG, WEAK]),
        outcome("guarded-gradfree, loud", 0.7, attacks=[WEAK], sends=("hidden",)),
        outcome("fed-params", 0.89, attacks=[MEMBER], sends=("update",), hands="model", summed="mask"),
        outcome("fed-kd", 0.6, sends=("logits",), hands="model", not_attacked="answers: no attack here reads them"),
    ]


def row_of(rows, design):
    return next(row for row in rows if row.design == design)


def test_gain_loss_and_the_best_attack(grid, outcomes):
    rows = summarise(outcomes, grid)
    split = row_of(rows, "split")
    assert split.kept.mean == pytest.approx(0.95)
    assert split.lost == pytest.approx(2.0)
    assert split.advantage == pytest.approx(0.8 / 0.9)
    assert split.best == STRONG
    assert split.works
    assert not row_of(rows, "guarded-gradfree, loud").works
    assert row_of(rows, "fed-kd").advantage is None


def test_seeds_have_their_own_reference(grid):
    more = [
        reference(0.9, seed=0),
        reference(0.7, seed=1),
        outcome("split", 0.7, seed=0),
        outcome("split", 0.7, seed=1),
    ]
    row = row_of(summarise(more, grid), "split")
    assert (row.kept.low, row.kept.high) == (pytest.approx(0.5), pytest.approx(1.0))
    assert row.seeds == 2


def test_the_pareto_set_leaves_out_what_is_beaten_and_what_was_not_attacked(grid, outcomes):
    worse = outcome("split, int8", 0.87, attacks=[STRONG], figures={PARTY_S: 11.0})
    rows = summarise([*outcomes, worse], grid)
    stars = {row.design for row in rows if row.pareto}
    assert stars == {"fed-params", "guarded-gradfree, loud"}
    assert dominates((0, 0, 0), (0, 0, 1))
    assert not dominates((0, 0, 0), (0, 0, 0))
    assert not dominates((0, 1, 0), (1, 0, 0))


def test_the_verdict_is_said_either_way(grid, outcomes):
    said = verdict(summarise(outcomes, grid), grid)
    assert "fed-params on films (keeps 98 %)" in said
    assert "empirical" in said
    leaky = [*outcomes[:3], outcome("fed-params", 0.89, attacks=[STRONG], sends=("update",))]
    assert verdict(summarise(leaky, grid), grid).startswith("No design keeps 95 %")
    assert "nothing can be said" in verdict(summarise(outcomes[:1] + outcomes[4:], grid), grid)


# ---- advice


def test_limits_in_words_are_those_of_the_options():
    words = Limits(advise="No gradient leaves, under 1 GB,  at most 2 points lost and, at most 10 % recovered".replace(
        " and,", ","))  # fmt: skip
    options = Limits(no_gradient=True, max_bytes="1GB", max_loss=2.0, max_recovery=0.1)
    assert rules_of(words) == rules_of(options)
    more = rules_of(Limits(advise="the model stays, no activation leaves, no attack works, under 60 seconds"))
    assert (more.model_stays, more.no_activation, more.no_attack, more.max_seconds) == (True, True, True, 60.0)
    assert rules_of(Limits(advise="at most 0.5 in money, up to 512MiB")).max_bytes == 512 * 2**20


@pytest.mark.parametrize("words", ["be nice", "under 3 parsecs", "at most points lost"])
def test_words_that_say_nothing_are_refused(words):
    with pytest.raises(UsageError, match="not understood"):
        rules_of(Limits(advise=words))
    with pytest.raises(UsageError, match="given twice"):
        rules_of(Limits(advise="under 1 GB", max_bytes="2GB"))


def test_the_design_that_fits_and_why_the_others_do_not(grid, outcomes):
    rows = summarise(outcomes, grid)
    advice = advise(rows, rules_of(Limits(advise="no gradient leaves, under 1 GB, at most 2 points lost")), ())["films"]
    assert advice.chosen.design == "fed-params"
    said = "\n".join(in_words("films", advice))
    assert "not split (cut 1+2): gradients of the rows leave" in said
    assert "not guarded-gradfree, loud (cut 1+2): 20.0 points lost" in said
    assert "full-lora" not in said


def test_what_was_not_attacked_keeps_no_limit_on_attacks(grid, outcomes):
    rows = summarise(outcomes, grid)
    advice = advise(rows, rules_of(Limits(no_attack=True, model_stays=True)), ("films",))["films"]
    assert advice.chosen.design == "guarded-gradfree, loud"
    assert "not attacked" in " ".join(advice.reasons["fed-kd (cut 1+2)"])
    none = advise(rows, rules_of(Limits(max_recovery=0.0, model_stays=True, no_activation=True)), ())["films"]
    assert none.chosen is None
    assert "no design of this comparison" in in_words("films", none)[1]
    with pytest.raises(UsageError, match="--on names"):
        advise(rows, rules_of(Limits()), ("songs",))


def test_of_several_that_fit_the_one_that_loses_least_then_leaks_least(grid):
    two = [reference(), outcome("split", 0.88, attacks=[STRONG]), outcome("fed-params", 0.88, attacks=[MEMBER])]
    advice = advise(summarise(two, grid), rules_of(Limits(max_bytes="1GB")), ())["films"]
    assert [row.design for row in advice.fitting] == ["fed-params", "split"]
    assert "fits, but leaks more" in advice.reasons["split (cut 1+2)"][0]
    big = outcome("guarded-online", 0.9, figures={HANDED: 5e9, SENT: 0.0})
    reasons = advise(summarise([*two, big], grid), rules_of(Limits(max_bytes="1GB")), ())["films"].reasons
    assert "5.0 GB" in reasons["guarded-online (cut 1+2)"][0]


# ---- files


def test_csv_and_page_hold_every_cell(grid, outcomes, tmp_path):
    pytest.importorskip("matplotlib")
    failed = outcome("split, int8", failed="<the owner> ended")
    rows = summarise([*outcomes, failed], grid)
    write_csv(tmp_path / "c.csv", [*outcomes, failed], rows, grid)
    with (tmp_path / "c.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["design"] for line in lines] == [o.design for o in (*outcomes, failed)]
    assert lines[1]["attack name"] == "nearest"
    assert float(lines[1]["attack value"]) == 0.9
    assert lines[-1]["failed"] == "<the owner> ended"
    assert float(lines[1]["money"]) == pytest.approx(30 / 3600 * 0.05 + 7e6 / 1e9 * 0.09)
    write_page(tmp_path / "p.html", rows, grid, [*outcomes, failed], quick=True)
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 2
    assert "★ fed-params" in page
    assert "&lt;the owner&gt; ended" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    results = json_results(outcomes, rows)
    assert next(r.value for r in results if r.case.endswith("fed-params") and r.metric == "in the Pareto set") == 1


def test_the_section_of_the_docs_is_made_of_the_rows(grid, outcomes):
    kept = json.loads(json.dumps(compact(outcomes, grid, quick=True)))
    text = "\n".join(section(kept))
    assert "| ★ `fed-params` (closed) | 98 %" in text
    assert "(closed)" not in text.split("`fed-kd`")[1]
    assert verdict(summarise(outcomes, grid), grid).split(":")[0] in text.replace("\n", " ")


# ---- resume


def test_a_result_is_read_again_but_not_of_another_cell_or_a_failed_one(grid, tmp_path):
    cells = plan_cells(grid, CompareSettings(seeds=(0,), protocols=("split",)))
    digests = {cell.name: cell.digest(grid) for cell in cells}
    first, second, third = cells[0], cells[1], cells[2]
    write_outcome(first, digests[first.name], reference(), tmp_path)
    write_outcome(second, digests[second.name], outcome(attacks=[STRONG], failed="it broke"), tmp_path)
    write_outcome(third, "another", outcome(), tmp_path)
    assert done_cells(cells, digests, tmp_path) == {first.name: reference()}
    path = tmp_path / "cells" / f"{second.name}.json"
    assert read_outcome(path)[1].attacks == (STRONG,)
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="no result of a cell"):
        read_outcome(path)


def test_cells_in_the_way_are_refused_and_advice_is_read_from_them(tmp_path, capsys):
    path = tmp_path / "grid.toml"
    path.write_text(DATA.replace(', "2+2"', "") + REST, encoding="utf-8")
    settings = {"grid": path, "out": tmp_path / "out", "protocols": ("split",), "seeds": (0,)}
    grid = grid_of(tmp_path, path.read_text(encoding="utf-8"))
    for cell in plan_cells(grid, CompareSettings(**settings)):
        found = reference() if cell.protocol is None else outcome(cell.design, attacks=[STRONG])
        write_outcome(cell, cell.digest(grid), found, tmp_path / "out")
    with pytest.raises(UsageError, match="already"):
        compare(CompareSettings(**settings))
    compare(CompareSettings(**settings, max_loss=20.0, json=tmp_path / "c.json"))
    assert "split (cut 1+2) fits" in capsys.readouterr().out
    assert json.loads((tmp_path / "c.json").read_text("utf-8"))["command"] == "compare"
    compare(CompareSettings(**settings, resume=True))  # nothing is left to run
    compare(CompareSettings(**settings, plan=True))
    assert "films_1-2_split_int8_seed0" in capsys.readouterr().out


def test_a_cell_that_fails_does_not_stop_the_others(grid):
    cells, kept = plan_cells(grid, CompareSettings(seeds=(0,))), []
    in_parallel(
        cells, 2, lambda cell: outcome(cell.design, failed="no" * (cell.bottom == 1)), lambda c, o: kept.append(o)
    )
    assert len(kept) == len(cells)
    assert {bool(one.failed) for one in kept} == {True, False}


def test_an_interruption_ends_the_cells(grid):
    def keep(cell, found):
        raise KeyboardInterrupt

    cells = plan_cells(grid, CompareSettings(seeds=(0,)))
    with pytest.raises(KeyboardInterrupt):
        in_parallel(cells, 2, lambda cell: outcome(), keep)


# ---- what an audit says


TOLD = {
    "token recovery": 0.8, "token recovery, low": 0.7, "token recovery, high": 0.9, "beyond frequency": 0.6,
    "beyond frequency, low": 0.5, "beyond frequency, high": 0.7, "bag F1": 0.9, "records": 24,
}  # fmt: skip


def test_the_main_figure_of_each_attack_is_read():
    def lines(case, **figures):
        return [{"case": case, "metric": name.replace("_", " "), "value": value} for name, value in figures.items()]

    results = [
*lines("map K1, as it crossed", **TOLD),
        *lines("map K1, undefended", **{"token recovery": 1.0}),
        *lines("norms K0, as it crossed", **{"AUC": 0.6, "AUC, low": 0.45, "AUC, high": 0.7, "records": 24}),
        *lines("control, shuffled: map K1", works=1),
    ]  # fmt: skip
    found = read_audit(results)
    assert [(a.name, a.knowledge, a.metric) for a in found] == [("map", "K1", "token recovery"), ("norms", "K0", "AUC")]
    assert found[0].baseline == pytest.approx(0.2)
    assert found[0].works
    assert found[1].baseline == 0.5
    assert not found[1].works
    assert found[1].advantage == pytest.approx(0.2)


@pytest.mark.slow
def test_failures_are_told(tmp_path, monkeypatch):
    path = tmp_path / "grid.toml"
    path.write_text(DATA.replace("minilm", str(tmp_path / "nowhere")) + REST, encoding="utf-8")
    with pytest.raises(UsageError, match="No data set"):
        compare(CompareSettings(grid=path, out=tmp_path / "out"))
    broken = tmp_path / "model"
    broken.mkdir()
    (broken / "config.json").write_text("{}", encoding="utf-8")
    path.write_text(DATA.replace("minilm", str(broken)).replace(', "2+2"', "") + "[protocol.split]\n", encoding="utf-8")
    with pytest.raises(ResourceError, match="2 of 2 cells failed"):
        compare(CompareSettings(grid=path, out=tmp_path / "out", seeds=(0,)))
