"""From a checked message to a reply, without a socket."""

from __future__ import annotations

import pytest
import torch

from model_owner.answer import Answerer
from model_owner.memory import MemoryBudget, measure
from model_owner.refusals import Refusal
from model_owner.sessions import HeldSession, SessionTable
from model_owner.trunk import Trunk
from protocols import PROTOCOLS
from splitfl.kit import open_kit
from splitfl.link import TrunkRequest
from splitfl.load import load_trunk_side
from splitfl.wire import frames as wire
from splitfl.wire.messages import Backward, Forward
from splitfl.wire.session import OwnerSession, Terms
from tests.live.models import make_kit, save_tiny

ENOUGH = 1 << 30


def session_of(answerer, *, wire_dtype="float32", recompute=False):
    plan = answerer.trunk.plan
    terms = Terms(session=1, protocol="split", trunk=plan.trunk, plan=plan.digest, wire_dtype=wire_dtype)
    return HeldSession(
        key=("a" * 40, 1),
        party="somebody",
        talk=OwnerSession(terms, PROTOCOLS["split"].disclosure),
        limits=wire.Limits(width=plan.width, max_tokens=4096, max_length=128, wire_dtype=wire_dtype),
        recompute=recompute,
        routes=[b"\0abcd"],
        budget=SessionTable(60.0).share("a" * 40, answerer.budget),
    )


@pytest.fixture(scope="module")
def costs(trunk):
    return measure(trunk, caches=True)


def answerer_with(trunk, costs, budget=ENOUGH):
    return Answerer(trunk, MemoryBudget(budget), costs)


@pytest.fixture
def hidden(trunk):
    return torch.randn(2, 5, trunk.plan.width, generator=torch.Generator().manual_seed(1))


def described(message, **tensors):
    return wire.describe(message, tensors)


def forward(answerer, held, hidden, step=1, cache=None, **fields):
    tensors = {"hidden": hidden} | {name: fields.pop(name) for name in ("mask", "positions") if name in fields}
    message = described(Forward(session=1, step=step, cache=cache, **fields), **tensors)
    opened = answerer.open_cache(held, message) if cache is not None else None
    return answerer.forward(held, message, tensors, opened)


def tensor_in(outcome):
    message = wire.open_header(outcome.frames, sender="owner")
    return next(iter(wire.tensors_of(message, outcome.frames).values()))


def backward(answerer, held, kept, gradient):
    return answerer.backward(held, described(Backward(session=1, step=1), gradient=gradient), kept, gradient)


def refused(code, function, *arguments, **fields):
    with pytest.raises(Refusal) as caught:
        function(*arguments, **fields)
    assert caught.value.code == code
    return caught.value


def test_keeping_falls_back_to_recomputing_with_the_same_result(trunk, costs, hidden):
    """A budget with room for the input alone; then with none."""
    gradient = torch.flip(hidden, (0,))
    results = []
    for budget in (ENOUGH, 2 * hidden.nbytes):
        answerer = answerer_with(trunk, costs, budget)
        held = session_of(answerer)
        outcome = forward(answerer, held, hidden, keep=True)
        assert outcome.reserved == answerer.budget.used
        results.append((outcome.kept.output is None, tensor_in(outcome), outcome.kept))
        results[-1] += (tensor_in(backward(answerer, held, outcome.kept, gradient)),)
    (spared_a, there_a, _, back_a), (spared_b, there_b, _, back_b) = results
    assert (spared_a, spared_b) == (False, True)
    assert torch.equal(there_a, there_b)
    assert torch.equal(back_a, back_b)
    answerer = answerer_with(trunk, costs, hidden.nbytes)
    refused("busy", forward, answerer, session_of(answerer), hidden, keep=True)
    assert answerer.budget.used == 0


def test_a_session_that_asked_for_recompute_keeps_inputs_alone(trunk, costs, hidden):
    answerer = answerer_with(trunk, costs)
    outcome = forward(answerer, session_of(answerer, recompute=True), hidden, keep=True)
    assert outcome.reserved == hidden.nbytes
    assert outcome.kept.entry is None


def test_a_result_that_overflows_its_wire_dtype_is_refused(trunk, costs, hidden):
    """Finite in the trunk's float32, infinite in the session's float16."""
    answerer = answerer_with(trunk, costs)
    held = session_of(answerer, wire_dtype="float16")
    small, large = (hidden / 1000).half(), torch.full_like(hidden, 6e4).half()
    large[:, :, ::2] = 0
    kept = forward(answerer, held, small, keep=True).kept
    _, same = trunk.forward_kept(TrunkRequest(hidden=small), recompute=False)
    result = trunk.backward(same, large)
    assert torch.isfinite(result).all()
    assert result.abs().max() > torch.finfo(torch.float16).max
    refused("not_finite", backward, answerer, held, kept, large)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_reply_has_the_sessions_dtype(trunk, costs, hidden, dtype):
    answerer = answerer_with(trunk, costs)
    sent = hidden.to(getattr(torch, dtype))
    result = tensor_in(forward(answerer, session_of(answerer, wire_dtype=dtype), sent))
    assert torch.equal(result, trunk.forward(TrunkRequest(hidden=sent)).to(sent.dtype))


def test_a_failed_backward_can_be_made_again_from_the_input(trunk, costs, hidden):
    answerer = answerer_with(trunk, costs)
    held = session_of(answerer)
    outcome = forward(answerer, held, hidden, keep=True)
    held.keep(1, outcome.kept, outcome.reserved)
    refused("not_finite", backward, answerer, held, outcome.kept, torch.full_like(hidden, 3e38))
    held.spend_step(1)
    again = tensor_in(backward(answerer, held, held.kept[1][0], hidden))
    _, fresh = trunk.forward_kept(TrunkRequest(hidden=hidden), recompute=False)
    assert torch.equal(again, trunk.backward(fresh, hidden))


