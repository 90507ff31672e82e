"""Smaller weight matrices: each kind against its definition, and what a stranger's file could claim."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from splitfl.compression import (
    compressed,
    expanded,
    expanded_shapes,
    factored,
    prune_smallest,
    quantised,
    unquantised,
)
from splitfl.errors import ModelError, UsageError

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int8: "I8", torch.uint8: "U8", torch.int64: "I64"}


def matrix(rows=24, columns=64, seed=0, dtype=torch.float32):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def headers(stored):
    return {name: (tuple(tensor.shape), DTYPES[tensor.dtype]) for name, tensor in stored.items()}


# ---- pruning


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("share", [0.25, 0.9])
def test_pruning_zeroes_that_share_the_smallest_first(kind, share):
    module = kind(40, 30)
    before = module.weight.detach().clone()
    prune_smallest([module], share)
    gone = module.weight == 0
    assert int(gone.sum()) == round(share * before.numel())
    assert before[gone].abs().max() <= before[~gone].abs().min()
    assert torch.equal(module.weight[~gone], before[~gone])
    assert sorted(name for name, _ in module.named_parameters()) == ["bias", "weight"]
    assert not list(module.buffers()), "a mask was left"


def test_pruning_nothing_changes_nothing_and_everything_is_refused():
    module = nn.Linear(4, 4)
    before = module.weight.detach().clone()
    prune_smallest([module], 0)
    assert torch.equal(module.weight, before)
    for share in (1.0, -0.1):
        with pytest.raises(UsageError, match="cannot be pruned"):
            prune_smallest([module], share)


# ---- ranks


@pytest.mark.parametrize("rank", [1, 5, 23])
def test_factors_are_the_best_of_their_rank(rank):
    full = matrix()
    left, right = factored(full, rank)
    assert left.shape == (24, rank)
    assert right.shape == (rank, 64)
    # Eckart and Young: no matrix of that rank is nearer than the singular values that are left out.
    tail = torch.linalg.svdvals(full.double())[rank:]
    assert torch.dist(full.double(), left.double() @ right.double()).item() == pytest.approx(
        tail.pow(2).sum().sqrt().item(), rel=1e-5
    )


def test_factors_keep_the_dtype():
    left, right = factored(matrix(dtype=torch.bfloat16), 4)
    assert left.dtype == right.dtype == torch.bfloat16


# ---- bits


def test_eight_bits_are_within_half_a_step_of_every_row():
    full = matrix() * torch.logspace(-3, 3, 24)[:, None]
    codes, scales = quantised(full, 8)
    assert (codes.dtype, codes.shape, scales.dtype, scales.shape) == (torch.int8, (24, 64), torch.float32, (24, 1))
    step = full.abs().amax(1, keepdim=True) / 127.5
    assert torch.allclose(scales, step, rtol=1e-5)
    assert ((unquantised(codes, scales) - full).abs() <= step * 0.5001).all()


@pytest.mark.parametrize(("columns", "groups"), [(64, 2), (96, 3), (40, 1), (2, 1)])
def test_four_bits_are_two_codes_a_byte_and_a_scale_a_group(columns, groups):
    full = matrix(columns=columns) * torch.logspace(-3, 3, 24)[:, None]
    codes, scales = quantised(full, 4)
    assert (codes.dtype, codes.shape, scales.shape) == (torch.uint8, (24, columns // 2), (24, groups))
    # Taken apart by hand: low nibble first, each 8 above its code.
    apart = [[(int(byte) >> shift & 15) - 8 for byte in row for shift in (0, 4)] for row in codes]
    wide = scales.repeat_interleave(columns // groups, dim=1)
    expected = torch.tensor(apart, dtype=torch.float32) * wide
    assert torch.equal(unquantised(codes, scales), expected)
    assert ((expected - full).abs() <= wide * 0.5001).all()
    largest = full.reshape(24, groups, -1).abs().amax(-1)
    assert torch.allclose(scales, largest / 7.5, rtol=1e-5)


def test_an_odd_number_of_columns_takes_eight_bits():
    codes, scales = quantised(matrix(columns=33), 4)
    assert (codes.dtype, codes.shape, scales.shape) == (torch.int8, (24, 33), (24, 1))


def test_a_row_of_zeros_stays_zero():
    full = matrix()
    full[3] = 0
    for bits in (8, 4):
        assert torch.count_nonzero(unquantised(*quantised(full, bits))[3]) == 0


def test_other_bits_and_a_missing_extra_are_refused(monkeypatch):
    with pytest.raises(UsageError, match="3 bits"):
        quantised(matrix(), 3)
    codes, scales = quantised(matrix(), 8)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UsageError, match="torchao") as refused:
        quantised(matrix(), 8)
    assert "splitfl[quantise]" in refused.value.hint
    assert unquantised(codes, scales).shape == (24, 64), "opening needs no extra"


# ---- all tensors of a file


def layer():
    return {
        "q.weight": matrix(64, 64, seed=1, dtype=torch.bfloat16),
        "up.weight": matrix(96, 64, seed=2),
        "up.bias": matrix(1, 96)[0],
        "experts": torch.zeros(2, 8, 8),
        "table": torch.arange(6).reshape(2, 3),
    }


def test_nothing_asked_is_nothing_changed():
    held = layer()
    stored = compressed(held, rank=None, bits=None)
    assert stored.keys() == held.keys()
    assert all(torch.equal(expanded(stored)[name], tensor) for name, tensor in held.items())


@pytest.mark.parametrize(("rank", "bits"), [(4, None), (None, 8), (None, 4), (4, 8), (4, 4)])
def test_what_is_opened_is_what_each_step_makes_of_it(rank, bits):
    held = layer()
    stored = compressed(held, rank=rank, bits=bits)
    opened = expanded(stored)
    assert opened.keys() == held.keys()
    assert expanded_shapes(headers(stored)) == {name: tuple(tensor.shape) for name, tensor in held.items()}

    def through_bits(tensor):
        return tensor.float() if bits is None else unquantised(*quantised(tensor, bits))

    for name in ("q.weight", "up.weight"):
        parts = factored(held[name], rank) if rank else ()
        wanted = through_bits(parts[0]) @ through_bits(parts[1]) if parts else through_bits(held[name])
        assert torch.equal(opened[name], wanted)
        assert opened[name].dtype == torch.float32
    for name in ("up.bias", "experts", "table"):
        assert torch.equal(opened[name], held[name])
        assert name in stored


def test_factors_are_stored_only_where_they_are_fewer_values():
    held = {"wide": matrix(32, 64), "square": matrix(32, 32)}
    # 20 x (32 + 64) = 1,920 < 2,048, but 20 x (32 + 32) = 1,280 > 1,024.
    assert compressed(held, rank=20, bits=None).keys() == {"wide:left", "wide:right", "square"}


def test_bits_make_files_smaller():
    held = {"up.weight": matrix(96, 64, dtype=torch.bfloat16)}
    sizes = [
        sum(t.nbytes for t in compressed(held, rank=None, bits=bits).values()) / held["up.weight"].nbytes
        for bits in (8, 4)
    ]
    assert sizes == pytest.approx([0.5 + 4 / 128, 0.25 + 2 * 4 / 128])


def zeros(*shape, dtype="F32"):
    return shape, dtype


@pytest.mark.parametrize(
    "claim",
    [
        {"x:codes": zeros(4, 4, dtype="I8")},
        {"x:scales": zeros(4, 1)},
        {"x:codes": zeros(4, 4, dtype="I8"), "x:scales": zeros(3, 1)},
        {"x:codes": zeros(4, 4, dtype="I8"), "x:scales": zeros(4, 3)},
        {"x:codes": zeros(4, 4, dtype="I8"), "x:scales": zeros(4, 0)},
        {"x:codes": zeros(4, 4, dtype="I8"), "x:scales": zeros(4)},
        {"x:codes": zeros(4, 4, dtype="I8"), "x:scales": zeros(4, 1, dtype="F64")},
        {"x:codes": zeros(4, 4, dtype="F32"), "x:scales": zeros(4, 1)},
        {"x:codes": zeros(4, dtype="I8"), "x:scales": zeros(4, 1)},
        {"x:codes": zeros(dtype="I8"), "x:scales": zeros(4, 1)},
        {"x:codes": zeros(4, 0, dtype="I8"), "x:scales": zeros(4, 1)},
        {"x:codes": zeros(4, 4, dtype="I8"), "x:scales": zeros(4, 1), "x": zeros(4, 4)},
        {"x:left": zeros(4, 2)},
        {"x:right": zeros(2, 4)},
        {"x:left": zeros(4, 2), "x:right": zeros(3, 4)},
        {"x:left": zeros(4, 2), "x:right": zeros(2)},
        {"x:left": zeros(4, 0), "x:right": zeros(0, 4)},
        {"x:left": zeros(4, 2, dtype="I64"), "x:right": zeros(2, 4)},
        {"x:left": zeros(4, 2), "x:right": zeros(2, 4), "x": zeros(4, 4)},
        {"x:left:codes": zeros(4, 2, dtype="I8"), "x:right": zeros(2, 4)},
        {"x:other": zeros(4, 4)},
    ],
)
def test_parts_that_do_not_fit_are_refused_from_their_headers(claim):
    with pytest.raises(ModelError, match="do not fit together"):
        expanded_shapes(claim)
