"""Rounds over real sockets with real keys: who takes part, who does not, and what the sums are."""

from __future__ import annotations

import struct
import threading
from functools import partial

import numpy as np
import pytest

from party.rounds import RoundTask
from splitfl.aggregation.identity import load_identities
from splitfl.aggregation.mask_sums import MaskSummer
from splitfl.aggregation.masks import MaskSealer
from splitfl.aggregation.plain import PlainSealer, PlainSummer
from splitfl.aggregation.sums import STAGES
from splitfl.errors import PeerError, RefusedError
from splitfl.rounds.together import Combiner
from splitfl.wire.round_frames import pack_parts, unpack_parts
from tests.rounds.places import BRISK, LIMIT_S, Place, chain, check, course, mean_of, take_part, together, train
from tests.rounds.plain_sum import PlainSealer as ToySealer
from tests.rounds.plain_sum import PlainSummer as ToySummer


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path, 3)


def test_three_parties_and_three_rounds(place):
    with place.coordinator(course(rounds=3)) as running:
        with together(
            [partial(take_part, place, running.address, n, scores=(0.1, 0.9, 0.5)) for n in range(3)]
        ) as all_:
            done = [each.result(LIMIT_S) for each in all_]
        running.wait()
    for means, outcome in done:
        check(means, chain(3, range(3)))
        assert (outcome.rounds, outcome.best_round, outcome.reason) == (3, 1, "all 3 rounds are done")
        np.testing.assert_allclose(
            np.frombuffer(outcome.best_state, np.float32, offset=16), chain(2, range(3))[-1], rtol=1e-5
        )
    ended = [each for each, _ in running.rounds]
    assert [(e.kept, e.common, e.personal, len(e.summed)) for e in ended] == [
        (True, pytest.approx(score), pytest.approx(score + 1), 3) for score in (0.1, 0.9, 0.5)
    ]
    # the state is the result, whose digest the coordinator knows: nobody hands it over a second time
    assert {cost.bytes_in < 4000 for _, cost in running.rounds} == {True}


def test_a_state_of_its_own_is_handed_over_by_one_party_and_reaches_a_late_one(place):
    seen = []

    def late():
        running.wait_until(lambda now: now.round == 1, "the first round")
        with place.client(running.address, place.names[2]) as rounds:
            for task in rounds:
                seen.append((task.round, task.state))
                task.submit(train(2, None), 1.0)
                task.finish(b"state after %d" % task.round)

    def early(number):
        with place.client(running.address, place.names[number]) as rounds:
            for task in rounds:
                assert task.submit(train(number, None), 1.0) is not None
                assert task.finish(b"state after %d" % task.round)
                if task.round == 0:
                    running.wait_until(lambda now: len(now.present) == 3, "a third party")
            return rounds.outcome

    with place.coordinator(course(rounds=4)) as running:
        with together([partial(early, 0), partial(early, 1), late]) as all_:
            outcomes = [each.result(LIMIT_S) for each in all_]
        running.wait()
    assert seen[0][0] in (1, 2)
    assert seen == [(n, b"state after %d" % (n - 1)) for n in range(seen[0][0], 4)]
    assert outcomes[0].state == b"state after 3"
    assert all(ended.kept for ended, _ in running.rounds)


@pytest.mark.parametrize("proposed", [False, True])
def test_a_party_with_another_state_is_outvoted_and_corrected(place, proposed):
    starts, keys = [], sorted(place.key(name) for name in place.names)

    def take(number):
        with place.client(running.address, place.names[number]) as rounds:
            for task in rounds:
                starts.append((number, task.round, task.state))
                task.submit(train(number, None), 1.0)
                wrong = place.key(place.names[number]) == keys[2] and task.round == 0
                right = b"%d right" % (number if proposed else 9)
                task.finish(b"wrong" if wrong else right, agrees=partial(agrees, wrong))

    def agrees(wrong, other):
        return proposed and not wrong and b"right" in other

    with place.coordinator(course(rounds=2, proposed=proposed)) as running:
        with together([partial(take, n) for n in range(3)]) as all_:
            [each.result(LIMIT_S) for each in all_]
        running.wait()
    ends = {state for _, round_, state in starts if round_ == 1}
    assert len(ends) == 1
    assert b"right" in ends.pop()
    assert all(ended.kept for ended, _ in running.rounds)


