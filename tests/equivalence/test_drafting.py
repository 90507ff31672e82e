"""Guesses that the trunk looks at several at a time: the same text as plain generation, in fewer passes."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

from model_owner.trunk import CacheMismatchError, LocalLink, Trunk
from party.drafting import check_vocabulary, counting, drafting, share_weights
from party.remote import put_remote_trunk
from splitfl.errors import UsageError
from splitfl.kit import open_kit, write_kit
from splitfl.link import TrunkRequest
from splitfl.load import load_trunk_side, quiet_library
from tests.equivalence.measure import make_pair
from tests.families import make_config, make_model, save_model

NEW, GUESSES, PROMPT = 20, 4, [5, 9, 11, 7, 3]
FAMILIES = ("gpt2", "llama", "mistral, sliding window", "qwen2, mixed attention")


@functools.cache
def made(family, folder):
    """The family's pair; a draft that is right often and wrong often; and one that is wrong nearly always."""
    pair = make_pair(save_model(family, folder / family), (2, 2))
    full = pair.full.get_base_model()
    near, far = copy.deepcopy(full), make_model(make_config(family), seed=5)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in near.parameters():
            parameter += 0.015 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    for model in (pair.full, near, far):
        model.config.use_cache = model.generation_config.use_cache = True
    return pair, near, far


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def write(model, draft=None, *, guesses=GUESSES, **options):
    """The new tokens, and what they took."""
    ids = torch.tensor([PROMPT])
    given = {"max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0, "do_sample": False, **options}
    if draft is not None:
        given |= drafting(draft, guesses)
    with quiet_library(), torch.no_grad(), counting(model) as passes:
        written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **given)
    return written[0, len(PROMPT) :].tolist(), passes


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_is_that_of_plain_generation(family, folder):
    pair, near, far = made(family, folder)
    expected, _ = write(pair.full)
    plain, one_each = write(pair.party)
    assert plain == expected
    assert (one_each.passes, one_each.positions) == (NEW, len(PROMPT) + NEW - 1)
    for draft, fewest, most in ((near, NEW // (GUESSES + 1), NEW - 4), (far, NEW - 3, NEW)):
        text, passes = write(pair.party, draft)
        assert text == expected
        assert fewest <= passes.passes <= most  # the near draft spares, and the far one is caught out
        assert passes.gained(NEW) == NEW - passes.passes
        kept, sent = passes.gained(NEW), passes.guessed(len(PROMPT))
        assert kept <= sent <= GUESSES * passes.passes
        assert passes.positions == len(PROMPT) + passes.passes - 1 + sent


def test_a_prompt_in_pieces_gives_the_same_text(folder):
    pair, _, _ = made("llama", folder)
    expected, _ = write(pair.full)
    text, passes = write(pair.party, prefill_chunk_size=2)
    assert text == expected
    assert (passes.passes, passes.positions) == (NEW + 2, len(PROMPT) + NEW - 1)


def test_bottom_and_top_alone_can_guess_with_the_weights_that_are_there(folder):
    source = save_model("llama", folder / "ends")
    kit_dir = folder / "ends-kit"
    with quiet_library():
        plan = write_kit(source, kit_dir, bottom=2, top=2).plan
        trunk = Trunk(load_trunk_side(source, plan, dtype=torch.float32), plan)
        model, draft = open_kit(kit_dir).load(), open_kit(kit_dir).load()
    shared = share_weights(draft, model)
    assert {id(p) for p in draft.parameters()} == {id(p) for p in shared} == {id(p) for p in model.parameters()}
    put_remote_trunk(model, plan, LocalLink(trunk))
    draft.config.use_cache = True
    plain, _ = write(model.eval())
    text, passes = write(model, draft.eval())
    assert text == plain
    assert passes.passes <= NEW


def test_a_draft_of_another_vocabulary_is_refused(folder):
    pair, _, _ = made("llama", folder)
    other = make_config("llama")
    other.vocab_size += 1
    with pytest.raises(UsageError, match="98 tokens, the tuned model one of 97"):
        check_vocabulary(make_model(other), pair.party)


def test_a_window_takes_back_what_the_last_request_brought_and_no_more(folder):
    source = save_model("mistral, sliding window", folder / "window")
    with quiet_library():
        plan = write_kit(source, folder / "window-kit", bottom=2, top=2).plan
        trunk = Trunk(load_trunk_side(source, plan, dtype=torch.float32), plan)
    hidden = torch.randn(1, 24, plan.width, generator=torch.Generator().manual_seed(0))

    def ask(cache, start, stop):
        return trunk.forward(TrunkRequest(hidden=hidden[:, start:stop], cache=1, past=start), cache)

    straight, back = trunk.new_cache(), trunk.new_cache()
    whole = ask(straight, 0, 24)
    ask(back, 0, 12)
    ask(back, 12, 20)
    torch.testing.assert_close(ask(back, 14, 24), whole[:, 14:], rtol=0, atol=1e-5)
    with pytest.raises(CacheMismatchError, match="cannot be cut back from 24 to 8"):
        ask(back, 8, 10)
    ask(back, 14, 15)  # whoever asked in vain has changed nothing
