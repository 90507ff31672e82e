"""Canaries: an overfitted adapter gives them back, one tuned with DP-SGD does not, and the yardstick is right."""

from __future__ import annotations

import json
import math

import pytest
import torch

from splitfl.audit import canaries
from splitfl.audit.attacks.canary import chance_exposure, continue_greedily, exposure, extract, secret_log_probs
from splitfl.audit.canaries import Canary, identity_canaries, insert, random_canaries, read_canaries, sampled_canaries
from splitfl.data import load_rows
from splitfl.errors import DataError, UsageError
from splitfl.kit import write_kit
from tests.audit.tuned import MODEL, overfitted, private, tiny
from tests.families import VOCAB
from tests.small_tokenizers import bpe

ROWS, PREFIX, SECRET = 40, 10, 6


def drawn(count, length, seed):
    return torch.randint(3, VOCAB, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def setting():
    base, cut, collator = tiny()
    secrets = drawn(ROWS, PREFIX + SECRET, 7)
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids} for ids in secrets]
    return base, cut, collator, secrets, rows, drawn(63, SECRET, 8)


@pytest.fixture(scope="module")
def learnt(setting):
    base, cut, collator, _, rows, _ = setting
    return overfitted(base, cut, collator, rows, epochs=60, r=16)


def exposures(model, setting, count=20):
    _, _, _, secrets, _, others = setting
    return [exposure(model, ids[:PREFIX], ids[PREFIX:], others) for ids in secrets[:count]]


@pytest.mark.slow
def test_an_overfitted_adapter_exposes_its_canaries_and_gives_them_back(setting, learnt):
    found = exposures(learnt, setting)
    assert sum(found) / len(found) > 5.0, "of the 6 bits that 64 candidates allow"
    (only,) = extract(learnt, setting[3], prefixes=(PREFIX, 400), length=SECRET)
    assert only.prefix == PREFIX
    assert only.rows == ROWS
    assert only.exact.value > 0.5
    assert only.bleu.value >= only.exact.value


def test_a_model_that_never_saw_them_ranks_them_by_chance(setting):
    found = exposures(setting[0], setting, count=ROWS)
    spread = 1.35 / math.sqrt(ROWS)  # deviation of -log2 of an even share: 1 / ln 2, a little less with 64 ranks
    assert abs(sum(found) / len(found) - chance_exposure(64)) < 4 * spread
    (only,) = extract(setting[0], setting[3], prefixes=(PREFIX,), length=SECRET)
    assert only.exact.value == 0
    assert only.exact.high < 0.1


@pytest.mark.slow
def test_dp_sgd_hides_them(setting):
    base, cut, _, secrets, rows, _ = setting
    model, epsilon = private(base, cut, rows, noise=2.0, steps=40)
    assert epsilon < 8
    found = exposures(model, setting, count=ROWS)
    assert sum(found) / len(found) < chance_exposure(64) + 1.0
    (only,) = extract(model, secrets, prefixes=(PREFIX,), length=SECRET)
    assert only.exact.value == 0


def test_log_probabilities_do_not_depend_on_the_secrets_beside_them(setting):
    base, _, _, secrets, *_ = setting
    ids = secrets[0]
    mixed = secret_log_probs(base, ids[:4], [ids[4:7], ids[4:16], [5]])
    for secret, value in zip(([*ids[4:7]], [*ids[4:16]], [5]), mixed, strict=True):
        logs = torch.log_softmax(base(input_ids=torch.tensor([[*ids[:4], *secret]])).logits[0].double(), -1)
        assert value == pytest.approx(sum(float(logs[3 + at, token]) for at, token in enumerate(secret)), abs=1e-3)
    with pytest.raises(UsageError, match="cannot be ranked"):
        secret_log_probs(base, [], [[1]])


