"""Parts of the emulator on the wire: sizes, steps, and who may ask for them at all."""

import hypothesis.strategies as st
import msgspec
import pytest
import torch
from hypothesis import given

from protocols import PROTOCOLS
from splitfl.wire.frames import Malformed, decode, describe, encode, tensors_of
from splitfl.wire.messages import MAX_PIECE, Fetch, Piece, TensorSpec
from splitfl.wire.pieces import parts_of
from splitfl.wire.session import OwnerSession, PartySession, Turn
from splitfl.wire.steps import MAX_FETCHES
from tests.wire.samples import LIMITS, SESSION, WELCOME, content
from tests.wire.talk import ROLES, TERMS, fetch, forward, piece, refusal, refused, say


def code_of(frames, sender):
    with pytest.raises(Malformed) as caught:
        decode(frames, sender=sender, limits=LIMITS)
    return caught.value.code


# ---- sizes

FETCHES = {
    "no byte": ({"length": 0}, "malformed"),
    "a negative length": ({"length": -1}, "malformed"),
    "a byte too many": ({"length": MAX_PIECE + 1}, "too_large"),
    "a length beyond 64 bits": ({"length": 2**63}, "malformed"),
    "a negative offset": ({"offset": -1}, "malformed"),
    "an offset beyond 64 bits": ({"offset": 2**63}, "malformed"),
    "a negative file": ({"file": -1}, "malformed"),
    "a name for a file": ({"file": "../kit"}, "malformed"),
    "the largest numbers": ({"offset": 2**63 - 1, "file": 2**63 - 1, "length": MAX_PIECE}, None),
}


@pytest.mark.parametrize("name", FETCHES)
def test_numbers_of_a_fetch_are_bounded(name):
    fields, code = FETCHES[name]
    header = msgspec.msgpack.encode(
        {"type": "fetch", "session": 1, "step": 0, "file": 1, "offset": 0, "length": 1, **fields}
    )
    if code is None:
        assert isinstance(decode([header], sender="party", limits=LIMITS), Fetch)
    else:
        assert code_of([header], "party") == code


def piece_frames(size=6, *, payload=None, total=6, offset=0, **spec):
    """A piece whose header says exactly this; by default a sound one."""
    told = TensorSpec(**{"name": "piece", "dtype": "uint8", "shape": (size,), **spec})
    message = Piece(session=1, step=0, file=1, offset=offset, total=total, tensors=(told,))
    return [msgspec.msgpack.encode(message), bytes(size if payload is None else payload)]


PIECES = {
    "no bytes": (piece_frames(0), "malformed"),
    "fewer bytes than it says": (piece_frames(payload=5), "malformed"),
    "more bytes than it says": (piece_frames(payload=7), "malformed"),
    "beyond the end of its file": (piece_frames(total=5), "malformed"),
    "behind the end of its file": (piece_frames(offset=9), "malformed"),
    "a file without a byte": (piece_frames(total=0), "malformed"),
    "a negative total": (piece_frames(total=-6), "malformed"),
    "rank 2": (piece_frames(shape=(2, 3)), "malformed"),
    "rank 0": (piece_frames(shape=()), "malformed"),
    "floats": (piece_frames(dtype="float32", shape=(1,), payload=4), "malformed"),
    "coded": (piece_frames(coding="int8"), "malformed"),
    "another name": (piece_frames(name="mask"), "malformed"),
    "a byte too many": (piece_frames(MAX_PIECE + 1, total=2 * MAX_PIECE), "too_large"),
    "announced, and not there": (piece_frames(2**62, payload=6, total=2**62), "too_large"),
}


@pytest.mark.parametrize("name", PIECES)
def test_lies_about_a_piece_are_refused(name):
    frames, code = PIECES[name]
    assert code_of(frames, "owner") == code


def test_the_largest_piece_is_allowed():
    whole = torch.arange(MAX_PIECE, dtype=torch.int64).to(torch.uint8)
    message = Piece(session=1, step=0, file=1, offset=3, total=MAX_PIECE + 3)
    frames = encode(message, {"piece": whole})
    assert torch.equal(tensors_of(decode(frames, sender="owner", limits=LIMITS), frames)["piece"], whole)


