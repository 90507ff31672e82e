"""What a person sees while a benchmark runs, on standard error: a bar with the time left, or a line a case."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from splitfl.bench.cases import START_S, WARM_UP, Case
from splitfl.bench.table import in_words
from splitfl.metrics import Result
from splitfl.report import as_duration


class Course:
    """Goes through the cases. The time left is guessed (`Case.seconds`), then scaled by how the guess has fared so far.

    Args:
        cases: those that will be measured.
        steps: repetitions of each, without the warm-up.
    """

    def __init__(self, cases: Sequence[Case], steps: int) -> None:
        self._repetitions = WARM_UP + steps
        self._number, self._count = 0, len(cases)
        self._total = sum(START_S + case.seconds() * self._repetitions for case in cases)
        self._worked, self._each = 0.0, 0.0
        self._name = ""
        self._started = time.monotonic()
        self.console = Console(file=sys.stderr, stderr=True)
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[facts]}"))
        self._bar = Progress(*columns, TimeElapsedColumn(), console=self.console, transient=True)
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if self.console.is_terminal and self._count:
            self._task = self._bar.add_task("bench", total=self._total, facts="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def begin(self, case: Case) -> None:
        """A case starts: its processes load."""
        self._number += 1
        self._name, self._each = case.name, case.seconds()
        if self._task is None:
            self._print(f"{self._case()}  {self._left()}".rstrip())
        self._update("loading the models")

    def loaded(self) -> None:
        """The processes of the case are ready."""
        self._worked += START_S
        self._update(self._left())

    def advance(self) -> None:
        """One repetition of both sides is done."""
        self._worked += self._each
        self._update(self._left())

    def end(self, results: Sequence[Result]) -> None:
        """A case is done."""
        self._print(f"{self._case()}: {in_words(results)}")

    def close(self) -> None:
        """Take the bar away."""
        self._bar.stop()

    def _left(self) -> str:
        if not self._worked:
            return ""
        spent = time.monotonic() - self._started
        return f"about {as_duration(spent * (self._total / self._worked - 1))} left"

    def _case(self) -> str:
        return f"[{self._number}/{self._count}] {self._name}"

    def _update(self, facts: str) -> None:
        if self._task is not None:
            self._bar.update(self._task, completed=self._worked, description=self._case(), facts=facts)

    def _print(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
