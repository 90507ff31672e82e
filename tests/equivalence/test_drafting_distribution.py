"""Sampling with guesses draws from the tuned model's distribution, whatever the draft expects: a chi-square test.

Every sequence of three tokens of a vocabulary of four has a probability that can be computed. With a draft of other
weights, the frequencies of what is written must be those of the tuned model, and far from those of the draft.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy.stats import chi2
from transformers import LlamaConfig, PreTrainedModel, set_seed

from model_owner.trunk import LocalLink, Trunk
from party.drafting import counting, drafting
from party.remote import put_remote_trunk
from splitfl.kit import open_kit, write_kit
from splitfl.load import load_trunk_side, quiet_library
from tests.families import make_model

VOCAB, NEW, GUESSES, DRAWS, TEMPERATURE = 4, 3, 2, 300, 1.5
PROMPT = [1, 3, 2]
SURE, LEAST = 1e-3, 5.0  # of the test; draws that are expected of a cell at least, smaller ones are put together


def tiny(seed):
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return make_model(config, seed=seed)


def exact(model: PreTrainedModel) -> torch.Tensor:
    """Probability of each sequence of `NEW` tokens after the prompt, in the order of `itertools.product`."""
    sequences = torch.tensor([[*PROMPT, *new] for new in itertools.product(range(VOCAB), repeat=NEW)])
    with torch.no_grad():
        logits = model(input_ids=sequences, use_cache=False).logits[:, len(PROMPT) - 1 : -1].double()
    chosen = sequences[:, len(PROMPT) :].unsqueeze(-1)
    return (logits / TEMPERATURE).log_softmax(-1).gather(-1, chosen).sum(dim=(1, 2)).exp()


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """The chance of frequencies so far off, or further, if these were the probabilities."""
    expected = probabilities * counts.sum()
    rare = expected < LEAST
    if rare.any():
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(chi2.sf(float(statistic), len(counts) - 1))


@pytest.mark.slow
def test_what_is_written_is_distributed_as_the_tuned_model_says(tmp_path):
    full, draft = tiny(seed=1), tiny(seed=2)
    full.save_pretrained(tmp_path / "model")
    with quiet_library():
        plan = write_kit(tmp_path / "model", tmp_path / "kit", bottom=1, top=1).plan
        party = open_kit(tmp_path / "kit").load().eval()
        trunk = Trunk(load_trunk_side(tmp_path / "model", plan, dtype=torch.float32), plan)
    put_remote_trunk(party, plan, LocalLink(trunk))
    draft.config.use_cache = True
    target, guessed = exact(full), exact(draft)
    assert float((target - guessed).abs().sum()) / 2 > 0.25  # the draft is wrong often enough to matter
    counts, kept = torch.zeros(VOCAB**NEW, dtype=torch.float64), 0
    ids = torch.tensor([PROMPT])
    set_seed(20)
    with quiet_library(), torch.no_grad():
        for _ in range(DRAWS):
            with counting(party) as passes:
                written = party.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=True, top_k=0,
                    temperature=TEMPERATURE, pad_token_id=0, **drafting(draft, GUESSES),
                )  # fmt: skip
            new = written[0, len(PROMPT) :].tolist()
            counts[sum(token * VOCAB**place for place, token in enumerate(reversed(new)))] += 1
            kept += passes.gained(NEW)
    assert DRAWS / 5 < kept < DRAWS * (NEW - 1)  # some guesses stayed, and some did not
    assert chi_square(counts, target) > SURE
    assert chi_square(counts, guessed) < 1e-12
