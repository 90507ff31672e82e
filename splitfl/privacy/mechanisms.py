"""Step 4 of the journey: what a party does to a tensor before it leaves. One class a mechanism, every one in this file.

A mechanism takes activations or gradients [B, T, D] and their mask, and returns what goes on the wire: a tensor, or the
very bytes (`Coded`). It is called once for a send; a retry sends the same bytes again and never calls it again, since
fresh noise on the same numbers would be averaged away. None has a switch that turns its noise off, in evaluation or
anywhere else. Noise is public knowledge (its distribution) and nobody's to draw again (its values): no seed reaches it.

A bound is on replacing one unit by another, so its sensitivity is twice the clip norm. Epsilons are made from it in
`splitfl.privacy.calibration`. What guards the labels of a classifier is in `splitfl.privacy.labels`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol, get_args

import numpy as np
import torch

from splitfl.errors import InternalError, UsageError, nearest
from splitfl.privacy.clipping import Unit, clip_to_grid, gaussians, grid_step, real_only, uniforms
from splitfl.privacy.discrete import sampler
from splitfl.privacy.labels import marvell, max_norm, randomise_labels
from splitfl.wire.coding import Coded, encode_grid16, encode_int4, encode_int8, encode_topk

__all__ = [
    "Chain",
    "DChi",
    "Gauss",
    "GradientGauss",
    "Mechanism",
    "Quantise",
    "TopK",
    "marvell",
    "max_norm",
    "randomise_labels",
]

_CHUNK = 1 << 18  # numbers worked on at a time where a mechanism needs several float64 copies of them


class Mechanism(Protocol):
    """What every mechanism can do."""

    @property
    def name(self) -> str:
        """As settings and the ledger call it."""

    @property
    def coded(self) -> bool:
        """Whether `protect` returns `Coded`."""

    def protect(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | Coded:
        """What may leave instead of `x`.

        Args:
            x: floating [B, T, D].
            mask: integer or bool [B, T], 1 where there is a token; None if nothing is padded.

        Raises:
            ModelError: a real position holds NaN or infinity.
        """


@dataclass(frozen=True, kw_only=True)
class Gauss:
    """Clip, put on the grid, add discrete Gaussian noise to every coordinate of every position.

    Args:
        clip: largest L2 norm of one unit, in the scale of the activations.
        sigma: standard deviation of the noise on each coordinate, same scale.
        unit: ``"record"`` clips the norm over all of a row's positions and numbers; ``"token"`` clips each position,
            which bounds what one token does only where position t depends on token t alone: at the embedding output.

    Raises:
        UsageError: a setting that is no number above 0, an unknown unit, or a sigma too small beside the clip norm.

    Hides: with a stated sigma, one unit from whoever receives one send, in the sense of zero-concentrated differential
        privacy with rho = sensitivity^2 / (2 sigma^2) (Canonne, Kamath and Steinke 2020, theorem 4), up to the
        sampler's distance. Every further send of the same unit adds its rho.
    Does not hide: the number of positions and the mask; anything, where rho is large (see `calibration.verdict`).
    """

    clip: float
    sigma: float
    unit: Unit = "record"
    name: ClassVar[str] = "gauss"
    coded: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.unit not in get_args(Unit):
            raise UsageError(
                f"{self.unit!r} is no unit of a clip norm.",
                expected="record or token",
                hint=nearest(str(self.unit), get_args(Unit)),
            )
        grid_step(self.clip, self.sigma)

    @property
    def step(self) -> float:
        """Grid step, a power of two: what one unit of a code is worth. From the settings alone, never from the data."""
        return grid_step(self.clip, self.sigma)

    @property
    def sensitivity(self) -> float:
        """L2 distance by which replacing one unit moves what the noise is added to: at most this."""
        return 2 * self.clip

    def record_sensitivity(self, length: int) -> float:
        """The same for replacing a whole record of `length` positions.

        It is also what replacing *one* token can do behind a layer that mixes positions.
        """
        return self.sensitivity * (math.sqrt(length) if self.unit == "token" else 1.0)

    def on_grid(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The clipped grid points before the noise, int32 [B, T, D]; zero at padded positions. Never to be sent."""
        return clip_to_grid(real_only(x, mask), clip=self.clip, step=self.step, unit=self.unit)

    def protect(self, x: torch.Tensor, mask: torch.Tensor | None) -> Coded:
        """``grid16`` codes of `x` [B, T, D] with noise, padded positions included."""
        codes = self.on_grid(x, mask).cpu()
        noise = sampler(self.sigma / self.step).draw(codes.numel())
        codes += torch.from_numpy(noise).view(codes.shape)
        return encode_grid16(codes, self.step)  # saturates at 16 bits, which only works on what was already noised


