"""A tiny grid from the command to the page: an owner, a party and an audit as processes, then taken up again."""

from __future__ import annotations

import csv
import json

import pytest

from splitfl.compare.command import compare
from splitfl.compare.result import OWNER_S, PARTY_S, SCORE, SENT, TRIPS
from splitfl.config_compare import CompareSettings
from tests.live.models import answer_rows, save_tiny, write_jsonl

GRID = """
[grid]
seeds = [0]
records = 2
knowledge = ["K1"]
attacks = ["nearest"]

[data.words]
title = "sentences"
model = "{model}"
train = "{rows}"
held_out = "{rows}"
fields = ["prompt", "completion"]
rows = [6, 4]
quick_rows = [3, 2]
public_rows = 1
cuts = ["1+1"]
keep = 1
max_length = 24
batch = 2
steps = 2
quick_steps = 1
learning_rate = 1e-3
metric = "loss"

[protocol.split]
"""


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_cells_are_run_attacked_summed_up_and_not_run_again(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    model, rows = save_tiny("llama", tmp_path / "model"), write_jsonl(tmp_path / "rows.jsonl", answer_rows())
    (tmp_path / "grid.toml").write_text(GRID.format(model=model, rows=rows), encoding="utf-8")
    settings = CompareSettings(grid=tmp_path / "grid.toml", out=tmp_path / "out", json=tmp_path / "c.json")
    compare(settings)
    cells = {path.stem: json.loads(path.read_text("utf-8")) for path in (tmp_path / "out" / "cells").glob("*.json")}
    assert cells.keys() == {"words_1-1_full-lora_none_seed0", "words_1-1_split_none_seed0"}
    split = cells["words_1-1_split_none_seed0"]
    assert split["failed"] == ""
    figures = split["figures"]
    assert 4 <= figures[TRIPS] <= 6  # a forward and a backward a step; the check of the owner asks as well
    assert figures[SENT] > 0
    assert figures[SCORE] > 0
    assert figures[PARTY_S] > 0
    assert figures[OWNER_S] >= 0
    assert split["sends"] == ["hidden", "gradient"]
    assert split["not_attacked"] == ""
    assert {attack["name"] for attack in split["attacks"]} == {"nearest"}
    assert not any((tmp_path / "out" / "runs").iterdir())
    with (tmp_path / "out" / "compare.csv").open(encoding="utf-8", newline="") as file:
        assert [line["design"] for line in csv.DictReader(file)] == ["full-lora", "split"]
    assert "<svg" in (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").iterdir()}
    compare(CompareSettings(grid=tmp_path / "grid.toml", out=tmp_path / "out", no_gradient=True))
    assert "gradients of the rows leave" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
