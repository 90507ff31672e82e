"""Frames that are no message, and messages whose sizes are not what they say."""

from __future__ import annotations

import random

import msgspec
import pytest
import torch
import zmq

from splitfl.wire.frames import MAX_HEADER_BYTES
from splitfl.wire.messages import WIRE_VERSION as NOW
from splitfl.wire.messages import BackwardDone, Bye, Closed, ForwardDone, Refused, Welcome
from tests.hostile.attacker import PATIENCE_S, attacker, pack

HUGE = 2**62


def noise(size, seed=0):
    return random.Random(seed).randbytes(size)


GARBAGE = {
    "nothing in one frame": [b""],
    "one byte": [b"\xc1"],
    "noise": [noise(100)],
    "much noise": [noise(60_000, 1)],
    "ten frames": [noise(10)] * 10,
    "a thousand frames": [b"x"] * 1000,
    "noise behind an empty header": [b"", noise(100)],
    "deep nesting": [b"\x91" * 60_000],
    "deep nesting of maps": [b"\x81\xa1a" * 20_000],
    "a list of four thousand million": [b"\xdd\xff\xff\xff\xff"],
    "a map of four thousand million": [b"\xdf\xff\xff\xff\xff" + b"\xa1a\x00" * 10],
    "a text of four thousand million bytes": [b"\xdb\xff\xff\xff\xff" + b"a" * 100],
    "a text that is no UTF-8": [b"\x82\xa4type\xa5hello\xa7session\xa2\xff\xfe"],
    "an extension type": [b"\xc7\x04\x2a" + b"code"],
    "a number": [msgspec.msgpack.encode(7)],
    "a kind that does not exist": [pack(type="give_me_the_weights", session=1)],
    "a kind that is a path": [pack(type="../../etc/passwd", session=1)],
    "a field that does not exist": [pack(type="bye", session=1, force=True)],
    "a missing field": [pack(type="forward", session=1)],
    "a session that is a text": [pack(type="bye", session="1")],
    "a session that is a float": [pack(type="bye", session=1.5)],
    "a negative session": [pack(type="bye", session=-1)],
    "a session of 64 bits": [pack(type="bye", session=2**64 - 1)],
    "a negative step": [pack(type="backward", session=1, step=-3)],
    "negative rows": [pack(type="release", session=1, caches=[-1], steps=[])],
    "a dtype that does not exist": [pack(type="hello", session=1, version=NOW, protocol="split", trunk="", plan="",
                                         wire_dtype="object")],
    "an integer dtype": [pack(type="hello", session=1, version=NOW, protocol="split", trunk="", plan="",
                              wire_dtype="uint8")],
    "a header without its tensors": [pack(type="forward", session=1, step=1, tensors=[
        {"name": "hidden", "dtype": "float32", "shape": [1, 1, 32]}])],
}  # fmt: skip

OTHERS = {
    "a header that is too long": ([b"\x00" * (MAX_HEADER_BYTES + 1)], "too_large"),
    "a text that is too long": (
        [pack(type="hello", session=1, version=NOW, protocol="p" * 2000, trunk="", plan="", wire_dtype="float32")],
        "too_large",
    ),
    "another version": ([pack(type="hello", session=1, version=999, more="to come")], "version"),
    "version zero": (
        [pack(type="hello", session=1, version=0, protocol="split", trunk="", plan="", wire_dtype="float32")],
        "version",
    ),
    "another protocol": (
        [
            pack(
                type="hello",
                session=1,
                version=NOW,
                protocol="\x1b[31mos.system",
                trunk="",
                plan="",
                wire_dtype="float32",
            )
        ],
        "protocol",
    ),
    "another plan": (
        [pack(type="hello", session=1, version=NOW, protocol="split", trunk="\u202e", plan="x", wire_dtype="float32")],
        "plan",
    ),
}


def test_garbage_is_answered_and_nothing_else_happens(foe):
    for name, frames in GARBAGE.items():
        foe.send(*frames)
        refused = foe.answer()
        assert isinstance(refused, Refused), name
        assert refused.code == "malformed", (name, refused)


def test_what_can_be_named_is_named(foe):
    for name, (frames, code) in OTHERS.items():
        foe.send(*frames)
        refused = foe.answer()
        assert isinstance(refused, Refused), name
        assert refused.code == code, (name, refused)
        assert refused.problem.isprintable(), name


def test_noise_of_every_length_is_answered(foe):
    for seed in range(300):
        foe.send(*(noise(length, seed) for length in random.Random(seed).choices(range(200), k=1 + seed % 9)))
        foe.refused("malformed")


def test_messages_of_the_owner_are_not_taken_from_a_party(foe):
    foe.opened()
    result = torch.zeros(1, 1, foe.plan.width)
    foe.say(Welcome(session=foe.number, version=NOW, max_tokens=9, max_length=9, memory="keep", lease_s=9.0, server=""))
    foe.say(ForwardDone(session=foe.number, step=1), hidden=result)
    foe.say(BackwardDone(session=foe.number, step=1), gradient=result)
    foe.say(Refused(session=foe.number, code="busy", problem="no"))
    foe.say(Closed(session=foe.number))
    for _ in range(5):
        foe.refused("malformed")
    foe.forward(1, result)
    foe.result()


