"""`splitfl emulator` as an owner runs it: what it gives away, what it says of it, and what it refuses."""

from __future__ import annotations

import json
import signal
import sys

import pytest
import torch
from safetensors.torch import load_file

from model_owner import emulate
from model_owner.sensitivity import measure_sensitivity, most_missed
from splitfl.cli import main
from splitfl.data import Collator, load_rows, tokenise
from splitfl.demo import assets
from splitfl.emulator import EMULATOR_FILE, open_emulator
from splitfl.errors import INTERRUPTED_EXIT_CODE, UsageError
from splitfl.kit import open_kit, write_kit
from splitfl.load import parameter_count
from tests.live.models import make_kit, save_tiny, sentences, tokenizer_of, whole_model, write_jsonl
from tests.shallow import without_layers

pytestmark = pytest.mark.slow  # a second a test: together too long for every save


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with models, their kits and public text."""
    folder = tmp_path_factory.mktemp("place")
    for family in ("llama", "gpt2"):
        save_tiny(family, folder / family)
    make_kit(folder / "llama", folder / "kit")
    write_kit(folder / "llama", folder / "wide", bottom=1, top=1)
    make_kit(folder / "gpt2", folder / "other")
    save_tiny("bert", folder / "bert")
    make_kit(folder / "bert", folder / "classes", task="sequence-classification")
    write_jsonl(folder / "public.jsonl", [{"text": text} for text, _ in sentences()])
    return folder


def run(*words, code=0):
    with pytest.raises(SystemExit) as stop:
        main(["emulator", *map(str, words), "--threads", "1"])
    assert stop.value.code == code


def refusal(capsys, *words, code=2):
    run(*words, code=code)
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return printed.err


def base(place, **changes):
    """Options with a trunk of four layers, which is cut without a kit."""
    options = {"--model": place / "llama", "--bottom": 1, "--top": 1, "--keep": 2, **changes}
    return [word for name, value in options.items() if value is not None for word in (name, value)]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


DISTIL = {"--distil-steps": 6, "--learning-rate": 3e-3, "--batch-size": 8, "--max-length": 16, "--eval-steps": 3,
          "--save-steps": 2, "--logging-steps": 2}  # fmt: skip


def distil_words(place, **changes):
    return base(place, **{"--text": place / "public.jsonl", **DISTIL, **changes})


# ---- what it writes


def test_a_kit_and_its_cut_give_the_same_emulator(place, tmp_path, capsys):
    options = {"--bottom": None, "--top": None, "--keep": 1}
    run(tmp_path / "a", *base(place, **options, **{"--kit": place / "kit"}))
    run(tmp_path / "b", *base(place, **{"--keep": 1, "--bottom": 2, "--top": 2}))
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert len(files(tmp_path / "a")) == 2
    kit = open_kit(place / "kit")
    emulator = open_emulator(tmp_path / "a")
    assert emulator.plan.kept == (2,)
    ids = torch.arange(3, 20)[None]
    wanted = without_layers(whole_model(place / "llama"), {3})(input_ids=ids).logits
    assert torch.equal(emulator.load(kit)(input_ids=ids).logits, wanted)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_it_says_what_it_gives_away(place, tmp_path, capsys):
    run(tmp_path / "e", *base(place), "--prune", 0.25, "--rank", 4, "--bits", 8, "--json", tmp_path / "e.json")
    told = capsys.readouterr().out
    plan = open_emulator(tmp_path / "e").plan
    model = whole_model(place / "llama")
    each = parameter_count(model.model.layers[1])
    assert plan.kept == (1, 4)
    assert plan.parameters == 2 * each
    assert "layers 1, 4 of the trunk" in told
    assert f"{2 * each:,} parameters, 50.0 % of the trunk's {4 * each:,}" in told
    assert "keeps    layers 2, 3\n" in told
    for words in ("25 % of each matrix", "rank 4", "8 bits"):
        assert words in told
    assert (plan.pruned, plan.rank, plan.bits) == (0.25, 4, 8)
    held = json.loads((tmp_path / "e.json").read_text())
    figures = {result["metric"]: (result["value"], result["reference"]) for result in held["results"]}
    assert figures["layers given"] == (2, 4)
    assert figures["parameters given"] == (2 * each, 4 * each)
    size = sum(path.stat().st_size for path in (tmp_path / "e").iterdir())
    assert figures["size"] == (size, 16 * each)
    assert size < 0.5 * 8 * each


def test_pruned_weights_are_zero_in_what_is_handed_out(place, tmp_path):
    run(tmp_path / "e", *base(place), "--prune", 0.5)
    whole = whole_model(place / "llama").model.layers[4].self_attn.q_proj.weight
    [file] = (tmp_path / "e").glob("*.safetensors")
    given = load_file(file)["model.layers.4.self_attn.q_proj.weight"]
    gone = given == 0
    assert int(gone.sum()) == whole.numel() // 2
    assert whole[gone].abs().max() <= whole[~gone].abs().min()
    assert torch.equal(given[~gone], whole[~gone])


def test_each_step_is_measured_and_the_last_figure_is_of_what_was_written(place, tmp_path, capsys):
    words = distil_words(place, **{"--prune": 0.1, "--rank": 8, "--bits": 8})
    run(tmp_path / "e", *words, "--json", tmp_path / "e.json")
    held = json.loads((tmp_path / "e.json").read_text())["results"]
    losses = {r["metric"].split(", ")[1]: r["value"] for r in held if r["metric"].startswith("held-out loss")}
    kds = {r["metric"].split(", ")[1]: r["value"] for r in held if r["metric"].startswith("distance")}
    stages = ["full model", "layers left out", "distilled", "pruned", "rank 8", "8 bits", "as handed out"]
    assert list(losses) == list(kds) == stages
    assert kds["full model"] == 0
    assert kds["distilled"] < kds["layers left out"]
    assert len({round(kd, 6) for kd in list(kds.values())[:-1]}) == 6, "a step changed nothing"
    assert kds["rank 8"] > kds["pruned"]
    assert kds["as handed out"] == pytest.approx(kds["8 bits"], rel=1e-5)
    assert all(r["reference"] == losses["full model"] for r in held if r["metric"].startswith("held-out loss"))
    # Measured once more from what is on disk, with the every-tenth examples.
    rows = tokenise(load_rows(place / "public.jsonl", task="causal-lm"), tokenizer_of(place / "kit"), max_length=16,
                    answer_only=False, truncation="right")  # fmt: skip
    kit = open_kit(place / "wide")
    opened = open_emulator(tmp_path / "e").load(kit)
    total, count = 0.0, 0
    for row in list(rows)[9::10]:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logits = opened(input_ids=ids).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    assert losses["as handed out"] == pytest.approx(total / count, rel=1e-4)
    assert open_emulator(tmp_path / "e").plan.distilled_steps in (3, 6)
    assert (tmp_path / "e.distil" / "run.jsonl").is_file()
    assert "as handed out" in capsys.readouterr().out


def test_a_classifiers_trunk_can_be_emulated_from_its_kit(place, tmp_path):
    words = distil_words(place, **{"--model": place / "bert", "--kit": place / "classes", "--bottom": None,
                                   "--top": None, "--keep": 1})  # fmt: skip
    run(tmp_path / "e", *words, "--json", tmp_path / "e.json")
    held = json.loads((tmp_path / "e.json").read_text())["results"]
    kds = {r["metric"]: r["value"] for r in held if r["metric"].startswith("distance")}
    assert kds["distance, as handed out"] < kds["distance, layers left out"]
    assert not [r for r in held if r["metric"].startswith("held-out loss")]
    model = open_emulator(tmp_path / "e").load(open_kit(place / "classes"))
    assert model.classifier.out_features == 2


# ---- sensitivity


def test_sensitivity_is_the_loss_of_a_model_without_that_layer(place, capsys, tmp_path):
    model = whole_model(place / "llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kit = open_kit(place / "wide")
    tokenizer = tokenizer_of(place / "kit")
    rows = tokenise(load_rows(place / "public.jsonl", task="causal-lm"), tokenizer, max_length=64, answer_only=False)
    held_out, collator = list(rows)[9::10], Collator(tokenizer, pad_token_id=0)
    found = measure_sensitivity(model, kit.plan, held_out, collator, batch_size=3)
    assert list(found.without) == [1, 2, 3, 4]

    def loss(one):
        total, count = 0.0, 0
        for row in held_out:
            ids = torch.tensor([row["input_ids"]])
            with torch.no_grad():
                total += one(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
        return total / count

    harms = {index: loss(without_layers(model, {index})) - loss(model) for index in found.without}
    for index, harm in harms.items():
        assert found.harm(index) == pytest.approx(harm, abs=1e-4)
    assert abs(harms[2] - harms[3]) > 1e-2, "the two are too much alike for the choice to tell anything"
    assert most_missed(kit.plan, 3, found) == (1, max((2, 3), key=harms.__getitem__), 4)
    assert most_missed(kit.plan, 2, found) == (1, 4)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    with pytest.raises(UsageError, match="first and the last"):
        most_missed(kit.plan, 1, found)
    words = base(place, **{"--keep": 3, "--choose": "sensitivity", "--text": place / "public.jsonl"})
    run(tmp_path / "e", *words, "--max-length", 64)
    assert open_emulator(tmp_path / "e").plan.kept == most_missed(kit.plan, 3, found)
    assert open_emulator(tmp_path / "e").plan.chosen_by == "sensitivity"
    assert "left out" in capsys.readouterr().out


# ---- interruptions


def test_an_interrupted_distillation_resumes_to_the_same_bytes(place, tmp_path, monkeypatch, capsys):
    words = distil_words(place, **{"--bits": 8})
    run(tmp_path / "whole", *words)
    made, call = [], Collator.__call__

    def disturbed(self, rows):
        made.append(1)
        if len(made) == 3 * 1 + 3:  # full, left out and step 0 take a batch each; then in the third step
            signal.raise_signal(signal.SIGINT)
        return call(self, rows)

    monkeypatch.setattr(Collator, "__call__", disturbed)
    capsys.readouterr()
    run(tmp_path / "e", *words, code=INTERRUPTED_EXIT_CODE)
    monkeypatch.undo()
    told = capsys.readouterr().err
    assert "of 6. The checkpoint is kept; continue with --resume." in told
    assert not (tmp_path / "e").exists()
    assert "already holds a distillation" in refusal(capsys, tmp_path / "e", *words)
    other = distil_words(place, **{"--bits": 8, "--seed": 5, "--learning-rate": 1e-3})
    told = refusal(capsys, tmp_path / "e", *other, "--resume")
    assert "another learning_rate, seed" in told
    run(tmp_path / "e", *words, "--resume")
    assert files(tmp_path / "e") == files(tmp_path / "whole")
    assert "holds no distillation" in refusal(capsys, tmp_path / "new", *words, "--resume")
    assert "not empty" in refusal(capsys, tmp_path / "e", *words, "--resume", code=4)


def test_divergence_is_told_and_the_best_state_is_written(place, tmp_path, capsys):
    run(tmp_path / "e", *distil_words(place, **{"--learning-rate": 1e30, "--eval-steps": 1}))
    told = capsys.readouterr().err
    assert "Distillation diverged and was stopped" in told
    assert "lower --learning-rate" in told
    emulator = open_emulator(tmp_path / "e")
    kit = open_kit(place / "wide")
    assert all(p.isfinite().all() for p in emulator.load(kit).parameters())


def test_an_emulator_that_cannot_be_opened_again_is_not_left_behind(place, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no")

    monkeypatch.setattr(emulate, "open_emulator", broken)
    run(tmp_path / "e", *base(place), code=70)
    assert list(tmp_path.iterdir()) == []


# ---- what it refuses


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--keep": 4}, "keeps 4 of the trunk's 4 layers would give the whole trunk away"),
        ({"--keep": 5}, "layers that are not there"),
        ({"--keep": 0}, "--keep was given as 0"),
        ({"--bottom": 2, "--top": 3, "--keep": 1}, "The trunk has one layer"),
        ({"--bottom": None}, "Neither a kit nor a cut"),
        ({"--kit": "kit"}, "--kit says where the model is cut"),
        ({"--prune": 1}, "--prune was given as 1.0"),
        ({"--rank": 0}, "--rank was given as 0"),
        ({"--distil-steps": 3}, "--distil-steps needs a public text"),
        ({"--choose": "sensitivity"}, "--choose sensitivity needs a public text"),
        ({"--choose": "sensitivity", "--keep": 1, "--text": "public.jsonl"}, "first and the last layer"),
        ({"--text": "public.jsonl", "--max-length": 1000}, "positions end at 128"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_reason(changes, words, place, tmp_path, capsys):
    for option in ("--kit", "--text"):
        if option in changes:
            changes = {**changes, option: place / changes[option]}
    assert words in refusal(capsys, tmp_path / "e", *base(place, **changes))
    assert list(tmp_path.iterdir()) == []


def test_a_kit_of_another_model_is_refused_and_both_are_named(place, tmp_path, capsys):
    def told(model, kit):
        words = ["--model", place / model, "--kit", kit, "--keep", 1]
        return refusal(capsys, tmp_path / "e", *words, code=4)

    assert "gpt2 model" in told("llama", place / "other")
    save_tiny("llama", tmp_path / "twin")
    other = whole_model(tmp_path / "twin")
    with torch.no_grad():
        other.model.layers[2].mlp.up_proj.weight.mul_(1.5)
    other.save_pretrained(tmp_path / "twin")
    make_kit(tmp_path / "twin", tmp_path / "twinkit")
    text = told("llama", tmp_path / "twinkit")
    assert open_kit(place / "kit").plan.trunk in text
    assert open_kit(tmp_path / "twinkit").plan.trunk in text
    assert not (tmp_path / "e").exists()


def test_a_text_that_is_too_short_is_refused(place, tmp_path, capsys):
    short = write_jsonl(tmp_path / "short.jsonl", [{"text": "one line of words"}])
    words = distil_words(place, **{"--text": short})
    assert "one must be held out" in refusal(capsys, tmp_path / "e", *words, code=3)


def test_a_missing_extra_is_told_before_anything_is_done(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    assert "torchao" in refusal(capsys, tmp_path / "e", *base(place, **{"--bits": 4}))
    assert list(tmp_path.iterdir()) == []


# ---- a real model


@pytest.mark.slow
def test_distillation_of_the_embedded_model_recovers_most_of_what_dropping_cost(tmp_path, capsys):
    folder, data = assets(), assets() / "data"
    words = ["--model", folder / "model", "--bottom", 2, "--top", 2, "--keep", 4, "--max-length", 64,
             "--text", data / "clinic.train.jsonl", "--eval", data / "clinic.held.jsonl", "--distil-steps", 40,
             "--learning-rate", 5e-4, "--batch-size", 4, "--eval-steps", 20, "--bits", 8]  # fmt: skip
    run(tmp_path / "e", *words, "--json", tmp_path / "e.json")
    held = json.loads((tmp_path / "e.json").read_text())["results"]
    kds = {r["metric"].removeprefix("distance, "): r["value"] for r in held if r["metric"].startswith("distance")}
    losses = {r["metric"].split(", ")[1]: r["value"] for r in held if r["metric"].startswith("held-out loss")}
    assert kds["distilled"] < 0.7 * kds["layers left out"]
    assert losses["distilled"] < losses["layers left out"] - 0.1
    assert losses["as handed out"] == pytest.approx(losses["distilled"], abs=0.02)
    assert (tmp_path / "e" / EMULATOR_FILE).is_file()
