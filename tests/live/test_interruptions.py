"""A run that is broken off goes on from its checkpoint and ends with the very same adapter."""

from __future__ import annotations

import signal

import pytest
import torch

from splitfl.errors import INTERRUPTED_EXIT_CODE
from tests.live.child import child, splitfl_here
from tests.live.relay import relay
from tests.live.runs import SAVE_EVERY, STEPS, adapter_in, checkpoints, events

pytestmark = pytest.mark.slow


@pytest.fixture
def share(finished):
    """Bytes that a run has sent when this share of it is done, the scoring before training included."""

    def of(part):
        [end] = events(finished, "end")
        trained = [record["bytes_sent"] for record in events(finished, "train")]
        before = end["bytes_sent"] - sum(trained)
        return int(before / 2 + sum(trained[: round(part * STEPS)]))

    return of


def start(owner, config, folder, address, *more):
    words = ["tune", *owner.link(address=address), "--config", config, "--out", "run", *more]
    return child(["-m", "splitfl", *words], folder)


def assert_same_adapter(run, finished):
    came, expected = adapter_in(run), adapter_in(finished)
    assert came.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(came[name], expected[name])] == []


def test_a_killed_run_resumes_to_the_same_adapter(owner, tune_config, finished, share, tmp_path):
    with relay(owner.address, hold_at=share(0.85)) as held, start(owner, tune_config, tmp_path, held.address) as party:
        held.wait_until_holding()
        assert party.process.poll() is None
        party.process.send_signal(signal.SIGKILL)
        assert party.wait() == -signal.SIGKILL
    run = tmp_path / "run"
    assert not (run / "adapter").exists()
    last = int(checkpoints(run)[-1].rpartition("-")[2])
    assert SAVE_EVERY <= last < STEPS
    assert events(run, "train")[-1]["step"] > last, "nothing was lost: the kill came right after a checkpoint"
    splitfl_here("tune", *owner.link(), "--config", tune_config, "--out", run, "--resume")
    assert events(run, "start")[-1]["resumed_from"] == f"checkpoint-{last}"
    assert_same_adapter(run, finished)


def test_ctrl_c_keeps_a_checkpoint_and_closes_the_session(owner, tune_config, finished, share, tmp_path):
    with relay(owner.address, hold_at=share(0.5)) as held, start(owner, tune_config, tmp_path, held.address) as party:
        held.wait_until_holding()
        closed = owner.running.stderr.text.count("session closed")
        party.process.send_signal(signal.SIGINT)
        held.release()
        assert party.wait() == INTERRUPTED_EXIT_CODE
    run, told = tmp_path / "run", party.stderr.text
    step = events(run, "train")[-1]["step"]
    assert 1 < step < STEPS
    assert f"Stopped at step {step} of {STEPS}." in told
    assert "--resume" in told
    assert "Traceback" not in told
    assert checkpoints(run)[-1] == f"checkpoint-{step}"
    assert not (run / "adapter").exists()
    owner.running.stderr.wait_for("session closed", count=closed + 1)
    splitfl_here("tune", *owner.link(), "--config", tune_config, "--out", run, "--resume")
    assert_same_adapter(run, finished)


def test_a_run_is_neither_overwritten_nor_resumed_by_mistake(owner, tune_config, finished, tmp_path, capsys):
    words = ["tune", *owner.link(), "--config", tune_config]
    before = (finished / "run.jsonl").read_bytes()
    splitfl_here(*words, "--out", finished, code=2)
    assert "already holds a run" in capsys.readouterr().err
    splitfl_here(*words, "--out", tmp_path / "none", "--resume", code=2)
    assert "holds no run to resume" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    assert (finished / "run.jsonl").read_bytes() == before
