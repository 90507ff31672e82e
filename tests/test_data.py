"""Tokenising and collating: the loss counts on the answer, on nothing else, and a batch changes no row's loss."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from splitfl.data import IGNORED, Collator, Examples, encode_prompt, load_rows, tokenise
from splitfl.errors import DataError, UsageError
from tests.small_tokenizers import CHATML, DATA, TERSE, bpe

UNHURRIED = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
SECRET = "Zacharias4711"
PLAIN, WITH_BOS, WITH_BOTH = bpe(), bpe(adds_bos=True), bpe(adds_bos=True, adds_eos=True)
CHAT, TRIMS = bpe(CHATML), bpe(TERSE)
BYTES = ByT5Tokenizer()
SHARED = Path(os.environ.get("SPLITFL_SHARED", Path(__file__).parents[2] / "shared"))


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def examples(path: Path, tokenizer: Any, **options: Any) -> Examples:
    rows = load_rows(path, task="causal-lm", columns=options.pop("columns", None))
    return tokenise(rows, tokenizer, **{"max_length": 512} | options)


def learnt(example: dict[str, Any]) -> list[int]:
    return [label for label in example["labels"] if label != IGNORED]


# ---- labels

WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=24).filter(str.strip)


@UNHURRIED
@given(prompt=WORDS, completion=WORDS, tokenizer=st.sampled_from([PLAIN, WITH_BOS, WITH_BOTH, CHAT, TRIMS]))
def test_what_is_learnt_reads_as_the_answer(
    tmp_path_factory: pytest.TempPathFactory, prompt: str, completion: str, tokenizer: Any
) -> None:
    path = lines(tmp_path_factory.getbasetemp() / "rows.jsonl", {"prompt": prompt, "completion": completion})
    [example] = examples(path, tokenizer)
    ids, labels = example["input_ids"], example["labels"]
    assert len(ids) == len(labels) == len(example["attention_mask"])
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    answer = tokenizer.decode(learnt(example))
    if tokenizer.chat_template:
        expected = f"{completion}<|im_end|>\n" if tokenizer is CHAT else f" {completion.strip()}</s>"
        assert answer == expected
        return
    # A token across the border belongs to the answer, so the end of the prompt may come with it.
    assert answer.endswith(f"{completion}</s>")
    assert prompt.endswith(answer.removesuffix(f"{completion}</s>"))
    before = encode_prompt(tokenizer, prompt)
    if ids[: len(before)] == before:
        assert labels == [IGNORED] * len(before) + ids[len(before) :]


@UNHURRIED
@given(prompt=WORDS, completion=WORDS)
def test_a_tokenizer_without_offsets(tmp_path_factory: pytest.TempPathFactory, prompt: str, completion: str) -> None:
    tokenizer = BYTES
    path = lines(tmp_path_factory.getbasetemp() / "rows.jsonl", {"prompt": prompt, "completion": completion})
    [example] = examples(path, tokenizer)
    assert not tokenizer.is_fast
    assert learnt(example) == [byte + 3 for byte in completion.encode()] + [tokenizer.eos_token_id]
    assert encode_prompt(tokenizer, prompt) == example["input_ids"][: len(prompt.encode())]


def test_a_token_across_the_border_belongs_to_the_answer(tmp_path: Path) -> None:
    tokenizer = bpe(adds_eos=True)
    path = lines(tmp_path / "rows.jsonl", {"prompt": "a", "completion": "nd"}, {"prompt": "old a", "completion": "nd"})
    one, two = examples(path, tokenizer)
    assert tokenizer.convert_ids_to_tokens(one["input_ids"]) == ["and", "</s>"]
    assert one["labels"] == one["input_ids"]
    assert tokenizer.decode(learnt(two)) == " and</s>"


@pytest.mark.parametrize("name", ["messages", "prompt_completion", "alpaca", "dolly"])
@pytest.mark.parametrize("tokenizer", [PLAIN, WITH_BOS, WITH_BOTH, CHAT], ids=["plain", "bos", "both", "chat"])
def test_the_prompt_at_generation_is_the_prompt_in_training(name: str, tokenizer: Any) -> None:
    rows = load_rows(DATA / f"{name}.jsonl", task="causal-lm")
    for row, example in zip(rows, tokenise(rows, tokenizer, max_length=512), strict=True):
        prompt = encode_prompt(tokenizer, row.messages[:-1] or row.prompt, form=rows.form)
        ids = example["input_ids"]
        unlearnt = [label == IGNORED for label in example["labels"]]
        last = len(unlearnt) - unlearnt[::-1].index(True)  # where the last answer begins
        assert prompt == ids[:last]


def test_plain_text_counts_whole_and_gets_what_the_tokenizer_adds() -> None:
    for tokenizer in (PLAIN, WITH_BOS, CHAT):
        rows = load_rows(DATA / "text.jsonl", task="causal-lm")
        for row, example in zip(rows, tokenise(rows, tokenizer, max_length=512), strict=True):
            assert example["labels"] == example["input_ids"] == tokenizer(row.text)["input_ids"]
            assert encode_prompt(tokenizer, row.text, form="text") == example["input_ids"]


def test_every_token_counts_when_asked() -> None:
    for example in examples(DATA / "messages.jsonl", CHAT, answer_only=False):
        assert example["labels"] == example["input_ids"]


def test_bos_and_eos_for_a_tokenizer_that_adds_none() -> None:
    [first, *_] = examples(DATA / "prompt_completion.jsonl", PLAIN, bos_token_id=1, eos_token_id=4)
    assert (first["input_ids"][0], first["input_ids"][-1], first["labels"][-1]) == (1, 4, 4)
    assert examples(DATA / "prompt_completion.jsonl", WITH_BOS, bos_token_id=1)[0]["input_ids"].count(1) == 1
    assert examples(DATA / "messages.jsonl", CHAT, bos_token_id=1)[0]["input_ids"].count(1) == 0
    without_eos = bpe()
    without_eos.eos_token = None
    [first, *_] = examples(DATA / "prompt_completion.jsonl", without_eos)
    assert without_eos.decode(learnt(first)) == " In the salt marsh, two miles east of the mill."


def test_counts() -> None:
    found = examples(DATA / "messages.jsonl", CHAT)
    counts = found.counts
    assert (counts.rows, counts.examples, counts.dropped, counts.truncated) == (3, 3, 0, 0)
    assert counts.tokens == sum(len(each["input_ids"]) for each in found)
    assert counts.answer_tokens == sum(len(learnt(each)) for each in found)
    assert str(counts) == f"3 rows (chat template), {counts.tokens} tokens, {counts.answer_tokens} of them answers"
    text = examples(DATA / "text.jsonl", PLAIN)
    assert text.counts.answer_tokens == text.counts.tokens - 2  # the first token of a row is not predicted
    assert repr(text) == "Examples(2 of them)"


# ---- length


@pytest.fixture
def long_rows(tmp_path: Path) -> Path:
    short, long_answer = {"prompt": "a", "completion": "b"}, {"prompt": "p " + SECRET, "completion": "c " * 50}
    return lines(tmp_path / "rows.jsonl", short, long_answer, {"prompt": "p " * 40, "completion": SECRET}, short)


def test_too_long(long_rows: Path) -> None:
    with pytest.raises(DataError) as caught:
        examples(long_rows, PLAIN, max_length=32)
    said = str(caught.value)
    rows = load_rows(long_rows, task="causal-lm")
    lengths = [len(PLAIN(row.prompt + row.completion)["input_ids"]) + 1 for row in rows]
    assert said.startswith(f"{long_rows}:2: the row is {lengths[1]} tokens long, and max_length is 32 (2 of 4 rows")
    assert f"longest has {max(lengths)}" in said
    assert all(word in said for word in ("max_length", "'right'", "'drop'"))
    assert SECRET not in said


def test_truncated_or_dropped(long_rows: Path) -> None:
    whole = examples(long_rows, PLAIN)
    cut = examples(long_rows, PLAIN, max_length=32, truncation="right")
    # The third row would keep no token of its answer.
    assert [len(each["input_ids"]) for each in cut] == [3, 32, 3]
    assert cut[1]["labels"] == whole[1]["labels"][:32]
    assert (cut.counts.truncated, cut.counts.dropped) == (1, 1)
    assert str(cut.counts).endswith("1 rows truncated, 1 rows dropped")
    dropped = examples(long_rows, PLAIN, max_length=32, truncation="drop")
    assert (len(dropped), dropped.counts.truncated, dropped.counts.dropped) == (2, 0, 2)
    with pytest.raises(DataError, match="no row is left"):
        examples(long_rows, PLAIN, max_length=2, truncation="drop")


def test_a_row_without_a_token_to_learn_from(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", {"text": "a b"}, {"text": "a"})
    with pytest.raises(DataError, match=f"{path}:2: the tokenizer leaves nothing"):
        examples(path, PLAIN)
    assert len(examples(path, WITH_BOS)) == 2


@pytest.mark.parametrize("tokenizer", [PLAIN, WITH_BOS], ids=["plain", "bos"])
@pytest.mark.parametrize("max_length", [2, 3, 16, 40])
def test_blocks_of_running_text_predict_every_token_once(tokenizer: Any, max_length: int) -> None:
    rows = load_rows(DATA / "harbour.txt", task="causal-lm")
    found = tokenise(rows, tokenizer, max_length=max_length)
    assert max(len(each["input_ids"]) for each in found) == max_length
    predicted = [token for each in found for token in each["labels"][1:]]
    assert predicted == [token for row in rows for token in tokenizer(row.text)["input_ids"][1:]]
    assert found.counts.answer_tokens == len(predicted)
    assert found.counts.rows == 4
    if tokenizer is WITH_BOS:
        assert {each["input_ids"][0] for each in found} == {1}


def test_a_line_of_one_token_in_a_running_text_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_text("the old mill\n\n*\n\nthe new mill\n", encoding="utf-8")
    assert (len(examples(path, PLAIN)), examples(path, PLAIN).counts.dropped) == (2, 1)
    path.write_text("*\n\n*\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.txt:1: the tokenizer leaves nothing"):
        examples(path, PLAIN)


def test_options_out_of_range() -> None:
    with pytest.raises(UsageError, match="max_length is 1"):
        examples(DATA / "text.jsonl", PLAIN, max_length=1)
    with pytest.raises(UsageError, match="did you mean 'right'"):
        examples(DATA / "text.jsonl", PLAIN, truncation="rigth")
    with pytest.raises(UsageError, match="padding side"):
        Collator(PLAIN, padding_side="top")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="pad_to_multiple_of"):
        Collator(PLAIN, pad_to_multiple_of=0)


# ---- batches


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding(side: Any) -> None:
    rows = examples(DATA / "messages.jsonl", CHAT)
    collator = pickle.loads(pickle.dumps(Collator(CHAT, padding_side=side, pad_to_multiple_of=16)))  # noqa: S301
    batch = collator(rows)
    longest = max(len(each["input_ids"]) for each in rows)
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}
    for name, values in batch.items():
        assert values.dtype == torch.int64
        assert values.shape == (3, -(-longest // 16) * 16)
        filler = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}[name]
        for row, value in zip(rows, values.tolist(), strict=True):
            padding = [filler] * (len(value) - len(row[name]))
            assert value == (row[name] + padding if side == "right" else padding + row[name])


def test_padding_with_eos_leaves_the_answers_own_eos_labelled() -> None:
    tokenizer = bpe()
    tokenizer.pad_token = None
    batch = Collator(tokenizer)(examples(DATA / "prompt_completion.jsonl", tokenizer))
    assert ((batch["labels"] == tokenizer.eos_token_id).sum(1) == 1).all()
    assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.eos_token_id).all()
    assert Collator(tokenizer, pad_token_id=7).pad_token_id == 7
    tokenizer.eos_token = None
    assert Collator(tokenizer).pad_token_id == 0


def tiny(kind: Any = LlamaForCausalLM, **options: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2, **options,
    )  # fmt: skip
    return kind(config).eval()


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_batch_has_the_loss_of_its_rows(side: Any) -> None:
    model, rows = tiny(), examples(DATA / "messages.jsonl", CHAT)
    collator = Collator(CHAT, padding_side=side)
    with torch.no_grad():
        single = [model(**collator([row])).loss * len(learnt(row)) for row in rows]
        positions = (collator(rows)["attention_mask"].cumsum(1) - 1).clamp(min=0)
        together = model(**collator(rows), position_ids=positions).loss
    torch.testing.assert_close(together, sum(single) / sum(len(learnt(row)) for row in rows))


def test_trainer_takes_the_examples_and_the_collator(tmp_path: Path) -> None:
    model, rows = tiny().train(), examples(DATA / "messages.jsonl", CHAT)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=20, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
        save_strategy="no", logging_steps=1, disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model, arguments, data_collator=Collator(CHAT), train_dataset=rows)  # type: ignore[arg-type]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 20
    assert losses[-1] < 0.5 * losses[0]


# ---- classes


def test_classification_batch_through_a_real_model() -> None:
    rows = load_rows(DATA / "labelled.jsonl", task="sequence-classification")
    found = tokenise(rows, PLAIN, max_length=64)
    assert [each["labels"] for each in found] == [1, 0, 2, 1]
    batch = Collator(PLAIN)(found)
    assert (batch["labels"].dtype, batch["labels"].shape) == (torch.int64, (4,))
    model = tiny(LlamaForSequenceClassification, num_labels=3)
    with torch.no_grad():
        together = model(**batch).logits
        single = torch.cat([model(**Collator(PLAIN)([each])).logits for each in found])
    torch.testing.assert_close(together, single)
    assert found.counts.answer_tokens == 4


def test_pairs_keep_their_types_and_their_closing_token() -> None:
    tokenizer = bpe(adds_bos=True, adds_eos=True)
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    rows = load_rows(DATA / "labelled_pairs.jsonl", task="sequence-classification")
    whole = tokenise(rows, tokenizer, max_length=64)
    assert whole[0]["input_ids"] == tokenizer(rows[0].text, rows[0].text_pair)["input_ids"]
    assert set(whole[0]["token_type_ids"]) == {0, 1}
    cut = tokenise(rows, tokenizer, max_length=10, truncation="right")
    assert [len(each["input_ids"]) for each in cut] == [10, 10]
    assert all(each["input_ids"].count(2) == 2 and each["input_ids"][-1] == 2 for each in cut)
    assert cut.counts.truncated == 2
    batch = Collator(tokenizer, padding_side="left")(whole)
    assert batch["token_type_ids"].shape == batch["input_ids"].shape
    with pytest.raises(DataError, match=r"labelled_pairs\.jsonl:1: the row is"):
        tokenise(rows, tokenizer, max_length=10)


# ---- beside other people's work


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # by TRL's own default
def test_same_ids_and_labels_as_trl(tmp_path: Path) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    cases = [("prompt_completion", PLAIN), ("prompt_completion", WITH_BOS), ("prompt_completion_turns", CHAT)]
    for name, tokenizer in cases:
        ours = examples(DATA / f"{name}.jsonl", tokenizer)
        records = [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        arguments = trl.SFTConfig(
            str(tmp_path), report_to=[], max_length=512, use_cpu=True, bf16=False, disable_tqdm=True
        )
        theirs = trl.SFTTrainer(
            tiny(), arguments, train_dataset=datasets.Dataset.from_list(records), processing_class=tokenizer
        ).train_dataset
        assert [each["input_ids"] for each in ours] == theirs["input_ids"]
        assert [each["labels"] for each in ours] == theirs["labels"]


@pytest.mark.skipif(not (SHARED / "models" / "stories260K").is_dir(), reason="the model stories260K is not here")
def test_loss_of_a_pretrained_model_is_the_published_one(tmp_path: Path) -> None:
    folder = SHARED / "models" / "stories260K"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    stories = (SHARED / "data" / "tinystories_4mb" / "test.jsonl").read_text(encoding="utf-8").split("\n")[:60]
    path = lines(tmp_path / "rows.jsonl", *map(json.loads, stories))
    found = examples(path, tokenizer, truncation="right", bos_token_id=1)
    collator, total = Collator(tokenizer), 0.0
    with torch.no_grad():
        for start in range(0, 60, 15):
            batch = collator(found[start : start + 15])
            counted = (batch["labels"][:, 1:] != IGNORED).sum().item()
            total += model(**batch).loss.item() * counted
    assert total / found.counts.answer_tokens == pytest.approx(1.4218, abs=2e-3)
