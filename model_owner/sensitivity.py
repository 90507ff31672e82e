"""Which layers of a trunk are missed most: the loss on public text with each of them left out in turn.

First and last layer of the trunk are always kept, as in uniform layer drop; the others by what their absence costs.
(Leaving out one layer at a time ignores what two of them do together; it costs one pass over the text a layer.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from model_owner.student import Figures, Pair, left_out, measure
from splitfl.cut import Plan
from splitfl.data import Collator, Example
from splitfl.emulator import check_keep
from splitfl.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What each layer's absence costs."""

    full: Figures
    without: dict[int, Figures]
    """Layer number to figures with that layer left out."""

    def harm(self, index: int) -> float:
        """What leaving out layer `index` adds to the loss; infinite where the loss is no number then.

        The language model's loss for a causal model, else the relative error of the trunk's output.
        """
        one = self.without[index]
        harm = one.kd if one.lm is None or self.full.lm is None else one.lm - self.full.lm
        return harm if math.isfinite(harm) else math.inf


def measure_sensitivity(
    model: PreTrainedModel, plan: Plan, examples: Sequence[Example], collator: Collator, *, batch_size: int
) -> Sensitivity:
    """Leave out each trunk layer of `model` in turn and measure on `examples`; the model is as before in the end.

    Args:
        model: whole, frozen, in eval mode.
    """
    pair = Pair(model, plan, {})
    full = measure(pair, examples, collator, batch_size=batch_size)
    without = {}
    for index in plan.trunk_layers:
        pair.student = {index: left_out(pair.full[index], index, plan)}
        without[index] = measure(pair, examples, collator, batch_size=batch_size)
    return Sensitivity(full=full, without=without)


def most_missed(plan: Plan, keep: int, sensitivity: Sensitivity) -> tuple[int, ...]:
    """`keep` layers of the trunk in order: the first, the last, and the most harmful to leave out; ties to the lower.

    Raises:
        UsageError: fewer than 2, or more than there are.
    """
    trunk = plan.trunk_layers
    check_keep(trunk, keep)
    ends = {trunk[0], trunk[-1]}
    if keep < len(ends):
        raise UsageError(
            "Chosen by sensitivity, an emulator always keeps the first and the last layer of the trunk.",
            expected="2 layers or more",
        )
    inner = sorted((i for i in trunk if i not in ends), key=lambda i: (-sensitivity.harm(i), i))
    return tuple(sorted(ends | set(inner[: keep - len(ends)])))
