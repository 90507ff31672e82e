"""Clipping onto the grid in exact arithmetic, the grid's settings, and the random numbers below the noise.

Statistics are held to seven standard errors: a false alarm once in four hundred thousand million checks.
"""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitfl.errors import UsageError
from splitfl.privacy.clipping import gaussians, grid_step, uniforms
from splitfl.privacy.mechanisms import Gauss

ERRORS = 7.0
LARGEST = torch.finfo(torch.float32).max

# float32 as it comes: denormal, huge, whole numbers that lie on the grid, and nothing at all.
NUMBERS = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(-4, 4, width=32),
    st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1.1754944e-38, LARGEST, -LARGEST, 1.0, -1.0, 0.5]),
)


@st.composite
def settings_of_noise(draw):
    clip = draw(st.one_of(st.floats(1e-6, 1e6), st.sampled_from([1.0, 2.0, 0.125])))
    return clip, clip * draw(st.floats(1e-3, 1e3))


@st.composite
def activations(draw):
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 5)))
    if draw(st.booleans()):
        return torch.full(shape, draw(NUMBERS), dtype=torch.float32)
    count = math.prod(shape)
    return torch.tensor(draw(st.lists(NUMBERS, min_size=count, max_size=count)), dtype=torch.float32).view(shape)


def squares(codes: torch.Tensor) -> list[int]:
    return [sum(int(code) ** 2 for code in unit) for unit in codes.reshape(-1, codes.shape[-1]).tolist()]


def in_units(codes: torch.Tensor, unit: str) -> torch.Tensor:
    return codes.flatten(1) if unit == "record" else codes.flatten(0, 1)


# ---- the grid and the bound


@settings(max_examples=200, deadline=None)
@given(noise=settings_of_noise())
def test_the_grid_is_the_finest_that_leaves_room(noise):
    clip, sigma = noise
    step = grid_step(clip, sigma)
    reach = Fraction(clip) + 10 * Fraction(sigma)
    assert math.frexp(step)[0] == 0.5
    assert reach <= 32767 * Fraction(step) * (1 + Fraction(1, 2**50))
    assert reach > 32767 * Fraction(step) / 2
    assert 4 <= sigma / step <= 4096


@settings(max_examples=250, deadline=None)
@given(x=activations(), noise=settings_of_noise(), unit=st.sampled_from(["record", "token"]))
def test_no_norm_on_the_grid_is_above_the_clip_norm(x, noise, unit):
    """In integers and fractions: the exact norm, without a tolerance."""
    clip, sigma = noise
    gauss = Gauss(clip=clip, sigma=sigma, unit=unit)
    codes = in_units(gauss.on_grid(x, None), unit)
    assert max(squares(codes)) * Fraction(gauss.step) ** 2 <= Fraction(clip) ** 2


@settings(max_examples=150, deadline=None)
@given(x=activations(), noise=settings_of_noise(), unit=st.sampled_from(["record", "token"]), data=st.data())
def test_replacing_one_unit_moves_the_grid_points_by_the_sensitivity_at_most(x, noise, unit, data):
    clip, sigma = noise
    gauss = Gauss(clip=clip, sigma=sigma, unit=unit)
    other = x.clone()
    unit_at = (0,) if unit == "record" else (0, 0)
    replacement = data.draw(st.sampled_from(["opposite", "nothing", "largest", "drawn"]))
    size = other[unit_at].numel()
    if replacement == "opposite":
        other[unit_at] = -x[unit_at]
    elif replacement == "drawn":
        drawn = data.draw(st.lists(NUMBERS, min_size=size, max_size=size))
        other[unit_at] = torch.tensor(drawn, dtype=torch.float32).view(other[unit_at].shape)
    else:
        other[unit_at] = 0.0 if replacement == "nothing" else -3.4e38
    moved = gauss.on_grid(x, None).long() - gauss.on_grid(other, None).long()
    changed = moved[unit_at]
    assert (
        sum(int(code) ** 2 for code in changed.flatten()) * Fraction(gauss.step) ** 2
        <= Fraction(gauss.sensitivity) ** 2
    )
    moved[unit_at] = 0
    assert not moved.any(), "another unit's grid points moved"


@pytest.mark.parametrize("unit", ["record", "token"])
def test_the_sensitivity_is_reached(unit):
    """Opposite units longer than the clip norm: the bound of twice the clip norm is not a loose one."""
    gauss = Gauss(clip=3.0, sigma=3.0, unit=unit)
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1)) * 100
    moved = in_units(gauss.on_grid(x, None) - gauss.on_grid(-x, None), unit).double() * gauss.step
    norms = moved.norm(dim=1)
    assert (norms > 0.99 * gauss.sensitivity).all()
    assert (norms <= gauss.sensitivity).all()


@pytest.mark.parametrize("unit", ["record", "token"])
@pytest.mark.parametrize("scale", [1.0, 0.37, 1e-3, 1e30])
def test_the_bound_holds_for_large_tensors_and_for_all_dtypes(unit, scale):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        gauss = Gauss(clip=16.0, sigma=4.0, unit=unit)
        for x in (torch.full((1, 128, 512), scale, dtype=dtype), torch.randn(1, 128, 512).mul(scale).to(dtype)):
            codes = in_units(gauss.on_grid(x, None), unit).long()
            assert int((codes**2).sum(1).max()) <= int(16.0 / gauss.step) ** 2


