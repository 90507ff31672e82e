"""`python -m tests.reading_back`: the figures of docs/threat-model.md: text read back from what protocol `split` sends.

The attacker is the owner. It knows the base model, as every owner does, and the frames that came; neither the adapter
nor rows nor labels. Three attacks, without any text to learn from and without a language model:

- one matrix, fitted on random token ids, from hidden state to embedding; the nearest embedding is the guess;
- from left to right: which token, put behind those already found, gives this hidden state? The tokens that the matrix
  likes best are tried first, all of them where none of those fits;
- where the party holds no layer above the cut: which label gives this gradient? The owner can compute them all.
"""

from __future__ import annotations

import statistics
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

TRIED_FIRST = 64
EXACT = 1e-3  # relative distance at which a token fits; from a tuned bottom none does, and the usual distance counts
RANDOM_ROWS, RANDOM_LENGTH = 40, 256
ROWS = 4
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
def fit_matrix(bottom: Bottom) -> torch.Tensor:
    """From hidden state and a one [D + 1] to embedding [E], by least squares over rows of random token ids."""
    states, wanted = [], []
    for _ in range(RANDOM_ROWS):
        ids = torch.randint(len(bottom.embeddings), (1, RANDOM_LENGTH))
        states.append(_with_one(bottom(DynamicCache(config=bottom.model.config), ids)[0]))
        wanted.append(bottom.embeddings[ids[0]])
    return torch.linalg.lstsq(torch.cat(states), torch.cat(wanted)).solution


def _with_one(hidden: torch.Tensor) -> torch.Tensor:
    return torch.cat([hidden, hidden.new_ones(len(hidden), 1)], dim=1)


