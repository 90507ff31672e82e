"""What left under noise since the last checkpoint, kept on disk so that a resumed run sends it again and draws nothing.

A run that was killed does the steps behind its checkpoint once more. Adapter, rows and dropout are what they were, so
its activations are, too; fresh noise on them would be a second release of the same rows, and averaging the two would
undo some of it. So each batch is written here before it is booked and sent (`party.cache` does the same for a pass that
sends each row once). The replies are then those of before, and so is everything that follows from them.

    outbox/checkpoint-40/        what was sent since that checkpoint; ``start`` before there is any
        3f…-0.safetensors        bytes of the first send of these rows on this channel, and the number booked for them

It takes as much room as what is sent between two checkpoints, and is removed with the next one and at the end.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from party.cache import save_sent, taken_out
from party.protect import BatchRows
from splitfl.wire.coding import Coded

_START = "start"


class Outbox:
    """The sends of one run since its last checkpoint.

    Args:
        folder: of the run's outbox.
        checkpoint: name of the one that the run goes on from; None if it begins.
    """

    def __init__(self, folder: Path, checkpoint: str | None) -> None:
        self._root = folder
        self._since = checkpoint or _START
        self._counts: Counter[str] = Counter()
        self._tidy()

    def sent(
        self, channel: str, batch: BatchRows | None, x: torch.Tensor, make: Callable[[], torch.Tensor | Coded]
    ) -> tuple[torch.Tensor | Coded, str | None]:
        """What is to be sent for `x` [B, T, D], and what its release is booked under.

        Args:
            channel: ``activations`` or ``gradients``.
            batch: the rows; of rows that nobody named nothing is kept, and each send is a release of its own.
            x: what is to be protected.
            make: draws; called only if these rows have not been sent this often since the checkpoint.

        Raises:
            DataError: what is kept cannot be read, or is of another shape.
        """
        if batch is None:
            return make(), None
        rows = json.dumps([channel, batch.dataset, batch.rows]).encode()
        key = hashlib.blake2b(rows, digest_size=12).hexdigest()
        file = self._root / self._since / f"{key}-{self._counts[key]}.safetensors"
        self._counts[key] += 1
        if not file.is_file():
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            save_sent(make(), file)
        found, number = taken_out(file, x)
        return found, f"step:{number}"

    def begin_at(self, checkpoint: str) -> None:
        """A checkpoint of this name is whole: what was sent before it will not be sent again."""
        self._since, self._counts = checkpoint, Counter()
        self._tidy()

    def close(self) -> None:
        """The run is over."""
        shutil.rmtree(self._root, ignore_errors=True)

    def _tidy(self) -> None:
        for path in self._root.glob("*"):
            if path.name != self._since:
                shutil.rmtree(path, ignore_errors=True)
