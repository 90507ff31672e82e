"""One fuzzer input is one byte string: a target's number, then frames. And how such an input is changed with sense."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

MOST_FRAMES = 9
LONGEST = 4096
"""Bytes of an input."""
_WORD = 2  # bytes of a frame's length

# What lengths, counts and dimensions go wrong at.
_NUMBERS = (
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    127,
    128,
    255,
    256,
    2**15,
    2**16,
    2**31 - 1,
    2**32,
    2**53,
    2**63 - 1,
    2**64 - 1,
    -1,
    -(2**63),
)
_FLOATS = (0.0, -0.0, 1.0, 5e-324, 1e308, float("inf"), float("-inf"), float("nan"), 2.0**-60, 2.0**60, 0.3)
_TEXTS = (
    "",
    "raw",
    "int8",
    "int4",
    "grid16",
    "topk",
    "hidden",
    "mask",
    "float32",
    "hello",
    "x" * 1025,
    "\x1b[31m",
    "é",
    "../x",
)


def pack(target: int, frames: Sequence[bytes]) -> bytes:
    """The input for `target`: its number (one byte), then each frame behind its length; the last one without."""
    head = b"".join(len(frame).to_bytes(_WORD, "little") + frame for frame in frames[:-1])
    return bytes([target]) + head + (frames[-1] if frames else b"")


def unpack(data: bytes) -> tuple[int, list[bytes]]:
    """Any bytes as a target's number and at least one frame: no input is wasted."""
    target, rest, frames = (data[0] if data else 0), data[1:], list[bytes]()
    while len(frames) < MOST_FRAMES and len(rest) >= _WORD:
        length = int.from_bytes(rest[:_WORD], "little")
        if length > len(rest) - _WORD:
            break
        frames.append(rest[_WORD : _WORD + length])
        rest = rest[_WORD + length :]
    return target, [*frames, rest]


def change(data: bytes, draw: random.Random, otherwise: Callable[[bytes], bytes]) -> bytes:
    """`data` with one thing changed: a field of its header, a frame's length, the order of frames; or by `otherwise`.

    Plain changes of bytes seldom leave msgpack that decodes, and the checks behind the decoder are never reached.
    """
    target, frames = unpack(data)
    match draw.randrange(8):
        case 0 | 1 | 2 | 3:
            frames[0] = _with_another_field(frames[0], draw)
        case 4:
            place = draw.randrange(len(frames))
            frames[place] = _of_another_length(frames[place], draw)
        case 5 if len(frames) > 1:
            first, second = draw.sample(range(len(frames)), 2)
            frames[first], frames[second] = frames[second], frames[first]
        case 6:
            if len(frames) > 1 and draw.random() < 0.5:
                del frames[draw.randrange(len(frames))]
            else:
                frames.append(draw.randbytes(draw.choice((0, 1, 4, 32, 96))))
        case _:
            return otherwise(data)
    return pack(target, frames)


def _of_another_length(frame: bytes, draw: random.Random) -> bytes:
    if frame and draw.random() < 0.5:
        return frame[: draw.randrange(len(frame))]
    return frame + draw.randbytes(draw.choice((1, 2, 4, 16, 64)))


def _with_another_field(header: bytes, draw: random.Random) -> bytes:
    for codec in (msgspec.msgpack, msgspec.json):
        try:
            fields = codec.decode(header)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            continue
        if isinstance(fields, dict | list):
            try:
                return bytes(codec.encode(_changed(fields, draw)))
            except (msgspec.MsgspecError, OverflowError, TypeError, ValueError, RecursionError):
                return header
    return _of_another_length(header, draw)


def _changed(value: Any, draw: random.Random) -> Any:
    """`value` with one place in it changed."""
    if isinstance(value, dict) and value:
        name = draw.choice(list(value))
        other = dict(value)
        match draw.randrange(10):
            case 0:
                del other[name]
            case 1:
                other[draw.choice(_TEXTS)] = other[name]
            case _:
                other[name] = _changed(value[name], draw)
        return other
    if isinstance(value, list) and value:
        place, other_list = draw.randrange(len(value)), list(value)
        match draw.randrange(6):
            case 0:
                del other_list[place]
            case 1:
                other_list.append(other_list[place])
            case _:
                other_list[place] = _changed(value[place], draw)
        return other_list
    return _scalar(value, draw)


def _scalar(value: Any, draw: random.Random) -> Any:
    if draw.random() < 0.15:
        return draw.choice((None, True, [], {}, b"", 0, "", 1.5, [[[]]]))
    match value:
        case bool():
            return not value
        case int():
            return draw.choice((*_NUMBERS, value + 1, max(value - 1, 0), value * 2))
        case float():
            return draw.choice(_FLOATS)
        case str():
            return draw.choice((*_TEXTS, value + "x", value[:-1], value.upper()))
        case bytes():
            return _of_another_length(value, draw)
    return draw.choice(_NUMBERS)
