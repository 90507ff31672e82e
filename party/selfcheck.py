"""Is the cut model still the same model? Asked of a real model directory, of any family, before a kit is given away.

The tests compare tiny models of every family that the library knows. A family they have not met, or a setting that no
tiny model has, is caught here instead: logits, the gradient that comes back to the embeddings, and greedy generation
with a cache are computed by the whole model and by its two halves, and must agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from model_owner.trunk import LocalLink, Trunk
from party.remote import put_remote_trunk
from splitfl.cut import Plan
from splitfl.errors import ModelError, SplitflError
from splitfl.kit import Kit
from splitfl.load import model_class, quiet_library

# Largest difference accepted, as a share of the largest value compared. In float32 the halves compute the same numbers
# in the same order, and differ only where a matrix lies otherwise in memory. In the short formats one rounding is 0.4 %
# (bfloat16) or 0.05 % (float16) of a value and grows along the layers, while a mistake of the cut changes everything.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
LENGTH = 16
PADDED = 5
NEW_TOKENS = 4


@dataclass(frozen=True, kw_only=True)
class SelfCheck:
    """Largest differences between the halves and the whole, each as a share of the largest value compared."""

    logits: float
    gradient: float
    """Of the gradient at the output of the token embeddings, behind the way back through the trunk."""
    generation: float | None
    """Of the logits of `NEW_TOKENS` greedy steps with a KV cache; None for a model that does not generate."""
    tolerance: float
    dtype: str

    @property
    def largest(self) -> float:
        """The largest of all; infinite if something was not a number."""
        return max(self.logits, self.gradient, self.generation or 0.0)

    def __str__(self) -> str:
        steps = "" if self.generation is None else f", {NEW_TOKENS} cached steps {self.generation:.1e}"
        return (
            f"the halves equal the whole model: logits {self.logits:.1e}, gradient {self.gradient:.1e}{steps} "
            f"(largest difference; {self.tolerance:.0e} is accepted in {self.dtype})"
        )


def check_cut(model_dir: Path, kit: Kit, trunk: Trunk) -> SelfCheck:
    """Run the unsplit model in `model_dir`, and the halves that `kit` and `trunk` make of it, on the same random rows.

    Two rows of 16 random tokens, one of them padded, in eval mode and in the trunk's dtype. The whole model and the
    party's half lie on the CPU beside the trunk: memory for the model nearly twice is needed. Windows of attention
    longer than 16 are not reached.

    Raises:
        ModelError: they differ by more than the dtype explains, or one of them cannot be run on token ids alone.
    """
    with quiet_library(), torch.random.fork_rng(devices=[]):
        party = kit.load(trunk.dtype).eval()
        whole = _load_whole(model_dir, kit, party, trunk.dtype)
        put_remote_trunk(party, kit.plan, LocalLink(trunk))
        expected = _attempt(whole, kit.plan, "The unsplit model")
        found = _attempt(party, kit.plan, "The model cut in this place")
    outcome = SelfCheck(
        logits=_share(expected.logits, found.logits),
        gradient=_share(expected.gradient, found.gradient),
        generation=None if expected.steps is None else _compare_steps(expected, found),
        tolerance=TOLERANCES[trunk.dtype],
        dtype=str(trunk.dtype).removeprefix("torch."),
    )
    if not outcome.largest <= outcome.tolerance:
        steps = "" if outcome.generation is None else f", cached generation by {outcome.generation:.1e}"
        raise ModelError(
            f"The halves of this {kit.plan.model_type} model at --bottom {kit.plan.bottom} --top {kit.plan.top} do not "
            f"equal the whole: logits differ by {outcome.logits:.1e} of their scale, "
            f"the gradient by {outcome.gradient:.1e}{steps}.",
            expected=f"at most {outcome.tolerance:.0e} in {outcome.dtype}",
            hint="do not use this kit: the model passes something between its layers that does not cross the cut, "
            "or kit and trunk come from different weights",
        )
    return outcome


def _load_whole(model_dir: Path, kit: Kit, party: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The unsplit model, with the kit's head where the checkpoint has none."""
    cls = model_class(kit.config, kit.plan.task)
    try:
        model, info = cls.from_pretrained(
            model_dir,
            config=kit.config,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"{model_dir} could not be loaded: {error}") from error
    fresh = set(info["missing_keys"]) | {str(entry[0]) for entry in info["mismatched_keys"]}
    drawn = {name: tensor for name, tensor in party.state_dict().items() if name in fresh}
    model.load_state_dict(drawn, strict=False)
    model.config.use_cache = False
    return model.eval()


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What one model computed."""

    logits: torch.Tensor
    """[positions that are not padding or rows, V or classes] float32."""
    gradient: torch.Tensor
    """[positions that are not padding, width of the embeddings] float32."""
    steps: torch.Tensor | None
    """[2, NEW_TOKENS, V] float32, logits of each greedy step."""
    tokens: torch.Tensor | None
    """[2, NEW_TOKENS] int64."""


def _attempt(model: PreTrainedModel, plan: Plan, name: str) -> _Run:
    """Run `model`; whatever goes wrong is a `ModelError`: this family is of a kind that was not foreseen."""
    try:
        return _run(model, plan)
    except Exception as error:
        problem = error.problem if isinstance(error, SplitflError) else str(error)
        raise ModelError(
            f"{name} cannot be run on token ids and a mask: {problem or type(error).__name__}",
            expected="a model of text whose layers depend on hidden state, mask, positions and their own cache alone",
        ) from error


def _run(model: PreTrainedModel, plan: Plan) -> _Run:
    model.requires_grad_(False)
    causal = plan.task == "causal-lm"
    ids, mask = _rows(model, plan)
    embedded: list[torch.Tensor] = []

    def become_leaf(_module: nn.Module, _args: object, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_(True))
        return embedded[-1]

    handle = model.get_input_embeddings().register_forward_hook(become_leaf)
    try:
        logits = model(input_ids=ids, attention_mask=mask).logits.float()
    finally:
        handle.remove()
    logits = logits[mask.bool()] if causal else logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((logits * weights).mean(), embedded[0])
    steps, tokens = _generate(model, ids, mask) if causal else (None, None)
    gradient = gradient.float()[mask.bool()]
    return _Run(logits=logits.detach(), gradient=gradient, steps=steps, tokens=tokens)


def _rows(model: PreTrainedModel, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    """Random token ids [2, T] and their mask; the second row is padded, on the left where text is to be continued."""
    length = min(LENGTH, (plan.max_length or LENGTH + NEW_TOKENS) - NEW_TOKENS)
    padded = min(PADDED, length - 1)
    config = model.config.get_text_config()
    ids = torch.randint(0, config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, slice(padded) if plan.task == "causal-lm" else slice(length - padded, None)] = 0
    padding = getattr(config, "pad_token_id", None)
    return ids.masked_fill(mask == 0, padding if isinstance(padding, int) and padding >= 0 else 0), mask


@torch.no_grad()
def _generate(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    settings = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, use_cache=True,
        output_logits=True, return_dict_in_generate=True, pad_token_id=0,
    )  # fmt: skip
    generate: Callable[..., Any] = model.generate
    output = generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    return torch.stack(output.logits, dim=1).float(), output.sequences[:, ids.shape[1] :]


def _compare_steps(expected: _Run, found: _Run) -> float:
    """Largest difference of the steps' logits; a row counts up to the first token that came out otherwise.

    Where two tokens nearly tie, rounding may pick the other one, and the rows go different ways from there.
    """
    assert expected.steps is not None  # noqa: S101
    assert expected.tokens is not None  # noqa: S101
    assert found.steps is not None  # noqa: S101
    assert found.tokens is not None  # noqa: S101
    together = torch.eq(expected.tokens, found.tokens).long().cumprod(dim=1)
    counted = torch.cat([torch.ones_like(together[:, :1]), together[:, :-1]], dim=1).bool()
    return _share(expected.steps[counted], found.steps[counted])


def _share(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Largest difference as a share of the largest expected value; infinite if anything is not a number."""
    share = ((expected - found).abs().max() / expected.abs().max().clamp_min(1e-30)).item()
    return share if share == share else float("inf")
