"""Distillation of an emulator: what is left of the trunk learns, on public text, to stand in for all of it.

The student is the layers kept, with all their weights; bottom and top are the full model's own and stay as they are:

    loss = LM + 30 KD,   KD = mean over positions of mean_d (T - S)^2 / mean_d T^2

where LM is the student's language-model loss, T [B, T, D] the full trunk's output and S the student's, over positions
that are no padding; for an encoder there is no LM and the loss is 30 KD. (Xiao, Lin and Han, "Offsite-Tuning: Transfer
Learning without Full Model", 2023; weights as in the authors' code.) Dropout is off: it would be noise on what is
to be matched.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerControl, TrainerState, TrainingArguments

from model_owner.distil_progress import DistilProgress, complete, newest_checkpoint
from model_owner.student import KD_WEIGHT, Batch, Figures, Pair, measure, relative_error
from splitfl.data import Collator, Example
from splitfl.errors import ModelError
from splitfl.interrupts import StopRequest
from splitfl.metrics import RunLog

_WARMUP_SHARE = 0.05  # of the steps
_TOO_MUCH, _IN_A_ROW = 2.0, 3  # held-out loss over the best, and how often, before distillation is called off


class Learner(nn.Module):
    """Layers that learn to stand in the trunk's places, as a trainer sees them: only they are trained, moved and saved.

    `forward` takes a batch by names and gives ``loss``, ``lm`` and ``kd``.

    Args:
        pair: whose student they are.
        layers: their numbers.
    """

    pair: Pair

    def __init__(self, pair: Pair, layers: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(index): pair.student[index].requires_grad_(True) for index in layers})
        self.__dict__["pair"] = pair  # past the registry: the full model is no part of this module

    def figures(self, examples: Sequence[Example], collator: Collator, batch_size: int) -> Figures:
        """What the layers are worth on held-out examples; the best state is that with the smallest ``loss``."""
        return measure(self.pair, examples, collator, batch_size=batch_size)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode: no dropout."""
        return super().train(False)


