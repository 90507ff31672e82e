"""What guards a classifier's labels: frequencies, geometry, and the least divergence against other noise.

Statistics are held to seven standard errors: a false alarm once in four hundred thousand million checks.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitfl.errors import DataError, InternalError, UsageError
from splitfl.privacy.labels import MarvellNoise, marvell, max_norm, randomise_labels, solve_marvell

ERRORS = 7.0
COUNT = 60_000


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- randomised response


@pytest.mark.parametrize(("classes", "epsilon"), [(2, 1.0), (2, 0.1), (5, 2.0), (5, 0.5), (1000, 6.0)])
def test_labels_are_kept_as_often_as_epsilon_says(classes, epsilon):
    labels = torch.arange(COUNT) % classes
    new = randomise_labels(labels, classes, epsilon)
    kept = math.exp(epsilon) / (math.exp(epsilon) + classes - 1)
    share = float((new == labels).double().mean())
    assert abs(share - kept) < ERRORS * math.sqrt(kept * (1 - kept) / COUNT)


def test_every_other_class_is_as_likely():
    classes, label = 5, 3
    new = randomise_labels(torch.full((COUNT,), label), classes, 1.0)
    counts = torch.bincount(new, minlength=classes).double()
    each = 1 / (math.e + classes - 1)
    for other in set(range(classes)) - {label}:
        assert abs(float(counts[other]) / COUNT - each) < ERRORS * math.sqrt(each / COUNT)


def test_changes_are_independent_of_each_other():
    labels = torch.zeros(COUNT, dtype=torch.int64)
    changed = randomise_labels(labels, 2, 0.5).double()
    centred = changed - changed.mean()
    assert abs(float((centred[1:] * centred[:-1]).mean() / centred.var())) < ERRORS / math.sqrt(COUNT)


def test_labels_keep_shape_and_dtype_and_the_old_ones_stay():
    labels = torch.zeros(40, 50, dtype=torch.int32)
    new = randomise_labels(labels, 4, 0.5)
    assert (new.shape, new.dtype) == (labels.shape, labels.dtype)
    assert not labels.any()
    assert new.any()
    assert 0 <= int(new.min()) <= int(new.max()) < 4
    assert randomise_labels(torch.zeros(0, dtype=torch.int64), 3, 1.0).shape == (0,)


def test_a_large_epsilon_changes_next_to_nothing():
    labels = torch.arange(1000) % 7
    assert torch.equal(randomise_labels(labels, 7, 30.0), labels)  # 6e-10 of a change in a thousand labels


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan, math.inf, 31.0])
def test_epsilons_that_are_no_setting_are_refused(epsilon):
    with pytest.raises(UsageError, match="epsilon"):
        randomise_labels(torch.tensor([0, 1]), 2, epsilon)


def test_labels_that_are_no_classes_are_refused_without_naming_them():
    for label in (-100, 77):
        with pytest.raises(DataError) as caught:
            randomise_labels(torch.tensor([0, label]), 3, 1.0)
        assert str(label) not in str(caught.value)
    with pytest.raises(UsageError, match="2 classes"):
        randomise_labels(torch.tensor([0]), 1, 1.0)
    with pytest.raises(InternalError, match="float"):
        randomise_labels(torch.tensor([0.5]), 2, 1.0)


# ---- max-norm


@pytest.mark.parametrize("shape", [(6, 32), (6, 4, 8), (6, 2)])
def test_max_norm_aligns_all_norms_at_right_angles(shape):
    gradient = rows(*shape) * torch.logspace(-3, 1, 6, dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))
    gradient[2] = 0.0
    sent = max_norm(gradient)
    assert sent.shape == gradient.shape
    norms, before = sent.flatten(1).norm(dim=1), gradient.flatten(1).norm(dim=1)
    assert torch.allclose(norms, before.max().expand(6), rtol=1e-9)
    added = (sent - gradient).flatten(1)
    largest = float(before.max())
    assert float((added * gradient.flatten(1)).sum(1).abs().max()) < 1e-9 * largest**2
    assert not torch.equal(sent, max_norm(gradient))


def test_max_norm_noise_has_no_preferred_direction():
    gradient = torch.zeros(4001, 8, dtype=torch.float64)
    gradient[0, 0] = 1.0
    noise = max_norm(gradient)[1:]
    assert float(noise.mean(0).norm()) < ERRORS / math.sqrt(4000)
    second = noise.T @ noise / 4000 * 8
    assert float((second - torch.eye(8, dtype=torch.float64)).abs().max()) < ERRORS * math.sqrt(3 / 4000)


def test_max_norm_needs_room_and_keeps_the_dtype():
    with pytest.raises(UsageError, match="two numbers"):
        max_norm(torch.ones(3, 1))
    assert max_norm(torch.ones(3, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert not max_norm(torch.zeros(2, 4)).any()
    with pytest.raises(InternalError, match="floating"):
        max_norm(torch.ones(3))


# ---- marvell


def divergence(noise: MarvellNoise, *, spread, gap: float, width: int) -> float:
    """Both KL divergences by the general formula for Gaussians, with whole covariance matrices."""
    unit = torch.zeros(width, dtype=torch.float64)
    unit[0] = 1.0
    line, eye = torch.outer(unit, unit), torch.eye(width, dtype=torch.float64)
    covariances = [
        spread[label] * eye + noise.along[label] * line + noise.across[label] * (eye - line) for label in (0, 1)
    ]
    means = [0 * unit, gap * unit]
    total = 0.0
    for one, two in ((0, 1), (1, 0)):
        inverse = torch.linalg.inv(covariances[two])
        apart = means[two] - means[one]
        logs = torch.logdet(covariances[two]) - torch.logdet(covariances[one])
        total += float(torch.trace(inverse @ covariances[one]) + apart @ inverse @ apart - width + logs) / 2
    return total


def spent(noise: MarvellNoise, share: float, width: int) -> float:
    return sum(
        weight * (noise.along[label] + (width - 1) * noise.across[label])
        for label, weight in enumerate((1 - share, share))
    )


PROBLEMS = st.fixed_dictionaries(
    {
        "spread": st.tuples(st.floats(1e-3, 10), st.floats(1e-3, 10)),
        "gap": st.floats(0.05, 5),
        "share": st.floats(0.05, 0.95),
        "width": st.integers(1, 6),
        "power": st.floats(0.05, 20),
    }
)


@settings(max_examples=60, deadline=None)
@given(problem=PROBLEMS, seed=st.integers(0, 2**31))
def test_no_other_noise_of_that_power_brings_the_classes_closer(problem, seed):
    noise = solve_marvell(**problem)
    width, share = problem["width"], problem["share"]
    budget = problem["power"] * problem["gap"] ** 2
    asked = {"spread": problem["spread"], "gap": problem["gap"], "width": width}
    assert spent(noise, share, width) <= budget * (1 + 1e-9)
    assert min(*noise.along, *noise.across) >= 0
    least = divergence(noise, **asked)
    assert least == pytest.approx(noise.sum_kl, rel=1e-6, abs=1e-9)
    generator = torch.Generator().manual_seed(seed)
    for attempt in range(40):
        if attempt % 2:  # anywhere
            drawn = torch.rand(4, generator=generator, dtype=torch.float64) ** 3
        else:  # near the solution
            wiggle = torch.randn(4, generator=generator, dtype=torch.float64) * 0.02
            drawn = (torch.tensor([*noise.along, *noise.across]) + 1e-6) * torch.exp(wiggle)
        other = MarvellNoise(along=tuple(drawn[:2].tolist()), across=tuple(drawn[2:].tolist()), sum_kl=0.0)
        scale = budget / spent(other, share, width)
        along, across = ((a * scale, b * scale) for a, b in (other.along, other.across))
        other = MarvellNoise(along=along, across=across, sum_kl=0.0)
        assert divergence(other, **asked) >= least * (1 - 1e-6) - 1e-9


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("power", [0.5, 1.0, 10.0])
def test_for_gradients_without_spread_the_solution_is_the_papers_closed_form(share, power):
    """All of it along the difference, in the ratio sqrt((P + (1-p) g) / (P + p g)) of label 1 to label 0."""
    gap = 2.0
    noise = solve_marvell(spread=(0.0, 0.0), gap=gap, share=share, width=512, power=power)
    ratio = math.sqrt((power + 1 - share) / (power + share))
    zero = power * gap**2 / (share * ratio + 1 - share)
    assert noise.across == (0.0, 0.0)
    assert noise.along == pytest.approx((zero, ratio * zero), rel=1e-6)


def test_more_power_leaves_a_larger_detection_error():
    errors = [
        solve_marvell(spread=(0.1, 0.2), gap=1.0, share=0.5, width=64, power=power).detection_error
        for power in (0.1, 1.0, 10.0, 100.0)
    ]
    assert errors == sorted(errors)
    assert 0 <= errors[0] < 0.2
    assert 0.4 < errors[-1] < 0.5


def test_marvells_noise_has_the_solved_variances():
    count, width, power = 6000, 6, 2.0
    labels = (torch.arange(count) % 3 == 0).long()
    gradient = rows(count, width, seed=1) * torch.where(labels == 1, 0.5, 0.2)[:, None]
    gradient[:, 1] += labels * 3.0
    noise = (marvell(gradient, labels, power) - gradient).double()
    means = [gradient[labels == label].mean(0) for label in (0, 1)]
    difference = means[1] - means[0]
    gap = float(difference.norm())
    spread = tuple(float(((gradient[labels == label] - means[label]) ** 2).mean()) for label in (0, 1))
    solved = solve_marvell(spread=spread, gap=gap, share=float(labels.double().mean()), width=width, power=power)
    assert solved.across[0] > 0  # the narrower class is widened ...
    assert solved.across[1] == 0  # ... and the other is not
    along = noise @ difference / gap
    across = noise - along[:, None] * difference / gap
    for label in (0, 1):
        chosen = labels == label
        size = int(chosen.sum())
        assert float((along[chosen] ** 2).mean()) == pytest.approx(
            solved.along[label], rel=ERRORS * math.sqrt(2 / size)
        )
        assert float((across[chosen] ** 2).sum(1).mean()) == pytest.approx(
            solved.across[label] * (width - 1), rel=ERRORS * math.sqrt(2 / size / (width - 1)), abs=1e-12
        )
        assert abs(float(along[chosen].mean())) < ERRORS * math.sqrt(solved.along[label] / size)
    assert float((noise**2).sum(1).mean()) == pytest.approx(power * gap**2, rel=0.2)


def test_the_direction_attack_is_weakened_as_the_bound_says():
    """Gradients as a binary cross-entropy gives them: one direction, its sign the label."""
    count, power = 4000, 4.0
    labels = (torch.arange(count) % 2).long()
    direction = rows(32, seed=2)
    direction /= direction.norm()
    predicted = torch.rand(count, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 0.4 + 0.3
    gradient = (predicted - labels)[:, None] * direction

    def error(sent: torch.Tensor) -> float:
        """The best threshold's mean of false positive and false negative rate."""
        score = sent.double() @ direction
        order = labels[score.argsort()].double()
        positives = torch.cat([torch.zeros(1, dtype=torch.float64), order.cumsum(0)]) / order.sum()
        negatives = torch.cat([torch.zeros(1, dtype=torch.float64), (1 - order).cumsum(0)]) / (1 - order).sum()
        return float(0.5 - (positives - negatives).abs().max() / 2)

    assert error(gradient) == 0
    sent = marvell(gradient, labels, power)
    solved = solve_marvell(spread=(0.0004, 0.0004), gap=1.0, share=0.5, width=32, power=power)
    assert 0.25 < solved.detection_error < error(sent) + 0.05
    assert error(sent) > 0.25


