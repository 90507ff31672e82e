"""How a model is cut: find the layer stack, make the plan, keep only one side's layers. No family is named here.

The Hugging Face model stays whole as a skeleton. Each layer that a side does not hold is replaced by a `PassThrough`,
so layer indices, per-index settings (`layer_types`, sliding windows), module names and cache slots never move.

    layer        0 .. b-1     b               b+1 .. n-t-1     n-t .. n-1
    party        real         remote trunk    pass-through     real
    owner        pass-through real            real             pass-through

A pass-through still advances its slot of the KV cache, because the library reads the sequence length and sizes its
masks from cache slots that may belong to the other side. Its entry holds one number a position: the row it belongs to.
From that the party sees every reorder, repeat or selection that `generate()` makes, and tells the owner
(`party.remote`).
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Container
from typing import Any, Literal

import msgspec
import torch
from torch import nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from splitfl.errors import ModelError
from splitfl.wire.messages import WIRE_VERSION

Task = Literal["causal-lm", "sequence-classification"]

# Arguments by which a layer receives more than hidden state, mask, positions and its own cache slot. What they carry
# would have to cross the cut too, and a design that sends it has not been worked out: such models are refused, unless
# their configuration switches it off. (`splitfl.kit` looks besides for what one layer returns and the next one takes.)
FOREIGN_ARGUMENTS: dict[str, tuple[str, Callable[[PreTrainedConfig], bool]]] = {
    "per_layer_input": (
        "it feeds every layer its own embedding of the token ids",
        lambda text: getattr(text, "hidden_size_per_layer_input", None) == 0,
    ),
    "shared_kv_states": (
        "its layers share keys and values across the cut",
        lambda text: getattr(text, "num_kv_shared_layers", None) == 0,
    ),
    "prev_topk_indices": (
        "its layers attend to positions that an earlier layer chose, past the cut",
        lambda text: set(getattr(text, "indexer_types", None) or ()) == {"full"},
    ),
    "cache_params": ("its layers are state-space models with a cache of their own", lambda text: False),
    "block_states": ("its layers read the states of earlier blocks of layers, past the cut", lambda text: False),
    "input_ids": ("its layers read the token ids themselves", lambda text: False),
}


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The cut plus all that both sides must agree on. Written to ``splitfl.json`` in the kit."""

    wire_version: int = WIRE_VERSION
    model_type: str
    task: Task
    layers: int
    """Number of layers n of the whole model."""
    bottom: int
    """b: the party holds layers [0, b)."""
    top: int
    """t: the party holds layers [n-t, n)."""
    stack: str
    """Module path of the layer list in the base model, for instance ``layers`` or ``encoder.layer``."""
    returns_tuple: bool
    """Whether a layer of this family returns a tuple rather than the hidden state."""
    width: int
    """D: size of the hidden state at the cut."""
    dtype: str
    """Dtype the two sides compute in unless told otherwise, for instance ``bfloat16``."""
    layer_types: tuple[str, ...] = ()
    tied: bool = False
    """Whether input embedding and output head share one tensor (both are in the kit)."""
    max_length: int | None = None
    """Longest sequence the model's positions allow; None if unbounded."""
    trunk: str
    """Fingerprint of the trunk's tensors and of the settings they run under."""

    @property
    def trunk_layers(self) -> range:
        """Indices of the layers that stay with the owner."""
        return range(self.bottom, self.layers - self.top)

    @property
    def party_layers(self) -> list[int]:
        """Indices of the layers that the party holds."""
        return [i for i in range(self.layers) if i not in self.trunk_layers]

    @property
    def digest(self) -> str:
        """Hash over every field: two sides with the same digest made the same plan."""
        return hashlib.blake2b(msgspec.json.encode(self, order="sorted"), digest_size=16).hexdigest()


