"""The codings: their bytes, how long they are, and what is lost on the way."""

from __future__ import annotations

import ast
import math
import re
import struct
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from splitfl.errors import InternalError, WireError
from splitfl.wire import coding as wire_coding
from splitfl.wire.codecs import frame_bytes
from splitfl.wire.coding import (
    CODINGS,
    WIDEST,
    Coded,
    coded_bytes,
    decode,
    encode_grid16,
    encode_int4,
    encode_int8,
    encode_topk,
)
from splitfl.wire.frames import describe
from splitfl.wire.messages import Backward
from tests.wire.layouts import encoded, numbers, unpack

LARGEST = torch.finfo(torch.float32).max
TINY = torch.finfo(torch.float32).tiny
NASTY = (0.0, -0.0, 1e-45, -1e-40, TINY, 200 * TINY, 1e-30, 1.0, -1.0, 0.5, 65504.0, -65520.0, 1e38, -1e38, LARGEST)
EXAMPLES = settings(max_examples=80, deadline=None)

shapes = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 9))


@st.composite
def tensors(draw, shape=None):
    """float32 [B, T, D]: random numbers of any size, with awkward ones among them."""
    B, T, D = draw(shapes) if shape is None else shape
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(B, T, D, generator=generator) * 10.0 ** draw(st.integers(-44, 37))
    for _ in range(draw(st.integers(0, 6))):
        where = (draw(st.integers(0, B - 1)), draw(st.integers(0, T - 1)), draw(st.integers(0, D - 1)))
        x[where] = draw(st.sampled_from(NASTY))
    return x.clamp(-LARGEST, LARGEST)


def bits(x):
    return x.contiguous().reshape(-1).view(torch.int32)


# ---- bytes

