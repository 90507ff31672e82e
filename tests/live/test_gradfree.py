"""Protocol guarded-gradfree against a live owner: one pass, then training without the network; broken off anywhere."""

from __future__ import annotations

import json
import math
import shutil
import signal
import time
from contextlib import closing

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from party.cache import CacheKey, TrunkCache, put_cached_trunk
from party.connect import open_session
from party.model import open_model
from party.protect import BatchRows
from party.workplace import NoLink
from splitfl.adapters import add_lora, lora_config, open_adapter
from splitfl.errors import INTERRUPTED_EXIT_CODE
from splitfl.kit import open_kit
from splitfl.link import TrunkRequest
from splitfl.privacy.ledger import Ledger
from splitfl.wire.session import NotAllowed
from tests.hostile.attacker import attacker
from tests.live.child import PATIENCE_S, child, splitfl_here
from tests.live.models import whole_model
from tests.live.owner import serve
from tests.live.pairs import collator_of, examples_of
from tests.live.recording import Recording, recorded_commands
from tests.live.relay import relay
from tests.live.runs import adapter_in, checkpoints, events, write_config

pytestmark = pytest.mark.slow
NAME = "guarded-gradfree"
TRAIN, HELD, BATCH = 40, 10, 4
PASSES = -(-TRAIN // BATCH) + -(-HELD // BATCH)  # batches of the whole pass
EVERYTHING = math.ceil(TRAIN / BATCH)
# Plain gradient descent: Adam divides by sizes of gradients, which turns rounding into steps.
COMPARED = {
    "max_steps": 20, "gradient_accumulation_steps": 1, "lora_dropout": 0.0, "optim": "sgd", "learning_rate": 0.3,
    "save_steps": 100, "max_grad_norm": 0.0, "eval_steps": 10,
}  # fmt: skip
NOISE = ("--noise", "gauss", "--clip", "40", "--sigma", "0.5")


@pytest.fixture(scope="module")
def config(rows, tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("gradfree") / "tune.toml", rows, **COMPARED)


@pytest.fixture(scope="module")
def plain(owner, config, tmp_path_factory):
    """A run without noise that nothing disturbed."""
    out = tmp_path_factory.mktemp("plain") / "run"
    tune_recorded(owner, config, out, "--protocol", NAME)
    return out


@pytest.fixture(scope="module")
def open_owner(tiny_llama, tmp_path_factory):
    """An owner whose channel can be read."""
    with serve(*tiny_llama, tmp_path_factory.mktemp("open"), insecure_loopback=True) as running:
        yield running


def closest(came, expected):
    assert came.keys() == expected.keys()
    return max(float((came[name] - expected[name]).abs().max()) for name in expected)


def entries(path, channel="activations"):
    with Ledger(path, create=False) as ledger:
        ledger.verify()
        return [entry for entry in ledger.export(units=True)["entries"] if entry["channel"] == channel]


def unanswered(entry):
    return {**entry, "confirmed": None}


# ---- without noise it is plain LoRA on the top


def test_it_is_plain_lora_on_the_top_of_the_whole_model(owner, rows, plain, tmp_path):
    kit = open_kit(owner.kit_dir)
    train, _ = examples_of(kit, rows)
    whole = whole_model(owner.model_dir)
    model = add_lora(whole, lora_config(whole, kit.plan, target_modules=["all-linear"], top_alone=True), seed=5)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=20, per_device_train_batch_size=BATCH, optim="sgd", learning_rate=0.3, seed=5,
        lr_scheduler_type="cosine", max_grad_norm=0.0, logging_steps=1, report_to="none", save_strategy="no",
        use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, label_names=["labels"],
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=train, data_collator=collator_of(kit))
    trainer.train()
    expected = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    losses = [record["loss"] for record in events(plain, "train")]
    assert losses == pytest.approx(expected, abs=1e-6)
    assert min(losses) < losses[0] - 0.3, "it did not train"
    theirs = {name.replace(".default", ""): p.detach() for name, p in model.named_parameters() if p.requires_grad}
    ours = adapter_in(plain)
    assert closest(ours, theirs) < 1e-6
    assert all(".layers.4." in name or ".layers.5." in name for name in ours)
    assert max(float(tensor.abs().max()) for name, tensor in ours.items() if "lora_B" in name) > 1e-2


