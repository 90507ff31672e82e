"""`fedlrt`: cores between bases that all share, and bases that grow and shrink with what the gradients ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from splitfl.aggregation.factors import Pair, Part, Update
from splitfl.aggregation.low_rank import orthonormal
from splitfl.aggregation.rule import Rule, Step, check_gradient
from splitfl.aggregation.state import State, fresh_factor
from splitfl.aggregation.sums import Vector
from splitfl.errors import InternalError, ModelError, UsageError, WireError


@dataclass(frozen=True, kw_only=True)
class FeDLRT(Rule):
    """The change is s U S V^T (B = U, core = S, A = V^T) with orthonormal U, V of rank r. A round has two sums:

        basis   G V, G^T U and U^T G V of the weight's gradient G; with their means
                U = basis of [U | G V], V = basis of [V | G^T U], S padded with zeros: rank 2r
        train   S, corrected by (mean gradient - own gradient) of the old block, so that all descend the same loss;
                S = its mean; singular values cut where what is lost is under `tolerance` of the norm of S

    Everything but the last cut is exact. The paper trains the weight itself; here the same is done to its change, which
    begins as zero. It spans by G V S^T instead of G V: the same space where S has an inverse, and still defined where
    it has none. The paper has a full and a simplified variance correction and its text was not at hand; the one here,
    of the old block alone, needs no third sum.

    A party gets the three gradients from one pass with the LoRA adapter that `start` gives for the first step: rank 3r,
    A = [S V^T; V^T; 0], B = [U, 0, U]. The gradient of B's middle third is s G V, that of A's last third s U^T G.
    """

    name = "fedlrt"
    source = "FeDLRT (Schotthoefer and Laiu, 2406.17887); abstract and reviews, the splitting is standard"
    says = "mean of cores in shared bases, which grow by the mean gradient and are cut again"
    one_rank = "the bases are the same at every party"

    tolerance: float = 0.01
    """Part of the norm of S that a cut may lose."""
    max_rank: int = 64

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < 1 or self.max_rank < 1:
            raise UsageError(
                f"tolerance={self.tolerance}, max_rank={self.max_rank} are not allowed.",
                expected="0 <= tolerance < 1 and max_rank >= 1",
            )

    def steps(self, round: int) -> tuple[Step, ...]:
        """A gradient, then the core."""
        return (Step("basis", "gradient", extras=False), Step("train", trains="core", sends="core"))

    def first(self, template: Update, seed: int) -> State:
        """Bases drawn, core zero."""

        def begun(name: str, pair: Pair) -> Pair:
            d_in, d_out = pair.widths
            rank = min(pair.rank, self.max_rank, d_in, d_out)
            a = orthonormal(fresh_factor(seed, name, rank, d_in).T).T
            b = orthonormal(fresh_factor(seed, name, rank, d_out, draw=1).T)
            return Pair(a.float().contiguous(), b.float(), pair.scale, torch.zeros(rank, rank))

        return State(adapter=template.map(begun), seed=seed)

    def start(
        self, state: State, round: int, step: int = 0, *, own: Update | None = None, rank: int | None = None
    ) -> Update:
        """For the first step, the adapter whose gradient holds all three; then the bases with their core."""
        if rank is not None:
            raise UsageError(f"--rule {self.name} chooses the rank itself; a party cannot have its own.")
        return state.adapter.map(_probe) if step == 0 else state.adapter

    def length(self, state: State, round: int, step: int = 0) -> int:
        """Values of the three gradients, or of the core and what is tuned whole."""
        if step:
            return super().length(state, round, step)
        return sum(size for _, size in _gradient_sizes(state))

    def vector(self, state: State, trained: Update, round: int, step: int = 0) -> Vector:
        """For the first step, `trained` holds gradients in the place of factors."""
        if step:
            return super().vector(state, trained, round, step)
        check_gradient(state.adapter, trained)
        parts = []
        for name, pair in sorted(state.adapter.pairs.items()):
            given = trained.pairs.get(name)
            if given is None or given.rank != 3 * pair.rank or given.widths != pair.widths:
                raise ModelError(f"The gradient of {name} is not that of the adapter of this step.")
            parts += [tensor.reshape(-1).numpy() for tensor in _gradients(pair, given)]
        vector = np.concatenate(parts)
        if not np.isfinite(vector).all():
            raise ModelError("The mean gradient holds values that are not finite.", hint="try --dtype float32")
        return vector

    def own_gradient(self, state: State, vector: Vector) -> dict[str, torch.Tensor]:
        """A party's own gradient of the old cores, [r, r], from the vector it sent in the first step."""
        return {name: parts[2] for name, parts in _split(state, vector).items()}

    def correction(self, state: State, own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What to add to every gradient of a core while training: the mean gradient less one's own, in the old block.

        Args:
            state: after the first step.
            own: as `own_gradient` found it before.
        """
        padded = {}
        for name, pair in state.adapter.pairs.items():
            old = state.gradient[name]
            padded[name] = torch.zeros(pair.rank, pair.rank)
            padded[name][: len(old), : len(old)] = old - own[name]
        return padded

    def from_mean(self, state: State, mean: Vector, round: int, step: int = 0) -> State:
        """Grown bases after the first step; mean core and cut bases after the second."""
        if step == 0:
            found = _split(state, mean)
            grown = state.adapter.map(lambda name, pair: _grown(pair, *found[name][:2]))
            return replace(state, adapter=grown, gradient={name: parts[2] for name, parts in found.items()})
        averaged = super().from_mean(state, mean, round, step)
        return replace(averaged, adapter=averaged.adapter.map(self._cut_core), gradient={})

    def _cut_core(self, _: str, pair: Pair) -> Pair:
        u, s, vh = torch.linalg.svd(_core(pair).double())
        lost = torch.sqrt(torch.flip(torch.cumsum(torch.flip(s**2, (0,)), 0), (0,)))  # lost[i]: from i on
        allowed = self.tolerance * lost[0]
        rank = min(max(1, int((lost > allowed).sum())), self.max_rank)
        b, a = pair.b.double() @ u[:, :rank], vh[:rank] @ pair.a.double()
        return Pair(a.float().contiguous(), b.float().contiguous(), pair.scale, torch.diag(s[:rank]).float())

    def sends(self, round: int) -> Part:
        """The core."""
        return "core"


def _probe(_: str, pair: Pair) -> Pair:
    zero_a, zero_b = torch.zeros_like(pair.a), torch.zeros_like(pair.b)
    weighed = (_core(pair).double() @ pair.a.double()).float()
    return Pair(torch.cat([weighed, pair.a, zero_a]), torch.cat([pair.b, zero_b, pair.b], dim=1), pair.scale)


def _gradients(pair: Pair, given: Pair) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """s G V [d_out, r], s U^T G [r, d_in] and s U^T G V [r, r]."""
    r = pair.rank
    right, left = given.b[:, r : 2 * r].contiguous(), given.a[2 * r :]
    return right, left, (left.double() @ pair.a.double().T).float()


def _grown(pair: Pair, right: torch.Tensor, left: torch.Tensor) -> Pair:
    """Bases of twice the rank, or as far as the module is wide; the old columns come first, bit for bit."""
    r, rank = pair.rank, min(2 * pair.rank, *pair.widths)
    u = orthonormal(torch.cat([pair.b, right], dim=1)[:, :rank]).float()
    v = orthonormal(torch.cat([pair.a.T, left.T], dim=1)[:, :rank]).float()
    u[:, :r], v[:, :r] = pair.b, pair.a.T
    core = torch.zeros(rank, rank)
    core[:r, :r] = _core(pair)
    return Pair(v.T.contiguous(), u, pair.scale, core)


def _core(pair: Pair) -> torch.Tensor:
    if pair.core is None:
        raise InternalError("A state of fedlrt has no core.")
    return pair.core


def _gradient_sizes(state: State) -> list[tuple[str, int]]:
    pairs = sorted(state.adapter.pairs.items())
    return [(name, pair.rank * (sum(pair.widths) + pair.rank)) for name, pair in pairs]


def _split(state: State, vector: Vector) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    expected = sum(size for _, size in _gradient_sizes(state))
    if vector.dtype != np.float32 or vector.shape != (expected,) or not np.isfinite(vector).all():
        raise WireError(
            f"A vector of shape {vector.shape} and dtype {vector.dtype} is no finite gradient of this federation.",
            expected=f"({expected},) of float32",
        )
    found, start = {}, 0
    for name, size in _gradient_sizes(state):
        pair = state.adapter.pairs[name]
        (d_in, d_out), r = pair.widths, pair.rank
        whole = torch.from_numpy(vector[start : start + size].copy())
        right, left, inner = whole.split([d_out * r, r * d_in, r * r])
        found[name] = right.reshape(d_out, r), left.reshape(r, d_in), inner.reshape(r, r)
        start += size
    return found
