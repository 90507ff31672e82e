"""A query budget across a crash: every token that was answered counts, whatever became of the owner."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from contextlib import closing

import pytest
import torch

from model_owner.quotas import Quotas
from model_owner.refusals import Refusal
from model_owner.state import Database, Keeper, keeper
from model_owner.watch import Watch
from splitfl.errors import RefusedError
from splitfl.link import TrunkRequest
from tests.live.owner import PARTIES
from tests.model_owner.serving import serving

QUOTAS = f"[parties.{PARTIES[0]}]\ntotal_tokens = 30\n"


def test_a_budget_outlives_the_owner(trunk, tmp_path):
    (tmp_path / "parties.toml").write_text(QUOTAS, encoding="utf-8")
    hidden = torch.randn(2, 6, trunk.plan.width, generator=torch.Generator().manual_seed(8))
    state, crashed = tmp_path / "state.sqlite", tmp_path / "crashed.sqlite"
    first = Keeper(Database(state, server="owner"))
    with serving(trunk, tmp_path) as owner:
        owner.do(setattr, owner.server, "quotas", Quotas(tmp_path / "parties.toml", first))
        with closing(owner.session()) as session:
            for _ in range(2):
                session.forward(TrunkRequest(hidden=hidden))
            for end in ("", "-wal"):  # what a kill at this moment would leave on the disk
                shutil.copy(f"{state}{end}", f"{crashed}{end}")
            with pytest.raises(RefusedError) as refused:
                session.forward(TrunkRequest(hidden=hidden))
            assert refused.value.code == "quota"
            session.forward(TrunkRequest(hidden=hidden[:1]))  # what is left
        with closing(owner.session(PARTIES[1])) as other:  # has none, and is counted all the same
            for _ in range(3):
                other.forward(TrunkRequest(hidden=hidden))
        watch = Watch(observer=first, account=first, keeper=first, metrics=_Metrics())
        watch.attach(owner.server)
        look = watch.metrics.look()
        assert (look.spent, look.budgets) == ({PARTIES[0]: 30, PARTIES[1]: 36}, {PARTIES[0]: 30})
    first.close()
    with closing(Keeper(Database(crashed, server="owner"))) as again, serving(trunk, tmp_path) as owner:
        assert again.spent_tokens(PARTIES[0]) == 24
        owner.do(setattr, owner.server, "quotas", Quotas(tmp_path / "parties.toml", again))
        with closing(owner.session()) as session, pytest.raises(RefusedError) as refused:
            session.forward(TrunkRequest(hidden=hidden))
        assert refused.value.code == "quota"


def test_an_answer_that_did_not_leave_is_not_charged(tmp_path, monkeypatch):
    monkeypatch.setattr(keeper, "SECURE_S", 0.2)
    (tmp_path / "parties.toml").write_text(QUOTAS, encoding="utf-8")
    with closing(Keeper(Database(tmp_path / "s"))) as one:
        quotas = Quotas(tmp_path / "parties.toml", one)
        with closing(sqlite3.connect(tmp_path / "s", isolation_level=None)) as other:
            other.execute("ALTER TABLE charges RENAME TO hidden")
            for _ in range(3):
                with pytest.raises(Refusal):
                    asyncio.run(quotas.settle(quotas.admit(PARTIES[0], 10, 100)))
            assert one.spent_tokens(PARTIES[0]) == 0
            other.execute("ALTER TABLE hidden RENAME TO charges")
        monkeypatch.setattr(keeper, "SECURE_S", 30.0)
        asyncio.run(quotas.settle(quotas.admit(PARTIES[0], 10, 100)))
        assert one.spent_tokens(PARTIES[0]) == 10
    with closing(Keeper(Database(tmp_path / "s"))) as again:
        assert again.spent_tokens(PARTIES[0]) == 10


class _Metrics:
    look = None
