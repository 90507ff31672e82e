"""What the monolith and the party have in common: the loop that is timed. The two differ in how their model is opened.

Kept apart from `splitfl.bench.split`, which measures and never loads a model.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import msgspec
import numpy as np
import torch
from peft import PeftModel

from splitfl.bench.lines import own_output as own_output
from splitfl.bench.lines import say
from splitfl.bench.orders import Generate, Generated, Held, Line, Order, Peak, Ready, Step, Stepped
from splitfl.bench.sizes import VOCABULARY
from splitfl.metrics import peak_rss_bytes

# High enough that a few steps move the loss far beyond rounding: equal losses then say that the gradients were equal.
LEARNING_RATE = 1e-2


class Side:
    """One model under measurement.

    Args:
        model: with its adapters; any `PeftModel`, whole or split.
        moved: bytes sent and received so far.
    """

    def __init__(self, model: PeftModel, moved: Callable[[], tuple[int, int]] = lambda: (0, 0)) -> None:
        self.model, self.moved = model, moved
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=LEARNING_RATE)

    def step(self, order: Step) -> Stepped:
        """Forward, backward and optimiser, timed together."""
        ids = token_ids(order.rows, order.length)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        before = reset_peak() if order.memory else None
        sent, received = self.moved()
        start, used = time.perf_counter(), time.process_time()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss_with_gradient(ids, order.parts)
        self.optimizer.step()
        seconds, used = time.perf_counter() - start, time.process_time() - used
        now_sent, now_received = self.moved()
        return Stepped(
            seconds=seconds, loss=loss.item(), sent=now_sent - sent, received=now_received - received, cpu=used,
            grown=None if before is None else peak() - before,
        )  # fmt: skip

    def loss_with_gradient(self, ids: torch.Tensor, parts: int) -> torch.Tensor:
        """Forward and backward of a batch [B, T]; `parts` is for a side that knows of micro-batches."""
        loss: torch.Tensor = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        loss.backward()
        return loss.detach()

    def generate(self, order: Generate) -> Generated:
        """Greedy generation with a KV cache, timed as a whole."""
        ids = token_ids(order.rows, order.prompt)
        self.model.eval()
        sent, received = self.moved()
        start = time.perf_counter()
        with torch.no_grad():
            output: Any = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=order.new_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=order.logits is not None,
            )
        seconds = time.perf_counter() - start
        now_sent, now_received = self.moved()
        if order.logits is not None:
            np.save(order.logits, torch.stack(output.logits).float().numpy())
        new = output.sequences[:, order.prompt :].tolist()
        return Generated(
            seconds=seconds,
            tokens=tuple(map(tuple, new)),
            sent=now_sent - sent,
            received=now_received - received,
        )

    def answer(self, order: Order) -> Line:
        """Do what was asked."""
        match order:
            case Step():
                return self.step(order)
            case Generate():
                return self.generate(order)
            case Peak():
                return Held(peak_rss=peak_rss_bytes())


def reset_peak() -> int | None:
    """Give back what is free and begin to watch the resident memory anew; what it is now. None where Linux is not."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return _status("VmRSS")
    except (OSError, AttributeError):
        return None


def peak() -> int:
    """The most memory that was resident since `reset_peak`."""
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def token_ids(rows: int, length: int) -> torch.Tensor:
    """The batch of this shape, [rows, length] int64: random, and the same in every process."""
    generator = torch.Generator().manual_seed(rows * 100_003 + length)
    return torch.randint(0, VOCABULARY, (rows, length), generator=generator)


def answer_orders(side: Side, answers: TextIO) -> None:
    """Answer until standard input ends, which it also does when the measuring process is gone."""
    say(answers, Ready(trainable=sum(p.numel() for p in side.trained)))
    decoder = msgspec.json.Decoder(Order)
    for line in sys.stdin:
        say(answers, side.answer(decoder.decode(line)))
