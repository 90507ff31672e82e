"""What a person sees of a distillation, what is kept of it on disk, and how it is interrupted.

run.jsonl          losses, step by step
curve.svg          the held-out curve, if matplotlib is installed
best.safetensors   the student's best state
checkpoints/       to resume from; one that was never finished is removed
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from splitfl.charts import Chart, Line, chart
from splitfl.files import replace_text
from splitfl.metrics import Meter, RunLog, read_run

_COMPLETE = "complete"  # written last into a checkpoint
# The drawing is made for a page that names its colours; alone it needs them named inside.
_COLOURS = """<style>:root{--muted:#57606a;--line:#d0d7de;--series-1:#0969da;--series-2:#bc4c00;--series-3:#1a7f37}
@media (prefers-color-scheme:dark){:root{--muted:#9198a1;--line:#3d444d;--series-1:#4493f8;--series-2:#db6d28;\
--series-3:#3fb950}}text{font-family:sans-serif}</style>"""


class DistilProgress(TrainerCallback):
    """A bar with losses, tokens/s and time left on a terminal; a line at each logging step elsewhere."""

    def __init__(self, log: RunLog) -> None:
        self.log = log
        self.tokens = 0
        self.held_out: float | None = None
        self._parts: list[tuple[float, float]] = []
        self._started = time.monotonic()
        self._tokens_meter, self._steps_meter = Meter(), Meter()
        self._console = Console(file=sys.stderr, stderr=True)
        self._bar = Progress(
            TextColumn("distil"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task: Any = None

    @property
    def seconds(self) -> float:
        """Since this was made."""
        return time.monotonic() - self._started

    def count(self, tokens: int, lm: float, kd: float) -> None:
        """Note a batch."""
        self.tokens += tokens
        self._tokens_meter.add(tokens)
        self._parts.append((lm, kd))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar."""
        if self._console.is_terminal:
            self._task = self._bar.add_task("distil", total=state.max_steps, completed=state.global_step, facts="")
            self._bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        self._steps_meter.add(1)
        if self._task is not None:
            self._bar.update(self._task, completed=state.global_step, facts=self._facts())

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        """Record the losses since the record before."""
        if not logs or "loss" not in logs or not self._parts:
            return
        lm, kd = (sum(part) / len(self._parts) for part in zip(*self._parts, strict=True))
        self._parts.clear()
        rates = {"learning_rate": logs.get("learning_rate"), "grad_norm": logs.get("grad_norm")}
        tokens_per_s = self._tokens_meter.rate()
        self.log.write(
            "train", step=state.global_step, loss=logs["loss"], lm=lm, kd=kd, tokens_per_s=tokens_per_s, **rates
        )
        if self._task is None:
            left = self._steps_meter.seconds_left(state.max_steps - state.global_step)
            about = "" if left is None else f"  about {left:.0f} s left"
            line = f"step {state.global_step}/{state.max_steps}  loss {logs['loss']:.3f}  {self._facts()}{about}"
            self._console.print(line, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Take the bar away, also after an error; where none was shown, stopping it would print an empty line."""
        if self._task is not None:
            self._bar.stop()

    def _facts(self) -> str:
        held_out = "" if self.held_out is None else f"held out {self.held_out:.3f}  "
        return f"{held_out}{self._tokens_meter.rate():,.0f} tokens/s"


# ---- checkpoints


def complete(checkpoint: Path) -> None:
    """Say that a checkpoint is whole."""
    replace_text(checkpoint / _COMPLETE, "")


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`, or None; half written ones are removed."""
    whole: list[tuple[int, Path]] = []
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdigit() and (path / _COMPLETE).is_file():
            whole.append((int(number), path))
        else:
            shutil.rmtree(path, ignore_errors=True)
    return max(whole)[1] if whole else None


# ---- the curve


def write_curve(folder: Path) -> Path | None:
    """Draw the held-out curve of `run.jsonl` as `curve.svg`; a step measured again after a resume counts once.

    Returns:
        The drawing, or None where there is nothing to draw.

    Raises:
        UsageError: matplotlib is missing.
    """
    evals = {record["step"]: record for record in read_run(folder / "run.jsonl") if record["event"] == "eval"}
    curves = {"loss on held-out text": "loss", "of it the language model's": "lm"}
    lines = []
    for label, name in curves.items():
        points = [(step, one[name]) for step, one in sorted(evals.items()) if one[name] is not None]
        lines.append(Line(label=label, points=points, dots=True))
    drawn = chart("Distillation", "", lines)
    if drawn is None:
        return None
    replace_text(folder / "curve.svg", standing_alone(drawn))
    return folder / "curve.svg"


def standing_alone(drawn: Chart) -> str:
    """A drawing as an svg file, with its colours and its legend."""
    legend = "".join(
        f'<text x="96%" y="{14 * number}" text-anchor="end" font-size="10" fill="var(--series-{colour})">{label}</text>'
        for number, (label, colour, _) in enumerate(drawn.labels, start=1)
    )
    start, _, inside = drawn.svg.partition(">")
    end = inside.rindex("</svg>")
    return f"{start}>{_COLOURS}{inside[:end]}{legend}</svg>\n"
