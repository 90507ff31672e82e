"""An owner that lies about gradients, to train the party's bottom into one that it reads better. No attack on a `View`.

After feature-space hijacking (FSHA: Pasquini, Ateniese and Bernaschi, CCS 2021). `Hijack` stands where the trunk's link
stands: it answers forwards honestly, and in place of the gradient gives one of its own objective, as long as the true
one, so that clipping by size does not see it. The objective needs no token of the party's: the states shall look to an
inverter taught on the base bottom (`splitfl.audit.attacks.sip`) like what it knows. It is the entropy of what the
inverter reads, and the distance of the states' mean and spread from those of the attacker's own text.

Whatever trains is the caller's: `party.hijack_sandbox` puts a party's model behind it. A bottom that is not trained
asks for no gradient, and the lever is gone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.nn.functional import normalize

from splitfl.audit.attacks.sip import Taught
from splitfl.link import TrunkLink, TrunkRequest, decoded
from splitfl.wire.coding import Coded


@dataclass(kw_only=True)
class Heard:
    """What the owner got, for the comparison: the latest states of each forward, and how many lies it told."""

    hidden: list[torch.Tensor] = field(default_factory=list)
    """[B, T, D] of each forward, as the owner computes with it; emptied by whoever reads it."""
    lies: int = 0


class Hijack:
    """A `splitfl.link.TrunkLink` of an owner that lies in its backwards.

    Args:
        link: the road to the trunk.
        taught: the owner's inverter, from the base bottom.
        honest: pass gradients through as they are: the comparison.
        strength: length of the false gradient, in lengths of the true one.
    """

    def __init__(self, link: TrunkLink, taught: Taught, *, honest: bool = False, strength: float = 1.0) -> None:
        self.link, self.taught, self.honest, self.strength = link, taught, honest, strength
        self.heard = Heard()
        self._held: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def forward(self, request: TrunkRequest) -> tuple[torch.Tensor, int]:
        """See `splitfl.link.TrunkLink`."""
        output, step = self.link.forward(request)
        hidden = decoded(request.hidden).detach().float()
        self.heard.hidden.append(hidden)
        if request.keep:
            self._held[step] = hidden, request.mask
        return output, step

    def backward(self, step: int, gradient: torch.Tensor | Coded) -> torch.Tensor:
        """See `splitfl.link.TrunkLink`; the gradient is false unless the owner is honest."""
        true = self.link.backward(step, gradient)
        hidden, mask = self._held.pop(step)
        if self.honest:
            return true
        self.heard.lies += 1
        false = self.lie(hidden, mask)
        return (normalize(false.reshape(-1), dim=0).view_as(false) * true.norm() * self.strength).to(true.dtype)

    def release(self, *, caches: tuple[int, ...] = (), steps: tuple[int, ...] = ()) -> None:
        """See `splitfl.link.TrunkLink`."""
        for step in steps:
            self._held.pop(step, None)
        self.link.release(caches=caches, steps=steps)

    def lie(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Gradient [B, T, D] of the owner's own objective at `hidden`; zero where there is padding."""
        entry = hidden.clone().requires_grad_(True)
        with torch.enable_grad():
            inside = entry if mask is None else entry * mask[..., None].float()
            standard = self.taught.lessons.standard(inside)
            logs = self.taught.network(standard).log_softmax(-1)
            real = torch.ones(hidden.shape[:2]) if mask is None else mask.float()
            unsure = (-(logs.exp() * logs).sum(-1) * real).sum() / real.sum()
            chosen = standard[real.bool()]
            apart = chosen.mean(0).square().mean() + (chosen.std(0) - 1).square().mean()
            (found,) = torch.autograd.grad(unsure + apart, entry)
        return found


def read_share(taught: Taught, hidden: torch.Tensor, ids: torch.Tensor, counted: torch.Tensor) -> float:
    """Share of the tokens `ids` [B, T] that the owner's inverter reads off `hidden` [B, T, D], where `counted` is 1."""
    right = total = 0
    for states, row, real in zip(hidden, ids, counted.bool(), strict=True):
        right += int((taught.logits(states[real]).argmax(-1) == row[real]).sum())
        total += int(real.sum())
    return right / max(total, 1)
