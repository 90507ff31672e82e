"""`fed-sb`: a small square matrix is trained between two fixed factors, and only that is sent."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from splitfl.aggregation.factors import Pair, Update
from splitfl.aggregation.low_rank import orthonormal
from splitfl.aggregation.rule import Rule, Step
from splitfl.aggregation.state import State, fresh_factor
from splitfl.aggregation.sums import Vector
from splitfl.errors import UsageError

_STARTS = ("gradient", "random")


@dataclass(frozen=True, kw_only=True)
class FedSB(Rule):
    """The change is B R A with fixed orthonormal B, A; R = sum w R_k, r x r values a module.

    LoRA-SB takes B and A from the singular vectors of the gradient of the weight at the start, which is dense. Here the
    first round finds them from two ordinary LoRA gradients, a randomised SVD of the mean gradient G, so that sums are
    enough (the way there is ours):

        sketch   A random, B zero:             the gradient of B is s G A^T       B = basis of its mean
        project  B that basis, A zero:         the gradient of A is s B^T G       U S V^T = its mean; B = B U, A = V^T
        train    R from zero between B and A

    R starts at zero and not at a first optimiser step as in LoRA-SB, so that round 0 starts from the base model.
    `start_from` = "random" leaves the two gradients out: then B and A are drawn.
    """

    name = "fed-sb"
    source = "Fed-SB and LoRA-SB (Singhal, Ponkshe et al., 2502.15436, 2411.19557); finding the factors by sums is ours"
    says = "mean of r x r cores between two fixed factors"
    exact = True
    one_rank = "the fixed factors are the same at every party"

    start_from: str = "gradient"

    def __post_init__(self) -> None:
        if self.start_from not in _STARTS:
            raise UsageError(f"start_from={self.start_from!r} is not known.", expected=" or ".join(_STARTS))

    def steps(self, round: int) -> tuple[Step, ...]:
        """Two gradients in round 0, then and afterwards the core."""
        train = Step(trains="core", sends="core")
        if round or self.start_from != "gradient":
            return (train,)
        sketch = Step("sketch", "gradient", trains="B", sends="B", extras=False)
        return (sketch, Step("project", "gradient", trains="A", sends="A", extras=False), train)

    def first(self, template: Update, seed: int) -> State:
        """A drawn, B zero; or both drawn with a core of zero."""

        def begun(name: str, pair: Pair) -> Pair:
            d_in, d_out = pair.widths
            check_orthonormal(self.name, name, pair)
            a = orthonormal(fresh_factor(seed, name, pair.rank, d_in).T).T
            if self.start_from == "gradient":
                return Pair(a.float().contiguous(), torch.zeros_like(pair.b), pair.scale)
            b = orthonormal(fresh_factor(seed, name, pair.rank, d_out, draw=1).T)
            return _around_nothing(a, b, pair.scale)

        return State(adapter=template.map(begun), seed=seed)

    def from_mean(self, state: State, mean: Vector, round: int, step: int = 0) -> State:
        """The mean of the cores; after a gradient, the factors found by it."""
        averaged = super().from_mean(state, mean, round, step)
        name = self.steps(round)[step].name
        if name == "train":
            return averaged

        def found(_: str, pair: Pair) -> Pair:
            if name == "sketch":
                return Pair(torch.zeros_like(pair.a), orthonormal(pair.b).float(), pair.scale)
            u, _s, vh = torch.linalg.svd(pair.a.double(), full_matrices=False)
            return _around_nothing(vh, pair.b.double() @ u, pair.scale)

        return replace(averaged, adapter=averaged.adapter.map(found))


def check_orthonormal(rule: str, name: str, pair: Pair) -> None:
    """There are as many orthonormal rows as the rank needs.

    Raises:
        UsageError: the module is too narrow.
    """
    if pair.rank > min(pair.widths):
        raise UsageError(
            f"--rule {rule} needs orthonormal factors; {name} is too narrow for rank {pair.rank}.",
            expected=f"--r of at most {min(pair.widths)}",
        )


def _around_nothing(a: torch.Tensor, b: torch.Tensor, scale: float) -> Pair:
    core = torch.zeros(len(a), len(a))
    return Pair(a.float().contiguous(), b.float().contiguous(), scale, core)
