"""A data holder's training under measurement: ``python -m party.offsite_side``, with a start as its argument.

Either the model that `splitfl tune --protocol guarded-offline` trains, or LoRA on every layer of the whole model. One
model a process, so that its memory can be told from the other's.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, TextIO

import msgspec
import psutil
import torch
from peft import PeftModel, TaskType
from torch.utils.flop_counter import FlopCounterMode

from party.model import check_device
from party.offline import emulated_model, find_emulator
from party.utility_side import settings_in
from party.whole import whole_with_lora
from splitfl.adapters import add_lora, lora_config
from splitfl.bench.offsite_orders import Counted, CountFlops, Opened, SideOrder, SideStart
from splitfl.bench.orders import Held, Line, Step, Stepped
from splitfl.bench.side import own_output
from splitfl.config import TuneSettings
from splitfl.kit import Kit, open_kit
from splitfl.metrics import peak_rss_bytes
from splitfl.quiet import silence_library_warnings


class OffsiteSide:
    """One model, and training steps on it.

    Args:
        model: with its adapters, in training mode.
        settings: learning rate and device.
    """

    def __init__(self, model: PeftModel, settings: TuneSettings) -> None:
        self.model, self.device = model.train(), settings.device
        self.classifies = model.peft_config["default"].task_type == TaskType.SEQ_CLS
        self.vocabulary = int(model.config.get_text_config().vocab_size)
        self.optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=settings.learning_rate
        )

    def batch(self, rows: int, length: int) -> dict[str, torch.Tensor]:
        """Random ids [rows, length], the same in every process."""
        drawn = torch.Generator().manual_seed(rows * 100_003 + length)
        ids = torch.randint(0, self.vocabulary, (rows, length), generator=drawn).to(self.device)
        labels = torch.zeros_like(ids[:, 0]) if self.classifies else ids
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def step(self, order: Step) -> Stepped:
        """Forward, backward and optimiser, timed together."""
        batch = self.batch(order.rows, order.length)
        self._wait()
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(**batch).loss
        loss.backward()
        self.optimizer.step()
        self._wait()
        return Stepped(seconds=time.perf_counter() - start, loss=loss.item())

    def count(self, order: CountFlops) -> Counted:
        """What torch counts in one forward and backward."""
        batch = self.batch(order.rows, order.length)
        counter = FlopCounterMode(display=False)
        with counter:
            self.model(**batch).loss.backward()
        self.optimizer.zero_grad(set_to_none=True)
        return Counted(flops=int(counter.get_total_flops()))

    def held(self) -> Held:
        """The most memory held: of the device where that has its own, else of the process."""
        if self.device.startswith("cuda"):
            return Held(peak_rss=int(torch.cuda.max_memory_allocated(self.device)))
        return Held(peak_rss=peak_rss_bytes())

    def answer(self, order: SideOrder) -> Line:
        """Do what was asked."""
        if isinstance(order, Step):
            return self.step(order)
        return self.count(order) if isinstance(order, CountFlops) else self.held()

    def _wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)


def open_side(start: SideStart) -> OffsiteSide:
    """The model that the start describes, with fresh adapters."""
    settings = settings_in(Path(start.settings))
    check_device(settings.device)
    kit = open_kit(settings.kit)
    model = _emulated(settings, kit) if start.whole is None else whole_with_lora(settings, kit, Path(start.whole))
    return OffsiteSide(model, settings)


def _emulated(settings: TuneSettings, kit: Kit) -> PeftModel:
    base = emulated_model(settings, kit, find_emulator(settings, kit))
    asked: dict[str, Any] = {**settings.lora_kwargs(), "target_modules": list(settings.target_modules) or None}
    return add_lora(base, lora_config(base, kit.plan, **asked), seed=settings.seed)


def _say(answers: TextIO, line: Line) -> None:
    answers.write(msgspec.json.encode(line).decode() + "\n")
    answers.flush()


def main() -> None:
    """Run until standard input ends, which it also does when the measuring process is gone."""
    silence_library_warnings()
    answers = own_output()
    start = msgspec.json.decode(sys.argv[1], type=SideStart)
    base = 0 if settings_in(Path(start.settings)).device.startswith("cuda") else int(psutil.Process().memory_info().rss)
    side = open_side(start)
    trained = sum(p.numel() for p in side.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in side.model.parameters())
    _say(answers, Opened(base_rss=base, trainable=trained, parameters=total))
    decoder = msgspec.json.Decoder(SideOrder)
    for line in sys.stdin:
        _say(answers, side.answer(decoder.decode(line)))


if __name__ == "__main__":
    main()
