"""Calibration: against closed forms, published tables, dp-accounting, and the mistakes of published code."""

from __future__ import annotations

import inspect
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitfl.errors import UsageError
from splitfl.privacy import calibration
from splitfl.privacy.calibration import (
    MEANINGLESS_EPSILON,
    Claim,
    dchi_worst_case,
    delta_left,
    embedding_diameter,
    gauss_claim,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_sigma,
    label_epsilon,
    label_keep_probability,
    preview,
    recovery,
    verdict,
    zcdp_epsilon,
    zcdp_rho,
    zcdp_sigma,
)
from splitfl.privacy.discrete import Sampler

DELTA = 1e-5
PARTS = ("epsilon", "delta", "unit: one", "neighbours: replace one", "adversary: whoever", "releases of the same")


@pytest.fixture
def accounting():
    return pytest.importorskip("dp_accounting", reason="needs dp-accounting: pip install 'splitfl[privacy]'")


@pytest.fixture
def claim(accounting):
    return gauss_claim(channel="activations up", unit="token", depth=0, clip=1, sigma=1 / 1.72, delta=DELTA, releases=3)


def normal(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


# The continuous Gaussian


@pytest.mark.parametrize(
    ("epsilon", "over_clip"),
    [(1, 7.46), (2, 3.99), (4, 2.16), (8, 1.20), (16, 0.69), (32, 0.41), (64, 0.25), (128, 0.16)],
)
def test_sigma_over_clip_is_the_published_table(epsilon, over_clip):
    assert gaussian_sigma(epsilon, DELTA, sensitivity=2) == pytest.approx(over_clip, abs=0.0051)


def test_delta_is_theorem_8_where_doubles_can_form_it():
    for epsilon in (0.0, 0.1, 1.0, 5.0, 20.0):
        for mu in (0.3, 1.0, 2.5, 6.0):
            literal = normal(mu / 2 - epsilon / mu) - math.exp(epsilon) * normal(-mu / 2 - epsilon / mu)
            assert gaussian_delta(epsilon, sensitivity=mu, sigma=1) == pytest.approx(literal, rel=1e-7, abs=1e-13)


def test_delta_agrees_with_numerical_integration_in_the_far_tail():
    """delta = E[max(0, 1 - e^(epsilon - L))] over L ~ N(mu^2 / 2, mu^2): nothing cancels, nothing overflows."""
    for epsilon, mu in (
        (1e-13, 1e-13),
        (0.5, 0.004),
        (0.02, 0.02),
        (30.0, 2.0),
        (400.0, 22.0),
        (1000.0, 40.0),
        (1000.0, 60.0),
    ):
        start = (epsilon - mu * mu / 2) / mu  # the loss exceeds epsilon from here on, in standard deviations
        base = max(start, 0.0)
        at = np.linspace(start, max(start, 0.0) + 45 / (1 + base) + (0 if start > 0 else 10), 400_001)
        values = np.exp(-(at**2 - base**2) / 2) * -np.expm1(-mu * (at - start))
        log_literal = math.log(np.trapezoid(values, at)) - base**2 / 2 - math.log(2 * math.pi) / 2
        assert calibration._log_delta(epsilon, mu) == pytest.approx(log_literal, abs=1e-6)


@pytest.mark.parametrize("epsilon", [0.0, 1e-3, 0.3, 3.0])
def test_the_two_ways_to_form_delta_meet(epsilon):
    below, above = (calibration._log_delta(epsilon, mu) for mu in (0.01, math.nextafter(0.01, 1)))
    assert below == pytest.approx(above, abs=1e-9)


def test_at_epsilon_zero_delta_is_the_total_variation_distance():
    for mu in (1e-6, 1e-3, 0.5, 3.0):
        assert gaussian_delta(0, sensitivity=mu, sigma=1) == pytest.approx(math.erf(mu / math.sqrt(8)), rel=1e-10)


@given(
    epsilon=st.floats(0, 1000),
    log_delta=st.floats(math.log(1e-15), math.log(0.5)),
    sensitivity=st.floats(1e-3, 1e3),
    releases=st.integers(1, 1000),
)
@settings(deadline=None, max_examples=150)
def test_epsilon_sigma_and_delta_are_each_others_inverses(epsilon, log_delta, sensitivity, releases):
    delta = math.exp(log_delta)
    sigma = gaussian_sigma(epsilon, delta, sensitivity=sensitivity, releases=releases)
    setting = {"sensitivity": sensitivity, "sigma": sigma, "releases": releases}
    assert gaussian_delta(epsilon, **setting) == pytest.approx(delta, rel=1e-9)
    assert gaussian_epsilon(delta, **setting) == pytest.approx(epsilon, rel=1e-9, abs=1e-9)
    composed = setting | {"sigma": sigma / math.sqrt(releases), "releases": 1}
    assert gaussian_epsilon(delta, **composed) == pytest.approx(epsilon, rel=1e-9, abs=1e-9)


def test_the_gaussian_agrees_with_dp_accounting(accounting):
    reference = pytest.importorskip("dp_accounting.gaussian_mechanism")
    for epsilon in (0.5, 2.0, 8.0, 64.0):
        sigma = gaussian_sigma(epsilon, DELTA, sensitivity=2)
        assert reference.get_epsilon_gaussian(sigma / 2, DELTA) == pytest.approx(epsilon, rel=1e-6)


def test_the_classical_formula_draws_too_little_noise_above_epsilon_8():
    for epsilon, classical in ((16, 0.61), (64, 0.15)):
        sigma = 2 * math.sqrt(2 * math.log(1.25 / DELTA)) / epsilon
        assert sigma == pytest.approx(classical, abs=0.0051)
        assert gaussian_epsilon(DELTA, sensitivity=2, sigma=sigma) > epsilon
    # Where it is proven it draws too much.
    assert gaussian_epsilon(DELTA, sensitivity=2, sigma=2 * math.sqrt(2 * math.log(1.25 / DELTA)) / 0.9) < 0.9


# The discrete Gaussian


def test_rho_adds_up_over_releases():
    assert zcdp_rho(2, 4) == 0.125
    assert zcdp_rho(2, 4, 10) == pytest.approx(1.25)


def zcdp_closed_form(rho: float, delta: float) -> float:
    """Canonne, Kamath and Steinke 2020, Proposition 12, minimised over a fine grid of orders of its own."""
    orders = 1 + np.geomspace(1e-2, 1e5, 2_000_001)
    return float((rho * orders + np.log1p(-1 / orders) - np.log(delta * orders) / (orders - 1)).min())


@pytest.mark.parametrize("rho", [1e-3, 0.1, 1.0, 8.0, 128.0, 900.0])
@pytest.mark.parametrize("delta", [1e-12, 1e-5])
def test_epsilon_from_rho_is_the_best_order_of_proposition_12(accounting, rho, delta):
    best = max(0.0, zcdp_closed_form(rho, delta))
    assert best - 1e-9 <= zcdp_epsilon(rho, delta) <= best * 1.0005 + 1e-9
    assert zcdp_epsilon(rho, delta) < rho + 2 * math.sqrt(rho * math.log(1 / delta))  # Bun and Steinke 2016


def test_the_bound_holds_for_the_discrete_gaussian_by_its_own_loss_distribution(accounting):
    """Against dp-accounting's privacy loss distribution of the very mechanism: never below it, and not far above."""
    pld = pytest.importorskip("dp_accounting.pld.privacy_loss_distribution")
    for sigma, sensitivity in ((1.0, 1), (3.0, 2), (0.7, 2)):
        loss = pld.from_discrete_gaussian_mechanism(sigma, sensitivity, value_discretization_interval=1e-3)
        exact = loss.get_epsilon_for_delta(DELTA)
        bound = zcdp_epsilon(zcdp_rho(sensitivity, sigma), DELTA)
        assert exact <= bound + 1e-3
        assert bound < 1.25 * exact


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 8.0, 64.0, 1000.0])
def test_sigma_and_epsilon_of_the_discrete_gaussian_are_each_others_inverses(accounting, epsilon):
    for sensitivity, releases in ((2, 5), (0.3, 1), (7, 3), (1000 / 3, 10)):
        sigma = zcdp_sigma(epsilon, DELTA, sensitivity=sensitivity, releases=releases)
        back = zcdp_epsilon(zcdp_rho(sensitivity, sigma, releases), DELTA)
        assert epsilon * (1 - 1e-6) < back <= epsilon
        assert sigma > gaussian_sigma(epsilon, DELTA, sensitivity=sensitivity, releases=releases)