def test_a_cache_is_charged_for_its_longest_extent_once(trunk, costs, hidden):
    answerer = answerer_with(trunk, costs)
    held = session_of(answerer)
    forward(answerer, held, hidden, cache=3)
    assert answerer.budget.used == 10 * costs.cache
    forward(answerer, held, hidden[:, :1], step=2, cache=3, past=5)
    assert answerer.budget.used == 12 * costs.cache
    forward(answerer, held, hidden[:, :1], step=3, cache=3, past=2)
    forward(answerer, held, hidden, step=4, cache=3)
    assert answerer.budget.used == 12 * costs.cache
    held.drop_cache(3)
    assert answerer.budget.used == 0


def test_a_cache_without_room_is_refused_and_dropped(trunk, costs, hidden):
    answerer = answerer_with(trunk, costs, 15 * costs.cache)
    held = session_of(answerer)
    forward(answerer, held, hidden, cache=1)
    refused("busy", forward, answerer, held, hidden, step=2, cache=1, past=5)
    assert answerer.budget.used == 0
    assert not held.caches


def test_cached_results_are_those_of_the_whole_sequence(trunk, costs, hidden):
    answerer = answerer_with(trunk, costs)
    held = session_of(answerer)
    whole = tensor_in(forward(answerer, held, hidden))
    parts = [
        tensor_in(forward(answerer, held, part.contiguous(), step=2 + past, cache=1, past=past))
        for past, part in ((0, hidden[:, :3]), (3, hidden[:, 3:4]), (4, hidden[:, 4:]))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


def test_a_model_without_caches_makes_none(trunk, hidden):
    answerer = answerer_with(trunk, measure(trunk, caches=False))
    held = session_of(answerer)
    refused("unknown_cache", forward, answerer, held, hidden, cache=1)
    assert not held.caches


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom", "mistral, sliding window", "gemma3"])
def test_numbers_that_would_break_the_model_are_refused(family, tmp_path):
    """Whatever the family does with positions and masks: index a table, turn a wheel, or ignore them."""
    model_dir = save_tiny(family, tmp_path / "model")
    plan = open_kit(make_kit(model_dir, tmp_path / "kit")).plan
    trunk = Trunk(load_trunk_side(model_dir, plan, dtype=torch.float32), plan)
    answerer = Answerer(trunk, MemoryBudget(ENOUGH), measure(trunk, caches=True))
    held, hidden = session_of(answerer), torch.zeros(2, 4, plan.width)

    def positions(*values):
        return torch.tensor([values], dtype=torch.int32)

    last = (plan.max_length or 2**31) - 1
    for good in ((0, 0, 0, 0), (3, 2, 1, 0), (0, 1, 2, last)):
        forward(answerer, held, hidden, positions=positions(*good))
    bad = [(0, 1, 2, -1), (-5, 0, 0, 0), (-(2**31), 0, 0, 0)]
    if plan.max_length is not None:
        bad += [(0, 0, 0, last + 1), (2**31 - 1, 0, 0, 0)]
    for values in bad:
        for fields in ({}, {"keep": True}, {"cache": 1}):
            assert (
                "position"
                in refused("malformed", forward, answerer, held, hidden, positions=positions(*values), **fields).problem
            )
    for mask in (torch.full((2, 4), 2), torch.full((2, 4), 255), torch.ones(2, 5), torch.ones(2, 128)):
        refused("malformed", forward, answerer, held, hidden, mask=mask.to(torch.uint8))


def test_running_out_of_memory_is_a_refusal(trunk, costs, hidden, monkeypatch):
    answerer = answerer_with(trunk, costs)
    held = session_of(answerer)

    def exhaust(*args, **kwargs):
        return torch.empty(2**60, dtype=torch.float32)  # the real allocator's own words

    monkeypatch.setattr(trunk, "run", exhaust)
    for fields in ({}, {"keep": True}, {"cache": 1}):
        refused("too_large", forward, answerer, held, hidden, **fields)
        held.drop_cache(1)  # as the server does
        assert answerer.budget.used == 0


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_a_batch_that_the_device_cannot_hold_is_too_large_and_the_next_one_is_served(trunk, costs, hidden, error):
    """A real layer of the trunk runs out of memory, half way through; nothing of the attempt stays."""
    answerer = answerer_with(trunk, costs)
    held, layers = session_of(answerer), trunk.base.get_submodule(trunk.plan.stack)
    expected = tensor_in(forward(answerer, held, hidden))
    forward(answerer, held, hidden, step=2, cache=4)

    def fail(*_):
        raise error

    hook = layers[trunk.plan.trunk_layers.stop - 1].register_forward_pre_hook(fail)
    try:
        used = answerer.budget.used
        for fields in ({}, {"keep": True}, {"cache": 4, "past": hidden.shape[1]}):
            said = refused("too_large", forward, answerer, held, hidden[:, :1], step=3, **fields)
            assert "memory" in said.problem
            assert "--per-device-train-batch-size" in said.hint
        assert answerer.budget.used - used <= hidden[:, :1].numel() * costs.cache  # what the longer cache had reserved
    finally:
        hook.remove()
    assert torch.equal(tensor_in(forward(answerer, held, hidden, step=4)), expected)
    # Some layers had taken the position and some not: the party fills the cache again instead of going on from that.
    refused("unknown_cache", forward, answerer, held, hidden[:, :1], step=5, cache=4, past=hidden.shape[1])
    assert torch.equal(tensor_in(forward(answerer, held, hidden, step=6, cache=4)), expected)
