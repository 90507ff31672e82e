"""Who is let into a federation and with what, and what lies on the disk afterwards."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from party.round_files import RoundFiles
from splitfl.aggregation.sums import STAGES
from splitfl.errors import DataError, RefusedError, ResourceError, UnreachableError, UsageError
from splitfl.wire.keys import load_keys, new_keys
from tests.rounds.places import BRISK, LIMIT_S, Place, chain, check, course, take_part, together
from tests.rounds.plain_sum import PlainSealer as ToySealer


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path, 3)


# ---- who is let in, and with what


def test_a_stranger_is_told_so(place, tmp_path):
    new_keys("p00", tmp_path / "elsewhere")
    with place.coordinator() as running:
        place.keys = lambda name: load_keys(tmp_path / "elsewhere" / f"{name}.key_secret")
        with pytest.raises(RefusedError) as caught, place.client(running.address, "p00"):
            pass
    assert caught.value.code == "revoked"


@pytest.mark.parametrize(
    "changes",
    [{"layout": "other"}, {"base": "other"}, {"rule": "flora"}, {"sum": "mask"}, {"stages": STAGES}, {"lengths": (7,)}],
)
def test_other_facts_than_the_first_partys_are_refused(place, changes):
    with place.coordinator() as running, place.client(running.address, "p00"):
        with pytest.raises(RefusedError) as caught, place.client(running.address, "p01", **changes):
            pass
        assert caught.value.code == "facts"
        assert next(iter(changes)) in str(caught.value)


def test_facts_that_the_operator_has_fixed(place):
    with place.coordinator(pinned={"layout": "theirs"}) as running:
        with pytest.raises(RefusedError), place.client(running.address, "p00"):
            pass
        with place.client(running.address, "p00", layout="theirs"):
            assert running.standing.present


def test_an_update_that_could_be_too_large_is_refused_before_it_is_made(place):
    with place.coordinator() as running:
        client = place.client(running.address, "p00", lengths=(1 << 26,))
        with pytest.raises(RefusedError) as caught, client:
            pass
    assert caught.value.code == "facts"


@pytest.mark.parametrize(
    ("vector", "weight", "error"),
    [
        (np.full(6, np.nan, np.float32), 1.0, DataError),
        (np.full(6, np.inf, np.float32), 1.0, DataError),
        (np.zeros(7, np.float32), 1.0, DataError),
        (np.zeros((2, 3), np.float32), 1.0, DataError),
        (np.zeros(6, np.float32), 0.0, UsageError),
        (np.zeros(6, np.float32), 1e9, UsageError),
    ],
)
def test_an_update_that_is_none_never_leaves(place, vector, weight, error):
    with place.coordinator(course(min_parties=1)) as running, place.client(running.address, "p00") as rounds:
        task = next(iter(rounds))
        with pytest.raises(error):
            task.submit(vector, weight)
        assert running.standing.phase == "training"


class Loud(ToySealer):
    """A party whose update is beyond every bound, whatever its own side has checked."""

    def submit(self, vector, weight, adverts, shares):
        return super().submit(np.full_like(vector, np.nan), weight, adverts, shares)


def test_an_update_that_the_sum_refuses_is_told_to_the_party_and_harms_nobody_else(place):
    patience = type(BRISK)(deadline=5.0, stage_deadline=1.0, wait=0.3, farewell=1.0)
    with place.coordinator(course(rounds=1), patience=patience) as running:
        works = [partial(take_part, place, running.address, n) for n in range(2)]
        works.append(partial(take_part, place, running.address, 2, sealer=Loud))
        with together(works) as all_:
            with pytest.raises(RefusedError) as caught:
                all_[2].result(LIMIT_S)
            assert caught.value.code == "rejected"
            for each in all_[:2]:
                check(each.result(LIMIT_S)[0], chain(1, range(2)))


def test_nobody_there(place):
    with pytest.raises(UnreachableError), place.client("tcp://127.0.0.1:9", "p00", timeout_s=0.3):
        pass


# ---- what lies on the disk


def test_a_federation_is_not_begun_over_another_one(place):
    with place.coordinator(course(rounds=1)) as running, place.client(running.address, "p00"):
        with pytest.raises(ResourceError, match="in use"), place.coordinator(resume=True):
            pass
        federation = running.standing.federation
    with pytest.raises(UsageError, match="already"), place.coordinator():
        pass
    with place.coordinator(resume=True) as running:
        assert running.standing.federation == federation
        assert running.engine.facts is not None
    with pytest.raises(UsageError, match="another rule"), place.coordinator(course(stages=STAGES), resume=True):
        pass


def test_blobs_of_a_round_are_gone_when_it_is_over(place):
    with place.coordinator(course(rounds=2)) as running:
        with together([partial(take_part, place, running.address, n, scores=(1.0, 0.5)) for n in range(3)]) as all_:
            [each.result(LIMIT_S) for each in all_]
        running.wait()
        left = {path.name for path in (place.path / "state" / "blobs").iterdir() if path.is_file()}
        assert left == {running.standing.state, running.standing.best.state}
        assert len(left) == 2


def test_an_update_that_was_announced_is_the_one_that_goes_out(tmp_path):
    files = RoundFiles(tmp_path / "work")
    _, first = files.save("f" * 32, 3, "vector", b"1234", 1.0)
    note, again = files.save("f" * 32, 3, "vector", b"5678", 2.0)
    assert (first, again, note.weight) == (b"1234", b"1234", 1.0)
    assert files.saved("f" * 32, 4) is None
    assert files.saved("e" * 32, 3) is None
    (tmp_path / "work" / "update.bin").write_bytes(b"torn")
    assert files.saved("f" * 32, 3) is None
    (tmp_path / "work" / "update.json").write_bytes(b"{}")
    with pytest.raises(DataError):
        files.saved("f" * 32, 3)