@dataclass(frozen=True, kw_only=True)
class GradientGauss:
    """For the gradient channel: clip each position's gradient, add the same noise to all positions, masked ones too.

    Args:
        clip: largest L2 norm of one position's gradient.
        sigma: standard deviation of the noise on each coordinate.

    Raises:
        UsageError: as `Gauss`.

    Hides: which positions have no label (their gradient is zero, and zeros with noise look like small gradients with
        noise); with a stated sigma, one position's gradient, by the rho of `Gauss`.
    Does not hide: a label behind a top that mixes positions, for there one label moves every row's gradient up to the
        clip norm: use `record_sensitivity`. Lengths, unless the batch is padded to a fixed one.
    """

    clip: float
    sigma: float
    name: ClassVar[str] = "gradient-gauss"
    coded: ClassVar[bool] = True

    def __post_init__(self) -> None:
        grid_step(self.clip, self.sigma)

    @property
    def rows(self) -> Gauss:
        """The mechanism that works on each position."""
        return Gauss(clip=self.clip, sigma=self.sigma, unit="token")

    @property
    def sensitivity(self) -> float:
        """L2 distance by which replacing one position's gradient moves what the noise is added to: at most this."""
        return self.rows.sensitivity

    def record_sensitivity(self, length: int) -> float:
        """The same for the gradients of a whole record of `length` positions."""
        return self.rows.record_sensitivity(length)

    def protect(self, x: torch.Tensor, mask: torch.Tensor | None) -> Coded:
        """``grid16`` codes of the gradient `x` [B, T, D] with noise on every row."""
        return self.rows.protect(x, mask)


