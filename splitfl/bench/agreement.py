"""Whether the split computed the same as the monolith. A speed of something else is not printed.

Bounds are those of rounding: the two sides run the same kernels on the same shapes, so the differences are usually 0;
where a library splits a sum differently over threads they are a few units in the last place, grown through the layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# dtype of the computation -> largest difference of a loss relative to it, and of a logit in standard deviations.
LOSS_BOUND = {"float32": 1e-4, "bfloat16": 1e-3, "float16": 1e-3}
LOGIT_BOUND = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.1}

Tokens = Sequence[Sequence[int]]
Logits = npt.NDArray[np.float32]


class Disagreement(Exception):
    """The two sides did not compute the same; carries the figure that shows it."""

    def __init__(self, metric: str, value: float, bound: float, why: str) -> None:
        super().__init__(why)
        self.metric, self.value, self.bound = metric, value, bound


@dataclass(frozen=True, kw_only=True)
class SameText:
    """Two generations, compared."""

    equal: int
    """New tokens that are the same."""
    total: int
    logit_difference: float
    """Largest one before the rows part, in standard deviations of the logits."""


def compare_losses(monolith: Sequence[float], split: Sequence[float], dtype: str) -> float:
    """Largest relative difference between the losses, step by step.

    Raises:
        Disagreement: it is beyond rounding, or the losses moved so little that they would be equal with any gradient.
    """
    whole, cut = np.asarray(monolith), np.asarray(split)
    difference = float(np.max(np.abs(whole - cut) / np.abs(whole)))
    bound = LOSS_BOUND[dtype]
    if not difference <= bound:  # a loss that is not a number disagrees too
        raise Disagreement("loss difference", difference, bound, "the losses of split and monolith differ")
    moved = float(np.ptp(whole) / np.abs(whole[0]))
    if not moved > 2 * bound:
        raise Disagreement("movement of the loss", moved, 2 * bound, "training moved the loss too little to compare")
    return difference


def compare_texts(
    monolith: Tokens, split: Tokens, monolith_logits: Logits, split_logits: Logits, dtype: str
) -> SameText:
    """Compare greedy generations row by row, up to where two nearly equal logits changed places.

    Args:
        monolith: new tokens, [rows][new].
        split: the same from the split.
        monolith_logits: [new, rows, vocabulary].
        split_logits: the same from the split.
        dtype: of the computation.

    Raises:
        Disagreement: logits differ beyond rounding, or a row parts where the logits were not nearly equal.
    """
    bound = LOGIT_BOUND[dtype]
    scale = float(monolith_logits.std())
    largest = 0.0
    for row, (whole, cut) in enumerate(zip(monolith, split, strict=True)):
        same = _common(whole, cut)
        seen = slice(0, same + 1)  # the logits that chose the first differing token came from equal inputs
        difference = np.abs(monolith_logits[seen, row] - split_logits[seen, row]).max() / scale
        largest = max(largest, float(difference))
        if same < len(whole):
            gap = float(monolith_logits[same, row, whole[same]] - monolith_logits[same, row, cut[same]]) / scale
            if not gap <= 2 * bound:
                raise Disagreement("logit difference", gap, 2 * bound, "the generated tokens differ")
    if not largest <= bound:
        raise Disagreement("logit difference", largest, bound, "the logits of split and monolith differ")
    equal = sum(a == b for whole, cut in zip(monolith, split, strict=True) for a, b in zip(whole, cut, strict=True))
    return SameText(equal=equal, total=sum(map(len, monolith)), logit_difference=largest)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of equal tokens at the start."""
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a != b), len(first))
