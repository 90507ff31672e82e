import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from splitfl.errors import InternalError, WireError
from splitfl.wire.codecs import TORCH_DTYPES, dtype_name, frame_bytes, from_frame, spec_of, to_frame
from splitfl.wire.messages import BYTES_PER_ELEMENT

FLOATS = ["float32", "float16", "bfloat16"]


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(sorted(TORCH_DTYPES)),
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
)
def test_every_bit_pattern_survives_the_round_trip(dtype, shape, seed):
    """Raw bits, so that NaN payloads, infinities and negative zero are among them."""
    generator = torch.Generator().manual_seed(seed)
    size = math.prod(shape) * BYTES_PER_ELEMENT[dtype]
    raw = torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8)
    tensor = raw.view(TORCH_DTYPES[dtype]).reshape(shape)
    spec = spec_of("hidden", tensor, dtype)
    frame = to_frame(tensor, dtype)
    assert frame.nbytes == len(frame) == frame_bytes(spec) == size
    back = from_frame(bytearray(frame), spec)
    assert back.dtype == tensor.dtype
    assert back.shape == tensor.shape
    assert torch.equal(bits(back), bits(tensor))


@pytest.mark.parametrize(
    ("dtype", "value", "expected"),
    [
        ("float32", 1.0, "0000803f"),
        ("float16", -2.0, "00c0"),
        ("bfloat16", 1.0, "803f"),
        ("int32", -2, "feffffff"),
        ("uint8", 200, "c8"),
    ],
)
def test_the_bytes_are_little_endian(dtype, value, expected):
    tensor = torch.tensor([value], dtype=TORCH_DTYPES[dtype])
    assert bytes(to_frame(tensor, dtype)).hex() == expected


def test_a_fitting_tensor_is_sent_without_a_copy():
    tensor = torch.zeros(2, 3)
    frame = to_frame(tensor, "float32")
    tensor[0, 0] = 1.0
    assert bytes(frame[:4]).hex() == "0000803f"


@pytest.mark.parametrize("wire_dtype", ["float16", "bfloat16"])
def test_a_narrower_wire_dtype_rounds_as_torch_does(wire_dtype):
    tensor = torch.linspace(-3, 3, 24).reshape(2, 3, 4)
    back = from_frame(bytearray(to_frame(tensor, wire_dtype)), spec_of("hidden", tensor, wire_dtype))
    assert torch.equal(back, tensor.to(TORCH_DTYPES[wire_dtype]))
    assert not torch.equal(back.float(), tensor)


def test_a_view_with_strides_and_a_tensor_in_a_graph_are_sent_by_value():
    tensor = torch.arange(12.0, requires_grad=True).reshape(3, 4).T
    back = from_frame(bytearray(to_frame(tensor, "float32")), spec_of("hidden", tensor, "float32"))
    assert torch.equal(back, tensor.detach())
    assert not back.requires_grad


def test_masks_and_positions_narrow_to_their_wire_dtypes():
    kept = torch.tensor([[True, False]])
    assert bytes(to_frame(kept, "uint8")) == b"\x01\x00"
    assert bytes(to_frame(torch.tensor([[3, 4]]), "int32")) == b"\x03\0\0\0\x04\0\0\0"


def test_a_writable_buffer_is_shared():
    buffer = bytearray(8)
    tensor = from_frame(buffer, spec_of("hidden", torch.zeros(2), "float32"))
    tensor[1] = 1.0
    assert buffer.hex() == "000000000000803f"


def test_a_read_only_buffer_is_copied_and_does_not_warn():
    buffer = bytes(8)
    tensor = from_frame(memoryview(buffer), spec_of("hidden", torch.zeros(2), "float32"))
    tensor += 1.0
    assert buffer == bytes(8)


def test_a_misaligned_buffer_gives_an_aligned_tensor():
    whole = bytearray(b"\xff" + bytes(to_frame(torch.tensor([1.0, 2.0]), "float32")))
    tensor = from_frame(memoryview(whole)[1:], spec_of("hidden", torch.zeros(2), "float32"))
    assert tensor.tolist() == [1.0, 2.0]
    assert tensor.data_ptr() % 4 == 0


def test_a_frame_of_another_length_is_refused():
    with pytest.raises(WireError, match="has 7 bytes"):
        from_frame(bytes(7), spec_of("hidden", torch.zeros(2), "float32"))


@pytest.mark.parametrize("dtype", FLOATS)
def test_integers_do_not_pass_for_activations(dtype):
    with pytest.raises(InternalError):
        to_frame(torch.tensor([1, 2]), dtype)


def test_floats_do_not_pass_for_masks_and_complex_numbers_for_nothing():
    with pytest.raises(InternalError):
        to_frame(torch.tensor([1.0]), "uint8")
    with pytest.raises(InternalError):
        to_frame(torch.tensor([1j]), "float32")


def test_dtypes_that_the_wire_does_not_carry_are_named():
    assert dtype_name(torch.bfloat16) == "bfloat16"
    with pytest.raises(InternalError, match="float64"):
        dtype_name(torch.float64)
