"""What peers say: out and in again, and everything that is refused before it is believed."""

from __future__ import annotations

import contextlib

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitfl.wire import mesh_messages as say
from splitfl.wire.frames import Malformed

HELLO = say.Hello(number=1, version=say.MESH_VERSION, model="m", layout="l", tags=("hate", "nsfw.v2"))
HAVE = say.Have(number=2, round=3, rows=40, part="B", values=5)
FLOATS = torch.linspace(-1, 1, 5)
ASKS = [HELLO, say.AskSketch(number=2), say.Want(number=3, round=4, part="all"), say.Finished(number=5)]
REPLIES = [
    say.Welcome(number=1, version=1, model="m", layout="l"),
    say.NoSketch(number=1),
    say.NotYet(number=1, round=0),
    say.Noted(number=1),
    say.Refused(number=1, code="policy", problem="no"),
]


@pytest.mark.parametrize("ask", ASKS, ids=say.kind)
def test_a_question_comes_back_as_it_was(ask):
    assert say.decode_ask(say.encode(ask)) == ask
    with pytest.raises(Malformed, match="no message"):
        say.decode_reply(say.encode(ask), expected_values=5) if say.kind(ask) != "hello" else say.decode_reply(
            [msgspec.msgpack.encode({"type": "hello"})], expected_values=5
        )


@pytest.mark.parametrize("reply", REPLIES, ids=say.kind)
def test_an_answer_comes_back_as_it_was(reply):
    assert say.decode_reply(say.encode(reply), expected_values=5) == reply
    with pytest.raises(Malformed, match=r"frames (came|behind)"):
        say.decode_reply(say.encode(reply, b"more"), expected_values=5)


def test_numbers_come_back_as_they_were():
    frames = say.encode(HAVE, say.frame_of_floats(FLOATS))
    assert say.decode_reply(frames, expected_values=5) == HAVE
    assert torch.equal(say.floats_of(frames[1]), FLOATS)
    values = np.array([1, -2, 2**31 - 1], dtype=np.int32)
    sketch = say.SketchIs(number=1, rows=9, grid=128, values=3)
    frames = say.encode(sketch, say.frame_of_integers(values))
    assert say.decode_reply(frames, expected_values=3) == sketch
    assert np.array_equal(say.integers_of(frames[1]), values)


BAD_REPLIES = {
    "no frame at all": [],
    "three frames": [b"", b"", b""],
    "empty header": [b""],
    "long header": [b"\0" * (say.MAX_HEADER_BYTES + 1)],
    "nesting": [b"\x91" * 5000],
    "another size than is expected": say.encode(
        say.Have(number=1, round=1, rows=1, part="all", values=2**40), b"\0" * 20
    ),
    "a frame too short": say.encode(HAVE, b"\0" * 19),
    "a frame too long": say.encode(HAVE, b"\0" * 24),
    "no frame of numbers": say.encode(HAVE),
    "no rows": say.encode(msgspec.structs.replace(HAVE, rows=0), b"\0" * 20),
    "a round below none": say.encode(msgspec.structs.replace(HAVE, round=-1), b"\0" * 20),
    "a huge round": say.encode(msgspec.structs.replace(HAVE, round=2**60), b"\0" * 20),
    "no grid": say.encode(say.SketchIs(number=1, rows=1, grid=0, values=5), b"\0" * 20),
    "a long text": say.encode(say.Refused(number=1, code="policy", problem="x" * 401)),
    "an unknown code": [msgspec.msgpack.encode({"type": "refused", "number": 1, "code": "x", "problem": "y"})],
    "an unknown field": [msgspec.msgpack.encode({"type": "noted", "number": 1, "more": 1})],
    "a name instead of a number": [msgspec.msgpack.encode({"type": "noted", "number": "1"})],
}


@pytest.mark.parametrize("frames", BAD_REPLIES.values(), ids=list(BAD_REPLIES))
def test_an_answer_that_is_none_is_refused(frames):
    with pytest.raises(Malformed) as refused:
        say.decode_reply(frames, expected_values=5)
    assert refused.value.expected


@pytest.mark.parametrize(
    "tags", [("a", "a"), tuple(map(str, range(17))), ("",), ("x" * 65,), ("new\nline",), ("-a",), ("é",)]
)
def test_tags_that_are_none_are_refused(tags):
    with pytest.raises(Malformed, match="tags"):
        say.decode_ask(say.encode(msgspec.structs.replace(HELLO, tags=tags)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(value):
    frame = say.frame_of_floats(torch.tensor([0.0, value]))
    with pytest.raises(Malformed, match="not finite"):
        say.floats_of(frame)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=200), max_size=3))
def test_bytes_of_any_kind_are_a_message_or_malformed(frames):
    for read in (say.decode_ask, lambda f: say.decode_reply(f, expected_values=5)):
        with contextlib.suppress(Malformed):
            assert say.kind(read(frames))
