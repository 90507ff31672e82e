"""The eighteen mistakes in published defence and audit code, each a test that ours does not make it.

The list, with where each was read, is in the research notes (section 5 of the privacy part). Some are about attacks and
audits, which this package does not have yet; a test of them now would test nothing. They come with the audit:

- 12 (attacks weakened by bugs: integer logits, cross-entropy between activations, noise experts of another scale);
- 15 (LiRA's fixed variance taken from the wrong sample);
- the attack's half of 10 (an attack script that sets the noise to zero) and of 13 (the attack reads the channel that
  the defence left out). The mechanisms' half of both is here.

How noise is calibrated (1, 8, 9, 14, 17) has further tests beside the calibration. Statistics are held to seven
standard errors.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import pkgutil

import numpy as np
import pytest
import torch

import splitfl.privacy
from splitfl.errors import InternalError, UsageError
from splitfl.privacy import calibration, labels
from splitfl.privacy.decorrelation import distance_correlation, flatten_tokens
from splitfl.privacy.mechanisms import Chain, DChi, Gauss, GradientGauss, Quantise, TopK, max_norm, randomise_labels

ERRORS = 7.0
NOISY = [Gauss(clip=2.0, sigma=3.0), GradientGauss(clip=2.0, sigma=3.0), DChi(eta=4.0)]
NAMES = [mechanism.name for mechanism in NOISY]


def sent_by(mechanism, x, mask=None) -> torch.Tensor:
    """What the receiver computes with, float64."""
    sent = mechanism.protect(x, mask)
    return (sent.decode() if mechanism.coded else sent).double()


def added_by(mechanism, x, mask=None) -> torch.Tensor:
    """Noise alone: what is sent less what would be sent without, float64."""
    gauss = getattr(mechanism, "rows", mechanism)
    clean = gauss.on_grid(x, mask).double() * gauss.step if isinstance(gauss, Gauss) else x.double()
    return sent_by(mechanism, x, mask) - clean


def assert_variance(noise: torch.Tensor, expected: float, kurtosis: float = 3.0) -> None:
    share = ERRORS * math.sqrt((kurtosis - 1) / noise.numel())
    assert float((noise**2).mean()) == pytest.approx(expected, rel=share)


def test_mistake_01_noise_of_another_law_and_beside_a_clip_norm_that_it_ignores():
    """It was Laplace noise named Gaussian, with a scale that no clip norm entered."""
    for clip in (0.5, 50.0):
        noise = added_by(Gauss(clip=clip, sigma=3.0), torch.full((2, 100, 256), 1e4)) / 3.0
        assert_variance(noise, 1.0)
        fourth = float((noise**4).mean())
        assert abs(fourth - 3) < ERRORS * math.sqrt(96 / noise.numel())  # of Laplace noise: 6
        bound = Gauss(clip=clip, sigma=3.0).on_grid(torch.full((1, 9, 9), 1e4), None).double().norm()
        assert float(bound) * Gauss(clip=clip, sigma=3.0).step == pytest.approx(clip, rel=0.02)
    with pytest.raises(TypeError, match="clip"):
        Gauss(sigma=3.0)  # type: ignore[call-arg]
    # Sigma from epsilon grows with the sensitivity, and so with the clip norm.
    one, ten = (calibration.gaussian_sigma(1.0, 1e-5, sensitivity=2 * clip) for clip in (1.0, 10.0))
    assert ten == pytest.approx(10 * one, rel=1e-3)


def test_mistake_02_a_defence_whose_module_is_not_shipped():
    names = [module.name for module in pkgutil.iter_modules(splitfl.privacy.__path__, "splitfl.privacy.")]
    assert {"splitfl.privacy.mechanisms", "splitfl.privacy.discrete", "splitfl.privacy.decorrelation"} <= set(names)
    for name in names:
        importlib.import_module(name)


def test_mistake_03_one_radius_for_a_whole_batch_and_snapping_by_product():
    lengths = added_by(DChi(eta=4.0), torch.zeros(4, 500, 16, dtype=torch.float64)).norm(dim=2)
    assert len(lengths.flatten().unique()) > 1990
    mean, variance = 16 / 4, 16 / 16
    by_record = (lengths - mean) / math.sqrt(variance)
    for one in range(4):
        for other in range(one):
            assert abs(float((by_record[one] * by_record[other]).mean())) < ERRORS / math.sqrt(500)
    table = torch.tensor([[1.0, 1.0], [30.0, 30.0]])  # the second has the larger product with everything near the first
    near = torch.full((1, 50, 2), 1.1)
    assert torch.equal(DChi(eta=1e3, table=table).protect(near, None), table[:1].expand(1, 50, 2))


@pytest.mark.parametrize("width", [16, 768])
def test_mistake_04_metric_noise_by_the_coordinate(width):
    """Gamma times uniform for each coordinate is sqrt(d / 3) times too long, and of another density."""
    count, eta = 2000, 5.0
    lengths = added_by(DChi(eta=eta), torch.zeros(1, count, width, dtype=torch.float64)).norm(dim=2)
    slack = ERRORS * math.sqrt(width) / eta / math.sqrt(count)
    assert abs(float(lengths.mean()) - width / eta) < slack
    assert float(lengths.std()) == pytest.approx(math.sqrt(width) / eta, rel=ERRORS * math.sqrt(2 / count))


@pytest.mark.parametrize("unit", ["record", "token"])
def test_mistake_05_no_clipping_and_a_sensitivity_from_a_table_of_model_names(unit):
    gauss = Gauss(clip=2.0, sigma=3.0, unit=unit)
    for size in (1.0, 81.82, 1e6, 1e30):
        points = gauss.on_grid(torch.full((1, 20, 32), size), None).double() * gauss.step
        norms = (points.flatten(1) if unit == "record" else points.flatten(0, 1)).norm(dim=1)
        assert (norms <= 2.0).all()
    assert gauss.sensitivity == 4.0


@pytest.mark.parametrize("unit", ["record", "token"])
def test_mistake_06_clipping_by_the_largest_of_the_batch(unit):
    """What one record's grid points are depends on that record alone."""
    gauss = Gauss(clip=2.0, sigma=3.0, unit=unit)
    x = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(1))
    alone = gauss.on_grid(x[:1], None)
    for others in (1e-6, 1.0, 1e6):
        together = torch.cat([x[:1], x[1:] * others])
        assert torch.equal(gauss.on_grid(together, None)[:1], alone)


