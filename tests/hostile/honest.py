"""A party that keeps to the rules, whose every answer is compared with the same trunk in this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from model_owner.trunk import LocalLink, Trunk
from party.session import Session
from splitfl.link import TrunkLink, TrunkRequest

LONGEST_WAIT_S = 30.0
"""For one request while others misbehave; it takes a few milliseconds on an idle machine."""


class Honest:
    """Works through `session` and compares; used by one thread at a time.

    Args:
        session: open.
        trunk: of the same kit, in this process.
    """

    def __init__(self, session: Session, trunk: Trunk) -> None:
        self.session, self.local = session, LocalLink(trunk)
        self.width = trunk.plan.width
        self.rounds = 0
        self.longest_s = 0.0

    def round(self) -> None:
        """One training step on padded rows, and three tokens of a generation whose rows change places."""
        self.rounds += 1
        generator = torch.Generator().manual_seed(self.rounds)
        hidden = torch.randn(3, 7, self.width, generator=generator)
        gradient = torch.randn(3, 7, self.width, generator=generator)
        mask = torch.ones(3, 7, dtype=torch.uint8)
        mask[0, :3] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0).to(torch.int32)
        for here, there in zip(
            self._train(self.session, hidden, gradient, mask, positions),
            self._train(self.local, hidden, gradient, mask, positions),
            strict=True,
        ):
            assert torch.equal(here, there)
        for here, there in zip(self._generate(self.session, hidden), self._generate(self.local, hidden), strict=True):
            assert torch.equal(here, there)

    def _train(
        self, link: TrunkLink, hidden: torch.Tensor, gradient: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor
    ) -> list[torch.Tensor]:
        started = time.monotonic()
        output, step = link.forward(TrunkRequest(hidden=hidden, mask=mask, positions=positions, keep=True))
        self._took(started)
        started = time.monotonic()
        back = link.backward(step, gradient)
        self._took(started)
        return [output, back]

    def _generate(self, link: TrunkLink, hidden: torch.Tensor) -> list[torch.Tensor]:
        number, outputs = self.rounds, []
        for past, new, rows in ((0, 5, None), (5, 1, (2, 0, 0)), (6, 1, None)):
            part = hidden[:, past : past + new].contiguous()
            started = time.monotonic()
            output, _ = link.forward(TrunkRequest(hidden=part, cache=number, past=past, rows=rows))
            self._took(started)
            outputs.append(output)
        link.release(caches=(number,))
        return outputs

    def _took(self, started: float) -> None:
        self.longest_s = max(self.longest_s, time.monotonic() - started)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Round after round while the block runs, and one more after it; any difference fails the test."""
        stop, begun = threading.Event(), threading.Event()
        problems: list[BaseException] = []

        def work() -> None:
            try:
                while not stop.is_set():
                    self.round()
                    begun.set()
            except BaseException as error:
                problems.append(error)
            finally:
                begun.set()

        thread = threading.Thread(target=work, name="honest party")
        thread.start()
        try:
            assert begun.wait(LONGEST_WAIT_S * 5)
            before = self.rounds
            yield
        finally:
            stop.set()
            thread.join(LONGEST_WAIT_S * 5)
            assert not thread.is_alive(), "the honest party is not answered"
        if problems:
            raise problems[0]
        self.round()
        assert self.rounds > before
        assert self.longest_s < LONGEST_WAIT_S
