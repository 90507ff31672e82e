import resource
import sys
import tracemalloc

import hypothesis.strategies as st
import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from splitfl.errors import InternalError, WireError
from splitfl.wire.frames import (
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    MAX_TEXT_BYTES,
    Limits,
    Malformed,
    decode,
    describe,
    encode,
    open_header,
    tensors_of,
)
from splitfl.wire.messages import (
    REFUSAL_CODES,
    WIRE_VERSION,
    Backward,
    Bye,
    Forward,
    Release,
    TensorSpec,
)
from tests.wire.samples import FROM_OWNER, FROM_PARTY, HELLO, LIMITS, SESSION, WELCOME, hidden, mask

pack = msgspec.msgpack.encode


def code_of(frames, sender="party", limits=LIMITS):
    with pytest.raises(Malformed) as caught:
        decode(frames, sender=sender, limits=limits)
    assert caught.value.code in REFUSAL_CODES
    return caught.value.code


def forward_frames(*specs, payloads=None, **fields):
    """Frames of a forward whose header says exactly `specs`; the payloads fit them unless given."""
    message = Forward(session=SESSION, step=0, tensors=tuple(TensorSpec(**s) for s in specs), **fields)
    return [pack(message), *(payloads if payloads is not None else (bytes(fitting(s)) for s in specs))]


def fitting(spec):
    size = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4, "uint8": 1}[spec["dtype"]]
    for n in spec["shape"]:
        size *= n
    return size if 0 <= size < 10_000 else 16


HIDDEN = {"name": "hidden", "dtype": "float32", "shape": (2, 3, 4)}
MASK = {"name": "mask", "dtype": "uint8", "shape": (2, 3)}
POSITIONS = {"name": "positions", "dtype": "int32", "shape": (1, 3)}


