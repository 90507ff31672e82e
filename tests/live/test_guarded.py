"""Guarded runs over the network: equal to `split` without protection, booked before they send, stopped if lied to."""

from __future__ import annotations

import csv
import json

import pytest
import torch

import party.tune
from protocols import GUARDED_ONLINE
from splitfl.kit import open_kit
from splitfl.privacy.ledger import Ledger
from splitfl.privacy.ledger_records import gaussian_rho
from splitfl.rows import fingerprint, load_rows
from tests.live.child import child, splitfl_here
from tests.live.models import Rows, make_kit, read_jsonl, save_tiny, sentences, write_jsonl
from tests.live.owner import Owner, make_keys, serve
from tests.live.recording import recorded_commands
from tests.live.runs import adapter_in, checkpoints, events, write_config

pytestmark = pytest.mark.slow
ONLINE = ("--protocol", "guarded-online")
SHORT = {"max_steps": 4, "gradient_accumulation_steps": 2, "eval_steps": 100, "save_steps": 100, "lora_dropout": 0.0}
LIES = """
import torch, model_owner.trunk as trunk
true = trunk.Trunk.backward
trunk.Trunk.backward = lambda self, kept, gradient: torch.randn_like(true(self, kept, gradient)) * gradient.std()
from splitfl.cli import main
main({words!r})
"""


@pytest.fixture(scope="module")
def short(rows, tmp_path_factory):
    """Settings for runs of four steps."""
    return write_config(tmp_path_factory.mktemp("short") / "tune.toml", rows, **SHORT)


def tune(owner, config, out, *more, code=0):
    """Run it with a ledger beside the run directory; what crossed."""
    with recorded_commands() as recording:
        link = owner.link()
        splitfl_here("tune", *link, "--config", config, "--ledger", out.parent / "ledger.sqlite", "--out", out, *more,
                     code=code)  # fmt: skip
    return recording


def exported(path):
    """Entries and accounts of a ledger whose sums are right."""
    with Ledger(path, create=False) as ledger:
        ledger.verify()
        return ledger.export(units=True)


def fingerprint_of(path, task="causal-lm"):
    return fingerprint(load_rows(path, task=task))


# ---- guarded-online


def test_without_protection_it_is_split_to_the_last_bit(owner, tune_config, finished, tmp_path):
    tune(owner, tune_config, tmp_path / "run", *ONLINE, "--quantise", "none", "--decorrelate", "0")
    came, expected = adapter_in(tmp_path / "run"), adapter_in(finished)
    assert came.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(came[name], expected[name])] == []


def test_with_its_own_settings_it_is_not_split_and_still_trains(owner, tune_config, finished, tmp_path):
    recording = tune(owner, tune_config, tmp_path / "run", *ONLINE, "--probe-every", "0")
    came, expected = adapter_in(tmp_path / "run"), adapter_in(finished)
    assert any(not torch.equal(came[name], expected[name]) for name in expected)
    before, *_, after = events(tmp_path / "run", "eval")
    assert after["loss"] < before["loss"] - 0.1
    width = open_kit(owner.kit_dir).plan.width
    for kind, name in (("forward", "hidden"), ("backward", "gradient")):
        for each in recording.of(kind):
            rows, length, wide = each.message.tensors[0].shape
            assert wide == width
            assert len(each.frames[1]) == rows * length * (4 + width)  # a scale a token, a byte a number
            assert each.tensors[name].shape == (rows, length, width)
    for each in recording.of("forward_done") + recording.of("backward_done"):
        assert len(each.frames[1]) == 4 * each.tensors[each.message.tensors[0].name].numel()
    sent = sum(len(frame) for each in recording.messages if each.way == "sent" for frame in each.frames)
    assert events(tmp_path / "run", "end")[0]["bytes_sent"] == pytest.approx(sent, abs=200)  # goodbye comes after


def test_decorrelation_lowers_the_correlation_of_what_is_sent(owner, short, tmp_path):
    """With a large weight, distance correlation is most of the loss, and goes down while the bottom is trained."""
    found = {}
    for freeze in (False, True):
        run = tmp_path / str(freeze) / "run"
        run.parent.mkdir()
        more = ("--quantise", "none", "--max-steps", "16", "--probe-every", "0")
        tune(owner, short, run, *ONLINE, *more, *(["--freeze-bottom"] if freeze else ["--decorrelate", "50"]))
        found[freeze] = [record.get("penalty") for record in events(run, "train")]
    assert found[True] == [None] * 16, "nothing to decorrelate below a frozen cut"
    assert sum(found[False][-4:]) < 0.97 * sum(found[False][:4])
    assert GUARDED_ONLINE.decorrelate > 0