class Student(Learner):
    """The layers kept, which learn the language and the trunk's output on the same text."""

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Loss of a batch [B, T]: ``loss``, and its parts ``kd`` and ``lm`` (0 without labels)."""
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        lm, output = self.pair.student_output(batch, labels)
        kd = relative_error(output, self.pair.full_output(batch), attention_mask).mean()
        if lm is None:
            lm = torch.zeros_like(kd)
        return {"loss": lm + KD_WEIGHT * kd, "lm": lm.detach(), "kd": kd.detach()}


# ---- training


@dataclass(frozen=True, kw_only=True)
class DistilOptions:
    """How to distil; names as in `transformers.TrainingArguments`."""

    max_steps: int
    learning_rate: float = 1e-4
    batch_size: int = 8
    eval_steps: int = 50
    save_steps: int = 50
    logging_steps: int = 10
    seed: int = 0
    device: str = "cpu"

    def arguments(self, folder: Path, *, resumes: bool) -> TrainingArguments:
        """For the library's loop."""
        return TrainingArguments(
            output_dir=str(folder / "checkpoints"),
            max_steps=self.max_steps,
            learning_rate=self.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=math.ceil(_WARMUP_SHARE * self.max_steps),
            per_device_train_batch_size=self.batch_size,
            per_device_eval_batch_size=self.batch_size,
            logging_steps=self.logging_steps,
            logging_nan_inf_filter=False,  # a loss that is not finite ends the run here and is not to be smoothed over
            eval_strategy="steps",
            eval_steps=self.eval_steps,
            eval_on_start=not resumes,
            save_strategy="steps",
            save_steps=self.save_steps,
            save_total_limit=2,
            seed=self.seed,
            use_cpu=self.device == "cpu",
            dataloader_pin_memory=self.device != "cpu",
            remove_unused_columns=False,
            label_names=[],
            disable_tqdm=True,
            report_to="none",
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How distillation ended; the student holds the best state."""

    best_step: int
    steps: int
    seconds: float
    tokens: int
    interrupted: bool
    diverged: str | None
    """What went wrong, in words; None if nothing did."""


def distil(
    pair: Pair, kept: Sequence[int], train: Sequence[Example], held_out: Sequence[Example], collator: Collator,
    folder: Path, options: DistilOptions, *, resume: bool = False,
) -> Outcome:  # fmt: skip
    """Train the student of `pair`, in place; its best state on `held_out` is what it has in the end.

    Args:
        folder: for checkpoints, the best state and `run.jsonl`.
        resume: go on from the newest whole checkpoint in `folder`, if there is one. The very same bits come out as
            without the interruption, on the same machine with as many threads.

    Raises:
        ModelError: the loss is not finite before anything was trained, or a checkpoint does not fit.
    """
    return train_learner(Student(pair, kept), train, held_out, collator, folder, options, resume=resume)


def train_learner(
    student: Learner, train: Sequence[Example], held_out: Sequence[Example], collator: Collator, folder: Path,
    options: DistilOptions, *, resume: bool = False,
) -> Outcome:  # fmt: skip
    """The loop of `distil`, for whatever the learner learns."""
    checkpoint = newest_checkpoint(folder / "checkpoints") if resume else None
    arguments = options.arguments(folder, resumes=checkpoint is not None)
    arguments._n_gpu = min(arguments.n_gpu, 1)  # a pair is one model: it cannot be replicated
    student.pair.model.to(arguments.device)
    kept, stop = sorted(map(int, student.layers)), StopRequest()
    with RunLog(folder / "run.jsonl") as log:
        log.write("start", kept=kept, resumed_from=checkpoint and checkpoint.name, parameters=_size(student))
        progress = DistilProgress(log)
        trainer = DistilTrainer(
            model=student,
            args=arguments,
            train_dataset=list(train),
            eval_dataset=list(held_out),
            data_collator=collator,
            callbacks=[progress, stop],
            folder=folder,
            run_log=log,
            progress=progress,
        )
        try:
            with stop.watching():
                trainer.go_on(checkpoint)
            interrupted = stop.asked and trainer.state.global_step < options.max_steps and not trainer.diverged
            if not interrupted and trainer.diverged is None and trainer.measured_at != trainer.state.global_step:
                trainer.evaluate()
        except _NotFinite as error:
            interrupted, trainer.diverged = False, str(error)
        finally:
            progress.stop()
        best = load_best(student, folder)
        log.write("end", steps=trainer.state.global_step, best_step=best, diverged=trainer.diverged)
    student.requires_grad_(False)
    return Outcome(
        best_step=best,
        steps=trainer.state.global_step,
        seconds=progress.seconds,
        tokens=progress.tokens,
        interrupted=interrupted,
        diverged=trainer.diverged,
    )


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class _NotFinite(Exception):
    """A training loss that is no number."""


def diverged(history: Sequence[float]) -> bool:
    """Whether held-out losses, oldest first, end in one that is no number or in three above twice the best so far."""
    best, bad = math.inf, 0
    for loss in history:
        bad = bad + 1 if loss > _TOO_MUCH * best else 0
        best = min(best, loss)
    return bool(history) and (not math.isfinite(history[-1]) or bad >= _IN_A_ROW)


class DistilTrainer(Trainer):
    """`transformers.Trainer` over a `Learner`: our held-out measurement, best state kept, whole checkpoints.

    Args:
        folder: where the best state is kept.
        run_log: the record.
        progress: told what each batch came to.
    """

    control: TrainerControl

    def __init__(self, *args: Any, folder: Path, run_log: RunLog, progress: DistilProgress, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.folder, self.run_log, self.progress = folder, run_log, progress
        self.diverged: str | None = None
        self.measured_at: int | None = None
        """Step of the last held-out measurement."""
        self.remove_callback(PrinterCallback)

    def go_on(self, checkpoint: Path | None) -> None:
        """Train from `checkpoint`, or from the start. One of the last step is only read: the loop would add a step."""
        if checkpoint is not None:
            state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            if state.global_step >= self.args.max_steps:
                self._load_from_checkpoint(str(checkpoint))
                self.state = state
                self.measured_at = max((one["step"] for one in state.log_history if "eval_loss" in one), default=None)
                return
        self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The student's loss; refuses to take a step on one that is no number."""
        parts = model(**inputs)
        if not math.isfinite(parts["loss"].item()):
            raise _NotFinite(f"The training loss is no finite number after step {self.state.global_step}.")
        self.progress.count(int(inputs["attention_mask"].sum()), parts["lm"].item(), parts["kd"].item())
        return (parts["loss"], parts) if return_outputs else parts["loss"]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Held-out figures; keeps the state if it is the best so far, and stops if the loss runs away."""
        student, step = self.model, self.state.global_step
        assert isinstance(student, Learner)  # noqa: S101
        assert isinstance(self.data_collator, Collator)  # noqa: S101
        size = self.args.per_device_eval_batch_size
        figures = student.figures(self.eval_dataset, self.data_collator, size)
        before = [entry["eval_loss"] for entry in self.state.log_history if "eval_loss" in entry]
        if not before and not math.isfinite(figures.loss):
            raise ModelError("The emulator's loss is no finite number before distillation has begun.")
        if figures.loss < min(before, default=math.inf):
            _save_best(student, self.folder, step)
        metrics = {"eval_loss": figures.loss, "eval_kd": figures.kd}
        self.log(metrics)  # into the state, so that a checkpoint remembers the history
        self.measured_at = step
        self.run_log.write("eval", step=step, loss=figures.loss, lm=figures.lm, kd=figures.kd)
        self.progress.held_out = figures.loss
        if diverged([*before, figures.loss]):
            worst = f"{figures.loss:.4g} at step {step}, and {min([*before, figures.loss]):.4g} at its best"
            self.diverged = f"The held-out loss is {worst}."
            self.control.should_training_stop = True
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        checkpoint = self.folder / "checkpoints" / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(*args, **kwargs)
            complete(checkpoint)
        except BaseException:
            shutil.rmtree(checkpoint, ignore_errors=True)
            raise


def _save_best(student: Learner, folder: Path, step: int) -> None:
    unfinished = folder / ".best.safetensors"
    tensors = {name: tensor.detach().contiguous() for name, tensor in student.state_dict().items()}
    save_file(tensors, unfinished, metadata={"step": str(step)})  # of one entry: their order varies
    os.replace(unfinished, folder / "best.safetensors")


def load_best(student: Learner, folder: Path) -> int:
    """Put the best state kept in `folder` into `student`; the step it is of, 0 if none was kept."""
    file = folder / "best.safetensors"
    if not file.is_file():
        return 0
    with safe_open(file, framework="pt") as kept:
        step = int(kept.metadata()["step"])
    student.load_state_dict(load_file(file))
    return step
