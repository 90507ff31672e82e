"""Distillation: the loss is that of the paper, only the layers kept change, and an interruption changes nothing."""

from __future__ import annotations

import math
import shutil
import signal

import pytest
import torch

from model_owner import distil as distil_module
from model_owner.distil import DistilOptions, Student, distil, diverged
from model_owner.distil_progress import newest_checkpoint, write_curve
from model_owner.student import KD_WEIGHT, Pair, copied, measure, relative_error
from splitfl.cut import module_at
from splitfl.data import Collator
from splitfl.kit import open_kit, write_kit
from splitfl.metrics import read_run
from tests.families import ENCODERS, VOCAB, make_config, save_model
from tests.live.models import whole_model
from tests.shallow import without_layers

pytestmark = pytest.mark.slow  # a second a test: together too long for every save

KEPT = (2, 4)
OPTIONS = DistilOptions(
    max_steps=12, learning_rate=3e-3, batch_size=4, eval_steps=4, save_steps=4, logging_steps=2, seed=1
)


class Tokens:
    """What a collator asks of a tokenizer."""

    pad_token_id, eos_token_id = 0, 2


COLLATOR = Collator(Tokens())


def examples(count, *, seed, encoder=False):
    """Rows of unlike lengths from a chain in which each token has two likely followers."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        ids = [3 + number % 7]
        for choice in torch.randint(0, 2, (4 + number % 9,), generator=draw).tolist():
            ids.append(3 + (5 * ids[-1] + 11 * choice) % (VOCAB - 3))
        made.append({"input_ids": ids, "attention_mask": [1] * len(ids)} | ({} if encoder else {"labels": list(ids)}))
    return made


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """family -> model directory and plan."""
    known = {}

    def make(family):
        if family not in known:
            folder = tmp_path_factory.mktemp("model")
            task = "sequence-classification" if family in ENCODERS else "causal-lm"
            save_model(family, folder / "model")
            write_kit(folder / "model", folder / "kit", bottom=2, top=1, task=task)
            known[family] = folder / "model", open_kit(folder / "kit").plan
        folder, plan = known[family]
        return whole_model(folder, plan.task), plan

    return make


def new_pair(models, family="llama", kept=KEPT):
    model, plan = models(family)
    return Pair(model, plan, copied(model, plan, kept))


def weights(pair):
    return {
        f"{index}.{name}": tensor.clone()
        for index in KEPT
        for name, tensor in pair.student[index].state_dict().items()
    }  # fmt: skip


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []


# ---- the loss


def test_the_error_is_relative_to_each_positions_own_size():
    full = torch.tensor([[[3.0, 4.0], [30.0, 40.0], [1.0, 1.0]]])
    student = torch.tensor([[[3.0, 3.0], [0.0, 0.0], [9.0, 9.0]]])
    errors = relative_error(student, full, torch.tensor([[1, 1, 0]]))
    # (0 + 1) / (9 + 16), then everything is missing; the last position is padding.
    assert errors.tolist() == pytest.approx([1 / 25, 1.0])
    assert relative_error(7 * student, 7 * full, torch.tensor([[1, 1, 0]])).tolist() == pytest.approx([1 / 25, 1.0])
    assert relative_error(student.bfloat16(), full.bfloat16(), torch.tensor([[1, 1, 0]])).dtype == torch.float32


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_the_trunks_output_is_the_librarys_own_hidden_state(family, models):
    pair = new_pair(models, family)
    batch = COLLATOR(examples(3, seed=0, encoder=True))
    with torch.no_grad():
        states = pair.model(**batch, output_hidden_states=True).hidden_states
    assert torch.equal(pair.full_output(batch), states[5])  # behind layer 4, the last of the trunk


def test_the_students_loss_and_output_are_those_of_a_model_without_the_layer(models):
    pair = new_pair(models)
    batch = COLLATOR(examples(4, seed=0))
    labels = batch.pop("labels")
    small = without_layers(pair.model, {3})
    with torch.no_grad():
        loss, output = pair.student_output(batch, labels)
        wanted = small(**batch, labels=labels, output_hidden_states=True)
    assert torch.equal(loss, wanted.loss)
    assert torch.equal(output, wanted.hidden_states[4])


def test_the_full_model_is_back_in_its_places_also_after_an_error(models):
    pair = new_pair(models)
    layers = module_at(pair.model.base_model, pair.plan.stack)
    before = list(layers)

    def fail():
        with pair.with_student():
            assert list(layers) != before
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert all(one is other for one, other in zip(layers, before, strict=True))


def test_a_student_of_every_layer_is_at_distance_zero(models):
    pair = new_pair(models, kept=(2, 3, 4))
    figures = measure(pair, examples(6, seed=0), COLLATOR, batch_size=4)
    assert figures.kd == 0
    assert figures.loss == figures.lm > 0.1


@pytest.mark.parametrize("size", [1, 4, 50])
def test_held_out_figures_weigh_every_token_alike_whatever_the_batches(size, models):
    pair, rows = new_pair(models), examples(11, seed=0)
    small = without_layers(pair.model, {3})
    losses, errors = [], []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            out, full = small(ids, output_hidden_states=True), pair.model(ids, output_hidden_states=True)
        losses.append(torch.nn.functional.cross_entropy(out.logits[0, :-1], ids[0, 1:], reduction="none"))
        wanted, got = full.hidden_states[5][0], out.hidden_states[4][0]
        errors.append(((wanted - got) / wanted.pow(2).mean(-1, keepdim=True).sqrt()).pow(2).mean(-1))
    figures = measure(pair, rows, COLLATOR, batch_size=size)
    assert figures.lm == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)
    assert figures.kd == pytest.approx(torch.cat(errors).mean().item(), rel=1e-4)
    assert figures.positions == sum(len(row["input_ids"]) for row in rows)
    assert figures.loss == figures.lm + 30 * figures.kd


def test_the_training_loss_is_lm_plus_thirty_times_the_distance_and_reaches_the_student_alone(models):
    pair = new_pair(models)
    student = Student(pair, KEPT)
    parts = student.train()(**COLLATOR(examples(4, seed=0)))
    assert not any(module.training for module in student.modules())
    assert KD_WEIGHT == 30
    assert torch.equal(parts["loss"], parts["lm"] + 30 * parts["kd"])
    mean = measure(pair, examples(4, seed=0), COLLATOR, batch_size=4)
    assert parts["kd"].item() == pytest.approx(mean.kd, rel=1e-5)
    assert parts["lm"].item() == pytest.approx(mean.lm, rel=1e-5)
    parts["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in student.parameters())
    assert all(p.grad is None and not p.requires_grad for p in pair.model.parameters())
    layer = pair.full[2]
    assert sum(p.numel() for p in student.parameters()) == 2 * sum(p.numel() for p in layer.parameters())


# ---- training


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory):
    """A distillation that nothing interrupted: its pair, folder and outcome."""
    folder = tmp_path_factory.mktemp("distil")
    pair = new_pair(models)
    outcome = distil(pair, KEPT, examples(40, seed=0), examples(12, seed=9), COLLATOR, folder, OPTIONS)
    return pair, folder, outcome


def test_distillation_brings_the_student_nearer_and_changes_nothing_else(finished, models):
    pair, folder, outcome = finished
    held_out = examples(12, seed=9)
    before = measure(new_pair(models), held_out, COLLATOR, batch_size=4)
    after = measure(pair, held_out, COLLATOR, batch_size=4)
    assert after.kd < 0.9 * before.kd
    assert after.loss < 0.9 * before.loss
    assert (outcome.best_step, outcome.steps, outcome.interrupted, outcome.diverged) == (12, 12, False, None)
    # 12 steps of 4 of the rows; each row is seen at most twice.
    assert 12 * 4 * 5 <= outcome.tokens <= 12 * 4 * 13
    fresh, _ = models("llama")
    assert_same(pair.model.state_dict(), fresh.state_dict())
    evals = [record for record in read_run(folder / "run.jsonl") if record["event"] == "eval"]
    assert [record["step"] for record in evals] == [0, 4, 8, 12]
    assert evals[0]["loss"] == pytest.approx(before.loss)
    assert evals[-1]["loss"] == pytest.approx(after.loss)
    trained = [record for record in read_run(folder / "run.jsonl") if record["event"] == "train"]
    assert [record["step"] for record in trained] == [2, 4, 6, 8, 10, 12]
    for record in trained:
        assert record["loss"] == pytest.approx(record["lm"] + 30 * record["kd"], rel=1e-4)


def test_the_curve_is_drawn(finished):
    pytest.importorskip("matplotlib")
    _, folder, _ = finished
    text = write_curve(folder).read_text(encoding="utf-8")
    assert text.startswith("<svg")
    assert text.rstrip().endswith("</svg>")
    assert "held-out" in text


class Disturbed(Collator):
    """A collator that has something done before it makes its n-th batch."""

    def __init__(self, at, action):
        super().__init__(Tokens())
        self.left, self.action = at, action

    def __call__(self, rows):
        self.left -= 1
        if self.left == 0:
            self.action()
        return super().__call__(rows)


def crash():
    raise OSError("the machine went away")


def interrupt():
    signal.raise_signal(signal.SIGINT)


def again(models, folder, **changes):
    pair = new_pair(models)
    options = {"resume": True, **changes}
    outcome = distil(pair, KEPT, examples(40, seed=0), examples(12, seed=9), COLLATOR, folder, OPTIONS, **options)
    return pair, outcome


@pytest.mark.parametrize("when", [2, 9, 17])
def test_a_crash_anywhere_and_a_resume_give_the_very_same_bits(when, finished, models, tmp_path):
    pair = new_pair(models)
    with pytest.raises(OSError, match="went away"):
        distil(
            pair, KEPT, examples(40, seed=0), examples(12, seed=9), Disturbed(when, crash), tmp_path, OPTIONS
        )  # fmt: skip
    torn = tmp_path / "checkpoints" / "checkpoint-11"
    torn.mkdir(parents=True)
    (torn / "model.safetensors").write_bytes(b"half")
    pair, outcome = again(models, tmp_path)
    assert_same(weights(pair), weights(finished[0]))
    assert (outcome.best_step, outcome.steps) == (12, 12)
    assert not torn.exists()


def test_ctrl_c_keeps_a_checkpoint_and_a_resume_gives_the_same_bits(finished, models, tmp_path):
    pair = new_pair(models)
    collator = Disturbed(3 + 3 + 3, interrupt)  # three batches are held out, one is looked ahead
    outcome = distil(pair, KEPT, examples(40, seed=0), examples(12, seed=9), collator, tmp_path, OPTIONS)
    assert outcome.interrupted
    assert 0 < outcome.steps < 12
    assert newest_checkpoint(tmp_path / "checkpoints").name == f"checkpoint-{outcome.steps}"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    pair, outcome = again(models, tmp_path)
    assert not outcome.interrupted
    assert_same(weights(pair), weights(finished[0]))
    assert (tmp_path / "best.safetensors").read_bytes() == (finished[1] / "best.safetensors").read_bytes()


def test_resuming_what_is_finished_trains_no_more(finished, models, tmp_path):
    shutil.copytree(finished[1], tmp_path / "copy")
    pair, outcome = again(models, tmp_path / "copy")
    assert outcome.tokens == 0
    assert_same(weights(pair), weights(finished[0]))


def test_the_last_step_is_measured_wherever_it_falls_and_also_after_a_crash_there(models, tmp_path, monkeypatch):
    options = DistilOptions(**{**vars(OPTIONS), "max_steps": 5})
    rows, calls = (examples(40, seed=0), examples(12, seed=9)), []
    pair = new_pair(models)
    assert distil(pair, KEPT, *rows, COLLATOR, tmp_path / "whole", options).best_step == 5

    def third_fails(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:  # after those at steps 0 and 4
            crash()
        return measure(*args, **kwargs)

    monkeypatch.setattr(distil_module, "measure", third_fails)
    with pytest.raises(OSError, match="went away"):
        distil(new_pair(models), KEPT, *rows, COLLATOR, tmp_path / "killed", options)
    resumed = new_pair(models)
    assert distil(resumed, KEPT, *rows, COLLATOR, tmp_path / "killed", options, resume=True).best_step == 5
    assert_same(weights(resumed), weights(pair))


def test_two_seeds_train_in_two_orders(finished, models, tmp_path):
    pair = new_pair(models)
    other = DistilOptions(**{**vars(OPTIONS), "seed": 2})
    distil(pair, KEPT, examples(40, seed=0), examples(12, seed=9), COLLATOR, tmp_path, other)
    got, expected = weights(pair), weights(finished[0])
    assert not torch.equal(got["2.mlp.up_proj.weight"], expected["2.mlp.up_proj.weight"])


def test_an_encoder_is_distilled_on_the_distance_alone(models, tmp_path):
    pair = new_pair(models, "bert")
    train, held_out = examples(40, seed=0, encoder=True), examples(12, seed=9, encoder=True)
    before = measure(pair, held_out, COLLATOR, batch_size=4)
    distil(pair, KEPT, train, held_out, COLLATOR, tmp_path, OPTIONS)
    after = measure(pair, held_out, COLLATOR, batch_size=4)
    assert before.lm is after.lm is None
    assert after.loss == 30 * after.kd
    assert after.kd < 0.9 * before.kd


def test_dropout_is_off(tmp_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dropping")
    config = make_config("gpt2")
    config.attn_pdrop = config.resid_pdrop = config.embd_pdrop = 0.5
    save_model("gpt2", folder / "model")
    config.save_pretrained(folder / "model")
    write_kit(folder / "model", folder / "kit", bottom=2, top=1)
    model = whole_model(folder / "model")
    assert model.config.resid_pdrop == 0.5
    plan = open_kit(folder / "kit").plan
    student = Student(Pair(model, plan, copied(model, plan, (2, 3, 4))), (2, 3, 4)).train()
    assert student(**COLLATOR(examples(4, seed=0)))["kd"].item() == 0


# ---- divergence


@pytest.mark.parametrize(
    ("history", "verdict"),
    [
        ([], False),
        ([5.0], False),
        ([math.nan], True),
        ([5.0, math.inf], True),
        ([5.0, 4.0, 9.0, 9.0, 9.0], True),
        ([5.0, 4.0, 9.0, 9.0], False),
        ([5.0, 4.0, 9.0, 9.0, 8.0, 9.0, 9.0], False),
        ([5.0, 4.0, 9.0, 9.0, 7.9, 8.1, 8.1, 8.1], True),
        ([5.0, 9.9, 9.9, 9.9, 9.9], False),
        ([5.0, 11.0, 11.0, 11.0], True),
        ([5.0, 11.0, 11.0, 11.0, 4.0], False),
    ],
)
def test_what_counts_as_diverging(history, verdict):
    assert diverged(history) is verdict


@pytest.mark.parametrize("rate", [3.0, 1e30])
def test_a_rate_that_is_too_high_is_stopped_and_the_best_state_kept(rate, models, tmp_path):
    pair = new_pair(models)
    before = weights(pair)
    options = DistilOptions(**{**vars(OPTIONS), "learning_rate": rate, "max_steps": 40, "eval_steps": 2})
    outcome = distil(pair, KEPT, examples(40, seed=0), examples(12, seed=9), COLLATOR, tmp_path, options)
    assert outcome.diverged is not None
    assert "loss" in outcome.diverged
    assert outcome.steps < 40
    assert not outcome.interrupted
    evals = [record for record in read_run(tmp_path / "run.jsonl") if record["event"] == "eval"]
    best = min((record for record in evals if record["loss"] is not None), key=lambda record: record["loss"])
    assert outcome.best_step == best["step"]
    if outcome.best_step == 0:
        assert_same(weights(pair), before)
    figures = measure(pair, examples(12, seed=9), COLLATOR, batch_size=4)
    assert figures.loss == pytest.approx(best["loss"])
