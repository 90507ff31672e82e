"""Every causal family that the installed library knows: built tiny, cut through a real kit, compared with the whole.

A family comes out as *exact* (largest difference at most 1e-6, tokens equal), as *refused* (a `ModelError` says why),
as *not built* (the unsplit model could not be made from a tiny configuration, or does not run on text alone), or as
*wrong*, which the tests do not accept.
"""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from splitfl.errors import ModelError
from splitfl.load import quiet_library
from tests.equivalence.measure import Difference, compare_generation, compare_training, make_batch, make_pair
from tests.families import VOCAB, make_model

NEW_TOKENS = 4
_RUNS = (("greedy", "none"), ("greedy", "left"), ("beams", "left"))
TOLERANCE = 1e-6
LAYERS = 4
MIXED_LAYERS = 6
"""Where the kind of layer changes along the stack."""
LARGEST_TINY = 5_000_000
"""Parameters of a model that still counts as tiny."""

_DEPTHS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers", "encoder_layers",
    "num_encoder_layers", "num_blocks",
)  # fmt: skip
_MIXED = {"layer_types", "mlp_layer_types", "layers_block_type", "attention_types", "sliding_window_pattern"}

# A size for each field that some family's configuration has; a family is given those that it knows.
_SIZES = {
    "vocab_size vocab_size_per_layer_input unpadded_vocab_size": VOCAB,
    " ".join(_DEPTHS): LAYERS,
    "hidden_size d_model n_embd emb_dim dim embedding_dim embedding_size input_embedding_size output_embedding_size "
    "word_embed_proj_dim lru_width attention_hidden_size pronunciation_embed_dim shape_embed_dim backbone_hidden_size "
    "adapter_input_size encoder_hash_byte_group_vocab": 32,
    "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads linear_num_value_heads "
    "linear_num_heads": 4,
    "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads linear_num_key_heads n_mamba_heads "
    "index_n_heads indexer_n_heads": 2,
    "head_dim kv_channels d_head dim_head attention_head_size swa_head_dim qk_rope_head_dim qk_nope_head_dim "
    "v_head_dim index_head_dim indexer_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim "
    "query_pre_attn_scalar hidden_size_per_layer_input gated_norm_rank o_lora_rank": 8,
    "rotary_dim mamba_dt_rank time_step_rank": 4,
    "attention_head_dim q_lora_rank kv_lora_rank router_hidden_size": 16,
    "intermediate_size n_inner ffn_dim ffn_hidden_size decoder_ffn_dim encoder_ffn_dim d_inner dff dim_ff "
    "feed_forward_size intermediate_size_mlp dense_intermediate_size": 48,
    "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size shared_experts_intermediate_size "
    "shared_intermediate_size moe_shared_expert_intermediate_size": 24,
    "num_experts num_local_experts n_routed_experts moe_num_experts": 4,
    "num_experts_per_tok num_experts_per_token moe_topk moe_k zero_expert_num o_groups": 2,
    "n_group num_expert_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts "
    "first_k_dense_replace num_dense_layers n_groups indexer_kv_heads": 1,
    "mamba_d_state mamba_n_heads mamba_d_head mamba_headdim mamba_num_heads mamba_head_dim ssm_state_size "
    "state_size": 8,
    "mamba_d_ssm": 64,
    "mamba_chunk_size chunk_size block_size": 4,
    "sliding_window sliding_window_size attention_window_size window_size attention_chunk_size index_topk": 6,
    "local_attention": 12,
    "max_window_layers": 3,
    "max_position_embeddings n_positions max_seq_len n_ctx context_length model_max_length max_target_positions": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_TINY = {name: size for names, size in _SIZES.items() for name in names.split()}

# What a family needs besides: where its default pattern would leave a kind of layer out of six, or sizes depend on
# each other.
_OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"num_hidden_layers": 6, "attn_layer_indices": [2, 5]},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"] * 3,
                            "rope_parameters": dict.fromkeys(("sliding_attention", "full_attention"), _ROPE)},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
             "ffn_config": {"ffn_hidden_size": 48}},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
    "dots3_note_text": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16,
                        "swa_kv_lora_rank": 16, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8},
    "gemma3n_text": {"num_kv_shared_layers": 1},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "gpt_neo": {"num_layers": 6, "attention_types": [[["global", "local"], 3]]},
    "granitemoehybrid": {"layer_types": ["mamba", "mamba", "attention", "mamba", "attention", "mamba"]},
    "jamba": {"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 2},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention",
                                         "full_attention"]},
    "qwen4_exp_text": {"indexer_budget": 6, "indexer_compress_ratio": 2},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "lsh"] * 3, "axial_pos_embds_dim": (16, 16),
                 "axial_pos_shape": (8, 16)},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "chunk_size": 64},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 6, "attention_hidden_size": 64, "attn_layer_period": 3, "attn_layer_offset": 2},
    "zamba2": {"attention_hidden_size": 64, "n_mamba_heads": 8, "layers_block_type": ["linear_attention", "hybrid"] * 3,
               "layer_types": ["linear_attention", "hybrid"] * 3},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

