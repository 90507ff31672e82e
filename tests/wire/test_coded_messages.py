"""Coded tensors in messages: which headers are refused before a byte is read, and what a conversation is held to."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import msgspec
import pytest
import torch
from hypothesis import given, settings

from splitfl.wire.codecs import frame_bytes
from splitfl.wire.coding import CODINGS, Coded, encode_grid16, encode_int4, encode_topk
from splitfl.wire.frames import Limits, Malformed, check_frames, decode, describe, encode, open_header, tensors_of
from splitfl.wire.messages import Backward, BackwardDone, Forward, ForwardDone, TensorSpec
from splitfl.wire.session import NotAllowed
from tests.wire.layouts import encoded, int_codes
from tests.wire.samples import SESSION, WELCOME
from tests.wire.talk import EVERYTHING, ROLES, TERMS, say

LIMITS = {
    name: Limits(
        width=5, max_tokens=24, max_length=8, wire_dtype="bfloat16", hidden_coding=name, gradient_coding=name
    )
    for name in (*sorted(CODINGS), "raw")
}  # fmt: skip
X = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(4))
FORWARD, BACKWARD = Forward(session=SESSION, step=1), Backward(session=SESSION, step=1)


@pytest.mark.parametrize("name", sorted(CODINGS))
def test_a_coded_tensor_survives_the_round_trip(name):
    coded = encoded(name, X)
    for message, tensor in ((FORWARD, "hidden"), (BACKWARD, "gradient")):
        frames = encode(message, {tensor: coded}, "bfloat16")
        assert bytes(frames[1]) == bytes(coded.payload.tolist())
        came = decode(frames, sender="party", limits=LIMITS[name])
        assert came == describe(message, {tensor: coded}, "bfloat16")
        (spec,) = came.tensors
        assert (spec.coding, spec.step, spec.kept) == (name, coded.step, coded.kept)
        assert (spec.dtype, spec.shape) == ("bfloat16", (2, 3, 5))
        assert torch.equal(tensors_of(came, frames)[tensor], coded.decode())


class Announced:
    """A frame that has a length and no bytes: whoever reads it fails."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length


def refuse(name, *, message="forward", length=None, limits=None, **fields):
    """The code with which a frame of `name` with a header like this is refused; its bytes are not touched."""
    tensor = "hidden" if message == "forward" else "gradient"
    spec = {"name": tensor, "dtype": "bfloat16", "shape": (2, 3, 5), "coding": name}
    spec |= {"step": 1.0} if name == "grid16" else {"kept": 2} if name == "topk" else {}
    spec |= fields
    size = frame_bytes(TensorSpec(**(spec | {"step": 0.0}))) if length is None else length
    header = msgspec.msgpack.encode({"type": message, "session": 1, "step": 0, "tensors": [spec]})
    frame = Announced(size if 0 <= size < 2**40 else 16)
    with pytest.raises(Malformed) as caught:
        decode([header, frame], sender="party", limits=limits or LIMITS[name])
    return caught.value.code


SIZES = {"grid16": 60, "int8": 54, "int4": 42, "topk": 48}  # of [2, 3, 5], two kept


@pytest.mark.parametrize("message", ["forward", "backward"])
@pytest.mark.parametrize("agreed", sorted(LIMITS))
def test_another_coding_than_the_agreed_one_is_refused(agreed, message):
    for name in LIMITS:
        if name != agreed:
            assert refuse(name, message=message, limits=LIMITS[agreed]) == "malformed"


@pytest.mark.parametrize(
    "step",
    [
        0.0,
        -0.0,
        -1.0,
        -0.5,
        3.0,
        0.3,
        1 + 2**-52,
        math.nan,
        math.inf,
        -math.inf,
        1e300,
        1e-300,
        5e-324,
        2.0**61,
        2.0**-61,
    ],
)
def test_a_step_that_is_no_sound_power_of_two_is_refused(step):
    assert refuse("grid16", step=step) == "malformed"


@pytest.mark.parametrize("exponent", [-60, -1, 0, 60])
def test_every_power_of_two_between_is_taken(exponent):
    frames = encode(FORWARD, {"hidden": encode_grid16(int_codes(X), 2.0**exponent)}, "bfloat16")
    message = decode(frames, sender="party", limits=LIMITS["grid16"])
    assert message.tensors[0].step == 2.0**exponent