@pytest.mark.parametrize(
    ("sender", "message", "tensors"), [("party", *e) for e in FROM_PARTY] + [("owner", *e) for e in FROM_OWNER]
)
def test_every_message_survives_the_round_trip(sender, message, tensors):
    frames = encode(message, tensors)
    came = decode(frames, sender=sender, limits=LIMITS)
    assert came == describe(message, tensors)
    back = tensors_of(came, frames)
    assert list(back) == list(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(back[name].to(tensor.dtype), tensor)


def test_the_other_side_cannot_say_it():
    """Neither side can send what only the other may say."""
    for message, tensors in FROM_PARTY:
        assert code_of(encode(message, tensors), sender="owner") == "malformed"
    for message, tensors in FROM_OWNER:
        assert code_of(encode(message, tensors), sender="party") == "malformed"


def test_encode_writes_the_wire_dtype_that_it_is_told():
    frames = encode(Forward(session=SESSION, step=0), {"hidden": hidden()}, "bfloat16")
    limits = Limits(width=4, max_tokens=24, max_length=8, wire_dtype="bfloat16")
    message = decode(frames, sender="party", limits=limits)
    assert message.tensors[0].dtype == "bfloat16"
    assert len(frames[1]) == 2 * 3 * 4 * 2
    assert code_of(frames) == "malformed"  # where float32 was agreed


def test_a_message_described_for_other_tensors_is_not_sent():
    described = describe(Forward(session=SESSION, step=0), {"hidden": hidden()})
    with pytest.raises(InternalError):
        encode(described, {"hidden": hidden(), "mask": mask()})
    with pytest.raises(InternalError):
        encode(described, {"hidden": hidden(rows=1)})


def test_the_same_message_has_the_same_bytes():
    first, second = (encode(*FROM_PARTY[3]) for _ in range(2))
    assert [bytes(f) for f in first] == [bytes(f) for f in second]


SPECS = {
    # what is wrong: (specs, payloads or None, code)
    "no hidden": ((MASK,), None, "malformed"),
    "a gradient in a forward": (({**HIDDEN, "name": "gradient"},), None, "malformed"),
    "hidden twice": ((HIDDEN, HIDDEN), None, "malformed"),
    "too few frames": ((HIDDEN, MASK), [bytes(96)], "malformed"),
    "too many frames": ((HIDDEN,), [bytes(96), bytes(6)], "malformed"),
    "another float dtype": (({**HIDDEN, "dtype": "bfloat16"},), None, "malformed"),
    "integers for activations": (({**HIDDEN, "dtype": "int32"},), None, "malformed"),
    "a float mask": ((HIDDEN, {**MASK, "dtype": "float32"}), None, "malformed"),
    "byte positions": ((HIDDEN, {**POSITIONS, "dtype": "uint8"}), None, "malformed"),
    "rank 2": (({**HIDDEN, "shape": (6, 4)},), None, "malformed"),
    "rank 4": (({**HIDDEN, "shape": (1, 2, 3, 4)},), None, "malformed"),
    "rank 0": (({**HIDDEN, "shape": ()},), None, "malformed"),
    "a mask of rank 3": ((HIDDEN, {**MASK, "shape": (2, 3, 1)}), None, "malformed"),
    "no rows": (({**HIDDEN, "shape": (0, 3, 4)},), None, "malformed"),
    "no positions": (({**HIDDEN, "shape": (2, 0, 4)},), None, "malformed"),
    "negative rows, positive product": (({**HIDDEN, "shape": (-2, -3, 4)},), None, "malformed"),
    "negative mask": ((HIDDEN, {**MASK, "shape": (-2, -3)}), None, "malformed"),
    "another width": (({**HIDDEN, "shape": (2, 3, 5)},), None, "malformed"),
    "width 1, which would broadcast": (({**HIDDEN, "shape": (2, 3, 1)},), None, "malformed"),
    "too long": (({**HIDDEN, "shape": (1, 9, 4)},), None, "too_large"),
    "too many tokens": (({**HIDDEN, "shape": (5, 5, 4)},), None, "too_large"),
    "a mask of other rows": ((HIDDEN, {**MASK, "shape": (1, 3)}), None, "malformed"),
    "a mask too short": ((HIDDEN, {**MASK, "shape": (2, 2)}), None, "malformed"),
    "a mask too long": ((HIDDEN, {**MASK, "shape": (2, 9)}), None, "too_large"),
    "positions of other rows": ((HIDDEN, {**POSITIONS, "shape": (3, 3)}), None, "malformed"),
    "positions too long": ((HIDDEN, {**POSITIONS, "shape": (1, 4)}), None, "malformed"),
    "one byte short": ((HIDDEN,), [bytes(95)], "malformed"),
    "one byte more": ((HIDDEN,), [bytes(97)], "malformed"),
    "an empty frame": ((HIDDEN,), [b""], "malformed"),
    "a product beyond 64 bits": (({**HIDDEN, "shape": (2**62, 2**62, 4)},), [b""], "too_large"),
    "a product that wraps to 96 bytes": (({**HIDDEN, "shape": (2**60 + 2, 3, 4)},), [bytes(96)], "too_large"),
}


@pytest.mark.parametrize("name", SPECS)
def test_lies_about_tensors_are_refused(name):
    specs, payloads, code = SPECS[name]
    assert code_of(forward_frames(*specs, payloads=payloads)) == code


def test_the_limits_themselves_are_allowed():
    for rows, new in ((3, 8), (8, 3), (24, 1)):
        frames = encode(Forward(session=SESSION, step=0), {"hidden": hidden(rows, new), "mask": mask(rows, new)})
        decode(frames, sender="party", limits=LIMITS)
    decode(
        encode(Forward(session=SESSION, step=0, cache=1, past=7), {"hidden": hidden(3, 1), "mask": mask(3, 8)}),
        sender="party",
        limits=LIMITS,
    )


FIELDS = {
    "a cache that grows too long": ({"cache": 1, "past": 6}, "too_large"),
    "a cache of the longest sequence": ({"cache": 1, "past": 5}, None),
    "a past without a cache": ({"past": 1}, "malformed"),
    "rows without a cache": ({"rows": (0, 1)}, "malformed"),
    "no rows at all": ({"cache": 1, "rows": ()}, "malformed"),
    "too many rows": ({"cache": 1, "rows": (0,) * 25}, "malformed"),
    "a negative row": ({"cache": 1, "rows": (0, -1)}, "malformed"),
    "a negative past": ({"cache": 1, "past": -1}, "malformed"),
    "a negative cache": ({"cache": -1}, "malformed"),
    "an enormous cache": ({"cache": 2**63}, "malformed"),
    "an enormous past": ({"cache": 1, "past": 2**63 - 1}, "too_large"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_numbers_of_a_forward_are_bounded(name):
    fields, code = FIELDS[name]
    frames = forward_frames(HIDDEN, **fields)
    if code is None:
        decode(frames, sender="party", limits=LIMITS)
    else:
        assert code_of(frames) == code


def test_a_cache_counts_all_its_tokens():
    frames = encode(Forward(session=SESSION, step=0, cache=1, past=4), {"hidden": hidden(6, 1)})
    assert code_of(frames) == "too_large"  # 6 rows of 5 positions


HEADERS = {
    "nothing": (b"", "malformed"),
    "not msgpack": (b"\xc1", "malformed"),
    "a list": (pack([1, 2]), "malformed"),
    "no tag": (pack({"session": 1}), "malformed"),
    "an unknown tag": (pack({"type": "exec", "session": 1}), "malformed"),
    "an unknown field": (pack({"type": "bye", "session": 1, "label": 3}), "malformed"),
    "a missing field": (pack({"type": "backward", "session": 1}), "malformed"),
    "a float for a number": (pack({"type": "bye", "session": 1.0}), "malformed"),
    "a text for a number": (pack({"type": "bye", "session": "1"}), "malformed"),
    "a bool for a number": (pack({"type": "bye", "session": True}), "malformed"),
    "trailing bytes": (pack({"type": "bye", "session": 1}) + b"\0", "malformed"),
    "a negative session": (pack({"type": "bye", "session": -1}), "malformed"),
    "an enormous session": (pack({"type": "bye", "session": 2**63}), "malformed"),
    "a negative step": (pack({"type": "release", "session": 1, "steps": [-1]}), "malformed"),
    "an unknown dtype": (
        pack({"type": "bye", "session": 1, "tensors": [{"name": "hidden", "dtype": "object", "shape": [1]}]}),
        "malformed",
    ),
    "an unknown tensor": (
        pack({"type": "bye", "session": 1, "tensors": [{"name": "labels", "dtype": "int32", "shape": [1]}]}),
        "malformed",
    ),
    "an array of four billion": (b"\x82\xa4type\xa3bye\xa7tensors\xdd\xff\xff\xff\xff", "malformed"),
    "a text of four billion": (b"\x82\xa4type\xa5hello\xa8protocol\xdb\xff\xff\xff\xff", "malformed"),
    "nesting": (b"\x81\xa1x" + b"\x91" * 60_000, "malformed"),
    "bad text": (b"\x82\xa4type\xa3\xff\xfe\xfd\xa7session\x01", "malformed"),
    "a header too long": (bytes(MAX_HEADER_BYTES + 1), "too_large"),
    "a long text": (pack(msgspec.structs.replace(HELLO, protocol="p" * (MAX_TEXT_BYTES + 1))), "too_large"),
    "a long text in long letters": (pack(msgspec.structs.replace(HELLO, plan="\u20ac" * 400)), "too_large"),
    "an integer wire dtype": (pack(msgspec.structs.replace(HELLO, wire_dtype="uint8")), "malformed"),
    "another version": (pack(msgspec.structs.replace(HELLO, version=WIRE_VERSION + 1)), "version"),
    "another version with new fields": (
        pack({"type": "hello", "session": 1, "version": WIRE_VERSION + 1, "cipher": "new", "more": [1]}),
        "version",
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_are_no_message_are_refused(name):
    header, code = HEADERS[name]
    assert code_of([header]) == code


OWNER_HEADERS = {
    "an unknown code": ({"type": "refused", "session": 1, "code": "because", "problem": "no"}, "malformed"),
    "no tokens": (msgspec.structs.replace(WELCOME, max_tokens=0), "malformed"),
    "a negative length": (msgspec.structs.replace(WELCOME, max_length=-8), "malformed"),
    "a lease of no time": (msgspec.structs.replace(WELCOME, lease_s=0.0), "malformed"),
    "an endless lease": (msgspec.structs.replace(WELCOME, lease_s=float("inf")), "malformed"),
    "a lease of NaN": (msgspec.structs.replace(WELCOME, lease_s=float("nan")), "malformed"),
    "another version": (msgspec.structs.replace(WELCOME, version=0), "version"),
}


@pytest.mark.parametrize("name", OWNER_HEADERS)
def test_the_owner_is_not_believed_either(name):
    header, code = OWNER_HEADERS[name]
    assert code_of([pack(header)], sender="owner") == code


def test_the_number_of_frames_is_looked_at_first():
    assert code_of([]) == "malformed"
    with pytest.raises(Malformed, match=f"{MAX_TENSORS + 2} frames"):
        decode([b"\xc1"] * (MAX_TENSORS + 2), sender="party", limits=LIMITS)
    assert code_of([pack(Bye(session=1)), b""]) == "malformed"


def test_a_reordered_pair_of_frames_is_refused():
    header, first, second = encode(FROM_PARTY[2][0], {"hidden": hidden(), "mask": mask()})
    assert code_of([header, second, first]) == "malformed"


def test_tensors_where_none_belong_are_refused():
    spec = TensorSpec(name="mask", dtype="uint8", shape=(1, 1))
    for message in (Bye(session=1, tensors=(spec,)), Release(session=1, tensors=(spec,))):
        assert code_of([pack(message), b"\1"]) == "malformed"
    assert code_of([pack(Backward(session=1, step=0))]) == "malformed"


def test_the_header_can_be_opened_before_the_limits_are_known():
    frames = encode(Forward(session=SESSION, step=0), {"hidden": hidden(new=9)})
    assert open_header(frames, sender="party").session == SESSION
    assert code_of(frames) == "too_large"


def test_a_refusal_says_what_came_and_what_is_allowed_but_not_the_peers_control_characters():
    with pytest.raises(WireError) as caught:
        decode([pack({"type": "\x1b[31m" + "a" * 5000, "session": 1})], sender="party", limits=LIMITS)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert "Expected: " in str(caught.value)


# ---- fuzz


def verdict(frames, sender):
    """The code of the refusal, or None for a message, all of whose tensors then open as they were described."""
    try:
        message = decode(frames, sender=sender, limits=LIMITS)
    except Malformed as refused:
        return refused.code
    for spec, tensor in zip(message.tensors, tensors_of(message, frames).values(), strict=True):
        assert tuple(tensor.shape) == spec.shape
        assert tensor.numel() <= LIMITS.max_tokens * LIMITS.width
    return None


def decode_or_refuse(frames):
    """Decoding must end in a message or in a coded refusal, never in anything else."""
    for sender in ("party", "owner"):
        assert verdict(frames, sender) in (None, "malformed", "too_large", "version")


FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
VALID = [encode(*example) for example in (*FROM_PARTY, *FROM_OWNER)]
numbers = st.one_of(st.integers(-2, 12), st.integers(-(2**63), 2**64 - 1))


@FUZZ
@given(st.lists(st.binary(max_size=120), max_size=MAX_TENSORS + 3))
def test_random_frames(frames):
    decode_or_refuse(frames)


@FUZZ
@given(st.sampled_from(VALID), st.data())
def test_mutated_frames(valid, data):
    """A sound message with bytes changed, cut off, inserted, or with whole frames moved."""
    frames = [bytearray(frame) for frame in valid]
    for _ in range(data.draw(st.integers(1, 4))):
        frame = frames[data.draw(st.integers(0, len(frames) - 1))]
        at = data.draw(st.integers(0, len(frame)))
        match data.draw(st.sampled_from(["set", "cut", "insert", "swap", "repeat"])):
            case "set":
                frame[at : at + 1] = bytes([data.draw(st.integers(0, 255))])
            case "cut":
                del frame[at:]
            case "insert":
                frame[at:at] = data.draw(st.binary(max_size=9))
            case "swap":
                frames.reverse()
            case "repeat":
                frames.append(bytearray(frame))
    decode_or_refuse(frames)


specs = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["hidden", "gradient", "mask", "positions", "piece", "labels"]),
        "dtype": st.sampled_from(["float32", "float16", "bfloat16", "int32", "uint8", "int64"]),
        "shape": st.lists(numbers, max_size=5),
    }
)


@FUZZ
@given(
    kind=st.sampled_from(
        ["hello", "forward", "backward", "release", "fetch", "bye", "forward_done", "backward_done", "piece", "closed"]
    ),
    fields=st.dictionaries(
        st.sampled_from(["session", "step", "cache", "past", "keep", "version", "file", "offset", "length", "total"]),
        st.one_of(numbers, st.booleans()),
    ),
    rows=st.one_of(st.none(), st.lists(numbers, max_size=4)),
    tensors=st.lists(specs, max_size=4),
    payloads=st.lists(st.sampled_from([b"", bytes(6), bytes(12), bytes(96)]), max_size=4),
)
def test_headers_that_lie(kind, fields, rows, tensors, payloads):
    header = {"type": kind, "session": 1, "step": 0, **fields, "tensors": tensors}
    if rows is not None:
        header["rows"] = rows
    for name in {"hello": ("step",), "release": ("step",), "bye": ("step",), "closed": ("step",)}.get(kind, ()):
        header.pop(name, None)
    decode_or_refuse([pack(header), *payloads])


@FUZZ
@given(st.lists(numbers, min_size=3, max_size=3), st.sampled_from([0, 96, 4096]))
def test_huge_shapes_allocate_nothing(shape, length):
    frames = [
        pack(
            {
                "type": "forward",
                "session": 1,
                "step": 0,
                "tensors": [{"name": "hidden", "dtype": "float32", "shape": shape}],
            }
        ),
        bytes(length),
    ]
    tracemalloc.start()
    decode_or_refuse(frames)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 500_000


def test_memory_stays_where_it_was_after_announced_gigabytes():
    """Announced sizes that tracemalloc would not see, were they allocated in C."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for prefix in (
        b"\x82\xa4type\xa7release\xa5steps",
        b"\x82\xa4type\xa7forward\xa4rows",
        b"\x82\xa4type\xa3bye\xa7tensors",
    ):
        for announced in (b"\xdd\xff\xff\xff\xff", b"\xdd\x10\x00\x00\x00", b"\xdc\xff\xff"):
            assert code_of([prefix + announced + b"\x01" * 64]) == "malformed"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 64 * 1024 * (1024 if sys.platform == "darwin" else 1)
