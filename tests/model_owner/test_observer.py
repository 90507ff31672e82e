"""What an observer is told: each session once, each answer with its size, each refusal with its code."""

from __future__ import annotations

import asyncio
import logging
from contextlib import closing

import pytest
import torch

from model_owner.observer import NoObserver, Observers, PassingAccount, Served, SessionFacts
from splitfl.errors import RefusedError
from splitfl.link import TrunkRequest
from splitfl.wire.keys import fingerprint, load_public
from tests.live.owner import PARTIES
from tests.model_owner.serving import raw, serving


class Notes(NoObserver):
    """Writes down what it is told."""

    def __init__(self):
        self.opened, self.ended, self.served, self.refusals, self.work = [], [], [], [], []

    def session_opened(self, facts):
        self.opened.append(facts)

    def session_ended(self, facts, why, seconds):
        assert seconds >= 0
        self.ended.append((facts, why))

    def request_served(self, served):
        self.served.append(served)

    def refused(self, code, session):
        self.refusals.append((code, session))

    def work_done(self, waited_s, took_s):
        self.work.append((waited_s, took_s))


@pytest.fixture
def notes():
    return Notes()


def hidden(trunk, rows, length):
    return torch.randn(rows, length, trunk.plan.width, generator=torch.Generator().manual_seed(8))


def watch(owner, notes):
    owner.do(setattr, owner.server, "observer", notes)
    owner.do(setattr, owner.server.scheduler, "_observer", notes)


def test_what_a_session_does_is_told_once(trunk, tmp_path, notes):
    with serving(trunk, tmp_path) as owner:
        watch(owner, notes)
        with closing(owner.session()) as session:
            output, step = session.forward(TrunkRequest(hidden=hidden(trunk, 2, 6), keep=True))
            session.backward(step, torch.ones_like(output))
            session.forward(TrunkRequest(hidden=hidden(trunk, 1, 5), cache=1))
            session.forward(TrunkRequest(hidden=hidden(trunk, 1, 1), cache=1, past=5))
        owner.until(lambda: bool(notes.ended))
    (facts,) = notes.opened
    assert facts.party == PARTIES[0]
    assert facts.fingerprint == fingerprint(load_public(owner.keys / f"{PARTIES[0]}.key"))
    assert notes.ended == [(facts, "closed")]
    assert [(each.work, each.tokens) for each in notes.served] == [
        ("forward", 12), ("backward", 12), ("forward", 5), ("decode", 1),
    ]  # fmt: skip
    width = 4 * trunk.plan.width
    for each in notes.served:
        assert each.session == facts.name
        for size in (each.bytes_in, each.bytes_out):
            assert each.tokens * width < size < each.tokens * width + 2000  # headers
    assert len(notes.work) == 4
    assert all(waited >= 0 and took > 0 for waited, took in notes.work)


def test_how_sessions_end(tiny_llama, trunk, tmp_path, notes):
    with serving(trunk, tmp_path) as owner:
        watch(owner, notes)
        with closing(owner.session(PARTIES[1])) as leaving:
            (owner.keys / "parties" / f"{PARTIES[1]}.key").unlink()
            owner.do(owner.server.reload_admission)
            with pytest.raises(RefusedError):
                leaving.forward(TrunkRequest(hidden=hidden(trunk, 1, 2)))
        staying = owner.session()
        with raw(owner, tiny_llama) as other:
            other.send(b"no header")
            other.answer()
        owner.stop()
        owner.join()
        staying.close()
    assert [why for _, why in notes.ended] == ["revoked", "stopped"]
    assert {code for code, _ in notes.refusals} >= {"revoked", "malformed"}


def test_one_that_fails_does_not_keep_the_others_from_hearing(notes, caplog):
    class Broken(NoObserver):
        def refused(self, code, session):
            raise ValueError("broken")

    both = Observers([Broken(), notes])
    with caplog.at_level(logging.ERROR, logger="splitfl.owner"):
        both.refused("busy", None)
    assert notes.refusals == [("busy", None)]
    assert "an observer failed" in caplog.text


def test_every_message_is_passed_on_to_all(notes):
    second = Notes()
    both = Observers([notes, second])
    facts = SessionFacts(name="a", party="p", fingerprint="f", protocol="split", wire_dtype="float32")
    served = Served(session="a", party="p", work="forward", tokens=1, bytes_in=2, bytes_out=3, seconds=0.1)
    both.session_opened(facts)
    both.request_served(served)
    both.work_done(0.1, 0.2)
    both.batch_done(2, 3, 4)
    both.session_ended(facts, "closed", 1.0)
    for one in (notes, second):
        assert (one.opened, one.served, one.work, one.ended) == ([facts], [served], [(0.1, 0.2)], [(facts, "closed")])


def test_an_account_that_is_forgotten():
    account = PassingAccount()
    account.charge("hospital", 5)
    account.charge("hospital", 7)
    asyncio.run(account.secured("hospital"))
    assert (account.spent_tokens("hospital"), account.spent_tokens("clinic")) == (12, 0)
