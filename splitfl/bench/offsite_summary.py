"""`splitfl bench offsite` over its seeds: mean and range of every way, and what the ways say of each other."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from splitfl.bench.offsite_cases import EMULATOR_TUNED, FULL_TUNED, FULL_ZERO, PLUGIN, TASKS, WAYS, parse_way
from splitfl.metrics import Result

SHARE_REACH, SPEED_REACH = 0.75, 1.5
MARGIN, GAP, GAIN, SHARE = "owner's margin", "utility gap", "plug-in's gain", "share of full fine-tuning's gain"
REACHES = {MARGIN: 0.0, GAP: None, GAIN: 0.0, SHARE: SHARE_REACH}
"""What is compared, and what is aimed at: more than 0, or at least that share."""
ON_EMULATOR, ON_WHOLE = "on the emulator", "full LoRA"
SPEED, MEMORY, PEAK, FLOPS = "tokens a second", "memory of model and training", "peak memory", "FLOPs a token"
SPEED_UP, LESS_MEMORY = "speed of training on the emulator", "memory of training on the emulator"


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A figure over the seeds."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way on one task with one model."""

    model: str
    task: str
    way: str
    seeds: int
    score: Spread
    """Of the task's own metric."""
    loss: Spread
    seconds: float | None
    """Of the training and two evaluations, mean; None where nothing is trained."""
    received: float | None
    """Bytes that the data holder must get; None where one person holds everything."""
    sent: float | None


def spread(values: Sequence[float]) -> Spread:
    """Mean and range.

    Raises:
        statistics.StatisticsError: there is no value.
    """
    return Spread(mean=statistics.fmean(values), low=min(values), high=max(values))


def by_task(
    ways: Mapping[str, Mapping[str, float]],
) -> dict[tuple[str, str], dict[int, dict[str, Mapping[str, float]]]]:
    """Figures by model and task, then seed, then way."""
    groups: dict[tuple[str, str], dict[int, dict[str, Mapping[str, float]]]] = defaultdict(lambda: defaultdict(dict))
    for case, figures in ways.items():
        model, task, way, seed = parse_way(case)
        groups[model, task][seed][way] = figures
    models = list(dict.fromkeys(model for model, _ in groups))
    order = sorted(groups, key=lambda key: (models.index(key[0]), list(TASKS).index(key[1])))
    return {key: dict(groups[key]) for key in order}


def summarise(ways: Mapping[str, Mapping[str, float]]) -> list[Row]:
    """A row for every way, in the order of models, tasks and ways."""
    rows = []
    for (model, task), seeds in by_task(ways).items():
        for way in WAYS:
            runs = [one[way] for one in seeds.values() if way in one]
            if runs:
                rows.append(_row(model, task, way, runs))
    return rows


def _row(model: str, task: str, way: str, runs: Sequence[Mapping[str, float]]) -> Row:
    def mean(metric: str) -> float | None:
        values = [figures[metric] for figures in runs if metric in figures]
        return statistics.fmean(values) if values else None

    return Row(
        model=model,
        task=task,
        way=way,
        seeds=len(runs),
        score=spread([figures[TASKS[task].metric] for figures in runs]),
        loss=spread([figures["held-out loss"] for figures in runs]),
        seconds=mean("seconds"),
        received=mean("bytes received"),
        sent=mean("bytes sent"),
    )


# ---- what the ways say of each other


def comparisons(task: str, seeds: Mapping[int, Mapping[str, Mapping[str, float]]]) -> dict[str, Spread]:
    """Differences of scores, seed by seed: positive means that the first named is the better one.

    - owner's margin: plug-in, emulator tuned
    - utility gap: full fine-tuning, plug-in
    - plug-in's gain: plug-in, full zero-shot
    - share of full fine-tuning's gain: plug-in's gain over that of full fine-tuning; left out where that is none

    Args:
        task: says which score, and whether more of it is better.
        seeds: figures by seed and way; seeds that lack a way are left out.
    """
    found: dict[str, list[float]] = defaultdict(list)
    kind = TASKS[task]
    for ways in seeds.values():
        if not {EMULATOR_TUNED, PLUGIN, FULL_TUNED, FULL_ZERO} <= ways.keys():
            continue
        score = {way: figures[kind.metric] for way, figures in ways.items()}
        gain = kind.better(score[PLUGIN], score[FULL_ZERO])
        most = kind.better(score[FULL_TUNED], score[FULL_ZERO])
        found[MARGIN].append(kind.better(score[PLUGIN], score[EMULATOR_TUNED]))
        found[GAP].append(kind.better(score[FULL_TUNED], score[PLUGIN]))
        found[GAIN].append(gain)
        if most > 0:
            found[SHARE].append(gain / most)
    return {name: spread(values) for name, values in found.items()}


def compared_results(ways: Mapping[str, Mapping[str, float]]) -> list[Result]:
    """Mean, least and greatest of each comparison, with what is aimed at beside the mean."""
    results = []
    for (model, task), seeds in by_task(ways).items():
        for name, one in comparisons(task, seeds).items():
            unit = "share" if name == SHARE or TASKS[task].higher_is_better else "nats"
            case = f"{model} / {task}"
            results += [
                Result(case=case, metric=name, value=one.mean, unit=unit, reach=REACHES[name]),
                Result(case=case, metric=f"{name}, least", value=one.low, unit=unit),
                Result(case=case, metric=f"{name}, greatest", value=one.high, unit=unit),
            ]
    return results


def cost_case(model: str, what: str) -> str:
    """The case of measured costs; `what` is one of `ON_EMULATOR` and `ON_WHOLE`."""
    return f"{model} / training {what}"


def cost_results(told: Mapping[str, Mapping[str, float]]) -> list[Result]:
    """Speed and memory of training on the emulator over those of LoRA on the whole model, with what is aimed at."""
    results = []
    for case, mine in told.items():
        model = case.partition(" / ")[0]
        whole = told.get(cost_case(model, ON_WHOLE))
        if case != cost_case(model, ON_EMULATOR) or whole is None:
            continue
        for name, metric, reach in ((SPEED_UP, SPEED, SPEED_REACH), (LESS_MEMORY, MEMORY, 1.0)):
            results.append(
                Result(case=model, metric=name, value=mine[metric] / whole[metric], unit="times full LoRA", reach=reach)
            )
    return results