def test_mistake_07_noise_multiplied_back_by_the_norm():
    for mechanism, variance in ((NOISY[0], 9.0), (NOISY[1], 9.0), (NOISY[2], 257 / 16)):
        for size in (0.0, 1.0, 1e4):
            noise = added_by(mechanism, torch.full((2, 50, 256), size, dtype=torch.float64))
            assert_variance(noise, variance, kurtosis=5.0)
    assert Gauss(clip=2.0, sigma=3.0).protect(torch.full((1, 2, 2), 1e6), None).step == NOISY[0].step


@pytest.mark.parametrize("clip", [0.3, 1.0, 7.0])
def test_mistake_08_sensitivity_of_one_clip_norm_where_it_is_two(clip):
    gauss = Gauss(clip=clip, sigma=clip)
    assert gauss.sensitivity == GradientGauss(clip=clip, sigma=clip).sensitivity == 2 * clip
    x = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(2)) * 100
    moved = (gauss.on_grid(x, None) - gauss.on_grid(-x, None)).double().norm() * gauss.step
    assert 1.98 * clip < float(moved) <= 2 * clip
    # The published setting: nominally 8 with a sensitivity of one clip norm is 19.1 for what is really replaced.
    sigma = calibration.gaussian_sigma(8.0, 1e-5, sensitivity=clip)
    really = calibration.gaussian_epsilon(1e-5, sensitivity=gauss.sensitivity, sigma=sigma)
    assert really == pytest.approx(19.1, abs=0.2)


def test_mistake_09_amplification_by_sampling_for_rows_that_are_seen_one_by_one():
    """No sampling rate can be given, and the published multiplier gives what it really gives, locally."""
    for function in (calibration.gaussian_epsilon, calibration.gaussian_sigma, calibration.gaussian_delta):
        taken = set(inspect.signature(function).parameters)
        assert taken <= {"epsilon", "delta", "sensitivity", "sigma", "releases"}
    once = calibration.gaussian_epsilon(1e-5, sensitivity=2.0, sigma=0.32)
    thrice = calibration.gaussian_epsilon(1e-5, sensitivity=2.0, sigma=0.32, releases=3)
    assert once == pytest.approx(45.5, rel=0.03)
    assert thrice == pytest.approx(104, rel=0.03)


@pytest.mark.parametrize("mechanism", NOISY, ids=NAMES)
def test_mistake_10_noise_that_can_be_set_to_zero(mechanism):
    """The mechanisms' half: no setting means no noise, and no setting changes once made."""
    for field in dataclasses.fields(mechanism):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(mechanism, field.name, 0.0)
    with pytest.raises(UsageError):
        dataclasses.replace(mechanism, **{"eta" if isinstance(mechanism, DChi) else "sigma": 0.0})


def test_mistake_11_distance_correlation_over_the_wrong_axes():
    generator = torch.Generator().manual_seed(3)
    x, z = (torch.randn(8, 32, 64, generator=generator) for _ in range(2))
    with pytest.raises(InternalError, match="flatten_tokens"):
        distance_correlation(x, z)
    value = float(distance_correlation(flatten_tokens(x, None), flatten_tokens(z, None)))
    assert abs(value) < 0.05  # the double-centred estimate of the same 256 independent tokens is above 0.6
    tokens = flatten_tokens(x, None)
    assert float(distance_correlation(tokens, tokens)) == pytest.approx(1, abs=1e-5)


