"""The audit of differential privacy: its bounds are those of the papers, what is sound passes, each planted bug shows.

The trainings here are real and their noise cannot be seeded. So the sizes are chosen for a sound run to be six standard
errors from failing, and each bug as many from passing.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from opacus.optimizers import DPOptimizer

from party import private_sgd
from party.dp_audit import audit_dp_sgd, claimed_by
from party.private_plan import epsilon_of, plan_private
from splitfl.adapters import add_lora, lora_config
from splitfl.audit.attacks.dp_audit import Claimed, audit_gauss, bound_from_scores, steps_score
from splitfl.audit.attacks.dp_bounds import (
    binomial_tail,
    clopper_pearson_upper,
    contradicts,
    gaussian_inverse,
    one_run_epsilon,
    one_run_mu,
    pair_bounds,
    profile_inverse,
)
from splitfl.data import Collator
from splitfl.errors import UsageError
from splitfl.privacy.calibration import gaussian_delta
from splitfl.privacy.mechanisms import Gauss
from tests.families import make_config, make_model
from tests.privacy.test_private_sgd import cut_of, rows_of
from tests.small_tokenizers import bpe

CANARIES, STEPS, NOISE, BATCH_SHARE = 4000, 16, 2.5, 0.5


# ---- the bounds


@pytest.mark.parametrize(
    ("canaries", "guesses", "right", "expected"),
    [
        (100, 100, 100, 3.49), (256, 256, 256, 4.44), (500, 500, 500, 5.10), (1000, 1000, 1000, 5.78),
        (2000, 2000, 2000, 6.45), (5000, 5000, 5000, 7.28), (1000, 100, 80, 0.96), (1000, 100, 90, 1.63),
        (1000, 100, 95, 2.17), (1000, 100, 50, 0.0),
    ],
)  # fmt: skip
def test_the_one_run_bound_has_the_known_values(canaries, guesses, right, expected):
    """Worked out beforehand with another library's binomials: 95 %, delta 1e-5."""
    found = one_run_epsilon(canaries=canaries, guesses=guesses, right=right, delta=1e-5, significance=0.05)
    assert found == pytest.approx(expected, abs=0.006)


def test_tails_and_ends_are_those_of_the_binomial():
    tail = binomial_tail(3, 0.25)
    assert tail.tolist() == pytest.approx([1.0, 37 / 64, 10 / 64, 1 / 64, 0.0])
    assert binomial_tail(4, 0.0).tolist() == [1, 0, 0, 0, 0, 0]
    assert clopper_pearson_upper(0, 100, 0.05) == pytest.approx(1 - 0.05 ** (1 / 100))
    assert clopper_pearson_upper(100, 100, 0.05) == 1.0
    end = clopper_pearson_upper(7, 50, 0.01)
    assert 1 - binomial_tail(50, end)[8] == pytest.approx(0.01, rel=1e-6)


def scores_of(mu, count, seed):
    generator = np.random.default_rng(seed)
    included = generator.random(count) < 0.5
    return generator.normal(size=count) + mu * (included - 0.5), included


def gaussian_claim(mu, delta=1e-5):
    profile = tuple((e, gaussian_delta(e, sensitivity=mu, sigma=1.0)) for e in np.linspace(0, 12, 60).tolist())
    epsilon = next(e for e, d in ((e / 100, gaussian_delta(e / 100, sensitivity=mu, sigma=1)) for e in range(9999))
                   if d <= delta)  # fmt: skip
    return Claimed(epsilon=epsilon, delta=delta, profile=profile)


@pytest.mark.parametrize("mu", [0.5, 1.0, 2.0])
def test_a_mechanism_that_is_as_private_as_claimed_passes_and_one_of_twice_the_mu_does_not(mu):
    claim = gaussian_claim(mu)
    lowest = math.inf
    for seed in range(20):
        sound = bound_from_scores(*scores_of(mu, CANARIES, seed), claim)
        assert not sound.violated
        assert sound.mu < mu
        assert sound.epsilon <= sound.claimed.epsilon
        lowest = min(lowest, sound.mu)
        loose = bound_from_scores(*scores_of(2 * mu, CANARIES, seed), claim)
        assert loose.mu > mu or mu == 0.5, "below one the audit in one run lacks the power"
        assert loose.mu_pair > mu
        assert loose.profile_contradicted == loose.violated
    assert lowest > 0.4 * mu, "a bound that is always 0 would pass as well"


