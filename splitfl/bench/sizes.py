"""The models that are measured, by size. Random weights: a speed does not depend on what a model has learnt.

Nothing heavy is imported here; `splitfl.bench.checkpoint` makes a model of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from splitfl.errors import UsageError, nearest, printable

VOCABULARY = 8192
BOTTOM = TOP = 2  # layers that the party holds at either end; they carry the adapters


@dataclass(frozen=True, kw_only=True)
class Size:
    """One model."""

    name: str
    like: str
    """The family, for people."""
    config_class: str
    """Name of the configuration class in transformers."""
    layers: int
    width: int
    """D, the width of the cut."""
    parameters: int
    """All of them, shared tensors once; for estimates of time."""
    longest: int
    """Positions of the model."""
    arguments: Mapping[str, Any]
    """For the configuration class."""


def _llama_like(name: str, like: str, config_class: str, *, layers: int, width: int, inner: int, heads: int) -> Size:
    arguments = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
    }
    parameters = layers * (4 * width**2 + 3 * width * inner) + 2 * VOCABULARY * width
    return Size(
        name=name,
        like=like,
        config_class=config_class,
        layers=layers,
        width=width,
        parameters=parameters,
        longest=1024,
        arguments=arguments,
    )


def _gpt2_like(name: str, *, layers: int, width: int, heads: int) -> Size:
    arguments = {
        "vocab_size": VOCABULARY,
        "n_layer": layers,
        "n_embd": width,
        "n_head": heads,
        "n_positions": 1024,
        # Dropout would draw other numbers on the two sides, and nothing could be compared.
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }
    return Size(
        name=name,
        like="GPT-2",
        config_class="GPT2Config",
        layers=layers,
        width=width,
        parameters=layers * 12 * width**2 + (VOCABULARY + 1024) * width,
        longest=1024,
        arguments=arguments,
    )


SIZES: dict[str, Size] = {
    size.name: size
    for size in (
        _gpt2_like("tiny", layers=6, width=64, heads=4),
        _gpt2_like("S", layers=12, width=256, heads=4),
        _llama_like("M", "Llama", "LlamaConfig", layers=16, width=512, inner=1408, heads=8),
        _llama_like("L", "Qwen2", "Qwen2Config", layers=24, width=1024, inner=2816, heads=16),
    )
}
"""``tiny`` is for trying the benchmark out; S, M and L are those that are reported."""


def size_named(name: str) -> Size:
    """The model called `name`.

    Raises:
        UsageError: there is none.
    """
    if name not in SIZES:
        raise UsageError(f"There is no model size {printable(name, 40)!r}.", hint=nearest(name, SIZES))
    return SIZES[name]
