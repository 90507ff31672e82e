"""`splitfl bench audit` at its smallest: attacks reach what they have to on cases whose outcome is known."""

from __future__ import annotations

import json

import pytest
import torch

from splitfl.audit.controls import distance, make_twins
from splitfl.bench.audit import bench_audit, traffic
from splitfl.config import BenchSettings


@pytest.mark.slow
def test_traffic_of_the_whole_model_is_that_of_the_split_one(tmp_path):
    kit, adapter, sent, truth = traffic(tmp_path, (2, 2), 2)
    twins = make_twins(kit, sent, {row.number: row for row in truth}, adapter)
    assert distance(sent, twins) < 1e-3
    assert all(torch.isfinite(each.gradient).all() and each.gradient.abs().max() > 0 for each in sent)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_case_reaches_its_figure(tmp_path):
    bench_audit(BenchSettings(name="audit", quick=True, json=tmp_path / "out.json"))
    results = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["results"]
    aimed = [each for each in results if each["reach"] is not None]
    assert len(aimed) == 3
    assert [each["case"] for each in aimed if each["value"] < each["reach"]] == []
    beside = [each for each in results if each["case"].startswith("nearest")]
    assert len(beside) == 5
    assert all(abs(each["value"] - each["reference"]) < 0.04 for each in beside)
