"""`splitfl tune --micro-batches`: learns what the plain run learns, books what it books, resumes to the same bits."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import pytest
import torch

from splitfl.privacy.ledger import Ledger
from tests.live.child import splitfl_here
from tests.live.runs import adapter_in, events, write_config

pytestmark = pytest.mark.slow
# Batches of several lengths, two of them in a step; no dropout, which draws other masks for micro-batches.
SHORT = {"max_steps": 4, "gradient_accumulation_steps": 2, "save_steps": 2, "lora_dropout": 0.0, "eval_steps": 100}


@pytest.fixture(scope="module")
def short(rows, tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("short") / "tune.toml", rows, **SHORT)


def tune(owner, config, out, *more):
    ledger = out.parent / f"{out.name}.sqlite"
    splitfl_here("tune", *owner.link(), "--config", config, "--ledger", ledger, "--out", out, *more)
    return adapter_in(out)


def assert_close(came, expected, bound):
    assert came.keys() == expected.keys()
    off = math.sqrt(sum(float((came[name] - expected[name]).double().square().sum()) for name in expected))
    assert off <= bound * math.sqrt(sum(float(tensor.double().square().sum()) for tensor in expected.values()))


def sends_by_row(out):
    """How often each row was sent, by channel; rows are hashes under a key of the ledger's own, so counts alone."""
    counts = defaultdict(Counter)
    with Ledger(out.parent / f"{out.name}.sqlite", create=False) as ledger:
        ledger.verify()
        for entry in ledger.export(units=True)["entries"]:
            counts[entry["channel"]].update(entry["units"])
    return {channel: sorted(rows.values()) for channel, rows in counts.items()}


@pytest.fixture(scope="module")
def plain(owner, short, tmp_path_factory):
    out = tmp_path_factory.mktemp("plain") / "run"
    tune(owner, short, out)
    return out


def test_the_losses_and_the_adapter_are_those_of_the_plain_run(owner, short, plain, tmp_path):
    came = tune(owner, short, tmp_path / "run", "--micro-batches", "3", "--in-flight-bytes", "20kB")
    assert_close(came, adapter_in(plain), 2e-5)
    losses = [[record["loss"] for record in events(run, "train")] for run in (tmp_path / "run", plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    bytes_sent = [sum(record["bytes_sent"] for record in events(run, "train")) for run in (tmp_path / "run", plain)]
    assert bytes_sent[0] < bytes_sent[1], "padding stays here where rows of similar length go together"


def test_each_row_is_booked_as_often_as_in_the_plain_run(owner, short, plain, tmp_path):
    tune(owner, short, tmp_path / "run", "--micro-batches", "3")
    assert sends_by_row(tmp_path / "run") == sends_by_row(plain)
    assert set(sends_by_row(plain)) == {"activations", "gradients"}


@pytest.mark.long
def test_a_loss_on_the_whole_batch_is_of_the_whole_batch(owner, short, tmp_path):
    online = ("--protocol", "guarded-online", "--quantise", "none", "--decorrelate", "0.5", "--probe-every", "0")
    whole = tune(owner, short, tmp_path / "whole", *online)
    assert_close(tune(owner, short, tmp_path / "parts", *online, "--micro-batches", "auto"), whole, 2e-5)
    penalties = [[record["penalty"] for record in events(tmp_path / run, "train")] for run in ("parts", "whole")]
    assert penalties[0] == pytest.approx(penalties[1], rel=1e-4)
    assert all(penalties[1])


@pytest.mark.long
def test_a_resumed_run_ends_with_the_same_bits_dropout_included(owner, rows, tmp_path):
    config = write_config(tmp_path / "tune.toml", rows, **{**SHORT, "lora_dropout": 0.1})
    more = ("--micro-batches", "2", "--lr-scheduler-type", "constant")
    whole = tune(owner, config, tmp_path / "whole", *more)
    tune(owner, config, tmp_path / "run", *more, "--max-steps", "2")
    came = tune(owner, config, tmp_path / "run", *more, "--resume")
    assert [name for name in whole if not torch.equal(came[name], whole[name])] == []


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (("--protocol", "guarded-gradfree"), "no step of its training waits for the owner"),
        (("--label-noise", "max-norm"), "worked out from a whole batch"),
        (("--micro-batches", "0"), "--micro-batches"),
    ],
)
def test_what_has_no_micro_batches_says_so(owner, short, tmp_path, capsys, more, problem):
    words = [
        "tune",
        *owner.link(),
        "--config",
        short,
        "--ledger",
        tmp_path / "ledger.sqlite",
        "--out",
        tmp_path / "run",
    ]
    splitfl_here(*words, "--micro-batches", "2", *more, code=2)
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
