"""Ctrl-C during training, for either side: a checkpoint first, then the end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StopRequest(TrainerCallback):
    """The first Ctrl-C (or SIGTERM) ends training after the step under way, with a checkpoint; the second at once."""

    def __init__(self) -> None:
        self.asked = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Save and stop, if somebody asked for it."""
        if self.asked:
            control.should_save = True
            control.should_training_stop = True
        return control

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Listen for the two signals inside the block (in the main thread; elsewhere nothing is changed)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: FrameType | None) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
