"""Sixty-four parties at one owner, each with its own key and connection: all get on, and memory stays bounded."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from model_owner.batching import Batcher
from splitfl.link import TrunkRequest
from splitfl.wire.keys import AllowList, new_keys
from tests.live.owner import make_keys
from tests.model_owner.serving import serving

COUNT, STEPS = 64, 2
ROWS, LENGTH = 2, 16


@pytest.mark.slow
def test_sixty_four_parties_get_on_and_memory_stays_bounded(trunk, tmp_path):
    """Room for twelve requests that wait and for a few kept steps: the others are told to come again, and all end."""
    names = [f"crowd{number}" for number in range(COUNT)]
    make_keys(tmp_path / "keys")
    allow = AllowList(tmp_path / "keys" / "parties")
    for name in names:
        new_keys(name, tmp_path / "keys")
        allow.add(tmp_path / "keys" / f"{name}.key")
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, LENGTH, trunk.plan.width)
    gradient = torch.randn(ROWS, LENGTH, trunk.plan.width)
    output, kept = trunk.forward_kept(TrunkRequest(hidden=hidden), recompute=False)
    result = trunk.backward(kept, gradient)
    size = hidden.nbytes
    room = 40 * size
    ended: list[tuple[float, str]] = []
    with serving(trunk, tmp_path, max_sessions=COUNT, max_waiting_bytes=12 * size, budget=room) as owner:
        owner.server.batcher = Batcher(owner.answerer, "auto")
        most = {"waiting": 0, "held": 0}
        stop = threading.Event()

        def watch():
            while not stop.wait(0.002):
                most["waiting"] = max(most["waiting"], owner.server.waiting_bytes)
                most["held"] = max(most["held"], owner.budget.used)

        def party(name):
            with owner.session(name, memory="recompute", timeout_s=120.0) as session:
                for _ in range(STEPS):
                    found, step = session.forward(TrunkRequest(hidden=hidden, keep=True))
                    below = session.backward(step, gradient)
                    ended.append((time.monotonic(), name))
            return torch.allclose(found, output, atol=1e-4), torch.allclose(below, result, atol=1e-4)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            with ThreadPoolExecutor(COUNT) as pool:
                right = list(pool.map(party, names))
        finally:
            stop.set()
            watcher.join()
        assert owner.server.waiting_bytes == 0
        assert owner.budget.used == 0
    assert right == [(True, True)] * COUNT
    # One request of each party may always wait; beyond that no more than the room.
    assert 0 < most["waiting"] <= 12 * (size + 1000) + COUNT * (size + 1000)
    assert 0 < most["held"] <= room
    done = sorted(ended)
    assert len({name for _, name in done}) == COUNT
