"""Distance correlation: against its definition, on data whose answer is known, and as a loss. Data are seeded."""

from __future__ import annotations

import math

import pytest
import torch

from splitfl.errors import InternalError, UsageError
from splitfl.privacy.decorrelation import distance_correlation, flatten_tokens


def sample(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_definition(x: torch.Tensor, z: torch.Tensor) -> float:
    """Szekely and Rizzo's formulas entry by entry, in Python's own numbers."""
    n = len(x)

    def centred(points: list[list[float]]) -> list[list[float]]:
        a = [[math.dist(p, q) for q in points] for p in points]
        sums = [math.fsum(row) for row in a]
        total = math.fsum(sums)
        return [
            [
                0.0 if i == j else a[i][j] - sums[i] / (n - 2) - sums[j] / (n - 2) + total / ((n - 1) * (n - 2))
                for j in range(n)
            ]
            for i in range(n)
        ]

    def product(a: list[list[float]], b: list[list[float]]) -> float:
        return math.fsum(a[i][j] * b[i][j] for i in range(n) for j in range(n)) / (n * (n - 3))

    a, b = centred(x.tolist()), centred(z.tolist())
    return product(a, b) / math.sqrt(product(a, a) * product(b, b))


def biased(x: torch.Tensor, z: torch.Tensor) -> float:
    """The usual double-centred statistic, for comparison."""

    def centred(points: torch.Tensor) -> torch.Tensor:
        a = torch.cdist(points, points)
        return a - a.mean(0) - a.mean(1, keepdim=True) + a.mean()

    a, b = centred(x), centred(z)
    return float((a * b).mean() / ((a * a).mean() * (b * b).mean()).sqrt())


@pytest.mark.parametrize(("n", "p", "q"), [(4, 2, 3), (5, 1, 1), (17, 6, 2), (40, 3, 8)])
def test_it_is_the_definition(n, p, q):
    x = sample(n, p, dtype=torch.float64)
    z = torch.tanh(x[:, :1]) + 0.5 * sample(n, q, seed=1, dtype=torch.float64)
    assert float(distance_correlation(x, z)) == pytest.approx(by_definition(x, z), rel=1e-9, abs=1e-12)
    assert float(distance_correlation(x.float(), z.float())) == pytest.approx(by_definition(x, z), abs=1e-4)


def test_the_same_data_shifted_turned_and_scaled_correlate_fully():
    x = sample(60, 5)
    turned = torch.linalg.qr(sample(5, 5, seed=1)).Q
    for z in (x, x * 1e-4, x * 1e6 + 3e6, x @ turned, torch.cat([x, torch.zeros(60, 3)], 1)):
        assert float(distance_correlation(x, z)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("n", [8, 32])
def test_independent_data_average_to_nothing(n):
    repeats = 400
    values = torch.stack(
        [distance_correlation(sample(n, 64, seed=2 * i), sample(n, 64, seed=2 * i + 1)) for i in range(repeats)]
    )
    assert abs(float(values.mean())) < 4 * float(values.std()) / math.sqrt(repeats)
    assert 0.2 < float((values < 0).double().mean()) < 0.8
    usual = [biased(sample(n, 64, seed=2 * i), sample(n, 64, seed=2 * i + 1)) for i in range(20)]
    assert min(usual) > 0.8, "the usual statistic takes independent data for dependent ones"


def test_more_noise_means_less_correlation():
    x, noise = sample(256, 16), sample(256, 16, seed=1)
    values = [float(distance_correlation(x, x + level * noise)) for level in (0.0, 0.5, 1.0, 2.0, 8.0)]
    assert values == sorted(values, reverse=True)
    assert values[0] == pytest.approx(1, abs=1e-6)
    assert values[-1] < 0.1


def test_it_sees_dependence_that_correlation_does_not():
    x = sample(300, 1)
    z = x**2
    assert abs(float(torch.corrcoef(torch.cat([x, z], 1).T)[0, 1])) < 0.2
    assert float(distance_correlation(x, z)) > 0.1


def test_its_gradient_is_that_of_its_value():
    x, z = (sample(6, 3, seed=i, dtype=torch.float64).requires_grad_() for i in range(2))
    assert torch.autograd.gradcheck(distance_correlation, (x, z))


def test_it_is_a_loss_that_can_be_brought_down():
    x = sample(128, 8)
    mixed = torch.cat([x, sample(128, 8, seed=1)], 1)
    layer = torch.nn.Linear(16, 8)
    with torch.no_grad():
        layer.weight.copy_(torch.cat([torch.eye(8), 0.1 * sample(8, 8, seed=2)], 1))
        layer.bias.zero_()
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.05)
    before = distance_correlation(x, layer(mixed)).item()
    for _ in range(60):
        optimiser.zero_grad()
        loss = distance_correlation(x, layer(mixed))
        loss.backward()
        optimiser.step()
    assert before > 0.9
    assert loss.item() < 0.2


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(8, 3),
        torch.ones(8, 3) * 1e4,
        torch.eye(8),  # all distances the same: no variance either
        torch.full((8, 3), 1e-20),
    ],
    ids=["zeros", "equal", "equidistant", "tiny"],
)
def test_data_without_variance_give_zero_and_a_gradient_of_zeros(x):
    x = x.clone().requires_grad_()
    z = sample(8, 4).requires_grad_()
    for value in (distance_correlation(x, z), distance_correlation(z, x)):
        assert value.item() == 0
        value.backward()
    assert not x.grad.any()
    assert not z.grad.any()


