"""Quotas, deadlines and leases at a whole owner, over real sockets."""

from __future__ import annotations

import time

import pytest
import torch

from model_owner.quotas import Quotas
from splitfl.errors import RefusedError
from splitfl.link import TrunkRequest
from splitfl.wire.messages import Forward
from tests.live.owner import PARTIES
from tests.model_owner.serving import serving


@pytest.fixture
def hidden(trunk):
    torch.manual_seed(5)
    return torch.randn(2, 8, trunk.plan.width)


def limited(owner, tmp_path, text):
    path = tmp_path / "parties.toml"
    path.write_text(text, encoding="utf-8")
    owner.server.quotas = Quotas(path)


def test_a_party_waits_for_its_rate_and_gets_the_same_answer(trunk, tmp_path, hidden):
    """32 tokens in advance, then 64 a second; the third request says the same bytes once more after a pause."""
    with serving(trunk, tmp_path) as owner:
        limited(owner, tmp_path, f"[parties.{PARTIES[0]}]\ntokens_per_second = 16")
        with owner.session() as session:
            expected, _ = session.forward(TrunkRequest(hidden=hidden))
            session.forward(TrunkRequest(hidden=hidden))
            session.forward(TrunkRequest(hidden=hidden))
            begun = time.monotonic()
            output, _ = session.forward(TrunkRequest(hidden=hidden))
            assert time.monotonic() - begun > 0.5
        assert torch.equal(output, expected)
        assert owner.server.counters.refusals["busy"] >= 1


def test_a_pause_beyond_the_timeout_ends_with_the_reason(trunk, tmp_path, hidden):
    with serving(trunk, tmp_path) as owner:
        limited(owner, tmp_path, f"[parties.{PARTIES[0]}]\ntokens_per_second = 0.1")
        with owner.session(timeout_s=2.0) as session:
            session.forward(TrunkRequest(hidden=hidden))
            with pytest.raises(RefusedError, match="tokens a second") as no:
                session.forward(TrunkRequest(hidden=hidden))
        assert (no.value.code, no.value.exit_code) == ("busy", 8)


def test_a_spent_budget_ends_with_quota_and_a_kept_step_still_has_its_backward(trunk, tmp_path, hidden):
    """16 positions, kept: 32 tokens, the backward paid for. The other party does not notice."""
    with serving(trunk, tmp_path) as owner:
        limited(owner, tmp_path, f"[parties.{PARTIES[0]}]\ntotal_tokens = 40")
        with owner.session() as session:
            output, step = session.forward(TrunkRequest(hidden=hidden, keep=True))
            with pytest.raises(RefusedError, match="budget of 40 tokens is spent: 8 are left") as no:
                session.forward(TrunkRequest(hidden=hidden))
            assert (no.value.code, no.value.exit_code) == ("quota", 8)
            assert session.backward(step, torch.ones_like(output)).shape == hidden.shape
            assert owner.server.quotas.account.spent_tokens(PARTIES[0]) == 32
        with owner.session(PARTIES[1]) as other:
            other.forward(TrunkRequest(hidden=hidden))


def test_what_could_not_be_computed_is_not_charged(trunk, tmp_path, hidden):
    hidden[0, 0, 0] = torch.inf
    with serving(trunk, tmp_path) as owner:
        limited(owner, tmp_path, f"[parties.{PARTIES[0]}]\ntotal_tokens = 100")
        with owner.session() as session, pytest.raises(RefusedError) as no:
            session.forward(TrunkRequest(hidden=hidden))
        assert no.value.code == "not_finite"
        assert owner.server.quotas.account.spent_tokens(PARTIES[0]) == 0


def test_sessions_of_a_party_are_as_many_as_its_quota_says(trunk, tmp_path):
    with serving(trunk, tmp_path) as owner:
        limited(owner, tmp_path, f"[parties.{PARTIES[0]}]\nmax_sessions = 1")
        with owner.session():
            with pytest.raises(RefusedError, match="1 sessions of this party") as no:
                owner.session()
            assert no.value.code == "busy"
            owner.session(PARTIES[1]).close()


def test_an_idle_cache_goes_and_is_filled_again_with_the_same_bytes(trunk, tmp_path, hidden):
    crossed = []
    with (
        serving(trunk, tmp_path, cache_lease_s=1.0) as owner,
        owner.session(tap=lambda *one: crossed.append(one)) as one,
    ):
        expected, _ = one.forward(TrunkRequest(hidden=hidden))
        one.forward(TrunkRequest(hidden=hidden[:, :6], cache=1))
        assert owner.budget.used
        owner.until(lambda: not owner.budget.used)
        output, _ = one.forward(TrunkRequest(hidden=hidden[:, 6:], cache=1, past=6))
    assert torch.allclose(output, expected[:, 6:], atol=1e-5)
    sent = [bytes(frames[1]) for way, frames in crossed if way == "sent" and len(frames) > 1]
    assert sent.count(bytes(hidden[:, :6].contiguous().numpy())) == 2


def test_a_request_that_its_party_gave_up_is_not_computed(trunk, tmp_path, hidden):
    with serving(trunk, tmp_path, deadline_s=0.2) as owner, owner.session() as session:
        before = owner.server.counters.forwards
        with owner.busy():
            session._steps += 1  # a request is sent, and nobody waits for it
            session._ask(Forward(session=session.terms.session, step=session._steps), {"hidden": hidden})
            owner.until(lambda: any(held.under_way for held in owner.server.table))
            time.sleep(0.3)
        owner.until(lambda: not owner.server._tasks)
        assert owner.server.counters.forwards == before
        assert owner.server.counters.refusals["busy"] == 1
