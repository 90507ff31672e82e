"""What every rule of combining adapters states about itself and does; a round in the order in which it is called.

    everybody      state = rule.first(template, seed)            once; one makes it, all compare `State.digest`
    each round, and of the round each step of rule.steps(round):
      a party      update = rule.start(state, round, step)       what it loads; `own` and `rank` where these matter
                   ... trains `Step.trains`, or with `Step.does` "gradient" takes the mean gradient of its rows ...
                   vector = rule.vector(state, trained, round, step)
      if rule.by_mean(round):
        the sum    mean = weighted mean of the vectors           plain, masked or encrypted
        everybody  state = rule.from_mean(state, mean, round, step)
      else:
        coordinator  state = rule.from_all(state, [rule.update(state, vector, round, step), ...], weights, round, step)

`combine` does the second half for updates that are all at hand.

A property that a rule lacks is written as the reason why: `needs_all`, `one_rank`, `no_dp`, `no_global` are empty where
there is nothing to say against it, and `check_combination` tells people that reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal, TypeAlias

import numpy as np
import torch

from splitfl.aggregation.factors import Pair, Part, Update
from splitfl.aggregation.peft_format import filled
from splitfl.aggregation.state import State, fresh_pair
from splitfl.aggregation.sums import Vector
from splitfl.errors import InternalError, ModelError, UsageError

Summation: TypeAlias = Literal["plain", "mask", "mask+hidden", "bfv", "ckks"]
_SECURE: tuple[Summation, ...] = ("mask", "mask+hidden", "bfv", "ckks")
_FEWEST_BEHIND_A_SUM = 3
IN_THE_CLEAR = "needs every party's factors in the clear"


@dataclass(frozen=True)
class Step:
    """One sum of a round and what each party does for it."""

    name: str = "train"
    does: Literal["train", "gradient"] = "train"
    """``gradient``: one pass over some rows without a step of the optimiser; sent is the mean gradient."""
    trains: Part = "both"
    """What gets a gradient; the rest is frozen."""
    sends: Part = "both"
    extras: bool = True
    """Whether what is tuned whole is sent too."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How the updates of a round become the next state. Options are the fields of the rule's own class."""

    name: ClassVar[str]
    source: ClassVar[str]
    says: ClassVar[str]
    """What it does, as one sentence."""
    exact: ClassVar[bool] = False
    """The model's change is the weighted mean of the parties' changes, up to rounding."""
    linear: ClassVar[bool] = False
    """The next factors are weighted means of what was sent, with nothing done to them afterwards."""
    same_bits: ClassVar[bool] = False
    """Every machine gets the same bits, as arithmetic goes value by value. Else libraries may differ in the last ones,
    and parties take one party's state after comparing it with their own (`splitfl.aggregation.error.agrees`)."""
    needs_all: ClassVar[str] = ""
    """Why a sum is not enough."""
    one_rank: ClassVar[str] = ""
    """Why all parties need the same rank."""
    no_dp: ClassVar[str] = ""
    """Why noise for differential privacy does not go with it."""
    no_global: ClassVar[str] = ""
    """Why there is no single model at the end."""

    # ---- what happens in a round

    def steps(self, round: int) -> tuple[Step, ...]:
        """The sums of a round, in order."""
        return (Step(),)

    def by_mean(self, round: int) -> bool:
        """Whether this round needs nothing but the weighted mean of the vectors."""
        return not self.needs_all

    def trains(self, round: int) -> Part:
        """What a party trains in this round."""
        return self.steps(round)[-1].trains

    def sends(self, round: int) -> Part:
        """What leaves a party after training."""
        return self.steps(round)[-1].sends

    # ---- a party

    def first(self, template: Update, seed: int) -> State:
        """The state before round 0: nothing is changed yet.

        Args:
            template: an adapter of the federation's modules, rank, scale and head; of factors only shapes count.
            seed: of the factors, public, below 2^63.
        """
        return State(adapter=template.map(lambda name, pair: fresh_pair(pair, seed, name)), seed=seed)

    def start(
        self, state: State, round: int, step: int = 0, *, own: Update | None = None, rank: int | None = None
    ) -> Update:
        """What a party loads before it trains; after the last round, the party's model.

        Args:
            own: what it had after training last time; rules that leave a part at home need it.
            rank: its own, where it is not the federation's.

        Raises:
            UsageError: another rank under a rule that needs one for all.
        """
        if rank is None or state.adapter.ranks <= {rank}:
            return state.adapter
        self._check_rank(state, rank)
        return state.adapter.map(lambda _, pair: self.cut(pair, rank))

    def cut(self, pair: Pair, rank: int) -> Pair:
        """`pair` at a party of a lower rank: its first rows and columns."""
        return Pair(pair.a[:rank].contiguous(), pair.b[:, :rank].contiguous(), pair.scale)

    def vector(self, state: State, trained: Update, round: int, step: int = 0) -> Vector:
        """What a party submits, float32 of `length`.

        Raises:
            UsageError: another rank under a rule that needs one for all.
            ModelError: not this federation's modules, values that are not finite, a gradient at another scale, or a
                factor that training had to leave alone and did not.
        """
        full = self._at_full_rank(state, trained)
        what = self.steps(round)[step]
        if what.does == "train":
            _check_frozen(state.adapter, full, what.trains)
        else:
            check_gradient(state.adapter, full)
        return state.layout.to_vector(full, what.sends, extras=what.extras)

    def length(self, state: State, round: int, step: int = 0) -> int:
        """Values in a vector of this step."""
        what = self.steps(round)[step]
        return state.layout.length(what.sends, extras=what.extras)

    # ---- everybody, or the coordinator

    def update(self, state: State, vector: Vector, round: int, step: int = 0) -> Update:
        """A party's update from its vector, at its own rank: rows that were filled up with zeros are taken off.

        Raises:
            WireError: of another length, or values that are not finite.
        """
        what = self.steps(round)[step]
        full = state.layout.from_vector(vector, what.sends, onto=state.adapter, extras=what.extras)
        return full.map(lambda _, pair: _unfilled(pair)) if what.sends == "both" else full

    def from_mean(self, state: State, mean: Vector, round: int, step: int = 0) -> State:
        """The next state from the weighted mean of the vectors; deterministic.

        Raises:
            WireError: of another length, or values that are not finite.
        """
        if not self.by_mean(round):
            raise InternalError(f"The rule {self.name} {self.needs_all}; a mean is not enough.")
        what = self.steps(round)[step]
        return replace(
            state, adapter=state.layout.from_vector(mean, what.sends, onto=state.adapter, extras=what.extras)
        )

    def from_all(
        self, state: State, updates: Sequence[Update], weights: Sequence[float], round: int, step: int = 0
    ) -> State:
        """The next state from all updates of the round.

        Args:
            weights: one for each, positive; only their ratios count.
        """
        raise InternalError(f"The rule {self.name} works from the mean alone.")

    # ---- the pieces

    def _check_rank(self, state: State, rank: int) -> None:
        highest = max(state.adapter.ranks, default=rank)
        if self.one_rank and rank != highest:
            raise UsageError(
                f"A party has rank {rank} in a federation of rank {highest} under --rule {self.name}: {self.one_rank}.",
                hint=f"tune with --r {highest}, or choose a rule for mixed ranks, such as flexlora or rbla",
            )
        if not 1 <= rank <= highest:
            raise UsageError(
                f"A party has rank {rank}; the federation's rank is {highest}.",
                expected=f"1 to {highest}",
                hint=f"tune with a lower --r, or begin the federation with --r {rank}",
            )

    def _at_full_rank(self, state: State, update: Update) -> Update:
        """`update` with its ranks filled up to those of the state."""
        if update.pairs.keys() != state.adapter.pairs.keys():
            return update  # the layout says what is wrong

        def fill(name: str, pair: Pair) -> Pair:
            full = state.adapter.pairs[name].rank
            if pair.rank != full:
                self._check_rank(state, pair.rank)
            return filled(pair, full)

        return update.map(fill)


