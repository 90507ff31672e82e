"""Everything that `splitfl bench gpu` measures, in one process. ``python -m`` this, with a start.

Only ever a process of its own, since it holds both sides. Whole model, party and trunk share their weights, so that a
model of 16 GB takes 16 GB.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from model_owner.trunk import LocalLink, Trunk
from party.remote import put_remote_trunk
from splitfl.adapters import add_lora, lora_config
from splitfl.bench.gpu_orders import GpuMeasure, GpuMeasured, GpuStart
from splitfl.bench.lines import own_output, say
from splitfl.bench.orders import Ready
from splitfl.bench.sizes import BOTTOM, TOP, VOCABULARY
from splitfl.cut import Plan, keep_party_layers, keep_trunk_layers
from splitfl.kit import DTYPES
from splitfl.link import TrunkRequest, decoded
from splitfl.quiet import silence_library_warnings
from splitfl.wire.codecs import dtype_name, from_frame, spec_of, to_frame
from splitfl.wire.coding import Coded

_WARM_UP, _PROMPT, _LEARNING_RATE = 2, 16, 1e-3


class ThroughBytes:
    """A link whose tensors become the bytes of the wire and tensors again, both ways, and are counted."""

    def __init__(self, link: LocalLink) -> None:
        self.link, self.moved = link, 0

    def forward(self, request: TrunkRequest) -> tuple[torch.Tensor, int]:
        """See `splitfl.link.TrunkLink`."""
        output, step = self.link.forward(replace(request, hidden=self._cross(decoded(request.hidden))))
        return self._cross(output), step

    def backward(self, step: int, gradient: torch.Tensor | Coded) -> torch.Tensor:
        """See `splitfl.link.TrunkLink`."""
        return self._cross(self.link.backward(step, self._cross(decoded(gradient))))

    def release(self, *, caches: tuple[int, ...] = (), steps: tuple[int, ...] = ()) -> None:
        """See `splitfl.link.TrunkLink`."""
        self.link.release(caches=caches, steps=steps)

    def _cross(self, tensor: torch.Tensor) -> torch.Tensor:
        name = dtype_name(tensor.dtype)
        frame = bytes(to_frame(tensor, name))
        self.moved += len(frame)
        return from_frame(frame, spec_of("hidden", tensor, name))


class Models:
    """The whole model with its adapter, the same one split, and its trunk."""

    def __init__(self, start: GpuStart) -> None:
        self.device = torch.device(start.device)
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=start.width, intermediate_size=start.inner,
            num_hidden_layers=start.layers, num_attention_heads=start.heads, num_key_value_heads=start.key_heads,
            max_position_embeddings=4096, tie_word_embeddings=False, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        self.plan = Plan(
            model_type="llama", task="causal-lm", layers=start.layers, bottom=BOTTOM, top=TOP, stack="layers",
            returns_tuple=False, width=start.width, dtype=start.dtype, trunk="0" * 32,
        )  # fmt: skip
        torch.manual_seed(0)
        torch.set_default_dtype(DTYPES[start.dtype])
        with self.device:
            self.base: Any = LlamaForCausalLM(config).requires_grad_(False).eval()
        torch.set_default_dtype(torch.float32)
        half = twin(self.base)
        keep_trunk_layers(half, self.plan)
        self.trunk = Trunk(half.base_model, self.plan)
        self.link = ThroughBytes(LocalLink(self.trunk))
        party = twin(self.base)
        keep_party_layers(party.base_model, self.plan)
        party.to(start.party_device)
        put_remote_trunk(party, self.plan, self.link)
        whole = twin(self.base)
        whole.config = copy.deepcopy(whole.config)
        whole.config.use_cache = False
        self.split = add_lora(party, lora_config(party, self.plan), seed=1)
        self.whole = add_lora(whole, lora_config(whole, self.plan), seed=1)

    def wait(self) -> None:
        """Until the device has done what it was asked."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A model of its own modules, with the tensors of `model`."""
    held = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in held})