# ---- the book


def test_every_send_is_booked(owner, short, rows, tmp_path):
    recording = tune(owner, short, tmp_path / "run", "--probe-every", "0")
    book = exported(tmp_path / "ledger.sqlite")
    train, held = fingerprint_of(rows.train), fingerprint_of(rows.held_out)
    counted = {
        (data, channel): [e for e in book["entries"] if (e["dataset"], e["channel"]) == (data, channel)]
        for data in (train, held)
        for channel in ("activations", "gradients")
    }
    # Four steps of two batches; the held-out rows before and after, in three batches each.
    assert [len(each) for each in counted.values()] == [8, 8, 6, 0]
    assert len(recording.of("forward")) == 14
    assert len(recording.of("backward")) == 8
    for entry in book["entries"]:
        assert (entry["adversary"], entry["unit"], entry["mechanism"]) == ("owner", "row", "none")
        assert (entry["sensitivity"], entry["sigma"], entry["rho"]) == (None, None, None)
        assert entry["run"].startswith("run ")
    for forward, backward in zip(counted[train, "activations"], counted[train, "gradients"], strict=True):
        assert forward["units"] == backward["units"]
        assert forward["unit_count"] == 4
    assert len({unit for entry in counted[held, "activations"] for unit in entry["units"]}) == 10
    assert all(entry["confirmed"] for entry in book["entries"]), "each was answered"
    assert {row["label"] for row in book["datasets"]} == {"train.jsonl", "held.jsonl"}

    splitfl_here("evaluate", "--run", tmp_path / "run", "--eval", rows.held_out)
    after = exported(tmp_path / "ledger.sqlite")["entries"][len(book["entries"]) :]
    assert sorted(entry["unit_count"] for entry in after) == [2, 8]
    assert {entry["dataset"] for entry in after} == {held}
    assert {entry["run"] for entry in after} == {book["entries"][0]["run"]}, "under the name of its run"

    splitfl_here("generate", "--run", tmp_path / "run", "--prompt", "Agnes sang,", "--max-new-tokens", "3")
    book = exported(tmp_path / "ledger.sqlite")
    assert [row["label"] for row in book["datasets"] if row["fingerprint"] not in (train, held)] == ["a prompt"]
    assert [entry["channel"] for entry in book["entries"] if entry["dataset"] not in (train, held)] == ["activations"]


def budget(folder, path, releases):
    with Ledger(folder / "ledger.sqlite") as ledger:
        ledger.set_budget(fingerprint_of(path), unit="row", adversary="owner", releases=releases)


@pytest.mark.parametrize("protocol", ["split", "guarded-gradfree"])
def test_a_run_that_does_not_fit_its_budget_does_not_begin(owner, short, rows, tmp_path, capsys, protocol):
    budget(tmp_path, rows.train, 1 if protocol == "split" else 0)
    recording = tune(owner, short, tmp_path / "run", "--protocol", protocol, code=2)
    told = " ".join(capsys.readouterr().err.split())
    assert "beyond its budget" in told
    assert "splitfl ledger show" in told
    assert recording.messages == []
    assert not (tmp_path / "run").exists()
    assert exported(tmp_path / "ledger.sqlite")["entries"] == []


def test_a_budget_stops_a_run_before_the_bytes_leave(owner, short, rows, tmp_path, capsys):
    """Evaluations during training are not in the plan: the third pass over the held-out rows is beyond two releases."""
    budget(tmp_path, rows.held_out, 2)
    run = tmp_path / "run"
    more = ("--eval-steps", "1", "--save-steps", "1", "--probe-every", "0")
    recording = tune(owner, short, run, *more, code=2)
    assert "beyond its budget" in capsys.readouterr().err
    # Before training, and after the first step, in three batches each; two steps of two batches; then nothing at all.
    assert len(recording.of("forward")) == 3 + 2 + 3 + 2
    assert len(recording.of("backward")) == 4
    assert recording.messages[-1].kind == "closed", "the session was left open"
    assert [record["when"] for record in events(run, "eval")] == ["before", "during"]
    assert not (run / "adapter").exists()
    assert events(run, "end") == []
    assert len(exported(tmp_path / "ledger.sqlite")["entries"]) == 10 + 4
    budget(tmp_path, rows.held_out, 100)
    tune(owner, short, run, *more, "--resume")
    assert events(run, "start")[-1]["resumed_from"] == "checkpoint-1"
    assert (run / "adapter").exists()