def test_a_wrong_proposal_never_stands(place):
    keys, starts = sorted(place.key(name) for name in place.names), []

    def take(number):
        with place.client(running.address, place.names[number]) as rounds:
            for task in rounds:
                starts.append((task.round, task.state))
                task.submit(train(number, None), 1.0)
                wrong = place.key(place.names[number]) == keys[0]
                task.finish(b"wrong" if wrong else b"right", agrees=partial(agrees, wrong))

    def agrees(wrong, other):
        return not wrong and other == b"right"

    with place.coordinator(course(rounds=3, proposed=True)) as running:
        with together([partial(take, n) for n in range(3)]) as all_:
            [each.result(LIMIT_S) for each in all_]
        running.wait()
    assert [ended.kept for ended, _ in running.rounds] == [True] * 3  # two of three have the same other one
    assert set(starts) == {(0, None), (1, b"right"), (2, b"right")}


def test_no_two_parties_agree_and_nothing_stands(place):
    starts = []

    def take(number):
        with place.client(running.address, place.names[number]) as rounds:
            for task in rounds:
                starts.append((task.round, task.kept, task.state))
                task.submit(train(number, None), 1.0)
                assert not task.finish(b"state of %d" % number)

    with place.coordinator(course(rounds=2)) as running:
        with together([partial(take, n) for n in range(3)]) as all_:
            [each.result(LIMIT_S) for each in all_]
        running.wait()
    assert set(starts) == {(0, True, None), (1, False, None)}
    assert [(ended.kept, ended.state) for ended, _ in running.rounds] == [(False, None)] * 2


def test_who_is_too_slow_is_left_out_and_comes_back(place):
    gate, seen = threading.Event(), []

    def slow():
        with place.client(running.address, place.names[2]) as rounds:
            for task in rounds:
                if task.round == 0:
                    assert gate.wait(LIMIT_S)
                opened = task.submit(train(2, task.state), 3.0)
                seen.append((task.round, opened is not None))
                if opened is not None:
                    task.finish(task.result)

    def quick(number):
        with place.client(running.address, place.names[number]) as rounds:
            for task in rounds:
                task.submit(train(number, task.state), number + 1.0)
                task.finish(task.result)
                gate.set()
                if task.round == 0:
                    running.wait_until(lambda now: now.present[place.key(place.names[2])].expected or now.round > 1)

    patience = type(BRISK)(deadline=0.6, stage_deadline=5.0, wait=1.0, farewell=5.0)
    with place.coordinator(course(rounds=3), patience=patience) as running:
        with together([slow, partial(quick, 0), partial(quick, 1)]) as all_:
            [each.result(LIMIT_S) for each in all_]
        running.wait()
    summed = [len(ended.summed) for ended, _ in running.rounds]
    assert summed[0] == 2
    assert summed[-1] == 3
    assert seen[0] == (0, False)
    assert seen[-1] == (2, True)


def test_below_the_minimum_nothing_begins(place):
    with place.coordinator(course(min_parties=3, rounds=1)) as running:
        with together([partial(take_part, place, running.address, n) for n in range(2)]) as all_:
            running.wait_until(lambda now: len(now.present) == 2)
            threading.Event().wait(3 * BRISK.wait)  # longer than it would wait for more
            assert running.standing.phase == "gathering"
            means, _ = take_part(place, running.address, 2)
            [each.result(LIMIT_S) for each in all_]
        check(means, chain(1, range(3)))


