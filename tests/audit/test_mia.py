"""Membership inference: where it must succeed, where DP-SGD bites, and LiRA without the published mistake."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from splitfl.audit.attacks.mia import (
    RowStatistics,
    Shadows,
    confidence,
    figures,
    half_at_random,
    membership,
    offline_lira,
    row_statistics,
    scores_of,
    train_shadows,
)
from splitfl.errors import UsageError
from tests.audit.tuned import embedded, overfitted, private, tiny
from tests.privacy.test_private_sgd import rows_of

ROWS = 80


@pytest.fixture(scope="module")
def corpus():
    """80 rows of one source, half of them members: model, cut, collator, rows, their texts, who is in."""
    base, cut, collator = tiny()
    rows = rows_of([20] * ROWS, seed=5)
    texts = [" ".join(map(str, row["input_ids"])) for row in rows]
    return base, cut, collator, rows, texts, half_at_random(ROWS, seed=1)


def attacked(corpus, model, shadows=None):
    base, _, collator, rows, texts, member = corpus
    before, after = (row_statistics(each, rows, collator) for each in (base, model))
    return membership(after, before, texts, member, shadows=shadows)


def tuned_on(corpus, chosen, seed=0):
    base, cut, collator, rows, *_ = corpus
    return overfitted(base, cut, collator, [rows[at] for at in chosen], epochs=12, seed=seed)


@pytest.mark.slow
def test_the_members_of_an_overfitted_adapter_are_found(corpus):
    found = attacked(corpus, tuned_on(corpus, np.flatnonzero(corpus[-1]).tolist()))
    assert found["base"].auc.value > 0.9, figures(found)
    assert found["base"].auc.low > 0.8
    assert found["base"].tpr[0.01].value > 0.4
    for name in ("loss", "zlib", "min-k", "min-k++"):
        assert found[name].auc.value > 0.6, figures(found)
    assert set(figures(found)[0]) == {"score", "AUC", "TPR at 1.0% FPR", "TPR at 0.1% FPR"}


def test_an_untouched_model_gives_nobody_away(corpus):
    base, _, collator, rows, texts, member = corpus
    before = row_statistics(base, rows, collator)
    found = membership(before, before, texts, member)
    assert found["base"].auc.value == 0.5, "no difference at all: ties count half"
    for name in ("loss", "zlib", "min-k", "min-k++"):
        assert abs(found[name].auc.value - 0.5) < 4 * math.sqrt(1 / (6 * ROWS)) + 0.05


@pytest.mark.slow
def test_shadow_models_find_them_too(corpus):
    _, _, collator, rows, _, member = corpus

    def train(chosen):
        return row_statistics(tuned_on(corpus, chosen, seed=len(chosen) + chosen[0]), rows, collator)

    shadows = train_shadows(train, ROWS, shadows=6)
    assert shadows.inside.sum(0).tolist() == [3] * ROWS, "each row is left out by half"
    found = attacked(corpus, tuned_on(corpus, np.flatnonzero(member).tolist(), seed=99), shadows)
    assert found["lira"].auc.value > 0.9, figures(found)


@pytest.mark.slow
def test_dp_sgd_hides_the_members(corpus):
    base, cut, _, rows, _, member = corpus
    chosen = [rows[at] for at in np.flatnonzero(member)]
    model, epsilon = private(base, cut, chosen, noise=2.0, steps=40)
    assert epsilon < 6
    found = attacked(corpus, model)
    assert found["base"].auc.value < 0.5 + 4 * math.sqrt(1 / (6 * ROWS)), figures(found)


@pytest.mark.slow
def test_the_members_of_an_adapter_of_the_embedded_model_are_found():
    base, cut, collator, rows, texts = embedded(80, max_length=40)
    member = half_at_random(len(rows), seed=3)
    model = overfitted(base, cut, collator, [rows[at] for at in np.flatnonzero(member)], epochs=6, rate=5e-3)
    before, after = (row_statistics(each, rows, collator) for each in (base, model))
    found = membership(after, before, texts, member)
    assert found["loss"].auc.low > 0.8, figures(found)
    assert found["base"].auc.low > 0.55, "weaker here: a row learnt by heart has a loss near 0, whatever it began with"


# ---- the parts


def test_statistics_are_those_of_the_tokens_that_count(corpus):
    base, _, collator, *_ = corpus
    rows = rows_of((9, 4, 12), seed=2)
    together, alone = row_statistics(base, rows, collator), [row_statistics(base, [r], collator)[0] for r in rows]
    for row, one, other in zip(rows, together, alone, strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4), "padding and neighbours change nothing"
        logs = torch.log_softmax(base(input_ids=torch.tensor([row["input_ids"]])).logits[0].double(), dim=-1)
        places = [at for at, label in enumerate(row["labels"]) if label != -100]
        assert one.log_probs == pytest.approx([float(logs[at - 1, row["labels"][at]]) for at in places], abs=1e-4)
        expected = [float((logs[at - 1].exp() * logs[at - 1]).sum()) for at in places]
        assert one.means == pytest.approx(expected, abs=1e-4)
        drawn = [float(torch.sqrt((logs[at - 1].exp() * (logs[at - 1] - e) ** 2).sum())) for at, e in
                 zip(places, expected, strict=True)]  # fmt: skip
        assert one.deviations == pytest.approx(drawn, abs=1e-4)


def test_the_scores_are_their_formulas():
    row = RowStatistics(
        log_probs=np.array([-1.0, -5.0, -2.0, -3.0, -0.5]), means=np.full(5, -2.0), deviations=np.full(5, 2.0)
    )
    before = RowStatistics(log_probs=np.full(5, -4.0), means=np.zeros(5), deviations=np.ones(5))
    scores = scores_of([row], [before], ["a" * 100])
    assert scores["loss"][0] == pytest.approx(-2.3)
    assert scores["base"][0] == pytest.approx(1.7)
    assert scores["min-k"][0] == pytest.approx(-5.0)
    assert scores["min-k++"][0] == pytest.approx(-1.5)
    assert -1.0 < scores["zlib"][0] < -0.7, "11.5 nats over the bytes that a hundred a's take"
    assert confidence([row])[0] == pytest.approx(math.log(math.exp(-2.3) / (1 - math.exp(-2.3))))


def test_lira_never_looks_at_the_models_that_have_the_row():
    """Published mistake 15: the fixed deviation was that of the models trained *with* it."""
    generator = np.random.default_rng(0)
    inside = np.stack([half_at_random(200, seed=number) for number in range(8)])
    inside = np.concatenate([inside, ~inside])
    confidences = generator.normal(size=inside.shape)
    target = generator.normal(size=200)
    for fixed in (True, False):
        first = offline_lira(target, Shadows(confidences=confidences, inside=inside), fixed_variance=fixed)
        others = np.where(inside, 50 * generator.normal(size=inside.shape) + 9, confidences)
        second = offline_lira(target, Shadows(confidences=others, inside=inside), fixed_variance=fixed)
        assert first == pytest.approx(second)
    fixed_score = offline_lira(target, Shadows(confidences=confidences, inside=inside))
    assert 0.9 < float(np.std(fixed_score)) < 1.2, "deviations of the models without the row: about 1 for a stranger"


def test_halves_are_random_and_repeatable():
    one, same, other = (half_at_random(101, seed=seed) for seed in (4, 4, 5))
    assert one.sum() == 50
    assert (one == same).all()
    assert (one != other).any()


def test_rows_that_do_not_correspond_are_refused(corpus):
    base, _, collator, rows, texts, member = corpus
    said = row_statistics(base, rows[:4], collator)
    with pytest.raises(UsageError, match="do not correspond"):
        membership(said, said[:3], texts[:4], member[:4])
    with pytest.raises(UsageError, match="all members, or none"):
        membership(said, said, texts[:4], np.ones(4, dtype=bool))
    with pytest.raises(UsageError, match="halved"):
        train_shadows(lambda chosen: said, 4, shadows=3)