def test_mistake_13_a_defence_of_one_channel_only():
    """The mechanisms' half: the gradient channel has its own, and leaves no row in it that is zero."""
    gradient = torch.zeros(3, 40, 64)
    gradient[:, ::5] = torch.randn(3, 8, 64, generator=torch.Generator().manual_seed(4)) * 1e-3
    sent = sent_by(GradientGauss(clip=1e-3, sigma=1e-3), gradient)
    assert sent.ne(0).any(dim=2).all()
    empty = sent[:, 1::5]
    assert_variance(empty, 1e-6)


def test_mistake_14_one_releases_epsilon_for_a_whole_run_and_a_token_at_a_deep_cut():
    sigma, single = 4.0, Gauss(clip=1.0, sigma=4.0)
    epsilons = [
        calibration.gaussian_epsilon(1e-5, sensitivity=single.sensitivity, sigma=sigma, releases=releases)
        for releases in (1, 3, 10)
    ]
    assert epsilons[0] < epsilons[1] < epsilons[2]
    ten = calibration.gaussian_epsilon(1e-5, sensitivity=single.sensitivity * math.sqrt(10), sigma=sigma)
    assert epsilons[2] == pytest.approx(ten, rel=1e-4)
    delta = inspect.signature(calibration.gaussian_epsilon).parameters["delta"]
    assert delta.default is inspect.Parameter.empty
    # Behind a layer that mixes positions one token moves all rows: the bound on it grows with the length.
    by_token = Gauss(clip=1.0, sigma=4.0, unit="token")
    x = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(5)) * 100
    moved = (by_token.on_grid(x, None) - by_token.on_grid(-x, None)).double().norm() * by_token.step
    assert by_token.sensitivity < float(moved) <= by_token.record_sensitivity(64) == 16.0


def test_mistake_16_noise_from_the_experiments_seed():
    """Whoever knows the seed could draw the noise again: nothing here may hear of one."""
    gradient = torch.randn(4, 50, generator=torch.Generator().manual_seed(6))
    truth = torch.tensor([0, 1, 0, 1])
    draws = {mechanism.name: lambda m=mechanism: sent_by(m, torch.zeros(1, 8, 64)) for mechanism in NOISY}
    draws["max_norm"] = lambda: max_norm(gradient)
    draws["marvell"] = lambda: labels.marvell(gradient, truth, 1.0)
    draws["randomise_labels"] = lambda: randomise_labels(torch.zeros(500, dtype=torch.int64), 2, 0.1)
    for name, draw in draws.items():
        results = []
        for _ in range(2):
            torch.manual_seed(42)
            np.random.seed(42)
            results.append(draw())
        assert not torch.equal(*results), name


@pytest.mark.parametrize("mechanism", NOISY[:2], ids=NAMES[:2])
def test_mistake_17_noise_in_floating_point(mechanism):
    """What is sent are whole multiples of one power of two, the same ones whatever the input was."""
    steps = set()
    for x in (torch.zeros(1, 4, 64), torch.full((1, 4, 64), 1 / 3), torch.full((1, 4, 64), math.pi * 1e5)):
        coded = mechanism.protect(x, None)
        assert coded.coding == "grid16"
        whole = coded.decode().double() / coded.step
        assert torch.equal(whole, whole.round())
        steps.add(coded.step)
    assert len(steps) == 1
    assert math.frexp(steps.pop())[0] == 0.5
    # Odd codes come out where the input is even and the reverse: no output is out of another input's reach.
    codes = mechanism.protect(torch.zeros(1, 64, 64), None).decode().double() / coded.step
    odd = float((codes % 2 != 0).double().mean())
    assert abs(odd - 0.5) < ERRORS / (2 * 64)


@pytest.mark.parametrize("mechanism", [*NOISY, Chain((NOISY[2], NOISY[0]))], ids=[*NAMES, "chain"])
def test_mistake_18_no_noise_in_evaluation(mechanism):
    """There is no such switch, and torch's own do nothing."""
    assert list(inspect.signature(mechanism.protect).parameters) == ["x", "mask"]
    x = torch.zeros(1, 60, 256)
    expected = 257 / 16 if isinstance(mechanism, DChi) else 9.0
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            noise = sent_by(mechanism, x)
        if isinstance(mechanism, Chain):
            assert float((noise**2).mean()) > 9.0 * (1 - ERRORS * math.sqrt(2 / noise.numel()))
        else:
            assert_variance(noise, expected, kurtosis=5.0)


def test_what_makes_no_claim_adds_no_noise():
    """Quantisation and top-k are deterministic, and say that they hide nothing."""
    x = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(7))
    for mechanism in (Quantise(bits=8), Quantise(bits=4), TopK(kept=4)):
        assert torch.equal(sent_by(mechanism, x), sent_by(mechanism, x))
        assert "Hides: nothing" in (type(mechanism).__doc__ or "")
