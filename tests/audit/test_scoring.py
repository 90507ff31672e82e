"""Scores: known values by hand, intervals by record, and what blind guessing is worth."""

from __future__ import annotations

import random

import pytest
import torch

from splitfl.audit.baselines import by_frequency
from splitfl.audit.intervals import curve, difference, share
from splitfl.audit.overlap import bag_f1, bleu, longest_common, rouge_l
from splitfl.audit.scoring import BLIND, Truth, main_name, score
from splitfl.audit.truth import TrueRow
from splitfl.audit.view import Guesses
from splitfl.audit.words import mark
from splitfl.demo import assets
from splitfl.kit import load_tokenizer


def row(number, ids, *, of=None, labels=None, special=(), dataset="train"):
    marks = torch.zeros(len(ids), dtype=torch.bool)
    marks[list(special)] = True
    return TrueRow(
        number=number, dataset=dataset, row=number if of is None else of, ids=torch.tensor(ids),
        labels=torch.tensor(ids) if labels is None else labels, special=marks,
    )  # fmt: skip


# ---- overlap


def test_overlaps_are_those_of_the_libraries_for_text():
    # Figures of rouge-score 0.1.2 and sacrebleu 2.6.0 (no tokenizer, effective order) on the same numbers as words.
    one, other = [1, 2, 3, 4, 5, 6], [1, 2, 4, 3, 5, 6, 7]
    assert longest_common(one, other) == 5
    assert rouge_l(one, other) == pytest.approx(2 * 5 / 13)
    assert bag_f1(one, other) == pytest.approx(12 / 13)
    assert bleu(one, other) == pytest.approx(0.21506254256566315)
    assert bleu(one, one) == pytest.approx(1.0)
    assert bleu([1, 2], [1, 2]) == pytest.approx(1.0)
    assert bleu([9, 9], [1, 2]) == bag_f1([], [1]) == rouge_l([9], []) == 0.0


def test_the_longest_common_subsequence_is_that_of_the_table():
    generator = random.Random(0)
    for _ in range(200):
        one, other = ([generator.randrange(4) for _ in range(generator.randrange(9))] for _ in range(2))
        table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
        for i, a in enumerate(one):
            for j, b in enumerate(other):
                table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
        assert longest_common(one, other) == table[-1][-1]


# ---- intervals


