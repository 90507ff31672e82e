"""`splitfl bench pipeline` and `link`: the relay does what it says, the figures are what was measured, both run."""

from __future__ import annotations

import json
import socket
import threading

import pytest

from splitfl.bench import link, pipeline
from splitfl.bench.cases import BESIDE_PLAIN, GRADFREE, OPTIMUM, OWN, PIPELINED, STEP, Case, verdict
from splitfl.bench.figures import Figures
from splitfl.bench.orders import Stepped
from splitfl.bench.sizes import size_named
from splitfl.bench.slow_link import LinkStart, SlowLink, check
from splitfl.cli import app
from splitfl.errors import ResourceError
from splitfl.options import run_app
from splitfl.options.values import parse_address

CASE = Case(work="train", size=size_named("M"), rows=8, length=128, threads=1, dtype="float32")


def stepped(seconds, cpu=0.0, sent=0, received=0):
    return Stepped(seconds=seconds, loss=1.0, cpu=cpu, sent=sent, received=received)


# ---- the relay


def test_the_relay_delays_and_limits_as_it_was_set(tmp_path):
    """Generous bounds: a test may run on a machine that does other things. The benchmark itself asks for 5%."""
    found = check(30.0, 80.0, tmp_path / "log", seconds=0.5)
    assert 30.0 <= found.rtt_ms < 60.0
    assert 40.0 < found.mbit <= 80.0 * 1.02


def test_bytes_come_out_as_they_went_in_and_both_ends_hear_of_the_end():
    with socket.create_server(("127.0.0.1", 0)) as server:
        relay = SlowLink(LinkStart(target=f"tcp://127.0.0.1:{server.getsockname()[1]}", rtt_ms=4.0, mbit=400.0))
        running = threading.Thread(target=relay.run, name="relay")
        running.start()
        try:
            sent = bytes(range(256)) * 4000
            with socket.create_connection(parse_address(relay.address), timeout=20) as party:
                owner, _ = server.accept()
                with owner:
                    owner.settimeout(20)
                    party.sendall(sent)
                    party.shutdown(socket.SHUT_WR)
                    came = bytearray()
                    while part := owner.recv(1 << 16):
                        came += part
                    assert came == sent
                    owner.sendall(b"well")
                assert party.recv(4, socket.MSG_WAITALL) == b"well"
                assert party.recv(1) == b""
        finally:
            relay.stop()
            running.join(20)
    assert not running.is_alive()


def test_a_relay_that_is_off_is_refused(monkeypatch, tmp_path):
    tries = []

    def off(rtt_ms, mbit, _log):
        tries.append(rtt_ms)
        return link.Measured(rtt_ms=rtt_ms * (1.2 if len(tries) < 3 else 1.02), mbit=mbit)

    monkeypatch.setattr(link, "check", off)
    assert link.checked(link.Setting(rtt_ms=20, mbit=100), tmp_path).rtt_ms == pytest.approx(20.4)
    monkeypatch.setattr(link, "check", lambda rtt_ms, mbit, _log: link.Measured(rtt_ms=rtt_ms, mbit=0.9 * mbit))
    with pytest.raises(ResourceError, match="90 Mbit/s"):
        link.checked(link.Setting(rtt_ms=20, mbit=100), tmp_path)


# ---- the figures


def by_metric(results):
    return {result.metric: result for result in results}


def test_the_pipelined_step_is_held_against_the_slower_sides_own_work():
    pairs = [pipeline.Pair(whole=stepped(2.0), cut=stepped(s, cpu=0.5), owner=1.2) for s in (1.3, 1.26, 1.4)]
    found = by_metric(pipeline._pipelined(CASE, 4, pairs, 1.25, 0.0))
    assert (found[OWN].value, found[OWN].reference) == (pytest.approx(1300), pytest.approx(1250))
    assert verdict(found[OWN]) == "met"
    assert found[PIPELINED].reach is None, "with one thread a side the monolith is no aim"
    two = Case(work="train", size=size_named("M"), rows=8, length=128, threads=2, dtype="float32")
    found = by_metric(pipeline._pipelined(two, 4, pairs, 1.25, 0.0))
    assert (found[OWN].reach, found[PIPELINED].reach) == (None, 1.02)
    assert verdict(found[PIPELINED]) == "met"


def test_the_optimum_of_a_link_is_the_slowest_of_three_parts():
    figures = Figures(CASE, prefix="link")
    plain = [link.Taken(step=stepped(4.0), owner=1.0)] * 3
    for sent, slowest in ((5_000_000, 1.0), (25_000_000, 2.0)):  # 0.4 s and 2 s at 100 Mbit/s
        figures.results.clear()
        taken = [link.Taken(step=stepped(2.0, cpu=0.5, sent=sent, received=1000), owner=1.0)] * 3
        link._add(figures, 4, taken, plain, link.Setting(rtt_ms=80, mbit=100), 1000)
        found = by_metric(figures.results)
        assert found[OPTIMUM].ratio == pytest.approx(slowest / 2)
        assert found[BESIDE_PLAIN].ratio == pytest.approx(2.0)
        assert found[BESIDE_PLAIN].reach == 2.0
    link._add(figures, 4, taken, plain, link.Setting(rtt_ms=20, mbit=100), 1000)
    assert figures.results[-1].reach is None, "a gain is aimed at on the slow road alone"


# ---- the commands


@pytest.mark.long
def test_both_benchmarks_run(tmp_path):
    for name, metrics in (("pipeline", {STEP, PIPELINED, OWN, GRADFREE}), ("link", {OPTIMUM, BESIDE_PLAIN})):
        file = tmp_path / f"{name}.json"
        words = ["bench", name, "--quick", "--steps", "1", "--json", str(file)]
        with pytest.raises(SystemExit) as stop:
            run_app(app, words + (["--rtt", "20", "--mbit", "100"] if name == "link" else []))
        assert stop.value.code == 0
        found = json.loads(file.read_text(encoding="utf-8"))["results"]
        assert metrics <= {result["metric"] for result in found}
        for result in found:
            if result["metric"] in metrics:
                assert result["value"] > 0
                assert result["ratio"] > 0