@pytest.mark.parametrize("kept", [0, -1, 6, 65_536, 65_537, 2**40, 2**63, 2**64 - 1])
def test_a_number_kept_that_the_cut_does_not_have_is_refused(kept):
    assert refuse("topk", kept=kept, length=48) == "malformed"


def test_a_number_kept_that_no_column_can_name_is_refused():
    wide = Limits(width=70_000, max_tokens=24, max_length=8, wire_dtype="bfloat16", hidden_coding="topk")
    assert refuse("topk", shape=(1, 1, 70_000), kept=65_537, length=4 * 65_537, limits=wide) == "malformed"


STRANGE = [{"step": 1.0}, {"step": math.nan}, {"step": -1.0}, {"kept": 1}, {"kept": 5}]


@pytest.mark.parametrize(
    ("name", "field"),
    [(n, f) for n in sorted(LIMITS) for f in STRANGE if (n, *f) not in {("grid16", "step"), ("topk", "kept")}],
)
def test_a_field_of_another_coding_is_refused(name, field):
    assert refuse(name, **field) == "malformed"


@pytest.mark.parametrize("name", sorted(SIZES))
def test_a_length_that_is_off_by_a_byte_is_refused(name):
    for length in (0, SIZES[name] - 1, SIZES[name] + 1, 2 * SIZES[name], 60 if name != "grid16" else 120):
        assert refuse(name, length=length) == "malformed"


def test_the_length_of_int4_rounds_up_a_token_and_not_a_frame():
    """Three bytes for each of six tokens, not 15 for all of them; and never two."""
    for length in (24 + 15, 24 + 12):
        assert refuse("int4", length=length) == "malformed"
    frames = encode(FORWARD, {"hidden": encode_int4(X)}, "bfloat16")
    assert len(frames[1]) == 24 + 18
    decode(frames, sender="party", limits=LIMITS["int4"])


@pytest.mark.parametrize("name", sorted(SIZES))
@pytest.mark.parametrize(
    ("shape", "code"),
    [((2, 3, 6), "malformed"), ((2, 3), "malformed"), ((0, 3, 5), "malformed"), ((-2, -3, 5), "malformed"),
     ((1, 9, 5), "too_large"), ((5, 5, 5), "too_large"), ((2**62, 2**62, 5), "too_large")],
)  # fmt: skip
def test_a_shape_that_lies_is_refused(name, shape, code):
    assert refuse(name, shape=shape, length=SIZES[name]) == code


@pytest.mark.parametrize(
    "field",
    [{"coding": "zstd"}, {"coding": ""}, {"coding": 3}, {"step": "1"}, {"step": None}, {"kept": 1.5}, {"kept": True},
     {"codebook": [1]}, {"dtype": "float32"}, {"dtype": "uint8"}],
)  # fmt: skip
def test_fields_of_other_types_are_refused(field):
    assert refuse("int8", length=54, **field) == "malformed"


@pytest.mark.parametrize("name", sorted(SIZES))
def test_a_mask_is_never_coded(name):
    mask = {"name": "mask", "dtype": "uint8", "shape": (2, 3), "coding": name, "kept": 2 * (name == "topk")}
    hidden = {"name": "hidden", "dtype": "bfloat16", "shape": (2, 3, 5)}
    header = msgspec.msgpack.encode({"type": "forward", "session": 1, "step": 0, "tensors": [hidden, mask]})
    with pytest.raises(Malformed, match="'mask'"):
        decode([header, bytes(60), bytes(6)], sender="party", limits=LIMITS["raw"])


def test_columns_are_looked_at_after_the_sizes_only_and_refused_with_a_code():
    coded = encode_topk(X, 2)
    bad = Coded(coding="topk", shape=coded.shape, payload=torch.full_like(coded.payload, 0x80), kept=2)
    frames = encode(FORWARD, {"hidden": bad}, "bfloat16")
    message = decode(frames, sender="party", limits=LIMITS["topk"])
    with pytest.raises(Malformed, match="column") as caught:
        tensors_of(message, frames)
    assert caught.value.code == "malformed"


