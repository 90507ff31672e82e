"""The top as an attacker has it: hidden state at the upper cut to logits, and what its gradient gives back.

Any family that can be cut: the kit's own model runs from behind the trunk. Legend: B rows, T positions, D width,
V outputs of the head: the vocabulary, or the classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from splitfl.audit.bottom import known_model
from splitfl.audit.view import View
from splitfl.cut import PassThrough, Plan, module_at

LinearMap = Callable[[torch.Tensor], torch.Tensor]


class _Reached(Exception):
    """Leaves the forward pass behind the last layer."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden


class Top:
    """The layers above the cut, final norm and head; frozen, in eval mode, float32.

    Args:
        model: the kit's model, with an adapter or without; it is changed.
        plan: of the kit.
    """

    def __init__(self, model: PreTrainedModel, plan: Plan) -> None:
        self.model, self.plan = model.requires_grad_(False).eval(), plan
        self._layers = module_at(model.base_model, plan.stack)
        for index in range(plan.bottom):
            self._layers[index] = PassThrough(self._layers[index], index, plan.returns_tuple)
        trunk_end, own = self._layers[plan.trunk_layers.stop - 1], range(plan.trunk_layers.stop, plan.layers)
        self._own = {index: self._layers[index] for index in own}
        self._empty = {index: PassThrough(trunk_end, index, plan.returns_tuple) for index in own}
        pad = model.config.get_text_config().pad_token_id
        self._filler, self._pad = (1 if pad == 0 else 0), (0 if pad is None else pad)

    def __call__(self, hidden: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [B, T, V], or of classes [B, V], of `hidden` [B, T, D] at the upper cut; differentiable in it."""
        return self.tail(self.layers(hidden, mask), mask)

    def layers(self, hidden: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """What the top's layers make of `hidden` [B, T, D], before the final norm; `hidden` itself without any."""
        if not self._own:
            return hidden
        door, last = self._layers[self.plan.trunk_layers.stop - 1], self._layers[self.plan.layers - 1]

        def leave(_layer: nn.Module, _args: Any, output: Any) -> None:
            raise _Reached(output[0] if isinstance(output, tuple) else output)

        hooks = [self._substitute(door, hidden), last.register_forward_hook(leave)]
        try:
            self._run(hidden, mask)
        except _Reached as reached:
            return reached.hidden
        finally:
            for hook in hooks:
                hook.remove()
        raise AssertionError("the last layer was not reached")

    def tail(self, hidden: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of what the last layer gave, [B, T, D]: norm and head, or the classifier's head."""
        self._put(self._empty)
        hook = self._substitute(self._layers[self.plan.layers - 1], hidden)
        try:
            return self._run(hidden, mask)
        finally:
            hook.remove()
            self._put(self._own)

    def _put(self, layers: Mapping[int, nn.Module]) -> None:
        for index, layer in layers.items():
            self._layers[index] = layer

    def _substitute(self, layer: nn.Module, hidden: torch.Tensor) -> Any:
        given = (hidden, None) if self.plan.returns_tuple else hidden
        return layer.register_forward_hook(lambda _layer, _args, _output: given)

    def _run(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        # Token ids that no layer sees; a classifier looks among them for padding.
        ids = torch.full(hidden.shape[:2], self._filler)
        if mask is not None:
            ids = ids.masked_fill(mask == 0, self._pad)
        mask = torch.ones_like(ids) if mask is None else mask.to(torch.int64)
        result: torch.Tensor = self.model(input_ids=ids, attention_mask=mask).logits
        return result


def open_top(view: View) -> Top:
    """The top that this attacker knows; see `splitfl.audit.bottom.known_model`."""
    model = known_model(view)
    model.config.use_cache = False
    model.set_attn_implementation("eager")  # the fused kernels have no second derivative
    return Top(model, view.kit.plan)


def behind_layers(
    top: Top, hidden: torch.Tensor, gradient: torch.Tensor, *, steps: tuple[int, ...] = (3, 12, 60)
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """State behind the top's last layer, and the gradient there, from those at the upper cut: all [T, D], one row.

    The layers' Jacobian J is square, and g at the cut is J^T c: c is solved for, which undoes the backward pass through
    layers that the attacker has. Where it has them only nearly, an early end is nearer to the truth than a late one:
    one c is returned for each of `steps`.
    """
    if not top.plan.top:
        return hidden, [gradient]
    start = hidden[None].clone().requires_grad_(True)
    with torch.enable_grad():
        end = top.layers(start)

    def backward(cotangent: torch.Tensor) -> torch.Tensor:
        (result,) = torch.autograd.grad(end, start, cotangent.view_as(end), retain_graph=True)
        return result.reshape(-1)

    found = solve(backward, gradient.reshape(-1), steps=steps)
    return end.detach()[0], [each.view_as(gradient) for each in found]


def solve(
    apply: LinearMap, right: torch.Tensor, *, steps: tuple[int, ...], tolerance: float = 1e-5
) -> list[torch.Tensor]:
    """x [N] with apply(x) = `right` [N], by GMRES (Saad and Schultz, SIAM J. Sci. Stat. Comput. 1986, algorithm 4).

    Args:
        apply: linear and square.
        steps: applications after which x is wanted, ascending; all that is left are the same once the residual is
            `tolerance` of `right`.
    """
    size = right.norm()
    if not size > 0:
        return [torch.zeros_like(right) for _ in steps]
    most, found = steps[-1], []
    basis = right.new_empty(most + 1, len(right))  # stacking anew in each step would cost more than all else
    basis[0] = right / size
    reduced = torch.zeros(most + 1, most, dtype=torch.float64)
    wanted = torch.zeros(most + 1, 1, dtype=torch.float64)
    wanted[0] = size
    for step in range(most):
        fresh = apply(basis[step])
        for _ in range(2):  # a second time, against rounding
            overlaps = basis[: step + 1] @ fresh
            fresh = fresh - overlaps @ basis[: step + 1]
            reduced[: step + 1, step] += overlaps.double()
        reduced[step + 1, step] = fresh.norm()
        part = reduced[: step + 2, : step + 1]
        weights = torch.linalg.lstsq(part, wanted[: step + 2]).solution
        done = (part @ weights - wanted[: step + 2]).norm() <= tolerance * size
        if done or step + 1 in steps:
            found.append(weights[:, 0].to(right.dtype) @ basis[: step + 1])
        if done or reduced[step + 1, step] <= 1e-12 * size:
            break
        basis[step + 1] = fresh / fresh.norm()
    return [*found, *found[-1:] * (len(steps) - len(found))]


def match_labels(
    top: Top, hidden: torch.Tensor, gradient: torch.Tensor, start: torch.Tensor, *, steps: int, beta: float = 0.85,
    rate: float = 0.09, progress: Callable[[float], None] = lambda share: None,
) -> torch.Tensor:  # fmt: skip
    """Logits [T, V] of the label of each position whose gradient comes nearest to `gradient` [T, D].

    The backward stage of BiSR (Chen et al., arXiv 2409.00960), with the loss of TAG: beta times the squared and
    1 - beta times the absolute differences, by AdamW. By how many tokens the loss was divided is not known: the scale
    is fitted in every step. Both gradients are measured in root mean squares of the one that crossed.

    Args:
        hidden: [T, D] at the upper cut: what the trunk answered.
        start: [T, V] logits to begin with; row t belongs to position t, whose label is the next token.
        steps: 18 from good logits, 300 from random ones.
    """
    state = hidden[None].clone().requires_grad_(True)
    with torch.enable_grad():
        logits = top(state)
    shares = logits.detach().softmax(-1)[0]
    goal = gradient / gradient.square().mean().sqrt().clamp(min=1e-30)
    soft = start.clone().requires_grad_(True)
    optimiser = torch.optim.AdamW([soft], lr=rate, eps=1e-6)
    for step in range(steps):
        with torch.enable_grad():
            wanted = (shares - soft.softmax(-1))[None]
            (made,) = torch.autograd.grad(logits, state, wanted, create_graph=True)
            scale = (made[0] * goal).sum() / made.square().sum().clamp(min=1e-30)
            apart = made[0] * scale.detach().abs() - goal
            loss = beta * apart.square().sum() + (1 - beta) * apart.abs().sum()
            (soft.grad,) = torch.autograd.grad(loss, soft, retain_graph=True)
        optimiser.step()
        progress((step + 1) / steps)
    return soft.detach()