def test_the_bounds_hold_as_often_as_they_say():
    """At the true mu: contradicted in at most 5 % of runs; 200 of them, so 12 % is four standard errors off."""
    wrong = pairs = 0
    for seed in range(200):
        scores, included = scores_of(1.0, 400, 1000 + seed)
        found = bound_from_scores(scores, included, gaussian_claim(1.0))
        wrong += found.violated or found.mu > 1.0
        pairs += found.mu_pair > 1.0
    assert wrong <= 24
    assert pairs <= 24


def test_a_profile_of_many_pairs_is_the_curve_it_came_from():
    by_curve, by_pairs = gaussian_inverse(1.0), profile_inverse(gaussian_claim(1.0).profile)
    for y in (0.001, 0.05, 0.3, 0.7, 0.95):
        assert by_pairs(y) <= by_curve(y) + 1e-9, "a weaker claim, never a stronger one"
        assert by_pairs(y) == pytest.approx(by_curve(y), abs=3e-3)
    assert profile_inverse([(0.0, 0.0)])(0.3) == pytest.approx(0.3), (
        "perfect privacy: a test is as often wrong as right"
    )


def test_guessing_at_random_contradicts_nothing():
    counts = {"canaries": 1000, "guesses": 250, "right": 125}
    assert one_run_mu(**counts, significance=0.05) == 0.0
    assert not contradicts(gaussian_inverse(0.0), **counts, significance=0.05)
    assert pair_bounds(50, 100, 50, 100, delta=1e-5, significance=0.05) == (0.0, 0.0)


def test_too_few_canaries_are_refused():
    with pytest.raises(UsageError, match="give no bound"):
        bound_from_scores(np.zeros(12), np.arange(12) % 2 == 0, gaussian_claim(1.0))


def test_the_score_of_steps_is_the_likelihood_ratio():
    seen = np.array([[0.3, -2.0], [1.7, 0.4]])
    density = lambda x, mean: math.exp(-((x - mean) ** 2) / (2 * 1.5**2))  # noqa: E731
    expected = [sum(math.log(0.8 + 0.2 * density(x, 1) / density(x, 0)) for x in column) for column in seen.T.tolist()]
    assert steps_score(seen, noise=1.5, rate=0.2).tolist() == pytest.approx(expected)


# ---- DP-SGD


def plan_of(rows, **changes):
    units = [str(number) for number in range(len(rows) + CANARIES)]
    plan = plan_private(
        units=units, unit="row", batch=int(BATCH_SHARE * len(units)), max_steps=STEPS, epochs=1.0, clip=0.5,
        delta=1e-5, noise_multiplier=NOISE, epsilon=None,
    )  # fmt: skip
    return dataclasses.replace(plan, **changes)


def audited(plan, **more):
    """A real run of the tiny model; about three seconds."""
    base = make_model(make_config("llama")).requires_grad_(False)
    cut = cut_of(base)
    model = add_lora(base, lora_config(base, cut, r=4, target_modules=["all-linear"]), seed=0)
    return audit_dp_sgd(model, cut, rows_of(), Collator(bpe(), pad_token_id=0), plan, canaries=CANARIES, **more)


@pytest.fixture(scope="module")
def plan():
    return plan_of(rows_of())


@pytest.fixture(scope="module")
def claim(plan):
    return claimed_by(plan)


@pytest.mark.slow
def test_the_real_training_loop_keeps_what_it_claims(plan, claim):
    found = audited(plan, claimed=claim)
    assert not found.violated, found.sentence()
    assert not found.suspected, found.sentence()
    assert 0 < found.epsilon < found.claimed.epsilon
    assert found.mu > 0.2, "the canaries were heard at all"


