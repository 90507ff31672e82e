"""`splitfl bench frameworks`: every design in real processes at its smallest, and the section made of the figures."""

from __future__ import annotations

import json

import pytest

from splitfl.bench.frameworks import (
    ACCURACY,
    BEFORE,
    CPU,
    FLOPS,
    FRAMEWORKS,
    LOSS,
    MEMORY,
    RECEIVED,
    SENT,
    bench_frameworks,
    size_of,
)
from splitfl.bench.frameworks_page import BEGIN, END, SUMMARY, compact, filled, write_page
from splitfl.config import BenchSettings
from splitfl.errors import DataError, UsageError
from tests.pages import DOCS

METRICS = {LOSS: 2.5, BEFORE: 3.0, ACCURACY: 0.5, SENT: 1000, RECEIVED: 2000, CPU: 12.3, FLOPS: 5e9, MEMORY: 1 << 30}


def record(**changed):
    """A file of figures."""
    settings = {"name": "frameworks", "quick": False, "rounds": None, "local_steps": None}
    results = [
        {"case": name, "metric": metric, "value": value, "unit": "", "reference": None, "ratio": None, "reach": None}
        for name in FRAMEWORKS
        for metric, value in METRICS.items()
    ]
    return {"settings": settings, "results": results, "machine": {}, **changed}


@pytest.mark.slow
@pytest.mark.long
def test_all_three_at_their_smallest(tmp_path):
    bench_frameworks(BenchSettings(name="frameworks", quick=True, json=tmp_path / "out.json"))
    found = {}
    for each in json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["results"]:
        found.setdefault(each["case"], {})[each["metric"]] = each["value"]
    assert found.keys() == FRAMEWORKS.keys()
    whole, taught, split = (found[name] for name in FRAMEWORKS)
    assert len({round(each[BEFORE], 3) for each in found.values()}) == 1  # one model, one evaluator
    assert all(0 < each[LOSS] < 20 and each[CPU] > 0 and each[MEMORY] > 10**8 for each in found.values())
    assert split[FLOPS] < whole[FLOPS] < taught[FLOPS]
    assert split[RECEIVED] > max(whole[RECEIVED], taught[RECEIVED])


def test_a_framework_that_there_is_not():
    with pytest.raises(UsageError, match="fed-paramz"):
        bench_frameworks(BenchSettings(name="frameworks", frameworks=("fed-paramz",)))
    with pytest.raises(UsageError, match="--frameworks has no effect"):
        BenchSettings(name="rules", frameworks=("fed-kd",))
    assert size_of(BenchSettings(name="frameworks", rounds=9)).rounds == 9


def test_the_section_is_made_of_the_figures(tmp_path):
    (tmp_path / "figures.json").write_text(json.dumps(record()), encoding="utf-8")
    (tmp_path / "federation.md").write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    write_page(tmp_path / "figures.json", tmp_path)
    text = (tmp_path / "federation.md").read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| KD-FedLLM: `fed-kd` | 3.000 | 2.500 | 0.500 | 1.0 kB | 2.0 kB | 12 s | 5 GFLOP |" in text
    assert (tmp_path / SUMMARY).is_file()


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"settings": {**record()["settings"], "name": "rules"}}, DataError),
        ({"settings": {}}, DataError),
        ({"settings": {**record()["settings"], "quick": True}}, UsageError),
        ({"results": record()["results"][:5]}, UsageError),
    ],
)
def test_figures_that_are_none_of_a_whole_run(changed, error):
    with pytest.raises(error):
        compact(record(**changed))


def test_a_page_without_a_place_for_it():
    with pytest.raises(DataError, match="no place"):
        filled("a page", compact(record()))


@pytest.mark.skipif(not (DOCS / SUMMARY).is_file(), reason="docs/frameworks.json is not there")
def test_the_page_shows_the_kept_figures():
    page = (DOCS / "federation.md").read_text(encoding="utf-8")
    assert filled(page, json.loads((DOCS / SUMMARY).read_text(encoding="utf-8"))) == page
