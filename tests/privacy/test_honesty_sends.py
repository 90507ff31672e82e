"""What the owner honesty check sends, when, and what it leaves alone."""

from __future__ import annotations

import secrets
from dataclasses import replace

import pytest
import torch

from model_owner.trunk import LocalLink
from party.honesty import CheatingOwnerError, HonestyProbe
from tests.privacy.owners import ROWS, Batches, spoil, steps, trunk_of


class Witness(LocalLink):
    """Remembers what it was asked."""

    def __init__(self, trunk):
        super().__init__(trunk)
        self.seen, self.backwards, self.released = [], 0, []

    def forward(self, request):
        self.seen.append(request)
        return super().forward(request)

    def backward(self, step, gradient):
        self.backwards += 1
        return super().backward(step, gradient)

    def release(self, *, caches=(), steps=()):
        self.released.append((caches, steps))
        super().release(caches=caches, steps=steps)


def test_a_probe_costs_three_forwards_and_one_at_the_start():
    link = Witness(trunk_of("llama"))
    probe = HonestyProbe(link, every=4)
    steps(probe, 12)
    assert len(link.seen) == 12 + 1 + 3 * 3
    assert link.backwards == 12
    asked = [each for each in link.seen if not each.keep]
    assert all(each.cache is None for each in asked)
    assert {each.hidden.shape[0] for each in asked} == {1, ROWS}
    assert all((each.mask is None) == (each.hidden.shape[0] == 1) for each in asked)


def test_what_is_sent_follows_from_what_was_sent_before(monkeypatch):
    """Two hidden states that are one after the wire's rounding make the same probes: nothing finer gets out."""
    monkeypatch.setattr(secrets, "randbits", lambda bits: 11)
    request, gradient = Batches().one()
    sent = []
    for nudge in (0, 1e-4):
        rounded = request.hidden.to(torch.bfloat16).float()
        link = Witness(trunk_of("llama", torch.bfloat16))
        probe = HonestyProbe(link, every=1, dtype=torch.bfloat16)
        hidden = rounded * (1 + nudge)
        assert torch.equal(hidden.to(torch.bfloat16).float(), rounded)
        probe.backward(
            probe.forward(replace(request, hidden=hidden))[1], gradient.to(torch.bfloat16).float() * (1 + nudge)
        )
        sent.append([each.hidden for each in link.seen if not each.keep])
    assert len(sent[0]) == 4
    assert all(torch.equal(each, each.to(torch.bfloat16).float()) for each in sent[0])
    assert all(torch.equal(one, other) for one, other in zip(*sent, strict=True))


def test_each_probe_draws_anew():
    link = Witness(trunk_of("llama"))
    probe = HonestyProbe(link, every=1)
    request, gradient = Batches().one()
    for _ in range(2):
        probe.backward(probe.forward(request)[1], gradient)
    above, below, again, _ = (e.hidden for e in link.seen if not e.keep and e.hidden.shape[0] == ROWS)
    assert not torch.equal(above, again)
    # A random part lies in every number, on both sides of the same state.
    assert ((above - request.hidden) != 0).float().mean() > 0.99
    assert torch.allclose((above + below) / 2, request.hidden, atol=1e-5)


def test_generation_and_evaluation_pass_through_unprobed():
    link = Witness(trunk_of("llama"))
    probe = HonestyProbe(link, every=1)
    request, _ = Batches().one()
    probe.forward(replace(request, keep=False))
    probe.forward(replace(request, keep=False, cache=1))
    assert len(link.seen) == 2
    probe.release(caches=(1,))
    assert link.released == [((1,), ())]


def test_a_step_given_up_is_forgotten():
    link = Witness(trunk_of("llama"))
    probe = HonestyProbe(link, every=1)
    request, gradient = Batches().one()
    _, dropped = probe.forward(request)
    _, kept = probe.forward(request)
    probe.release(steps=(dropped,))
    assert link.released == [((), (dropped,))]
    probe.backward(kept, gradient)
    assert not probe._held


def test_a_batch_without_labels_is_no_evidence():
    """Its gradient is zero on both sides of the cut, rightly; no probe is spent on it."""
    link = Witness(trunk_of("llama"))
    probe = HonestyProbe(link, every=1)
    request, gradient = Batches().one()
    probe.backward(probe.forward(request)[1], torch.zeros_like(gradient))
    assert probe.tally.inconclusive == 1
    assert len([each for each in link.seen if each.hidden.shape[0] == ROWS]) == 1


def test_without_gradients_only_the_repeated_input_is_asked():
    trunk = trunk_of("llama")
    link = Witness(trunk)
    probe = HonestyProbe(link, every=3, gradients=False)
    request, _ = Batches().one()
    request = replace(request, keep=False)
    for _ in range(6):
        probe.forward(request)
    assert len(link.seen) == 6 + 1 + 2
    assert (probe.tally.repeats, probe.tally.consistent, link.backwards) == (2, 0, 0)
    probe.forward(replace(request, cache=1))
    undo = spoil(trunk, 0.01)
    try:
        probe.forward(request)
        probe.forward(request)
        with pytest.raises(CheatingOwnerError):
            probe.forward(request)
    finally:
        undo()
