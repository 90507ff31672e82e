"""Between the tensors of a PEFT adapter and `Update`; the adapter that a federation ends with.

PEFT keeps alpha and the rank in its configuration and the factors without them, so nothing is multiplied on the way in,
and nothing on the way out where the scales are the same: the bits come back.
"""

from __future__ import annotations

import copy
import math
import re
from typing import TYPE_CHECKING

import torch

from splitfl.aggregation.factors import Pair, Tensors, Update
from splitfl.aggregation.low_rank import stacked
from splitfl.aggregation.state import State
from splitfl.errors import ModelError, UsageError, printable

if TYPE_CHECKING:
    from peft import LoraConfig

_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
_OTHER_KINDS = ("lora_magnitude_vector", "lora_embedding_", "lora_variant", "lora_arrow")


def update_from_adapter(tensors: Tensors, config: LoraConfig) -> Update:
    """The update of an adapter, as `get_peft_model_state_dict` or an adapter's file has it.

    Raises:
        UsageError: DoRA and other kinds whose changes are no products of two factors.
        ModelError: half of a pair, or shapes that do not belong together.
    """
    pairs, extras = {}, {}
    for name, tensor in tensors.items():
        if any(kind in name for kind in _OTHER_KINDS) or config.use_dora:
            raise UsageError(
                f"{printable(name)} is not of a plain LoRA adapter of linear modules.",
                expected="weights that change by B A, which DoRA's and those of embeddings do not",
                hint="tune without --use-dora",
            )
        short = name.removeprefix(_PREFIX)
        if name.endswith(_A):
            module, other = short.removesuffix(_A), name.removesuffix(_A) + _B
            if other not in tensors:
                raise ModelError(f"The adapter has factor A of {printable(module)} and no factor B.")
            a = _plain(tensor)
            pairs[module] = Pair(a, _plain(tensors[other]), scale_of(config, module, a.shape[0]))
        elif name.endswith(_B):
            if name.removesuffix(_B) + _A not in tensors:
                raise ModelError(f"The adapter has factor B of {printable(short.removesuffix(_B))} and no factor A.")
        else:
            extras[short] = _plain(tensor)
    return Update(pairs, extras)


def adapter_from_update(
    update: Update, config: LoraConfig, *, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """The tensors of the adapter under PEFT's names, for a model whose adapter has `config`.

    A core is multiplied into B; B is divided by the configuration's scale unless that is the update's own.

    Raises:
        ModelError: a rank other than that of the configuration.
    """
    tensors = {f"{_PREFIX}{name}": tensor.to(dtype).clone() for name, tensor in update.extras.items()}
    for name, pair in update.pairs.items():
        expected = _by_pattern(config.rank_pattern, name, config.r)
        if pair.rank != expected:
            raise ModelError(
                f"The adapter of {printable(name)} has rank {pair.rank}, its configuration says {expected}.",
                hint="make the configuration with config_of",
            )
        own = pair.without_core().at_scale(scale_of(config, name, pair.rank))
        tensors[f"{_PREFIX}{name}{_A}"] = own.a.to(dtype).clone()
        tensors[f"{_PREFIX}{name}{_B}"] = own.b.to(dtype).clone()
    return tensors


def config_of(update: Update, config: LoraConfig) -> LoraConfig:
    """`config` with the ranks of `update` and, where those are other ones, alphas that give its scales."""
    ranks = {name: pair.rank for name, pair in update.pairs.items()}
    if all(rank == _by_pattern(config.rank_pattern, name, config.r) for name, rank in ranks.items()):
        return config
    new = copy.deepcopy(config)
    new.use_rslora = False
    new.r = max(ranks.values())
    alphas = {name: pair.scale * pair.rank for name, pair in update.pairs.items()}
    new.lora_alpha = next(alphas[name] for name in ranks if ranks[name] == new.r)
    # "^" as PEFT reads it: the whole name and not an ending of it, so that no name is taken for another.
    new.rank_pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != new.r}
    new.alpha_pattern = {f"^{re.escape(name)}": alpha for name, alpha in alphas.items() if alpha != new.lora_alpha}
    return new


def scale_of(config: LoraConfig, module: str, rank: int) -> float:
    """alpha/r, or alpha/sqrt(r), of one module."""
    alpha = _by_pattern(config.alpha_pattern, module, config.lora_alpha)
    return float(alpha / (math.sqrt(rank) if config.use_rslora else rank))


def final_adapter(state: State, config: LoraConfig) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """The whole change of a federation as one PEFT adapter: its tensors and its configuration.

    What was merged and the adapter are stacked; a pair that changes nothing is left out. Ranks that differ are filled
    up with zeros to one rank, because readers of adapters expect one. Where nothing was merged and nothing is to be
    filled up, the configuration is the given one, and the bits are the adapter's.
    """
    whole = {name: _whole(state, name) for name in state.adapter.pairs}
    rank = max((pair.rank for pair in whole.values()), default=config.r)
    update = Update({name: filled(pair, rank) for name, pair in whole.items()}, state.adapter.extras)
    fitting = rank == config.r and not config.rank_pattern
    if not fitting or any(p.scale != scale_of(config, n, rank) for n, p in update.pairs.items()):
        config = copy.deepcopy(config)
        config.r = config.lora_alpha = rank
        config.use_rslora, config.rank_pattern, config.alpha_pattern = False, {}, {}
    return adapter_from_update(update, config), config


def _whole(state: State, name: str) -> Pair:
    pair, merged = state.adapter.pairs[name].without_core(), state.merged.get(name)
    if merged is None:
        return pair
    return stacked([merged, pair]) if pair.b.any() else merged


def filled(pair: Pair, rank: int) -> Pair:
    """The same change written with a higher rank: zeros below A and beside B."""
    more = rank - pair.rank
    if not more:
        return pair
    pair = pair.without_core()
    pad = torch.nn.functional.pad
    return Pair(pad(pair.a, (0, 0, 0, more)), pad(pair.b, (0, more)), pair.scale)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def _by_pattern(pattern: dict[str, int], module: str, otherwise: float) -> float:
    if not pattern:
        return otherwise
    from peft.utils.other import get_pattern_key  # seconds to load, and a coordinator's rules do without it

    return pattern.get(get_pattern_key(list(pattern), module), otherwise)
