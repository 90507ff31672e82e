"""What a party does with its rows in one round: some steps of the library's trainer, or one mean gradient.

The schedule of the learning rate runs over all rounds, so that rounds of one step are what a run without rounds is. The
optimiser begins anew in each round, unless it is to keep its averages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, get_scheduler

from party.federated_model import SharedModel
from party.progress import TrainingProgress
from party.protect import numbered
from party.rundir import RunDirectory
from party.trainer import SplitTrainer
from party.workplace import Workplace
from splitfl.aggregation.core_training import gradients, trained_cores
from splitfl.aggregation.factors import Update
from splitfl.aggregation.rule import Step
from splitfl.config import TuneSettings
from splitfl.interrupts import StopRequest
from splitfl.kit import Kit

if TYPE_CHECKING:
    from party.tune import Data

_ADAPTER = "default"


class StoppedEarly(Exception):
    """Somebody asked for it in the middle of a round; nothing of the round was sent."""


class LocalTraining:
    """A party's training, round after round.

    Args:
        settings: of the run.
        kit: of the model.
        run: where figures go.
        data: the rows.
        place: the model and what belongs to it.
        rounds: trainings that the whole federation has.
    """

    def __init__(
        self, settings: TuneSettings, kit: Kit, run: RunDirectory, data: Data, place: Workplace, rounds: int
    ) -> None:
        self.settings, self.kit, self.run, self.data, self.place = settings, kit, run, data, place
        self.rounds, self.stop = rounds, StopRequest()
        self.steps = settings.local_steps or self._steps_of_one_pass()
        self.tokens = 0
        self._averages: dict[str, Any] = {}

    def train(
        self, shared: SharedModel, start: Update, what: Step, number: int,
        correction: Mapping[str, torch.Tensor] | None = None,
    ) -> Update:  # fmt: skip
        """Train what the rule lets a party train; the update afterwards.

        Args:
            shared: the model, with `start` loaded.
            start: what was loaded.
            what: which part.
            number: of the training, from 0.
            correction: added to every gradient of a core, by module.

        Raises:
            StoppedEarly: by Ctrl-C or SIGTERM.
        """
        shared.let_train(what.trains)
        if what.trains != "core":
            self._train(shared.model, number, [])
            return shared.read()
        with trained_cores(shared.model, start) as read:
            self._train(shared.model, number, [] if correction is None else [_Correct(shared.model, correction)])
            update = read()
        extras = shared.read().extras  # where a core was, PEFT finds no B
        return Update(update.pairs, extras)

    def gradient(self, shared: SharedModel, start: Update, number: int) -> Update:
        """The mean gradient of A and B over as many batches as a training has, in the place of the factors."""
        model, settings = shared.model, self.settings
        shared.let_train("both")
        model.zero_grad(set_to_none=True)
        size = settings.per_device_train_batch_size
        order = torch.randperm(len(self.data.train), generator=torch.Generator().manual_seed(settings.seed + number))
        chosen = order[: self.steps * settings.gradient_accumulation_steps * size].tolist()
        examples = numbered(self.data.train)
        model.train()
        for begin in range(0, len(chosen), size):
            batch = self.data.collator([examples[index] for index in chosen[begin : begin + size]])
            self.place.tracker.training(batch)
            batch = {name: tensor.to(settings.device) for name, tensor in batch.items()}
            share = len(chosen[begin : begin + size]) / len(chosen)
            (model(**batch).loss * share).backward()
        found = gradients(model, start)
        model.zero_grad(set_to_none=True)
        return found

    def _steps_of_one_pass(self) -> int:
        batch = self.settings.per_device_train_batch_size * self.settings.gradient_accumulation_steps
        return max(1, math.ceil(len(self.data.train) / batch))

    def _train(self, model: PeftModel, number: int, callbacks: list[TrainerCallback]) -> None:
        from party.tune import _training_arguments  # it stands on this module

        settled = {
            **self.place.arguments,
            "max_steps": self.steps,
            "save_strategy": "no",
            "eval_strategy": "no",
            "seed": self.settings.seed + number,
        }
        progress = TrainingProgress(self.place.traffic, self.place.log, done=number * self.steps)
        trainer = self.place.trainer(
            model=model,
            args=_training_arguments(self.settings, self.run, settled),
            train_dataset=numbered(self.data.train),
            callbacks=[progress, self.stop, *callbacks],
            run=self.run,
            plan=self.kit.plan,
            collator=self.data.collator,
            held_out=None,
            tracker=self.place.tracker,
            extra_loss=self.place.extra_loss,
        )
        progress.trainer = trainer
        trainer.create_optimizer()
        trainer.lr_scheduler = later_schedule(trainer, done=number * self.steps, total=self.rounds * self.steps)
        self._restore(trainer)
        try:
            with self.stop.watching():
                trainer.train()
        finally:
            progress.stop()
            self.tokens += trainer.tokens_seen
        if self.stop.asked:
            raise StoppedEarly
        self._keep(trainer)

    # ---- the optimiser's averages, by parameter: which ones it holds differs from round to round

    def _restore(self, trainer: SplitTrainer) -> None:
        if self.settings.keep_optimizer and trainer.optimizer is not None:
            for name, parameter in trainer.model.named_parameters():
                if parameter.requires_grad and name in self._averages:
                    trainer.optimizer.state[parameter] = self._averages[name]

    def _keep(self, trainer: SplitTrainer) -> None:
        if self.settings.keep_optimizer:
            optimizer: Any = trainer.optimizer
            held = getattr(optimizer, "optimizer", optimizer).state  # the library may have wrapped it
            self._averages |= {name: held[p] for name, p in trainer.model.named_parameters() if p in held}


def later_schedule(trainer: SplitTrainer, *, done: int, total: int) -> LambdaLR:
    """The schedule that the settings name over `total` steps, from step `done` on."""
    args = trainer.args
    whole = get_scheduler(
        args.lr_scheduler_type,
        torch.optim.SGD([torch.zeros(1)], lr=1.0),
        num_warmup_steps=args.get_warmup_steps(total),
        num_training_steps=total,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    share = whole.lr_lambdas[0]  # of the peak rate, by step
    return LambdaLR(trainer.optimizer, lambda step: share(step + done))


class _Correct(TrainerCallback):
    """Adds to the gradients of cores before each step of the optimiser."""

    def __init__(self, model: PeftModel, correction: Mapping[str, torch.Tensor]) -> None:
        self._added = []
        for name, change in correction.items():
            up = model.get_submodule(f"base_model.model.{name}.lora_B.{_ADAPTER}")
            core = up.parametrizations.weight.original  # set by `trained_cores`
            self._added.append((core, change))

    def on_pre_optimizer_step(self, *_args: Any, **_kwargs: Any) -> None:
        """All gradients are there, clipped."""
        for core, change in self._added:
            if core.grad is not None:
                core.grad += change.to(core.grad)
