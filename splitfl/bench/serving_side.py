"""A process that plays several parties, a thread each: ``python -m`` this, with a start.

They send states that were drawn beforehand and compute neither bottom nor top, so that it is the owner that is
measured. Only ever a process of its own: it is what `splitfl.bench` starts, never what it imports.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

from party.connect import open_session
from party.session import Session
from splitfl.bench.lines import own_output, say
from splitfl.bench.orders import Line
from splitfl.bench.serving_orders import LOAD_DECODER, PROMPT, TURN, Done, Go, Leave, Loaded, LoadStart, Open
from splitfl.cut import Plan
from splitfl.errors import SplitflError
from splitfl.kit import open_kit
from splitfl.link import TrunkRequest
from splitfl.quiet import silence_library_warnings

_TIMEOUT_S = 600.0


class Player:
    """One party: a session, and a step that can be repeated."""

    def __init__(self, session: Session, order: Open, width: int, seed: int) -> None:
        self.session, self.order = session, order
        draw = torch.Generator().manual_seed(seed)
        length = order.length if order.work == "train" else 1
        self.hidden = torch.randn(order.rows, length, width, generator=draw)
        self.gradient = torch.randn(order.rows, length, width, generator=draw) / order.length
        self.number = 0
        if order.work == "decode":
            prompt = torch.randn(order.rows, PROMPT, width, generator=draw)
            session.forward(TrunkRequest(hidden=prompt, cache=1))
        self.step: Callable[[], None] = self.train if order.work == "train" else self.decode

    def train(self) -> None:
        """A forward and its backward."""
        _, step = self.session.forward(TrunkRequest(hidden=self.hidden, keep=True))
        self.session.backward(step, self.gradient)

    def decode(self) -> None:
        """One new position a row."""
        past = PROMPT + self.number % TURN
        self.session.forward(TrunkRequest(hidden=self.hidden, cache=1, past=past))
        self.number += 1

    def until(self, go: Go) -> tuple[float, ...]:
        """Seconds of each step that ended in the time that counts."""
        found = []
        while (begun := time.monotonic()) < go.end:
            self.step()
            ended = time.monotonic()
            if go.begin <= ended < go.end:
                found.append(ended - begun)
        return tuple(found)


class Players:
    """All parties of this process."""

    def __init__(self, start: LoadStart, plan: Plan) -> None:
        self.start, self.plan = start, plan
        self.players: list[Player] = []

    def answer(self, order: Open | Go | Leave) -> Line:
        """Do what was asked."""
        match order:
            case Open():
                return self._open(order)
            case Go():
                return self._go(order)
            case Leave():
                self._leave()
                return Done()

    def _open(self, order: Open) -> Done:
        try:
            for seed, key in enumerate(self.start.keys[: order.parties]):
                session = open_session(
                    self.plan,
                    order.owner,
                    owner_key=Path(self.start.owner_key),
                    key=Path(key),
                    memory=order.memory,
                    timeout_s=_TIMEOUT_S,
                )
                self.players.append(Player(session, order, self.plan.width, seed))
                self.players[-1].step()
        except SplitflError as error:
            return Done(problem=str(error))
        return Done()

    def _go(self, order: Go) -> Loaded:
        found: dict[int, tuple[float, ...]] = {}
        problems: list[str] = []

        def play(index: int) -> None:
            try:
                found[index] = self.players[index].until(order)
            except Exception as error:
                problems.append(f"{type(error).__name__}: {error}")

        threads = [threading.Thread(target=play, args=(index,)) for index in range(len(self.players))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if problems:
            return Loaded(problem=problems[0])
        return Loaded(latencies=tuple(found[index] for index in range(len(threads))))

    def _leave(self) -> None:
        for player in self.players:
            player.session.close()
        self.players = []


def main() -> None:
    """Answer until standard input ends."""
    silence_library_warnings()
    answers = own_output()
    torch.set_num_threads(1)
    start = msgspec.json.decode(sys.argv[1], type=LoadStart)
    players = Players(start, open_kit(Path(start.kit)).plan)
    say(answers, Done())
    for line in sys.stdin:
        say(answers, players.answer(LOAD_DECODER.decode(line)))


if __name__ == "__main__":
    main()
