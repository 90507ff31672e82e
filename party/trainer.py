"""The training loop: the library's `Trainer`, counted, with our evaluation and whole checkpoints.

Schedules, accumulation, clipping, resuming and callbacks are the library's; nothing here knows about the network. With
a `party.pipeline.Pipeline` each batch is computed in micro-batches that overlap, each by the library's own step.
"""

from __future__ import annotations

import errno
import functools
import shutil
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerControl, TrainerState

from party.evaluate import Score, evaluate
from party.pipeline import MOST, Pipeline, Split, run_pipelined
from party.protect import RowTracker
from party.rundir import RunDirectory
from splitfl.cut import Plan
from splitfl.data import Collator, Example
from splitfl.errors import ResourceError

_DISK_TROUBLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


_share: ContextVar[float | None] = ContextVar("share", default=None)
"""Of the micro-batch that is computed here, in its batch's loss; None where batches are computed at once."""


class ExtraLoss(Protocol):
    """What a protocol adds to the loss of a batch."""

    def __call__(self, mask: torch.Tensor, split: Split | None = None) -> torch.Tensor:
        """Of the batch that has just passed the bottom, at once or split; `mask` [B, T] is 1 where there is a token."""


class SplitTrainer(Trainer):
    """`transformers.Trainer` over a party's model.

    Args:
        run: where checkpoints go.
        plan: stamped into every checkpoint.
        on_eval: called with each score made during training.
        tracker: told which rows each batch holds.
        extra_loss: added to the loss of every batch.
        on_checkpoint: called with the name of each checkpoint once it is whole.
        pipeline: how batches are split into micro-batches that overlap; None computes each at once.
    """

    def __init__(
        self, *args: Any, run: RunDirectory, plan: Plan, collator: Collator, held_out: list[Example] | None,
        on_eval: Callable[[int, Score], None] | None = None, tracker: RowTracker | None = None,
        extra_loss: ExtraLoss | None = None, pipeline: Pipeline | None = None,
        on_checkpoint: Callable[[str], None] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, data_collator=collator, eval_dataset=held_out, **kwargs)
        self.run, self.plan, self.collator, self.held_out, self.on_eval = run, plan, collator, held_out, on_eval
        self.tracker, self.extra_loss, self.pipeline = tracker, extra_loss, pipeline
        self.on_checkpoint = on_checkpoint
        self.last_score: tuple[int, Score] | None = None
        """Step and score of the latest evaluation: the same weights are not scored twice."""
        self._penalty, self._penalty_steps = 0.0, 0
        self.tokens_seen = 0
        self.remove_callback(PrinterCallback)

    def go_on(self, checkpoint: Path | None) -> None:
        """Train from `checkpoint`, or from the start. One of the last step is only read: the loop would add a step."""
        if checkpoint is not None:
            state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            wanted, epochs = self.args.max_steps, self.args.num_train_epochs
            if state.global_step >= wanted if wanted > 0 else (state.epoch or 0) >= epochs:
                self._load_from_checkpoint(str(checkpoint))
                self.state = state
                return
        self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """One batch, counted; in micro-batches if there is a pipeline."""
        self.tokens_seen += int(inputs["attention_mask"].sum())
        if self.pipeline is not None:
            split = self.pipeline.split(inputs, most=MOST if self.extra_loss is not None else None)
            if len(split.parts) > 1 and all(share > 0 for share in self._shares(split)):
                return self._pipelined_step(self.pipeline, split, model, inputs["attention_mask"], *args, **kwargs)
        if self.tracker is not None:
            self.tracker.training(inputs)
        return super().training_step(model, inputs, *args, **kwargs)

    def _pipelined_step(
        self, pipeline: Pipeline, split: Split, model: nn.Module, mask: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """The library's step for each micro-batch, overlapping; the sum of their losses, which is the batch's."""
        scaled = self._is_scaled(num_items_in_batch)

        def step(part: dict[str, Any], share: float) -> torch.Tensor:
            _share.set(1.0 if scaled else share)
            if self.tracker is not None:
                self.tracker.training(part)
            return super(SplitTrainer, self).training_step(model, part, num_items_in_batch)

        works = [functools.partial(step, *of) for of in zip(split.parts, self._shares(split), strict=True)]
        extra: list[torch.Tensor] = []
        if self.extra_loss is None:
            losses = run_pipelined(works, window=pipeline.window(split))
        else:  # it is a function of the whole batch, so all of it has to be there
            add = functools.partial(self._extra_step, mask, split, scaled, extra)
            losses = run_pipelined(works, forwards_done=add)
        return torch.stack([*losses, *extra]).sum()

    def _extra_step(self, mask: torch.Tensor, split: Split, scaled: bool, losses: list[torch.Tensor]) -> None:
        """Loss and gradient of what a protocol adds, on what all bottoms have computed."""
        assert self.extra_loss is not None  # noqa: S101
        extra = self.extra_loss(mask, split)
        self._penalty += extra.item() / self.args.gradient_accumulation_steps
        steps = self.args.gradient_accumulation_steps if scaled else self.current_gradient_accumulation_steps
        extra = extra / steps
        self.accelerator.backward(extra)
        losses.append(extra.detach())

    def _shares(self, split: Split) -> list[float]:
        """Of the items that the loss of a batch is a mean over, those in each part."""
        counts = []
        for part in split.parts:
            labels = part["labels"]
            counts.append(int((labels[..., 1:] if self._loss_shifts_labels else labels).ne(-100).sum()))
        return [count / max(sum(counts), 1) for count in counts]

    def _is_scaled(self, num_items_in_batch: torch.Tensor | int | None) -> bool:
        """Whether the loss is divided by what all batches of a step count, rather than a mean over each."""
        if self.loss_is_scaled_for_ga is not None:
            return bool(self.loss_is_scaled_for_ga)
        by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return bool(by_model or self.compute_loss_func is not None)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The model's own loss, and what a protocol adds to it; of a micro-batch, its share in its batch's loss."""
        mask = inputs["attention_mask"]
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        share = _share.get()
        if share is not None:
            return loss * share
        if self.extra_loss is None:
            return loss
        extra = self.extra_loss(mask)
        if self.model is not None and self.model.training:
            self._penalty += extra.item() / self.args.gradient_accumulation_steps
        if self.model_accepts_loss_kwargs and kwargs.get("num_items_in_batch") is not None:
            extra = extra / self.args.gradient_accumulation_steps  # the library divides the loss there already
        return loss + extra.to(loss.dtype)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Held-out loss over tokens (the library's is a mean over batches)."""
        assert self.held_out is not None  # noqa: S101
        assert self.model is not None  # noqa: S101
        score = evaluate(
            self.model,
            self.held_out,
            self.collator,
            task=self.plan.task,
            batch_size=self.args.per_device_eval_batch_size,
            device=str(self.args.device),
            on_batch=self.tracker.scoring if self.tracker else None,
        )
        self.last_score = self.state.global_step, score
        if self.on_eval is not None:
            self.on_eval(self.state.global_step, score)
        metrics = {f"eval_{name}": value for name, value in score.facts().items()}
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The model's own loss as ``loss``, and what a protocol added to it as ``penalty``."""
        steps = self.state.global_step - self._penalty_steps
        if self.extra_loss is not None and "loss" in logs and steps > 0:
            penalty = self._penalty / steps
            logs = {**logs, "loss": logs["loss"] - penalty, "penalty": penalty}
            self._penalty, self._penalty_steps = 0.0, self.state.global_step
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        folder = self.run.checkpoints / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(*args, **kwargs)
            self.run.mark_complete(folder, self.plan)
            if self.on_checkpoint is not None:
                self.on_checkpoint(folder.name)
        except Exception as error:
            shutil.rmtree(folder, ignore_errors=True)
            if _is_disk_trouble(error):
                raise disk_full(folder) from error
            raise


def disk_full(path: Path) -> ResourceError:
    """The error for a save that found no room."""
    return ResourceError(
        f"There was no room to write {path}; what was half written has been removed.",
        expected="free space for an adapter, its optimiser state and a report",
        hint="free some space and start again with --resume: earlier checkpoints are whole",
    )


def _is_disk_trouble(error: BaseException) -> bool:
    """Whether `error` or what caused it says that the disk (or the quota) is full."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _DISK_TROUBLE:
            return True
        # safetensors and torch report a failed write in words, without the number.
        if any(words in str(seen) for words in ("No space left", "os error 28", "File too large", "os error 27")):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
