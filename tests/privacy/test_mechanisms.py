"""The mechanisms: noise against its moments, codes, chains, refusals. Their bounds are in `test_clipping`.

Statistics are held to seven standard errors: a false alarm once in four hundred thousand million checks.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from splitfl.errors import InternalError, ModelError, UsageError
from splitfl.privacy import mechanisms
from splitfl.privacy.mechanisms import Chain, DChi, Gauss, GradientGauss, Quantise, TopK

ERRORS = 7.0


def int16_codes(coded) -> np.ndarray:
    return np.frombuffer(bytes(coded.payload.numpy()), dtype="<i2").reshape(coded.shape)


def noise_of(mechanism, x, mask=None) -> torch.Tensor:
    """What was added, float64 [B, T, D], in the scale of the activations."""
    gauss = getattr(mechanism, "rows", mechanism)
    coded = mechanism.protect(x, mask)
    return torch.from_numpy(int16_codes(coded).astype(np.float64) - gauss.on_grid(x, mask).numpy()) * coded.step


def assert_noise(noise: torch.Tensor, sigma: float) -> None:
    """Mean 0 and variance sigma^2 of independent Gaussians (a grid this fine adds nothing to them)."""
    noise = noise.flatten().double()
    count = noise.numel()
    assert abs(float(noise.mean())) < ERRORS * sigma / math.sqrt(count)
    assert abs(float((noise**2).mean()) / sigma**2 - 1) < ERRORS * math.sqrt(2 / count)


def test_the_sensitivity_of_a_whole_record():
    assert Gauss(clip=3.0, sigma=1.0).record_sensitivity(16) == 6.0
    assert Gauss(clip=3.0, sigma=1.0, unit="token").record_sensitivity(16) == 24.0
    assert GradientGauss(clip=3.0, sigma=1.0).sensitivity == 6.0
    assert GradientGauss(clip=3.0, sigma=1.0).record_sensitivity(16) == 24.0


# ---- the noise


@pytest.mark.parametrize(
    "mechanism",
    [Gauss(clip=5.0, sigma=6.0), Gauss(clip=5.0, sigma=0.01, unit="token"), GradientGauss(clip=1e-3, sigma=2e-3)],
)
def test_the_noise_has_its_moments_and_its_tails(mechanism):
    x = torch.randn(4, 64, 256, generator=torch.Generator().manual_seed(3))
    noise = noise_of(mechanism, x)
    assert_noise(noise, mechanism.sigma)
    count = noise.numel()
    for deviations in (1.0, 2.0, 3.0):
        outside = float((noise.abs() > deviations * mechanism.sigma).double().mean())
        expected = math.erfc(deviations / math.sqrt(2))
        # The grid's 4 steps a sigma and more, of which none straddles a whole number of sigmas by more than one.
        coarse = 2 * math.exp(-(deviations**2) / 2) * Gauss(clip=mechanism.clip, sigma=mechanism.sigma).step
        slack = ERRORS * math.sqrt(expected / count) + coarse / mechanism.sigma
        assert abs(outside - expected) < slack


def test_records_positions_and_columns_have_noise_of_their_own():
    x = torch.zeros(4, 64, 256)
    noise = noise_of(Gauss(clip=5.0, sigma=6.0), x) / 6.0
    for one, two in (
        (noise[0], noise[1]),
        (noise[:, 0], noise[:, 1]),
        (noise[..., 0], noise[..., 1]),
        (noise[:, :-1], noise[:, 1:]),
        (noise[..., :-1], noise[..., 1:]),
    ):
        assert abs(float((one * two).mean())) < ERRORS / math.sqrt(one.numel())


@pytest.mark.parametrize("mechanism", [Gauss(clip=5.0, sigma=6.0), GradientGauss(clip=5.0, sigma=6.0)])
def test_padded_positions_are_emptied_and_carry_the_same_noise(mechanism):
    x = torch.randn(2, 40, 256, generator=torch.Generator().manual_seed(4)) * 100
    mask = torch.ones(2, 40, dtype=torch.uint8)
    mask[0, 10:] = 0
    x[0, 10:] = math.nan  # whatever stands there is neither read nor refused
    noise = noise_of(mechanism, x, mask)
    assert_noise(noise[0, 10:], mechanism.sigma)
    gauss = getattr(mechanism, "rows", mechanism)
    assert not gauss.on_grid(x, mask)[0, 10:].any()
    assert gauss.on_grid(x, mask)[0, :10].any(dim=1).all()


@pytest.mark.parametrize("mechanism", [Gauss(clip=5.0, sigma=6.0), GradientGauss(clip=5.0, sigma=6.0), DChi(eta=3.0)])
def test_two_calls_never_draw_the_same(mechanism):
    x = torch.zeros(2, 32, 256)
    first, second = (mechanism.protect(x, None) for _ in range(2))
    if isinstance(mechanism, DChi):
        assert not torch.equal(first, second)
        return
    difference = first.decode().double() - second.decode().double()
    assert_noise(difference, mechanism.sigma * math.sqrt(2))


@pytest.mark.parametrize("sigma", [6.0, 0.005])
def test_what_is_decoded_is_code_times_step_exactly(sigma):
    coded = Gauss(clip=5.0, sigma=sigma).protect(torch.randn(2, 8, 32), None)
    assert coded.coding == "grid16"
    assert coded.shape == (2, 8, 32)
    exact = int16_codes(coded).astype(np.float64) * coded.step
    assert np.array_equal(coded.decode().double().numpy(), exact)


def test_a_gradient_of_zeros_leaves_as_noise():
    gradient = torch.randn(1, 30, 128) * 1e-4
    gradient[0, 5:25] = 0.0
    sent = GradientGauss(clip=1e-3, sigma=1e-3).protect(gradient, None).decode()
    assert (sent != 0).any(dim=2).all()
    assert_noise(sent[0, 5:25], 1e-3)


# ---- metric noise


def test_the_length_of_metric_noise_is_gamma_distributed():
    eta, width, count = 5.0, 32, 6000
    noise = DChi(eta=eta).protect(torch.zeros(3, count // 3, width, dtype=torch.float64), None).flatten(0, 1)
    lengths = noise.norm(dim=1)
    mean, variance = width / eta, width / eta**2
    assert abs(float(lengths.mean()) - mean) < ERRORS * math.sqrt(variance / count)
    spread = math.sqrt((2 + 6 / width) / count)  # of a sample variance, by the Gamma's kurtosis
    assert abs(float(lengths.var()) / variance - 1) < ERRORS * spread
    third = float(((lengths - mean) ** 3).mean()) / variance**1.5
    assert abs(third - 2 / math.sqrt(width)) < ERRORS * math.sqrt(30 / count)


def test_the_direction_of_metric_noise_is_uniform_and_tells_nothing_of_its_length():
    width, count = 16, 6000
    noise = DChi(eta=1.0).protect(torch.zeros(1, count, width, dtype=torch.float64), None)[0]
    lengths = noise.norm(dim=1, keepdim=True)
    directions = noise / lengths
    assert float(directions.mean(0).norm()) < ERRORS / math.sqrt(count)
    second = directions.T @ directions / count * width
    assert float((second - torch.eye(width, dtype=torch.float64)).abs().max()) < ERRORS * math.sqrt(3 / count)
    centred = (lengths - lengths.mean())[:, 0]
    for statistic in (directions[:, 0], directions[:, 0] ** 2):
        other = statistic - statistic.mean()
        correlation = float((centred * other).mean() / (centred.std() * other.std()))
        assert abs(correlation) < ERRORS / math.sqrt(count)
    neighbours = float((centred[1:] * centred[:-1]).mean() / centred.var())
    assert abs(neighbours) < ERRORS / math.sqrt(count)


def test_metric_noise_is_added_and_keeps_dtype_and_shape():
    x = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(9)).to(torch.bfloat16)
    sent = DChi(eta=1e9).protect(x, None)
    assert sent.dtype == x.dtype
    assert torch.equal(sent, x)
    mask = torch.ones(2, 5)
    mask[1, 2:] = 0
    assert DChi(eta=1e9).protect(x, mask)[1, 2:].float().abs().max() < 1e-6


def test_a_token_snaps_to_the_nearest_row_and_not_to_the_largest_product():
    table = torch.tensor([[1.0, 0.0], [10.0, 1.0], [0.0, -1.0]])
    x = torch.tensor([[[1.0, 0.1], [9.0, 1.0], [0.1, -0.4]]])
    assert (x[0] @ table.T).argmax(1).tolist() == [1, 1, 1]
    assert torch.equal(DChi(eta=1e9, table=table).protect(x, None)[0], table)


@pytest.mark.parametrize("chunk", [1, 8, 1 << 18])
def test_snapping_in_pieces_is_snapping_at_once(monkeypatch, chunk):
    monkeypatch.setattr(mechanisms, "_CHUNK", chunk)
    generator = torch.Generator().manual_seed(5)
    table, x = torch.randn(300, 6, generator=generator), torch.randn(2, 9, 6, generator=generator) * 2
    nearest = table[torch.cdist(x.double(), table.double()[None]).argmin(2)]
    assert torch.equal(DChi(eta=1e12, table=table).protect(x, None), nearest)


def test_snapped_noise_is_rows_of_the_table_and_not_always_the_same():
    table = torch.randn(50, 8, generator=torch.Generator().manual_seed(6))
    x = table[:1].expand(1, 400, 8)
    sent = DChi(eta=3.0, table=table).protect(x, None)
    assert (sent[0, :, None] == table).all(2).any(1).all()
    assert len(sent[0].unique(dim=0)) > 5


def test_a_table_is_not_shown():
    assert "table" not in repr(DChi(eta=1.0, table=torch.randn(3, 2)))


# ---- bandwidth


@pytest.mark.parametrize(("bits", "largest"), [(8, 127), (4, 7)])
def test_quantisation_is_off_by_half_a_scale_at_most(bits, largest):
    x = torch.randn(3, 7, 33, generator=torch.Generator().manual_seed(7)) * torch.logspace(-3, 3, 7)[:, None]
    coded = Quantise(bits=bits).protect(x, None)
    assert coded.coding == f"int{bits}"
    scales = x.abs().amax(2, keepdim=True) / largest
    error = (coded.decode() - x).abs()
    assert (error <= scales * 0.50001).all()
    assert (error.amax(2) > 0).any()


def test_topk_keeps_the_largest_magnitudes():
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(8))
    decoded = TopK(kept=4).protect(x, None).decode()
    threshold = x.abs().sort(dim=2, descending=True).values[..., 3:4]
    expected = torch.where(x.abs() >= threshold, x, 0.0)
    assert torch.allclose(decoded, expected, rtol=2**-10, atol=0)
    assert ((decoded != 0).sum(2) == 4).all()


@pytest.mark.parametrize("mechanism", [Quantise(bits=8), Quantise(bits=4), TopK(kept=3)])
def test_padding_is_sent_as_zeros_without_noise(mechanism):
    x = torch.randn(2, 4, 8)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    decoded = mechanism.protect(x, mask).decode()
    assert not decoded[0, :2].any()
    assert decoded[0, 2:].any(dim=1).all()


# ---- chains


def test_a_chain_works_in_order():
    generator = torch.Generator().manual_seed(10)
    x, table = torch.randn(2, 4, 8, generator=generator), torch.randn(5, 8, generator=generator)
    chain = Chain((DChi(eta=1e9), TopK(kept=2)))
    assert (chain.name, chain.coded) == ("dchi+topk", True)
    assert ((chain.protect(x, None).decode() != 0).sum(2) == 2).all()
    snapped = Chain([DChi(eta=1e9, table=table), DChi(eta=1e9)])
    assert (snapped.name, snapped.coded) == ("dchi+dchi", False)
    nearest = table[torch.cdist(x, table[None]).argmin(2)]
    assert torch.allclose(snapped.protect(x, None), nearest, atol=1e-5)


def test_a_chain_ends_with_codes():
    with pytest.raises(UsageError, match="'gauss' stands before 'topk'") as caught:
        Chain((Gauss(clip=1.0, sigma=1.0), TopK(kept=2)))
    assert "last" in str(caught.value)
    with pytest.raises(UsageError, match="no mechanisms"):
        Chain(())


def test_a_mechanism_of_ones_own_must_say_that_it_returns_codes():
    class Fibber:
        name, coded = "fibber", False

        def protect(self, x, mask):
            return Quantise().protect(x, mask)

    with pytest.raises(InternalError, match="fibber"):
        Chain((Fibber(), TopK(kept=1))).protect(torch.ones(1, 1, 4), None)


# ---- what is refused, and what is left alone

EVERY = [
    Gauss(clip=1.0, sigma=1.0),
    GradientGauss(clip=1.0, sigma=1.0),
    DChi(eta=1.0),
    DChi(eta=1.0, table=torch.eye(4)),
    Quantise(),
    TopK(kept=2),
    Chain((DChi(eta=1.0), Quantise(bits=4))),
]


@pytest.mark.parametrize("mechanism", EVERY, ids=lambda m: m.name)
def test_what_is_protected_is_left_as_it_was(mechanism):
    x = torch.randn(2, 3, 4, requires_grad=True)
    before = x.detach().clone()
    sent = mechanism.protect(x, torch.tensor([[1, 1, 0], [1, 1, 1]]))
    assert torch.equal(x, before)
    decoded = sent.decode() if mechanism.coded else sent
    assert decoded.shape == x.shape
    assert not decoded.requires_grad


@pytest.mark.parametrize("mechanism", EVERY, ids=lambda m: m.name)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_sent(mechanism, value):
    x = torch.ones(1, 2, 4)
    x[0, 1, 2] = value
    with pytest.raises(ModelError, match="NaN"):
        mechanism.protect(x, None)
    mechanism.protect(x, torch.tensor([[1, 0]]))


@pytest.mark.parametrize("mechanism", EVERY, ids=lambda m: m.name)
def test_finite_numbers_whose_sum_overflows_are_sent(mechanism):
    x = torch.full((1, 2, 4), 6e4, dtype=torch.float16)
    assert mechanism.protect(x, None) is not None


@pytest.mark.parametrize(
    ("x", "mask"),
    [
        (torch.ones(2, 4), None),
        (torch.ones(2, 3, 4, dtype=torch.int32), None),
        (torch.ones(2, 3, 4), torch.ones(2, 2)),
        (torch.ones(2, 3, 4), torch.ones(1, 3)),
        (torch.ones(2, 3, 4), torch.ones(2, 3, 1)),
    ],
)
@pytest.mark.parametrize("mechanism", EVERY, ids=lambda m: m.name)
def test_shapes_that_do_not_fit_are_refused(mechanism, x, mask):
    with pytest.raises(InternalError, match=r"came|given"):
        mechanism.protect(x, mask)


@pytest.mark.parametrize("make", [lambda **s: Gauss(**s), lambda **s: GradientGauss(**s)], ids=["gauss", "gradient"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_settings_that_are_no_noise_are_refused(make, value):
    with pytest.raises(UsageError, match="clip"):
        make(clip=value, sigma=1.0)
    with pytest.raises(UsageError, match="sigma"):
        make(clip=1.0, sigma=value)


def test_noise_without_a_clip_norm_cannot_be_asked_for():
    with pytest.raises(TypeError, match="clip"):
        Gauss(sigma=1.0)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="clip"):
        GradientGauss(sigma=1.0)  # type: ignore[call-arg]


def test_other_settings_that_make_no_sense_are_refused():
    with pytest.raises(UsageError, match="did you mean 'token'"):
        Gauss(clip=1.0, sigma=1.0, unit="tokens")  # type: ignore[arg-type]
    for eta in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UsageError, match="eta"):
            DChi(eta=eta)
    for table in (torch.ones(3), torch.ones(0, 3), torch.full((2, 2), math.nan), torch.ones(2, 2, dtype=torch.int64)):
        with pytest.raises(UsageError, match="snapped"):
            DChi(eta=1.0, table=table)
    with pytest.raises(UsageError, match="3 wide"):
        DChi(eta=1.0, table=torch.eye(3)).protect(torch.ones(1, 1, 4), None)
    with pytest.raises(UsageError, match="8 or 4"):
        Quantise(bits=2)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="cannot be kept"):
        TopK(kept=0)
    with pytest.raises(UsageError, match="1 to 4"):
        TopK(kept=5).protect(torch.ones(1, 1, 4), None)


@pytest.mark.parametrize("mechanism", EVERY, ids=lambda m: m.name)
def test_every_mechanism_says_what_it_hides_and_what_not(mechanism):
    lines = (type(mechanism).__doc__ or "").splitlines()
    hides = [i for i, line in enumerate(lines) if line.strip().startswith("Hides: ")]
    hides_not = [i for i, line in enumerate(lines) if line.strip().startswith("Does not hide: ")]
    assert len(hides) == len(hides_not) == 1
    assert hides[0] < hides_not[0]
