"""The embedded model and demo data: they load offline, fit into a wheel, and are what they claim to be."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

import splitfl

ASSETS = Path(splitfl.__file__).parent / "assets"
MODEL, DATA = ASSETS / "model", ASSETS / "data"
PARTIES = ("hospital", "clinic")


def read_jsonl(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, local_files_only=True).eval()


@torch.no_grad()
def text_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> float:
    """Nats per token over all texts, each on its own."""
    total, count = 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", truncation=True)["input_ids"]
        total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return total / count


# --- the model ---


def test_model_folder_fits_into_a_wheel_and_has_layers_enough_to_cut(model: LlamaForCausalLM) -> None:
    assert folder_size(MODEL) <= 20_000_000
    assert len(list(MODEL.glob("*.safetensors"))) == 1
    assert type(model) is LlamaForCausalLM
    assert len(model.model.layers) >= 10
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_model_is_stored_in_sixteen_bits_and_without_training_dropout() -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL, local_files_only=True)
    assert model.dtype in (torch.bfloat16, torch.float16)
    assert model.config.attention_dropout == 0.0
    assert model.config.use_cache
    assert model.generation_config.use_cache is not False


@pytest.mark.parametrize("party", PARTIES)
def test_model_reads_the_held_out_text_far_better_than_random_weights(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, party: str
) -> None:
    texts = [f"{row['prompt']} {row['completion']}" for row in read_jsonl(DATA / f"{party}.held.jsonl")[:10]]
    torch.manual_seed(0)
    untrained = LlamaForCausalLM(model.config).eval()
    trained_loss, untrained_loss = text_loss(model, tokenizer, texts), text_loss(untrained, tokenizer, texts)
    assert abs(untrained_loss - math.log(len(tokenizer))) < 0.5  # random weights guess among all tokens
    assert math.exp(trained_loss) < math.exp(untrained_loss) / 8


def test_model_knows_simple_english(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    story = (
        "Once upon a time, there was a little rabbit who lived in a hole under a big tree. Every morning he went to "
        'the garden to look for carrots. One day he met a bird who was very sad. "What is wrong?" asked the rabbit.'
    )
    words = story.split()
    torch.manual_seed(0)
    shuffled = " ".join(words[i] for i in torch.randperm(len(words)).tolist())
    assert math.exp(text_loss(model, tokenizer, [story])) < 20
    assert text_loss(model, tokenizer, [shuffled]) > text_loss(model, tokenizer, [story]) + 1.5


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def sample_words(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    torch.manual_seed(0)
    prompts = ["Once upon a time, there was", "It was late in the evening when", "The children went to"] * 3
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    ids = model.generate(**inputs, max_new_tokens=50, do_sample=True, temperature=0.8, top_k=40)
    texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [word for text in texts for word in words_of(text)]


def test_sampled_text_is_made_of_english_words(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Judged by the words of the demo data: medicine and films, a poor dictionary, but an independent one."""
    rows = [row for party in PARTIES for row in read_jsonl(DATA / f"{party}.train.jsonl")]
    known = {word for row in rows for word in words_of(row["prompt"] + " " + row["completion"])}
    known |= {word for row in read_csv(DATA / "sentiment.train.csv") for word in words_of(row["text"])}
    torch.manual_seed(0)
    untrained = sample_words(LlamaForCausalLM(model.config).eval(), tokenizer)
    words = sample_words(model, tokenizer)
    assert len(words) > 200
    assert sum(word in known for word in words) / len(words) > 0.65
    assert sum(word in known for word in untrained) / len(untrained) < 0.45
    assert len(set(words)) > 100  # no single phrase over and over


def test_greedy_text_is_the_same_with_and_without_cache(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    cached, plain = (
        model.generate(**inputs, max_new_tokens=20, min_new_tokens=20, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert torch.equal(cached, plain)


# --- the tokenizer ---


@given(text=st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_tokenizer_round_trip(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    marks = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    if not any(mark in text for mark in marks):
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer(text)["input_ids"] == [tokenizer.bos_token_id, *ids]


def test_tokenizer_agrees_with_the_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == model.config.vocab_size == 4096
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(model.config, name) == getattr(tokenizer, name)
        assert getattr(model.generation_config, name) == getattr(tokenizer, name)
    assert tokenizer.model_max_length == model.config.max_position_embeddings


def test_chat_template_is_plain_words_and_marks_the_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    asked = [{"role": "user", "content": "Who are you?"}]
    answered = [*asked, {"role": "assistant", "content": "A model."}]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(answered, tokenize=False)
    assert prompt == "<s>Question: Who are you?\nAnswer:"
    assert whole == "<s>Question: Who are you?\nAnswer: A model.</s>"
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    encoded = tokenizer.apply_chat_template(answered, return_dict=True, return_assistant_tokens_mask=True)
    assert encoded["input_ids"][: len(prompt_ids)] == prompt_ids  # a prompt is a prefix in tokens too
    assert encoded["assistant_masks"] == [int(i >= len(prompt_ids)) for i in range(len(encoded["input_ids"]))]


# --- the data ---


@pytest.mark.parametrize("party", PARTIES)
def test_party_rows_are_prompts_with_whole_answers(party: str) -> None:
    train, held = read_jsonl(DATA / f"{party}.train.jsonl"), read_jsonl(DATA / f"{party}.held.jsonl")
    assert (len(train), len(held)) == (300, 40)
    for row in train + held:
        assert set(row) == {"prompt", "completion"}
        assert row["prompt"].endswith("?")
        assert 40 <= len(row["completion"]) <= 400
        assert row["completion"][-1] in ".?!"


def test_no_row_is_in_two_files() -> None:
    files = [read_jsonl(DATA / f"{party}.{split}.jsonl") for party in PARTIES for split in ("train", "held")]
    pairs = [(row["prompt"], row["completion"]) for rows in files for row in rows]
    assert len(pairs) == len(set(pairs)) == 680


def test_sentiment_rows_are_balanced() -> None:
    for split, count in (("train", 400), ("test", 100)):
        rows = read_csv(DATA / f"sentiment.{split}.csv")
        assert len(rows) == len({row["text"] for row in rows}) == count
        assert [row["label"] for row in rows].count("1") == count // 2
        assert {row["label"] for row in rows} == {"0", "1"}


def test_assets_are_small_and_say_where_they_come_from() -> None:
    assert folder_size(DATA) < 600_000
    notice = (ASSETS / "NOTICE.md").read_text(encoding="utf-8")
    for name in (
        "MedQuAD",
        "CC BY 4.0",
        "Pang",
        "TinyStories",
        "CDLA-Sharing-1.0",
        "GSM8K",
        "Self-Instruct",
        "Gutenberg",
    ):
        assert name in notice
    card = (MODEL / "README.md").read_text(encoding="utf-8")
    assert "loss_curve.png" in card
    assert (MODEL / "loss_curve.png").is_file()
