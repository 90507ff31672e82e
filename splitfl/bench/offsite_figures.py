"""The figures of `splitfl bench offsite`: collected training by training, written after each, read by ``--resume``."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from splitfl import __version__
from splitfl.bench.offsite_cases import (
    COSTS,
    EMULATOR_TUNED,
    EMULATOR_ZERO,
    FULL_TUNED,
    FULL_ZERO,
    OFFSITE,
    PLUGIN,
    RATES,
    SCORES,
    SPLIT,
    TRIAL_SEED,
    UNITS,
    Cell,
    Task,
    parse_way,
    way_name,
)
from splitfl.bench.offsite_summary import FLOPS, MEMORY, PEAK, SPEED, compared_results, cost_results
from splitfl.config import BenchSettings
from splitfl.errors import DataError, UsageError
from splitfl.metrics import Result, machine, write_results

VALIDATION = "validation loss"
_SAME = ("name", "max_steps", "quick", "keep", "distil_steps", "device")
FACT_UNITS = {
    "layers": "layers", "layers of the trunk": "layers", "layers given": "layers", "parameters": "parameters",
    "parameters given": "parameters", "trunk": "", "kit": "bytes", "emulator": "bytes",
    "distillation": "s", "distilled steps": "steps",
    "public loss, full model": "nats", "public loss, layers left out": "nats", "public loss, as handed out": "nats",
    "distance, layers left out": "relative squared error", "distance, as handed out": "relative squared error",
    "training rows": "rows", "held-out rows": "rows", "steps": "steps", "rows of a batch": "rows",
    "rows come with splitfl": "",
    SPEED: "tokens/s", MEMORY: "bytes", PEAK: "bytes", FLOPS: "FLOP", "trained parameters": "parameters",
    "tokens of a batch": "tokens",
}  # fmt: skip
_MEASURED_AGAIN = ("distillation", "kit", "emulator")  # facts that may differ between two makings of the same thing


@dataclass(kw_only=True)
class Outcomes:
    """What has come out so far.

    Args:
        settings: of the command; its ``json`` is written after every training.
    """

    settings: BenchSettings
    told: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Facts of models, emulators and tasks, and measured costs, by case."""
    trials: dict[str, float] = field(default_factory=dict)
    """Validation loss by the name of the trial."""
    ways: dict[str, dict[str, float]] = field(default_factory=dict)
    """Figures by the name of the way."""
    failed: dict[str, str] = field(default_factory=dict)
    """Why others are not."""

    def has(self, cell: Cell) -> bool:
        """Whether a training is done."""
        return cell.name in (self.ways if cell.rate is None else self.trials)

    def tell(self, case: str, facts: Mapping[str, Any]) -> None:
        """Keep what was found of a model, an emulator, a task or a cost.

        Raises:
            UsageError: the file says otherwise: it is of another model, or of other rows.
        """
        earlier = self.told.get(case)
        other = [name for name in facts if earlier and name not in _MEASURED_AGAIN and earlier.get(name) != facts[name]]
        if other and not any(name in facts for name in (SPEED,)):
            raise UsageError(
                f"The figures of {case!r} in {self.settings.json} had other {', '.join(other)}.",
                hint="leave --resume out to run everything anew, or name another --json file",
            )
        self.told[case] = dict(facts)
        self.write()

    def note_trial(self, cell: Cell, figures: Mapping[str, float]) -> None:
        """Keep the validation loss of a trial."""
        loss = figures["held-out loss"]
        self.trials[cell.name] = loss if math.isfinite(loss) else math.inf  # no number is less than that
        self.write()

    def note(self, cell: Cell, figures: Mapping[str, float], plugged: Mapping[str, float] | None = None) -> None:
        """Keep the figures of a training.

        Args:
            cell: which.
            figures: of the training; ``... before`` are those before it.
            plugged: of an offsite training, figures of the full model with the adapter; ``... before`` without it.
        """
        costs = {name: figures[name] for name in COSTS if name in figures}
        if cell.training != OFFSITE:
            self._put(cell, FULL_TUNED if cell.training == FULL_TUNED else SPLIT, {**scores_of(figures), **costs})
        else:
            assert plugged is not None  # noqa: S101
            self._put(cell, FULL_ZERO, scores_of(plugged, " before"))
            self._put(cell, EMULATOR_ZERO, scores_of(figures, " before"))
            self._put(cell, EMULATOR_TUNED, scores_of(figures))
            self._put(cell, PLUGIN, {**scores_of(plugged), **costs})
        self.write()

    def _put(self, cell: Cell, way: str, figures: dict[str, float]) -> None:
        self.ways[way_name(cell.model, cell.task.name, way, cell.seed)] = figures

    def best_rate(self, model: str, task: Task, training: str) -> float:
        """The learning rate whose trial had the least validation loss; without trials the middle one."""
        tried: dict[float, float] = {}
        for rate in RATES:
            name = Cell(model=model, task=task, training=training, seed=TRIAL_SEED, rate=rate).name
            if name in self.trials:
                tried[rate] = self.trials[name]
        return min(tried, key=tried.__getitem__) if tried else RATES[len(RATES) // 2]

    def write(self) -> None:
        """Write the file, if one was named."""
        if self.settings.json is not None:
            write_results(self.settings.json, "bench", self.settings, self.results())

    def results(self) -> list[Result]:
        """Everything, in the shape of ``--json``."""
        results = [
            Result(case=case, metric=name, value=value, unit=FACT_UNITS[name])
            for case, facts in self.told.items()
            for name, value in facts.items()
        ]
        results += [Result(case=case, metric=VALIDATION, value=loss, unit="nats") for case, loss in self.trials.items()]
        for case, figures in self.ways.items():
            results += [Result(case=case, metric=name, value=figures[name], unit=UNITS[name]) for name in figures]
        return results + compared_results(self.ways) + cost_results(self.told)

    @classmethod
    def resumed(cls, settings: BenchSettings) -> Outcomes:
        """The figures in the ``--json`` file of a run that was broken off; none if there is no such file.

        Raises:
            UsageError: no file was named, or it is of other settings, another machine or another version.
            DataError: it is no file of figures.
        """
        outcomes = cls(settings=settings)
        if settings.json is None:
            raise UsageError("--resume needs the file with the figures so far.", hint="add --json FILE")
        if not settings.json.exists():
            return outcomes
        record = read_record(settings.json)
        before = (record["version"], record["machine"], [record["settings"].get(name) for name in _SAME])
        if before != (__version__, machine(), [getattr(settings, name) for name in _SAME]):
            raise UsageError(
                f"The figures in {settings.json} are of other settings, another machine or another version.",
                hint="leave --resume out to run everything anew, or name another --json file",
            )
        outcomes.told, outcomes.trials, outcomes.ways = by_case(record["results"])
        return outcomes


def scores_of(figures: Mapping[str, float], suffix: str = "") -> dict[str, float]:
    """The scores among a training's figures, after it, or with `suffix` `` before`` before it."""
    return {name: figures[name + suffix] for name in SCORES if figures.get(name + suffix) is not None}


def read_record(path: Path) -> dict[str, Any]:
    """A ``--json`` file of this benchmark.

    Raises:
        DataError: it cannot be read, or is of another command.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found = (record["command"], record["settings"]["name"])
        for result in record["results"]:
            Result(**result)
        complete = {"version", "machine"} <= record.keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a file of figures ({type(error).__name__}).") from error
    if found != ("bench", "offsite") or not complete:
        raise DataError(f"{path} holds other figures.", expected="a file that `splitfl bench offsite --json` wrote")
    return dict(record)


def by_case(
    results: list[dict[str, Any]],
) -> tuple[dict[str, dict[str, Any]], dict[str, float], dict[str, dict[str, float]]]:
    """Facts, trials and figures of ways from the results of a file; what is derived is left out."""
    told: dict[str, dict[str, Any]] = defaultdict(dict)
    trials: dict[str, float] = {}
    ways: dict[str, dict[str, float]] = defaultdict(dict)
    for result in results:
        case, metric, value = result["case"], result["metric"], result["value"]
        if metric == VALIDATION:
            trials[case] = math.inf if value is None else value
        elif metric in UNITS and " / seed " in case:
            parse_way(case)
            ways[case][metric] = value
        elif metric in FACT_UNITS:
            told[case][metric] = value
    return dict(told), trials, dict(ways)
