"""The model of one `fedmod` peer: the whole encoder, LoRA that starts alike everywhere, and a head of its own.

Only the LoRA factors ever leave; `Layout` says in which order, and its digest is what peers compare before they talk.

Legend: P numbers of the adapter, F features of the encoder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from peft import PeftModel
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from splitfl.adapters import add_lora, lora_config
from splitfl.config_mesh import FedmodSettings
from splitfl.cut import Plan
from splitfl.data import Collator, Example
from splitfl.errors import ModelError
from splitfl.kit import make_plan
from splitfl.load import load_config, load_party_side, tensor_names
from splitfl.sketch import DIRECTIONS, Floats
from splitfl.wire.mesh_messages import Part

_PUBLIC_TEXTS, _PUBLIC_LENGTH = 64, 16  # of random tokens, for the centre of the features
_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The two factors of one module: its change is ``scaling * B @ A``."""

    a: str
    b: str
    scaling: float


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where each LoRA factor stands in the vector that crosses: in name order, end to end."""

    places: dict[str, slice]
    shapes: dict[str, tuple[int, ...]]
    pairs: tuple[Pair, ...]

    @property
    def size(self) -> int:
        """P."""
        return max(place.stop for place in self.places.values())

    def chosen(self, part: Part) -> torch.Tensor:
        """Which numbers of the vector belong to `part`, bool [P]."""
        mask = torch.zeros(self.size, dtype=torch.bool)
        for name, place in self.places.items():
            mask[place] = part == "all" or f".lora_{part}." in name
        return mask

    def factor(self, vector: torch.Tensor, name: str) -> torch.Tensor:
        """One factor out of a vector, as a matrix."""
        return vector[self.places[name]].view(self.shapes[name])


@dataclass(frozen=True, kw_only=True)
class PeerModel:
    """What `open_peer_model` made."""

    model: PeftModel
    layout: Layout
    fingerprint: str
    """Of the full model's files."""
    start: torch.Tensor
    """The adapter before training, float32 [P]; alike at every peer."""

    def vector(self) -> torch.Tensor:
        """The adapter as it is, float32 [P]."""
        named = dict(self.model.named_parameters())
        return torch.cat([named[name].detach().reshape(-1).clone() for name in self.layout.places])

    def put(self, vector: torch.Tensor) -> None:
        """Write `vector` [P] into the adapter."""
        named = dict(self.model.named_parameters())
        with torch.no_grad():
            for name in self.layout.places:
                named[name].copy_(self.layout.factor(vector, name))

    def trainable(self) -> dict[str, nn.Parameter]:
        """LoRA and head, by name."""
        return {
            name: p for name, p in sorted(self.model.named_parameters()) if "lora_" in name or "modules_to_save" in name
        }

    def digest(self, settings: FedmodSettings, classes: int) -> str:
        """Hash of all that two peers must agree on: tensors, their start, the rule, the kind of sketch."""
        layout = [(name, self.layout.shapes[name]) for name in self.layout.places]
        facts = {
            "tensors": layout,
            "scaling": [pair.scaling for pair in self.layout.pairs],
            "start": hashlib.blake2b(self.start.numpy().astype("<f4").tobytes(), digest_size=16).hexdigest(),
            "rule": settings.rule,
            "sketch": [DIRECTIONS, settings.start_seed, classes if settings.sketch_labels else 0],
        }
        return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def plan_whole(model_dir: Path) -> Plan:
    """A plan in which this side holds every layer.

    Raises:
        ModelError: no model of a family that can be used here.
    """
    config = load_config(model_dir)
    layers = int(getattr(config.get_text_config(), "num_hidden_layers", 1))
    plan = make_plan(model_dir, bottom=layers - 1, top=0, task="sequence-classification", config=config)
    return msgspec.structs.replace(plan, bottom=plan.layers)


