"""`fed-kd`: parties with models of their own learn from what all of them say about rows that everybody has."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from party.distillation import Teacher, examples_digest, position_logits, read_public, said
from party.federated_model import SharedModel
from party.kept_rounds import KeptRounds
from party.tune import read_data, reading_options
from party.whole import whole_with_lora
from splitfl.aggregation.logits import Upload, masked_mean, pack_knowledge, read_knowledge
from splitfl.config import TuneSettings
from splitfl.data import Collator
from splitfl.errors import DataError, UsageError
from splitfl.kit import open_kit
from splitfl.metrics import read_run
from tests.federation.federation import coordinate, make_keys
from tests.live.child import splitfl_here
from tests.live.models import answer_rows, make_kit, save_tiny, sentences, whole_model, write_jsonl

CUT_OPTIONS = [
    "--target-modules",
    "all-linear",
    "--threads",
    "1",
    "--local-steps",
    "2",
    "--kd-steps",
    "2",
    "--logging-steps",
    "1",
]
RATE = ["--learning-rate", "5e-3", "--per-device-train-batch-size", "4"]


def settings_for(folder, model, kit, **more):
    """Settings of one party, as far as its model and rows go."""
    made = answer_rows()
    return TuneSettings(
        kit=kit, model=model, out=folder / "out", protocol="fed-kd", federate="tcp://127.0.0.1:9",
        coordinator_key=Path("c.key"), key=Path("k.key_secret"), peers=Path("peers"), target_modules=("all-linear",),
        train=write_jsonl(folder / "train.jsonl", made[:20]), public=write_jsonl(folder / "public.jsonl", made[20:30]),
        **{"sum": "plain", "seed": 3, **more},
    )  # fmt: skip


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """Two architectures with one tokenizer: model directory and kit of each."""
    folder = tmp_path_factory.mktemp("families")
    models = {family: save_tiny(family, folder / family) for family in ("llama", "gpt2")}
    return {family: (model, make_kit(model, folder / f"{family}-kit")) for family, model in models.items()}


def opened(folder, model, kit, **more):
    """Settings, public rows, a model whose adapter does something, and its collator."""
    settings = settings_for(folder, model, kit, **more)
    held = open_kit(kit)
    public = read_public(settings, held, reading_options(settings, held), "")
    tuned = whole_with_lora(settings, held, Path(model))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    return settings, public, tuned.eval(), Collator(held.tokenizer(), pad_token_id=held.config.pad_token_id)


def loss_of(model, public, teacher, collator, rows):
    return teacher.loss(position_logits(model, collator([public.examples[row] for row in rows]), public), rows)


# ---- what is said, and what is learnt from it


@pytest.mark.parametrize("keep", [8, 0])
def test_a_party_alone_learns_nothing_from_its_own_words(tmp_path, families, keep):
    settings, public, model, collator = opened(tmp_path, *families["llama"], kd_top_k=keep)
    layout = public.layout(settings)
    assert layout.keep == (keep or public.classes)
    ids, steps = said(model, public, layout, collator, batch_size=4, device="cpu")
    knowledge = masked_mean(layout, [Upload(ids=ids, steps=steps, weight=20.0)])
    again = read_knowledge(pack_knowledge(layout, knowledge), layout)
    norms = []
    for teacher in (
        Teacher(public, again, layout.temperature),
        Teacher(public, replace(again, log_probabilities=again.log_probabilities[::-1].copy()), layout.temperature),
    ):
        loss = loss_of(model, public, teacher, collator, [0, 3, 4])
        tuned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        norms.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, tuned)]).norm().item())
        assert loss.item() >= -1e-6
    assert norms[0] < 1e-3 * norms[1]  # a gradient of rounding alone, beside that of other words


def test_the_loss_is_the_published_one_where_everything_is_sent(tmp_path, families):
    settings, public, _, _ = opened(tmp_path, *families["llama"], kd_top_k=0, kd_temperature=3.0)
    layout = public.layout(settings)
    rng = np.random.default_rng(0)
    ids = np.tile(np.arange(layout.classes), (layout.positions, 1))
    steps = layout.steps(rng.uniform(-8, -0.1, ids.shape))
    teacher = Teacher(public, masked_mean(layout, [Upload(ids=ids, steps=steps, weight=1.0)]), 3.0)
    positions = range(public.starts[2], public.starts[3])
    logits = torch.randn(len(positions), layout.classes)
    target = torch.log_softmax(torch.from_numpy(layout.nats(steps[positions.start : positions.stop])).float(), dim=1)
    expected = 9 * torch.nn.functional.kl_div(
        torch.log_softmax(logits / 3, dim=1), target, log_target=True, reduction="batchmean"
    )
    torch.testing.assert_close(teacher.loss(logits, [2]), expected)


def test_entries_that_differ_in_number_from_position_to_position(tmp_path, families):
    """Where two parties name different tokens: finite gradients, and none on what nobody named."""
    settings, public, _, _ = opened(tmp_path, *families["llama"], kd_top_k=3)
    layout, rng = public.layout(settings), np.random.default_rng(0)
    uploads = []
    for _ in range(2):
        ids = np.sort(rng.permuted(np.tile(np.arange(layout.classes), (layout.positions, 1)), axis=1)[:, :3], axis=1)
        uploads.append(Upload(ids=ids, steps=layout.steps(rng.uniform(-9, 0, ids.shape)), weight=1.0))
    knowledge = masked_mean(layout, uploads)
    assert len(set(knowledge.counts.tolist())) > 1
    count = public.starts[2]
    logits = torch.randn(count, layout.classes, requires_grad=True)
    Teacher(public, knowledge, 2.0).loss(logits, [0, 1]).backward()
    assert torch.isfinite(logits.grad).all()
    named = np.zeros((layout.positions, layout.classes), dtype=bool)
    for upload in uploads:
        np.put_along_axis(named, upload.ids, True, axis=1)
    assert not logits.grad[~torch.from_numpy(named[:count])].any()
    assert logits.grad[torch.from_numpy(named[:count])].any()


def test_answers_of_padded_batches_are_those_of_rows_alone(tmp_path, families):
    settings, public, model, collator = opened(tmp_path, *families["gpt2"], kd_top_k=5)
    layout = public.layout(settings)
    alone = said(model, public, layout, collator, batch_size=1, device="cpu")
    together = said(model, public, layout, collator, batch_size=7, device="cpu")
    assert np.array_equal(alone[0], together[0])
    assert np.abs(alone[1].astype(int) - together[1].astype(int)).max() <= 1  # one step of rounding


def test_two_architectures_mean_the_same_positions_and_other_rows_are_others(tmp_path, families):
    digests = {}
    for family, (model, kit) in families.items():
        settings, held = settings_for(tmp_path, model, kit, max_length=64), open_kit(kit)
        digests[family] = read_public(settings, held, reading_options(settings, held), "").digest
    assert digests["llama"] == digests["gpt2"]
    settings = replace(settings, public=write_jsonl(tmp_path / "other.jsonl", answer_rows()[21:31]))
    assert read_public(settings, held, reading_options(settings, held), "").digest != digests["llama"]
    whole = replace(settings, public=tmp_path / "public.jsonl", answer_only=False)
    assert read_public(whole, held, reading_options(whole, held), "").digest != digests["llama"]


def test_private_rows_are_not_taken_for_public_ones(tmp_path, families):
    model, kit = families["llama"]
    settings, held = settings_for(tmp_path, model, kit), open_kit(kit)
    private = examples_digest(read_data(settings, held).train)
    with pytest.raises(DataError, match="the same rows"):
        read_public(replace(settings, public=settings.train), held, reading_options(settings, held), private)


# ---- an adapter of each round


def test_a_party_goes_back_with_the_federation_and_on_after_a_crash(tmp_path, families):
    _, _, model, _ = opened(tmp_path, *families["llama"])
    shared = SharedModel(model)
    kept, seen = KeptRounds(tmp_path / "kept", shared, resume=False), []
    for number in range(3):
        for phase in ("trained", "taught"):
            shared.load(shared.read().map(lambda _, pair: replace(pair, b=pair.b + 1)), {})
            kept.keep(phase, round=number)
        seen.append(shared.read())
        kept.close(number, f"state {number}", kept=True)
    assert len(list((tmp_path / "kept").glob("*.safetensors"))) == 3  # nothing of a half round is left

    def is_now(update):
        return all(torch.equal(pair.b, update.pairs[name].b) for name, pair in shared.read().pairs.items())

    kept.go_back("state 0")
    assert is_now(seen[0])
    shared.load(seen[2], {})
    again = KeptRounds(tmp_path / "kept", shared, resume=True)
    assert is_now(seen[0])
    assert (again.at.state, again.at.phase, again.at.round) == ("state 0", "done", 2)
    (tmp_path / "kept" / again.at.file).unlink()
    with pytest.raises(DataError, match="missing or damaged"):
        KeptRounds(tmp_path / "kept", shared, resume=True)


# ---- settings


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"public": None}, "--public is missing"),
        ({"rule": "flora"}, "sends none"),
        ({"model": None}, "--model is missing"),
        ({"federate": None}, "several parties"),
        ({"kd_temperature": 0.0}, "more than 0"),
        ({"protocol": "fed-params"}, "--public has no effect"),
        ({"protocol": "fed-params", "public": None, "rule": "kd"}, "combines no adapters"),
        ({"dp_noise_multiplier": 1.0, "dp_delta": 1e-5, "dp_clip": 1.0, "dp_rounds": 2}, "no bound"),
    ],
)
def test_settings_that_do_not_belong_together(tmp_path, families, change, words):
    settings = settings_for(tmp_path, *families["llama"])
    with pytest.raises(UsageError, match=words):
        replace(settings, **change)


@pytest.mark.parametrize("keep", [1, 4001])
def test_a_number_of_entries_that_cannot_be(tmp_path, families, keep):
    settings, held = settings_for(tmp_path, *families["llama"], kd_top_k=keep), open_kit(families["llama"][1])
    with pytest.raises(UsageError, match="0, or 2 to"):
        read_public(settings, held, reading_options(settings, held), "").layout(settings)


def test_a_coordinator_refuses_sums_that_would_not_hide_what_they_seem_to(tmp_path, capsys):
    make_keys(tmp_path)
    options = ["--key", tmp_path / "keys" / "coordinator.key_secret", "--parties", tmp_path / "parties"]
    splitfl_here("federate", *options, "--state", tmp_path / "s", "--rule", "kd", "--sum", "bfv", code=2)
    assert "parties that come late" in " ".join(capsys.readouterr().err.split())


# ---- whole federations


def figures(path):
    return {(each["case"], each["metric"]): each["value"] for each in json.loads(path.read_text())["results"]}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(480)
def test_two_architectures_learn_from_each_other_and_one_is_killed(tmp_path, families):
    """A llama and a GPT-2 with one tokenizer; the GPT-2's process is killed after the first round and comes back."""
    made, names = answer_rows(), {"hospital": "llama", "clinic": "gpt2"}
    make_keys(tmp_path, tuple(names))
    public, held = write_jsonl(tmp_path / "public.jsonl", made[30:40]), write_jsonl(tmp_path / "held.jsonl", made[40:])
    rounds = ["--rounds", "2", "--rule", "kd", "--sum", "plain", "--deadline", "150", "--wait", "100"]

    def words(name):
        model, kit = families[names[name]]
        rows = write_jsonl(tmp_path / f"{name}.jsonl", made[:15] if name == "hospital" else made[15:30])
        return ["--protocol", "fed-kd", "--model", model, "--kit", kit, "--train", rows, "--eval", held, "--public",
                public, "--sum", "plain", "--kd-top-k", "8", "--max-length", "64", "--json", f"{name}.json",
                *CUT_OPTIONS, *RATE]  # fmt: skip

    with coordinate(tmp_path, *rounds, "--json", "fed.json") as federation, ExitStack() as stack:
        first = federation.start(stack, "hospital", tmp_path / "hospital", *words("hospital"))
        second = federation.start(stack, "clinic", tmp_path / "clinic", *words("clinic"))
        second.stderr.wait_for("round 0 kept")
        os.kill(second.process.pid, 9)
        second.wait()
        again = federation.start(stack, "clinic", tmp_path / "clinic", *words("clinic"), "--resume")
        for party, line in ((again, "federation "), (again, "round 1 kept"), (first, "round 1 kept")):
            party.stderr.wait_for(line)  # each has its own patience: a new process takes long on a busy machine
        assert (first.wait(), again.wait()) == (0, 0), f"{first.stderr.text}\n{again.stderr.text}"
        assert federation.running.wait() == 0, federation.running.stderr.text
    found = figures(tmp_path / "fed.json")
    assert [found[f"round {n}", "verdict"] for n in range(2)] == ["kept"] * 2
    assert [found[f"round {n}", "score of the shared model"] for n in range(2)] == [None] * 2
    assert found["round 0", "updates summed"] == found["round 1", "updates summed"] == 2
    for name, family in names.items():
        run, model = tmp_path / name, families[family][0]
        tuned = PeftModel.from_pretrained(whole_model(model), run / "adapter")
        assert any(parameter.any() for key, parameter in tuned.named_parameters() if "lora_B" in key)
        told = json.loads((run / "disclosure.json").read_text(encoding="utf-8"))
        assert told["protocol"] == "fed-kd"
        assert "8 of " in told["federation"]["content"]
        events = [record["event"] for record in read_run(run / "run.jsonl")]
        assert {"start", "train", "distil", "round", "end"} <= set(events)
    sent = [
        record["bytes_sent"] for record in read_run(tmp_path / "hospital" / "run.jsonl") if record["event"] == "round"
    ]
    positions = next(r for r in read_run(tmp_path / "hospital" / "run.jsonl") if r["event"] == "start")["positions"]
    assert all(4 * 8 * positions < each < 4 * 8 * positions + 4000 for each in sent)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(480)
