"""How a measured process answers: one JSON line each on its standard output, which carries nothing else.

Kept apart from `splitfl.bench.side`, which imports the libraries of a model.
"""

from __future__ import annotations

import os
import sys
from typing import TextIO

import msgspec

from splitfl.bench.orders import Line


def own_output() -> TextIO:
    """Standard output for answers alone; whatever else is printed goes to standard error from now on."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return answers


def say(answers: TextIO, line: Line) -> None:
    """Write an answer."""
    answers.write(msgspec.json.encode(line).decode() + "\n")
    answers.flush()
