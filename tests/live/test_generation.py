"""`generate()` with a KV cache at the owner says what the unsplit model says, token by token."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from transformers import TextIteratorStreamer, set_seed

from tests.live.pairs import copy_adapter, shake, twins

NEW = 24
PROMPTS = ["The Heron left", "Agnes", "A boat from the mill came home late"]
METHODS = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.9, "top_p": 0.95},
    "beams": {"num_beams": 3},
    "beam sampling": {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
    "repetition penalty": {"repetition_penalty": 1.3},
}


@pytest.fixture(scope="module")
def pair(owner):
    with twins(owner) as both:
        shake(both.split)
        copy_adapter(both.split, both.whole)
        both.whole.eval()
        both.split.eval()
        yield both
        # A cache that is collected tells the session to release it, while there still is one.
        gc.collect()


def prompts(pair, count):
    tokenizer = pair.kit.tokenizer()
    tokenizer.padding_side = "left"
    return tokenizer(PROMPTS[:count], return_tensors="pt", padding=True, return_token_type_ids=False)


def generate(model, batch, **options):
    set_seed(11)
    return model.generate(**batch, max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0, **options)


@pytest.mark.parametrize("count", [1, 3], ids=["one row", "left padding"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_same_tokens(pair, method, count):
    batch = prompts(pair, count)
    assert count == 1 or not batch["attention_mask"].all()
    whole, split = (generate(model, batch, **METHODS[method]) for model in (pair.whole, pair.split))
    assert whole.shape[1] == batch["input_ids"].shape[1] + NEW
    assert torch.equal(split, whole)


def test_a_stream_of_text_comes_from_another_thread(pair):
    tokenizer = pair.kit.tokenizer()
    batch = prompts(pair, 1)
    pieces = {}
    for name in ("whole", "split"):
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        thread = threading.Thread(target=generate, args=(getattr(pair, name), batch), kwargs={"streamer": streamer})
        thread.start()
        pieces[name] = list(streamer)
        thread.join(60)
    assert len(pieces["whole"]) > 3
    assert pieces["split"] == pieces["whole"]


def test_a_cached_token_costs_one_position_on_the_wire(pair):
    batch = prompts(pair, 1)
    prompt, width = batch["input_ids"].shape[1], pair.kit.plan.width
    before = pair.session.bytes_sent
    generate(pair.split, batch)
    sent = pair.session.bytes_sent - before
    positions = prompt + NEW - 1  # the last token is never sent back in
    assert positions * width * 4 <= sent < positions * width * 4 + NEW * 400