def test_equal_tokens_do_no_harm_to_the_gradient():
    x = sample(10, 3)[[0, 0, 1, 2, 2, 2, 3, 4, 5, 6]].requires_grad_()
    z = (sample(10, 4, seed=1) + 0.5).requires_grad_()
    distance_correlation(x, z).backward()
    for gradient in (x.grad, z.grad):
        assert torch.isfinite(gradient).all()
        assert gradient.any()


def test_half_precision_is_computed_in_single():
    x = sample(64, 32, dtype=torch.bfloat16).requires_grad_()
    value = distance_correlation(x, x.detach() * 2)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(1, abs=1e-4)
    value.backward()
    assert x.grad.dtype == torch.bfloat16


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="3 tokens"):
        distance_correlation(sample(3, 2), sample(3, 2))
    for x, z in ((sample(2, 4, 3), sample(2, 4, 3)), (sample(5, 2), sample(6, 2))):
        with pytest.raises(InternalError, match="not defined"):
            distance_correlation(x, z)
    with pytest.raises(InternalError, match="no mask"):
        flatten_tokens(sample(4, 3), None)
    with pytest.raises(InternalError, match="mask of shape"):
        flatten_tokens(sample(2, 4, 3), torch.ones(2, 5))
    with pytest.raises(UsageError, match="limit"):
        flatten_tokens(sample(2, 4, 3), None, limit=3)


def test_tokens_are_flattened_without_padding_and_in_step():
    x = torch.arange(2 * 5 * 3).float().view(2, 5, 3)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.uint8)
    assert torch.equal(flatten_tokens(x, mask), torch.cat([x[0, 2:], x[1]]))
    assert torch.equal(flatten_tokens(x, None), x.flatten(0, 1))
    few = flatten_tokens(x, mask, limit=4)
    assert len(few.unique(dim=0)) == 4
    both = flatten_tokens(torch.cat([x, -x], 2), mask, limit=4)
    assert torch.equal(both, torch.cat([few, -few], 1))


@pytest.mark.parametrize(("count", "limit"), [(512, 512), (513, 512), (1023, 512), (4096, 512), (700, 7)])
def test_at_most_so_many_tokens_and_none_twice(count, limit):
    points = flatten_tokens(torch.arange(count).float().view(1, count, 1), None, limit=limit)
    assert points.shape == (min(count, limit), 1)
    assert (points[1:] > points[:-1]).all()
    assert float(points[-1]) >= count * (1 - 1 / limit) - 1


def test_the_graph_goes_through_flattening():
    x = sample(2, 6, 3).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    distance_correlation(flatten_tokens(x, mask), flatten_tokens(x.detach() ** 2, mask)).backward()
    assert x.grad[0, :4].any()
    assert not x.grad[0, 4:].any()
