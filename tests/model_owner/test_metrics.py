"""What Prometheus is shown: figures that are those of the server, labels that stay few, an answer about health."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import closing, contextmanager

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from model_owner.metrics import MOST_PARTIES, OTHERS, Look, Metrics, MetricsServer
from model_owner.observer import Served, SessionFacts
from splitfl.errors import ResourceError
from splitfl.link import TrunkRequest
from tests.model_owner.serving import serving

LABELS = {"work", "party", "why", "direction", "code", "le", "version"}


@contextmanager
def shown(metrics, host="127.0.0.1"):
    server = MetricsServer(metrics, host, 0)
    try:
        yield server.address
    finally:
        server.close()


def fetch(address, path):
    with urllib.request.urlopen(f"{address}{path}", timeout=30) as answer:  # noqa: S310
        return answer.status, answer.read().decode()


def values(text):
    """Sample name and labels to value."""
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def served(party="hospital", **changes):
    facts = {"session": "s", "party": party, "work": "forward", "tokens": 6, "bytes_in": 10, "bytes_out": 12}
    return Served(**facts | {"seconds": 0.03} | changes)


def test_the_figures_of_a_server_that_works(trunk, tmp_path):
    metrics = Metrics()
    with serving(trunk, tmp_path) as owner:
        owner.do(setattr, owner.server, "observer", metrics)
        owner.do(setattr, owner.server.scheduler, "_observer", metrics)
        hidden = torch.randn(2, 6, trunk.plan.width, generator=torch.Generator().manual_seed(8))
        with closing(owner.session()) as session:
            output, step = session.forward(TrunkRequest(hidden=hidden, keep=True))
            session.backward(step, torch.ones_like(output))
            counted = owner.do(lambda: (owner.server.socket.bytes_received, owner.server.socket.bytes_sent))
        owner.until(lambda: len(owner.server.table) == 0)
    with shown(metrics) as address:
        status, text = fetch(address, "/metrics")
    assert status == 200
    found = values(text)
    assert found["splitfl_sessions_opened_total", ("party", "hospital")] == 1
    assert found["splitfl_sessions_ended_total", ("why", "closed")] == 1
    assert found["splitfl_tokens_total", ("work", "forward")] == 12
    assert found["splitfl_tokens_total", ("work", "backward")] == 12
    assert found["splitfl_party_tokens_total", ("party", "hospital")] == 24
    assert found["splitfl_step_seconds_count",] == found["splitfl_queue_seconds_count",] == 2
    assert 0 < found["splitfl_step_seconds_sum",] < 60
    width = 4 * trunk.plan.width
    for direction, bound in zip(("in", "out"), counted, strict=True):
        assert 24 * width < found["splitfl_bytes_total", ("direction", direction)] <= bound


def test_no_label_for_a_row_and_names_of_parties_within_a_bound():
    metrics = Metrics(lambda: Look(spent={f"party{n}": 10 for n in range(200)}, budgets={"party0": 99}))
    for number in range(200):
        name = f"party{number}"
        facts = SessionFacts(name=f"s{number}", party=name, fingerprint="f", protocol="split", wire_dtype="float32")
        metrics.session_opened(facts)
        metrics.request_served(served(name, session=f"s{number}"))
        metrics.session_ended(facts, "closed", 1.0)
    metrics.refused("busy", "s1")
    metrics.batch_done(3, 5, 40)
    text = metrics.page().decode()
    found = values(text)
    assert {label for _, *labels in found for label, _ in labels} <= LABELS
    parties = {dict(labels).get("party") for _, *labels in found} - {None}
    assert len(parties) == MOST_PARTIES + 1
    assert found["splitfl_party_tokens_total", ("party", OTHERS)] == 6 * (200 - MOST_PARTIES)
    assert found["splitfl_budget_spent_tokens", ("party", OTHERS)] == 10 * (200 - MOST_PARTIES)
    assert found["splitfl_budget_total_tokens", ("party", "party0")] == 99
    assert found["splitfl_refusals_total", ("code", "busy")] == 1
    assert found["splitfl_batch_rows_sum",] == 5
    assert len(text) < 60_000
    assert re.search(r"\bs1\b", text) is None, "a session's name is shown"


def test_health_follows_the_drain():
    looks = [Look(starting=True)]
    metrics = Metrics(lambda: looks[-1])
    with shown(metrics) as address:
        with pytest.raises(urllib.error.HTTPError) as early:
            fetch(address, "/healthz")
        with early.value as error:
            assert (error.code, error.read()) == (503, b"starting\n")
        looks.append(Look(sessions=3, memory_used=5, memory_limit=9))
        assert fetch(address, "/healthz") == (200, "serving\n")
        assert values(fetch(address, "/metrics")[1])["splitfl_sessions_open",] == 3
        looks.append(Look(draining=True))
        with pytest.raises(urllib.error.HTTPError) as refused:
            fetch(address, "/healthz")
        with refused.value as error:
            assert (error.code, error.read()) == (503, b"draining\n")
        assert values(fetch(address, "/metrics")[1])["splitfl_draining",] == 1
        with pytest.raises(urllib.error.HTTPError) as missing:
            fetch(address, "/anything")
        missing.value.close()
        assert missing.value.code == 404


def test_somebody_who_says_nothing_does_not_keep_others_from_an_answer():
    with shown(Metrics()) as address:
        host, port = address.removeprefix("http://").split(":")
        silent = [socket.create_connection((host, int(port)), 10) for _ in range(20)]
        try:
            assert fetch(address, "/healthz")[0] == 200
        finally:
            for one in silent:
                one.close()


def test_addresses_that_cannot_be_served():
    with shown(Metrics(), "127.0.0.1") as address:
        port = int(address.rpartition(":")[2])
        with pytest.raises(ResourceError, match="cannot be served"):
            MetricsServer(Metrics(), "127.0.0.1", port)
    with pytest.raises(ResourceError, match="cannot be served"):
        MetricsServer(Metrics(), "192.0.2.1", 0)


def test_without_the_library_the_extra_is_named():
    code = "import sys; sys.modules['prometheus_client'] = None\nimport model_owner.metrics"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "pip install 'splitfl[owner]'" in done.stderr
