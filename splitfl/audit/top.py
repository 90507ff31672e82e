"""The top as an attacker has it: hidden state at the upper cut to logits, and what its gradient gives back.

Any family that can be cut: the kit's own model runs from behind the trunk. Legend: B rows, T positions, D width,
V outputs of the head: the vocabulary, or the classes.
"""

from __future__ import annotations

from collections.abc import Callable
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

    def _put(self, layers: dict[int, nn.Module]) -> None:
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
    return Top(model, view.kit.plan)


def behind_layers(top: Top, hidden: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """State and gradient behind the top's last layer, from those at the upper cut: all four [T, D], one row.

    The layers' Jacobian J is square, and g at the cut is J^T c: c is solved for, which undoes the backward pass
    through layers that the attacker has.
    """
    if not top.plan.top:
        return hidden, gradient
    start = hidden[None].clone().requires_grad_(True)
    with torch.enable_grad():
        end = top.layers(start)

    def backward(cotangent: torch.Tensor) -> torch.Tensor:
        (result,) = torch.autograd.grad(end, start, cotangent.view_as(end), retain_graph=True)
        return result.reshape(-1)

    return end.detach()[0], solve(backward, gradient.reshape(-1)).view_as(gradient)


def solve(apply: LinearMap, right: torch.Tensor, *, steps: int = 60, tolerance: float = 1e-5) -> torch.Tensor:
    """x [N] with apply(x) = `right` [N], by GMRES (Saad and Schultz, SIAM J. Sci. Stat. Comput. 1986, algorithm 4).

    Stops after `steps` applications, or where the residual is `tolerance` of `right`: early ends regularise.
    """
    size = right.norm()
    if not size > 0:
        return torch.zeros_like(right)
    basis = [right / size]
    reduced = torch.zeros(steps + 1, steps, dtype=torch.float64)
    wanted = torch.zeros(steps + 1, dtype=torch.float64)
    wanted[0] = size
    for step in range(steps):
        fresh = apply(basis[step])
        for _ in range(2):  # a second time, against rounding
            overlaps = torch.stack(basis) @ fresh
            fresh = fresh - overlaps @ torch.stack(basis)
            reduced[: step + 1, step] += overlaps.double()
        reduced[step + 1, step] = fresh.norm()
        part = reduced[: step + 2, : step + 1]
        weights = torch.linalg.lstsq(part, wanted[: step + 2, None]).solution[:, 0]
        left = (part @ weights - wanted[: step + 2]).norm()
        if left <= tolerance * size or reduced[step + 1, step] <= 1e-12 * size:
            break
        basis.append(fresh / fresh.norm())
    return weights.to(right.dtype) @ torch.stack(basis[: len(weights)])