# PEFT cannot wrap every linear module of these (a router returning several tensors, a Mamba projection read from
# outside): the sweep is about the cut, so their adapter goes elsewhere.
_TARGETS: dict[str, tuple[str, ...]] = {
    "falcon_h1": ("q_proj", "v_proj", "gate_proj", "in_proj"),
    "llama4": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "llama4_text": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "nemotron_h": ("in_proj", "q_proj", "v_proj"),
    "phimoe": ("q_proj", "k_proj", "v_proj", "o_proj"),
}


# The same family under settings that change what its layers pass on: (model type, settings).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4_text, no embeddings per layer": ("gemma4_text", {"hidden_size_per_layer_input": 0}),
    "glm_moe_dsa, shared indexers": ("glm_moe_dsa", {"indexer_types": ["full", "full", "shared"] * 2}),
    "mixtral, loss over its routers": ("mixtral", {"output_router_logits": True}),
    "qwen3_moe, dense layers between": ("qwen3_moe", {"num_hidden_layers": 6, "mlp_only_layers": [1, 4]}),
    "smollm3, sliding windows": ("smollm3", {"use_sliding_window": True, "layer_types": [
        "sliding_attention", "sliding_attention", "full_attention"] * 2}),
}  # fmt: skip


class NotBuiltError(Exception):
    """The unsplit model could not be made or run; says why."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How one family came out."""

    family: str
    verdict: Literal["exact", "refused", "not built", "wrong"]
    reason: str = ""
    difference: Difference | None = None
    kinds: tuple[str, ...] = ()
    """Kinds of layer in the model, where it has several."""


def families() -> list[str]:
    """Model types of every causal family of the installed library, one for those that share a configuration class."""
    seen: dict[str, str] = {}
    for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, key=len):
        seen.setdefault(CONFIG_MAPPING_NAMES.get(name, name), name)
    return sorted([*seen.values(), *VARIANTS])


def tiny_config(
    config_class: type[PreTrainedConfig], settings: dict[str, Any] | None = None, *, tower: bool = False
) -> PreTrainedConfig:
    """A configuration with every size that the class knows set small, dropout and jitter off.

    Args:
        settings: put over it.
        tower: for an image or sound encoder inside a larger model: two layers.
    """
    fields = _fields_of(config_class)
    given = {name: size for name, size in _TINY.items() if name in fields}
    if _MIXED & fields.keys():
        given = {name: MIXED_LAYERS if name in _DEPTHS else size for name, size in given.items()}
    if "kv_lora_rank" in fields:
        given["num_key_value_heads"] = 4  # latent attention has a key for every head
    for name, value in fields.items():
        if isinstance(value, float) and ("drop" in name or "jitter" in name):
            given[name] = 0.0
        if isinstance(value, PreTrainedConfig):
            given[name] = tiny_config(type(value), tower="text" not in name).to_dict()
        if tower and name in {"depth", *_DEPTHS} and isinstance(value, int):
            given[name] = 2
    return config_class(**{**given, **_OVERRIDES.get(config_class.model_type, {}), **(settings or {})})