def test_split_with_a_frozen_bottom_agrees_with_it(owner, config, plain, tmp_path):
    words = ("--protocol", "split", "--freeze-bottom", "--probe-every", "1")
    recording = tune_recorded(owner, config, tmp_path / "run", *words)
    assert closest(adapter_in(tmp_path / "run"), adapter_in(plain)) < 1e-6
    first, second = ([record["loss"] for record in events(run, "train")] for run in (plain, tmp_path / "run"))
    assert first == pytest.approx(second, abs=1e-6)
    assert not recording.of("backward"), "nothing below needs a gradient"
    assert events(tmp_path / "run", "probe"), "the owner is checked all the same"


def tune_recorded(owner, config, out, *more, code=0):
    with recorded_commands() as recording:
        ledger = ("--ledger", out.parent / "ledger.sqlite")
        splitfl_here("tune", *owner.link(), "--config", config, "--out", out, *ledger, *more, code=code)
    return recording


def test_the_adapter_on_the_whole_model_says_what_the_kept_replies_say(owner, rows, plain):
    kit = open_kit(owner.kit_dir)
    base = open_model(kit, NoLink())
    cached = put_cached_trunk(base, kit.plan, "right")
    model = open_adapter(base, plain / "adapter").eval()
    tuned = PeftModel.from_pretrained(whole_model(owner.model_dir), plain / "adapter").eval()
    collate = collator_of(kit)
    for folder, examples in zip(("train", "held-out"), examples_of(kit, rows), strict=True):
        key = CacheKey(**json.loads((plain / "replies" / folder / "cache.json").read_text(encoding="utf-8")))
        cache = TrunkCache(plain / "replies" / folder, key, [len(example["input_ids"]) for example in examples])
        assert cache.missing == []
        cache.load()
        cached.caches = {key.dataset: cache}
        for chosen in ((0, 3, 5), (9, 1)):  # other batches than those that were sent
            cached.batch = BatchRows(dataset=key.dataset, rows=chosen)
            batch = collate([examples[row] for row in chosen])
            real = batch["attention_mask"].bool()
            batch.pop("labels")
            with torch.no_grad():
                assert (model(**batch).logits - tuned(**batch).logits)[real].abs().max() < 1e-5


def test_evaluate_through_the_live_owner_gives_the_loss_of_the_run(plain, rows, tmp_path):
    splitfl_here("evaluate", "--run", plain, "--eval", rows.held_out, "--json", tmp_path / "out.json")
    results = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["results"]
    found = {result["metric"]: result["value"] for result in results}
    [before, *_, after] = events(plain, "eval")
    assert after["when"] == "after"
    assert found["loss"] == pytest.approx(after["loss"], abs=1e-6)
    assert after["loss"] < before["loss"] - 0.1


def test_each_row_is_booked_once_whatever_the_epochs(plain):
    booked = [entry for entry in entries(plain.parent / "ledger.sqlite") if entry["run"].startswith("run ")]
    during = booked[:PASSES]  # `evaluate` sends again, later
    assert sorted(entry["unit_count"] for entry in during) == [2] + [BATCH] * (PASSES - 1)
    assert len({unit for entry in during for unit in entry["units"]}) == TRAIN + HELD
    assert 20 * BATCH > TRAIN, "the run is not longer than one epoch"


# ---- no gradient, whoever asks


def test_a_party_cannot_send_a_gradient(owner):
    recording, kit = Recording(), open_kit(owner.kit_dir)
    keys = {"owner_key": owner.keys / "owner.key", "key": owner.keys / "hospital.key_secret"}
    hidden = torch.randn(2, 5, kit.plan.width)
    with closing(open_session(kit.plan, owner.address, protocol=NAME, tap=recording.tap, **keys)) as session:
        output, step = session.forward(TrunkRequest(hidden=hidden, keep=True))
        with pytest.raises(NotAllowed) as refused:
            session.backward(step, torch.ones_like(output))
        assert refused.value.code == "not_disclosed"
        assert NAME in str(refused.value)
        session.forward(TrunkRequest(hidden=hidden))  # the session lives on
    assert [each.kind for each in recording.messages if each.way == "sent"] == ["hello", "forward", "forward", "bye"]


