"""What `splitfl bench utility` runs: tasks, designs, noise levels and seeds, and the settings of each run.

Noise is given as r / sigma: r is the root mean square, over the tokens of training rows, of the norm of one token's
activation at the cut, before any training; sigma is the standard deviation of the noise on each coordinate. Rows are
clipped to r * sqrt(tokens of a median row), the norm of a row of that length, so clipping is mild and the same at every
level. The epsilon of the formal level is for one release of one record: see `splitfl.privacy.calibration`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from splitfl.bench.utility_settings import UtilitySettings
from splitfl.errors import UsageError, nearest, printable
from splitfl.privacy.calibration import recovery, zcdp_sigma

REFERENCE = "full LoRA"
DESIGNS = ("split", "guarded-online", "guarded-gradfree")
LEVELS = ("none", "64", "32", "16", "8", "int4", "decorrelate-0", "epsilon-8")
SEEDS = (0, 1, 2)
QUICK_LEVELS, QUICK_SEEDS, QUICK_STEPS, QUICK_ROWS = ("none", "16"), (0,), 8, (64, 32)
EPSILON, DELTA = 8.0, 1e-5
FORMAL = "epsilon-8"
INSTEAD: Mapping[str, Mapping[str, Any]] = {"int4": {"quantise": "int4"}, "decorrelate-0": {"decorrelate": 0.0}}
"""Levels without noise, by what replaces a default of the coded design: each shows what that default costs."""
FORMAL_DESIGN, CODED_DESIGN = "guarded-gradfree", "guarded-online"

SCORES = ("held-out loss", "held-out accuracy", "held-out macro_f1")
COSTS = ("bytes sent", "bytes received", "seconds", "steps")
FIGURES = (*SCORES, *COSTS)
RATIO, ONCE, WHOLE_RUN = "r / sigma", "token recovery by formula, one release", "token recovery by formula, the run"
UNITS = {
    "held-out loss": "nats", "held-out accuracy": "share", "held-out macro_f1": "", "bytes sent": "bytes",
    "bytes received": "bytes", "seconds": "s", "steps": "steps", RATIO: "", ONCE: "share", WHOLE_RUN: "share",
}  # fmt: skip

_WORDS = ("none", *INSTEAD, FORMAL)

Kind: TypeAlias = Literal["causal-lm", "sequence-classification"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model, rows, and how they are trained; the same for every design."""

    name: str
    title: str
    model: Literal["minilm", "embedded"]
    kind: Kind
    classes: int
    """0 for a language model."""
    shared: str
    """Folder of the shared data with train.jsonl and test.jsonl; empty where only shipped rows are used."""
    shipped: tuple[str, str] | None
    """Files of training and held-out rows that come with splitfl; None where they do not."""
    rows: tuple[int, int]
    """At most so many training and held-out rows."""
    bottom: int
    top: int
    max_length: int
    batch: int
    steps: int
    learning_rate: float
    """Tuned by hand with the reference on seed 0; every design has the same."""
    metric: str
    """The score that designs are compared by."""

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger value of the score is the better one."""
        return self.metric != "held-out loss"

    def epochs(self, train_rows: int, steps: int) -> int:
        """How often a training row is sent where every step sends its batch; at most."""
        return math.ceil(steps * self.batch / train_rows)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="polarity", title="film reviews, positive or negative", model="minilm", kind="sequence-classification",
            classes=2, shared="sentence_polarity", shipped=("sentiment.train.csv", "sentiment.test.csv"),
            rows=(480, 240), bottom=1, top=2, max_length=32, batch=8, steps=80, learning_rate=1.5e-3,
            metric="held-out accuracy",
        ),
        Task(
            name="tweets", title="hate, offensive or neither", model="minilm", kind="sequence-classification",
            classes=3, shared="hate_offensive_davidson", shipped=None,
            rows=(480, 240), bottom=1, top=2, max_length=32, batch=8, steps=80, learning_rate=1.5e-3,
            metric="held-out macro_f1",
        ),
        Task(
            name="answers", title="answers to medical questions", model="embedded", kind="causal-lm",
            classes=0, shared="", shipped=("hospital.train.jsonl", "hospital.held.jsonl"),
            rows=(120, 40), bottom=2, top=2, max_length=80, batch=8, steps=30, learning_rate=3e-3,
            metric="held-out loss",
        ),
    )
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Level:
    """What is done to activations before they leave."""

    name: str
    ratio: float | None = None
    """r / sigma; None without noise of a given size."""
    formal: bool = False
    """Noise by epsilon and delta, with a bound."""
    instead: bool = False
    """One of `INSTEAD`."""

    def fits(self, design: str) -> bool:
        """Whether this level is run with this design."""
        return (not self.formal or design == FORMAL_DESIGN) and (not self.instead or design == CODED_DESIGN)

    def sigma(self, norm: float, clip: float) -> float | None:
        """Standard deviation of the noise, in the unit of the activations; None without noise.

        Args:
            norm: r.
            clip: largest norm of a row.
        """
        if self.formal:
            return zcdp_sigma(EPSILON, DELTA, sensitivity=2 * clip, releases=1)
        return None if self.ratio is None else norm / self.ratio

    def options(self, norm: float, clip: float) -> dict[str, Any]:
        """Options of `splitfl tune`; arguments as for `sigma`."""
        if self.instead:
            return dict(INSTEAD[self.name])
        if self.formal:
            return {"noise": "gauss", "clip": clip, "epsilon": EPSILON, "delta": DELTA, "unit": "record"}
        return {} if self.ratio is None else {"noise": "gauss", "clip": clip, "sigma": self.sigma(norm, clip)}


def level_named(name: str) -> Level:
    """The level that an option names.

    Raises:
        UsageError: there is none of that name.
    """
    if name in _WORDS:
        return Level(name=name, formal=name == FORMAL, instead=name in INSTEAD)
    try:
        ratio = float(name)
    except ValueError:
        ratio = math.nan
    if not 0 < ratio < 1e6:
        raise UsageError(
            f"There is no level {printable(name, 40)!r}.",
            expected=f"{', '.join(_WORDS)}, or r/sigma as a number above 0, such as 16",
        )
    return Level(name=f"{ratio:g}", ratio=ratio)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run."""

    task: Task
    design: str
    level: Level
    seed: int

    @property
    def name(self) -> str:
        """How figures and tables call it."""
        return " / ".join((self.task.name, self.design, level_title(self.level.name), f"seed {self.seed}"))

    @property
    def reference(self) -> str:
        """The name of the run that it is compared with."""
        return reference_name(self.task.name, self.seed)


