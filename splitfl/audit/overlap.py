"""How alike two rows of token ids are, without regard to places or with only their order.

On ids, so that no tokenizer of a metric stands in between; the libraries for text (rouge-score, sacrebleu) give the
same figures where each id is a word.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

LONGEST_GRAM = 4


def bag_f1(guess: Sequence[int], truth: Sequence[int]) -> float:
    """F1 of the two as bags: how often a token occurs counts, where it stands does not. 0 where either is empty."""
    if not guess or not truth:
        return 0.0
    shared = (Counter(guess) & Counter(truth)).total()
    return 2 * shared / (len(guess) + len(truth))


def longest_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the longest common subsequence.

    One bit for each place of `one`, a whole column at a time (Hyyrö, "Bit-parallel LCS-length computation", 2004).
    """
    places: dict[int, int] = {}
    for at, token in enumerate(one):
        places[token] = places.get(token, 0) | 1 << at
    everything = (1 << len(one)) - 1
    column = everything
    for token in other:
        hit = column & places.get(token, 0)
        column = ((column + hit) | (column - hit)) & everything
    return len(one) - column.bit_count()


def rouge_l(guess: Sequence[int], truth: Sequence[int]) -> float:
    """ROUGE-L, F1 (Lin 2004, section 3.1, with recall and precision weighing the same). 0 where either is empty."""
    common = longest_common(guess, truth)
    return 2 * common / (len(guess) + len(truth)) if common else 0.0


def bleu(guess: Sequence[int], truth: Sequence[int]) -> float:
    """BLEU-4 of one row against one reference (Papineni et al. 2002), 0 to 1.

    A row shorter than four tokens is measured by the grams that it can have. A kind of gram without any hit counts half
    a hit, halved again for each such kind (the "exp" smoothing of Chen and Cherry 2014): else nearly every row is 0.
    """
    if not guess or not truth:
        return 0.0
    logs: list[float] = []
    halves = 1
    for n in range(1, LONGEST_GRAM + 1):
        said = Counter(zip(*(guess[at:] for at in range(n)), strict=False))
        if not said:
            break
        right = (said & Counter(zip(*(truth[at:] for at in range(n)), strict=False))).total()
        if not right:
            if n == 1:
                return 0.0
            halves *= 2
        logs.append(math.log((right or 1 / halves) / said.total()))
    shortness = min(0.0, 1 - len(truth) / len(guess))
    return math.exp(shortness + sum(logs) / len(logs))
