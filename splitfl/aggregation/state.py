"""What all parties share when a round starts, as tensors and as bytes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from splitfl.aggregation.factors import Layout, Pair, Tensors, Update
from splitfl.aggregation.low_rank import squeezed, stacked
from splitfl.errors import ModelError, WireError, printable

_SEEDS = 1 << 63


@dataclass(frozen=True, eq=False, kw_only=True)
class State:
    """What all parties share when a round starts; of one federation all have the same bits.

    The model is base weights + `merged` + `adapter`.
    """

    adapter: Update
    merged: Mapping[str, Pair] = field(default_factory=dict)
    """Changes that are added to the base weights for good. Their rank grows to min(d_in, d_out) and no further."""
    gradient: Tensors = field(default_factory=dict)
    """Mean gradient of the cores by module, [r, r], where a rule corrects with it."""
    seed: int = 0
    """Of the factors that are drawn anew; public."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < _SEEDS:
            raise ModelError("The seed of a federation is out of range.", expected=f"0 to {_SEEDS - 1}")
        for name, pair in self.merged.items():
            if name not in self.adapter.pairs or pair.widths != self.adapter.pairs[name].widths:
                raise ModelError(f"What was merged into {printable(name)} does not belong to the adapter.")
        if self.gradient and self.gradient.keys() != self.adapter.pairs.keys():
            raise ModelError("The gradients of a state are not those of its modules.")

    @property
    def layout(self) -> Layout:
        """Of the adapter."""
        return Layout.of(self.adapter)

    @property
    def digest(self) -> str:
        """BLAKE2b of everything, bits of tensors included; 64 hexadecimal digits."""
        total = hashlib.blake2b(self.layout.digest.encode(), digest_size=32)
        for name, tensor in sorted(self._tensors()):
            total.update(f"{name}\0{tuple(tensor.shape)}\0".encode())
            total.update(tensor.contiguous().numpy().tobytes())
        return total.hexdigest()

    def merging(self, changes: Mapping[str, Pair]) -> dict[str, Pair]:
        """`merged` with `changes` added to it."""
        merged = dict(self.merged)
        for name, change in changes.items():
            if change.rank:
                merged[name] = squeezed(stacked([merged[name], change]) if name in merged else change)
        return merged

    def to_bytes(self) -> bytes:
        """As safetensors."""
        return save({name: tensor.contiguous().clone() for name, tensor in self._tensors()})

    @classmethod
    def from_bytes(cls, data: bytes, like: State | None = None) -> State:
        """The state that `to_bytes` wrote.

        Args:
            data: from a peer; no longer than the caller is willing to hold twice.
            like: a state of the same federation: modules, widths and what is tuned whole must be the same.

        Raises:
            WireError: it is none.
        """
        try:
            tensors = load(data)
            state = _read(tensors)
        except (SafetensorError, ModelError, KeyError, ValueError, RuntimeError) as error:
            raise WireError(f"A state of a federation cannot be read ({type(error).__name__}).") from error
        if like is not None and _shape_of(state) != _shape_of(like):
            raise WireError("A state of another federation came: its modules or its head differ.")
        return state

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for kind, pairs in (("adapter", self.adapter.pairs), ("merged", self.merged)):
            for name, pair in pairs.items():
                yield f"{kind}/{name}/a", pair.a
                yield f"{kind}/{name}/b", pair.b
                yield f"{kind}/{name}/scale", torch.tensor([pair.scale], dtype=torch.float64)
                if pair.core is not None:
                    yield f"{kind}/{name}/core", pair.core
        yield from ((f"extras/{name}", tensor) for name, tensor in self.adapter.extras.items())
        yield from ((f"gradient/{name}", tensor) for name, tensor in self.gradient.items())
        yield "seed", torch.tensor([self.seed], dtype=torch.int64)


def _shape_of(state: State) -> tuple[list[tuple[str, int, int]], tuple[tuple[str, tuple[int, ...]], ...]]:
    """What stays the same from round to round; a rank may change."""
    return [(m.name, m.d_in, m.d_out) for m in state.layout.modules], state.layout.extras


def _read(tensors: Mapping[str, torch.Tensor]) -> State:
    found: dict[str, dict[str, dict[str, torch.Tensor]]] = {"adapter": {}, "merged": {}}
    whole: dict[str, dict[str, torch.Tensor]] = {"extras": {}, "gradient": {}}
    for key, tensor in tensors.items():
        kind, _, rest = key.partition("/")
        if not torch.isfinite(tensor).all():
            raise ModelError(f"{printable(key)} holds values that are not finite.")
        if kind in found:
            name, _, last = rest.rpartition("/")
            found[kind].setdefault(name, {})[last] = tensor
        elif key != "seed":
            whole[kind][rest] = tensor
    pairs = {kind: {name: _pair(parts) for name, parts in modules.items()} for kind, modules in found.items()}
    merged = Update(pairs["merged"])  # for its checks
    return State(
        adapter=Update(pairs["adapter"], whole["extras"]),
        merged=merged.pairs,
        gradient=Update({}, whole["gradient"]).extras,
        seed=int(tensors["seed"].item()),
    )


def _pair(parts: Mapping[str, torch.Tensor]) -> Pair:
    if not {"a", "b", "scale"} <= parts.keys() <= {"a", "b", "scale", "core"}:
        raise ModelError("A pair of factors is not whole.")
    return Pair(parts["a"], parts["b"], float(parts["scale"].double().item()), parts.get("core"))


def fresh_factor(seed: int, name: str, rank: int, d_in: int, *, draw: int = 0) -> torch.Tensor:
    """A factor A as LoRA draws it, uniform within 1/sqrt(d_in); float32 [rank, d_in], the same bits on every machine.

    From the raw words of a counter generator, whose stream is fixed by its publication; no library's idea of a uniform
    distribution is asked. It protects nothing: the seed is public.
    """
    told = hashlib.blake2b(f"{seed}\0{draw}\0{name}".encode(), digest_size=16).digest()
    words = np.random.Philox(key=int.from_bytes(told, "little")).random_raw(rank * d_in)
    unit = (words >> np.uint64(40)).astype(np.float32) * np.float32(2**-23) - np.float32(1.0)
    return torch.from_numpy(unit * np.float32(1 / math.sqrt(d_in))).reshape(rank, d_in)


def fresh_pair(pair: Pair, seed: int, name: str, *, draw: int = 0) -> Pair:
    """An adapter of the shape of `pair` that changes nothing yet: A drawn, B zero."""
    a = fresh_factor(seed, name, pair.rank, pair.widths[0], draw=draw)
    return Pair(a, torch.zeros_like(pair.b), pair.scale)
