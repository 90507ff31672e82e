"""A model with some layers taken out by hand: a new model of fewer layers, with the weights of those that stay.

Nothing of splitfl is used, so that it can be compared with what splitfl leaves out.
"""

from __future__ import annotations

import copy
import re

import torch
from transformers import PreTrainedModel


def without_layers(model: PreTrainedModel, gone: set[int]) -> PreTrainedModel:
    """`model` as a smaller model of its own class, its layers numbered anew."""
    text = model.config
    depth = text.num_hidden_layers
    stay = [index for index in range(depth) if index not in gone]
    config = copy.deepcopy(text)
    config.num_hidden_layers = len(stay)
    if getattr(text, "layer_types", None):
        config.layer_types = [text.layer_types[index] for index in stay]
    small = type(model)(config)
    numbers = {old: new for new, old in enumerate(stay)}
    state = {}
    for name, tensor in model.state_dict().items():
        found = re.fullmatch(r"(.*?(?:layers|layer|h)\.)(\d+)(\..*)", name)
        if found is None:
            state[name] = tensor
        elif int(found[2]) in numbers:
            state[f"{found[1]}{numbers[int(found[2])]}{found[3]}"] = tensor
    with torch.no_grad():
        left, right = small.load_state_dict(state, strict=False)
    assert not right, right
    assert not [name for name in left if "lm_head" not in name], left  # a tied head
    small.tie_weights()
    return small.requires_grad_(False).eval()
