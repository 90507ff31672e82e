"""How well a tuned model remembers a canary: exposure, and continuing its beginning word for word.

    exposure = log2 |R| - log2 rank(s)      rank of the secret by its log-probability among R: itself and candidates
                                            that were made in the same way and not trained on

(Carlini and others, "The Secret Sharer", 2019, section 4.) It is at most log2 |R|, and on average 1.44 for a secret
that was not learnt. Extraction gives the model the tokens before the secret, greedily decodes as many as the secret
has, and compares (Carlini and others, "Quantifying Memorization Across Neural Language Models", 2023, section 3).
Legend: B rows, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from splitfl.audit.intervals import Estimate, share
from splitfl.audit.overlap import bleu
from splitfl.data import IGNORED
from splitfl.errors import UsageError

Ids: TypeAlias = Sequence[int]
PREFIXES = (10, 50, 100, 200, 500)
_AT_ONCE = 16


@torch.no_grad()
def secret_log_probs(model: nn.Module, prefix: Ids, secrets: Sequence[Ids]) -> list[float]:
    """Log-probability in nats of each secret behind `prefix`, summed over its tokens.

    Raises:
        UsageError: an empty prefix or secret.
    """
    if not prefix or not all(secrets):
        raise UsageError("A canary without a prefix or without a secret cannot be ranked.", expected="a token of each")
    found: list[float] = []
    for start in range(0, len(secrets), _AT_ONCE):
        part = secrets[start : start + _AT_ONCE]
        width = len(prefix) + max(map(len, part))
        ids = torch.zeros(len(part), width, dtype=torch.long)
        labels = torch.full_like(ids, IGNORED)
        for row, secret in enumerate(part):
            end = len(prefix) + len(secret)
            ids[row, :end] = torch.tensor([*prefix, *secret])
            labels[row, len(prefix) : end] = ids[row, len(prefix) : end]
        # Padding is on the right of a causal model: nothing that counts sees it.
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        each = nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
        found += (-each.double().sum(1)).tolist()
    return found


def exposure(model: nn.Module, prefix: Ids, secret: Ids, others: Sequence[Ids]) -> float:
    """Bits by which the secret stands out among `others`, candidates of the same making; ties rank behind.

    Args:
        model: causal, in eval mode.
        prefix: what comes before the secret.
        secret: what was in the rows, or what is compared with it.
        others: of the same length as the secret, drawn as it was; the more, the higher the ceiling.
    """
    own, *rest = secret_log_probs(model, prefix, [secret, *others])
    rank = 1 + sum(other >= own for other in rest)
    return math.log2(1 + len(rest)) - math.log2(rank)


# ---- extraction


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """What came back for one length of prefix."""

    prefix: int
    """Tokens that were given."""
    rows: int
    exact: Estimate
    """Share of the rows whose continuation came back whole."""
    bleu: Estimate
    """BLEU-4 against the true continuation, mean over rows."""


@torch.no_grad()
def continue_greedily(model: nn.Module, prefixes: Sequence[Ids], length: int) -> list[list[int]]:
    """`length` likeliest tokens behind each prefix; all prefixes have one length.

    A KV cache is used where the model keeps one, also behind a link.
    """
    found: list[list[int]] = []
    for start in range(0, len(prefixes), _AT_ONCE):
        ids = torch.tensor([list(prefix) for prefix in prefixes[start : start + _AT_ONCE]])
        cache: Any = None
        written: list[torch.Tensor] = []
        for _ in range(length):
            result = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            ids = result.logits[:, -1:].argmax(-1)
            written.append(ids)
        found += torch.cat(written, dim=1).tolist()
    return found


def extract(
    model: nn.Module, rows: Sequence[Ids], *, prefixes: Sequence[int] = PREFIXES, length: int = 16,
    longest: int | None = None, seed: int = 0,
) -> list[Extraction]:  # fmt: skip
    """Give the model the first tokens of rows that it was tuned on; does it write the next `length` as they stand?

    A length of prefix that no row reaches, or that the model has no room for, is left out.

    Args:
        model: causal, in eval mode.
        rows: token ids.
        prefixes: tokens that are given.
        length: tokens that are compared.
        longest: positions that the model has; its configuration's unless given.
        seed: of the bootstrap over rows.
    """
    room = longest or getattr(getattr(model, "config", None), "max_position_embeddings", None) or math.inf
    found = []
    for prefix in prefixes:
        usable = [row for row in rows if len(row) >= prefix + length]
        if not usable or prefix + length > room:
            continue
        said = continue_greedily(model, [row[:prefix] for row in usable], length)
        true = [list(row[prefix : prefix + length]) for row in usable]
        pairs = list(zip(said, true, strict=True))
        every, numbers = [1.0] * len(usable), list(range(len(usable)))
        exact = share([float(one == other) for one, other in pairs], every, numbers, seed=seed)
        alike = share([bleu(one, other) for one, other in pairs], every, numbers, seed=seed)
        if exact is not None and alike is not None:
            found.append(Extraction(prefix=prefix, rows=len(usable), exact=exact, bleu=alike))
    return found


def chance_exposure(candidates: int) -> float:
    """Mean exposure of a secret that was not learnt, among so many: its rank is even, so log2 |R| - mean log2 rank."""
    return math.log2(candidates) - float(np.log2(np.arange(1, candidates + 1)).mean())
