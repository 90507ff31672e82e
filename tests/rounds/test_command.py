"""`splitfl federate` as a person or a script meets it, and a crowd of parties at one coordinator."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest

from splitfl.aggregation.plain import PlainSealer
from splitfl.aggregation.rules import rule_named
from splitfl.config_federation import FederateSettings
from splitfl.errors import UsageError
from splitfl.rounds.schedule import place_of, sums_in
from tests.live.child import child, splitfl_here
from tests.rounds.places import LIMIT_S, Place, take_part, together

QUICK = ["--deadline", "20", "--stage-deadline", "20", "--wait", "0.5"]


@contextmanager
def federate(place, *words, code=0):
    """The command as a process, once it is ready; it must end by itself with this exit code."""
    options = [
        "--key",
        place.path / "owner.key_secret",
        "--parties",
        place.allow.folder,
        "--state",
        place.path / "state",
    ]
    what = ["--bind", "tcp://127.0.0.1:0", "--sum", "plain", "--rule", "fedit", "--clip", "10", *QUICK]
    with child(["-m", "splitfl", "federate", *options, *what, *words], place.path) as running:
        try:
            _, running.address, running.fingerprint = running.stdout.wait_for("ready ").split()
        except AssertionError:
            running.end()
            raise AssertionError(running.stderr.text) from None
        yield running
        assert running.wait() == code, running.stderr.text


def test_a_coordinator_needs_none_of_the_libraries_of_models():
    """They take seconds to load, more on a busy machine; no rule of the coordinator computes with a model."""
    code = (
        "import sys, model_owner.rounds.federate, model_owner.rounds.sums\n"
        "from splitfl.aggregation.rules import RULES, rule_named\n"
        "[rule_named(name, {}) for name in RULES]\n"
        "print(*sorted({'peft', 'transformers', 'datasets', 'accelerate', 'tenseal'} & set(sys.modules)), 'alone')"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_S, check=True)
    assert ran.stdout.split() == ["alone"]


def figures(path):
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    return {(each["case"], each["metric"]): each["value"] for each in results}


@pytest.mark.slow
def test_a_federation_from_begin_to_end(tmp_path):
    place = Place(tmp_path, 3)
    with federate(place, "--rounds", "3", "--json", tmp_path / "out.json") as running:
        works = [
            partial(take_part, place, running.address, n, scores=(0.2, 0.6, 0.4), sealer=PlainSealer) for n in range(3)
        ]
        with together(works) as all_:
            assert {len(each.result(LIMIT_S)[0]) for each in all_} == {3}
    found = figures(tmp_path / "out.json")
    assert found["federation", "best round"] == 1
    assert found["federation", "best score"] == pytest.approx(0.6)
    assert found["round 1", "score of the parties' own models"] == pytest.approx(1.6)
    assert [found[f"round {n}", "verdict"] for n in range(3)] == ["kept"] * 3
    assert found["round 2", "updates summed"] == 3
    assert found["round 2", "bytes received"] > 3 * 24
    told = running.stderr.text
    for words in ("p01 has entered", "round 0, attempt 0: training", "round 1 is kept: 3 updates", "best", "p02"):
        assert words in told
    assert "all 3 rounds are done" in told
    assert running.fingerprint.startswith("SHA256:")


@pytest.mark.slow
def test_ctrl_c_keeps_everything_and_resume_goes_on(tmp_path):
    place = Place(tmp_path, 2)
    with federate(place, "--rounds", "2", code=130) as running:
        with place.client(running.address, "p00", sealer=PlainSealer):
            running.stderr.wait_for("p00 has entered")
            running.process.send_signal(signal.SIGINT)
            assert running.wait() == 130
        assert "--resume" in running.stderr.text
    again = ["--key", place.path / "owner.key_secret", "--parties", place.allow.folder, "--state", place.path / "state"]
    splitfl_here("federate", *again, "--sum", "plain", "--rule", "fedit", "--clip", "10", code=2)
    with federate(place, "--rounds", "2", "--resume") as running:
        works = [partial(take_part, place, running.address, n, sealer=PlainSealer) for n in range(2)]
        with together(works) as all_:
            assert {len(each.result(LIMIT_S)[0]) for each in all_} == {2}
        assert running.wait() == 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_fifty_parties_and_a_coordinator_whose_memory_does_not_grow_with_them(tmp_path):
    parties, length = 50, 500_000  # 2 MB an update, 100 MB all of them

    def take(number):
        vector = np.full(length, 0.01 * number, np.float32)
        facts = {"sealer": PlainSealer, "lengths": (length,), "timeout_s": 120.0}
        with place.client(running.address, place.names[number], **facts) as rounds:
            for task in rounds:
                opened = task.submit(vector, 1.0)
                assert opened.parties == parties
                np.testing.assert_allclose(opened.mean[::1000], 0.01 * (parties - 1) / 2, rtol=1e-5)
                assert task.finish(task.result)
        return True

    place = Place(tmp_path, parties)
    long = ["--deadline", "100", "--stage-deadline", "100", "--wait", "60", "--min-parties", str(parties)]
    with federate(place, "--rounds", "2", *long) as running:
        process = psutil.Process(running.process.pid)
        before, handles = process.memory_info().rss, process.num_fds()
        with together([partial(take, number) for number in range(parties)]) as all_:
            running.stderr.wait_for("round 0 is kept")
            after_one = peak(process.pid)
            running.stderr.wait_for("round 1 is kept")
            after_two = peak(process.pid)
            assert all(each.result(120) for each in all_)
        until = time.monotonic() + LIMIT_S
        while running.process.poll() is None and process.num_fds() > handles + 10 and time.monotonic() < until:
            time.sleep(0.02)
    print(f"before {before / 1e6:.0f} MB, peak {after_one / 1e6:.0f} MB, then {after_two / 1e6:.0f} MB")
    assert after_two - before < 80e6
    assert after_two - after_one < 20e6


def peak(number):
    status = Path(f"/proc/{number}/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


# ---- settings

PATHS = {"key": Path("k"), "parties": Path("p"), "state": Path("s")}


def test_what_is_refused_before_anything_begins():
    with pytest.raises(UsageError, match="protects nothing"):
        FederateSettings(**PATHS, sum="mask", min_parties=2)
    with pytest.raises(UsageError, match="--rounds"):
        FederateSettings(**PATHS, rounds=0)
    with pytest.raises(UsageError, match="--bind"):
        FederateSettings(**PATHS, bind="here")
    assert FederateSettings(**PATHS).fewest == 3
    assert FederateSettings(**PATHS, sum="plain").fewest == 2
    assert FederateSettings(**PATHS, sum="plain", min_parties=1).fewest == 1


def test_a_rule_that_needs_every_update_is_not_hidden_behind_a_sum(tmp_path, capsys):
    Place(tmp_path, 1)
    words = ["--key", tmp_path / "owner.key_secret", "--parties", tmp_path / "parties", "--state", tmp_path / "state"]
    splitfl_here("federate", *words, "--rule", "flora", code=2)
    assert "needs every party's factors" in capsys.readouterr().err
    splitfl_here("federate", *words, "--rule", "fedidt", code=2)
    assert "did you mean 'fedit'?" in capsys.readouterr().err
    assert not (tmp_path / "state").exists()


def test_a_folder_that_holds_something_else_is_refused(tmp_path, capsys):
    Place(tmp_path, 1)
    words = ["--key", tmp_path / "owner.key_secret", "--parties", tmp_path / "parties", "--state", tmp_path / "state"]
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "rounds.sqlite").write_bytes(b"no database at all, but quite long " * 100)
    splitfl_here("federate", *words, "--sum", "plain", "--resume", code=3)
    assert "damaged" in capsys.readouterr().err
    assert os.listdir(tmp_path / "state") == ["rounds.sqlite"]


def test_a_rule_with_several_sums_a_round_has_as_many_rounds_on_the_wire():
    fedit, fedlrt = rule_named("fedit"), rule_named("fedlrt")
    assert (sums_in(fedit, 5), place_of(fedit, 3)) == (5, (3, 0))
    steps = len(fedlrt.steps(0))
    assert steps > 1
    places = [place_of(fedlrt, number) for number in range(sums_in(fedlrt, 2))]
    assert places == [(round_, step) for round_ in range(2) for step in range(len(fedlrt.steps(round_)))]
