"""What a lying owner would gain from this party's training: a sandbox in one process, nothing leaves.

The party's own model is tuned for some steps behind `splitfl.audit.attacks.hijack.Hijack`, three times from the same
start: with an honest owner, with a lying one, and with a lying one and a frozen bottom. After each, the owner's
inverter, which was taught on the base bottom, reads what crosses. Whether the honesty check stops the lying owner is
looked at in a fourth run. Which trunk stands behind it is the caller's to say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from party.honesty import CheatingOwnerError, HonestyProbe
from party.model import open_model
from splitfl.adapters import add_lora, lora_config
from splitfl.audit.attacks.hijack import Hijack, read_share
from splitfl.audit.attacks.sip import Taught, teach
from splitfl.audit.bottom import open_bottom
from splitfl.audit.view import View
from splitfl.link import TrunkLink, TrunkRequest

Batch = dict[str, torch.Tensor]
Protect = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Gain:
    """Shares of the rows' tokens that the owner's inverter reads, and what the honesty check said."""

    before: float
    """Before any step."""
    honest: float
    lying: float
    frozen: float
    """A lying owner, and a bottom that is not trained."""
    lies: int
    """Gradients that were false; of a frozen bottom none is asked for."""
    lies_frozen: int
    caught_at: int | None
    """Backward at which the honesty check stopped the run; None if it did not."""


def hijack_sandbox(
    view: View, link: TrunkLink, batches: Sequence[Batch], *, steps: int = 30, learning_rate: float = 2e-3,
    strength: float = 1.0, protect: Protect | None = None, seed: int = 0,
) -> Gain:  # fmt: skip
    """Run the four trainings.

    Args:
        view: what the owner knows: kit, noise, auxiliary text.
        link: to a trunk in this process.
        batches: collated rows of the party; used in turn.
        steps: of AdamW at `learning_rate`, in each training.
        strength: see `Hijack`.
        protect: what is done to activations [B, T, D] before they leave; None for nothing.
        seed: of the adapters.
    """
    taught = teach(replace(view, sent=()), open_bottom(view))
    settings = _Settings(view, batches, steps, learning_rate, seed, protect)

    def trained(owner: Hijack, *, frozen: bool = False, after: int = steps) -> float:
        return settings.train(owner, owner, taught, frozen=frozen, steps=after)

    honest, lying = Hijack(link, taught, honest=True), Hijack(link, taught, strength=strength)
    frozen = Hijack(link, taught, strength=strength)
    before = trained(Hijack(link, taught, honest=True), after=0)
    shares = trained(honest), trained(lying), trained(frozen, frozen=True)
    watched = Hijack(link, taught, strength=strength)
    caught_at = None
    try:
        settings.train(HonestyProbe(watched, every=1), watched, taught, frozen=False, steps=steps)
    except CheatingOwnerError:
        caught_at = watched.heard.lies
    return Gain(
        before=before, honest=shares[0], lying=shares[1], frozen=shares[2],
        lies=lying.heard.lies, lies_frozen=frozen.heard.lies, caught_at=caught_at,
    )  # fmt: skip


@dataclass(frozen=True)
class _Settings:
    view: View
    batches: Sequence[Batch]
    count: int
    learning_rate: float
    seed: int
    protect: Protect | None

    def train(self, link: TrunkLink, owner: Hijack, taught: Taught, *, frozen: bool, steps: int) -> float:
        """Tune a fresh model behind `link`, then pass all batches once: the share that `owner` reads of them."""
        kit = self.view.kit
        base = open_model(kit, link if self.protect is None else _Protected(link, self.protect), dtype="float32")
        adapted = lora_config(base, kit.plan, target_modules=["all-linear"], top_alone=frozen)
        model = add_lora(base, adapted, seed=self.seed)
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=self.learning_rate)
        for step in range(steps):
            loss = model(**self.batches[step % len(self.batches)]).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        shares, tokens = [], []
        for batch in self.batches:
            owner.heard.hidden.clear()
            with torch.no_grad():
                model(**batch)
            shares.append(read_share(taught, owner.heard.hidden[-1], batch["input_ids"], batch["attention_mask"]))
            tokens.append(int(batch["attention_mask"].sum()))
        return sum(s * t for s, t in zip(shares, tokens, strict=True)) / sum(tokens)


class _Protected:
    """A link that does something to activations before they leave."""

    def __init__(self, link: TrunkLink, protect: Protect) -> None:
        self.link, self.protect = link, protect
        self.backward, self.release = link.backward, link.release

    def forward(self, request: TrunkRequest) -> tuple[torch.Tensor, int]:
        """See `splitfl.link.TrunkLink`."""
        assert isinstance(request.hidden, torch.Tensor)  # noqa: S101  nothing is protected twice
        return self.link.forward(replace(request, hidden=self.protect(request.hidden)))