def find_stack(base: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The one list of transformer layers in a base model, and its module path.

    Raises:
        ModelError: there is none, there are several, or its layers need more than the cut can carry.
    """
    config = base.config
    family = config.model_type
    if config.is_encoder_decoder:
        raise ModelError(f"A {family} model is an encoder-decoder.", expected="a causal LM or an encoder classifier")
    text = config.get_text_config()
    if getattr(text, "output_router_logits", False):
        raise ModelError(
            f"This {family} model adds a loss over the routers of all its layers, and those of the trunk stay there.",
            hint="set output_router_logits to false in config.json",
        )
    depth = getattr(text, "decoder_layers", None) or getattr(text, "num_hidden_layers", None)
    # A model that also sees or hears has towers with layers of their own, outside its decoder.
    inside = {id(module) for module in base.get_decoder().modules()}
    lists = [(name, module) for name, module in base.named_modules() if isinstance(module, nn.ModuleList)]
    lists = [(name, module) for name, module in lists if len(module) == depth and id(module) in inside]
    stacks = [(name, module) for name, module in lists if all("hidden_states" in _parameters(m) for m in module)]
    if len(stacks) != 1:
        unlike = " that take `hidden_states`" if len(lists) > len(stacks) else ""
        raise ModelError(
            f"A {family} model has {len(stacks) or 'no'} lists of {depth} layers{unlike}; one was looked for.",
            expected="a model whose layers stand in one list and take `hidden_states`",
        )
    name, layers = stacks[0]
    taken = set().union(*map(_parameters, layers))
    for argument, (reason, is_off) in FOREIGN_ARGUMENTS.items():
        if argument in taken and not is_off(text):
            raise ModelError(
                f"A {family} model cannot be cut: {reason} (`{argument}`).",
                expected="layers that depend on hidden state, mask, positions and their own cache slot alone",
            )
    return name, layers


def _parameters(layer: nn.Module) -> set[str]:
    return set(inspect.signature(layer.forward).parameters)


def check_cut(layers: int, bottom: int, top: int) -> None:
    """Refuse a cut that leaves no trunk or no top.

    Raises:
        ModelError: with the numbers that are allowed.
    """
    if bottom < 0 or top < 0 or bottom + top >= layers:
        raise ModelError(
            f"Cut --bottom {bottom} --top {top} does not fit a model of {layers} layers.",
            expected=f"both at least 0, and together at most {layers - 1} so that a trunk remains",
        )


class _StandIn(nn.Module):
    """Stands where a module is that this side does not hold, and answers for its attributes.

    Families read them from outside: `attention_type`, a method that the layer has, a table to be filled after loading.
    They come from the replaced module, whose own tensors were never filled: they lie on the meta device.
    """

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__()
        # Past nn.Module's registry: no parameter, no tensor in the state dict, nothing to load, move or save.
        self.__dict__["_skeleton"] = replaced._skeleton if isinstance(replaced, _StandIn) else replaced.to("meta")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):
                raise
            return getattr(self.__dict__["_skeleton"], name)


class PassThrough(_StandIn):
    """Stands where a layer is that this side does not hold: returns the hidden state and counts the cache slot."""

    def __init__(self, replaced: nn.Module, index: int, returns_tuple: bool) -> None:
        super().__init__(replaced)
        self.index = index
        self.returns_tuple = returns_tuple

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Hidden state in, hidden state out, in the family's own return form."""
        cache = cache_among(args, kwargs)
        if cache is not None:
            count_positions(cache, self.index, hidden_states)
        return self.form(hidden_states)

    def form(self, hidden_states: torch.Tensor) -> Any:
        """`hidden_states` the way a layer of this family returns it."""
        return (hidden_states, None) if self.returns_tuple else hidden_states


def cache_among(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cache | None:
    """The KV cache among a layer's arguments; families name it `past_key_values` or `layer_past`."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)


def count_positions(cache: Cache, index: int, hidden: torch.Tensor) -> None:
    """Advance slot `index` of `cache` by the positions of `hidden` [B, T, D] without anything that was computed.

    The entry is the row number of each position, [B, 1, T, 1]: width 0 would read as empty. A slot that only ever
    holds a state (linear attention) takes it as that, [B, T].
    """
    slot = slot_of(cache, index)
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    if isinstance(slot, LinearAttentionCacheLayerMixin):
        slot.has_previous_state = dict.fromkeys(slot.has_previous_state, True)
    if slot is None or isinstance(slot, CacheLayerMixin):
        entry = rows.view(-1, 1, 1, 1).expand(-1, 1, hidden.shape[1], 1)
        cache.update(entry, entry, index)
    elif isinstance(slot, LinearAttentionCacheLayerMixin):
        entry, before = rows.view(-1, 1).expand(-1, hidden.shape[1]), slot.recurrent_states[0]
        slot.recurrent_states[0] = entry if before is None else torch.cat([before, entry], dim=1)
        slot.is_recurrent_states_initialized[0], slot.device = True, hidden.device


def counted_length(slot: Any) -> int | None:
    """Positions that `count_positions` put into a slot; None if slots of this kind do not count."""
    if slot is None:
        return 0
    if isinstance(slot, CacheLayerMixin):
        return int(slot.get_seq_length())
    if isinstance(slot, LinearAttentionCacheLayerMixin):
        return 0 if slot.recurrent_states[0] is None else slot.recurrent_states[0].shape[1]
    return None


def counted_rows(slot: Any) -> torch.Tensor:
    """Row numbers [B] in a slot that has counted, in the order that `generate()` has brought them to."""
    return slot.keys[:, 0, 0, 0] if isinstance(slot, CacheLayerMixin) else slot.recurrent_states[0][:, 0]


def renumber_rows(slot: Any) -> None:
    """Number a counting slot's rows from 0 again, once the owner has been told of their new order."""
    if not counted_length(slot):
        return
    order = torch.arange(len(counted_rows(slot)), device=counted_rows(slot).device)
    if isinstance(slot, CacheLayerMixin):
        slot.keys = order.view(-1, 1, 1, 1).expand_as(slot.keys).clone()
    else:
        slot.recurrent_states[0] = order.view(-1, 1).expand_as(slot.recurrent_states[0]).clone()


def slot_of(cache: Cache, index: int) -> Any:
    """Slot `index` of `cache`, or None if it has not been made yet."""
    return cache.layers[index] if index < len(cache.layers) else None


def module_at(base: nn.Module, path: str) -> nn.ModuleList:
    """The layer list at module `path`."""
    found = base.get_submodule(path)
    assert isinstance(found, nn.ModuleList)  # noqa: S101  the path came from `find_stack` of the same class
    return found


def entrance(base: nn.Module, path: str) -> nn.Module:
    """The innermost module around the layer list at `path` that takes 2-D mask, positions and embeddings.

    That call builds the masks and rotary tables; some families (OPT) reach it without passing through the base model.

    Raises:
        ModelError: no module around the layers takes `inputs_embeds`.
    """
    parts = path.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        module = base.get_submodule(".".join(parts[:depth]))
        if {"inputs_embeds", "attention_mask"} <= _parameters(module):
            return module
    raise ModelError(
        f"No module around {path} takes `inputs_embeds` and `attention_mask`.",
        expected="a model that can be entered behind its embeddings",
    )


def keep_party_layers(base: PreTrainedModel, plan: Plan, also: Container[int] = ()) -> None:
    """Replace the trunk of `base` in place by pass-throughs, all but the layers in `also` (an emulator's)."""
    layers = module_at(base, plan.stack)
    for index in plan.trunk_layers:
        if index not in also:
            layers[index] = PassThrough(layers[index], index, plan.returns_tuple)


def keep_trunk_layers(model: PreTrainedModel, plan: Plan) -> None:
    """Replace in place what the owner does not run: the party's layers by pass-throughs, embeddings and head by voids.

    The small modules between them (position tables, norms) stay: in some families they make what the layers receive.
    """
    base = model.base_model
    layers = module_at(base, plan.stack)
    for index in plan.party_layers:
        layers[index] = PassThrough(layers[index], index, plan.returns_tuple)
    kept = {id(module) for module in base.modules()}
    kept -= {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if id(child) not in kept and next(child.parameters(), None) is not None:
                setattr(parent, name, Void(child))


class Void(_StandIn):
    """Stands at the owner for token embeddings and head. Nothing may call it: token ids stay with the party."""

    def forward(self, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        """Refuse.

        Raises:
            ModelError: always.
        """
        raise ModelError(
            "The trunk of this model asks for token embeddings of its own.",
            expected="a model that can be entered behind its embeddings",
        )


def max_length_of(config: PreTrainedConfig) -> int | None:
    """Longest sequence that the model's position table allows, or None where positions are computed without bound."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    # RoBERTa-like models start counting after the padding index, so two places of the table are never reached.
    offset = text.pad_token_id + 1 if text.model_type in ("roberta", "xlm-roberta", "camembert") else 0
    return limit - offset