def test_sends_of_one_row_are_one_record():
    got, of = [1.0] * 8 + [0.0] * 8, [1.0] * 16
    apart = share(got, of, list(range(16)))
    together = share(got, of, [n // 4 for n in range(16)])
    assert (apart.value, apart.records) == (0.5, 16)
    assert (together.value, together.records) == (0.5, 4)
    assert together.high - together.low > apart.high - apart.low > 0


def test_an_interval_covers_what_it_is_about():
    generator, covered = random.Random(1), 0
    for trial in range(200):
        got = [float(generator.random() < 0.3) for _ in range(80)]
        found = share(got, [1.0] * 80, list(range(80)), seed=trial)
        covered += found.low <= 0.3 <= found.high
    assert 180 <= covered <= 199


def test_where_every_record_is_alike_the_bound_is_the_exact_one():
    everything = share([3.0] * 10, [3.0] * 10, list(range(10)))
    assert (everything.value, everything.high) == (1.0, 1.0)
    assert everything.low == pytest.approx(0.025**0.1)
    nothing = share([0.0] * 10, [3.0] * 10, list(range(10)))
    assert (nothing.low, nothing.high) == (0.0, pytest.approx(1 - 0.025**0.1))
    assert share([0.0], [0.0], ["a"]) is None


def test_a_difference_is_drawn_in_pairs():
    generator = random.Random(2)
    base = [generator.random() for _ in range(50)]
    found = difference([b + 0.1 for b in base], base, [1.0] * 50, list(range(50)))
    assert found.value == pytest.approx(0.1)
    assert found.high - found.low < 1e-9


def test_the_curve_by_hand():
    scores, member = [5, 4, 3, 2, 1, 1], [True, True, False, True, False, True]
    found = curve(scores, member, list(range(6)), at=(0.0, 0.5))
    pairs = [(s > o) + 0.5 * (s == o) for s, m in zip(scores, member, strict=True) if m
             for o, n in zip(scores, member, strict=True) if not n]  # fmt: skip
    assert found.auc.value == pytest.approx(sum(pairs) / len(pairs))
    assert found.tpr[0.0].value == 0.5  # above both others
    assert found.tpr[0.5].value == 0.75
    assert curve([1.0, 2.0], [True, True], [0, 1]) is None


# ---- guesses against the truth


def test_tokens_special_ones_apart():
    truth = Truth(rows=(row(0, [1, 7, 8, 9, 2], special=(0, 4)), row(1, [1, 5, 6, 2], special=(0, 3))))
    figures = score(Guesses(tokens={0: torch.tensor([3, 7, 8, 9, 3]), 1: torch.tensor([1, 5, -1])}), truth, "tokens")
    assert figures["token recovery"].value == pytest.approx(4 / 5)
    assert figures["exact sequences"].value == 0.5
    assert figures["bag F1"].value == pytest.approx((1 + 2 / 3) / 2)
    assert figures["ROUGE-L"].value == pytest.approx((1 + 2 / 3) / 2)


def test_silence_is_not_found():
    figures = score(Guesses(), Truth(rows=(row(0, [4, 5, 6]), row(1, [4, 5, 7]))), "tokens")
    assert figures["token recovery"].value == figures["exact sequences"].value == 0.0
    assert figures[BLIND].value < 0  # others' tokens at the same places are worth more than silence


def test_a_permutation_has_the_bag_and_not_the_places():
    truth = Truth(rows=(row(0, [4, 5, 6, 7]),))
    figures = score(Guesses(tokens={0: torch.tensor([7, 4, 5, 6])}), truth, "tokens")
    assert figures["bag F1"].value == 1.0
    assert figures["token recovery"].value == 0.0


def test_a_blind_guess_does_not_look_at_its_own_row():
    rows = [row(0, [4, 5, 9]), row(1, [4, 6]), row(2, [4, 6])]
    guess = by_frequency(rows)
    assert guess[0].tolist() == [4, 6, 4]  # at the third place nobody else has anything: the usual token
    assert guess[1].tolist()[0] == 4
    assert guess[1].tolist()[1] in (5, 6)


def test_another_send_of_the_row_is_no_other_row():
    guess = by_frequency([row(0, [8, 8], of=0), row(1, [8, 8], of=0), row(2, [5, 6], of=1)])
    assert guess[0].tolist() == [5, 6]


def test_answers_their_places_and_rare_tokens():
    labels = torch.tensor([-100, -100, 5, 5, 5, 6])
    truth = Truth(rows=(row(0, [1, 2, 5, 5, 5, 6], labels=labels),))
    figures = score(Guesses(answers={0: torch.tensor([-100, -1, 5, 5, 5, -1])}), truth, "answers")
    assert figures["answer recovery"].value == 0.75
    assert figures["answer recovery, mean over tokens"].value == 0.5
    assert figures["answer places found"].value == 1.0
    assert figures["other places told apart"].value == 0.0
    silent = score(Guesses(), truth, "answers")
    assert silent["answer places found"].value == 0.0


def test_an_attack_on_places_alone_is_ranked_by_places():
    truth = Truth(rows=(row(0, [1, 2, 5, 5], labels=torch.tensor([-100, -100, 5, 5])),))
    figures = score(Guesses(answers={0: torch.tensor([-100, -100, -1, -100])}), truth, "answers")
    assert main_name("answers", figures) == "answer places found"
    assert figures["answer places found"].value == 0.5
    assert figures["other places told apart"].value == 1.0
    assert "answer recovery" not in figures


def test_classes_beyond_the_commonest():
    rows = tuple(row(n, [3], labels=int(n == 0)) for n in range(5))
    always = score(Guesses(classes=dict.fromkeys(range(5), 0)), Truth(rows=rows), "classes")
    assert always["class accuracy"].value == 0.8
    assert always["class accuracy, mean over classes"].value == 0.5
    assert always[BLIND].value == 0.0


def test_members_and_bags():
    rows = (row(0, [3, 4]), row(1, [3, 5]), row(2, [3, 6], dataset="held-out"), row(3, [3], dataset="held-out"))
    figures = score(Guesses(scores={0: 3.0, 1: 1.0, 2: 2.0, 3: 0.0}), Truth(rows=rows), "scores")
    assert figures["AUC"].value == 0.75
    assert figures["TPR at 1.0% FPR"].value == 0.5
    bags = score(Guesses(bags={0: (4, 3), 1: (9,)}), Truth(rows=rows[:2]), "bags")
    assert bags["bag F1"].value == 0.5
    assert bags["tokens in the bag"].value == 0.5


# ---- words


def test_content_words_and_entities_are_found_in_text():
    tokenizer = load_tokenizer(assets() / "model")
    text = "The patient, Dr. Anna Smith of Berlin, paid 120 on 12/05/2024."
    ids = torch.tensor(tokenizer(text)["input_ids"])
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    marked = mark(ids, special, tokenizer)

    def said(places):
        return [tokenizer.decode(ids[list(each)]).strip(" ,.") for each in places]

    assert said(marked.entities) == ["Anna Smith", "Berlin", "120", "12/05/2024"]
    assert said(marked.words) == ["patient", "Dr", "Anna", "Smith", "Berlin", "paid"]
    assert marked.ruled
    told = mark(ids, special, tokenizer, ["Anna Smith", "nobody"])
    assert said(told.entities) == ["Anna Smith"]
    assert not told.ruled


def test_a_word_counts_only_whole():
    tokenizer = load_tokenizer(assets() / "model")
    ids = torch.tensor(tokenizer("Hypomyelination.")["input_ids"])
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    one = TrueRow(number=0, dataset="train", row=0, ids=ids, labels=ids, special=special)
    truth = Truth(rows=(one,), marks={("train", 0): mark(ids, special, tokenizer)})
    word = truth.marks["train", 0].words[0]
    assert len(word) > 1
    most = ids.clone()
    most[word[0]] = -1
    assert score(Guesses(tokens={0: ids}), truth, "tokens")["content words"].value == 1.0
    assert score(Guesses(tokens={0: most}), truth, "tokens")["content words"].value == 0.0
