"""Tokens from an update of a LoRA adapter: the span test of DAGER, and the round after which B is no longer zero.

W + B A with A [r, D] and B [O, r]: one step of gradient descent gives dA = B^T sum_t g_t x_t^T and dB = sum_t g_t
(A x_t)^T, x_t what the layer was given at token t. So the rows of dB lie in the span of the A x_t, in r dimensions, and
those of dA in that of the x_t, in at most r. DAGER (Petrov et al., NeurIPS 2024, arXiv 2405.15586) tests for each
token of the vocabulary whether its x lies in the span. The test says something only while the span is not everything:
fewer tokens than r for dB; for dA always fewer than D, but only r directions of them.

The standard start B = 0 makes dA zero in the first step and dB a clean sketch of the activations, since A is known
before (the receiver sent it). Later steps move both, and optimisers with moments (Adam) no longer give sums of g x^T;
the left singular vectors then blur the span, and the test falls off.

The first layer's x is the normed embedding of a token, whatever stands around it: that layer tells the bag of tokens.
Legend: T tokens of the update, D width, O outputs of a layer, r rank, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from splitfl.audit.attack import Attack
from splitfl.audit.bottom import known_model
from splitfl.audit.view import Guesses, Knowledge, Update, View
from splitfl.cut import module_at

_RANK = 1e-4
"""Singular values below this share of the largest are rounding."""
_INSIDE = {"B": 5e-2, "A": 5e-3}
"""Relative distance to the span at which a token is in it (DAGER takes 0.05 for LoRA)."""
_TENSOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")


@dataclass(frozen=True, kw_only=True)
class Span:
    """What one tensor of an update says."""

    rank: int
    """Dimensions that the span fills."""
    most: int
    """Dimensions that it could."""
    distance: torch.Tensor
    """[V]: of each token's vector to the span, relative to its length."""

    @property
    def vacuous(self) -> bool:
        """Whether the span is everything: as many tokens as r, or more, and the test says nothing."""
        return self.rank >= self.most


def span_test(rows: torch.Tensor, candidates: torch.Tensor) -> Span:
    """How far each of `candidates` [V, N] is from the span of `rows` [O, N]."""
    _, values, basis = torch.linalg.svd(rows.double(), full_matrices=False)
    rank = int((values > _RANK * values[0]).sum()) if values.numel() and values[0] > 0 else 0
    unit = torch.nn.functional.normalize(candidates.double(), dim=-1)
    inside = unit @ basis[:rank].T
    distance = (1 - inside.square().sum(-1)).clamp(min=0).sqrt()
    return Span(rank=rank, most=min(rows.shape[1], candidates.shape[1]), distance=distance.float())


@torch.no_grad()
def layer_inputs(model: PreTrainedModel, stack: str, module: str) -> torch.Tensor:
    """What the linear `module` of layer 0 is given for every token of the vocabulary, alone at position 0: [V, N]."""
    layer = module_at(model.base_model, stack)[0]
    seen: list[torch.Tensor] = []
    hook = layer.get_submodule(module).register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    class_of = model.get_input_embeddings().weight
    leave = layer.register_forward_hook(_leave)
    try:
        for ids in torch.arange(len(class_of)).split(512):
            try:
                model(input_ids=ids[:, None], use_cache=False)
            except _Left:
                continue
    finally:
        hook.remove()
        leave.remove()
    return torch.cat(seen)[:, 0]


class _Left(Exception):
    """Leaves the forward pass behind layer 0."""


def _leave(_layer: nn.Module, _args: Any, _output: Any) -> None:
    raise _Left


def read_update(
    update: Update, model: PreTrainedModel, stack: str, inputs: dict[str, torch.Tensor]
) -> tuple[tuple[int, ...], dict[str, float]]:
    """The bag of tokens of an update, without repeats, and figures; `inputs` keeps what was worked out for a module."""
    votes: list[tuple[int, torch.Tensor]] = []
    ranks, vacuous = [], 0
    for name, factors in _first_layer(update, stack).items():
        if name not in inputs:
            inputs[name] = layer_inputs(model, stack, name)
        for rows, letter, candidates in _tests(factors, inputs[name]):
            span = span_test(rows, candidates)
            ranks.append(span.rank)
            if span.vacuous or not span.rank:
                vacuous += 1
                continue
            votes.append((span.rank, span.distance < _INSIDE[letter]))
    figures = {"tests": float(len(votes)), "vacuous": float(vacuous), "largest rank": float(max(ranks, default=0))}
    if not votes:
        return (), figures
    # Queries of the first position have no gradient: only tests that see the most tokens see all.
    widest = max(rank for rank, _ in votes)
    found = torch.stack([inside for rank, inside in votes if rank == widest]).all(0).nonzero()[:, 0]
    return tuple(found.tolist()), figures


def _tests(
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]], inputs: torch.Tensor
) -> list[tuple[torch.Tensor, str, torch.Tensor]]:
    """Rows, letter and candidates of the tests that one module allows; each factor is (before, after)."""
    tests = []
    if "A" in factors and "B" in factors:
        before, after = factors["B"]
        tests.append((after - before, "B", inputs @ factors["A"][0].T))
    if "A" in factors:
        before, after = factors["A"]
        if bool((after != before).any()):
            tests.append((after - before, "A", inputs))
    return tests


def _first_layer(update: Update, stack: str) -> dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """LoRA factors of layer 0's modules, (before, after) by letter: only modules that see the embeddings alone.

    Attention's inputs: what stands behind the attention already mixes tokens.
    """
    found: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {}
    for name, after in update.after.items():
        parts = _TENSOR.fullmatch(name)
        inside = parts and re.fullmatch(rf".*{re.escape(stack)}\.0\.(.+)", parts[1])
        if parts is None or not inside or name not in update.before:
            continue
        if re.search(r"(q_proj|k_proj|v_proj|qkv|query|key|value|c_attn|q_lin|k_lin|v_lin|qkv_proj)$", inside[1]):
            found.setdefault(inside[1], {})[parts[2]] = (update.before[name].float(), after.float())
    return found


def _run(view: View) -> Guesses:
    model, inputs = known_model(view), dict[str, torch.Tensor]()
    bags: dict[int, tuple[int, ...]] = {}
    notes: dict[str, float] = {"vacuous": 0.0, "tests": 0.0, "largest rank": 0.0}
    for count, update in enumerate(view.updates):
        bag, figures = read_update(update, model, view.kit.plan.stack, inputs)
        if bag:
            bags[update.number] = bag
        notes = {
            name: max(notes[name], value) if "rank" in name else notes[name] + value for name, value in figures.items()
        }
        view.progress((count + 1) / len(view.updates))
    return Guesses(bags=bags, notes=notes)


ATTACK = Attack(
    name="update-invert",
    title="the bag of tokens behind an update of an adapter",
    source="DAGER, arXiv 2405.15586; round one: our own",
    needs=frozenset({"update"}),
    finds="bags",
    least=Knowledge.BASE,
    run=_run,
    weak_point=(
        "says nothing where an update holds as many different tokens as the adapter's rank, or more, "
        "after many steps of Adam, and for models with a table of positions beyond the first token"
    ),
)