@given(st.integers(0, 5 * MAX_PIECE), st.integers(0, 5 * MAX_PIECE))
def test_parts_follow_one_another_to_the_end(start, total):
    at = start
    for file, offset, length in parts_of(7, start, total):
        assert (file, offset) == (7, at)
        assert 1 <= length <= MAX_PIECE
        at += length
    assert at == max(start, total)


# ---- steps


def test_fetches_are_answered_in_any_order(opened):
    assert say(opened, fetch(0), fetch(1, offset=4), piece(1, offset=4), piece(0)) == [Turn.NEW] * 4
    assert opened.open_requests() == opened.kept_steps() == ()


def test_the_end_of_a_file_may_be_nearer_than_what_was_asked_for(opened):
    say(opened, fetch(0, offset=8, length=4))
    assert say(opened, piece(0, offset=8, size=2, total=10)) == [Turn.NEW]


def test_the_same_fetch_again_is_a_retry_and_so_is_its_answer(opened):
    assert say(opened, fetch(3), fetch(3), piece(3), piece(3), fetch(3)) == [
        Turn.NEW, Turn.RETRY, Turn.NEW, Turn.RETRY, Turn.RETRY,
    ]  # fmt: skip
    assert say(opened, piece(3)) == [Turn.NEW]


@pytest.mark.parametrize("other", [{"file": 2}, {"offset": 1}, {"length": 5}])
@pytest.mark.parametrize("answered", [False, True])
def test_a_retry_asks_for_the_same_part(opened, other, answered):
    say(opened, fetch(3), *([piece(3)] if answered else []))
    assert refusal(opened, fetch(3, **other)) == "malformed"


@pytest.mark.parametrize(
    "other", [{"file": 2}, {"offset": 1}, {"size": 3}, {"size": 5}, {"total": 5, "size": 5}, {"size": 3, "total": 4}]
)
def test_a_piece_is_the_part_that_was_asked_for(opened, other):
    say(opened, fetch(3))
    assert refusal(opened, piece(3, **other)) == "malformed"
    assert refusal(opened, piece(2)) == "out_of_order"


def test_a_fetch_takes_its_number_from_those_of_forwards(opened):
    assert say(opened, forward(5), fetch(6), forward(7)) == [Turn.NEW] * 3
    assert opened.open_requests() == (("forward", 5), ("fetch", 6), ("forward", 7))
    assert say(opened, fetch(2)) == [Turn.RETRY]


def test_few_fetches_are_open_at_a_time(opened):
    say(opened, *(fetch(number) for number in range(MAX_FETCHES)))
    assert refusal(opened, fetch(MAX_FETCHES)) == "too_large"
    assert say(opened, fetch(0), piece(0), fetch(MAX_FETCHES)) == [Turn.RETRY, Turn.NEW, Turn.NEW]


def test_a_refused_fetch_is_over_and_keeps_nothing(opened):
    say(opened, fetch(3), refused(3, "unknown_piece"))
    assert opened.open_requests() == opened.kept_steps() == ()
    assert say(opened, fetch(3), piece(3)) == [Turn.RETRY, Turn.NEW]


# ---- who may ask


@pytest.mark.parametrize("name", sorted(name for name, protocol in PROTOCOLS.items() if not protocol.whole))
def test_only_the_offline_protocol_lets_an_emulator_cross(name):
    for role, session_class in ROLES.items():
        session = session_class(TERMS, PROTOCOLS[name].disclosure)
        say(session, TERMS.hello(), WELCOME)
        if PROTOCOLS[name].offline:
            say(session, fetch(0), piece(0))
        else:
            assert refusal(session, fetch(0)) == "not_disclosed", role
            assert refusal(session, piece(0)) == "not_disclosed", role


def test_nothing_else_goes_with_a_fetch_or_the_other_way():
    disclosure = PROTOCOLS["guarded-offline"].disclosure
    party, owner = PartySession(TERMS, disclosure), OwnerSession(TERMS, disclosure)
    for session in (party, owner):
        say(session, TERMS.hello(), WELCOME, fetch(0))
        assert refusal(session, forward(1)) == "not_disclosed"
        assert refusal(session, describe(fetch(1), {"piece": content()})) == "not_disclosed"
        assert refusal(session, Piece(session=SESSION, step=0, file=1, offset=0, total=4)) == "malformed"
