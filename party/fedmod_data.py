"""Rows of a `fedmod` server: read, tokenised, and parted into those to train on and those to check on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from party.fedmod_train import Rows
from splitfl.config_mesh import FedmodSettings
from splitfl.cut import Plan
from splitfl.data import Example, load_rows, tokenise
from splitfl.errors import DataError, ModelError, UsageError
from splitfl.kit import load_tokenizer
from splitfl.rows import fingerprint

_FEWEST = 8
_LONGEST_WITHOUT_LIMIT = 512


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a server's files hold."""

    rows: Rows
    own: Sequence[Example]
    """Training and validation rows together, in the order of the file."""
    tokenizer: Any
    label2id: dict[str, int]
    fingerprint: str
    """Of the training file's rows."""
    label: str
    """Its name, for people."""


def read_rows(settings: FedmodSettings, plan: Plan) -> Given:
    """Read both files.

    Raises:
        DataError: the first bad row, by file and line; too few rows, or one class alone.
        UsageError: a length that the model does not have.
        ModelError: the model has no tokenizer.
    """
    tokenizer = load_tokenizer(Path(settings.model))
    if tokenizer is None:
        raise ModelError(f"{settings.model} holds no tokenizer, which rows of text need.")
    if settings.max_length and plan.max_length and settings.max_length > plan.max_length:
        raise UsageError(
            f"--max-length is {settings.max_length}, but the model's positions end at {plan.max_length}.",
            expected=f"at most {plan.max_length}",
        )
    longest = settings.max_length or plan.max_length or _LONGEST_WITHOUT_LIMIT
    columns = settings.column_map()
    loaded = load_rows(settings.train, columns=columns, task="sequence-classification")
    own = tokenise(loaded, tokenizer, max_length=longest, truncation=settings.truncation)
    label2id = {name: int(number) for name, number in loaded.label2id.items()}
    if len(own) < _FEWEST or len(label2id) < 2:
        raise DataError(
            f"{settings.train} holds {len(own)} rows of {len(label2id)} classes.",
            expected=f"at least {_FEWEST} rows, and two classes",
        )
    held_out: Sequence[Example] = ()
    if settings.eval is not None:
        held = load_rows(settings.eval, columns=columns, task="sequence-classification", label2id=label2id)
        held_out = tokenise(held, tokenizer, max_length=longest, truncation=settings.truncation)
    train, validation = part(own, settings.validation_share, settings.seed)
    rows = Rows(train=train, validation=validation, held_out=held_out, classes=len(label2id))
    return Given(
        rows=rows, own=own, tokenizer=tokenizer, label2id=label2id, fingerprint=fingerprint(loaded),
        label=settings.train.name,
    )  # fmt: skip


def part(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Rows to train on and rows to check on; the same for the same seed."""
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    count = max(1, round(share * len(examples)))
    return [examples[index] for index in sorted(order[count:])], [examples[index] for index in sorted(order[:count])]