SHAPES = {
    "a shorter frame": ([1, 2, 32], 4 * 63, "malformed"),
    "a longer frame": ([1, 2, 32], 4 * 65, "malformed"),
    "an empty frame": ([1, 2, 32], 0, "malformed"),
    "no rows": ([0, 2, 32], 0, "malformed"),
    "no positions": ([1, 0, 32], 0, "malformed"),
    "negative rows": ([-1, 2, 32], 256, "malformed"),
    "two negative dimensions": ([-1, -2, 32], 256, "malformed"),
    "a huge dimension": ([HUGE, 1, 32], 128, "too_large"),
    "dimensions whose product overflows to zero": ([2**32, 2**32, 32], 0, "too_large"),
    "dimensions whose product overflows to the truth": ([2**62 + 1, 4, 32], 512, "too_large"),
    "a dimension of 64 bits": ([2**64 - 1, 1, 32], 128, "too_large"),
    "another width": ([1, 2, 31], 4 * 62, "malformed"),
    "a huge width": ([1, 1, HUGE], 128, "malformed"),
    "two dimensions": ([2, 32], 256, "malformed"),
    "four dimensions": ([1, 1, 2, 32], 256, "malformed"),
    "no dimensions": ([], 4, "malformed"),
    "a thousand dimensions": ([1] * 1000, 4, "malformed"),
    "a dimension that is a text": (["1", 2, 32], 256, "malformed"),
    "a dimension that is a float": ([1.0, 2.5, 32], 256, "malformed"),
    "one position too many": ([1, 129, 32], 4 * 129 * 32, "too_large"),
    "one row too many": ([513, 1, 32], 128, "too_large"),
}


def test_a_shape_that_lies_is_refused_before_a_byte_is_read(foe):
    foe.opened()
    for name, (shape, size, code) in SHAPES.items():
        spec = {"name": "hidden", "dtype": "float32", "shape": shape}
        foe.send(pack(type="forward", session=foe.number, step=1, tensors=[spec]), b"\x00" * size)
        refused = foe.refused("malformed", "too_large")
        assert refused.code == code, (name, refused)
    foe.forward(1, torch.zeros(1, 2, foe.plan.width))
    foe.result()


def _spec(name="hidden", dtype="float32", shape=(1, 2, 32)):
    return {"name": name, "dtype": dtype, "shape": list(shape)}


HIDDEN, MASK, POSITIONS = bytes(256), bytes(2), bytes(8)
TENSORS = {
    "a narrower dtype": ([_spec(dtype="float16")], [bytes(128)]),
    "an integer dtype": ([_spec(dtype="int32")], [HIDDEN]),
    "a dtype that does not exist": ([_spec(dtype="complex64")], [HIDDEN]),
    "no hidden state": ([], []),
    "only a mask": ([_spec("mask", "uint8", (1, 2))], [MASK]),
    "a gradient instead": ([_spec("gradient")], [HIDDEN]),
    "a gradient besides": ([_spec(), _spec("gradient")], [HIDDEN, HIDDEN]),
    "hidden twice": ([_spec(), _spec()], [HIDDEN, HIDDEN]),
    "labels": ([_spec(), _spec("labels", "int32", (1, 2))], [HIDDEN, POSITIONS]),
    "a mask of floats": ([_spec(), _spec("mask", "float32", (1, 2))], [HIDDEN, bytes(8)]),
    "a mask of more rows": ([_spec(), _spec("mask", "uint8", (2, 2))], [HIDDEN, bytes(4)]),
    "a mask that is too short": ([_spec(), _spec("mask", "uint8", (1, 1))], [HIDDEN, bytes(1)]),
    "a prepared mask": ([_spec(), _spec("mask", "uint8", (1, 1, 2, 2))], [HIDDEN, bytes(4)]),
    "positions of more rows": ([_spec(), _spec("positions", "int32", (3, 2))], [HIDDEN, bytes(24)]),
    "positions that are too many": ([_spec(), _spec("positions", "int32", (1, 3))], [HIDDEN, bytes(12)]),
    "a frame too many": ([_spec()], [HIDDEN, HIDDEN]),
    "a frame too few": ([_spec(), _spec("mask", "uint8", (1, 2))], [HIDDEN]),
    "frames in another order": ([_spec(), _spec("mask", "uint8", (1, 2))], [MASK, HIDDEN]),
}


def test_a_tensor_that_does_not_belong_is_refused(foe):
    foe.opened()
    for name, (specs, frames) in TENSORS.items():
        foe.send(pack(type="forward", session=foe.number, step=1, tensors=specs), *frames)
        refused = foe.answer()
        assert isinstance(refused, Refused), name
        # What the protocol's disclosure does not list may be refused for that reason as well.
        assert refused.code in ("malformed", "not_disclosed"), (name, refused)
    foe.forward(1, torch.zeros(1, 2, foe.plan.width))
    foe.result()


@pytest.mark.parametrize("what", ["tensor", "header"])
def test_a_frame_beyond_the_largest_message_cuts_only_its_own_link(besieged, owner, what):
    most = 512 * 32 * 4 + 64
    with attacker(owner) as foe:
        foe.opened()
        news = foe.link.get_monitor_socket(zmq.Event.DISCONNECTED)
        frame = bytes(most + 1)
        foe.send(*((frame,) if what == "header" else (pack(type="bye", session=foe.number), frame)))
        assert news.poll(PATIENCE_S * 1000), "the link was not cut"
        assert foe.receive(0) is None
        foe.link.disable_monitor()
        news.close(0)
    with attacker(owner) as again:
        again.opened().say(Bye(session=again.number))
        assert isinstance(again.answer(), Closed)