def test_masked_sums_and_a_party_that_dies_after_its_update(place, tmp_path):
    place = Place(tmp_path / "five", 5)
    identities = load_identities(place.allow.folder)

    def sealer(number):
        return lambda terms: MaskSealer(terms, place.keys(place.names[number]), identities)

    def take(number):
        facts = {"sum": "mask", "stages": STAGES}
        with place.client(running.address, place.names[number], sealer=sealer(number), **facts) as rounds:
            if number == 4:  # it hands its update over, and is not heard of again
                task = next(iter(rounds))
                attempt_with(task, "agree")
                return None
            for task in rounds:
                opened = task.submit(train(number, None), number + 1.0)
                task.finish(np.round(opened.mean, 4).tobytes())
            return opened

    def attempt_with(task: RoundTask, until):
        put = task.client.link.put

        def stop(round_, attempt, item, blob):
            if item == until:
                raise ConnectionAbortedError
            put(round_, attempt, item, blob)

        task.client.link.put = stop
        with pytest.raises(ConnectionAbortedError):
            task.submit(train(4, None), 5.0)

    patience = type(BRISK)(deadline=5.0, stage_deadline=1.0, wait=0.3, farewell=1.0)
    plan = course(rounds=1, min_parties=3, stages=STAGES)
    with place.coordinator(plan, patience=patience, summer=lambda t: MaskSummer(t, identities)) as running:
        with together([partial(take, n) for n in range(5)]) as all_:
            opened = [each.result(LIMIT_S) for each in all_]
        running.wait()
    expected = mean_of([train(n, None) for n in range(5)], [n + 1.0 for n in range(5)])
    for one in opened[:4]:
        np.testing.assert_allclose(one.mean, expected, atol=1e-5)
        assert one.parties == 5
    assert running.rounds[0][0].kept


def test_a_rule_that_needs_every_update(place):
    def take(number):
        with place.client(running.address, place.names[number], sealer=None) as rounds:
            for task in rounds:
                result = task.exchange(b"update of %d" % number)
                task.finish(result)
        return unpack_parts(rounds.outcome.state, largest=100)

    def summer(terms):
        return Combiner(terms, lambda _, updates: pack_parts(updates), check=lambda *_: None, max_bytes=100)

    works = [partial(take, n) for n in range(3)]
    with place.coordinator(course(rounds=1), summer=summer) as running, together(works) as all_:
        results = [each.result(LIMIT_S) for each in all_]
    assert results == [{place.key(name): b"update of %d" % n for n, name in enumerate(place.names)}] * 3


def test_a_rule_that_fails_ends_the_attempt_and_not_the_federation(place):
    def broken(terms, updates):
        raise ZeroDivisionError

    def summer(terms):
        return Combiner(terms, broken, check=lambda *_: None, max_bytes=100)

    def take(number):
        with place.client(running.address, place.names[number], sealer=None) as rounds:
            return [task.exchange(b"update") for task in rounds]

    with place.coordinator(course(rounds=1, attempts=2), summer=summer) as running:
        with together([partial(take, n) for n in range(2)]) as all_:
            assert [each.result(LIMIT_S) for each in all_] == [[None], [None]]
        running.wait()
    ended = running.rounds[0][0]
    assert (ended.kept, ended.attempts) == (False, 2)
    assert "ZeroDivisionError" in ended.reason


def test_the_plain_sum_of_the_library(place):
    with place.coordinator(course(rounds=1), summer=PlainSummer) as running:
        works = [partial(take_part, place, running.address, n, sealer=PlainSealer) for n in range(3)]
        with together(works) as all_:
            for each in all_:
                check(each.result(LIMIT_S)[0], chain(1, range(3)))


class Mistaken(ToySealer):
    """A sealer that finds every result wrong."""

    def open(self, result):
        raise PeerError("This is no mean.")


def test_a_result_that_the_parties_do_not_believe_never_stands(place):
    with place.coordinator(course(rounds=1, attempts=2)) as running:
        works = [partial(take_part, place, running.address, n, sealer=Mistaken) for n in range(2)]
        with together(works) as all_:
            assert [each.result(LIMIT_S)[0] for each in all_] == [[], []]
        running.wait()
    assert not running.rounds[0][0].kept
    assert running.rounds[0][0].state is None


class Brittle(ToySummer):
    """A sum that an update breaks in a way that nobody has thought of."""

    def accept(self, party, blob):
        super().accept(party, blob)
        if np.frombuffer(blob, np.float32, offset=8)[0] == 2.0:
            raise struct.error("what a parser may raise")


def test_an_update_that_breaks_the_sum_ends_neither_the_round_nor_the_coordinator(place):
    patience = type(BRISK)(deadline=5.0, stage_deadline=1.0, wait=0.3, farewell=1.0)
    plan = course(rounds=1)
    with place.coordinator(plan, patience=patience, summer=Brittle) as running:
        works = [partial(take_part, place, running.address, n) for n in range(3)]
        with together(works) as all_:
            error = all_[2].exception(LIMIT_S)
            assert isinstance(error, RefusedError)
            assert error.code == "internal"
            for each in all_[:2]:
                check(each.result(LIMIT_S)[0], chain(1, range(2)))