def test_greedy_continuations_are_those_without_a_cache(setting):
    base, _, _, secrets, *_ = setting
    (found,) = continue_greedily(base, [secrets[0][:5]], 4)
    ids = secrets[0][:5]
    for token in found:
        assert token == int(base(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        ids = [*ids, token]


# ---- making them


def test_random_canaries_are_of_usable_tokens_and_repeatable():
    tokenizer = bpe()
    one, same = (random_canaries(tokenizer, 5, length=12, seed=3) for _ in range(2))
    assert one == same
    assert len({each.text for each in one}) == 5
    assert not any(special in each.text for each in one for special in tokenizer.all_special_tokens)


def test_sampled_canaries_come_from_the_model(setting):
    class Certain(torch.nn.Module):
        """Writes every fifth token."""

        def forward(self, input_ids, use_cache):
            logits = torch.full((*input_ids.shape, 400), -1e9)
            logits.scatter_(2, ((input_ids + 5) % 400)[..., None], 0.0)
            return type("Output", (), {"logits": logits})

    tokenizer = bpe()
    assert tokenizer.bos_token_id is not None
    (made,) = {each.text for each in sampled_canaries(Certain(), tokenizer, 3, length=6)}
    assert made == "".join(tokenizer.decode([tokenizer.bos_token_id + 5 * at]) for at in range(1, 7))
    hot = sampled_canaries(setting[0], _Small(tokenizer), 4, length=8, temperature=3.0, seed=1)
    assert len({each.text for each in hot}) == 4


class _Small:
    """A tokenizer that has no more tokens than the tiny model."""

    def __init__(self, real):
        self._real = real
        self.bos_token_id, self.all_special_ids = real.bos_token_id, real.all_special_ids

    def __len__(self):
        return VOCAB

    def decode(self, ids):
        return self._real.decode(ids)


@pytest.mark.parametrize(
    "row",
    [
        {"text": "a"}, {"prompt": "a", "completion": "b"}, {"instruction": "a", "output": "b"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ],
    ids=lambda row: "-".join(row),
)  # fmt: skip
def test_a_canary_takes_the_form_of_the_rows(row, tmp_path):
    made = [Canary(kind="random", prefix="the code is ", secret="x9 q2", included=at == 0, repeats=3) for at in (0, 1)]
    marked = insert([row, row], made)
    assert len(marked) == 5, "three times the one that is in, and not the other"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in marked), encoding="utf-8")
    assert len(load_rows(tmp_path / "rows.jsonl", task="causal-lm")) == 5
    assert sum("x9 q2" in json.dumps(each) for each in marked) == 3


def test_rows_that_no_canary_fits_are_refused():
    with pytest.raises(DataError, match="no form"):
        insert([{"text_a": "a"}], [])


def test_the_command_marks_rows_and_keeps_what_it_put_in(tmp_path, capsys):
    write_kit(MODEL, tmp_path / "kit", bottom=2, top=2, dtype="float32")
    people = [dict.fromkeys(("name", "street", "zip", "city", "phone", "email"), f"p{at}") for at in range(9)]
    (tmp_path / "people.jsonl").write_text("\n".join(map(json.dumps, people)), encoding="utf-8")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 4, encoding="utf-8")
    words = [
        str(rows),
        "--kit",
        str(tmp_path / "kit"),
        "--out",
        str(tmp_path / "out"),
        "--random",
        "12",
        "--repeats",
        "2",
    ]
    words += ["--identities", str(tmp_path / "people.jsonl"), "--persons", "6"]
    assert canaries.main(words) == 0
    kept = read_canaries(tmp_path / "out" / "canaries.jsonl")
    inside = [each for each in kept if each.included]
    assert len(kept) == 18
    assert 2 < len(inside) < 16
    assert len(load_rows(tmp_path / "out" / "rows.jsonl", task="causal-lm")) == 4 + 2 * len(inside)
    assert "18 canaries" in capsys.readouterr().out
    missing = [*words[:-3], str(tmp_path / "absent.jsonl"), *words[-2:]]
    assert canaries.main(missing) == 0, "where the file is absent, they are skipped"
    assert canaries.main([*words, "--sampled", "2"]) == 2
    assert "error:" in capsys.readouterr().err


def test_persons_that_are_none_are_refused_without_being_shown(tmp_path):
    file = tmp_path / "people.jsonl"
    file.write_text('{"name": "Ada Secret"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="line 1 is no person") as caught:
        identity_canaries(file, 1)
    assert "Ada" not in str(caught.value)
    with pytest.raises(DataError, match="2 were asked for"):
        identity_canaries(file, 2)
