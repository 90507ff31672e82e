"""What a grid file may say, which cells come of it, and which rows they read."""

from __future__ import annotations

import json

import pytest

from splitfl.compare.cells import REFERENCE, plan_cells
from splitfl.compare.grid import SHIPPED, read_grid
from splitfl.compare.places import find_places, model_path, path_of, write_rows
from splitfl.config_compare import CompareSettings
from splitfl.demo import assets
from splitfl.errors import DataError, UsageError
from tests.compare.rows import DATA, REST, grid_of


def test_the_shipped_grid_has_every_design_two_classifications_and_two_text_sets():
    grid = read_grid(SHIPPED)
    assert {task.classes > 0 for task in list(grid.data.values())[:2]} == {True}
    assert {task.classes for task in list(grid.data.values())[2:]} == {0}
    cells = plan_cells(grid, CompareSettings(quick=True))
    mine = [cell.design for cell in cells if cell.data == "polarity"]
    assert mine[0] == REFERENCE
    assert len(mine) == len(set(mine)) == len(cells) // 4
    for design in ("split", "guarded-online", "guarded-offline, dp-sgd-8", "fed-split", "fed-params", "fed-kd"):
        assert design in mine
    assert [d for d in mine if d.startswith("guarded-gradfree")][1:] == [
        f"guarded-gradfree, {name}" for name in ("int8", "noise-64", "noise-16", "epsilon-8")
    ]
    assert len({cell.name for cell in plan_cells(grid, CompareSettings())}) == 3 * len(cells)


def test_cells_are_cuts_times_designs_times_seeds_with_one_reference_a_seed(tmp_path):
    cells = plan_cells(grid_of(tmp_path), CompareSettings(seeds=(1, 2)))
    assert len(cells) == 2 * (1 + 2 * 4)
    assert [cell.design for cell in cells[:5]] == [
        "full-lora", "split", "split, int8", "guarded-gradfree, loud", "fed-params",
    ]  # fmt: skip
    assert (cells[-1].bottom, cells[-1].top, cells[-1].steps) == (2, 2, 4)


def test_what_a_figure_depends_on_is_in_its_digest(tmp_path):
    grid, settings = grid_of(tmp_path), CompareSettings(seeds=(0,))
    before = {cell.name: cell.digest(grid) for cell in plan_cells(grid, settings)}
    assert len(set(before.values())) == len(before)
    changed = grid_of(tmp_path, (DATA + REST).replace("ratio = 4.0", "ratio = 8.0"))
    after = {cell.name: cell.digest(changed) for cell in plan_cells(changed, settings)}
    assert {name for name in before if before[name] != after[name]} == {n for n in before if "loud" in n}
    priced = grid_of(tmp_path, "[prices]\ncpu_hour = 9.0\n" + DATA + REST)
    assert before == {cell.name: cell.digest(priced) for cell in plan_cells(priced, settings)}


def test_yaml_says_the_same(tmp_path):
    text = """
data:
  films: {title: films, model: embedded, train: a.jsonl, held_out: b.jsonl, fields: [prompt, completion], rows: [4, 4],
    quick_rows: [2, 2], cuts: ["2+2"], keep: 2, max_length: 8, steps: 2, quick_steps: 1, learning_rate: 1e-3,
    metric: loss}
protocol: {split: {}}
"""
    grid = grid_of(tmp_path, text, "grid.yaml")
    assert [cell.design for cell in plan_cells(grid, CompareSettings(seeds=(0,)))] == ["full-lora", "split"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("[data.films]", "[dota.films]", "no table 'dota'"),
        ('metric = "accuracy"', "", "lacks metric"),
        ('"1+2", "2+2"', '"1-2"', "1-2"),
        ("rows = [24, 20]", "rows = [24]", "1 entries"),
        ("quantise", "quantize", "quantize"),
        ('quantise = "int8"', 'kit = "x"', "sets itself"),
        ('noise = "gauss"', "", "has a ratio"),
        ('"none", "int8"', '"none", "int9"', "int9"),
        ("classes = 2", "classes = 0\nseeds = 3", "seeds"),
        ('metric = "accuracy"', 'metric = "accuracy"\nmetric2 = 1', "metric2"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path, old, new, said):
    text = (DATA + REST).replace(old, new)
    assert text != DATA + REST
    with pytest.raises(UsageError, match=said):
        grid_of(tmp_path, text)


def test_names_that_the_grid_has_not(tmp_path):
    grid = grid_of(tmp_path)
    for given in ({"data": ("film",)}, {"protocols": ("splat",)}, {"mechanisms": ("laud",)}):
        with pytest.raises(UsageError, match="names"):
            plan_cells(grid, CompareSettings(**given))
    with pytest.raises(UsageError, match="no run is left"):
        plan_cells(grid, CompareSettings(protocols=("fed-params",), mechanisms=("int8",)))


# ---- rows


def test_rows_are_dealt_out_evenly_and_public_ones_are_in_no_other_file(tmp_path):
    grid = grid_of(tmp_path)
    task = grid.data["films"]
    place = find_place(task)
    files = write_rows(task, place, tmp_path / "rows", (24, 20), 3)
    read = {path.stem: [json.loads(line) for line in path.read_text("utf-8").splitlines()] for path in all_of(files)}
    train, public = read["train"], read["public"]
    assert files.counts == {"train": len(train), "held-out": 20, "public": 6}
    assert len(train) == 24
    assert not {row["text"] for row in public} & {row["text"] for row in train}
    shares = [read[f"share-{number}"] for number in range(3)]
    assert sorted(row["text"] for share in shares for row in share) == sorted(row["text"] for row in train)
    assert [sum(row["label"] for row in rows) for rows in (train, public, read["held-out"])] == [12, 3, 10]
    assert all({row["label"] for row in rows} == {0, 1} for rows in (*shares, read["held-out"]))


def find_place(task):
    from splitfl.compare.places import Place

    return Place(model=assets(), train=path_of(task.train), held_out=path_of(task.held_out))


def all_of(files):
    return (files.train, files.held_out, files.public, *files.shares)


def test_too_few_rows_and_missing_fields_are_told(tmp_path):
    task = grid_of(tmp_path).data["films"]
    with pytest.raises(DataError, match="too few rows"):
        write_rows(task, find_place(task), tmp_path / "rows", (2, 2), 30)
    other = grid_of(tmp_path, (DATA + REST).replace('"text", "label"', '"words", "label"')).data["films"]
    with pytest.raises(DataError, match="lacks a field"):
        write_rows(other, find_place(other), tmp_path / "rows", (4, 4), 3)


def test_a_data_set_that_is_not_here_is_left_out(tmp_path):
    more = DATA.replace("data.films", "data.gone").replace("shipped:sentiment.train.csv", str(tmp_path / "gone.csv"))
    grid = grid_of(tmp_path, (DATA.replace("minilm", "embedded") + more.replace("minilm", "embedded") + REST))
    places, missing = find_places(grid, list(grid.data))
    assert list(places) == ["films"]
    assert model_path("embedded") == places["films"].model
    assert "gone is left out" in missing[0]
    with pytest.raises(UsageError, match="No data set"):
        find_places(grid, ["gone"])
