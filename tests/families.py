"""Tiny models of every family that the project promises, with random weights large enough to tell mistakes apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCAB = 97

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_GEMMA = {**_GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

# name -> (config class, its arguments). The names are the rows of the family table in the docs.
CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2Config",
        {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 128, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2},
    ),
    "opt": ("OPTConfig", {**_COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "opt, projected embeddings": (
        "OPTConfig",
        {**_COMMON, "ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "bloom": (
        "BloomConfig",
        {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 6, "n_head": 4, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2},
    ),
    "llama": ("LlamaConfig", _GROUPED),
    "mistral, sliding window": ("MistralConfig", {**_GROUPED, "sliding_window": 6}),
    "qwen2": ("Qwen2Config", _GROUPED),
    "qwen2, mixed attention": (
        "Qwen2Config", {**_GROUPED, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 3}
    ),
    "qwen3": ("Qwen3Config", {**_GROUPED, "head_dim": 8}),
    "gemma2": ("Gemma2Config", _GEMMA),
    "gemma3": ("Gemma3TextConfig", _GEMMA),
    "gemma3, global layer in the top": (
        "Gemma3TextConfig",
        {**_GEMMA, "layer_types": ["sliding_attention"] * 5 + ["full_attention"]},
    ),
    "phi": ("PhiConfig", _COMMON),
    "phi3": ("Phi3Config", _GROUPED),
    "gpt_neox": ("GPTNeoXConfig", _COMMON),
    "falcon": (
        "FalconConfig",
        {**_COMMON, "alibi": False, "new_decoder_architecture": False, "multi_query": True},
    ),
    "falcon, alibi": (
        "FalconConfig",
        {**_COMMON, "alibi": True, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
}  # fmt: skip

ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", _COMMON),
    "roberta": ("RobertaConfig", _COMMON),
    "distilbert": (
        "DistilBertConfig",
        {"vocab_size": VOCAB, "dim": 32, "hidden_dim": 48, "n_layers": 6, "n_heads": 4, "max_position_embeddings": 128,
         "pad_token_id": 0},
    ),
}  # fmt: skip


def make_config(name: str) -> transformers.PreTrainedConfig:
    """The tiny configuration called `name`; dropout off, so that two passes are comparable."""
    config_class, arguments = {**CAUSAL, **ENCODERS}[name]
    config = getattr(transformers, config_class)(**arguments)
    for key in vars(config):
        if "drop" in key and isinstance(getattr(config, key), float):
            setattr(config, key, 0.0)
    if name in ENCODERS:
        config.num_labels = 3
    return config


def make_model(config: transformers.PreTrainedConfig, *, encoder: bool = False, seed: int = 0) -> PreTrainedModel:
    """A model with weights spread widely: with the library's tiny initial scale, logits nearly tie."""
    auto = transformers.AutoModelForSequenceClassification if encoder else transformers.AutoModelForCausalLM
    torch.manual_seed(seed)
    model = auto.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 0.6 if "embed" in name or "wte" in name else 1.5 / parameter.shape[-1] ** 0.5)
            elif "norm" not in name and "ln" not in name and "bias" in name:
                parameter.normal_(0.0, 0.1)
    return model.eval()


def save_model(name: str, folder: Path, **kwargs: Any) -> Path:
    """Write the tiny model called `name` as a checkpoint directory and return it."""
    model = make_model(make_config(name), encoder=name in ENCODERS, **kwargs)
    model.save_pretrained(folder)
    return folder