@dataclass(frozen=True, kw_only=True)
class DChi:
    """Metric noise of density proportional to exp(-eta * length), drawn for each token by itself.

    The length is Gamma(D, 1/eta) distributed, here the sum of D exponentials, which is the same; the direction is
    uniform (Feyisetan et al., "Privacy- and Utility-Preserving Textual Analysis via Calibrated Multivariate
    Perturbations", WSDM 2020, section 2.6). Its mean length is D / eta, so an eta means nothing without its D.

    Args:
        eta: per unit of distance, above 0.
        table: token embeddings [V, D]; each noisy token is then replaced by the nearest row in L2 distance.

    Raises:
        UsageError: `eta` not above 0, or a table that is no finite [V, D].

    Hides: one token at the embedding output from another one at distance r, up to a factor exp(eta * r) in probability.
    Does not hide: tokens far apart; report eta times the table's diameter beside eta. It is not (epsilon, delta)
        differential privacy. Without a table the noise is in floating point, whose low bits carry no promise.
    """

    eta: float
    table: torch.Tensor | None = field(default=None, repr=False, compare=False)
    name: ClassVar[str] = "dchi"
    coded: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.eta) and self.eta > 0):
            raise UsageError(f"eta = {self.eta:g} is no setting for metric noise.", expected="a finite number above 0")
        table = self.table
        if table is not None and not (
            table.dim() == 2 and len(table) and table.is_floating_point() and bool(torch.isfinite(table).all())
        ):
            raise UsageError(
                f"A table of {table.dtype} and shape {tuple(table.shape)} cannot be snapped to.",
                expected="finite token embeddings, floating [V, D]",
            )

    def protect(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """`x` [B, T, D] with noise on every position, in its own dtype; rows of the table where there is one."""
        width = x.shape[-1]
        if self.table is not None and self.table.shape[1] != width:
            raise UsageError(
                f"The table to snap to is {self.table.shape[1]} wide, the activations are {width}.",
                expected="the bottom's own embeddings, and a cut at their output",
            )
        tokens = real_only(x, mask).to("cpu", torch.float64).flatten(0, 1)
        parts = []
        for part in tokens.split(max(1, _CHUNK // width)):
            noisy = part + _metric_noise(len(part), width, self.eta)
            parts.append(noisy if self.table is None else _snapped(noisy, self.table))
        return torch.cat(parts).to(x.device, x.dtype).view(x.shape)


def _metric_noise(count: int, width: int, eta: float) -> torch.Tensor:
    """float64 [count, width]: for each row its own direction and its own length."""
    direction = gaussians((count, width))
    direction /= torch.linalg.vector_norm(direction, dim=1, keepdim=True)
    lengths = -np.log(uniforms(count * width)).reshape(count, width).sum(1) / eta
    return direction * torch.from_numpy(lengths)[:, None]


def _snapped(points: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """For each of `points` float64 [n, D] the row of `table` [V, D] at the smallest L2 distance, float64 [n, D]."""
    best = torch.full((len(points),), math.inf, dtype=torch.float64)
    index = torch.zeros(len(points), dtype=torch.long)
    chunk = max(1, 16 * _CHUNK // max(len(points), table.shape[1]))
    for start in range(0, len(table), chunk):
        rows = table[start : start + chunk].detach().to("cpu", torch.float64)
        # Squared distance less the point's own square, which is the same for all rows.
        distances = (rows * rows).sum(1) - 2 * (points @ rows.T)
        least, where = distances.min(dim=1)
        closer = least < best
        best = torch.where(closer, least, best)
        index = torch.where(closer, where + start, index)
    return table.detach()[index.to(table.device)].to("cpu", torch.float64)


@dataclass(frozen=True, kw_only=True)
class Quantise:
    """Fewer bits a number, with one scale a token. For bandwidth.

    Args:
        bits: 8 or 4.

    Raises:
        UsageError: another number of bits.

    Hides: nothing.
    Does not hide: anything; nearest-neighbour attacks are expected to read 8-bit activations as well as exact ones.
    """

    bits: Literal[8, 4] = 8
    name: ClassVar[str] = "quantise"
    coded: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.bits not in (8, 4):
            raise UsageError(f"There is no quantisation to {self.bits} bits.", expected="8 or 4")

    def protect(self, x: torch.Tensor, mask: torch.Tensor | None) -> Coded:
        """``int8`` or ``int4`` codes of `x` [B, T, D]; zeros at padded positions."""
        clean = real_only(x, mask)
        return encode_int8(clean) if self.bits == 8 else encode_int4(clean)


@dataclass(frozen=True, kw_only=True)
class TopK:
    """Of each token only the numbers of largest magnitude. For bandwidth.

    Args:
        kept: how many, 1 to D.

    Raises:
        UsageError: below 1; in `protect`, above D.

    Hides: nothing.
    Does not hide: anything; *which* numbers are the largest crosses too, and says much about the token.
    """

    kept: int
    name: ClassVar[str] = "topk"
    coded: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.kept < 1:
            raise UsageError(f"{self.kept} numbers of each token cannot be kept.", expected="1 to the width of the cut")

    def protect(self, x: torch.Tensor, mask: torch.Tensor | None) -> Coded:
        """``topk`` codes of `x` [B, T, D]; zeros at padded positions."""
        if self.kept > x.shape[-1]:
            raise UsageError(
                f"{self.kept} numbers of each token cannot be kept.", expected=f"1 to {x.shape[-1]}, the width"
            )
        return encode_topk(real_only(x, mask), self.kept)


@dataclass(frozen=True)
class Chain:
    """Several mechanisms, one after the other.

    Args:
        mechanisms: in the order in which they work; only the last may return codes, for nothing can be done to those.

    Raises:
        UsageError: none at all, or one that returns codes before the last.

    Hides: what its parts hide: what comes after a noise only works on what that noise let through.
    Does not hide: more than that; the parts' bounds are each for the numbers that reach the part.
    """

    mechanisms: tuple[Mechanism, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "mechanisms", tuple(self.mechanisms))
        if not self.mechanisms:
            raise UsageError("A chain of no mechanisms was asked for.", hint="name one, or leave the chain out")
        for early in self.mechanisms[:-1]:
            if early.coded:
                raise UsageError(
                    f"{early.name!r} stands before {self.mechanisms[-1].name!r} in a chain, and returns codes.",
                    expected="gauss, gradient-gauss, quantise or topk once, and last",
                    hint=f"put {early.name!r} last, or leave out what follows it",
                )

    @property
    def name(self) -> str:
        """The parts' names with a plus between them."""
        return "+".join(mechanism.name for mechanism in self.mechanisms)

    @property
    def coded(self) -> bool:
        """Whether the last part returns codes."""
        return self.mechanisms[-1].coded

    def protect(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | Coded:
        """What the last part makes of `x` [B, T, D]."""
        *early, last = self.mechanisms
        for mechanism in early:
            result = mechanism.protect(x, mask)
            if isinstance(result, Coded):
                raise InternalError(f"{mechanism.name!r} returned codes and had said that it would not.")
            x = result
        return last.protect(x, mask)
