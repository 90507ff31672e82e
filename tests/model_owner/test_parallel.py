"""One trunk over several devices: whole layers, or shares of each; the same numbers, and one end for all."""

from __future__ import annotations

import os
import signal
from contextlib import closing, contextmanager

import msgspec
import psutil
import pytest
import torch

from model_owner.parallel import check_division, ranks_of_environment
from model_owner.trunk import LocalLink, Trunk
from party.connect import open_session
from splitfl.errors import ModelError, RefusedError, UnreachableError, UsageError
from splitfl.kit import open_kit, write_kit
from splitfl.link import TrunkRequest
from splitfl.load import load_config, load_trunk_side, quiet_library
from tests.families import make_config, save_model
from tests.live.child import child
from tests.live.owner import make_keys

BOUND = 1e-5  # of the largest number: shares are added up in another order


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    with quiet_library():
        save_model("llama", folder / "model")
        write_kit(folder / "model", folder / "kit", bottom=2, top=2)
    return folder, open_kit(folder / "kit").plan


def trunk_of(made, **placing):
    folder, plan = made
    with quiet_library():
        return Trunk(load_trunk_side(folder / "model", plan, dtype=torch.float32, **placing), plan)


def exercise(link, width):
    """A kept step with padding and its gradient, and a cache that is gone on from, cut back and gone on from again."""
    drawn = torch.Generator().manual_seed(4)
    hidden, gradient = torch.randn(2, 3, 9, width, generator=drawn)
    mask = torch.ones(3, 9, dtype=torch.uint8)
    mask[1, :4] = 0
    found = []
    for _ in range(2):
        output, step = link.forward(TrunkRequest(hidden=hidden, mask=mask, keep=True))
        found += [output, link.backward(step, gradient)]
    found.append(link.forward(TrunkRequest(hidden=hidden))[0])
    for past, new in ((0, 6), (6, 1), (7, 2), (5, 3)):
        found.append(link.forward(TrunkRequest(hidden=hidden[:, past : past + new], cache=1, past=past))[0])
    link.release(caches=(1,))
    return found


def assert_near(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert float((one - other).abs().max()) <= BOUND * float(other.abs().max())


def test_device_map_auto_on_a_machine_with_one_device_changes_nothing(made):
    plain, spread = trunk_of(made), trunk_of(made, placing={"device_map": "auto"})
    assert all(p.device.type == spread.device.type for p in spread.base.parameters())
    width = made[1].width
    for one, other in zip(exercise(LocalLink(spread), width), exercise(LocalLink(plain), width), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("family", "count", "words"),
    [
        ("llama", 3, "3 processes cannot share 4 attention heads evenly"),
        ("llama", 4, "4 processes cannot share 2 key and value heads evenly"),
        ("gpt2", 2, "no plan by which gpt2 layers are shared out"),
    ],
)
def test_what_cannot_be_shared_evenly_is_refused(made, family, count, words):
    config = make_config(family)
    plan = msgspec.structs.replace(made[1], model_type=config.model_type)
    with pytest.raises(UsageError, match=words):
        check_division(plan, config, count)


def test_what_can_be_shared_is_not_refused(made):
    check_division(made[1], load_config(made[0] / "model"), 2)


def test_alone_it_says_how_several_are_started(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UsageError, match="alone") as caught:
        ranks_of_environment("cpu")
    assert "torchrun" in caught.value.hint


def test_a_checkpoint_that_cannot_be_shared_says_so(made, tmp_path):
    with quiet_library():
        save_model("gpt2", tmp_path / "model")
        write_kit(tmp_path / "model", tmp_path / "kit", bottom=2, top=2)
    plan = open_kit(tmp_path / "kit").plan
    with pytest.raises(ModelError, match="could not be loaded"):
        load_trunk_side(tmp_path / "model", plan, dtype=torch.float32, placing={"device_map": "no such place"})


@contextmanager
def shared(made, folder, *, count=2):
    """Two processes of one owner; the child is ``torchrun``."""
    keys = make_keys(folder / "keys")
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "--module"]
    words += ["splitfl", "serve", "--model", made[0] / "model", "--kit", made[0] / "kit", "--bind", "tcp://127.0.0.1:0"]
    words += ["--key", keys / "owner.key_secret", "--parties", keys / "parties", "--tensor-parallel"]
    with child(words, folder) as running:
        yield running, keys


def session(made, keys, address, timeout_s=60.0):
    return open_session(
        made[1], address, owner_key=keys / "owner.key", key=keys / "hospital.key_secret", timeout_s=timeout_s
    )


@pytest.mark.long
def test_two_processes_compute_what_one_does_and_end_together(made, tmp_path):
    expected = exercise(LocalLink(trunk_of(made)), made[1].width)
    with shared(made, tmp_path) as (running, keys):
        address = running.stdout.wait_for("ready ").split()[-2]
        with closing(session(made, keys, address)) as link:
            assert_near(exercise(link, made[1].width), expected)
            with pytest.raises(
                RefusedError, match="no longer holds the cache"
            ):  # one that is refused leaves the processes in step
                link.forward(TrunkRequest(hidden=torch.zeros(1, 1, made[1].width), cache=9, past=3))
        assert running.end(60) in (0, 1), running.stderr.text  # torchrun's own word for being told to stop is 1


@pytest.mark.long
def test_a_process_that_dies_ends_the_step_and_the_owner_says_why(made, tmp_path):
    with shared(made, tmp_path) as (running, keys):
        address = running.stdout.wait_for("ready ").split()[-2]
        with closing(session(made, keys, address, timeout_s=10.0)) as link:
            hidden = torch.randn(2, 5, made[1].width)
            link.forward(TrunkRequest(hidden=hidden))
            processes = psutil.Process(running.process.pid).children()
            serving = next(p for p in processes if any(c.status == psutil.CONN_LISTEN for c in p.net_connections()))
            other = next(p for p in processes if p != serving)
            os.kill(other.pid, signal.SIGKILL)
            with pytest.raises((RefusedError, UnreachableError)):
                link.forward(TrunkRequest(hidden=hidden))
        assert running.wait() == 1
    assert "the others cannot go on without it" in running.stderr.text
