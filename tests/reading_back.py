"""`python -m tests.reading_back`: the figures of docs/threat-model.md: text read back from what protocol `split` sends.

The attacker is the owner: it knows the base model, as every owner does, and the frames that came; neither adapter, rows nor
labels. It goes from left to right: which token, put behind those already found, comes nearest to this hidden state? Only
the `TRIED` tokens whose embeddings lie nearest are tried. No training, no language model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from model_owner.trunk import LocalLink, Trunk
from party.model import open_model
from splitfl.adapters import add_lora, lora_config
from splitfl.kit import open_kit, write_kit
from splitfl.link import TrunkRequest
from splitfl.load import load_trunk_side, quiet_library
from tests.journey import MODEL, batch_of

TRIED = 64  # tokens for each position
STEPS, LEARNING_RATE = 30, 1e-3

Figures = dict[str, Any]


class _Reached(Exception):
    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden


class Bottom:
    """The base model up to the lower cut, as the owner has it."""

    def __init__(self, layers: int) -> None:
        with quiet_library():
            self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
        self.embeddings = self.model.get_input_embeddings().weight.detach()
        self.model.base_model.layers[layers].register_forward_pre_hook(self._stop)

    def __call__(self, cache: DynamicCache, ids: torch.Tensor, **more: Any) -> torch.Tensor:
        """Hidden state [1, N, D] at the cut of `ids` [1, N], put behind what `cache` holds."""
        try:
            self.model(input_ids=ids, past_key_values=cache, use_cache=True, **more)
        except _Reached as reached:
            return reached.hidden
        raise AssertionError("the cut was not reached")

    def alternatives(self, cache: DynamicCache, tokens: torch.Tensor) -> torch.Tensor:
        """Hidden states [N, D] of `tokens` [N], each put alone behind what `cache` holds, which stays as it is."""
        past, count = cache.get_seq_length(), len(tokens)
        allowed = torch.cat([torch.ones(count, past, dtype=torch.bool), torch.eye(count, dtype=torch.bool)], dim=1)
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
        places = torch.full((1, count), past)
        hidden = self(cache, tokens[None], attention_mask=mask[None, None], position_ids=places)
        cache.crop(-count)
        return hidden[0]

    def _stop(self, _layer: Any, args: tuple[Any, ...]) -> None:
        raise _Reached(args[0])


@torch.no_grad()
def read_row(bottom: Bottom, hidden: torch.Tensor) -> list[int]:
    """The token ids behind the hidden states [T, D] of one row without padding."""
    found: list[int] = []
    cache = DynamicCache(config=bottom.model.config)
    for target in hidden:
        nearest = torch.nn.functional.cosine_similarity(bottom.embeddings, target, dim=-1).argsort(descending=True)
        tried = nearest[:TRIED]
        best = tried[(bottom.alternatives(cache, tried) - target).norm(dim=-1).argmin()]
        found.append(int(best))
        bottom(cache, best.view(1, 1))
    return found


class Recorder(LocalLink):
    """A link that remembers what it was sent: what the owner sees."""

    def __init__(self, trunk: Trunk) -> None:
        super().__init__(trunk)
        self.seen: list[TrunkRequest] = []

    def forward(self, request: TrunkRequest) -> tuple[torch.Tensor, int]:
        self.seen.append(request)
        return super().forward(request)


def measure(folder: Path, say: Callable[[str], None] = lambda text: None) -> Figures:
    """Shares of tokens that are read back at the first step, and from an adapter that was tuned for a while."""
    write_kit(MODEL, folder / "kit", bottom=2, top=2, dtype="float32")
    kit = open_kit(folder / "kit")
    link = Recorder(Trunk(load_trunk_side(MODEL, kit.plan, dtype=torch.float32), kit.plan))
    base = open_model(kit, link)
    model = add_lora(base, lora_config(base, kit.plan, target_modules=["all-linear"]), seed=0)
    batch, lengths = batch_of(kit)
    losses = _tune(model, batch)
    bottom = Bottom(kit.plan.bottom)
    figures: Figures = {"tokens": sum(lengths), "steps": STEPS, "loss": (losses[0], losses[-1])}
    for when, request in (("at the first step", link.seen[0]), ("after tuning", link.seen[-1])):
        right = 0
        for row, length in enumerate(lengths):
            found = read_row(bottom, request.hidden[row, :length])
            right += int((torch.tensor(found) == batch["input_ids"][row, :length]).sum())
            say(f"{when}: row {row + 1}, {right} tokens right so far")
        figures[f"right {when}"] = right
    return figures


def _tune(model: PeftModel, batch: dict[str, torch.Tensor]) -> list[float]:
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    losses = []
    for _ in range(STEPS + 1):
        loss = model(**batch).loss
        losses.append(round(float(loss.detach()), 2))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return losses


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        print(measure(Path(place), print))