@pytest.mark.parametrize("name", sorted(CODINGS))
@pytest.mark.parametrize(("message", "tensor"), [(ForwardDone, "hidden"), (BackwardDone, "gradient")])
def test_what_the_owner_sends_is_never_coded(name, message, tensor):
    """Not even as the party's own frames are."""
    coded = encode(message(session=SESSION, step=1), {tensor: encoded(name, X)}, "bfloat16")
    opened = open_header(coded, sender="owner")
    with pytest.raises(Malformed, match="coded") as caught:
        check_frames(opened, coded, LIMITS[name])
    assert caught.value.code == "malformed"
    raw = encode(message(session=SESSION, step=1), {tensor: X}, "bfloat16")
    assert decode(raw, sender="owner", limits=LIMITS[name]).tensors[0].coding == "raw"


def verdict(agreed, frames):
    """The code of the refusal, or the message."""
    try:
        return decode(frames, sender="party", limits=LIMITS[agreed])
    except Malformed as refused:
        return refused.code


FIELDS = {
    "coding": st.sampled_from([*sorted(LIMITS), "gzip"]),
    "step": st.one_of(st.floats(), st.integers(-70, 70).map(lambda e: 2.0**e), st.integers(-2, 2)),
    "kept": st.one_of(st.integers(-2, 7), st.integers(-(2**63), 2**64 - 1)),
    "shape": st.lists(st.one_of(st.integers(0, 6), st.just(5), st.just(2**62)), min_size=2, max_size=4),
}


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(sorted(LIMITS)),
    st.fixed_dictionaries({}, optional=FIELDS),
    st.one_of(st.sampled_from([*SIZES.values(), 59, 61]), st.integers(0, 130)),
)
def test_headers_that_lie_end_in_a_message_or_a_coded_refusal(agreed, fields, length):
    spec = {"name": "hidden", "dtype": "bfloat16", "shape": [2, 3, 5], "coding": agreed} | fields
    frames = [msgspec.msgpack.encode({"type": "forward", "session": 1, "step": 0, "tensors": [spec]}), bytes(length)]
    came = verdict(agreed, frames)
    if isinstance(came, str):
        assert came in ("malformed", "too_large")
    else:
        (described,) = came.tensors
        assert described.coding == agreed
        assert frame_bytes(described) == length
        assert tensors_of(came, frames)["hidden"].shape == described.shape


# ---- in a conversation


@pytest.mark.parametrize("role", ["party", "owner"])
@pytest.mark.parametrize("field", ["hidden_coding", "gradient_coding"])
def test_a_hello_retold_with_another_coding_is_refused(role, field):
    session = ROLES[role](TERMS, EVERYTHING)
    say(session, TERMS.hello(), WELCOME)
    before = session.state
    for name in sorted(CODINGS):
        with pytest.raises(NotAllowed, match="coding") as caught:
            say(session, msgspec.structs.replace(TERMS.hello(), **{field: name}))
        assert caught.value.code == "out_of_order"
        assert session.state is before
    say(session, TERMS.hello())
    assert session.terms.hello() == TERMS.hello()


def test_a_hello_states_both_codings_each_in_its_place():
    terms = msgspec.structs.replace(TERMS.hello(), hidden_coding="grid16", gradient_coding="int4")
    came = decode([msgspec.msgpack.encode(terms)], sender="party", limits=LIMITS["raw"])
    assert (came.hidden_coding, came.gradient_coding) == ("grid16", "int4")
    plain = msgspec.to_builtins(TERMS.hello())
    del plain["hidden_coding"], plain["gradient_coding"]  # a party of before there were any
    came = decode([msgspec.msgpack.encode(plain)], sender="party", limits=LIMITS["raw"])
    assert (came.hidden_coding, came.gradient_coding) == ("raw", "raw")
    for field in ("hidden_coding", "gradient_coding"):
        with pytest.raises(Malformed):
            decode(
                [msgspec.msgpack.encode(msgspec.to_builtins(TERMS.hello()) | {field: "pickle"})],
                sender="party",
                limits=LIMITS["raw"],
            )
