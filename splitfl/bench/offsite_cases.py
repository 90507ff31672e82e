"""What `splitfl bench offsite` runs: tasks, the ways that are compared, trials of learning rates, seeds.

Three trainings make the six ways. *Offsite* trains LoRA on the party's layers with the emulator in the middle, and
gives four: the full model and the emulated one before it, the emulated one after it, and the full model with the
adapter plugged in. *Full fine-tuning* trains LoRA on every layer of the model in one piece. *Split* trains the party's
layers through the true trunk: what the same adapter could become at most.

All three have the same rank, rows, batches and steps. The learning rate is each training's own: the one with the least
loss on validation rows, which are taken from the training rows and not trained on meanwhile. For *offsite* that loss is
the emulated model's: a data holder sees no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from splitfl.bench.offsite_settings import OffsiteSettings
from splitfl.bench.utility_cases import Kind
from splitfl.errors import DataError

FULL_ZERO, EMULATOR_ZERO, EMULATOR_TUNED = "full zero-shot", "emulator zero-shot", "emulator tuned"
PLUGIN, FULL_TUNED, SPLIT = "plug-in", "full fine-tuning", "split"
WAYS = (FULL_ZERO, EMULATOR_ZERO, EMULATOR_TUNED, PLUGIN, FULL_TUNED, SPLIT)
OFFSITE = "offsite"
TRAININGS = (OFFSITE, FULL_TUNED, SPLIT)
DONE_WITH = {OFFSITE: PLUGIN, FULL_TUNED: FULL_TUNED, SPLIT: SPLIT}
"""The way whose figures say that a training is done."""

SEEDS, QUICK_SEEDS, TRIAL_SEED = (0, 1, 2), (0,), 0
RATES = (2e-3, 5e-3)
QUICK_STEPS, QUICK_ROWS = 4, (32, 16)
DISTIL_STEPS, DISTIL_RATE, DISTIL_BATCH, DISTIL_LENGTH = 400, 5e-4, 8, 128
BOTTOM = TOP = 2
RANK = 8

SCORES = ("held-out loss", "held-out accuracy", "held-out macro_f1")
COSTS = ("bytes sent", "bytes received", "seconds", "steps", "learning rate")
UNITS = {
    "held-out loss": "nats", "held-out accuracy": "share", "held-out macro_f1": "", "bytes sent": "bytes",
    "bytes received": "bytes", "seconds": "s", "steps": "steps", "learning rate": "",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Task:
    """Rows, and how they are trained; the same for every model and way."""

    name: str
    title: str
    kind: Kind
    classes: int = 0
    """0 for a language model."""
    shared: str = ""
    """Folder of the shared data with train.jsonl and test.jsonl; empty where only shipped rows are used."""
    fields: tuple[str, str]
    """Names of prompt and completion, or text and label, in the files."""
    labels: tuple[str, ...] = ()
    """Names of the classes, where the files do not number them."""
    shipped: tuple[str, str] | None = None
    """Files of training and held-out rows that come with splitfl; None where they do not."""
    rows: tuple[int, int]
    """At most so many training and held-out rows; one training row in six is for validation while rates are tried."""
    max_length: int
    batch: int = 8
    steps: int
    metric: str

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger value of the score is the better one."""
        return self.metric != "held-out loss"

    def better(self, one: float, other: float) -> float:
        """By how much the score `one` is better than `other`."""
        return one - other if self.higher_is_better else other - one


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="answers", title="answers to medical questions", kind="causal-lm", fields=("prompt", "completion"),
            shipped=("hospital.train.jsonl", "hospital.held.jsonl"), rows=(300, 40), max_length=80, steps=40,
            metric="held-out loss",
        ),
        Task(
            name="restaurants", title="sentences from facts about restaurants", kind="causal-lm", shared="e2e_nlg",
            fields=("mr", "ref"), rows=(300, 80), max_length=96, steps=40, metric="held-out loss",
        ),
        Task(
            name="spam", title="text messages, wanted or not", kind="sequence-classification", classes=2,
            shared="sms_spam", fields=("text", "label"), labels=("ham", "spam"), rows=(480, 120), max_length=48,
            steps=40, metric="held-out accuracy",
        ),
        Task(
            name="polarity", title="film reviews, positive or negative", kind="sequence-classification", classes=2,
            shared="sentence_polarity", fields=("text", "label"),
            shipped=("sentiment.train.csv", "sentiment.test.csv"), rows=(640, 400), max_length=40, steps=40,
            metric="held-out accuracy",
        ),
    )
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training of one model on one task."""

    model: str
    task: Task
    training: str
    seed: int
    rate: float | None = None
    """Of a trial; None where the best of the trials is taken."""

    @property
    def name(self) -> str:
        """How figures call what says that it is done."""
        if self.rate is not None:
            return f"{self.model} / {self.task.name} / {self.training} / learning rate {self.rate:g}"
        return way_name(self.model, self.task.name, DONE_WITH[self.training], self.seed)


def way_name(model: str, task: str, way: str, seed: int) -> str:
    """The case of a way's figures."""
    return f"{model} / {task} / {way} / seed {seed}"


def parse_way(case: str) -> tuple[str, str, str, int]:
    """Model, task, way and seed of a case.

    Raises:
        DataError: it is none of a way.
    """
    parts = case.split(" / ")
    if len(parts) == 4 and parts[1] in TASKS and parts[2] in WAYS:
        word, _, number = parts[3].partition(" ")
        if word == "seed" and number.isdigit():
            return parts[0], parts[1], parts[2], int(number)
    raise DataError(f"{case!r} names no way of splitfl bench offsite.")


def plan_cells(settings: OffsiteSettings, model: str, tasks: Sequence[Task]) -> list[Cell]:
    """Every training of a model that the settings ask for: the trials first, then seed by seed."""
    seeds = list(dict.fromkeys(settings.seeds or (QUICK_SEEDS if settings.quick else SEEDS)))
    cells = []
    if not settings.quick:
        cells += [
            Cell(model=model, task=task, training=training, seed=TRIAL_SEED, rate=rate)
            for task in tasks
            for training in TRAININGS
            for rate in RATES
        ]
    cells += [
        Cell(model=model, task=task, training=training, seed=seed)
        for seed in seeds
        for task in tasks
        for training in TRAININGS
    ]
    return cells


def steps_of(task: Task, settings: OffsiteSettings) -> int:
    """Training steps of every training of a task."""
    return settings.max_steps or (QUICK_STEPS if settings.quick else task.steps)


def distil_steps_of(settings: OffsiteSettings) -> int:
    """Steps of distillation of every emulator."""
    if settings.distil_steps is not None:
        return settings.distil_steps
    return QUICK_STEPS if settings.quick else DISTIL_STEPS
