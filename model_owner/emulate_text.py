"""Public text for an emulator: read, cut into examples, one in ten held out."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from model_owner.student import Figures, Pair, measure
from splitfl.config_offsite import EmulatorSettings
from splitfl.data import Collator, Example, fingerprint, load_rows, tokenise
from splitfl.errors import DataError, UsageError
from splitfl.kit import Kit

_BLOCK = 512  # tokens of an example, where the model allows more and --max-length says nothing
_EVERY = 10  # one example in so many is held out


@dataclass(frozen=True, kw_only=True)
class Text:
    """Public text as token ids."""

    train: list[Example]
    held_out: list[Example]
    collator: Collator
    fingerprint: str

    def measure(self, pair: Pair, batch_size: int) -> Figures:
        """A pair's student on what is held out."""
        return measure(pair, self.held_out, self.collator, batch_size=batch_size)


def read_text(settings: EmulatorSettings, kit: Kit) -> Text:
    """The text that the settings name, in the kit's tokens.

    Raises:
        DataError: it cannot be read, or is too short to hold anything out.
        UsageError: a length that the model does not have.
    """
    limit = kit.plan.max_length
    if settings.max_length and limit and settings.max_length > limit:
        raise UsageError(
            f"--max-length is {settings.max_length}, but the model's positions end at {limit}.",
            expected=f"at most {limit}",
        )
    length = settings.max_length or min(limit or _BLOCK, _BLOCK)
    tokenizer = kit.tokenizer()

    def read(path: Path) -> tuple[list[Example], str]:
        rows = load_rows(path, task="causal-lm")  # for an encoder too: what a text is called does not matter here
        examples = tokenise(rows, tokenizer, max_length=length, answer_only=False, truncation="right")
        print(f"{path}: {examples.counts}", file=sys.stderr)
        if kit.plan.task != "causal-lm":
            return [{name: one[name] for name in ("input_ids", "attention_mask")} for one in examples], fingerprint(
                rows
            )
        return list(examples), fingerprint(rows)

    train, print_of = read(cast("Path", settings.text))
    if settings.eval is not None:
        held_out, other = read(settings.eval)
        print_of += other
    else:
        if len(train) < 2:
            raise DataError(
                f"{settings.text} makes one example of {length} tokens or fewer, and one must be held out.",
                expected="a longer text",
                hint="give held-out text with --eval, or shorter examples with --max-length",
            )
        chosen = set(range(_EVERY - 1, len(train), _EVERY)) or {len(train) - 1}
        held_out = [train[index] for index in sorted(chosen)]
        train = [one for index, one in enumerate(train) if index not in chosen]
    collator = Collator(tokenizer, pad_token_id=kit.config.pad_token_id)
    return Text(train=train, held_out=held_out, collator=collator, fingerprint=print_of)