def reference_name(task: str, seed: int) -> str:
    """The name of a task's reference run."""
    return f"{task} / {REFERENCE} / none / seed {seed}"


def level_title(name: str) -> str:
    """A level in the name of a case."""
    return name if name in _WORDS else f"r/sigma {name}"


def plan_cells(settings: UtilitySettings, tasks: Sequence[Task]) -> list[Cell]:
    """Every run that the settings ask for, seed by seed and task by task, the reference first.

    Raises:
        UsageError: a design or a level that there is not, or no run left.
    """
    for design in settings.designs:
        if design not in DESIGNS:
            raise UsageError(f"There is no design {printable(design, 40)!r}.", hint=nearest(design, DESIGNS))
    designs = [design for design in DESIGNS if not settings.designs or design in settings.designs]
    names = settings.levels or (QUICK_LEVELS if settings.quick else LEVELS)
    levels = list(dict.fromkeys(map(level_named, names)))
    cells = []
    for seed in dict.fromkeys(settings.seeds or (QUICK_SEEDS if settings.quick else SEEDS)):
        for task in tasks:
            cells.append(Cell(task=task, design=REFERENCE, level=level_named("none"), seed=seed))
            cells += [
                Cell(task=task, design=design, level=level, seed=seed)
                for design in designs
                for level in levels
                if level.fits(design)
            ]
    if all(cell.design == REFERENCE for cell in cells):
        raise UsageError(
            "These levels are not run with these designs: nothing is left to compare.",
            expected=f"{FORMAL} with {FORMAL_DESIGN}; {' and '.join(INSTEAD)} with {CODED_DESIGN}; others with any",
        )
    return cells


def steps_of(task: Task, settings: UtilitySettings) -> int:
    """Training steps of every run of a task."""
    return settings.max_steps or (QUICK_STEPS if settings.quick else task.steps)


@dataclass(frozen=True, kw_only=True)
class CutFacts:
    """What was measured of a task's rows at the cut, before any run."""

    norm: float
    """r."""
    clip: float
    clipped: float
    """Share of rows beyond the clip."""
    median_length: float
    train_rows: int
    held_out_rows: int
    vocabulary: int


def noise_figures(cell: Cell, facts: CutFacts, steps: int) -> dict[str, float]:
    """r / sigma of a run, and what the formula of `calibration.recovery` expects of it; empty without noise."""
    sigma = cell.level.sigma(facts.norm, facts.clip)
    if sigma is None:
        return {}
    ratio = facts.norm / sigma
    releases = 1 if cell.design == FORMAL_DESIGN else cell.task.epochs(facts.train_rows, steps)
    return {
        RATIO: ratio,
        ONCE: recovery(ratio, facts.vocabulary),
        WHOLE_RUN: recovery(ratio, facts.vocabulary, releases),
    }