def likeliest(bottom: Bottom, matrix: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Tokens [T, V] of each position of `hidden` [T, D], those that the matrix likes best first."""
    guess = torch.nn.functional.normalize(_with_one(hidden) @ matrix, dim=-1)
    return (guess @ torch.nn.functional.normalize(bottom.embeddings, dim=-1).T).argsort(dim=-1, descending=True)


@torch.no_grad()
def read_row(bottom: Bottom, matrix: torch.Tensor, hidden: torch.Tensor) -> list[int]:
    """The token ids behind the hidden states [T, D] of one row without padding, from left to right."""
    found: list[int] = []
    distances: list[float] = []
    cache = DynamicCache(config=bottom.model.config)
    for target, order in zip(hidden, likeliest(bottom, matrix, hidden), strict=True):
        best, distance = _best(bottom, cache, order[:TRIED_FIRST], target)
        usual = statistics.median(distances) if distances else 0.0
        if distance > max(EXACT, 2 * usual):
            best, distance = _best(bottom, cache, order, target)
        found.append(best)
        distances.append(distance)
        bottom(cache, torch.tensor([[best]]))
    return found


def _best(bottom: Bottom, cache: DynamicCache, tried: torch.Tensor, target: torch.Tensor) -> tuple[int, float]:
    """The token of `tried` [N] that comes nearest to `target` [D], and its relative distance."""
    some = [(bottom.alternatives(cache, part) - target).norm(dim=-1) / target.norm() for part in tried.split(512)]
    least = torch.cat(some).min(dim=0)
    return int(tried[least.indices]), float(least.values)


def answers_from_gradient(bottom: Bottom, output: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The label of each position [T] whose gradient [T, D] at the trunk's output [T, D] is not zero, else -100.

    For a party without top layers: the owner knows norm and head, so it can compute which gradient each label would
    give. It does not know by how many tokens the loss was divided, which scales all of them alike.
    """
    base = bottom.model.base_model
    head = bottom.model.get_output_embeddings().weight.detach()
    found = torch.full((len(output),), -100)
    for place in gradient.abs().sum(-1).nonzero()[:, 0].tolist():
        jacobian = torch.autograd.functional.jacobian(base.norm, output[place])
        rows = head @ jacobian  # gradient of each token's logit
        mean = torch.softmax(head @ base.norm(output[place]), dim=-1) @ rows
        candidates = mean - rows  # of minus the log-probability of each token
        found[place] = torch.nn.functional.cosine_similarity(candidates, gradient[place], dim=-1).argmax()
    return found


class Recorder(LocalLink):
    """A link that remembers what crossed: what the owner sees."""

    def __init__(self, trunk: Trunk) -> None:
        super().__init__(trunk)
        self.seen: list[TrunkRequest] = []
        self.outputs: list[torch.Tensor] = []
        self.gradients: list[torch.Tensor] = []

    def forward(self, request: TrunkRequest) -> tuple[torch.Tensor, int]:
        self.seen.append(request)
        output, step = super().forward(request)
        self.outputs.append(output)
        return output, step

    def backward(self, step: int, gradient: torch.Tensor) -> torch.Tensor:
        self.gradients.append(gradient)
        return super().backward(step, gradient)


def measure(folder: Path, say: Callable[[str], None] = lambda text: None) -> Figures:
    """How many tokens are read back at the first step, and from a bottom that was tuned for a while."""
    torch.manual_seed(0)
    bottom = Bottom(2)
    matrix = fit_matrix(bottom)
    link, batch, losses = _recorded(folder / "kit", top=2, steps=STEPS)
    lengths = batch["attention_mask"].sum(-1).tolist()
    figures: Figures = {"tokens": sum(lengths), "steps": STEPS, "losses": (losses[0], losses[-1])}
    first, last = link.seen[0].hidden, link.seen[-1].hidden
    cases = {"first step": first, "first step, bfloat16": first.bfloat16().float(), "after tuning": last}
    for when, crossed in cases.items():
        by_matrix = by_search = 0
        for hidden, ids, length in zip(crossed, batch["input_ids"], lengths, strict=True):
            by_matrix += int((likeliest(bottom, matrix, hidden[:length])[:, 0] == ids[:length]).sum())
            found = read_row(bottom, matrix, hidden[:length])
            by_search += int((torch.tensor(found) == ids[:length]).sum())
            say(f"{when}: {by_matrix} by the matrix, {by_search} by the search")
        figures[f"by one matrix, {when}"], figures[f"by search, {when}"] = by_matrix, by_search
    return figures | _without_top(folder / "topless", bottom)


def _without_top(folder: Path, bottom: Bottom) -> Figures:
    link, batch, _ = _recorded(folder, top=0, steps=1)
    labels = batch["labels"][:, 1:]
    found = [
        answers_from_gradient(bottom, output, gradient)
        for output, gradient in zip(link.outputs[0], link.gradients[0], strict=True)
    ]
    right = (torch.stack(found)[:, :-1] == labels) & (labels != -100)
    return {"answer tokens": int((labels != -100).sum()), "answers from the gradient, no top": int(right.sum())}


def _recorded(folder: Path, *, top: int, steps: int) -> tuple[Recorder, dict[str, torch.Tensor], list[float]]:
    """Tune on the batch of the journey for some steps: what the owner saw, the batch, the losses."""
    write_kit(MODEL, folder, bottom=2, top=top, dtype="float32")
    kit = open_kit(folder)
    link = Recorder(Trunk(load_trunk_side(MODEL, kit.plan, dtype=torch.float32), kit.plan))
    base = open_model(kit, link)
    model = add_lora(base, lora_config(base, kit.plan, target_modules=["all-linear"]), seed=0)
    batch = {name: tensor[:ROWS] for name, tensor in batch_of(kit)[0].items()}
    return link, batch, _tune(model, batch, steps)


def _tune(model: PeftModel, batch: dict[str, torch.Tensor], steps: int) -> list[float]:
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    losses = []
    for _ in range(steps + 1):
        loss = model(**batch).loss
        losses.append(round(float(loss.detach()), 2))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return losses


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        print(measure(Path(place), print))
