"""Training with kept replies under measurement, beside a bare loop: ``python -m`` this, with a start.

Replies are random numbers: what they are moves no clock. The trainer is the one of `splitfl tune`, with its tracker and
its cache on disk; the bare loop has the same top layers, adapter and optimiser, and its features in memory.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import torch
from peft import PeftModel
from transformers import TrainerCallback, TrainingArguments

from party.cache import CachedTrunk, CacheKey, TrunkCache, put_cached_trunk
from party.model import open_model
from party.protect import RowTracker, numbered
from party.rundir import RunDirectory
from party.trainer import SplitTrainer
from party.workplace import NoLink
from splitfl.adapters import add_lora, lora_config
from splitfl.bench.lines import own_output, say
from splitfl.bench.orders import Ready
from splitfl.bench.pipeline_orders import Epochs, EpochsTimed, KeptStart
from splitfl.bench.side import token_ids
from splitfl.data import Collator
from splitfl.kit import DTYPES, Kit, open_kit
from splitfl.quiet import silence_library_warnings

_DATASET = "rows"


class _Clock(TrainerCallback):
    """When each step began and ended."""

    def __init__(self) -> None:
        self.began: list[float] = []
        self.ended = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ended = time.perf_counter()


class Kept:
    """A party's top with kept replies."""

    def __init__(self, start: KeptStart) -> None:
        self.start = start
        self.kit: Kit = open_kit(Path(start.kit))
        count = start.rows * start.batches
        self.ids = token_ids(count, start.length)
        self.cache = self._filled(count)
        base = open_model(self.kit, NoLink(), dtype=start.dtype)
        self.cached: CachedTrunk = put_cached_trunk(base, self.kit.plan, "right")
        self.cached.caches = {_DATASET: self.cache}
        self.model: PeftModel = add_lora(base, lora_config(base, self.kit.plan, top_alone=True))
        self.runs = 0

    def _filled(self, count: int) -> TrunkCache:
        start, plan = self.start, self.kit.plan
        key = CacheKey(
            plan=plan.digest, dataset=_DATASET, tokens="", protection="none", compute=start.dtype, dtype=start.dtype,
            padding_side="right", batch_size=start.rows, examples=count,
        )  # fmt: skip
        cache = TrunkCache(Path(start.folder) / "replies", key, [start.length] * count)
        cache.start()
        for batch in cache.missing:
            replies = torch.randn(start.rows, start.length, plan.width).to(DTYPES[start.dtype])
            cache.keep(batch, replies, torch.ones(start.rows, start.length))
        cache.load()
        return cache

    def trained(self) -> float:
        """Seconds of the second epoch of the run's own trainer."""
        start, clock = self.start, _Clock()
        self.runs += 1
        folder = Path(start.folder) / f"run-{self.runs}"
        arguments = TrainingArguments(
            output_dir=str(folder), max_steps=2 * start.batches, per_device_train_batch_size=start.rows,
            save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, remove_unused_columns=False,
            label_names=["labels"], dataloader_pin_memory=False, logging_strategy="no",
        )  # fmt: skip
        examples = numbered(
            [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids} for ids in self.ids.tolist()]
        )
        trainer = SplitTrainer(
            model=self.model, args=arguments, train_dataset=examples, run=RunDirectory(folder), plan=self.kit.plan,
            collator=Collator(SimpleNamespace(pad_token_id=0, eos_token_id=None)), held_out=None, callbacks=[clock],
            tracker=RowTracker(self.cached, train=_DATASET),
        )  # fmt: skip
        trainer.train()
        return clock.ended - clock.began[start.batches]

    def local(self) -> float:
        """Seconds of one epoch of the same layers in a bare loop."""
        rows = self.start.rows
        features = self.cache.padded(range(len(self.ids)), self.start.length, "right")
        current = [features[:rows]]
        self.cached.forward = lambda hidden, *_, **__: self.cached.form(current[0])  # type: ignore[method-assign]
        try:
            self.model.train()
            optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)
            mask = torch.ones(rows, self.start.length, dtype=torch.int64)
            began = time.perf_counter()
            for ids, part in zip(self.ids.split(rows), features.split(rows), strict=True):
                current[0] = part
                self.model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            return time.perf_counter() - began
        finally:
            del self.cached.forward


def main() -> None:
    """Answer orders until standard input ends."""
    silence_library_warnings()
    answers = own_output()
    start = msgspec.json.decode(sys.argv[1], type=KeptStart)
    torch.set_num_threads(start.threads)
    kept = Kept(start)
    say(answers, Ready(trainable=sum(p.numel() for p in kept.model.parameters() if p.requires_grad)))
    for line in sys.stdin:
        msgspec.json.decode(line, type=Epochs)
        first = kept.local() if kept.runs % 2 else None  # who goes first changes
        trained = kept.trained()
        say(answers, EpochsTimed(kept=trained, local=first if first is not None else kept.local()))


if __name__ == "__main__":
    main()