def test_no_noise_to_account_for_is_epsilon_zero():
    assert zcdp_epsilon(0.0, DELTA) == 0.0


def test_without_dp_accounting_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(UsageError) as caught:
        zcdp_epsilon(1.0, DELTA)
    assert "splitfl[privacy]" in str(caught.value)


def test_an_exact_sampler_costs_no_delta_and_an_inexact_one_costs_e_to_the_epsilon():
    assert delta_left(DELTA, 10**9, Sampler(50.0).distance) == DELTA
    assert delta_left(DELTA, 1000, 1e-12, epsilon=3.0) == pytest.approx(DELTA - 1e-9 * (1 + math.exp(3)), rel=1e-12)
    with pytest.raises(UsageError, match="nothing is left"):
        delta_left(DELTA, 1000, 1e-12, epsilon=12.0)
    with pytest.raises(UsageError, match="nothing is left"):
        delta_left(DELTA, 1, 1e-300, epsilon=2000.0)
    with pytest.raises(UsageError, match="depends on epsilon"):
        delta_left(DELTA, 1000, 1e-12)


def test_cutting_the_tails_would_break_the_bound_by_as_much_as_delta_left_says():
    """Noise cut at 11 sigma, sensitivity 8 sigma: what lies beyond the other's table gives the two away."""
    sigma, cut = 10.0, 110
    weights = {k: math.exp(-k * k / (2 * sigma**2)) for k in range(-cut, cut + 1)}
    total = sum(weights.values())
    given_away = sum(weight for k, weight in weights.items() if k + 80 > cut) / total
    epsilon = gaussian_epsilon(DELTA, sensitivity=80, sigma=sigma)
    assert given_away > 100 * DELTA
    with pytest.raises(UsageError, match="nothing is left"):
        delta_left(DELTA, 1, 2 * math.exp(-(11**2) / 2), epsilon=epsilon)


