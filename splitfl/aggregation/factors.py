"""One party's adapter as factors, and the one flat vector of it that is summed.

    r  rank    d_in, d_out  width of the module before and after    n  values of the vector

A module's weight changes by ``scale * b @ a``, or ``scale * b @ core @ a`` where a rule trains a small core between two
fixed factors. The scale (alpha/r, or alpha/sqrt(r)) stays beside the factors, because most federations have one scale
for all and a multiplication would cost bits: one party alone must get its own adapter back, bit for bit. Where scales
differ, B is brought to the scale of the layout before anything is added. Leaving that out is the commonest mistake in
published code: a mean of B with different scales belongs to no model.

The vector: modules by name, of each A then B, row by row; then what is tuned whole (heads, biases) by name.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import numpy as np
import torch

from splitfl.aggregation.sums import Vector
from splitfl.errors import ModelError, WireError, printable

Part: TypeAlias = Literal["A", "B", "both", "core"]
"""Which values are trained or sent; what is tuned whole goes with each of them."""
Tensors: TypeAlias = Mapping[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Pair:
    """How one module's weight changes: ``scale * b @ core @ a``; without a core, ``scale * b @ a``."""

    a: torch.Tensor
    """float32 [r, d_in], on the CPU."""
    b: torch.Tensor
    """float32 [d_out, r], on the CPU."""
    scale: float = 1.0
    core: torch.Tensor | None = None
    """float32 [r, r]."""

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a.shape[0]

    @property
    def widths(self) -> tuple[int, int]:
        """d_in, d_out."""
        return self.a.shape[1], self.b.shape[0]

    def wide(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors in float64 whose product is the whole change: [d_out, r], scale and core included, and [r, d_in]."""
        b = self.b.double() * self.scale
        return (b if self.core is None else b @ self.core.double()), self.a.double()

    def at_scale(self, scale: float) -> Pair:
        """The same change, written with another scale; without arithmetic if it is written so already."""
        if scale == self.scale:
            return self
        ratio = self.scale / scale
        if self.core is not None:
            return replace(self, core=(self.core.double() * ratio).float(), scale=scale)
        return replace(self, b=(self.b.double() * ratio).float(), scale=scale)

    def without_core(self) -> Pair:
        """The same change with the core multiplied into B."""
        if self.core is None:
            return self
        return Pair(self.a, (self.b.double() @ self.core.double()).float(), self.scale)


@dataclass(frozen=True, eq=False)
class Update:
    """An adapter: one pair for each module, and the tensors that are tuned whole.

    Raises:
        ModelError: a tensor that cannot be part of one: its dtype, device, or shape.
    """

    pairs: Mapping[str, Pair]
    extras: Tensors = field(default_factory=dict)
    """A tuned head, biases: float32 of any shape, on the CPU; combined as weighted means."""

    def __post_init__(self) -> None:
        for name, pair in self.pairs.items():
            _check_pair(name, pair)
        for name, tensor in self.extras.items():
            _check_dtype(name, tensor)

    def map(self, change: Callable[[str, Pair], Pair], extras: Tensors | None = None) -> Update:
        """`change` of every pair; the extras as they are, unless others are given."""
        pairs = {name: change(name, pair) for name, pair in self.pairs.items()}
        return Update(pairs, self.extras if extras is None else extras)

    @property
    def ranks(self) -> set[int]:
        """The ranks of its modules."""
        return {pair.rank for pair in self.pairs.values()}


@dataclass(frozen=True, order=True)
class Module:
    """What everybody must agree on of one module."""

    name: str
    d_in: int
    d_out: int
    rank: int
    scale: float
    core: bool = False


@dataclass(frozen=True)
class Layout:
    """Which value belongs where in the vector of an update."""

    modules: tuple[Module, ...]
    """By name."""
    extras: tuple[tuple[str, tuple[int, ...]], ...]
    """Name and shape, by name."""

    @classmethod
    def of(cls, update: Update) -> Layout:
        """The layout that `update` has."""
        modules = (
            Module(name, *pair.widths, pair.rank, pair.scale, pair.core is not None)
            for name, pair in update.pairs.items()
        )
        extras = ((name, tuple(tensor.shape)) for name, tensor in update.extras.items())
        return cls(tuple(sorted(modules)), tuple(sorted(extras)))

    @property
    def digest(self) -> str:
        """BLAKE2b of names, widths, ranks, scales and shapes; 64 hexadecimal digits."""
        modules = [[m.name, m.d_in, m.d_out, m.rank, float(m.scale).hex(), m.core] for m in self.modules]
        text = json.dumps([modules, [[name, list(shape)] for name, shape in self.extras]])
        return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()

    def length(self, part: Part = "both", *, extras: bool = True) -> int:
        """Values in the vector."""
        return sum(math.prod(shape) for _, _, shape in self._slots(part, extras))

    def to_vector(self, update: Update, part: Part = "both", *, extras: bool = True) -> Vector:
        """The values of `update`, brought to the scales of this layout; float32 [n].

        Raises:
            ModelError: it has other modules, tensors or shapes, or a value that is not finite.
        """
        self._check_names(update)
        vector, start = np.empty(self.length(part, extras=extras), dtype=np.float32), 0
        scales = {module.name: module.scale for module in self.modules}
        scaled = {name: pair.at_scale(scales[name]) for name, pair in update.pairs.items()}
        for name, kind, shape in self._slots(part, extras):
            tensor = update.extras[name] if kind == "whole" else _factor(scaled[name], kind)
            if tensor is None or tuple(tensor.shape) != shape:
                came = "is not there" if tensor is None else f"has shape {tuple(tensor.shape)}"
                raise ModelError(f"{_called(name, kind)} {came}.", expected=str(shape))
            _check_finite(_called(name, kind), tensor)
            size = tensor.numel()
            vector[start : start + size] = tensor.reshape(-1).numpy()
            start += size
        return vector

    def from_vector(
        self, vector: Vector, part: Part = "both", *, onto: Update | None = None, extras: bool = True
    ) -> Update:
        """The update that a vector of this layout is.

        Args:
            onto: where the values come from that are not in the vector; needed unless all of them are.

        Raises:
            WireError: of another length or dtype, or with values that are not finite.
        """
        expected = self.length(part, extras=extras)
        if vector.dtype != np.float32 or vector.shape != (expected,):
            raise WireError(
                f"A vector of shape {vector.shape} and dtype {vector.dtype} is no update of this federation.",
                expected=f"({expected},) of float32",
            )
        found: dict[tuple[str, str], torch.Tensor] = {}
        start = 0
        for name, kind, shape in self._slots(part, extras):
            size = math.prod(shape)
            tensor = torch.from_numpy(vector[start : start + size].copy()).reshape(shape)
            _check_finite(_called(name, kind), tensor, WireError)
            found[name, kind] = tensor
            start += size
        return self._assembled(found, onto)

    def _assembled(self, found: Mapping[tuple[str, str], torch.Tensor], onto: Update | None) -> Update:
        pairs = {}
        for module in self.modules:
            old = None if onto is None else onto.pairs[module.name].at_scale(module.scale)
            a, b, core = (found.get((module.name, kind), _factor(old, kind)) for kind in ("A", "B", "core"))
            if a is None or b is None:
                raise ModelError(f"A part of {module.name} is not in the vector and nothing stands in for it.")
            pairs[module.name] = Pair(a, b, module.scale, core)
        extras = dict(onto.extras) if onto is not None else {}
        extras.update({name: found[name, "whole"] for name, _ in self.extras if (name, "whole") in found})
        return Update(pairs, extras)

    def _slots(self, part: Part, extras: bool) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Name, kind and shape of every tensor of the vector, in order."""
        for m in self.modules:
            if part in ("A", "both"):
                yield m.name, "A", (m.rank, m.d_in)
            if part in ("B", "both"):
                yield m.name, "B", (m.d_out, m.rank)
            if part == "core":
                yield m.name, "core", (m.rank, m.rank)
        if extras:
            for name, shape in self.extras:
                yield name, "whole", shape

    def _check_names(self, update: Update) -> None:
        for what, given, own in (
            ("module", set(update.pairs), {module.name for module in self.modules}),
            ("tensor", set(update.extras), {name for name, _ in self.extras}),
        ):
            if given != own:
                first = printable(min(given ^ own))
                raise ModelError(
                    f"The {what} {first} is {'not ' if first in given else ''}part of this federation's adapter"
                    f"{'.' if first in given else ', and the update lacks it.'}",
                    hint="all parties need the same --target-modules, --bias and task",
                )


def _factor(pair: Pair | None, kind: str) -> torch.Tensor | None:
    if pair is None:
        return None
    return {"A": pair.a, "B": pair.b, "core": pair.core}[kind]


def _called(name: str, kind: str) -> str:
    """How an error speaks of a tensor."""
    return printable(name) if kind == "whole" else f"Factor {kind} of {printable(name)}"


def _check_pair(name: str, pair: Pair) -> None:
    square = pair.core is None or tuple(pair.core.shape) == (pair.rank, pair.rank)
    if pair.a.ndim != 2 or pair.b.ndim != 2 or pair.a.shape[0] != pair.b.shape[1] or not square:
        shapes = [tuple(t.shape) for t in (pair.a, pair.b, pair.core) if t is not None]
        raise ModelError(
            f"Factors of shapes {', '.join(map(str, shapes))} do not make a change of {printable(name)}.",
            expected="A [r, d_in], B [d_out, r] and, if there is one, core [r, r]",
        )
    if not (math.isfinite(pair.scale) and pair.scale > 0):
        raise ModelError(f"The scale of {printable(name)} is no positive number.")
    for kind in ("A", "B", "core"):
        tensor = _factor(pair, kind)
        if tensor is not None:
            _check_dtype(_called(name, kind), tensor)


def _check_dtype(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        raise ModelError(
            f"{printable(name)} is {tensor.dtype} on {tensor.device.type}.", expected="torch.float32 on the CPU"
        )


def _check_finite(name: str, tensor: torch.Tensor, error: type[ModelError] | type[WireError] = ModelError) -> None:
    if not torch.isfinite(tensor).all():
        raise error(
            f"{name} holds values that are not finite.",
            hint="a lower --learning-rate, or --dtype float32" if error is ModelError else None,
        )
