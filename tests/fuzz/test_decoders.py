"""No bytes bring a decoder to anything but its declared errors: sound, kept, changed and random ones."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.packing import LONGEST, change, pack, unpack
from tests.fuzz.seeds import CORPUS, of_target
from tests.fuzz.targets import TARGETS

BY_NAME = {target.name: (number, target) for number, target in enumerate(TARGETS)}
QUICK = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("name", BY_NAME)
def test_what_once_was_worth_keeping_is_read_or_refused(name):
    number, target = BY_NAME[name]
    inputs = of_target(number)
    assert inputs
    for data in inputs:
        target.read(unpack(data)[1])


@pytest.mark.parametrize("name", BY_NAME)
@QUICK
@given(data=st.data())
def test_changed_inputs_are_read_or_refused(name, data):
    """A few changes to a sound input, each in a field, a length or the order of frames."""
    number, target = BY_NAME[name]
    changed = data.draw(st.sampled_from(of_target(number)))
    draw = random.Random(data.draw(st.integers(0, 2**32)))
    for _ in range(draw.randrange(1, 5)):
        changed = change(changed, draw, lambda whole: _with_another_byte(whole, draw))
    target.read(unpack(changed)[1])


@pytest.mark.parametrize("name", BY_NAME)
@QUICK
@given(frames=st.lists(st.binary(max_size=120), min_size=1, max_size=4))
def test_random_bytes_are_read_or_refused(name, frames):
    BY_NAME[name][1].read(frames)


@given(st.integers(0, 255), st.lists(st.binary(max_size=60), min_size=1, max_size=9))
def test_an_input_is_taken_apart_as_it_was_put_together(target, frames):
    assert unpack(pack(target, frames))[0] == target
    assert unpack(pack(target, [*frames, b""]))[1][: len(frames)] == frames or len(frames) == 9


def test_the_corpus_is_small():
    files = list(CORPUS.glob("*.bin"))
    assert files
    assert sum(file.stat().st_size for file in files) < 200_000
    assert max(file.stat().st_size for file in files) <= LONGEST


def _with_another_byte(whole, draw):
    if not whole:
        return whole
    place = draw.randrange(len(whole))
    return whole[:place] + bytes([draw.randrange(256)]) + whole[place + 1 :]
