"""The data holder of `splitfl bench generate`: writes with and without guesses. ``python -m`` this, with a start.

Only ever a process of its own, since it uses `party`. The code is that of `splitfl generate`, without an adapter.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import torch

from party.connect import open_session
from party.drafting import counting, drafting, share_weights
from party.model import open_model
from party.session import Session
from splitfl.bench.generate_orders import TextWritten, WriterStart, WriteText
from splitfl.bench.lines import own_output, say
from splitfl.bench.orders import Ready
from splitfl.data import encode_prompt
from splitfl.emulator import open_emulator
from splitfl.kit import open_kit
from splitfl.load import quiet_library
from splitfl.quiet import silence_library_warnings

_TIMEOUT_S = 240.0


class Writer:
    """The party's model, its two draft models, and the prompts."""

    def __init__(self, start: WriterStart) -> None:
        kit = open_kit(Path(start.kit))
        self.session: Session = open_session(
            kit.plan, start.owner, owner_key=Path(start.owner_key), key=Path(start.key), timeout_s=_TIMEOUT_S
        )
        self.model = open_model(kit, self.session, dtype="float32")
        emulated = open_emulator(Path(start.emulator)).load(kit, torch.float32)
        self.drafts = {"emulator": emulated.eval(), "ends": kit.load(torch.float32).eval()}
        for draft in self.drafts.values():
            draft.config.use_cache = True
            share_weights(draft, self.model)
        rows = Path(start.prompts).read_text(encoding="utf-8").splitlines()
        tokenizer = kit.tokenizer()
        self.prompts = [encode_prompt(tokenizer, json.loads(row)["prompt"]) for row in rows]

    def write(self, order: WriteText) -> TextWritten:
        """Continue the prompts; the time is that of all of them."""
        options: dict[str, Any] = {} if order.draft is None else drafting(self.drafts[order.draft], order.guesses)
        texts: list[list[int]] = []
        passes = guessed = kept = 0
        sent, received = self.session.bytes_sent, self.session.bytes_received
        began = time.perf_counter()
        for prompt in self.prompts[: order.prompts]:
            ids = torch.tensor([prompt])
            with quiet_library(), torch.no_grad(), counting(self.model) as counted:
                output = self.model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
                    max_new_tokens=order.new_tokens, min_new_tokens=order.new_tokens, **options,
                )  # fmt: skip
            texts.append(output[0, len(prompt) :].tolist())
            passes += counted.passes
            guessed += counted.guessed(len(prompt))
            kept += counted.gained(len(texts[-1]))
        return TextWritten(
            seconds=time.perf_counter() - began,
            tokens=texts,
            passes=passes,
            guessed=guessed,
            kept=kept,
            sent=self.session.bytes_sent - sent,
            received=self.session.bytes_received - received,
        )


def main() -> None:
    """Open what is needed, and write as told until standard input ends."""
    silence_library_warnings()
    answers = own_output()
    start = msgspec.json.decode(sys.argv[1], type=WriterStart)
    torch.set_num_threads(start.threads)
    writer = Writer(start)
    with contextlib.closing(writer.session):
        say(answers, Ready(trainable=0))
        for line in sys.stdin:
            say(answers, writer.write(msgspec.json.decode(line, type=WriteText)))


if __name__ == "__main__":
    main()
