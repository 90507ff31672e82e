"""One owner with narrow limits, an honest party that works all the time, and a look at the owner after each attack."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from model_owner.trunk import Trunk
from splitfl.kit import open_kit
from splitfl.load import load_trunk_side
from splitfl.wire.keys import load_keys
from tests.hostile.attacker import Attacker, attacker
from tests.hostile.honest import Honest
from tests.live.models import make_kit, save_tiny
from tests.live.owner import PARTIES, Owner, serve

LIMITS = {"--max-tokens": "512", "--max-sessions": "6", "--memory-budget": "2MB", "--log-level": "debug"}
MARKER = 1234.5678
"""Occurs in what attackers send, and may occur in no log."""


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Model directory and kit."""
    folder = tmp_path_factory.mktemp("llama")
    model_dir = save_tiny("llama", folder / "model")
    return model_dir, make_kit(model_dir, folder / "kit")


@pytest.fixture(scope="session")
def trunk(tiny_llama: tuple[Path, Path]) -> Trunk:
    """The same trunk as the owner's, in this process."""
    plan = open_kit(tiny_llama[1]).plan
    return Trunk(load_trunk_side(tiny_llama[0], plan, dtype=torch.float32), plan)


@pytest.fixture(scope="session")
def owner(tiny_llama: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Owner]:
    """The owner that is attacked."""
    options = [word for pair in LIMITS.items() for word in pair]
    with serve(*tiny_llama, tmp_path_factory.mktemp("owner"), options=options) as running:
        yield running


@pytest.fixture(scope="session")
def _honest(owner: Owner, trunk: Trunk) -> Iterator[Honest]:
    with closing(owner.session()) as session:
        yield Honest(session, trunk)


@pytest.fixture
def honest(_honest: Honest, owner: Owner) -> Iterator[Honest]:
    """The honest party, idle; after the test it is served once more, and the owner's log is looked through."""
    before = len(owner.running.stderr.text)
    yield _honest
    _honest.round()
    check_log(owner, before)


@pytest.fixture
def besieged(honest: Honest) -> Iterator[Honest]:
    """The honest party, at work while the test runs."""
    with honest.working():
        yield honest


@pytest.fixture
def foe(owner: Owner, besieged: Honest) -> Iterator[Attacker]:
    """An attacker without a session, while the honest party works."""
    with attacker(owner) as one:
        yield one


@pytest.fixture
def lone_foe(owner: Owner, honest: Honest) -> Iterator[Attacker]:
    """An attacker while the honest party is idle, so that what it can take is always the same."""
    with attacker(owner) as one:
        yield one


def check_log(owner: Owner, since: int) -> None:
    """The owner lives, and since then it met no error of its own and wrote down no value, no row and no key."""
    assert owner.running.process.poll() is None, owner.running.stderr.text
    log = owner.running.stderr.text[since:]
    assert "Traceback" not in log, log
    assert str(MARKER)[:6] not in log
    assert owner.keys is not None
    for name in ("owner", *PARTIES):
        pair = load_keys(owner.keys / f"{name}.key_secret")
        assert pair.public.decode() not in log
        assert pair.secret.decode() not in log
