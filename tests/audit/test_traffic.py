"""Frames read again: rows without their padding, halves joined, what is no row counted and left out."""

from __future__ import annotations

import pytest
import torch

from splitfl.audit.recording import About, Room
from splitfl.audit.recording_keys import make_vault
from splitfl.audit.traffic import replay
from splitfl.audit.witness import Witness, opened
from splitfl.errors import DataError
from splitfl.wire import frames as wire
from splitfl.wire.coding import encode_grid16, encode_int4, encode_int8, encode_topk
from splitfl.wire.messages import (
    WIRE_VERSION,
    Backward,
    BackwardDone,
    Bye,
    Forward,
    ForwardDone,
    Hello,
    Refused,
    Welcome,
)

B, T, D = 3, 5, 8
SESSION = 11
LENGTHS = (5, 2, 4)
MASKS = {
    "right": torch.tensor([[1] * n + [0] * (T - n) for n in LENGTHS], dtype=torch.uint8),
    "left": torch.tensor([[0] * (T - n) + [1] * n for n in LENGTHS], dtype=torch.uint8),
}
CODERS = {
    "raw": lambda x: x,
    "grid16": lambda x: encode_grid16(torch.round(x * 64).int(), 1 / 64),
    "int8": encode_int8,
    "int4": encode_int4,
    "topk": lambda x: encode_topk(x, 3),
}


class Conversation:
    """Writes what would cross into a recording, as either side would."""

    def __init__(self, folder, side="party", dtype="float32", coding="raw", gradient_coding="raw", session=SESSION):
        self.vault, self.side, self.dtype, self.session = make_vault(folder, None), side, dtype, session
        self.number = max(self.vault.numbers(), default=0) + 1
        self.writer = self.vault.writer("traffic", self.number, Room(10**9))
        self.writer.write(About(side=side, protocol="split"))
        self.witness = Witness()
        hello = Hello(
            session=session, version=WIRE_VERSION, protocol="split", trunk="t", plan="p", wire_dtype=dtype,
            hidden_coding=coding, gradient_coding=gradient_coding,
        )  # fmt: skip
        self.say(hello)
        self.say(Welcome(session=session, version=WIRE_VERSION, max_tokens=64, max_length=32, memory="keep",
                         lease_s=60, server="0"))  # fmt: skip

    def say(self, message, **tensors):
        return self.put(message, wire.encode(message, tensors, self.dtype))

    def put(self, message, frames):
        from_party = isinstance(message, Hello | Forward | Backward | Bye)
        way = "sent" if from_party == (self.side == "party") else "received"
        read = opened(frames, "party" if from_party else "owner")
        self.writer.write(self.witness.note(way, read, frames), frames)
        return frames

    def forward(self, step, hidden, *, keep=False, cache=None, **more):
        return self.say(Forward(session=self.session, step=step, keep=keep, cache=cache), hidden=hidden, **more)

    def answer(self, step, hidden):
        return self.say(ForwardDone(session=self.session, step=step), hidden=hidden)

    def backward(self, step, gradient):
        return self.say(Backward(session=self.session, step=step), gradient=gradient)

    def returned(self, step, gradient):
        return self.say(BackwardDone(session=self.session, step=step), gradient=gradient)

    def replay(self, **more):
        self.writer.close()
        return replay([self.vault.reader("traffic", n) for n in self.vault.numbers()], D, **more)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole_step(talk, step=1, mask=MASKS["right"], **more):
    made = [numbers(B, T, D, seed=10 * step + n) for n in range(4)]
    talk.forward(step, made[0], keep=True, mask=mask, **more)
    talk.answer(step, made[1])
    talk.backward(step, made[2])
    talk.returned(step, made[3])
    return made