def test_classes_under_a_mask(tmp_path):
    """Three encoders send every class, so that a masked sum will do; the mean is what they learn from."""
    names = ("hospital", "clinic", "surgery")
    model = save_tiny("bert", tmp_path / "model")
    kit = make_kit(model, tmp_path / "kit", task="sequence-classification")
    kinds = [[row for row in sentences() if row[1] == label] for label in ("praise", "complaint")]
    made = [row for both in zip(*kinds, strict=True) for row in both]  # every file has both classes
    make_keys(tmp_path, names)

    def rows(name, some):
        return write_jsonl(tmp_path / f"{name}.jsonl", [{"text": text, "label": label} for text, label in some])

    public, held = rows("public", made[30:40]), rows("held", made[40:])
    options = ["--protocol", "fed-kd", "--model", model, "--kit", kit, "--public", public, "--eval", held, "--sum",
               "mask", *CUT_OPTIONS, *RATE]  # fmt: skip
    rounds = ["--rounds", "1", "--rule", "kd", "--sum", "mask", "--deadline", "150", "--stage-deadline", "100"]
    with coordinate(tmp_path, *rounds, "--wait", "100", "--json", "fed.json") as federation, ExitStack() as stack:
        started = [
            federation.start(stack, name, tmp_path / name, *options, "--train", rows(name, made[n * 10 : n * 10 + 10]))
            for n, name in enumerate(names)
        ]
        for each in started:
            each.stderr.wait_for("round 0 kept")
            assert each.wait() == 0, each.stderr.text
        assert federation.running.wait() == 0, federation.running.stderr.text
    found = figures(tmp_path / "fed.json")
    assert found["round 0", "verdict"] == "kept"
    assert found["round 0", "updates summed"] == 3
    assert 0 <= found["round 0", "score of the parties' own models"] <= 1
    round_ = next(r for r in read_run(tmp_path / "clinic" / "run.jsonl") if r["event"] == "round")
    assert round_["values"] == 2 * 10
