"""Tiny trunks, batches, and owners that cheat: what the tests of the honesty check share."""

from __future__ import annotations

import functools
import math
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from model_owner.trunk import LocalLink, Trunk
from splitfl.kit import open_kit, write_kit
from splitfl.link import TrunkRequest, decoded
from splitfl.load import load_trunk_side, quiet_library
from tests.families import save_model

ROWS, LENGTH, WIDTH = 2, 9, 32
SMOOTH = "gpt2"  # of the tiny models with wild weights, the one that is smooth enough for bfloat16


@functools.cache
def trunk_of(family: str, dtype: torch.dtype = torch.float32) -> Trunk:
    """The trunk of a tiny model: four layers of six."""
    with tempfile.TemporaryDirectory() as folder, quiet_library():
        model = save_model(family, Path(folder) / "model")
        write_kit(model, Path(folder) / "kit", bottom=1, top=1, task="causal-lm")
        plan = open_kit(Path(folder) / "kit").plan
        return Trunk(load_trunk_side(model, plan, dtype=dtype), plan)


class Batches:
    """Hidden states and gradients as a party would send them; the first row is padded on the left."""

    def __init__(self, seed=1):
        self.generator = torch.Generator().manual_seed(seed)

    def one(self):
        hidden, gradient = torch.randn(2, ROWS, LENGTH, WIDTH, generator=self.generator)
        mask = torch.ones(ROWS, LENGTH, dtype=torch.uint8)
        mask[0, :4] = 0
        return TrunkRequest(hidden=hidden, mask=mask, keep=True), gradient * mask[..., None]


def steps(link, count, *, seed=1, encode=lambda x: x):
    """`count` training steps through `link`; the number of the last one."""
    batches = Batches(seed)
    for _ in range(count):
        request, gradient = batches.one()
        _, step = link.forward(replace(request, hidden=encode(request.hidden)))
        link.backward(step, encode(gradient))
    return step


class Owner(LocalLink):
    """An owner that answers forwards honestly and says something else about the gradient."""

    def __init__(self, trunk, lie):
        super().__init__(trunk)
        self.lie, self.requests, self.generator = lie, {}, torch.Generator().manual_seed(3)
        self.backwards = 0

    def forward(self, request):
        output, step = super().forward(request)
        if request.keep:
            self.requests[step] = request
        return output, step

    def backward(self, step, gradient):
        self.backwards += 1
        true = super().backward(step, gradient)
        return self.lie(self, decoded(self.requests.pop(step).hidden), true.float())


def as_large_as(other, direction):
    return direction * (other.norm() / direction.norm())


def random_gradient(owner, hidden, true):
    return as_large_as(true, torch.randn(true.shape, generator=owner.generator))


def critic_gradient(owner, hidden, true):
    """Feature-space hijacking: down a critic of the owner's own that scores hidden states."""
    weights = torch.randn(WIDTH, 8, generator=torch.Generator().manual_seed(4)) / WIDTH**0.5
    entry = hidden.detach().clone().requires_grad_(True)
    score = torch.nn.functional.softplus((entry @ weights).tanh().sum(-1)).mean()
    return as_large_as(true, torch.autograd.grad(score, entry)[0])


def fitted_critic(owner, hidden, true):
    """The same, scaled so that the true gradient's part along it is just as long: along itself it looks right."""
    critic = critic_gradient(owner, hidden, true)
    return critic * ((true * critic).sum() / critic.square().sum())


def leaning(cosine):
    """The true gradient, turned away to this cosine at the same length."""

    def lie(owner, hidden, true):
        other = torch.randn(true.shape, generator=owner.generator)
        other = as_large_as(true, other - true * ((other * true).sum() / true.square().sum()))
        return cosine * true + math.sqrt(1 - cosine**2) * other

    return lie


LIES = {
    "random": random_gradient,
    "critic": critic_gradient,
    "fitted critic": fitted_critic,
    "halved": lambda owner, hidden, true: true * 0.5,
    "doubled": lambda owner, hidden, true: true * 2,
    "zero": lambda owner, hidden, true: torch.zeros_like(true),
    "sign flipped": lambda owner, hidden, true: -true,
    "a thousand times too long": lambda owner, hidden, true: true * 1e3,
}


def spoil(trunk, share, *, seed=5):
    """Noise of `share` of its size on one matrix of `trunk`; returns what undoes it."""
    name = next(n for n, p in trunk.base.named_parameters() if "mlp" in n and p.ndim == 2 and p.numel())
    matrix = trunk.base.get_parameter(name)
    before = matrix.data
    noise = torch.randn(before.shape, generator=torch.Generator().manual_seed(seed))
    matrix.data = (before.float() * (1 + share * noise)).to(before.dtype)
    return lambda: setattr(matrix, "data", before)
