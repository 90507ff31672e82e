"""Rows of several sessions in one pass of the trunk get what they get alone, whatever their lengths and padding."""

from __future__ import annotations

import pytest
import torch

from model_owner.joint import Snapshot, backward_together, decode_together, forward_together, joinable
from model_owner.trunk import Trunk
from splitfl.kit import open_kit
from splitfl.link import TrunkRequest
from splitfl.load import load_trunk_side
from tests.families import save_model
from tests.live.models import make_kit

FAMILIES = [
    "gpt2", "llama", "qwen2", "qwen2, mixed attention", "qwen3", "gemma2", "gemma3", "mistral, sliding window", "opt",
    "bloom", "falcon, alibi",
]  # fmt: skip
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6}  # of the largest number
EAGER = ("gemma2", "bloom")  # their attention works in float32, where the mask of a float64 model is infinite


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    model_dir = save_model(request.param, folder / "model")
    kit = open_kit(make_kit(model_dir, folder / "kit"))
    dtype = torch.float32 if request.param in EAGER else torch.float64
    return Trunk(load_trunk_side(model_dir, kit.plan, dtype=dtype), kit.plan)


def mask_of(lengths, side):
    mask = torch.zeros(len(lengths), max(lengths), dtype=torch.uint8)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    return mask if side == "right" else mask.flip(1)


def positions_of(mask):
    return (mask.long().cumsum(1) - 1).clamp(min=0).to(torch.int32)


def request_of(trunk, lengths, side="right", *, positions=False):
    mask = mask_of(lengths, side)
    hidden = torch.randn(len(lengths), max(lengths), trunk.plan.width, dtype=trunk.dtype)
    padded = not bool(mask.all())
    return TrunkRequest(
        hidden=hidden, mask=mask if padded else None, positions=positions_of(mask) if positions else None
    )


def near(found, expected, mask=None):
    keep = torch.ones(found.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    assert found.shape == expected.shape
    assert torch.isfinite(found).all() or not torch.isfinite(expected).all()
    scale = expected[keep].abs().max()
    assert (found - expected)[keep].abs().max() <= TOLERANCE[found.dtype] * scale


@pytest.mark.parametrize("positions", [False, True])
def test_forwards_and_gradients_equal_those_alone(family, positions):
    torch.manual_seed(1)
    side = "left" if positions else "right"
    requests = [request_of(family, lengths, side, positions=positions) for lengths in ([9, 5], [3, 2], [12, 12, 4])]
    if not positions:
        requests.append(request_of(family, [7]))
    assert all(joinable(family, request, None) for request in requests)
    alone = [family.forward_kept(request, recompute=True) for request in requests]
    together = forward_together(family, requests)
    for request, found, (expected, _) in zip(requests, together, alone, strict=True):
        near(found, expected, request.mask)
    gradients = [torch.randn_like(output) * (1 if request.mask is None else request.mask[..., None])
                 for request, (output, _) in zip(requests, alone, strict=True)]  # fmt: skip
    kept = [one for _, one in alone]
    for request, found, one, gradient in zip(
        requests, backward_together(family, kept, gradients), kept, gradients, strict=True
    ):
        near(found, family.backward(one, gradient), request.mask)


def test_decoding_equals_that_alone_whatever_the_lengths_and_who_takes_part(family):
    """Four sessions, one of two padded rows, one of two in beams; in each step other ones share the pass."""
    torch.manual_seed(2)
    lengths = [[4], [9, 6], [2, 2], [13]]
    prompts = [request_of(family, each, "left", positions=True) for each in lengths]
    twins = []
    for prompt in prompts:
        pair = family.new_cache(), family.new_cache()
        for cache in pair:
            family.forward(prompt, cache)
        twins.append(pair)
    past = [max(each) for each in lengths]
    masks = [mask_of(each, "left") for each in lengths]
    for chosen in ([0, 1, 2, 3], [1, 3], [0, 2, 3], [3], [0, 1, 2, 3], [0, 1], [0, 1, 2, 3]):
        requests = []
        for index in chosen:
            masks[index] = torch.cat([masks[index], torch.ones(len(masks[index]), 1, dtype=torch.uint8)], dim=1)
            mask = masks[index]
            requests.append(
                TrunkRequest(
                    hidden=torch.randn(len(mask), 1, family.plan.width, dtype=family.dtype),
                    mask=None if bool(mask.all()) else mask,
                    positions=None if bool(mask.all()) and index == 0 else positions_of(mask)[:, -1:],
                    past=past[index],
                    rows=(1, 0) if index == 2 and len(chosen) == 4 else None,
                )
            )
            past[index] += 1
        caches = [twins[index][0] for index in chosen]
        assert all(joinable(family, request, cache) for request, cache in zip(requests, caches, strict=True))
        together = decode_together(family, requests, caches)
        for index, request, found in zip(chosen, requests, together, strict=True):
            near(found, family.forward(request, twins[index][1]))


def test_a_cache_goes_back_to_its_snapshot(family):
    torch.manual_seed(3)
    cache, twin = family.new_cache(), family.new_cache()
    prompt, other = request_of(family, [8]), request_of(family, [5])
    for each in (cache, twin):
        family.forward(prompt, each)
    neighbour = family.new_cache()
    family.forward(other, neighbour)
    step = TrunkRequest(hidden=torch.randn(1, 1, family.plan.width, dtype=family.dtype), past=8)
    before = Snapshot.of(cache)
    decode_together(family, [step, TrunkRequest(hidden=step.hidden, past=5)], [cache, neighbour])
    before.restore()
    assert cache.get_seq_length() == 8
    near(family.forward(step, cache), family.forward(step, twin))


def test_one_rows_infinity_stays_in_its_own_session(family):
    torch.manual_seed(4)
    requests = [request_of(family, [6]), request_of(family, [9]), request_of(family, [3])]
    requests[1].hidden[0, 2] = torch.nan
    together = forward_together(family, requests)
    assert not torch.isfinite(together[1]).all()
    for index in (0, 2):
        near(together[index], family.forward(requests[index]))