def combine(
    rule: Rule, state: State, trained: Sequence[Update], weights: Sequence[float], round: int, step: int = 0
) -> State:
    """One step of a round where all updates are at hand: what parties, sum and coordinator do together."""
    vectors = [rule.vector(state, update, round, step) for update in trained]
    if rule.by_mean(round):
        return rule.from_mean(state, mean_vector(vectors, weights), round, step)
    updates = [rule.update(state, vector, round, step) for vector in vectors]
    return rule.from_all(state, updates, weights, round, step)


def shares(weights: Sequence[float]) -> list[float]:
    """Weights divided by their sum.

    Raises:
        UsageError: none, or one that is not a positive number.
    """
    if not weights or not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise UsageError("The weights of the parties cannot be used.", expected="one positive number for each party")
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def mean_vector(vectors: Sequence[Vector], weights: Sequence[float]) -> Vector:
    """Weighted mean, added in float64 and rounded once."""
    total = np.zeros(vectors[0].shape, dtype=np.float64)
    for vector, share in zip(vectors, shares(weights), strict=True):
        total += share * vector.astype(np.float64)
    return total.astype(np.float32)


def mean_extras(updates: Sequence[Update], weights: Sequence[float]) -> dict[str, torch.Tensor]:
    """Weighted means of what is tuned whole."""
    return {name: mean_tensor([update.extras[name] for update in updates], weights) for name in updates[0].extras}


