"""What both sides note of a message as it passes: the head of its record, and whether it has passed before."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence

from splitfl.audit.recording import Crossed, Way
from splitfl.wire import frames as wire
from splitfl.wire.codecs import Frame, nbytes
from splitfl.wire.frames import Sender
from splitfl.wire.messages import AnyMessage, kind

UNREADABLE = "unreadable"


class Witness:
    """Knows every request and answer that has passed it."""

    def __init__(self) -> None:
        self._seen: dict[tuple[Way, int, str], set[int]] = defaultdict(set)

    def note(self, way: Way, message: AnyMessage | None, frames: Sequence[Frame]) -> Crossed:
        """The head of its record.

        Args:
            way: as the side that records sees it.
            message: as `opened` has it.
            frames: all of them, header first.
        """
        sizes, now = tuple(map(nbytes, frames)), time.time()
        if message is None:
            return Crossed(way=way, time=now, kind=UNREADABLE, session=0, step=None, sizes=sizes)
        word, step = kind(message), getattr(message, "step", None)
        again = False
        if step is not None:
            steps = self._seen[way, message.session, word]
            again = step in steps
            steps.add(step)
        return Crossed(way=way, time=now, kind=word, session=message.session, step=step, sizes=sizes, again=again)


def opened(frames: Sequence[Frame], sender: Sender) -> AnyMessage | None:
    """The header of a message; None if it is none of that sender's."""
    try:
        return wire.open_header(frames, sender=sender)
    except wire.Violation:
        return None