def measure(models: Models, order: GpuMeasure) -> GpuMeasured:
    """All figures; ways take turns."""
    plan, trunk = models.plan, models.trunk
    drawn = torch.Generator().manual_seed(1)
    shape = (order.rows, order.length, plan.width)
    hidden, above = (torch.randn(shape, generator=drawn).to(models.device, trunk.dtype) for _ in range(2))
    ids = torch.randint(3, VOCABULARY, (order.rows, order.length), generator=drawn)
    times: dict[str, list[float]] = {name: [] for name in ("owner", "bare", "whole", "split")}
    losses: dict[str, list[float]] = {"whole": [], "split": []}
    optimizers = {name: _optimizer(getattr(models, name)) for name in losses}
    moved = 0
    for turn in range(_WARM_UP + order.steps):
        times["owner"].append(_timed(models, lambda: _owner(trunk, hidden, above)))
        times["bare"].append(_timed(models, lambda: _bare(models.base, plan, hidden, above)))
        for name in ("whole", "split") if turn % 2 else ("split", "whole"):
            before = models.link.moved
            train = _training(getattr(models, name), optimizers[name], ids, losses[name])
            times[name].append(_timed(models, train))
            moved = max(moved, models.link.moved - before)
    texts, text_s = {}, {}
    for name in ("whole", "split"):
        for _ in range(2):  # the first one warms up
            text_s[name], texts[name] = _written(models, getattr(models, name), order.new_tokens)
    middle = {name: statistics.median(taken[_WARM_UP:]) for name, taken in times.items()}
    matrices = sum(p.numel() for p in trunk.base.parameters() if p.ndim == 2)
    return GpuMeasured(
        parameters=sum(p.numel() for p in trunk.base.parameters()),
        flops=4.0 * matrices * order.rows * order.length,  # two a weight and token, forward and again backward
        ceiling=_ceiling(models, order.matrix),
        owner_s=middle["owner"], bare_s=middle["bare"], whole_step_s=middle["whole"], split_step_s=middle["split"],
        whole_text_s=text_s["whole"], split_text_s=text_s["split"], step_bytes=moved,
        loss_difference=max(abs(b - a) / abs(a) for a, b in zip(losses["whole"], losses["split"], strict=True)),
        equal_tokens=int((texts["whole"].cpu() == texts["split"].cpu()).sum()), new_tokens=order.new_tokens,
    )  # fmt: skip


def _timed(models: Models, work: Callable[[], object]) -> float:
    models.wait()
    start = time.perf_counter()
    work()
    models.wait()
    return time.perf_counter() - start


def _owner(trunk: Trunk, hidden: torch.Tensor, above: torch.Tensor) -> torch.Tensor:
    _, kept = trunk.forward_kept(TrunkRequest(hidden=hidden, keep=True), recompute=False)
    return trunk.backward(kept, above)


def _bare(base: Any, plan: Plan, hidden: torch.Tensor, above: torch.Tensor) -> torch.Tensor:
    """The layers themselves, as few lines as can be: the reference for what the server adds."""
    positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
    rotary = base.model.rotary_emb(hidden, positions)
    entry = hidden.detach().requires_grad_(True)
    state = entry
    for index in plan.trunk_layers:
        state = base.model.layers[index](state, attention_mask=None, position_embeddings=rotary)
    (result,) = torch.autograd.grad(state, entry, above)
    return result


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=_LEARNING_RATE)


def _training(
    model: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor, losses: list[float]
) -> Callable[[], None]:
    batch = ids.to(next(model.parameters()).device)

    def step() -> None:
        model.train()
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=batch, attention_mask=torch.ones_like(batch), labels=batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    return step


def _written(models: Models, model: Any, new_tokens: int) -> tuple[float, torch.Tensor]:
    """Seconds of a greedy generation of one row, and what it wrote."""
    model.eval()
    device = next(model.parameters()).device
    ids = torch.randint(3, VOCABULARY, (1, _PROMPT), generator=torch.Generator().manual_seed(2)).to(device)
    models.wait()
    start = time.perf_counter()
    with torch.no_grad():
        written = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
            do_sample=False, use_cache=True, pad_token_id=0,
        )  # fmt: skip
    models.wait()
    return time.perf_counter() - start, written[0, _PROMPT:]


def _ceiling(models: Models, side: int) -> float:
    """FLOP/s of the best of some products of two square matrices."""
    left, right = (torch.randn(side, side, device=models.device).to(models.trunk.dtype) for _ in range(2))
    best = min(_timed(models, lambda: left @ right) for _ in range(8))
    return 2.0 * side**3 / best


def main() -> None:
    """Make the models and measure when told, until standard input ends."""
    silence_library_warnings()
    answers = own_output()
    start = msgspec.json.decode(sys.argv[1], type=GpuStart)
    torch.set_num_threads(start.threads)
    models = Models(start)
    say(answers, Ready(trainable=0))
    for line in sys.stdin:
        say(answers, measure(models, msgspec.json.decode(line, type=GpuMeasure)))


if __name__ == "__main__":
    main()
