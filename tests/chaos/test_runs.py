"""Whole runs under seeded schedules of faults: the same adapter, bytes and text, and nothing booked twice."""

from __future__ import annotations

import json
import random
import signal
import threading

import pytest
import torch

from splitfl.bench.faults import Fault
from splitfl.bench.message_faults import altered
from splitfl.bench.served import Served
from splitfl.privacy.ledger import Ledger
from tests.chaos.conftest import QUIET, ROUGH, open_road, tune
from tests.live.child import child, splitfl_here
from tests.live.runs import adapter_in

pytestmark = pytest.mark.slow

NOISE = ("--noise", "gauss", "--clip", "40", "--sigma", "0.5")
CUTS = (Fault(kind="cut"), Fault(kind="cut in a frame"), Fault(kind="half open", seconds=0.5))
BLOCKS = (
    Fault(kind="delay", seconds=0.4, amount=0.02), Fault(kind="trickle", seconds=0.4, amount=1e5),
    Fault(kind="refuse", seconds=0.4),
)  # fmt: skip


def same_adapter(run, whole):
    came, expected = adapter_in(run), adapter_in(whole)
    return came.keys() == expected.keys() and all(torch.equal(came[name], expected[name]) for name in expected)


def forms(road):
    """How many different hidden states left the party."""
    return len({said[0][1] for (_, kind, _), said in road.middle.requests().items() if kind == "forward"})


def booked(run):
    with Ledger(run.with_suffix(".ledger"), create=False) as ledger:
        ledger.verify()
        return [entry["channel"] for entry in ledger.export()["entries"]]


def break_links(road, whole_road, seed, *, cuts=3):
    """Each fault once, at places of the conversation that the seed draws."""
    draw, end = random.Random(seed), whole_road.proxy.passed.up
    for fault in (*CUTS[:cuts], *BLOCKS):
        road.proxy.after(round(draw.uniform(0.02, 0.95) * end), lambda fault=fault: road.proxy.apply(fault))


def test_messages_are_lost_repeated_delayed_and_reordered(road, undisturbed, config, tmp_path):
    whole, _ = undisturbed()
    rough = road(ROUGH, 1)
    assert same_adapter(tune(rough, config, tmp_path / "run"), whole)
    assert {"drop", "duplicate", "delay", "reorder"} <= set(rough.middle.done)
    requests = rough.middle.requests()
    assert any(len(said) > 1 for said in requests.values()), "nothing was said again"
    assert altered(requests) == []


def test_links_are_cut_held_slowed_and_refused(road, undisturbed, config, tmp_path):
    whole, whole_road = undisturbed()
    broken = road(QUIET)
    break_links(broken, whole_road, 2)
    assert same_adapter(tune(broken, config, tmp_path / "run"), whole)
    assert broken.proxy.passed.connections > 2
    assert len(broken.proxy.passed.faults) == len(CUTS) + len(BLOCKS)
    assert altered(broken.middle.requests()) == []


@pytest.mark.long  # two processes of an owner; bench chaos does the same
def test_the_owner_is_killed_and_comes_back(home, undisturbed, config, tmp_path):
    whole, whole_road = undisturbed()
    restarts = []
    with Served(home, "killed") as owner, open_road(home, owner, QUIET) as broken:

        def kill():
            owner.kill()
            restarts.append(threading.Thread(target=owner.start))
            restarts[0].start()

        broken.proxy.after(round(0.6 * whole_road.proxy.passed.up), kill)
        run = tune(broken, config, tmp_path / "run")
        restarts[0].join(60)
        assert owner.starts == 2
    assert same_adapter(run, whole)
    assert altered(broken.middle.requests()) == []
    assert booked(run) == booked(whole)


@pytest.mark.parametrize("protocol", ["guarded-online", "guarded-gradfree"])
def test_noise_is_drawn_once_and_booked_once(road, undisturbed, config, tmp_path, protocol):
    """Every repeated request has the bytes of the first; no batch leaves in a second form; the ledger says the same."""
    options = ("--protocol", protocol, *NOISE)
    whole, whole_road = undisturbed(*options)
    broken = road(ROUGH, 3)
    break_links(broken, whole_road, 3, cuts=2)
    run = tune(broken, config, tmp_path / "run", *options)
    assert len(broken.middle.done) > 1, "too little happened"
    assert altered(broken.middle.requests()) == []
    assert forms(broken) == forms(whole_road) > 5
    assert booked(run) == booked(whole)


@pytest.mark.long
def test_gradfree_learns_the_same(road, undisturbed, config, tmp_path):
    options = ("--protocol", "guarded-gradfree")
    whole, whole_road = undisturbed(*options)
    broken = road(ROUGH, 4)
    break_links(broken, whole_road, 4)
    assert same_adapter(tune(broken, config, tmp_path / "run", *options), whole)
    assert altered(broken.middle.requests()) == []


def test_a_generation_says_the_same(road, undisturbed, tmp_path):
    whole, _ = undisturbed()
    texts = []
    for rates, seed in ((QUIET, 0), (ROUGH, 5)):
        way = road(rates, seed)
        if rates is ROUGH:
            for number, fault in enumerate(CUTS[:2], start=1):
                way.proxy.after(number * 4000, lambda fault=fault, way=way: way.proxy.apply(fault))
        out = tmp_path / f"{seed}.json"
        words = ["--run", whole, "--prompt", "The Heron left", "--max-new-tokens", "24", "--no-stream", "--json", out]
        splitfl_here("generate", *words, *way.link)
        results = json.loads(out.read_text(encoding="utf-8"))["results"]
        texts.append(next(result["value"] for result in results if result["metric"] == "text"))
        assert altered(way.middle.requests()) == []
    assert texts[0] == texts[1]
    assert len(texts[0]) > 5


@pytest.mark.long  # a process of a party
def test_a_killed_party_draws_no_noise_for_what_it_has_sent(road, undisturbed, config, tmp_path):
    options = ("--protocol", "guarded-online", *NOISE)
    _, whole_road = undisturbed(*options)
    broken, run = road(QUIET), tmp_path / "run"
    words = ["tune", *broken.link, "--config", config, "--out", run, "--ledger", run.with_suffix(".ledger"), *options]
    with child(["-m", "splitfl", *words], tmp_path) as party:
        broken.proxy.after(round(0.75 * whole_road.proxy.passed.up), party.process.kill)
        assert party.wait() == -signal.SIGKILL
    assert list((run / "outbox").rglob("*.safetensors")), "nothing was kept"
    sent = len(broken.middle.requests())
    tune(broken, config, run, *options, "--resume")
    assert len(broken.middle.requests()) > sent
    assert forms(broken) == forms(whole_road)
    assert sorted(booked(run)) == sorted(booked(undisturbed(*options)[0]))
    assert not (run / "outbox").exists()
