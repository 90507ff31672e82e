"""What `splitfl bench rules` runs: tasks, rules, references, ranks, learning rates and seeds.

Rates are chosen by validation, once for each task and each kind of thing that is trained: on the first seed a
representative of the kind is run with every rate of a small grid, and the one with the least validation loss after the
last round is used for all rules of the kind, on all seeds, and for mixed ranks. References choose their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, TypeAlias

from splitfl.aggregation.rule import Rule
from splitfl.aggregation.rules import RULES, rule_named
from splitfl.config import BenchSettings
from splitfl.errors import DataError, UsageError, nearest, printable

Kind: TypeAlias = Literal["causal-lm", "sequence-classification"]

LOCAL, POOLED, HEAD = "local only", "pooled", "head only"
REFERENCES = (LOCAL, POOLED, HEAD)
"""Each party by itself; the rows of all in one place; and for a classifier, a federation that averages the head and
leaves the adapter as it is."""
SAME_AS = {"fra": "flexlora"}
"""Rules that compute what another one does; run only if they are asked for by name."""
TUNED_BY = {"A": "rolora", "B": "rolora", "both": "fedit", "core": "fed-sb"}
"""By what a rule trains in its first round: the rule whose rate it gets. Of fedlrt the core is corrected by gradients,
and the rate is its own."""
OWN_RATE = ("fedlrt", *REFERENCES)
SAME: Final = "one rank"
MIXED: Final = "mixed ranks"
RANK, ALPHA = 8, 16
_MIXED = (8, 4, 2, 8)
SEEDS, QUICK_SEEDS = (0, 1, 2), (0,)
ROUNDS, LOCAL_STEPS, QUICK_ROUNDS, QUICK_LOCAL_STEPS = 5, 4, 2, 1
_FACTOR_RATES, _CORE_RATES = (1e-3, 3e-3, 1e-2), (1e-2, 3e-2, 1e-1)

BEFORE, ALL, OWN, WORST, AFTER = "before training", "all rows", "own rows", "worst party", "after local steps"
VALIDATION, ERROR, KEPT = "validation loss", "aggregation error", "gain kept at the end"
UP, DOWN, AT_AGGREGATOR, SECONDS, PASSES = "values up", "values down", "aggregator", "seconds", "batches"
UNITS = {VALIDATION: "nats", ERROR: "", KEPT: "share", UP: "values", DOWN: "values", AT_AGGREGATOR: "s", SECONDS: "s",
         PASSES: "batches"}  # fmt: skip
SCORES = (BEFORE, ALL, OWN, WORST, AFTER)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model, rows that lie with several parties, and how they are trained; the same for every rule."""

    name: str
    title: str
    model: Literal["minilm", "embedded"]
    kind: Kind
    classes: int
    """0 for a language model."""
    shared: str
    """Folder of the shared data with train.jsonl and test.jsonl."""
    train_rows: int
    """Of all parties together, at most."""
    validation_rows: int
    """Of each party."""
    held_out_rows: int
    """Of each party."""
    tuned_layers: int
    """So many of the last layers get adapters; those below never change, so their output is kept and not computed
    again."""
    max_length: int
    batch: int
    metric: Literal["accuracy", "loss"]
    head_rate: float | None = None
    """Learning rate of a head that is trained beside the adapter; the same for every rule."""

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger score is the better one."""
        return self.metric != "loss"

    def quick(self) -> Task:
        """The same with few rows."""
        return replace(self, train_rows=64, validation_rows=4, held_out_rows=8)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="answers", title="answers to medical questions, a source a party", model="embedded", kind="causal-lm",
            classes=0, shared="medquad", train_rows=480, validation_rows=8, held_out_rows=16, tuned_layers=2,
            max_length=40, batch=4, metric="loss",
        ),
        Task(
            name="polarity", title="film reviews, positive or negative, more praise at one party than at the next",
            model="minilm", kind="sequence-classification", classes=2, shared="sentence_polarity", train_rows=480,
            validation_rows=8, held_out_rows=50, tuned_layers=2, max_length=32, batch=4, metric="accuracy",
            head_rate=1e-2,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A rule or a reference on a task: what a row of the table is about."""

    task: str
    rule: str
    ranks: Literal["one rank", "mixed ranks"] = SAME

    @property
    def reference(self) -> bool:
        """Whether nothing is combined."""
        return self.rule in REFERENCES

    @property
    def tuned_by(self) -> Setting:
        """The setting whose rate this one gets; itself where it chooses its own."""
        rule = self.rule if self.rule in OWN_RATE else TUNED_BY[RULES[self.rule].trains(0)]
        return Setting(task=self.task, rule=rule)

    def rates(self, given: Sequence[float], *, quick: bool) -> tuple[float, ...]:
        """The learning rates to try, if it chooses its own; cores lie between fixed factors and need larger ones."""
        if self.rule == HEAD:
            return (0.0,)
        if given:
            return tuple(dict.fromkeys(given))
        core = not self.reference and RULES[self.rule].trains(1) == "core"
        grid = _CORE_RATES if core else _FACTOR_RATES
        return grid[1:2] if quick else grid

    def rank_of(self, parties: int) -> tuple[int, ...]:
        """The rank of each party; empty where all have the federation's."""
        return tuple(_MIXED[number % len(_MIXED)] for number in range(parties)) if self.ranks == MIXED else ()


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run."""

    setting: Setting
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """How figures call it."""
        of = self.setting
        return " / ".join((of.task, of.rule, of.ranks, f"rate {self.rate:g}", f"seed {self.seed}"))


def parse_name(name: str) -> Cell:
    """The run of that name.

    Raises:
        DataError: the name of no run.
    """
    parts = name.split(" / ")
    try:
        task, rule, ranks, rate, seed = parts
        if task in TASKS and (rule in RULES or rule in REFERENCES) and ranks in (SAME, MIXED):
            setting = Setting(task=task, rule=rule, ranks=SAME if ranks == SAME else MIXED)
            return Cell(setting=setting, rate=float(rate.removeprefix("rate ")), seed=int(seed.removeprefix("seed ")))
    except ValueError:
        pass
    raise DataError(f"{printable(name, 80)!r} names no run of splitfl bench rules.")


def rule_of(setting: Setting, rounds: int) -> Rule:
    """The rule with the options it is run with. References are federations of one party, but for the head."""
    if setting.reference:
        return RULES["fedit"]
    # As it stands it would change in round 5, and a short federation is over by then.
    options = {"switch": max(1, rounds // 2)} if setting.rule == "fra-then-ffa" else {}
    return rule_named(setting.rule, options)


def plan_settings(settings: BenchSettings, tasks: Sequence[str]) -> list[Setting]:
    """What is compared, task by task, references first.

    Raises:
        UsageError: a rule that there is not.
    """
    for name in settings.rules:
        if name not in RULES:
            raise UsageError(f"There is no aggregation rule {printable(name, 40)!r}.", hint=nearest(name, RULES))
    names = [name for name in RULES if (name in settings.rules if settings.rules else name not in SAME_AS)]
    alike = [
        Setting(task=task, rule=name)
        for task in tasks
        for name in (*REFERENCES, *names)
        if name != HEAD or TASKS[task].classes
    ]
    alike += [setting.tuned_by for setting in alike if setting.tuned_by not in alike]
    alike = sorted(dict.fromkeys(alike), key=lambda setting: (setting.task, setting.tuned_by != setting))
    return alike + [
        Setting(task=task, rule=name, ranks=MIXED)
        for task in tasks
        for name in names
        if not RULES[name].one_rank and name != "fedlrt"
    ]


def seeds_of(settings: BenchSettings) -> tuple[int, ...]:
    """The seeds, each once; rates are chosen on the first."""
    return tuple(dict.fromkeys(settings.seeds or (QUICK_SEEDS if settings.quick else SEEDS)))


def rounds_of(settings: BenchSettings) -> tuple[int, int]:
    """Rounds, and steps of a party in each."""
    return (
        settings.rounds or (QUICK_ROUNDS if settings.quick else ROUNDS),
        settings.local_steps or (QUICK_LOCAL_STEPS if settings.quick else LOCAL_STEPS),
    )


def count_runs(settings: BenchSettings, planned: Sequence[Setting]) -> int:
    """Runs from nothing."""
    others = len(seeds_of(settings)) - 1
    return sum(others + len(rates_on_first(settings, setting) or (None,)) for setting in planned)


def rates_on_first(settings: BenchSettings, setting: Setting) -> tuple[float, ...]:
    """The rates that a setting is run with on the first seed; none where it gets another one's."""
    return setting.rates(settings.rates, quick=settings.quick) if setting.tuned_by == setting else ()


def chosen_rate(setting: Setting, seed: int, cells: Mapping[str, Mapping[str, float]]) -> float | None:
    """The rate that a setting gets: of those run on that seed the one with the least validation loss; None without."""
    found: list[tuple[float, float]] = []
    for name, figures in cells.items():
        cell = parse_name(name)
        if (cell.setting, cell.seed) == (setting.tuned_by, seed) and figures.get(VALIDATION) is not None:
            found.append((figures[VALIDATION], cell.rate))
    return min(found)[1] if found else None


def of_round(metric: str, round: int) -> str:
    """The name of a figure of one round, counted from 1; 0 is before the first."""
    return f"{metric}, round {round}"