def test_an_owner_refuses_the_gradient_of_a_party_that_lies(owner):
    with attacker(owner) as foe:
        hidden = torch.randn(2, 5, foe.plan.width)
        foe.hello(protocol=NAME)
        assert foe.answer().server
        foe.forward(1, hidden, keep=True)
        foe.result()
        foe.backward(1, hidden)
        assert NAME in foe.refused("not_disclosed").problem
        foe.forward(2, hidden)
        assert foe.result().shape == hidden.shape


# ---- broken off


def start(address, owner, config, folder, *more):
    words = ["tune", *owner.link(address=address), "--config", config, "--out", "run", "--protocol", NAME, *more]
    return child(["-m", "splitfl", *words, "--ledger", "ledger.sqlite", "--probe-every", "0"], folder)


def wait_for_outbox(replies, line):
    """The one outbox whose bytes have all crossed, and those bytes."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        for path in replies.glob("outbox-*.safetensors"):
            held = load_file(path)
            tensor = held["plain"] if "plain" in held else held["payload"]
            payload = tensor.numpy().tobytes()
            if payload in bytes(line.up):
                return path, payload
        time.sleep(0.02)
    raise AssertionError("no batch was on its way")


@pytest.mark.parametrize("noise", [(), NOISE], ids=["plain", "noise"])
def test_killed_in_the_pass_it_sends_the_same_bytes_again(open_owner, config, plain, tmp_path, noise):
    replies, owner_process = tmp_path / "run" / "replies" / "train", open_owner.running.process
    middle = 30_000 if noise else 60_000
    with relay(open_owner.address, hold_at=middle) as line:
        with start(line.address, open_owner, config, tmp_path, *noise) as party:
            line.wait_until_holding()
            owner_process.send_signal(signal.SIGSTOP)  # what is sent from here on gets no answer
            try:
                line.release()
                outbox, payload = wait_for_outbox(replies, line)
                party.process.send_signal(signal.SIGKILL)
                assert party.wait() == -signal.SIGKILL
            finally:
                owner_process.send_signal(signal.SIGCONT)
        done = [path for path in replies.glob("*.safetensors") if not path.name.startswith("outbox")]
        assert 1 <= len(done) < EVERYTHING - 1
        booked = entries(tmp_path / "ledger.sqlite")
        assert len(booked) == len(done) + 1, "what was on its way had been booked"
        assert [entry["confirmed"] is None for entry in booked] == [False] * len(done) + [True]
        words = ["--config", config, "--out", tmp_path / "run", "--protocol", NAME, "--resume", "--probe-every", "0"]
        with recorded_commands() as recording:
            ledger = ("--ledger", tmp_path / "ledger.sqlite")
            splitfl_here("tune", *open_owner.link(address=line.address), *words, *noise, *ledger)
        assert bytes(line.up).count(payload) == 2
    forwards = recording.of("forward")
    assert [each.frames[1] for each in forwards].count(payload) == 1
    assert forwards[0].frames[1] == payload
    assert len(forwards) == PASSES - len(done)
    assert not outbox.exists()
    after = entries(tmp_path / "ledger.sqlite")
    assert all(entry["confirmed"] for entry in after)
    assert [unanswered(entry) for entry in after[: len(booked)]] == [unanswered(entry) for entry in booked]
    assert len(after) == PASSES, "one release a batch, and no more"
    assert len({unit for entry in after for unit in entry["units"]}) == TRAIN + HELD
    if not noise:
        assert closest(adapter_in(tmp_path / "run"), adapter_in(plain)) == 0


def test_after_the_pass_neither_training_nor_a_resume_needs_the_owner(tiny_llama, rows, tmp_path):
    config = write_config(tmp_path / "tune.toml", rows, max_steps=400, eval_steps=400, save_steps=1000)
    with serve(*tiny_llama, tmp_path / "owner") as lone:
        splitfl_here("tune", *lone.link(), "--config", config, "--out", tmp_path / "whole", "--protocol", NAME)
        with start(lone.address, lone, config, tmp_path) as party:
            party.stderr.wait_for("every row has been sent once")
            assert lone.running.end() == 0
            party.stderr.wait_for("step 2/400")
            party.process.send_signal(signal.SIGINT)
            assert party.wait() == INTERRUPTED_EXIT_CODE
        run = tmp_path / "run"
        step = events(run, "train")[-1]["step"]
        assert 2 <= step < 400
        assert checkpoints(run) == [f"checkpoint-{step}"]
        booked = entries(tmp_path / "ledger.sqlite")
        ledger = ("--ledger", tmp_path / "ledger.sqlite")
        splitfl_here("tune", *lone.link(), "--config", config, "--out", run, "--protocol", NAME, "--resume", *ledger)
    assert entries(tmp_path / "ledger.sqlite") == booked
    assert len(booked) == PASSES
    assert closest(adapter_in(run), adapter_in(tmp_path / "whole")) == 0
    assert events(run, "end")[0]["bytes_sent"] == 0


# ---- kept replies that do not fit


@pytest.fixture
def unfinished(plain, tmp_path):
    """A run whose pass is done and whose training is not, with the ledger that its pass is booked in."""
    run = shutil.copytree(plain, tmp_path / "run")
    for folder in ("adapter", "checkpoints"):
        shutil.rmtree(run / folder)
    shutil.copy(plain.parent / "ledger.sqlite", tmp_path / "ledger.sqlite")
    return run


def test_changed_settings_are_refused_and_not_remembered(owner, config, rows, unfinished, tmp_path, capsys):
    before = (unfinished / "config.toml").read_bytes()
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(rows.train.read_text(encoding="utf-8").splitlines(keepends=True)[1:]), encoding="utf-8")
    other_kit = tmp_path / "kit"
    splitfl_here("kit", other_kit, "--model", owner.model_dir, "--bottom", "1", "--top", "2", "--no-verify")
    for more, found in (
        (NOISE, "protection: held none"),
        (("--padding-side", "left"), "padding_side: held right, wanted left"),
        (("--max-length", "12", "--truncation", "right"), "tokens: held"),
        (("--wire-dtype", "bfloat16"), "dtype: held float32, wanted bfloat16"),
        (("--kit", other_kit), "plan: held"),
        (("--train", fewer), "has released rows of the data set"),
    ):
        link = owner.link()
        if more[0] == "--kit":
            link = link[2:]
        words = ["--config", config, "--out", unfinished, "--protocol", NAME, "--resume", *more]
        with recorded_commands() as recording:
            splitfl_here("tune", *link, *words, "--ledger", tmp_path / "ledger.sqlite", code=2)
        told = " ".join(capsys.readouterr().err.split())
        assert found in told, more
        assert recording.messages == []
        assert (unfinished / "config.toml").read_bytes() == before


@pytest.mark.parametrize("name", ["000003.safetensors", "cache.json"])
def test_a_damaged_file_is_named(owner, config, unfinished, tmp_path, capsys, name):
    path = unfinished / "replies" / "train" / name
    path.write_bytes(path.read_bytes()[:-20])
    recording = tune_recorded(owner, config, unfinished, "--protocol", NAME, "--resume", code=3)
    told = capsys.readouterr().err
    assert str(path) in told
    assert "booked, once more" in " ".join(told.split())
    assert recording.messages == []


@pytest.mark.parametrize("gone", ["reply", "index"])
def test_a_lost_reply_is_a_second_release_and_a_lost_index_is_noticed(owner, config, unfinished, tmp_path, gone):
    replies, ledger = unfinished / "replies" / "train", tmp_path / "ledger.sqlite"
    words = ("--protocol", NAME, "--resume", "--probe-every", "0")
    if gone == "index":
        (replies / "cache.json").unlink()
        assert tune_recorded(owner, config, unfinished, *words, code=3).messages == []
        return
    before = entries(ledger)
    (replies / "000003.safetensors").unlink()
    recording = tune_recorded(owner, config, unfinished, *words)
    assert len(recording.of("forward")) == 1
    assert len(entries(ledger)) == len(before) + 1, "rows went out that nobody booked"