# The metric mechanism, labels, recovery


def test_the_diameter_is_exact_for_small_tables_and_a_bound_for_large_ones(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(700, 24, generator=generator, dtype=torch.float64) + 1e6  # an offset that costs digits
    exact = max(float((table - row).norm(dim=1).max()) for row in table)
    assert embedding_diameter(table) == pytest.approx(exact, rel=1e-12)
    assert embedding_diameter((table - 1e6).bfloat16()) == pytest.approx(exact, rel=1e-2)
    monkeypatch.setattr(calibration, "_EXACT_DIAMETER", 256)
    assert exact <= embedding_diameter(table) <= 2 * exact
    line = torch.tensor([[0.0], [1.0], [3.0]])
    assert embedding_diameter(line) == 3.0
    assert embedding_diameter(line[:1]) == 0.0


def test_a_large_table_is_bounded_whatever_its_rows():
    far = torch.zeros(5000, 3)
    far[-1] = torch.tensor([3.0, 4.0, 0.0])
    assert 5.0 <= embedding_diameter(far) <= 10.0


@pytest.mark.parametrize("table", [torch.zeros(3), torch.zeros(0, 4), torch.tensor([[math.nan]])])
def test_a_table_without_rows_or_with_holes_has_no_diameter(table):
    with pytest.raises(UsageError, match="diameter"):
        embedding_diameter(table)


def test_the_metric_bound_at_the_diameter():
    assert dchi_worst_case(100, 2.89) == pytest.approx(289)


@pytest.mark.parametrize(
    ("ratio", "small", "large", "epsilon"),
    [
        (1, 0.12, 0.04, 10.0),
        (2, 2.0, 0.9, 24.4),
        (3, 13.9, 8.2, 42.8),
        (4, 45, 34, 65),
        (5, 80, 71, 92),
        (6, 96, 93, 122),
    ],
)
def test_recovery_and_epsilon_are_the_published_table(ratio, small, large, epsilon):
    def last_place(figure: float) -> float:
        return 0.51 * 10 ** -len(f"{figure}".partition(".")[2].rstrip("0") or "")

    assert 100 * recovery(ratio, 32_000) == pytest.approx(small, abs=last_place(small))
    assert 100 * recovery(ratio, 128_256) == pytest.approx(large, abs=last_place(large))
    assert gaussian_epsilon(DELTA, sensitivity=2 * ratio, sigma=1) == pytest.approx(
        epsilon, abs=0.51 if ratio > 3 else 0.051
    )


def test_recovery_after_averaging_is_the_published_example():
    one, three, ten = (100 * recovery(1.72, 32_000, releases) for releases in (1, 3, 10))
    assert (one, three, ten) == (pytest.approx(1, abs=0.05), pytest.approx(13.5, abs=0.2), pytest.approx(90, abs=0.5))
    assert recovery(1.72, 32_000, 4) == recovery(3.44, 32_000)


def test_recovery_has_its_limits():
    assert recovery(0.0, 5000) == pytest.approx(1 / 5000, rel=1e-9)
    assert recovery(40.0, 128_256) == pytest.approx(1.0, abs=1e-9)
    # Two tokens: the difference of two unit normals, so Phi(a / sqrt 2).
    assert recovery(1.3, 2) == pytest.approx(normal(1.3 / math.sqrt(2)), rel=1e-9)


@given(epsilon=st.floats(0, 30), classes=st.integers(2, 200_000))
@settings(deadline=None)
def test_keeping_a_label_and_its_epsilon_are_each_others_inverses(epsilon, classes):
    keep = label_keep_probability(epsilon, classes)
    assert keep == pytest.approx(math.exp(epsilon) / (math.exp(epsilon) + classes - 1), rel=1e-12)
    if keep < 1:
        assert label_epsilon(keep, classes) == pytest.approx(epsilon, rel=1e-2 if epsilon > 20 else 1e-6, abs=1e-6)


def test_the_guess_of_a_token_is_the_published_example():
    for epsilon, share in ((8, 0.085), (10, 0.41), (12, 0.84)):
        assert label_keep_probability(epsilon, 32_000) == pytest.approx(share, abs=0.005)


@pytest.mark.parametrize("keep", [0.2, 1.0, math.nan])
def test_a_keep_probability_that_no_epsilon_gives_is_refused(keep):
    with pytest.raises(UsageError, match="keep probability"):
        label_epsilon(keep, 4)


@pytest.mark.parametrize(
    "call",
    [
        lambda: gaussian_sigma(1, 0.0, sensitivity=1),
        lambda: gaussian_sigma(-1, DELTA, sensitivity=1),
        lambda: gaussian_sigma(math.nan, DELTA, sensitivity=1),
        lambda: gaussian_sigma(math.inf, DELTA, sensitivity=1),
        lambda: gaussian_epsilon(1.0, sensitivity=1, sigma=1),
        lambda: gaussian_epsilon(DELTA, sensitivity=0, sigma=1),
        lambda: gaussian_delta(1, sensitivity=1, sigma=-1),
        lambda: gaussian_delta(1, sensitivity=1, sigma=1, releases=0),
        lambda: zcdp_rho(1, 1, 1.5),
        lambda: zcdp_epsilon(-1, DELTA),
        lambda: zcdp_sigma(0, DELTA, sensitivity=1),
        lambda: recovery(-1, 100),
        lambda: recovery(1, 1),
        lambda: label_keep_probability(1, 1),
        lambda: delta_left(DELTA, -1, 0),
        lambda: dchi_worst_case(0, 1),
    ],
)
def test_values_out_of_range_are_refused_with_what_is_allowed(call):
    with pytest.raises(UsageError) as caught:
        call()
    assert caught.value.expected


# Claims


def plain(**changes):
    fields = {
        "mechanism": "gauss", "channel": "activations up", "unit": "record", "sensitivity": 2.0, "sigma": 2.0,
        "delta": DELTA, "releases_planned": 3, "epsilon_one": 4.0, "epsilon_all": 8.0, "formal": True,
    }  # fmt: skip
    return Claim(**fields | changes)


def test_whatever_is_printed_of_a_claim_names_every_part(claim):
    for text in (claim.sentence(), str(claim), f"{claim}", claim.bound(1), claim.bound(3)):
        assert all(part in text for part in PARTS), text
        assert "\n" not in text
    assert all(f"{field}=" in repr(claim) for field in ("epsilon_one", "delta", "unit", "neighbours", "adversary"))
    assert f"epsilon {calibration._up(claim.epsilon_one)};" in claim.bound(1)
    assert f"epsilon {calibration._up(claim.epsilon_all)};" in claim.bound(3)
    assert claim.bound(1).endswith("token: 1")
    assert claim.bound(3).endswith("token: 3")


@pytest.mark.parametrize(
    "changes",
    [
        {"delta": None}, {"delta": 1.0}, {"delta": math.nan}, {"epsilon_one": None}, {"epsilon_all": None},
        {"epsilon_all": 3.0}, {"epsilon_all": math.inf}, {"epsilon_one": math.nan}, {"epsilon_one": -1.0},
        {"neighbours": " "}, {"adversary": ""}, {"channel": ""}, {"unit": "batch"}, {"releases_planned": 0},
        {"formal": False}, {"formal": False, "because": "r"}, {"sigma": None},
        {"formal": False, "epsilon_one": None, "epsilon_all": None, "because": " "},
        {"mechanism": "dchi"},
    ],
)  # fmt: skip
def test_a_claim_with_a_part_missing_or_out_of_place_cannot_be_made(changes):
    with pytest.raises(UsageError):
        plain(**changes)


def test_what_is_only_empirical_shows_no_figure_and_says_why():
    because = "distance correlation is a penalty in training, not a bound"
    claim = plain(formal=False, epsilon_one=None, epsilon_all=None, mechanism="decorrelate", because=because)
    for text in (claim.sentence(), claim.bound(1), str(claim)):
        assert text.startswith("empirical: ")
        assert because in text
        assert "epsilon" not in text
    assert verdict(claim).startswith("No bound")
    assert preview(claim)[0] == ("bound", claim.sentence())


def test_the_gauss_claim_is_the_zcdp_bound_for_twice_the_clip(claim):
    assert claim.sensitivity == 2.0
    assert claim.epsilon_one == zcdp_epsilon(2 * 1.72**2, DELTA)
    assert claim.epsilon_all == zcdp_epsilon(6 * 1.72**2, DELTA)


def test_the_verdict_speaks_only_where_a_bound_says_almost_nothing():
    for unit, limit in MEANINGLESS_EPSILON.items():
        assert verdict(plain(unit=unit, epsilon_all=limit)) is None
        said = verdict(plain(unit=unit, epsilon_all=limit * 1.01))
        assert f"almost nothing: it allows a receiver to be all but certain about one {unit}" in said
        assert "send each row once" in said
        assert "epsilon" not in said
    assert "send each row once" not in verdict(plain(releases_planned=1, epsilon_one=30.0, epsilon_all=30.0))


def test_the_preview_holds_noise_recovery_bound_and_verdict(claim):
    lines = dict(preview(claim, signal=1.0, vocabulary=32_000))
    assert lines["signal to noise"].startswith("r / sigma = 1.72")
    assert lines["expected token recovery, one release"].startswith(f"{100 * recovery(1.72, 32_000):.3g} %")
    assert lines["expected token recovery, all 3 releases"].startswith(f"{100 * recovery(1.72, 32_000, 3):.3g} %")
    assert lines["bound, one release"] == claim.bound(1)
    assert lines["bound, all 3 releases"] == claim.bound(3)
    assert lines["verdict"] == verdict(claim)
    one = gauss_claim(channel="c", unit="record", depth=2, clip=1, sigma=3.0, delta=DELTA, releases=1)
    assert [label for label, _ in preview(one, signal=0.1, vocabulary=100)] == [
        "signal to noise", "expected token recovery, one release", "bound, one release",
    ]  # fmt: skip


def test_the_preview_of_a_metric_mechanism_shows_the_diameter_beside_it():
    because = "its bound is metric, e^(eta x distance), and large for distant tokens"
    claim = plain(
        mechanism="dchi", unit="token", formal=False, because=because, sensitivity=None, sigma=None, delta=None,
        epsilon_one=None, epsilon_all=None,
    )  # fmt: skip
    lines = dict(preview(claim, eta_diameter=dchi_worst_case(100, 2.89)))
    assert "289 per token and release; not DP" in lines["metric bound, worst case"]
    assert because in lines["bound"]


@given(epsilon=st.floats(1e-6, 1e5))
@settings(deadline=None)
def test_a_printed_epsilon_is_never_rounded_down(epsilon):
    assert epsilon <= float(calibration._up(epsilon)) <= epsilon * 1.0101


# Mistakes found in published code


def test_mistake_01_noise_follows_the_clip_norm():
    for clip in (0.5, 3.0, 2000.0):
        assert gaussian_sigma(8, DELTA, sensitivity=2 * clip) == pytest.approx(clip * 1.20046, rel=1e-4)
        assert gaussian_epsilon(DELTA, sensitivity=2 * clip, sigma=clip * 1.20046) == pytest.approx(8, rel=1e-4)
    for function in (gaussian_sigma, gaussian_epsilon, gaussian_delta, zcdp_sigma):
        assert inspect.signature(function).parameters["sensitivity"].default is inspect.Parameter.empty
    # Scale 5 after clipping one coordinate at 2000, as was shipped with Laplace noise: no bound to speak of.
    assert gaussian_epsilon(DELTA, sensitivity=4000, sigma=5) > 10_000


def test_mistake_08_a_vector_clipped_to_1_has_sensitivity_2(accounting):
    sized_for_one = gaussian_sigma(8, DELTA, sensitivity=1)
    assert gaussian_epsilon(DELTA, sensitivity=2, sigma=sized_for_one) == pytest.approx(19.1, abs=0.05)
    claim = gauss_claim(channel="c", unit="record", depth=2, clip=1, sigma=sized_for_one, delta=DELTA, releases=1)
    assert claim.sensitivity == 2
    assert claim.epsilon_one > 19.1


def test_mistake_09_a_row_that_is_sent_is_not_amplified_by_sampling():
    multiplier = 0.32  # sized for epsilon 8 with q = 1 / N over three epochs
    for sensitivity, one, three in ((1, 17.6, 37), (2, 45.5, 104)):
        setting = {"sensitivity": sensitivity, "sigma": multiplier}
        assert gaussian_epsilon(DELTA, **setting) == pytest.approx(one, abs=0.1)
        assert gaussian_epsilon(DELTA, releases=3, **setting) == pytest.approx(three, abs=0.5)
    for releases, epsilon in ((1, 4.4), (3, 8.4), (10, 17.9)):
        assert gaussian_epsilon(DELTA, sensitivity=1, sigma=1, releases=releases) == pytest.approx(epsilon, abs=0.05)
    for function in (gaussian_epsilon, gaussian_sigma, zcdp_rho, zcdp_epsilon, zcdp_sigma, gauss_claim):
        assert not {"q", "rate", "sampling", "batch", "probability"} & set(inspect.signature(function).parameters)


def test_mistake_14_a_run_is_not_reported_as_one_step_nor_without_delta_nor_by_token_at_a_deep_cut(accounting):
    setting = {"channel": "activations up", "clip": 1.0, "sigma": 1.0, "delta": DELTA}
    claim = gauss_claim(unit="token", depth=0, releases=10, **setting)
    assert claim.epsilon_all > 3 * claim.epsilon_one
    assert calibration._up(claim.epsilon_all) in claim.sentence()
    assert "10 planned" in claim.sentence()
    with pytest.raises(UsageError, match="delta"):
        plain(delta=None)
    with pytest.raises(UsageError, match="per token") as caught:
        gauss_claim(unit="token", depth=1, releases=1, **setting)
    assert "record" in str(caught.value)
    assert gauss_claim(unit="record", depth=1, releases=1, **setting).epsilon_one == claim.epsilon_one


def exact_delta(sigma: float, shift: int, epsilon: float) -> float:
    """The smallest delta of one coordinate of whole-numbered noise as the sampler draws it, moved by `shift`."""
    drawn = Sampler(sigma)
    reach = math.ceil(9 * sigma) + shift
    mass = {k: drawn.probability(k) for k in range(-reach - shift, reach + shift + 1)}
    return sum(max(0.0, mass[k] - math.exp(epsilon) * mass[k - shift]) for k in range(-reach, reach + 1))


def test_mistake_17_noise_is_whole_numbers_and_is_accounted_for_as_such(accounting):
    assert Sampler(3.0).draw(10).dtype == np.int32
    for sigma, shift in ((0.3, 1), (0.5, 1), (1.0, 2), (4.0, 3)):
        epsilon = zcdp_epsilon(zcdp_rho(shift, sigma), DELTA)
        assert exact_delta(sigma, shift, epsilon) <= DELTA
    # The continuous curve is no bound for whole numbers on a coarse grid: it is too low where the next step of the loss
    # is only just beyond epsilon. The zCDP bound holds there too.
    for sigma, epsilon in ((0.3, 27.4), (0.5, 13.7), (1.0, 6.35)):
        exact = exact_delta(sigma, 1, epsilon)
        assert exact > 2 * gaussian_delta(epsilon, sensitivity=1, sigma=sigma)
        assert zcdp_epsilon(zcdp_rho(1, sigma), exact) > epsilon
