"""What only a process of its own can show: signals, exit codes, and a sudden end."""

from __future__ import annotations

import signal
import time
from contextlib import ExitStack, closing

import pytest
import torch

from splitfl.errors import RefusedError
from splitfl.link import TrunkRequest
from splitfl.wire.messages import Closed, ForwardDone, Refused
from tests.hostile.attacker import attacker
from tests.live.child import child
from tests.live.owner import PARTIES, Owner, make_keys, serve
from tests.model_owner.training import train

pytestmark = pytest.mark.slow


def test_a_running_owner_obeys_its_signals(tiny_llama, trunk, tmp_path):
    """SIGHUP: the allow-list is read again. SIGTERM: what is under way is answered, then everybody is told."""
    hidden = torch.randn(2, 6, trunk.plan.width, generator=torch.Generator().manual_seed(8))
    with serve(*tiny_llama, tmp_path, options=["--lease", "300"]) as owner:
        process, log = owner.running.process, owner.running.stderr
        with closing(owner.session(PARTIES[0])) as staying, closing(owner.session(PARTIES[1])) as leaving:
            leaving.forward(TrunkRequest(hidden=hidden))
            (owner.keys / "parties" / f"{PARTIES[1]}.key").unlink()
            started = time.monotonic()
            process.send_signal(signal.SIGHUP)
            log.wait_for(f"session of {PARTIES[1]} ended: its key was revoked")
            assert time.monotonic() - started < 2.0
            for attempt in (lambda: leaving.forward(TrunkRequest(hidden=hidden)), lambda: owner.session(PARTIES[1])):
                with pytest.raises(RefusedError) as refused:
                    attempt()
                assert refused.value.code == "revoked"
            assert torch.equal(
                staying.forward(TrunkRequest(hidden=hidden))[0], trunk.forward(TrunkRequest(hidden=hidden))
            )
        with attacker(owner, PARTIES[0]) as busy:
            busy.opened()
            for step in range(8):
                busy.forward(step, torch.zeros(64, 128, trunk.plan.width))
            busy.result()
            process.terminate()
            answers = [busy.answer() for _ in range(7)]
            assert all(isinstance(each, ForwardDone) or each.code == "draining" for each in answers)
            assert isinstance(answers[0], ForwardDone)
            assert not any(isinstance(each, Refused) and each.code != "draining" for each in answers)
            assert isinstance(busy.answer(), Closed)
            busy.greeted.clear()
            assert owner.running.wait(30) == 0
        assert "Traceback" not in log.text
        assert "stopped: 3 sessions" in log.text


def test_training_goes_on_when_the_owner_is_killed_and_started_again(tiny_llama, kit, undisturbed, tmp_path):
    model_dir, kit_dir = tiny_llama
    keys = make_keys(tmp_path / "keys")
    words = ["-m", "splitfl", "serve", "--model", model_dir, "--kit", kit_dir, "--key", keys / "owner.key_secret"]
    words += ["--parties", keys / "parties", "--bind"]
    with ExitStack() as stack:
        first = stack.enter_context(child([*words, "tcp://127.0.0.1:0"], tmp_path))
        address = first.stdout.wait_for("ready ").split()[1]

        def kill_and_start_again(step):
            if step == 2:
                first.process.kill()
                assert first.wait() == -signal.SIGKILL
                again = stack.enter_context(child([*words, address], tmp_path))
                assert again.stdout.wait_for("ready ").split()[1] == address

        owner = Owner(address=address, model_dir=model_dir, kit_dir=kit_dir, keys=keys, running=first)
        with closing(owner.session()) as session:
            train(kit, session, before_step=kill_and_start_again).assert_equals(undisturbed)