def test_two_runs_share_a_budget(owner, short, rows, tmp_path, capsys):
    protocol = ("--protocol", "guarded-gradfree", "--max-steps", "1")
    budget(tmp_path, rows.train, 1)
    tune(owner, short, tmp_path / "first", *protocol)
    recording = tune(owner, short, tmp_path / "second", *protocol, code=2)
    assert "40 of its 40 units had no room for 1 release" in " ".join(capsys.readouterr().err.split())
    assert recording.messages == []
    tune(owner, short, tmp_path / "first", *protocol, "--resume", "--max-steps", "2")


def test_persons_and_not_rows_are_counted_where_a_column_names_them(owner, rows, tmp_path):
    """Noise protects a person by less than a row: k rows in one batch multiply the sensitivity by sqrt(k)."""
    made = [{**row, "who": f"person {number // 8}"} for number, row in enumerate(read_jsonl(rows.train)[:16])]
    mine = Rows(train=write_jsonl(tmp_path / "train.jsonl", made), held_out=rows.held_out)
    config = write_config(tmp_path / "tune.toml", mine, **SHORT | {"max_steps": 1})
    text = config.read_text(encoding="utf-8").replace(f'eval = "{rows.held_out}"\n', "")
    config.write_text(text, encoding="utf-8")
    noise = ("--noise", "gauss", "--clip", "10", "--sigma", "4", "--person-column", "who")
    more = ("--per-device-eval-batch-size", "16", "--protocol", "guarded-gradfree")
    tune(owner, config, tmp_path / "run", *noise, *more)
    [entry] = exported(tmp_path / "ledger.sqlite")["entries"]
    assert (entry["unit"], entry["unit_count"], entry["mechanism"]) == ("person", 2, "gauss")
    assert entry["rho"] == pytest.approx(8 * gaussian_rho(20.0, 4.0))
    assert "person 1" not in json.dumps(exported(tmp_path / "ledger.sqlite"))


# ---- an owner that lies


@pytest.fixture(scope="module")
def lying_owner(tiny_llama, tmp_path_factory):
    """An owner process whose gradients are noise."""
    folder, (model_dir, kit_dir) = tmp_path_factory.mktemp("liar"), tiny_llama
    keys = make_keys(folder / "keys")
    words = [
        "serve", "--model", model_dir, "--kit", kit_dir, "--bind", "tcp://127.0.0.1:0",
        "--key", keys / "owner.key_secret", "--parties", keys / "parties",
    ]  # fmt: skip
    with child(["-c", LIES.format(words=[str(word) for word in words])], folder) as running:
        _, address, _ = running.stdout.wait_for("ready ").split()
        yield Owner(address=address, model_dir=model_dir, kit_dir=kit_dir, keys=keys, running=running)
        assert running.end() == 0, running.stderr.text


@pytest.mark.parametrize("protocol", ["split", "guarded-online"])
def test_an_owner_whose_gradients_are_noise_ends_the_run(lying_owner, short, tmp_path, capsys, protocol):
    run = tmp_path / "run"
    # int8 codes leave part of the probes inconclusive, which is why there are more of them.
    more = ("--probe-every", "1", "--save-steps", "1", "--max-steps", "40", "--protocol", protocol)
    recording = tune(lying_owner, short, run, *more, code=9)
    told = " ".join(capsys.readouterr().err.split())
    assert "gradients are not those of the trunk it serves" in told
    assert "run.jsonl" in told
    evidence = events(run, "probe")[-1]
    assert (evidence["check"], evidence["in_a_row"], evidence["inconsistent"] >= 3) == ("gradient", 3, True)
    assert evidence["last"]["verdict"] == "inconsistent"
    assert not (run / "adapter").exists()
    steps = len(recording.of("backward")) // 2  # two batches a step; the last backward was answered and not used
    assert not steps or checkpoints(run)[-1] in (f"checkpoint-{steps}", f"checkpoint-{steps - 1}")
    assert events(run, "end") == []


def test_an_honest_owner_is_not_accused(owner, short, tmp_path):
    """One doubtful probe of an honest owner is possible, and ends no run; three in a row are not."""
    for protocol, kinds in (("split", 2), ("guarded-online", 2), ("guarded-gradfree", 1)):
        run = tmp_path / protocol / "run"
        run.parent.mkdir()
        tune(owner, short, run, "--probe-every", "1", "--protocol", protocol)
        probes = events(run, "probe")
        assert len({record["check"] for record in probes}) == kinds
        assert all(record["change"] <= record["allowed"] for record in probes if record["check"] == "repeat")
        assert (run / "adapter").exists()