@pytest.mark.parametrize("value", [1.0, -1.0])
def test_a_vector_of_exactly_the_clip_norm_stays_inside(value):
    gauss = Gauss(clip=1.0, sigma=1.0)
    x = torch.zeros(1, 1, 8)
    x[0, 0, 3] = value
    code = int(gauss.on_grid(x, None)[0, 0, 3]) * gauss.step
    assert 0.99 < abs(code) <= 1.0
    assert math.copysign(1.0, code) == value


@pytest.mark.parametrize("length", [1, 4])
def test_a_clip_norm_just_below_the_grid_is_not_passed_by_rounding(length):
    """The factor is computed with rounding; it must never lift a coordinate onto the next grid point."""
    gauss = Gauss(clip=1000.0 * (1 - 2.0**-22), sigma=1000.0)
    codes = gauss.on_grid(torch.full((1, 1, length), 1000.0), None)
    assert squares(codes)[0] * Fraction(gauss.step) ** 2 <= Fraction(gauss.clip) ** 2
    assert int(codes[0, 0, 0]) == math.ceil(1000 / math.sqrt(length) / gauss.step) - 1


def test_what_is_inside_the_bound_is_only_rounded_towards_zero():
    gauss = Gauss(clip=10.0, sigma=1.0)
    x = torch.tensor([[[0.3, -0.3, 1e-9, -1e-9, 2.0, -1.7, 0.0]]])
    points = gauss.on_grid(x, None).double() * gauss.step
    assert torch.equal(points, torch.trunc(x.double() / gauss.step) * gauss.step)
    assert (points.abs() <= x.double().abs()).all()
    assert ((points - x.double()).abs() < gauss.step).all()


def test_clipping_keeps_the_direction():
    gauss = Gauss(clip=2.0, sigma=0.5, unit="token")
    x = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(2)) * 50
    points = gauss.on_grid(x, None).double() * gauss.step
    assert (torch.cosine_similarity(points, x.double(), dim=2) > 0.9999).all()


def test_a_record_is_clipped_as_a_whole_and_a_token_by_itself():
    x = torch.ones(1, 4, 4)  # 4 rows of norm 2, a record of norm 4
    by_record = Gauss(clip=2.0, sigma=1.0).on_grid(x, None).double() * Gauss(clip=2.0, sigma=1.0).step
    by_token = Gauss(clip=2.0, sigma=1.0, unit="token").on_grid(x, None).double() * Gauss(clip=2.0, sigma=1.0).step
    assert float(by_record.norm()) == pytest.approx(2, rel=0.01)
    assert float(by_token.norm()) == pytest.approx(4, rel=0.01)


def test_padding_takes_nothing_of_a_records_clip_norm():
    gauss = Gauss(clip=1.0, sigma=0.1)
    x = torch.full((1, 8, 4), 100.0)
    mask = torch.zeros(1, 8, dtype=torch.bool)
    mask[0, -2:] = True
    points = gauss.on_grid(x, mask).double() * gauss.step
    assert float(points[0, -2:].norm()) == pytest.approx(1.0, rel=0.01)


def test_with_a_cache_the_mask_is_longer_than_what_is_sent():
    gauss = Gauss(clip=10.0, sigma=1.0)
    x = torch.ones(2, 2, 4)
    mask = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 0, 1]], dtype=torch.uint8)
    assert gauss.on_grid(x, mask).ne(0).any(dim=2).tolist() == [[True, True], [False, True]]


@settings(max_examples=60, deadline=None)
@given(clip=st.floats(1e-6, 1e6), ratio=st.floats(1e-9, 1e-5))
def test_noise_too_small_for_the_grid_names_the_nearest_that_is_not(clip, ratio):
    with pytest.raises(UsageError, match="too small beside clip") as caught:
        Gauss(clip=clip, sigma=clip * ratio)
    nearest = float(str(caught.value).split("clip norm is ")[1].split(";")[0])
    step = Gauss(clip=clip, sigma=nearest).step
    assert nearest / step >= 4
    assert nearest < 1e-2 * clip


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_a_step_that_no_frame_can_say_is_refused(scale):
    with pytest.raises(UsageError, match="grid step"):
        Gauss(clip=scale, sigma=scale)


# ---- the uniforms below the floating-point noise


def test_uniforms_are_never_zero_and_cover_the_unit_interval():
    drawn = uniforms(200_000)
    assert drawn.min() > 0
    assert drawn.max() <= 1
    assert abs(drawn.mean() - 0.5) < ERRORS / math.sqrt(12 * len(drawn))
    assert abs(drawn.var() - 1 / 12) < ERRORS * math.sqrt(1 / 180 / len(drawn))


def test_gaussians_are_gaussian():
    drawn = gaussians((401, 499))  # an odd number: the last pair is cut
    assert drawn.shape == (401, 499)
    assert abs(float(drawn.mean())) < ERRORS / math.sqrt(drawn.numel())
    assert abs(float((drawn**2).mean()) - 1) < ERRORS * math.sqrt(2 / drawn.numel())
    fourth = float((drawn**4).mean())
    assert abs(fourth - 3) < ERRORS * math.sqrt(96 / drawn.numel())
    flat = drawn.flatten()
    half = (flat.numel() + 1) // 2
    partner = float((flat[: half - 1] ** 2 * flat[half:] ** 2).mean())  # of one radius and angle
    assert abs(partner - 1) < ERRORS * math.sqrt(8 / half)
