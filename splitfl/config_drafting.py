"""Options of `splitfl generate` that save round trips: guesses that are looked at several at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from splitfl.errors import UsageError
from splitfl.options import Panel, Settings, at_least, between

DRAFTING = Panel("Fewer round trips")
DRAFT_TOKENS = 8
"""Guesses for one pass where no other number is given."""


@dataclass(frozen=True, kw_only=True)
class Drafting(Settings):
    """What guesses the next tokens, and how many at a time."""

    draft: Annotated[
        Literal["emulator", "ends", "model"] | None,
        "Guess tokens here, and have the trunk look at several in one pass: with an emulator, with bottom and top "
        "alone, or with --draft-model. Guesses that turn out wrong cross too.",
        DRAFTING,
    ] = None
    draft_tokens: Annotated[int | None, f"Guesses for one pass. Default: {DRAFT_TOKENS}.", between(1, 64), DRAFTING] = (
        None
    )
    draft_model: Annotated[
        Path | None, "With --draft model: a directory with a smaller model of the same vocabulary.", DRAFTING
    ] = None
    prefill_chunk: Annotated[
        int | None, "Send the prompt in pieces of so many tokens. Default: all at once.", at_least(1), DRAFTING
    ] = None

    def check_drafting(self, *, num_beams: int) -> None:
        """Refuse options that have no effect, and what guesses cannot be combined with.

        Raises:
            UsageError: with the reason.
        """
        if self.draft is None:
            for name, value in (("--draft-tokens", self.draft_tokens), ("--draft-model", self.draft_model)):
                if value is not None:
                    raise UsageError(f"{name} has no effect without --draft.", hint="add --draft, or leave it out")
            return
        if (self.draft == "model") != (self.draft_model is not None):
            raise UsageError("--draft model and --draft-model DIR need each other.", hint="give both, or neither")
        if num_beams > 1:
            raise UsageError(
                f"--draft with --num-beams {num_beams}: guesses go on from one text, and beams are several.",
                hint="leave one of them out",
            )
        if self.prefill_chunk is not None:
            raise UsageError(
                "--prefill-chunk with --draft: the first guesses go with the whole prompt, in one pass.",
                hint="leave one of them out",
            )