# ---- classes


@pytest.fixture(scope="module")
def encoder_owner(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    model_dir = save_tiny("bert", folder / "model")
    with serve(model_dir, make_kit(model_dir, folder / "kit", task="sequence-classification"), folder) as running:
        yield running


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Settings for a classifier of the sentences."""
    folder, made = tmp_path_factory.mktemp("classes"), sentences()
    paths = {"train": folder / "train.csv", "held": folder / "held.csv"}
    for path, part in zip(paths.values(), (made[:40], made[40:]), strict=True):
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["text", "label"], *part])
    rows = Rows(train=paths["train"], held_out=paths["held"])
    return write_config(folder / "tune.toml", rows, **SHORT | {"max_steps": 12, "learning_rate": 1e-2})


@pytest.mark.parametrize("noise", ["max-norm", "marvell"])
def test_label_noise(encoder_owner, classes, tmp_path, noise):
    recording = tune(encoder_owner, classes, tmp_path / "run", "--label-noise", noise, "--probe-every", "0")
    gradients = [each.tensors["gradient"] for each in recording.of("backward")]
    assert len(gradients) == 24
    for gradient in gradients:
        norms = gradient.flatten(1).norm(dim=1)
        if noise == "max-norm":
            assert norms.max() == pytest.approx(norms.min().item(), rel=1e-4)
    book = exported(tmp_path / "ledger.sqlite")["entries"]
    assert {entry["mechanism"] for entry in book if entry["channel"] == "gradients"} == {noise}
    assert {entry["mechanism"] for entry in book if entry["channel"] == "activations"} == {"none"}


def test_without_label_noise_the_norms_do_differ(encoder_owner, classes, tmp_path):
    recording = tune(encoder_owner, classes, tmp_path / "run", "--max-steps", "2", "--probe-every", "0")
    for each in recording.of("backward"):
        norms = each.tensors["gradient"].flatten(1).norm(dim=1)
        assert norms.max() > 1.01 * norms.min()


def test_labels_are_randomised_once_a_run(encoder_owner, classes, tmp_path, monkeypatch):
    trained, numbered = [], party.tune.numbered
    monkeypatch.setattr(
        party.tune, "numbered", lambda examples: trained.append([e["labels"] for e in examples]) or numbered(examples)
    )
    more = ("--label-epsilon", "0.5", "--save-steps", "2")
    tune(encoder_owner, classes, tmp_path / "run", *more, "--max-steps", "2")
    kept = (tmp_path / "run" / "randomised_labels.json").read_bytes()
    first = [labels for labels in trained if len(labels) == 40]
    trained.clear()
    tune(encoder_owner, classes, tmp_path / "run", *more, "--max-steps", "4", "--resume")
    second = [labels for labels in trained if len(labels) == 40]
    assert events(tmp_path / "run", "start")[-1]["resumed_from"] == "checkpoint-2"
    assert (tmp_path / "run" / "randomised_labels.json").read_bytes() == kept
    assert first == second == [json.loads(kept)]
    names = {"complaint": 0, "praise": 1}
    true = [names[label] for _, label in sentences()[:40]]
    # Each label changes with probability 0.38; none of forty does once in 2e8 runs.
    assert first[0] != true


@pytest.mark.parametrize("protocol", ["guarded-online", "guarded-gradfree"])
def test_guarded_protocols_train_a_classifier(encoder_owner, classes, tmp_path, protocol):
    more = ("--protocol", protocol, "--max-steps", "30")
    recording = tune(encoder_owner, classes, tmp_path / "run", *more)
    losses = [record["loss"] for record in events(tmp_path / "run", "train")]
    assert sum(losses[-8:]) < sum(losses[:8]) - 0.8, "it did not train"
    [*_, after] = events(tmp_path / "run", "eval")
    assert bool(recording.of("backward")) == (protocol == "guarded-online")
    splitfl_here("evaluate", "--run", tmp_path / "run", "--eval", classes.parent / "held.csv", "--json", tmp_path / "o")
    results = json.loads((tmp_path / "o").read_text(encoding="utf-8"))["results"]
    [loss] = [result["value"] for result in results if result["metric"] == "loss"]
    # int8 gives each token its own scale, so other batches change nothing but rounding.
    assert loss == pytest.approx(after["loss"], abs=1e-5)
