"""Step 5 of the journey: a tensor becomes raw little-endian bytes, and bytes become a tensor, without a copy.

A frame has no structure of its own: `TensorSpec` in the header says what it is. numpy lends the byte order and the
buffer protocol; bfloat16, which numpy does not know, travels as the 16-bit integers that it is made of.

When memory is shared:

- `to_frame` of a contiguous CPU tensor that already has the wire dtype shares the tensor's memory. Nobody may write to
  that tensor until the answer has come, or a retry would not carry the same bytes.
- `from_frame` of a writable, aligned buffer (every frame received from a socket is one's own, and large ones are
  aligned) shares the buffer. A read-only or misaligned buffer is copied once: torch has no read-only tensors.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
import torch

from splitfl.errors import InternalError, WireError
from splitfl.wire import coding
from splitfl.wire.messages import BYTES_PER_ELEMENT, DtypeName, TensorName, TensorSpec

Frame: TypeAlias = bytes | bytearray | memoryview
"""One frame of a message, as bytes."""

TORCH_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int32": torch.int32,
    "uint8": torch.uint8,
}
_DTYPE_NAMES: dict[torch.dtype, DtypeName] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int32: "int32",
    torch.uint8: "uint8",
}
# Element width in bytes -> (the integer that stands for it in torch, the same little-endian in numpy).
_CARRIER: dict[int, tuple[torch.dtype, str]] = {
    1: (torch.uint8, "u1"),
    2: (torch.int16, "<i2"),
    4: (torch.int32, "<i4"),
}


def dtype_name(dtype: torch.dtype) -> DtypeName:
    """The wire's name of `dtype`.

    Raises:
        InternalError: the wire does not carry this dtype.
    """
    if dtype not in _DTYPE_NAMES:
        raise InternalError(f"A tensor of {dtype} was given to the wire.", expected=", ".join(TORCH_DTYPES))
    return _DTYPE_NAMES[dtype]


def spec_of(name: TensorName, tensor: torch.Tensor, dtype: DtypeName) -> TensorSpec:
    """What the header says about `tensor` when it travels as `dtype`."""
    return TensorSpec(name=name, dtype=dtype, shape=tuple(int(n) for n in tensor.shape))


def frame_bytes(spec: TensorSpec) -> int:
    """Length in bytes of the frame that `spec` describes."""
    if spec.coding != "raw":
        return coding.coded_bytes(spec.coding, spec.shape, spec.kept)
    return math.prod(spec.shape) * BYTES_PER_ELEMENT[spec.dtype]


def nbytes(frame: Frame) -> int:
    """Length of `frame` in bytes."""
    return frame.nbytes if isinstance(frame, memoryview) else len(frame)


def to_frame(tensor: torch.Tensor, dtype: DtypeName) -> memoryview:
    """The bytes of `tensor` as they cross: contiguous, little-endian, in CPU memory.

    Args:
        tensor: any shape, any device. Floats convert to a float wire dtype, integers and bools to an integer one.
        dtype: the wire dtype.

    Returns:
        A flat view of ``tensor.numel() * itemsize`` bytes. It shares the tensor's memory when that is already
        contiguous, on the CPU and of that dtype.

    Raises:
        InternalError: a float tensor for an integer frame, or the reverse.
    """
    target = TORCH_DTYPES[dtype]
    if tensor.is_complex() or tensor.is_floating_point() != target.is_floating_point:
        raise InternalError(f"A tensor of {tensor.dtype} was to be sent as {dtype}.")
    carrier, little_endian = _CARRIER[target.itemsize]
    flat = tensor.detach().to(device="cpu", dtype=target).contiguous().reshape(-1)
    array = flat.view(carrier).numpy().astype(little_endian, copy=False)
    return array.view(np.uint8).data


def from_frame(buffer: Frame, spec: TensorSpec) -> torch.Tensor:
    """The tensor in `buffer`, which `frames.decode` has already checked against `spec`.

    Args:
        buffer: the frame; exactly `frame_bytes(spec)` long.
        spec: dtype and shape.

    Returns:
        A CPU tensor of ``spec.shape`` and ``spec.dtype``, float32 if it was coded; it shares a writable, aligned
        buffer's memory.

    Raises:
        WireError: the length of the frame is not what `spec` says.
    """
    target = TORCH_DTYPES[spec.dtype]
    _, little_endian = _CARRIER[target.itemsize]
    if nbytes(buffer) != frame_bytes(spec):
        raise WireError(
            f"The frame of {spec.name!r} has {nbytes(buffer)} bytes.", expected=f"{frame_bytes(spec)} bytes"
        )
    if spec.coding != "raw":
        return coding.decode(buffer, coding=spec.coding, shape=spec.shape, step=spec.step, kept=spec.kept)
    array: np.ndarray[Any, Any] = np.frombuffer(buffer, dtype=little_endian)
    native = array.dtype.newbyteorder("=")
    shared = array.flags.writeable and array.flags.aligned and array.dtype == native
    usable = array if shared else array.astype(native, copy=True)
    return torch.from_numpy(usable).view(target).reshape(spec.shape)