GOLDEN = {
    "grid16": (
        lambda: encode_grid16(torch.tensor([[[1, -2, 258], [0, 32767, -32768]]]), 0.25),
        "0100" "feff" "0201" "0000" "ff7f" "0080",
        [[[0.25, -0.5, 64.5], [0.0, 8191.75, -8192.0]]],
    ),
    "int8": (
        lambda: encode_int8(torch.tensor([[[127.0, -2.0, 0.4], [0.0, -254.0, 3.0]]])),
        "0000803f" "00000040" "7ffe00" "008102",
        [[[127.0, -2.0, 0.0], [0.0, -254.0, 4.0]]],
    ),
    "int4, odd width": (
        lambda: encode_int4(torch.tensor([[[7.0, -2.0, 0.4], [0.0, -14.0, 3.2]]])),
        "0000803f" "00000040" "6f08" "180a",
        [[[7.0, -2.0, 0.0], [0.0, -14.0, 4.0]]],
    ),
    "int4, even width": (
        lambda: encode_int4(torch.tensor([[[-7.0, 1.0]]])),
        "0000803f" "91",
        [[[-7.0, 1.0]]],
    ),
    "topk": (
        lambda: encode_topk(torch.tensor([[[0.0, -2.0, 1.0]], [[0.5, 0.0, 0.25]]]), 1),
        "0100" "0000" "00c0" "0038",
        [[[0.0, -2.0, 0.0]], [[0.5, 0.0, 0.0]]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_the_bytes_are_those_of_the_table(name):
    made, expected, values = GOLDEN[name]
    coded = made()
    assert bytes(coded.payload.tolist()).hex() == expected
    assert coded.decode().tolist() == values
    assert numbers(coded).tolist() == values


@EXAMPLES
@given(st.sampled_from(sorted(CODINGS)), st.data())
def test_a_payload_is_as_long_as_coding_and_shape_say_and_reads_as_the_table_says(name, data):
    x = data.draw(tensors())
    kept = data.draw(st.integers(1, x.shape[-1])) if name == "topk" else None
    coded = encoded(name, x, kept)
    B, T, D = x.shape
    length = {
        "grid16": B * T * D * 2,
        "int8": B * T * 4 + B * T * D,
        "int4": B * T * 4 + B * T * ((D + 1) // 2),
        "topk": B * T * (kept or 0) * 4,
    }
    assert coded.payload.dtype == torch.uint8
    assert coded.payload.shape == (length[name],)
    assert coded_bytes(name, coded.shape, coded.kept) == length[name]
    assert frame_bytes(describe(Backward(session=1, step=1), {"gradient": coded}).tensors[0]) == length[name]
    back = coded.decode()
    assert back.dtype == torch.float32
    assert back.shape == x.shape
    assert torch.equal(bits(back), bits(numbers(coded)))


@EXAMPLES
@given(st.sampled_from(["grid16", "int8", "int4", "topk"]), shapes, st.randoms(use_true_random=False))
def test_any_bytes_read_as_the_table_says(name, shape, random):
    """Codes that no encoder writes are among them: -128, nibble 0, negative and infinite scales."""
    kept = random.randint(1, shape[-1]) if name == "topk" else 0
    raw = bytearray(random.randbytes(coded_bytes(name, shape, kept)))
    if name == "topk":
        tokens = shape[0] * shape[1]
        columns = [c for _ in range(tokens) for c in random.sample(range(shape[-1]), kept)]
        raw[: 2 * tokens * kept] = struct.pack(f"<{len(columns)}H", *columns)
    step = 2.0 ** random.randint(-60, 60) if name == "grid16" else 0.0
    coded = Coded(coding=name, shape=shape, payload=torch.tensor(list(raw), dtype=torch.uint8), step=step, kept=kept)
    for buffer in (bytes(raw), raw, memoryview(b"\xff" + raw)[1:]):  # read-only, writable, misaligned
        came = decode(buffer, coding=name, shape=shape, step=step, kept=kept)
        assert torch.equal(came.isnan(), numbers(coded).isnan())
        assert torch.equal(came.nan_to_num(7.0, 1e39, -1e39), numbers(coded).nan_to_num(7.0, 1e39, -1e39))


def test_sizes_are_python_integers_that_never_wrap():
    assert coded_bytes("int8", (2**62, 2**62, 2**62), 0) == 2**124 * (4 + 2**62)
    assert coded_bytes("topk", (2**62, 4, 8), 2**62) == 4 * 2**62 * 4 * 2**62
    with pytest.raises(InternalError, match="raw"):
        coded_bytes("raw", (1, 1, 1), 0)


def test_whatever_is_wider_than_a_byte_says_that_it_is_little_endian():
    """In the source: no machine of the other byte order is at hand. torch has only the machine's own order."""
    tree = ast.parse(Path(wire_coding.__file__).read_text(encoding="utf-8"))
    texts = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    dtypes = {text for text in texts if re.fullmatch(r"[<>=|!]?[iufbBhH]\d+", text)}
    assert {"<i2", "<u2", "<f2", "<f4"} <= dtypes
    assert all(text.startswith("<") or text.endswith("1") for text in dtypes)
    single = {"torch.int8", "torch.uint8", "np.int8", "np.uint8"}
    views = [
        n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "attr", "") in ("view", "frombuffer")
    ]
    assert len(views) >= 8
    for call in views:
        how = [ast.unparse(a) for a in (*call.args, *(k.value for k in call.keywords))]
        assert single & set(how) or ast.literal_eval(call.args[-1]).startswith("<"), ast.unparse(call)


@pytest.mark.parametrize("dtype", ["i2", "u2", "f2", "f4"])
def test_an_array_of_the_other_byte_order_is_turned_round(dtype):
    values = np.array([1, 2, 258, 3]).astype(">" + dtype)
    assert bytes(wire_coding._bytes_of(values, "<" + dtype).tolist()) == values.astype("<" + dtype).tobytes()
    assert bytes(wire_coding._bytes_of(values, "<" + dtype).tolist()) != values.tobytes()


# ---- what is lost


@EXAMPLES
@given(st.sampled_from([("int8", 127), ("int4", 7)]), tensors())
def test_int8_and_int4_are_off_by_half_a_step_of_their_token(which, x):
    name, largest = which
    coded = encoded(name, x)
    scales, codes = unpack(coded)
    back = coded.decode()
    assert torch.isfinite(back).all()
    for token, row, came in zip(range(len(scales)), x.flatten(0, 1).double(), back.flatten(0, 1).double(), strict=True):
        most = float(row.abs().max())
        assert scales[token] == pytest.approx(most / largest, rel=2.0**-22, abs=1e-45)
        assert max(map(abs, codes[token])) <= largest
        if scales[token] <= TINY:  # too small to be divided by: zeros
            assert codes[token] == [0] * len(row)
            assert most <= largest * TINY * (1 + 2.0**-22)
            continue
        assert max(map(abs, codes[token])) == largest
        assert float((row - came).abs().max()) <= scales[token] * 0.5 * (1 + largest * 2.0**-21)


@EXAMPLES
@given(st.sampled_from(["int8", "int4"]), tensors())
def test_a_code_is_the_nearest_one(name, x):
    """In float32, ties to even; -0.0 and what is smaller than half a step become 0."""
    largest = {"int8": 127, "int4": 7}[name]
    scales, codes = unpack(encoded(name, x))
    for token, row in enumerate(x.flatten(0, 1).numpy()):
        scale = np.float32(scales[token])
        if scale > TINY:
            expected = np.rint(row / scale).clip(-largest, largest)
            assert codes[token] == expected.astype(int).tolist()


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_the_largest_number_of_float32_stays_finite(name):
    x = torch.tensor([[[LARGEST, -LARGEST, 0.0, 1e30]]])
    back = encoded(name, x).decode()
    assert torch.isfinite(back).all()
    assert torch.allclose(back[..., :2], x[..., :2], rtol=1e-6)


@pytest.mark.parametrize("name", ["int8", "int4", "topk"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so_and_spares_other_tokens(name, value):
    """The receiver refuses it; as a finite number it would have been computed with."""
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1))
    clean = encoded(name, x).decode()
    x[1, 2, 3] = value
    back = encoded(name, x).decode()
    assert not torch.isfinite(back[1, 2]).all()
    back[1, 2] = clean[1, 2]
    assert torch.equal(back, clean)


@EXAMPLES
@given(st.sampled_from(["int8", "int4"]), tensors())
def test_what_was_decoded_is_coded_to_the_same_numbers_again(name, x):
    once = encoded(name, x).decode()
    twice = encoded(name, once).decode()
    assert torch.allclose(twice, once, rtol=2.0**-21, atol=128 * TINY)


@EXAMPLES
@given(shapes, st.integers(-60, 60), st.integers(0, 2**31))
def test_grid_points_survive_exactly(shape, exponent, seed):
    codes = torch.randint(-32768, 32768, shape, generator=torch.Generator().manual_seed(seed))
    coded = encode_grid16(codes, 2.0**exponent)
    assert coded.step == 2.0**exponent
    assert torch.equal(coded.decode().double(), codes.double() * 2.0**exponent)
    assert unpack(coded)[1] == codes.flatten(0, 1).tolist()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_grid_points_beyond_16_bits_saturate(dtype):
    far = torch.iinfo(dtype)
    codes = torch.tensor([[[far.max, 32768, 32767, -32768, -32769, far.min]]], dtype=dtype)
    assert unpack(encode_grid16(codes, 1.0))[1] == [[32767, 32767, 32767, -32768, -32768, -32768]]


def test_grid_points_are_sent_by_value():
    codes = torch.zeros(1, 1, 4, dtype=torch.int16)
    coded = encode_grid16(codes, 1.0)
    codes += 1
    assert coded.decode().tolist() == [[[0.0] * 4]]


@pytest.mark.parametrize("step", [0.0, -1.0, 3.0, 0.3, math.nan, math.inf, -math.inf, 1e300, 2.0**61, 2.0**-61, 5e-324])
def test_a_step_that_would_be_refused_is_not_sent(step):
    with pytest.raises(InternalError, match="grid step"):
        encode_grid16(torch.zeros(1, 1, 1, dtype=torch.int32), step)


@EXAMPLES
@given(tensors(), st.data())
def test_topk_keeps_the_largest_as_float16_and_nothing_else(x, data):
    """Ties included: which of equal ones are kept is left open, how many is not."""
    if data.draw(st.booleans()):
        x = torch.where(x.abs() > x.abs().median(), torch.sign(x), torch.zeros(()))  # many ties
    kept = data.draw(st.integers(1, x.shape[-1]))
    coded = encode_topk(x, kept)
    columns, _ = unpack(coded)
    for names, row, came in zip(columns, x.flatten(0, 1), coded.decode().flatten(0, 1), strict=True):
        assert len(set(names)) == kept
        inside = torch.zeros(len(row), dtype=torch.bool)
        inside[list(names)] = True
        assert torch.equal(came[inside], row[inside].clamp(-65504, 65504).half().float())
        assert not came[~inside].any()
        if kept < len(row):
            assert row[inside].abs().min() >= row[~inside].abs().max()


@EXAMPLES
@given(tensors())
def test_topk_of_all_numbers_is_float16(x):
    assert torch.equal(encode_topk(x, x.shape[-1]).decode(), x.clamp(-65504, 65504).half().float())


def test_topk_names_the_widest_columns_and_no_others():
    x = torch.zeros(1, 1, WIDEST)
    x[0, 0, -1], x[0, 0, 0] = 3.0, 2.0
    coded = encode_topk(x, 2)
    assert sorted(unpack(coded)[0][0]) == [0, WIDEST - 1]
    assert torch.equal(coded.decode(), x)
    for width, kept in ((WIDEST + 1, 2), (4, 5), (4, 0), (4, -1)):
        with pytest.raises(InternalError, match="were to be kept"):
            encode_topk(torch.zeros(1, 1, width), kept)


@pytest.mark.parametrize("column", [3, 4, 255, 65535])
def test_a_column_that_does_not_exist_is_refused(column):
    raw = struct.pack("<4H4e", 0, 1, 2, column, 1, 1, 1, 1)
    with pytest.raises(WireError, match="column"):
        decode(raw, coding="topk", shape=(1, 2, 3), step=0.0, kept=2)


@pytest.mark.parametrize("name", ["int8", "int4", "topk"])
def test_layout_in_memory_dtype_and_graph_do_not_change_the_bytes(name):
    x = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(2)).bfloat16().float()
    expected = encoded(name, x, 7).decode()
    for same in (
        x.transpose(0, 1).contiguous().transpose(0, 1),
        x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        x.bfloat16(),
        x.double(),
        x.clone().requires_grad_(True),
    ):
        assert torch.equal(encoded(name, same, 7).decode(), expected)
    before = x.clone()
    encoded(name, x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("block", [1, 10, 35, 36, 10_000])
def test_coding_in_blocks_gives_the_same_bytes(name, block, monkeypatch):
    """Blocks of one token, with a shorter last one, exactly all, and one block for everything."""
    x = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(3))
    expected = encoded(name, x).payload
    monkeypatch.setattr(wire_coding, "_BLOCK", block)
    assert torch.equal(encoded(name, x).payload, expected)