def mean_tensor(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Weighted mean, added in float64 and rounded once."""
    total = torch.zeros(tensors[0].shape, dtype=torch.float64)
    for tensor, share in zip(tensors, shares(weights), strict=True):
        total += share * tensor.double()
    return total.float()


def with_options(rule: Rule, options: Mapping[str, float | int | str]) -> Rule:
    """`rule` with other options.

    Raises:
        UsageError: it has no such option, or not such a value.
    """
    own = {field.name: type(getattr(rule, field.name)) for field in fields(rule)}
    for name, value in options.items():
        if name not in own or not isinstance(value, own[name] | int if own[name] is float else own[name]):
            listed = ", ".join(f"{option} ({kind.__name__})" for option, kind in own.items()) or "it has none"
            raise UsageError(f"--rule {rule.name} cannot take the option {name}={value}.", expected=listed)
    return replace(rule, **options)


def check_combination(
    rule: Rule,
    summation: Summation,
    *,
    dp: bool = False,
    ranks: Sequence[int] = (),
    parties: int | None = None,
    one_model: bool = False,
) -> None:
    """Refuse what would be wrong or would not protect what it seems to.

    Args:
        dp: whether noise for differential privacy is added to what is sent.
        ranks: of the parties, as far as they are known.
        parties: how many there will be, if it is known.
        one_model: whether one model for all is asked for at the end.

    Raises:
        UsageError: with the reason.
    """
    if summation in _SECURE and rule.needs_all:
        raise UsageError(
            f"--rule {rule.name} cannot be used with --sum {summation}: it {rule.needs_all}.",
            hint="choose --rule rolora, or --sum plain if the coordinator may see every update",
        )
    if len(set(ranks)) > 1 and rule.one_rank:
        raise UsageError(
            f"--rule {rule.name} cannot combine ranks {', '.join(map(str, sorted(set(ranks))))}: {rule.one_rank}.",
            hint="one --r for all, or --rule flexlora, or --rule rbla where the sum is protected",
        )
    if dp and rule.no_dp:
        raise UsageError(
            f"--rule {rule.name} does not go with differential privacy: {rule.no_dp}.",
            hint="choose --rule ffa or --rule rolora, which add noise to one factor a round",
        )
    if one_model and rule.no_global:
        raise UsageError(
            f"--rule {rule.name} ends without one model for all: {rule.no_global}.",
            hint="evaluate each party's own model, or choose --rule rolora",
        )
    if parties is not None and parties < _FEWEST_BEHIND_A_SUM and summation in _SECURE and not dp:
        raise UsageError(
            f"--sum {summation} protects nothing between {parties} parties: the sum less one's own is the other's.",
            expected=f"{_FEWEST_BEHIND_A_SUM} parties or more, or differential privacy",
        )


def _check_frozen(shared: Update, trained: Update, part: Part) -> None:
    """The factors that training had to leave alone are those of the state."""
    for name, pair in trained.pairs.items():
        ours = shared.pairs.get(name)
        if ours is None:
            return  # the layout says so
        fixed = []
        if part in ("B", "core"):
            fixed.append(("A", ours.a, pair.a))
        if part in ("A", "core"):
            fixed.append(("B", ours.b, pair.b if part == "core" else pair.at_scale(ours.scale).b))
        for factor, own, given in fixed:
            if own.shape == given.shape and not _equal(own, given, exactly=pair.scale == ours.scale):
                raise ModelError(
                    f"Factor {factor} of {name} is frozen in this round, and is not that of the federation's state.",
                    expected="the same bits at every party; else the mean of the other factor belongs to no model",
                    hint="load the state of this round again, and train nothing but what the rule says",
                )


def check_gradient(shared: Update, gradient: Update) -> None:
    """A gradient is taken at the state's scale: brought to another it would be off by the square of the ratio."""
    for name, pair in gradient.pairs.items():
        if name in shared.pairs and pair.scale != shared.pairs[name].scale:
            raise ModelError(
                f"The gradient of {name} was taken at another scale than the federation's.",
                expected=f"alpha/r = {shared.pairs[name].scale:g}",
                hint="tune with the federation's --lora-alpha and --r",
            )


def _equal(own: torch.Tensor, given: torch.Tensor, *, exactly: bool) -> bool:
    return torch.equal(own, given) if exactly else torch.allclose(own, given, rtol=1e-5, atol=1e-8)


def _unfilled(pair: Pair) -> Pair:
    """Without rows at the end that are zero in both factors."""
    used = (pair.a.any(dim=1) | pair.b.any(dim=0)).nonzero()
    rank = int(used[-1]) + 1 if used.numel() else 1
    if rank == pair.rank:
        return pair
    return Pair(pair.a[:rank].contiguous(), pair.b[:, :rank].contiguous(), pair.scale)
