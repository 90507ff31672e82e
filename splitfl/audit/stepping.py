"""From left to right with the attacker's copies: what each candidate for the next token would give at the cut, and how
likely a language model holds it.

Legend: H hypotheses (prefixes of equal length P), N candidates of each, D width of the cut, V vocabulary.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from splitfl.audit.bottom import Bottom
from splitfl.load import quiet_library

_AT_ONCE = 1 << 14
"""Candidates in one pass of the bottom, about."""


class Stepper:
    """Prefixes that grow by one token each, and the hidden states that candidates behind them would have.

    With a cache, all candidates of a hypothesis stand side by side in one row, each of which sees the prefix and itself
    (`Bottom.alternatives`, for many rows at once). Without, prefix and candidate are run again as one plain row, which
    is right for every causal family; see `cached_steps_hold`.
    """

    def __init__(self, bottom: Bottom, rows: int, *, cached: bool) -> None:
        self.bottom, self.cached = bottom, cached
        self.ids = torch.zeros(rows, 0, dtype=torch.int64)
        """[H, P]"""
        self._cache: DynamicCache | None = bottom.new_cache() if cached else None
        self.queries = 0
        """Positions put through the bottom."""

    def states(self, tokens: torch.Tensor) -> torch.Tensor:
        """Hidden states [H, N, D] of `tokens` [H, N], each alone behind its hypothesis; nothing is changed."""
        width = max(1, min(256, _AT_ONCE // len(tokens)))
        return torch.cat([self._states(part) for part in tokens.split(width, dim=1)], dim=1)

    def _states(self, tokens: torch.Tensor) -> torch.Tensor:
        past, (rows, count) = self.ids.shape[1], tokens.shape
        if self._cache is None:
            self.queries += rows * count * (past + 1)
            whole = torch.cat([self.ids.repeat_interleave(count, dim=0), tokens.reshape(-1, 1)], dim=1)
            some = [self.bottom(part)[:, -1] for part in whole.split(max(1, _AT_ONCE // (past + 1)))]
            return torch.cat(some).view(rows, count, -1)
        self.queries += rows * count
        allowed = torch.cat([torch.ones(count, past, dtype=torch.bool), torch.eye(count, dtype=torch.bool)], dim=1)
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
        hidden = self.bottom(
            tokens, attention_mask=mask.expand(rows, 1, -1, -1), position_ids=torch.full((rows, count), past),
            past_key_values=self._cache, use_cache=True,
        )  # fmt: skip
        self._cache.crop(-count)
        return hidden

    def grow(self, parents: torch.Tensor, tokens: torch.Tensor) -> None:
        """New hypotheses [H'] in place of the old: that of number `parents` [H'], and `tokens` [H'] behind it."""
        self.ids = torch.cat([self.ids[parents], tokens[:, None]], dim=1)
        if self._cache is None:
            return
        past = self.ids.shape[1] - 1
        if past:
            self._cache.reorder_cache(parents)
        self.queries += len(tokens)
        places = torch.full((len(tokens), 1), past)
        self.bottom(tokens[:, None], position_ids=places, past_key_values=self._cache, use_cache=True)

    def only(self, index: torch.Tensor) -> Stepper:
        """A copy that holds hypotheses `index` alone."""
        other = copy.copy(self)
        other.ids, other.queries = self.ids[index], 0
        if self._cache is not None:
            other._cache = copy.deepcopy(self._cache)
            if self.ids.shape[1]:
                other._cache.reorder_cache(index)
        return other


@torch.no_grad()
def cached_steps_hold(bottom: Bottom, length: int) -> bool:
    """Whether steps with a cache give what plain rows give, tried once on random ids at the row's end.

    They do not where a sliding window is shorter than the row, or where positions are no argument of the model.
    """
    ids = torch.randint(len(bottom.embeddings), (2, max(2, length)), generator=torch.Generator().manual_seed(0))
    try:
        quick = Stepper(bottom, 2, cached=True)
        for place in range(ids.shape[1] - 1):
            quick.grow(torch.arange(2), ids[:, place])
        tokens = torch.arange(6).view(2, 3) % len(bottom.embeddings)
        found = quick.states(tokens)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, NotImplementedError):
        return False  # the family has no such argument, or its cache cannot be cut back
    plain = Stepper(bottom, 2, cached=False)
    plain.ids = ids[:, :-1]
    wanted = plain.states(tokens)
    return bool((found - wanted).norm() <= 1e-4 * wanted.norm())


class Prior:
    """Next-token log-probabilities of a whole language model, for hypotheses that grow as those of a `Stepper` do.

    Args:
        model: its directory.
    """

    def __init__(self, model: Path) -> None:
        with quiet_library():
            self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, local_files_only=True).eval()
        self.model.requires_grad_(False)
        self.begin()

    def begin(self) -> None:
        """Forget all hypotheses: the next `grow` makes the first tokens of new ones."""
        self._cache = DynamicCache(config=self.model.config)
        self._next: torch.Tensor | None = None

    def log_probabilities(self, rows: int) -> torch.Tensor:
        """[H, V] of the next token of each of `rows` hypotheses; all tokens alike at the beginning."""
        if self._next is None:
            count = self.model.get_input_embeddings().weight.shape[0]
            return torch.full((rows, count), -float(torch.tensor(count).log()))
        return self._next

    def grow(self, parents: torch.Tensor, tokens: torch.Tensor) -> None:
        """As `Stepper.grow`."""
        if self._next is not None:
            self._cache.reorder_cache(parents)
        output = self.model(input_ids=tokens[:, None], past_key_values=self._cache, use_cache=True)
        self._next = torch.log_softmax(output.logits[:, -1].float(), dim=-1)

    def keep(self, index: torch.Tensor) -> None:
        """Go on with hypotheses `index` alone."""
        if self._next is not None:
            self._cache.reorder_cache(index)
            self._next = self._next[index]