def _fields_of(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Names that the class takes, with their defaults where it can be made without arguments."""
    names = set(getattr(config_class, "attribute_map", {})) | set(getattr(config_class, "__dataclass_fields__", {}))
    default = None
    with contextlib.suppress(Exception):
        default = config_class()
        names |= set(vars(default))
    values = {}
    for name in sorted(names):
        try:
            values[name] = getattr(default, name, None)
        except Exception:  # an attribute that differs by layer refuses to be read
            values[name] = None
    return values


def build(family: str) -> PreTrainedModel:
    """The tiny unsplit model.

    Raises:
        NotBuiltError: it cannot be made tiny, or does not run on token ids and a mask alone.
    """
    try:
        model_type, settings = VARIANTS.get(family, (family, {}))
        config = tiny_config(CONFIG_MAPPING[model_type], settings)
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    except Exception as error:
        raise NotBuiltError(f"no tiny configuration: {_first_line(error)}") from error
    if size > LARGEST_TINY:
        raise NotBuiltError(f"its smallest configuration found here has {size / 1e6:.0f} million parameters")
    model = make_model(config)
    try:
        with torch.no_grad():
            loss = model(**make_batch("left", "causal-lm")).loss
    except Exception as error:
        raise NotBuiltError(f"the unsplit model does not run on text alone: {_first_line(error)}") from error
    if not torch.isfinite(loss):
        raise NotBuiltError("the unsplit model gives no finite loss on random weights")
    return model


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if "validator" in (lines or [""])[0] else (lines or [type(error).__name__])[0])[:160]


def kinds_of(model: PreTrainedModel) -> tuple[str, ...]:
    """Kinds of layer that the configuration names, in order of appearance."""
    text = model.config.get_text_config()
    names = [*(getattr(text, "layer_types", None) or ()), *(getattr(text, "mlp_layer_types", None) or ())]
    return tuple(dict.fromkeys(names))


def choose_cut(model: PreTrainedModel) -> tuple[int, int]:
    """(2, 2) where the trunk then still holds every kind of layer, else (1, 1)."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ["same"]
    return (2, 2) if set(kinds[2:-2]) == set(kinds) else (1, 1)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The library warns of what tiny configurations and old families bring along; nothing of it is ours."""
    with warnings.catch_warnings(), quiet_library():
        warnings.simplefilter("ignore")
        yield


def judge(family: str, cut: tuple[int, int] | None = None) -> Verdict:
    """Build, cut, train a step, generate, compare; at `choose_cut` unless `cut` is given."""
    with _quiet():
        try:
            model = build(family)
        except NotBuiltError as error:
            return Verdict(family=family, verdict="not built", reason=str(error))
        result, kinds = Difference(family, cut or choose_cut(model)), kinds_of(model)
        try:
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                pair = make_pair(Path(folder), result.cut, targets=_TARGETS.get(family, ("all-linear",)))
            compare_training(pair, result)
            compare_generation(pair, result, new_tokens=NEW_TOKENS, runs=_RUNS)
        except ModelError as error:
            reason = error.problem.replace(folder, "the checkpoint")
            return Verdict(family=family, verdict="refused", reason=reason, kinds=kinds)
        except Exception as error:
            reason = f"{type(error).__name__}: {_first_line(error)}"
            return Verdict(family=family, verdict="wrong", reason=reason, kinds=kinds)
    right = result.largest <= TOLERANCE and result.tokens_all_equal and result.tokens_equal
    return Verdict(family=family, verdict="exact" if right else "wrong", difference=result, kinds=kinds)
