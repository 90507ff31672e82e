"""The discrete Gaussian: the drawing code against the definition, word by word; the draws against their moments."""

from __future__ import annotations

import decimal
import itertools
import math
import os
import subprocess
import sys
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from splitfl.errors import UsageError
from splitfl.privacy import discrete
from splitfl.privacy.discrete import LARGEST_SIGMA, SMALLEST_SIGMA, Sampler, sampler

DRAWS = 1_000_000
WORDS = 1 << 32
SIGMAS = [SMALLEST_SIGMA, 0.3, 1.0, 17.5, 300.0, pytest.param(LARGEST_SIGMA, marks=pytest.mark.slow)]


def law(sigma: float) -> dict[int, Fraction]:
    """P[X = k] to 60 digits from the definition, for k = 0, 1, ...; 0 where it is below 1e-90."""
    with decimal.localcontext(decimal.Context(prec=100)):
        spread = 2 * Decimal(sigma) ** 2
        weights = [(-Decimal(k * k) / spread).exp() for k in range(math.ceil(21 * sigma) + 2)]
        total = 2 * sum(weights) - 1
        return {k: Fraction(w / total) if w > Decimal("1e-90") else Fraction(0) for k, w in enumerate(weights)}


def words_per_value(drawn: Sampler) -> dict[int, int]:
    """How many of all 2**32 words `_choose` turns into each value, found by bisection in every column."""

    def values(words: np.ndarray) -> np.ndarray:
        out = np.empty(len(words), dtype=np.int32)
        drawn._choose(words.astype(np.uint32), out)
        return out

    width = 1 << int(drawn._shift)
    start = np.arange(0, WORDS, width, dtype=np.int64)
    first, last = values(start), values(start + width - 1)
    stays, moves = start - 1, start + width - 1  # the last word known to give `first`, one known to give `last`
    while (moves - stays > 1).any():
        middle = (stays + moves) // 2
        moved = values(np.maximum(middle, start)) == last
        moves, stays = np.where(moved & (middle >= start), middle, moves), np.where(moved, stays, middle)
    # A column is a step: any word below the edge gives `first`, any from it on gives `last`.
    inside = start + (np.random.default_rng(0).random((20, len(start))) * width).astype(np.int64)
    for words in inside:
        assert (values(words) == np.where(words < moves, first, last)).all()
    counts: dict[int, int] = {}
    for value, count in itertools.chain(
        zip(first, moves - start, strict=True), zip(last, start + width - moves, strict=True)
    ):
        counts[int(value)] = counts.get(int(value), 0) + int(count)
    return {value: count for value, count in counts.items() if count}


@pytest.mark.parametrize("sigma", SIGMAS)
def test_every_word_counted_the_law_is_the_definition_and_nothing_is_rounded(sigma):
    drawn, exact = Sampler(sigma), law(sigma)
    counts = words_per_value(drawn)
    assert sum(counts.values()) == WORDS
    left = counts.pop(max(counts))  # the mark for one of the remainders
    assert left == drawn._remainder.weight
    error = Fraction(0)
    for value, probability in exact.items():
        units = min(math.floor(probability * WORDS), WORDS - 1)  # at sigma 0.001 a hundred digits make it 1
        assert counts.pop(value, 0) == counts.pop(-value, units) == units
        rest = drawn._remainder.mass(value)
        assert rest == drawn._remainder.mass(-value) >= 0
        error += abs(Fraction(units, WORDS) + rest - probability)
        if value < 100 or value % 997 == 0:
            assert drawn.mass(value) == drawn.mass(-value) == Fraction(units, WORDS) + rest
    assert not counts
    # What is left is the precision at which `mass` looks, not that of the draws; see the next test.
    assert error < Fraction(1, 1 << 170)
    assert drawn.distance == 0.0


class Scripted:
    """A stream whose first byte gives the sign and whose other bits are a chosen fraction of 1."""

    def __init__(self, fraction: Fraction, sign: int = 0) -> None:
        self.left = bytes([sign]) + int(fraction * (1 << 2048)).to_bytes(256, "big")
        self.read = 0

    def __call__(self, count: int) -> bytes:
        taken, self.left = self.left[:count], self.left[count:]
        self.read += count
        assert len(taken) == count
        return taken


