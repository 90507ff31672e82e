"""The byte budget, and what requests are measured to cost."""

from __future__ import annotations

import threading

import pytest
import torch

from model_owner.memory import GREED, MemoryBudget, Share, measure
from model_owner.trunk import Trunk
from splitfl.kit import open_kit
from splitfl.link import TrunkRequest
from splitfl.load import load_trunk_side
from tests.live.models import make_kit, save_tiny


def test_what_is_given_back_can_be_taken_again():
    budget = MemoryBudget(1000)
    share = Share(budget)
    assert share.take(500)
    assert not share.take(400)
    assert budget.used == share.used == 500
    share.give_back(500)
    assert budget.used == share.used == 0
    assert share.take(800)


def test_nothing_is_taken_beyond_the_limit():
    budget = MemoryBudget(100)
    assert not Share(budget).take(101)
    assert not Share(budget).take(10**30)
    assert budget.used == 0
    assert Share(MemoryBudget(0)).take(0)
    assert not Share(MemoryBudget(0)).take(1)


def test_one_party_leaves_room_for_the_next():
    """However many hoard, and in whatever steps, there is something left for a newcomer."""
    budget = MemoryBudget(1_000_000)
    for count in range(1, 6):
        hoarder = Share(budget)
        while hoarder.take(100):
            pass
        assert 0 < hoarder.used <= GREED * (budget.limit - budget.used)
        assert budget.limit - budget.used >= budget.limit // (1 + GREED) ** count - 100 * count
    newcomer = Share(budget)
    assert newcomer.take(50)


def test_one_party_alone_can_use_most_of_it():
    budget = MemoryBudget(1_000_000)
    share = Share(budget)
    while share.take(1000):
        pass
    assert share.used == 800_000


def test_asking_is_atomic():
    """Eight threads take and give back as fast as they can; the limit holds at every moment and nothing is lost."""
    budget, start = MemoryBudget(10_000), threading.Barrier(8)
    beyond, successes = [], []

    def hammer():
        share, taken = Share(budget), 0
        start.wait(30)
        for size in [7, 130, 999, 1, 2500] * 400:
            if share.take(size):
                taken += 1
                if budget.used > budget.limit:
                    beyond.append(budget.used)
                share.give_back(size)
        successes.append(taken)

    threads = [threading.Thread(target=hammer) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert not beyond
    assert budget.used == 0
    assert len(successes) == 8
    assert all(successes)


def saved_bytes(trunk, request):
    """Bytes that autograd holds for `request` between forward and backward, the weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in trunk.base.parameters()}
    weights |= {b.untyped_storage().data_ptr() for b in trunk.base.buffers()}
    held = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kept = trunk.forward_kept(request, recompute=False)
    del kept
    return sum(held.values())


# Attention that is not fused keeps its weights, which grow with the square of the length: bloom, gemma2.
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma2", "mistral, sliding window"])
def test_a_graph_costs_about_what_was_measured(family, tmp_path):
    model_dir = save_tiny(family, tmp_path / "model")
    plan = open_kit(make_kit(model_dir, tmp_path / "kit")).plan
    trunk = Trunk(load_trunk_side(model_dir, plan, dtype=torch.float32), plan)
    costs = measure(trunk, caches=True)
    generator = torch.Generator().manual_seed(0)
    for rows, length, padded in ((1, 1, False), (3, 5, True), (4, 60, False), (4, 60, True), (2, 128, True)):
        mask = torch.ones(rows, length, dtype=torch.uint8)
        mask[0, : length // 3] = 0
        hidden = torch.randn(rows, length, plan.width, generator=generator)
        real = saved_bytes(trunk, TrunkRequest(hidden=hidden, mask=mask if padded else None))
        assert 0.6 < costs.of_graph(rows, length) / real < 1.6, (rows, length, padded)


def test_a_cache_costs_about_what_was_measured(trunk):
    costs = measure(trunk, caches=True)
    cache = trunk.new_cache()
    trunk.forward(TrunkRequest(hidden=torch.zeros(3, 50, trunk.plan.width)), cache)
    real = sum(slot.keys.nbytes + slot.values.nbytes for slot in cache.layers)
    assert real <= costs.cache * 150 < 1.2 * real
    assert measure(trunk, caches=False).cache == 0


def test_measuring_leaves_nothing_behind(trunk):
    before = torch.is_grad_enabled()
    first, second = measure(trunk, caches=True), measure(trunk, caches=True)
    assert first == second
    assert torch.is_grad_enabled() is before
    assert all(p.grad is None for p in trunk.base.parameters())