def open_base(model_dir: Path, plan: Plan, label2id: dict[str, int], seed: int) -> PreTrainedModel:
    """The whole model, float32, frozen, with a new head for these classes that `seed` draws."""
    config = load_config(model_dir)
    config.id2label = {number: name for name, number in label2id.items()}
    config.label2id = dict(label2id)
    torch.manual_seed(seed)
    model = load_party_side(model_dir, plan, dtype=torch.float32, config=config, new_head=True)
    return model.requires_grad_(False).eval()


def with_adapter(base: PreTrainedModel, plan: Plan, settings: FedmodSettings, fingerprint: str) -> PeerModel:
    """`base` with LoRA that starts alike at every peer, and its head trainable."""
    config = lora_config(
        base, plan, r=settings.r, lora_alpha=settings.lora_alpha, lora_dropout=settings.lora_dropout,
        target_modules=list(settings.target_modules) or None,
    )  # fmt: skip
    model = add_lora(base, config, seed=settings.start_seed)
    layout = _layout(model)
    made = PeerModel(model=model, layout=layout, fingerprint=fingerprint, start=torch.zeros(0))
    return PeerModel(model=model, layout=layout, fingerprint=fingerprint, start=made.vector())


def _layout(model: PeftModel) -> Layout:
    named = {name: p for name, p in sorted(model.named_parameters()) if ".lora_A." in name or ".lora_B." in name}
    places, at = {}, 0
    for name, parameter in named.items():
        places[name] = slice(at, at := at + parameter.numel())
    pairs = []
    for name in named:
        if ".lora_A." in name:
            module: Any = model.get_submodule(name.partition(".lora_A.")[0])
            scaling = float(module.scaling["default"])
            pairs.append(Pair(a=name, b=name.replace(".lora_A.", ".lora_B."), scaling=scaling))
    if not pairs:
        raise ModelError("This model got no LoRA factors to exchange.", hint="name modules with --target-modules")
    return Layout(places=places, shapes={n: tuple(p.shape) for n, p in named.items()}, pairs=tuple(pairs))


def fingerprint_model(model_dir: Path) -> str:
    """Hash of every tensor of a checkpoint: name, dtype, shape, bytes. 32 hexadecimal digits."""
    whole = hashlib.blake2b(digest_size=16)
    for name, file in sorted(tensor_names(model_dir).items()):
        with safe_open(file, framework="pt") as tensors:
            tensor = tensors.get_tensor(name)
        whole.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        whole.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()


# ---- features for the sketch


@torch.no_grad()
def features_of(base: PreTrainedModel, examples: Sequence[Example], collator: Collator) -> Floats:
    """Mean of the public encoder's last hidden states over each row's tokens, float64 [N, F]; no adapter in it."""
    order = sorted(range(len(examples)), key=lambda index: len(examples[index]["input_ids"]))
    found: list[np.ndarray[Any, Any]] = [np.zeros(0)] * len(examples)
    for start in range(0, len(order), _BATCH):
        chosen = order[start : start + _BATCH]
        batch = collator([{k: v for k, v in examples[index].items() if k != "labels"} for index in chosen])
        hidden = base.base_model(**batch).last_hidden_state
        weight = batch["attention_mask"][..., None].to(hidden.dtype)
        pooled = (hidden * weight).sum(1) / weight.sum(1)
        for index, row in zip(chosen, pooled.double().numpy(), strict=True):
            found[index] = row
    return np.stack(found)


def public_centre(base: PreTrainedModel, collator: Collator, seed: int) -> Floats:
    """Mean of the features of texts of random tokens, float64 [F]: what all texts have in common, from no row."""
    vocabulary = int(base.config.get_text_config().vocab_size)
    drawn = np.random.Generator(np.random.PCG64([seed, vocabulary])).integers(
        0, vocabulary, (_PUBLIC_TEXTS, _PUBLIC_LENGTH)
    )
    examples = [{"input_ids": row.tolist(), "attention_mask": [1] * _PUBLIC_LENGTH} for row in drawn]
    centre: Floats = features_of(base, examples, collator).mean(axis=0)
    return centre