@pytest.mark.parametrize("sigma", [0.3, 1.0, 17.5])
@pytest.mark.parametrize("bits", [64, 192])
def test_the_remainders_are_inverted_exactly_with_as_many_bits_as_it_takes(sigma, bits):
    exact = law(sigma)
    whole = [units for units in (math.floor(p * WORDS) for p in exact.values()) if units]
    remainder = discrete._Remainder(sigma, whole, bits)
    total = Fraction(WORDS + whole[0] - 2 * sum(whole))
    assert total == remainder.weight
    shares = [(p * WORDS - (whole[k] if k < len(whole) else 0)) * (2 if k else 1) / total for k, p in exact.items()]
    edge = Fraction(0)
    for value, (share, following) in enumerate(itertools.pairwise(shares)):
        edge += share
        for step in (Fraction(1, 1 << 20), Fraction(1, 1 << 60), Fraction(1, 1 << 200)):
            if min(share, following) < 2 * step:
                continue
            streams = [Scripted(edge - step), Scripted(edge + step, sign=1)]
            assert [remainder.pick(stream) for stream in streams] == [value, -value - 1]
            if step < Fraction(1, 1 << bits):
                assert all(stream.read > 1 + bits // 8 for stream in streams), "decided without the bits to know"


def test_words_that_stand_for_a_remainder_are_answered_from_the_remainders(monkeypatch):
    drawn, count = Sampler(17.5), 20_000
    weights = {k: drawn._remainder.mass(k) * WORDS / drawn._remainder.weight for k in range(-200, 201)}
    first = np.arange(len(drawn._jump), dtype=np.int64) << int(drawn._shift)
    words = np.concatenate([first, first + (1 << int(drawn._shift)) - 1]).astype(np.uint32)
    out = np.empty(len(words), dtype=np.int32)
    drawn._choose(words, out)
    word = words[out == drawn._last + 1][0]
    pending = [np.full(count, word, dtype=np.uint32).tobytes()]
    monkeypatch.setattr(discrete, "_keystream", lambda: lambda n: pending.pop() if pending else os.urandom(n))
    chi_square_agrees(drawn.draw(count), {k: float(p) for k, p in weights.items()})


def chi_square_agrees(drawn: np.ndarray, law: dict[int, float]) -> None:
    """Bins of 100 expected values or more; a false alarm has probability below e**-30 (Laurent and Massart 2000)."""
    expected, observed, bins = 0.0, 0, []
    values, counts = np.unique(drawn, return_counts=True)
    seen = dict(zip(values.tolist(), counts.tolist(), strict=True))
    assert abs(sum(law.values()) - 1) < 1e-9
    assert seen.keys() <= law.keys()
    for value in sorted(law):
        expected, observed = expected + law[value] * len(drawn), observed + seen.get(value, 0)
        if expected >= 100:
            bins.append((expected, observed))
            expected, observed = 0.0, 0
    bins[-1] = (bins[-1][0] + expected, bins[-1][1] + observed)
    statistic = sum((seen - meant) ** 2 / meant for meant, seen in bins)
    assert len(bins) >= 2
    assert statistic < len(bins) + 2 * math.sqrt(30 * len(bins)) + 60


@pytest.mark.parametrize("sigma", [0.3, 1.0, 17.5, 300.0])
def test_draws_follow_the_definition(sigma):
    probabilities = {k: float(p) for k, p in law(sigma).items()}
    chi_square_agrees(sampler(sigma).draw(DRAWS), probabilities | {-k: p for k, p in probabilities.items()})


@pytest.mark.parametrize("sigma", [0.3, 1.0, 17.5, 300.0, LARGEST_SIGMA])
def test_draws_have_the_moments_and_tails_of_the_definition(sigma):
    drawn = sampler(sigma).draw(DRAWS).astype(np.float64)
    values = np.arange(-math.ceil(12 * sigma), math.ceil(12 * sigma) + 1, dtype=np.float64)
    weights = np.exp(-(values**2) / (2 * sigma**2))
    variance, fourth = (float((values**power * weights).sum() / weights.sum()) for power in (2, 4))
    # Seven standard errors: one false alarm in 4e11 runs.
    assert abs(drawn.mean()) < 7 * math.sqrt(variance / DRAWS)
    assert abs((drawn**2).mean() - variance) < 7 * math.sqrt((fourth - variance**2) / DRAWS)
    for lag in (1, 2, 4, 1 << 15):
        assert abs((drawn[lag:] * drawn[:-lag]).mean()) < 7 * variance / math.sqrt(DRAWS - lag)
    beyond = float(weights[abs(values) > 3.5 * sigma].sum() / weights.sum()) * DRAWS
    allowed = math.sqrt(60 * beyond) + 40  # Bernstein: below e**-25
    assert abs((abs(drawn) > 3.5 * sigma).sum() - beyond) < allowed


def test_rows_are_independent():
    rows = sampler(50.0).draw_like((256, 4096)).double() / 50
    correlation = (rows @ rows.T / math.sqrt(4096)).fill_diagonal_(0)
    assert correlation.abs().max() < 9  # standard errors, of 32,640 pairs


def test_the_shape_is_kept_and_any_count_can_be_drawn():
    noise = sampler(3.0).draw_like((2, 3, 4))
    assert noise.shape == (2, 3, 4)
    assert noise.dtype == torch.int32
    for count in (0, 1, discrete._CHUNK, discrete._CHUNK + 1):
        drawn = sampler(3.0).draw(count)
        assert drawn.shape == (count,)
        assert drawn.dtype == np.int32
    assert sampler(3.0).draw(2 * discrete._CHUNK + 7)[-7:].any()


def test_no_two_draws_are_the_same_and_no_seed_matters():
    drawn = sampler(50.0)
    seen = set()
    for _ in range(4):
        np.random.seed(0)
        torch.manual_seed(0)
        seen.add(drawn.draw(100).tobytes())
    assert len(seen) == 4
    long = drawn.draw(3 * discrete._CHUNK)
    assert len({part.tobytes() for part in np.split(long, 3)}) == 3


FORKS = """
import os
from splitfl.privacy.discrete import sampler
drawn = sampler(50.0)

def tell():  # one write: the children share the pipe
    os.write(1, drawn.draw(64).tobytes().hex().encode() + b"\\n")

tell()
children = []
for _ in range(2):
    child = os.fork()
    if not child:
        tell()
        os._exit(0)
    children.append(child)
for child in children:
    assert os.waitpid(child, 0)[1] == 0
tell()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_no_stream_repeats_in_forked_processes():
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split()
    assert len(lines) == len(set(lines)) == 4


def test_a_sampler_is_built_once_for_a_sigma():
    assert sampler(123.25) is sampler(123.25)
    assert sampler(123.25) is not sampler(123.5)


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf, SMALLEST_SIGMA / 2, LARGEST_SIGMA * 2])
def test_a_sigma_out_of_range_is_refused(sigma):
    with pytest.raises(UsageError, match="grid"):
        sampler(sigma)


def test_a_negative_count_is_refused():
    with pytest.raises(UsageError, match="-1 values"):
        sampler(1.0).draw(-1)