@pytest.mark.slow
def test_half_the_noise_shows(plan, claim, monkeypatch):
    drawn = private_sgd.gaussian_noise
    monkeypatch.setattr(private_sgd, "gaussian_noise", lambda count, sigma: drawn(count, sigma / 2))
    found = audited(plan, claimed=claim)
    assert found.violated, found.sentence()
    assert found.epsilon_of_mu > found.claimed.epsilon


@pytest.mark.slow
def test_the_epsilon_of_one_step_for_all_of_them_shows(plan):
    found = audited(plan, claimed=claimed_by(plan_of(rows_of(), steps=1, epsilon=_one_step(plan))))
    assert found.violated, found.sentence()
    assert found.epsilon > found.claimed.epsilon


def _one_step(plan):
    return epsilon_of(plan.noise_multiplier, plan.sample_rate, 1, plan.delta)


@pytest.mark.slow
def test_a_clip_that_does_not_clip_shows(plan, claim, monkeypatch):
    def add_up(self):
        for p in self.params:
            p.summed_grad = self._get_flat_grad_sample(p).sum(0) + (0 if p.summed_grad is None else p.summed_grad)
            p.grad_sample._processed = True

    assert hasattr(DPOptimizer, "clip_and_accumulate")
    monkeypatch.setattr(private_sgd._Noised, "clip_and_accumulate", add_up)
    found = audited(plan, claimed=claim)
    assert found.violated, found.sentence()
    assert found.epsilon > found.claimed.epsilon


@pytest.mark.slow
def test_a_sampling_rate_that_is_not_the_real_one_shows(plan):
    """Amplification that the loop does not earn: batches of half of all units, accounted for as of one in fifty."""
    found = audited(plan, claimed=claimed_by(plan_of(rows_of(), sample_rate=0.02, epsilon=0.2)))
    assert found.violated, found.sentence()


def test_more_canaries_than_values_are_refused(plan):
    with pytest.raises(UsageError, match="canaries"):
        audited(dataclasses.replace(plan, units=17))


# ---- the mechanism on activations


class _HalfNoise:
    """Says one sigma and draws half of it."""

    def __init__(self, honest):
        self.clip, self.sigma = honest.clip, honest.sigma
        self._real = Gauss(clip=honest.clip, sigma=honest.sigma / 2)

    def protect(self, x, mask):
        return self._real.protect(x, mask)


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0])
def test_the_activation_mechanism_keeps_what_it_claims_and_half_its_noise_shows(ratio):
    honest = Gauss(clip=2.0, sigma=4.0 / ratio)
    sound = audit_gauss(honest, significance=1e-6)
    assert not sound.violated
    assert 0.9 * ratio < sound.mu <= sound.mu_claimed == pytest.approx(ratio)
    assert 0.3 * sound.epsilon_claimed < sound.epsilon < sound.epsilon_claimed
    planted = audit_gauss(_HalfNoise(honest), significance=1e-6)
    assert planted.violated
    assert planted.mu > planted.mu_claimed


def test_a_clip_of_half_the_sensitivity_shows():
    """Published mistake 8: replace-one moves by two clip norms; who claims one has half the mu."""

    class OneClip(_HalfNoise):
        def __init__(self, honest):
            super().__init__(honest)
            self._real, self.clip = honest, honest.clip / 2

    found = audit_gauss(OneClip(Gauss(clip=2.0, sigma=4.0)), releases=100_000, significance=1e-6)
    assert found.violated


def test_one_release_that_was_sent_four_times_shows():
    """Published mistake 14, and averaging: four sends are twice the mu."""

    class FourSends(_HalfNoise):
        def __init__(self, honest):
            super().__init__(honest)
            self._real = honest

        def protect(self, x, mask):
            return torch.stack([self._real.protect(x, mask).decode() for _ in range(4)]).mean(0)

    found = audit_gauss(FourSends(Gauss(clip=2.0, sigma=4.0)), releases=100_000, significance=1e-6)
    assert found.violated


def test_few_releases_are_refused():
    with pytest.raises(UsageError, match="say nothing"):
        audit_gauss(Gauss(clip=2.0, sigma=4.0), releases=10)
