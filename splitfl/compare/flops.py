"""Floating-point operations of training, from the shapes of the model's matrices.

A matrix [m, n] costs 2 m n operations a token forward; backward as many again for the gradient of its input, and
nothing for its own, since it is frozen. LoRA of rank r on it adds two matrices, r (m + n) values together, whose own
gradients are computed too: 2, 2 and 2. Attention costs 4 T D a token forward, T positions and width D, twice that
backward. Counted by torch as `splitfl bench` does it, the same come out (`tests/compare/test_flops.py`); embeddings,
norms, activation functions and optimisers are no matrix products and left out, as they are there.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from splitfl.errors import ModelError

_LAYER = re.compile(r"\.(?:layers|layer|h|blocks)\.(\d+)\.")
_LARGEST_HEADER = 100 * 2**20


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What the operations of a model depend on."""

    layers: tuple[tuple[tuple[int, int], ...], ...]
    """Shapes of the matrices of each layer."""
    width: int
    head: int
    """Values of the head that works on every position; 0 for a classifier, whose head sees one position a row."""

    def layer(self, number: int, length: float, rank: int, *, backward: bool) -> float:
        """Operations a token of one layer.

        Args:
            number: from 0.
            length: mean positions of a row.
            rank: of the LoRA on each of its matrices; 0 without.
            backward: whether gradients pass as well.
        """
        matrices = sum(m * n for m, n in self.layers[number])
        low_rank = rank * sum(m + n for m, n in self.layers[number])
        attention = 4 * length * self.width
        forward = 2 * matrices + 2 * low_rank + attention
        return forward + (2 * matrices + 4 * low_rank + 2 * attention if backward else 0)


def read_shapes(model: Path, *, classifies: bool) -> Shapes:
    """Shapes of the matrices in a model directory, from the heads of its safetensors files; nothing else is read.

    Raises:
        ModelError: no safetensors, or no layers that can be told by their names.
    """
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    found: dict[int, list[tuple[int, int]]] = {}
    for path in sorted(model.glob("*.safetensors")):
        for name, shape in _header(path).items():
            layer = _LAYER.search("." + name)
            if layer is not None and len(shape) == 2:
                found.setdefault(int(layer[1]), []).append((shape[0], shape[1]))
    if not found or sorted(found) != list(range(len(found))):
        raise ModelError(f"The layers of {model} cannot be told by the names of its tensors.")
    width = int(next(config[key] for key in ("hidden_size", "n_embd", "d_model") if key in config))
    head = 0 if classifies else width * int(config["vocab_size"])
    return Shapes(layers=tuple(tuple(found[number]) for number in sorted(found)), width=width, head=head)


def _header(path: Path) -> Mapping[str, tuple[int, ...]]:
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        if size > _LARGEST_HEADER:
            raise ModelError(f"{path} is no safetensors file.")
        head = json.loads(file.read(size))
    return {name: tuple(entry["shape"]) for name, entry in head.items() if name != "__metadata__"}


@dataclass(frozen=True, kw_only=True)
class Work:
    """How much passed through the model in training."""

    trained: float
    """Tokens of training steps, forward and backward."""
    passed: float = 0.0
    """Tokens that passed forward alone: a gradient-free design's one pass over the rows, answers to public rows."""
    length: float
    """Mean tokens of a row."""
    rank: int


def operations(shapes: Shapes, protocol: str | None, bottom: int, top: int, emulator: int, work: Work) -> tuple[
    float, float
]:  # fmt: skip
    """Operations of one party, and of the owner for it.

    Args:
        shapes: of the model.
        protocol: its name; None for the reference, on the whole model.
        bottom: layers below the cut.
        top: layers above it.
        emulator: layers that stand for the trunk, where there is an emulator.
        work: what passed.
    """
    count = len(shapes.layers)
    low, middle, high = range(bottom), range(bottom, count - top), range(count - top, count)

    def cost(layers: range, rank: int, *, backward: bool) -> float:
        return sum(shapes.layer(number, work.length, rank, backward=backward) for number in layers)

    head = 4 * shapes.head
    if protocol == "guarded-gradfree":
        party = work.passed * cost(low, 0, backward=False)
        party += work.trained * (cost(high, work.rank, backward=True) + head)
        return party, work.passed * cost(middle, 0, backward=False)
    edges = cost(low, work.rank, backward=True) + cost(high, work.rank, backward=True) + head
    if protocol == "guarded-offline":
        return work.trained * (edges + emulator / max(len(middle), 1) * cost(middle, 0, backward=True)), 0.0
    if protocol in ("split", "guarded-online", "fed-split"):
        return work.trained * edges, work.trained * cost(middle, 0, backward=True)
    whole = range(count)
    party = work.trained * (cost(whole, work.rank, backward=True) + head)
    return party + work.passed * (cost(whole, work.rank, backward=False) + head / 2), 0.0
