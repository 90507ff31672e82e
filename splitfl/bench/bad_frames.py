"""Messages that no owner takes, one of each kind: what `splitfl bench hostile` and the tests refuse and measure."""

from __future__ import annotations

from typing import Any

import msgspec

from splitfl.wire.frames import MAX_HEADER_BYTES, Limits

WIDTH = 256
LIMITS = Limits(width=WIDTH, max_tokens=32_768, max_length=4096, wire_dtype="float32")
HUGE = 2**62


def _forward(shape: list[int], frame: bytes, **more: Any) -> list[bytes]:
    spec = {"name": "hidden", "dtype": "float32", "shape": shape, **more}
    return [msgspec.msgpack.encode({"type": "forward", "session": 1, "step": 1, "tensors": [spec]}), frame]


BAD_FRAMES: dict[str, list[bytes]] = {
    "random bytes": [b"\x93\x07\xff" * 20],
    "no map": [b"\xc0"],
    "nested lists": [b"\x91" * 2000],
    "a header too long": [bytes(MAX_HEADER_BYTES + 1)],
    "an unknown type": [msgspec.msgpack.encode({"type": "__import__", "session": 1})],
    "an unknown field": [msgspec.msgpack.encode({"type": "bye", "session": 1, "more": 1})],
    "a length that lies in msgpack": [b"\xdf\xff\xff\xff\xff" + b"\xa4type\xa3bye"],
    "a text that claims 4 GB": [b"\x81\xa4type\xdb\xff\xff\xff\xff" + b"bye"],
    "a shape of 4 exabytes": _forward([HUGE, 1, WIDTH], b"\0" * 64),
    "a shape whose product overflows": _forward([2**32, 2**32, WIDTH], b""),
    "a bomb: 32,768 tokens in 64 bytes": _forward([8, 4096, WIDTH], b"\0" * 64),
    "a coded bomb": _forward([8, 4096, WIDTH], b"\0" * 64, coding="int4"),
    "a frame too many": [*_forward([1, 1, WIDTH], bytes(4 * WIDTH)), b"more"],
    "a frame too short": _forward([1, 1, WIDTH], bytes(4 * WIDTH - 1)),
    "a width of another model": _forward([1, 1, WIDTH + 1], bytes(4 * WIDTH + 4)),
    "nine frames and more": [b""] * 12,
}
