"""`splitfl bench gpu` at toy size, on a processor: the same script that runs on a card."""

from __future__ import annotations

import pytest

from splitfl.bench.cases import BARE
from splitfl.bench.gpu import SHAPES, bench_gpu, measure
from splitfl.config import BenchSettings
from splitfl.errors import UsageError


def test_a_shape_that_is_not_there_is_named():
    with pytest.raises(UsageError, match="no shape '2B'") as caught:
        bench_gpu(BenchSettings(name="gpu", size=("2B",)))
    assert caught.value.expected == "toy, 1B, 3B, 8B"


@pytest.mark.parametrize(("name", "billions"), [("1B", 1.0), ("3B", 2.9), ("8B", 7.1)])
def test_shapes_have_about_the_parameters_they_are_named_after(name, billions):
    """Layers alone: head and embeddings of the real ones come on top."""
    shape = SHAPES[name]
    attention = shape.width**2 * (2 + 2 * shape.key_heads / shape.heads)
    assert shape.layers * (attention + 3 * shape.width * shape.inner) / 1e9 == pytest.approx(billions, rel=0.05)
    assert shape.width % shape.heads == shape.heads % shape.key_heads == 0


@pytest.mark.slow
def test_a_toy_runs_anywhere_and_both_ways_compute_the_same(tmp_path):
    settings = BenchSettings(name="gpu", size=("toy",), steps=2, new_tokens=6)
    results = measure(settings, "toy", tmp_path / "log")
    found = {result.metric: result for result in results}
    shape = SHAPES["toy"]
    assert {result.case for result in results} == {"gpu, toy on cpu, float32, 2x16"}
    assert found["bytes of a step"].value == 4 * shape.rows * shape.length * shape.width * 4
    assert found["loss difference, relative"].value <= 1e-6
    assert found["equal tokens"].ratio == 1.0
    assert all(found[metric].value > 0 for metric in ("matrix product", "owner's arithmetic", BARE, "generation"))
    assert found[BARE].reach is None