def test_a_batch_of_one_class_gets_max_norm():
    gradient = rows(5, 16)
    for labels in (torch.zeros(5, dtype=torch.int64), torch.ones(5, dtype=torch.int64)):
        norms = marvell(gradient, labels, 1.0).norm(dim=1)
        assert torch.allclose(norms, gradient.norm(dim=1).max().expand(5))
    assert not marvell(torch.zeros(4, 8), torch.tensor([0, 1, 0, 1]), 1.0).any()


def test_marvell_keeps_shape_and_dtype_and_takes_the_smallest_batch():
    gradient = torch.randn(2, 3, 4).to(torch.bfloat16)
    sent = marvell(gradient, torch.tensor([1, 0], dtype=torch.int32), 1.0)
    assert (sent.shape, sent.dtype) == (gradient.shape, gradient.dtype)
    assert torch.isfinite(sent).all()
    assert not torch.equal(sent, gradient)


def test_marvell_refuses_more_classes_and_names_max_norm():
    with pytest.raises(UsageError, match="max_norm"):
        marvell(torch.ones(3, 4), torch.tensor([0, 1, 2]), 1.0)
    for power in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UsageError, match="power"):
            marvell(torch.ones(2, 4), torch.tensor([0, 1]), power)
    with pytest.raises(InternalError, match="labels"):
        marvell(torch.ones(3, 4), torch.tensor([0, 1]), 1.0)
