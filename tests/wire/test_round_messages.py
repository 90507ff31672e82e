"""What a round's frames may be: everything else is refused with a code, and nothing else comes out."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitfl.wire import round_frames as wire
from splitfl.wire import round_messages as said
from splitfl.wire.round_frames import RoundViolation

DIGEST = "ab" * 32
WHO = {"session": 7, "request": 3}
FACTS = said.Facts(layout="l", base="b", rule="fedit", sum="plain", stages=("submit",), lengths=(6, 3))
FROM_PARTY = [
    said.Enter(**WHO, version=said.ROUNDS_VERSION, facts=FACTS, rows=5),
    said.Ask(**WHO, wait_s=2.5),
    said.Ready(**WHO, round=1, attempt=0),
    said.Get(**WHO, round=1, attempt=0, item="result", offset=0, size=9),
    said.Get(**WHO, round=1, attempt=0, item="state", offset=0, size=9, digest=DIGEST),
    said.Report(**WHO, round=1, attempt=0, state=DIGEST, personal=0.25, common=None, rows=9),
    said.Leave(**WHO, round=1, attempt=0, why="tired"),
]
PUT = said.Put(**WHO, round=1, attempt=0, item="submit", offset=2, total=5, digest=DIGEST)
FROM_COORDINATOR = [
    said.Entered(
        **WHO, version=said.ROUNDS_VERSION, federation="0f" * 16, rounds=3, min_parties=2, clip=1.0, max_weight=9.0,
        piece_bytes=wire.PIECE_BYTES,
    ),
    said.Task(**WHO, task="train", round=1, attempt=0, left_s=3.0, parties=("a", "b"), state=DIGEST),
    said.Got(**WHO, next=5, done=True),
    said.Finished(**WHO, rounds=3, reason="done", best_round=1, best_state=DIGEST),
    said.Refused(**WHO, code="late", problem="too late"),
]  # fmt: skip
PIECE = said.Piece(**WHO, offset=0, total=3, digest=DIGEST)


def changed(message, **fields):
    return msgspec.structs.replace(message, **fields)


def refusal(frames, sender="party"):
    with pytest.raises(RoundViolation) as caught:
        wire.decode(frames, sender=sender)
    assert caught.value.code in said.ROUND_REFUSALS
    return caught.value


def said_or_refused(frames, sender):
    """Nothing but a message or a refusal with a known code comes out."""
    code = "late"
    try:
        wire.decode(frames, sender=sender)
    except RoundViolation as violation:
        code = violation.code
    assert code in said.ROUND_REFUSALS


@pytest.mark.parametrize("message", FROM_PARTY, ids=said.kind)
def test_a_message_of_a_party_comes_back(message):
    assert wire.decode(wire.encode(message), sender="party") == (message, b"")
    refusal(wire.encode(message), sender="coordinator")


@pytest.mark.parametrize("message", FROM_COORDINATOR, ids=said.kind)
def test_a_message_of_a_coordinator_comes_back(message):
    assert wire.decode(wire.encode(message), sender="coordinator") == (message, b"")
    refusal(wire.encode(message), sender="party")


def test_a_piece_comes_back_with_its_bytes():
    assert wire.decode(wire.encode(PUT, b"xyz"), sender="party") == (PUT, b"xyz")
    assert wire.decode(wire.encode(PIECE, b"xyz"), sender="coordinator") == (PIECE, b"xyz")


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ([], "malformed"),
        (wire.encode(PUT), "malformed"),
        (wire.encode(PUT, b"wxyz"), "malformed"),
        (wire.encode(PUT, b""), "malformed"),
        ([*wire.encode(PUT, b"xyz"), b"more"], "malformed"),
        (wire.encode(changed(PUT, digest="AB" * 32), b"xyz"), "malformed"),
        (wire.encode(changed(PUT, digest="../../etc/passwd"), b"xyz"), "malformed"),
        (wire.encode(changed(PUT, offset=-1), b"xyz"), "malformed"),
        (wire.encode(changed(PUT, item="code"), b"xyz"), "malformed"),
        (wire.encode(changed(PUT, total=1 << 40), bytes(wire.PIECE_BYTES + 1)), "too_large"),
        (wire.encode(FROM_PARTY[1], b"x"), "malformed"),
        (wire.encode(changed(FROM_PARTY[1], wait_s=61.0)), "malformed"),
        (wire.encode(changed(FROM_PARTY[1], wait_s=float("nan"))), "malformed"),
        (wire.encode(changed(FROM_PARTY[2], round=-1)), "malformed"),
        (wire.encode(changed(FROM_PARTY[3], digest=DIGEST)), "malformed"),
        (wire.encode(changed(FROM_PARTY[4], digest="")), "malformed"),
        (wire.encode(changed(FROM_PARTY[4], size=0)), "malformed"),
        (wire.encode(changed(FROM_PARTY[4], size=wire.PIECE_BYTES + 1)), "malformed"),
        (wire.encode(changed(FROM_PARTY[5], state="")), "malformed"),
        (wire.encode(changed(FROM_PARTY[5], personal=float("inf"))), "malformed"),
        (wire.encode(changed(FROM_PARTY[5], common=-1e300)), "malformed"),
        (wire.encode(changed(FROM_PARTY[6], why="x" * 2000)), "too_large"),
        (wire.encode(changed(FROM_PARTY[0], version=99)), "version"),
        (wire.encode(changed(FROM_PARTY[0], facts=changed(FACTS, lengths=()))), "malformed"),
        (wire.encode(changed(FROM_PARTY[0], facts=changed(FACTS, lengths=(0,)))), "malformed"),
        (wire.encode(changed(FROM_PARTY[0], facts=changed(FACTS, lengths=(1,) * 5000))), "too_large"),
        (wire.encode(changed(FROM_PARTY[0], facts=changed(FACTS, stages=("submit",) * 6))), "malformed"),
        ([bytes(wire.MAX_HEADER_BYTES + 1)], "too_large"),
        ([msgspec.msgpack.encode({"type": "enter", "version": 2, "news": "of the future"})], "version"),
        ([msgspec.msgpack.encode({"type": "__import__", "session": 1, "request": 1})], "malformed"),
    ],
)
def test_what_is_refused(frames, code):
    assert refusal(frames).code == code


@pytest.mark.parametrize(
    "message",
    [
        changed(FROM_COORDINATOR[1], parties=("b", "a")),
        changed(FROM_COORDINATOR[1], parties=("a", "a")),
        changed(FROM_COORDINATOR[1], state="no digest"),
        changed(FROM_COORDINATOR[0], federation="short"),
        changed(FROM_COORDINATOR[0], clip=0.0),
        changed(FROM_COORDINATOR[0], piece_bytes=wire.PIECE_BYTES + 1),
        changed(FROM_COORDINATOR[4], code="nonsense"),
    ],
)
def test_what_is_refused_of_a_coordinator(message):
    refusal(wire.encode(message), sender="coordinator")


@given(st.lists(st.binary(max_size=200), max_size=3), st.sampled_from(["party", "coordinator"]))
def test_any_bytes_are_a_message_or_a_refusal(frames, sender):
    said_or_refused(frames, sender)


@given(st.data())
def test_a_damaged_message_is_a_message_or_a_refusal(data):
    header = bytearray(wire.encode(data.draw(st.sampled_from(FROM_PARTY)))[0])
    for _ in range(data.draw(st.integers(1, 4))):
        header[data.draw(st.integers(0, len(header) - 1))] = data.draw(st.integers(0, 255))
    said_or_refused([bytes(header)], "party")


def test_parts_come_back_and_the_same_parts_are_the_same_bytes():
    parts = {"b": b"2", "a": b"1"}
    blob = wire.pack_parts(parts)
    assert wire.unpack_parts(blob, names=["a", "b"], largest=1) == parts
    assert wire.pack_parts({"a": b"1", "b": b"2"}) == blob
    assert wire.unpack_names(wire.pack_names(("a", "b"))) == ("a", "b")


@pytest.mark.parametrize(
    ("blob", "names", "largest"),
    [
        (b"nonsense", ["a"], 9),
        (wire.pack_parts({"a": b"1"}), ["b"], 9),
        (wire.pack_parts({"a": b"1"}), ["a", "b"], 9),
        (wire.pack_parts({"a": b"1234567890"}), ["a"], 9),
        (msgspec.msgpack.encode({"a": "text"}), ["a"], 9),
        (msgspec.msgpack.encode({str(n): b"" for n in range(2000)}), None, 9),
    ],
)
def test_parts_that_are_refused(blob, names, largest):
    with pytest.raises(RoundViolation):
        wire.unpack_parts(blob, names=names, largest=largest)


@pytest.mark.parametrize("names", [("b", "a"), ("a", "a")])
def test_names_that_are_refused(names):
    with pytest.raises(RoundViolation):
        wire.unpack_names(wire.pack_names(names))
