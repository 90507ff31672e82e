"""Requests whose sizes are right and whose numbers are not."""

from __future__ import annotations

import pytest
import torch

from tests.hostile.conftest import MARKER

LENGTH = 4


@pytest.fixture
def hidden(foe):
    foe.opened()
    return torch.randn(2, LENGTH, foe.plan.width, generator=torch.Generator().manual_seed(5))


def positions(*values):
    return torch.tensor([values], dtype=torch.int32)


def mask(*rows):
    return torch.tensor(rows, dtype=torch.uint8)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused(foe, hidden, value):
    bad = hidden.clone()
    bad[1, 2, 3] = value
    foe.forward(1, bad)
    assert foe.refused("not_finite").step == 1
    foe.forward(2, hidden, keep=True)
    foe.result()
    foe.backward(2, bad)
    assert foe.refused("not_finite").step == 2
    foe.backward(2, hidden)
    assert torch.isfinite(foe.result()).all()


@pytest.mark.parametrize("value", [1e-45, -1e-40, 0.0, 3.4e38, MARKER])
def test_numbers_at_the_edge_are_answered_or_refused(foe, hidden, value):
    for step, keep in enumerate((False, True)):
        foe.forward(step, torch.full_like(hidden, value), keep=keep)
        came = foe.answer()
        assert getattr(came, "code", "not_finite") == "not_finite"


def test_a_gradient_that_overflows_can_be_sent_again_smaller(foe, hidden, trunk):
    """The first try has used the kept graph up."""
    from splitfl.link import TrunkRequest

    foe.forward(1, hidden, keep=True)
    foe.result()
    foe.backward(1, torch.full_like(hidden, 3e38))
    foe.refused("not_finite")
    foe.backward(1, torch.full_like(hidden, 3e38))
    foe.refused("not_finite")
    foe.backward(1, hidden)
    _, kept = trunk.forward_kept(TrunkRequest(hidden=hidden), recompute=False)
    assert torch.equal(foe.result(), trunk.backward(kept, hidden))


@pytest.mark.parametrize("value", [-5, -1, 128, 2**31 - 1, -(2**31)])
def test_a_position_beyond_the_model_is_refused(foe, hidden, value):
    for step, keep in enumerate((False, True)):
        foe.forward(step, hidden, keep=keep, positions=positions(0, 1, 2, value))
        refused = foe.refused("malformed")
        assert refused.step == step
        assert refused.expected == "0 to 127"
    foe.forward(2, hidden, cache=1, positions=positions(value, 1, 2, 3))
    foe.refused("malformed")


@pytest.mark.parametrize("value", [2, 7, 255])
def test_a_mask_holds_zero_and_one_only(foe, hidden, value):
    foe.forward(1, hidden, mask=mask([1, 1, 1, 1], [0, 0, 1, value]))
    foe.refused("malformed")


def test_a_mask_as_long_as_cached_and_new_positions(foe, hidden):
    foe.forward(1, hidden, mask=mask([1] * 6, [1] * 6))
    foe.refused("malformed")
    foe.forward(2, hidden, cache=1)
    foe.result()
    foe.forward(3, hidden[:, :1], cache=1, past=LENGTH, mask=mask([0] * 9, [1] * 9))
    foe.refused("malformed")


def test_rows_that_are_all_padding_hurt_nobody_else(foe, hidden):
    foe.forward(1, hidden, mask=mask([0, 0, 0, 0], [1, 1, 1, 1]))
    came = foe.answer()
    assert getattr(came, "code", "not_finite") == "not_finite"
    foe.forward(2, hidden, mask=mask([0, 0, 0, 0], [0, 0, 0, 0]), keep=True)
    came = foe.answer()
    assert getattr(came, "code", "not_finite") == "not_finite"


CACHED = {
    "goes on from beyond its end": {"past": LENGTH + 1},
    "goes on from far beyond its end": {"past": 100},
    "names a row that is not there": {"past": LENGTH, "rows": (0, 2)},
    "names a row far away": {"past": LENGTH, "rows": (0, 2**63 - 1)},
    "names fewer rows than it sends": {"past": LENGTH, "rows": (0,)},
    "names more rows than it sends": {"past": LENGTH, "rows": (0, 1, 1)},
    "names five hundred rows": {"past": LENGTH, "rows": (0,) * 512},
    "is another cache": {"past": LENGTH, "cache": 77},
}


def test_a_request_that_does_not_fit_its_cache_is_refused(foe, hidden):
    foe.forward(1, hidden, cache=1)
    foe.result()
    for step, (name, fields) in enumerate(CACHED.items(), start=2):
        foe.forward(step, hidden[:, :1], **({"cache": 1} | fields))
        assert foe.refused("unknown_cache").step == step, name
    foe.forward(50, hidden[:1, :1], cache=1, past=LENGTH)
    foe.refused("unknown_cache")
    foe.forward(51, hidden[:, :1], cache=1, past=LENGTH)  # what was refused has not hurt it
    foe.result()


def test_a_cache_that_would_be_too_long_is_refused(foe, hidden):
    foe.forward(1, hidden, cache=1)
    foe.result()
    foe.forward(2, hidden[:, :1], cache=1, past=128)
    foe.refused("too_large")
    foe.forward(3, hidden[:, :1], cache=1, past=2**63 - 1)
    foe.refused("too_large")
    foe.forward(4, hidden, past=1)
    foe.refused("malformed")


def test_a_cache_and_a_kept_step_exclude_each_other(foe, hidden):
    foe.forward(1, hidden, cache=1, keep=True)
    foe.refused("malformed")
    foe.forward(2, hidden, cache=2, rows=(0, 1))
    foe.refused("malformed")


def test_one_long_row_cannot_be_blown_up_into_hundreds(foe, hidden):
    """256 rows of 128 positions for a moment, though only 256 rows of one position are asked for."""
    foe.forward(1, torch.zeros(1, 128, foe.plan.width), cache=1)
    foe.result()
    foe.forward(2, torch.zeros(256, 1, foe.plan.width), cache=1, past=1, rows=(0,) * 256)
    foe.refused("busy")


def test_a_cache_may_start_again_with_other_rows(foe, hidden):
    foe.forward(1, hidden, cache=1)
    first = foe.result()
    foe.forward(2, hidden[:1], cache=1)
    assert torch.equal(foe.result(), first[:1])