@pytest.mark.parametrize("side", ["party", "owner"])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_a_step_becomes_a_row_each_without_padding(tmp_path, side, padding):
    talk, mask = Conversation(tmp_path, side), MASKS[padding]
    made = whole_step(talk, mask=mask)
    found = talk.replay()
    assert [len(sent.hidden) for sent in found.sent] == list(LENGTHS)
    for place, sent in enumerate(found.sent):
        real = mask[place].bool()
        assert (sent.number, sent.step, sent.place, sent.training) == (place, 1, place, True)
        came = (sent.hidden, sent.output, sent.gradient, sent.returned)
        for ours, theirs in zip(came, made, strict=True):
            assert torch.equal(ours, theirs[place][real])
    assert found.tally.messages == {"sent": 3, "received": 3}
    assert [place.tokens for place in found.places] == list(LENGTHS)


def test_without_a_mask_every_position_counts(tmp_path):
    talk = Conversation(tmp_path)
    hidden = numbers(B, T, D)
    talk.forward(1, hidden)
    [first, *_] = talk.replay().sent
    assert torch.equal(first.hidden, hidden[0])
    assert first.output is first.gradient is first.returned is first.positions is None
    assert not first.training


@pytest.mark.parametrize("coding", CODERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_codes_and_short_formats_become_what_the_receiver_computes_with(tmp_path, coding, dtype):
    talk = Conversation(tmp_path, coding=coding, gradient_coding=coding, dtype=dtype)
    hidden, gradient = numbers(B, T, D), numbers(B, T, D, seed=1)
    sent, back = CODERS[coding](hidden), CODERS[coding](gradient)
    talk.forward(1, sent, keep=True, mask=MASKS["right"])
    talk.backward(1, back)
    expected = hidden.to(torch.bfloat16 if dtype == "bfloat16" else torch.float32).float()
    if coding != "raw":
        expected = sent.decode()
    found = talk.replay().sent
    for place, length in enumerate(LENGTHS):
        assert found[place].hidden.dtype == torch.float32
        assert torch.equal(found[place].hidden, expected[place, :length])
        assert found[place].gradient is not None
    if coding != "raw":
        assert torch.equal(found[0].gradient, back.decode()[0])


def test_positions_are_told_where_they_do_not_count_from_nought(tmp_path):
    talk = Conversation(tmp_path)
    talk.forward(1, numbers(B, T, D), mask=MASKS["left"])
    talk.forward(2, numbers(B, T, D), mask=MASKS["left"], positions=torch.arange(T)[None].int() + 7)
    talk.forward(3, numbers(B, T, D), mask=MASKS["right"], positions=torch.arange(T)[None].int())
    told = [sent.positions for sent in talk.replay().sent]
    assert told[0] is None  # the longest has no padding
    assert told[1].tolist() == [3, 4]
    assert [positions.tolist() for positions in told[3:6]] == [[7, 8, 9, 10, 11], [10, 11], [8, 9, 10, 11]]
    assert told[6:] == [None, None, None]


def test_families_that_count_tokens_alone_begin_at_nought(tmp_path):
    talk = Conversation(tmp_path)
    talk.forward(1, numbers(B, T, D), mask=MASKS["left"])
    assert all(sent.positions is None for sent in talk.replay(counts_padding=False).sent)


# ---- what is no row


def test_what_was_sent_again_is_counted_once(tmp_path):
    talk = Conversation(tmp_path)
    hidden = numbers(B, T, D)
    frames = talk.forward(1, hidden, keep=True)
    talk.put(Forward(session=SESSION, step=1), frames)
    answer = talk.answer(1, hidden)
    talk.put(ForwardDone(session=SESSION, step=1), answer)
    found = talk.replay()
    assert len(found.places) == B
    assert found.tally.retries == 2
    assert found.tally.changed_retries == 0
    assert found.tally.messages == {"sent": 2, "received": 2}
    assert found.tally.bytes["sent"] == sum(map(len, frames)) + _hello_bytes(talk)


def _hello_bytes(talk):
    reader = talk.vault.reader("traffic", 1)
    return next(sum(head.sizes) for head, _ in reader if getattr(head, "kind", "") == "hello")


def test_other_bytes_under_the_same_step_are_told_and_count_as_rows(tmp_path):
    talk = Conversation(tmp_path)
    talk.forward(1, numbers(B, T, D))
    talk.forward(1, numbers(B, T, D, seed=1))
    found = talk.replay()
    assert found.tally.changed_retries == 1
    assert found.tally.retries == 0
    assert len(found.sent) == 2 * B
    assert not torch.equal(found.sent[0].hidden, found.sent[B].hidden)


def test_probes_and_generations_are_counted_and_left_out(tmp_path):
    talk = Conversation(tmp_path)
    talk.forward(1, numbers(B, T, D))
    talk.forward(2, numbers(B, T, D))
    talk.answer(2, numbers(B, T, D))
    talk.forward(3, numbers(B, T, D), cache=1)
    talk.forward(4, numbers(B, T, D))
    found = talk.replay(left_out={(SESSION, 2)})
    assert [sent.step for sent in found.sent] == [1] * B + [4] * B
    assert [sent.number for sent in found.sent] == list(range(2 * B))
    assert (found.tally.probes, found.tally.generations) == (1, 1)


def test_a_refused_request_has_crossed(tmp_path):
    talk = Conversation(tmp_path)
    talk.forward(1, numbers(B, T, D))
    talk.say(Refused(session=SESSION, code="busy", problem="no", step=1))
    talk.say(Bye(session=SESSION))
    found = talk.replay()
    assert len(found.sent) == B
    assert found.sent[0].output is None


def test_what_no_side_can_read_is_counted(tmp_path):
    talk = Conversation(tmp_path)
    talk.put(Refused(session=SESSION, code="busy", problem="no"), [b"nonsense"])
    assert talk.replay().tally.messages["received"] == 2


# ---- several segments


def test_a_later_start_goes_on_with_the_numbers(tmp_path):
    first = Conversation(tmp_path)
    whole_step(first)
    first.writer.close()
    second = Conversation(tmp_path, session=12)
    made = whole_step(second, mask=MASKS["left"])
    found = second.replay()
    assert [sent.number for sent in found.sent] == list(range(2 * B))
    assert [place.request for place in found.places] == [(SESSION, 1)] * B + [(12, 1)] * B
    assert [place.segment for place in found.places] == [0] * B + [1] * B
    assert torch.equal(found.sent[-1].gradient, made[2][-1][MASKS["left"][-1].bool()])
    assert found.tally.broken_off == 0


def test_only_what_is_wanted_is_made_and_the_numbers_stay(tmp_path):
    talk = Conversation(tmp_path)
    whole_step(talk, 1)
    whole_step(talk, 2)
    found = talk.replay(wanted={1, 4}.__contains__)
    assert [(sent.number, sent.step, sent.place) for sent in found.sent] == [(1, 1, 1), (4, 2, 1)]
    assert found.sent[1].returned is not None
    assert len(found.places) == 2 * B


def test_segments_without_an_end_are_told(tmp_path):
    talk = Conversation(tmp_path)
    whole_step(talk)
    talk.writer.close()
    path = talk.writer.path
    path.write_bytes(path.read_bytes()[:-400])  # into the gradient that came back
    found = talk.replay()
    assert found.tally.broken_off == 1
    assert found.sent[0].gradient is not None
    assert found.sent[0].returned is None
    path.unlink()
    assert replay([talk.vault.reader("traffic", 1)], D).tally.broken_off == 1


def test_a_tensor_of_another_width_does_not_decode(tmp_path):
    talk = Conversation(tmp_path)
    talk.forward(1, numbers(B, T, D + 1))
    with pytest.raises(DataError, match="does not decode"):
        talk.replay()


def test_a_session_without_its_beginning_is_refused(tmp_path):
    talk = Conversation(tmp_path)
    talk.session = 99
    talk.forward(1, numbers(B, T, D))
    with pytest.raises(DataError, match="beginning"):
        talk.replay()
