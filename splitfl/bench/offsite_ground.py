"""Kits, emulators and owners of `splitfl bench offsite`: what the trainings of a model on one kind of task share.

Made by the commands that people use, `splitfl kit`, `splitfl emulator` and `splitfl serve`, in processes of their own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitfl.bench.children import Owner, run_to_end
from splitfl.bench.offsite_cases import (
    BOTTOM,
    DISTIL_BATCH,
    DISTIL_LENGTH,
    DISTIL_RATE,
    TOP,
    Task,
    distil_steps_of,
)
from splitfl.bench.offsite_rows import Model
from splitfl.bench.utility_cases import Kind
from splitfl.config import BenchSettings

MAKING_LIMIT_S = 6 * 3600.0  # a distillation on a busy machine
EMULATOR_PLAN = "emulator.json"  # its own module would load torch here, where nothing is computed
_STAGES = ("full model", "layers left out", "as handed out")


@dataclass(frozen=True, kw_only=True)
class Ground:
    """A kit and its emulator."""

    model: Model
    kind: Kind
    kit: Path
    emulator: Path
    facts: dict[str, Any]
    """Of the emulator, under the names in the file of figures."""

    @property
    def case(self) -> str:
        """How figures call it."""
        return f"{self.model.name} / emulator for {self.kind}"

    @property
    def bytes_down(self) -> int:
        """What a data holder gets before it trains."""
        return int(self.facts["kit"] + self.facts["emulator"])


def make_ground(model: Model, task: Task, settings: BenchSettings, text: Path, work: Path) -> Ground:
    """Cut the kit and make the emulator, or take those that ``--cache`` holds of an earlier run.

    Args:
        model: which.
        task: says the kind, and how many classes there are.
        settings: of the command.
        text: public text to distil on.
        work: where logs go, and what no cache was named for.

    Raises:
        ResourceError: a command failed; its last words.
    """
    steps = distil_steps_of(settings)
    folder = (settings.cache or work) / f"offsite-{model.name}-{task.kind}-{_digest(model, task, steps, text)}"
    folder.mkdir(parents=True, exist_ok=True)
    kit, emulator, figures = folder / "kit", folder / "emulator", folder / "emulator.figures.json"
    log = work / f"{model.name}-{task.kind}.log"
    if not figures.exists():
        _cut(model, task, kit, log)
        words = ["splitfl", "emulator", str(emulator), "--model", str(model.path), "--kit", str(kit), "--keep",
                 str(model.keep), "--text", str(text), "--max-length", str(DISTIL_LENGTH), "--distil-steps", str(steps),
                 "--learning-rate", str(DISTIL_RATE), "--batch-size", str(DISTIL_BATCH), "--json", str(figures),
                 "--threads", "1", "--device", settings.device]  # fmt: skip
        if (folder / "emulator.distil" / "settings.json").exists():
            words.append("--resume")
        run_to_end(words, log=log, limit_s=MAKING_LIMIT_S)
    return Ground(model=model, kind=task.kind, kit=kit, emulator=emulator, facts=_facts(kit, emulator, figures))


def _cut(model: Model, task: Task, kit: Path, log: Path) -> None:
    words = ["splitfl", "kit", str(kit), "--model", str(model.path), "--bottom", str(BOTTOM), "--top", str(TOP),
             "--dtype", "float32", "--task", task.kind, "--no-verify", "--overwrite"]  # fmt: skip
    if task.classes:
        words += ["--num-labels", str(task.classes)]
    run_to_end(words, log=log)


def _digest(model: Model, task: Task, steps: int, text: Path) -> str:
    """What a kept emulator depends on: the model's shape and weights, the cut, the distillation and its text."""
    made = (model.keep, task.kind, task.classes, steps, BOTTOM, TOP, DISTIL_RATE, DISTIL_BATCH, DISTIL_LENGTH)
    found = hashlib.blake2b(json.dumps(made).encode(), digest_size=6)
    for path in (model.path / "config.json", *sorted(model.path.glob("*.safetensors")), text):
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "blake2b").digest())
    return found.hexdigest()


def _facts(kit: Path, emulator: Path, figures: Path) -> dict[str, Any]:
    results = {one["metric"]: one for one in json.loads(figures.read_text(encoding="utf-8"))["results"]}
    plan = json.loads((emulator / EMULATOR_PLAN).read_text(encoding="utf-8"))
    facts: dict[str, Any] = {
        "trunk": plan["trunk"],
        "layers given": results["layers given"]["value"],
        "layers of the trunk": results["layers given"]["reference"],
        "parameters given": results["parameters given"]["value"],
        "kit": folder_size(kit),
        "emulator": folder_size(emulator),
    }
    for stage in _STAGES:
        if f"held-out loss, {stage}" in results:
            facts[f"public loss, {stage}"] = results[f"held-out loss, {stage}"]["value"]
        if stage != "full model":
            facts[f"distance, {stage}"] = results[f"distance, {stage}"]["value"]
    if "distillation" in results:
        facts["distilled steps"] = results["distilled steps"]["value"]
        facts["distillation"] = results["distillation"]["value"]
    return facts


def folder_size(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@contextmanager
def served(ground: Ground, settings: BenchSettings, work: Path) -> Iterator[str]:
    """The owner of a kit for as long as the block lasts; its address."""
    keys = work / "keys"
    options = ["--model", str(ground.model.path), "--kit", str(ground.kit), "--bind", "tcp://127.0.0.1:0", "--dtype",
               "float32", "--key", str(keys / "owner.key_secret"), "--parties", str(keys / "parties"), "--device",
               settings.device]  # fmt: skip
    with Owner(options, threads=1, log=work / f"{ground.model.name}-{ground.kind}-owner.log") as owner:
        yield owner.address()
