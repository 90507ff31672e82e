"""Admitted parties that say what they like: refused with a code, and an honest round beside them comes out right."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial

import numpy as np
import psutil

from splitfl.wire import round_frames as wire
from splitfl.wire import round_messages as said
from splitfl.wire.round_frames import digest_of
from tests.rounds.places import BRISK, LIMIT_S, Place, course, facts, mean_of, take_part, together, train

PATIENT = type(BRISK)(deadline=LIMIT_S, stage_deadline=LIMIT_S, wait=0.2, farewell=1.0)


class Liar:
    """A party that sends any message and reads the answer."""

    def __init__(self, place, address, name, session=77):
        self.socket, self.session, self.requests = place.socket(address, name), session, 0
        self.socket.open(LIMIT_S)

    def frames(self, frames):
        self.socket.send(frames)
        came = self.socket.receive(LIMIT_S)
        assert came is not None
        return wire.decode(came, sender="coordinator")[0]

    def say(self, kind, frame=None, **fields):
        self.requests += 1
        fields = {"session": self.session, "request": self.requests, **fields}
        return self.frames(wire.encode(kind(**fields), frame))

    def enter(self, **changes):
        return self.say(said.Enter, version=said.ROUNDS_VERSION, facts=facts(**changes))

    def put(self, blob, *, item="submit", round=0, attempt=0, offset=0, total=None, digest=None, frame=None):
        return self.say(
            said.Put, blob if frame is None else frame, round=round, attempt=attempt, item=item, offset=offset,
            total=len(blob) if total is None else total, digest=digest or digest_of(blob),
        )  # fmt: skip


@contextmanager
def in_submit(tmp_path):
    """A coordinator whose first round is in `submit`, with two parties: one that lies and one that is honest."""
    place = Place(tmp_path, 3)
    with place.coordinator(course(rounds=1), patience=PATIENT) as running:
        liar = Liar(place, running.address, "p00")
        liar.enter()
        means = []
        with together([lambda: means.extend(take_part(place, running.address, 1)[0])]):
            running.wait_until(lambda now: len(now.present) == 2)
            liar.say(said.Ask)
            running.wait_until(lambda now: now.phase == "training")
            liar.say(said.Ready, round=0, attempt=0)
            running.wait_until(lambda now: now.phase == "submit")
            try:
                yield place, running, liar
            finally:
                update = np.float64(1.0).tobytes() + train(0, None).tobytes()
                assert liar.put(update).done
                running.wait_until(lambda now: now.phase == "settling")
                result = running.standing.shown["result"]
                assert liar.say(said.Report, round=0, attempt=0, state=result).done
                running.wait_until(lambda now: now.phase == "finished")
                liar.say(said.Leave)
                liar.socket.close()
        expected = mean_of([train(0, None), train(1, None)], [1.0, 2.0])
        np.testing.assert_allclose(means[0].mean, expected, rtol=1e-5)


def test_puts_that_are_refused_and_an_honest_sum_all_the_same(tmp_path):
    with in_submit(tmp_path) as (place, running, liar):
        blob = np.float64(1.0).tobytes() + bytes(24)
        for code, answer in [
            ("too_large", liar.put(blob, total=1 << 62)),
            ("too_large", liar.put(blob, total=1 << 20)),
            ("late", liar.put(blob, round=1)),
            ("late", liar.put(blob, attempt=1)),
            ("late", liar.put(blob, item="reveal")),
            ("late", liar.put(blob, item="state")),
            ("mismatch", liar.put(blob, digest="0" * 64)),
            ("rejected", liar.put(b"short")),
            ("rejected", liar.put(np.float64(-1.0).tobytes() + bytes(24))),
            ("rejected", liar.put(np.float64(1e9).tobytes() + bytes(24))),
            ("rejected", liar.put(np.float64(1.0).tobytes() + np.full(6, np.nan, np.float32).tobytes())),
            ("malformed", liar.frames([b"nonsense"])),
            ("malformed", liar.frames([b"a", b"b", b"c"])),
            ("unknown_session", liar.say(said.Ready, session=5, round=0, attempt=0)),
            ("unknown_item", liar.say(said.Get, round=0, attempt=0, item="result", offset=0, size=99)),
            ("unknown_item", liar.say(said.Get, round=0, attempt=0, item="shares", offset=0, size=99)),
            ("unknown_item", liar.say(said.Get, round=0, attempt=0, item="state", offset=0, size=9, digest="1" * 64)),
            ("late", liar.say(said.Get, round=9, attempt=0, item="result", offset=0, size=99)),
            ("late", liar.say(said.Report, round=0, attempt=0, state="2" * 64)),
        ]:
            assert isinstance(answer, said.Refused), (code, answer)
            assert answer.code == code
        # an offset that was not asked for is no error: the answer says where to go on
        assert liar.put(blob, offset=8, total=32, frame=blob[8:]) == said.Got(
            session=77, request=liar.requests, next=0, done=False
        )
        incoming = list((place.path / "state" / "blobs" / "incoming").iterdir())
        assert sum(path.stat().st_size for path in incoming) == 0
        assert running.coordinator.refusals["too_large"] == 2


def test_the_same_update_again_is_fine_and_another_is_not(tmp_path):
    with in_submit(tmp_path) as (_, running, liar):
        update = np.float64(1.0).tobytes() + train(0, None).tobytes()
        honest = running.standing.phase
        if honest == "submit":
            first = liar.put(update)
            assert first.done
        again = liar.put(update)
        assert again.done
        other = liar.put(update[:-1] + b"\1")
        assert (other.code, running.standing.members[liar_key(running)].items["submit"]) == (
            "conflict", digest_of(update),
        )  # fmt: skip


def liar_key(running):
    return next(party for party, member in running.standing.members.items() if member.session == 77)


def test_a_party_that_is_not_in_the_round_gets_and_gives_nothing(tmp_path):
    with in_submit(tmp_path) as (place, running, _):
        other = Liar(place, running.address, "p02", session=78)
        assert isinstance(other.enter(), said.Entered)
        update = np.float64(1.0).tobytes() + bytes(24)
        for answer in (
            other.put(update),
            other.say(said.Ready, round=0, attempt=0),
            other.say(said.Get, round=0, attempt=0, item="result", offset=0, size=9),
        ):
            assert answer.code == "not_in_round"
        assert other.say(said.Ask).task == "wait"
        other.session = 77  # the session of somebody else is nothing under one's own key
        assert other.put(update).code == "unknown_session"
        other.socket.close()


def test_a_key_that_was_taken_off_the_list_is_heard_no_more(tmp_path):
    place = Place(tmp_path, 2)
    with place.coordinator() as running:
        liar = Liar(place, running.address, "p00")
        assert isinstance(liar.enter(), said.Entered)
        place.allow.revoke("p00")
        assert liar.say(said.Ask).code == "revoked"
        assert not running.coordinator.room.who_begins()
        liar.socket.close()


def test_other_versions_are_told_so(tmp_path):
    place = Place(tmp_path, 1)
    with place.coordinator() as running:
        liar = Liar(place, running.address, "p00")
        answer = liar.say(said.Enter, version=9, facts=facts())
        assert (answer.code, answer.expected) == ("version", f"version {said.ROUNDS_VERSION}")
        liar.socket.close()


def test_pieces_of_a_large_update_are_not_held_in_memory(tmp_path):
    """A party that announces the largest update and never ends it costs the disk what it sent, and no memory."""
    place = Place(tmp_path, 2)
    length = 5_000_000
    with place.coordinator(course(rounds=1), patience=PATIENT) as running:
        liars = [Liar(place, running.address, name, session=70 + n) for n, name in enumerate(place.names)]
        for liar in liars:
            liar.enter(lengths=(length,))
            liar.say(said.Ask)
        running.wait_until(lambda now: now.phase == "training")
        for liar in liars:
            liar.say(said.Ready, round=0, attempt=0)
        running.wait_until(lambda now: now.phase == "submit")
        before = psutil.Process().memory_info().rss
        total, piece = 8 + 4 * length, bytes(wire.PIECE_BYTES)
        for offset in range(0, 18 * wire.PIECE_BYTES, wire.PIECE_BYTES):
            for liar in liars:
                answer = liar.put(b"", offset=offset, total=total, digest="3" * 64, frame=piece)
                assert answer.next == offset + wire.PIECE_BYTES
        assert psutil.Process().memory_info().rss - before < 16 * wire.PIECE_BYTES  # of the 36 that came
        for liar in liars:
            liar.socket.close()
    assert not list((place.path / "state" / "blobs" / "incoming").iterdir())


def test_shares_for_others_than_the_round_are_refused(tmp_path):
    place = Place(tmp_path, 2)
    stages = ("advertise", "share", "submit")
    with place.coordinator(course(rounds=1, stages=stages), patience=PATIENT) as running:
        liars = [Liar(place, running.address, name, session=70 + n) for n, name in enumerate(place.names)]
        for liar in liars:
            liar.enter(stages=stages)
            liar.say(said.Ask)
        running.wait_until(lambda now: now.phase == "training")
        for liar in liars:
            liar.say(said.Ready, round=0, attempt=0)
        for number, liar in enumerate(liars):
            assert liar.put(b"advert %d" % number, item="advertise").done
        running.wait_until(lambda now: now.phase == "share")
        mine, other = place.key("p00"), place.key("p01")
        for parts in ({}, {mine: b"x"}, {other: b"x", mine: b"x"}, {"somebody": b"x"}, {other: bytes(1 << 13)}):
            refused = liars[0].put(wire.pack_parts(parts), item="share")
            assert refused.code in ("malformed", "too_large"), parts
        assert liars[0].put(wire.pack_parts({other: b"for 1"}), item="share").done
        assert liars[1].put(wire.pack_parts({mine: b"for 0"}), item="share").done
        running.wait_until(lambda now: now.phase == "submit")
        shown = running.standing.shown
        assert wire.unpack_parts(running.engine.vault.read(shown[f"shares/{mine}"]), largest=9) == {other: b"for 0"}
        answer = liars[0].say(said.Get, round=0, attempt=0, item="shares", offset=0, size=99)
        assert answer.digest == shown[f"shares/{mine}"]
        for liar in liars:
            liar.socket.close()


def test_a_slow_party_holds_up_nobody_else_beyond_the_deadline(tmp_path):
    place = Place(tmp_path, 3)
    patience = type(BRISK)(deadline=1.0, stage_deadline=1.0, wait=0.2, farewell=1.0)
    with place.coordinator(course(rounds=1), patience=patience) as running:
        idle = Liar(place, running.address, "p02")
        idle.enter()
        idle.say(said.Ask)
        works = [partial(take_part, place, running.address, n) for n in range(2)]
        with together(works) as all_:
            results = [each.result(LIMIT_S) for each in all_]
        assert all(len(means) == 1 for means, _ in results)
        assert len(running.standing.last.summed) == 2
        idle.socket.close()
