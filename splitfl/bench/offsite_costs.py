"""Speed, memory and operations of training on the emulator, beside LoRA on every layer of the whole model.

Both in processes with one thread and nothing else in them; their steps alternate, so that what else the machine does
meets both alike. Memory is the process's peak less what it held before it had a model: the libraries' own share says
nothing of either.
"""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from pathlib import Path

import msgspec

from splitfl.bench.children import Child
from splitfl.bench.offsite_ground import Ground
from splitfl.bench.offsite_orders import Counted, CountFlops, Opened, SideStart
from splitfl.bench.offsite_summary import FLOPS, MEMORY, ON_EMULATOR, ON_WHOLE, PEAK, SPEED, cost_case
from splitfl.bench.orders import Held, Peak, Step, Stepped
from splitfl.config import BenchSettings

ROWS, LENGTH = 8, 96
STEPS, QUICK_STEPS, WARM_UP = 15, 2, 2


def measure_costs(ground: Ground, tuning: Path, settings: BenchSettings, work: Path) -> dict[str, dict[str, float]]:
    """Figures of both trainings, by case.

    Args:
        ground: kit, emulator and model.
        tuning: a TOML file of `splitfl tune` options that names kit and emulator.
        settings: of the command.
        work: for logs.

    Raises:
        ResourceError: a process ended; its last words.
    """
    starts = {
        ON_EMULATOR: SideStart(settings=str(tuning)),
        ON_WHOLE: SideStart(settings=str(tuning), whole=str(ground.model.path)),
    }
    step = Step(rows=ROWS, length=LENGTH)
    seconds: dict[str, list[float]] = {what: [] for what in starts}
    found: dict[str, dict[str, float]] = {}
    with ExitStack() as stack:
        sides: dict[str, Child] = {}
        for what, start in starts.items():
            words = ["party.offsite_side", msgspec.json.encode(start).decode()]
            sides[what] = stack.enter_context(Child(f"training {what}", words, threads=1, log=work / "costs.log"))
        opened = {what: side.ready(Opened) for what, side in sides.items()}
        for number in range(WARM_UP + (QUICK_STEPS if settings.quick else STEPS)):
            for what, side in sides.items():
                stepped = side.ask(step, Stepped)
                if number >= WARM_UP:
                    seconds[what].append(stepped.seconds)
        for what, side in sides.items():
            peak = side.ask(Peak(), Held).peak_rss  # before the operations are counted, which takes memory itself
            counted = side.ask(CountFlops(rows=ROWS, length=LENGTH), Counted)
            found[cost_case(ground.model.name, what)] = {
                SPEED: ROWS * LENGTH / statistics.median(seconds[what]),
                MEMORY: peak - opened[what].base_rss,
                PEAK: peak,
                FLOPS: counted.flops / (ROWS * LENGTH),
                "trained parameters": opened[what].trainable,
                "parameters": opened[what].parameters,
                "tokens of a batch": ROWS * LENGTH,
            }
    return found
