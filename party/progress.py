"""What a person sees while training runs, and what `run.jsonl` keeps of it."""

from __future__ import annotations

import sys
import time
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from party.trainer import SplitTrainer
from splitfl.metrics import Meter, RunLog
from splitfl.report import as_size


class Traffic(Protocol):
    """What counts bytes."""

    @property
    def bytes_sent(self) -> int:
        """Payload bytes sent so far."""

    @property
    def bytes_received(self) -> int:
        """Payload bytes received so far."""


class TrainingProgress(TrainerCallback):
    """A bar with loss, tokens/s, bytes and time left on a terminal; a line at each logging step elsewhere."""

    def __init__(self, traffic: Traffic, log: RunLog, *, done: int = 0) -> None:
        self.traffic, self.log = traffic, log
        self._done = done  # steps of earlier rounds, in a federation
        self.trainer: SplitTrainer | None = None
        self.console = Console(file=sys.stderr, stderr=True)
        self.meter = Meter()
        self._loss: float | None = None
        self._mark = (time.monotonic(), 0, traffic.bytes_sent, traffic.bytes_received)
        self._tokens_metered = 0
        self._bar = Progress(
            TextColumn("tune"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._task: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar."""
        self._mark = (time.monotonic(), self._tokens(), self.traffic.bytes_sent, self.traffic.bytes_received)
        if self.console.is_terminal:
            self._task = self._bar.add_task("tune", total=state.max_steps, completed=state.global_step, facts="")
            self._bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        tokens = self._tokens()
        self.meter.add(tokens - self._tokens_metered)
        self._tokens_metered = tokens
        if self._task is not None:
            self._bar.update(self._task, completed=state.global_step, facts=self._facts())

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        """Record a training loss."""
        if not logs or "loss" not in logs:
            return
        now, tokens = time.monotonic(), self._tokens()
        sent, received = self.traffic.bytes_sent, self.traffic.bytes_received
        since, tokens_before, sent_before, received_before = self._mark
        self._mark = (now, tokens, sent, received)
        self._loss = logs["loss"]
        seconds = now - since
        self.log.write(
            "train",
            step=self._done + state.global_step,
            epoch=logs.get("epoch"),
            loss=logs["loss"],
            learning_rate=logs.get("learning_rate"),
            grad_norm=logs.get("grad_norm"),
            **({"penalty": logs["penalty"]} if "penalty" in logs else {}),
            tokens=tokens - tokens_before,
            tokens_per_s=(tokens - tokens_before) / seconds if seconds else None,
            seconds=seconds,
            bytes_sent=sent - sent_before,
            bytes_received=received - received_before,
        )
        if self._task is None:
            left = self.meter.rate() and (state.max_steps - state.global_step) * seconds / max(args.logging_steps, 1)
            self.console.print(
                f"step {state.global_step}/{state.max_steps}  {self._facts()}  about {left:.0f} s left",
                highlight=False,
                soft_wrap=True,
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the bar away."""
        self.stop()

    def stop(self) -> None:
        """Take the bar away, also after an error; where none was shown, stopping it would print an empty line."""
        if self._task is not None:
            self._bar.stop()

    def _tokens(self) -> int:
        return self.trainer.tokens_seen if self.trainer is not None else 0

    def _facts(self) -> str:
        loss = "" if self._loss is None else f"loss {self._loss:.3f}  "
        moved = f"{as_size(self.traffic.bytes_sent)} sent, {as_size(self.traffic.bytes_received)} received"
        return f"{loss}{self.meter.rate():,.0f} tokens/s  {moved}"
