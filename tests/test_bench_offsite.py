"""`splitfl bench offsite`: what it plans, reads, compares, refuses, keeps and shows; whole runs of real processes."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainingArguments

from examples.pretrain.gpt2 import TaughtTrainer, build_gpt2
from party import offsite_side
from party.evaluate import evaluate
from party.utility_side import train_cell
from splitfl.bench import offsite, offsite_page, offsite_rows
from splitfl.bench.offsite_cases import (
    EMULATOR_TUNED,
    EMULATOR_ZERO,
    FULL_TUNED,
    FULL_ZERO,
    OFFSITE,
    PLUGIN,
    RATES,
    SPLIT,
    TASKS,
    TRAININGS,
    WAYS,
    Cell,
    parse_way,
    plan_cells,
    way_name,
)
from splitfl.bench.offsite_costs import LENGTH, ROWS
from splitfl.bench.offsite_figures import Outcomes
from splitfl.bench.offsite_ground import EMULATOR_PLAN
from splitfl.bench.offsite_orders import CountFlops, SideStart
from splitfl.bench.offsite_rows import Place, find_models, find_tasks, write_public_text, write_rows
from splitfl.bench.offsite_section import BEGIN, END, reached, section
from splitfl.bench.offsite_settings import BENCHMARKS, benchmarks_of
from splitfl.bench.offsite_summary import (
    FLOPS,
    GAIN,
    GAP,
    LESS_MEMORY,
    MARGIN,
    MEMORY,
    ON_EMULATOR,
    ON_WHOLE,
    PEAK,
    SHARE,
    SPEED,
    SPEED_UP,
    Spread,
    comparisons,
    cost_case,
    summarise,
)
from splitfl.bench.offsite_table import print_tables
from splitfl.bench.orders import Step
from splitfl.bench.run import bench
from splitfl.config import BenchSettings, TuneSettings
from splitfl.config_offsite import PluginSettings
from splitfl.demo import assets
from splitfl.emulator import EMULATOR_FILE, write_emulator
from splitfl.errors import DataError, ResourceError, UsageError
from splitfl.kit import open_kit
from splitfl.options import to_toml
from tests.live.models import answer_rows, make_kit, read_jsonl, save_tiny, whole_model, write_jsonl

DOCS = Path(__file__).parents[1] / "docs"


def settings(**given):
    return BenchSettings(name="offsite", **given)


# ---- what is run


def test_every_training_is_tried_at_every_rate_and_then_run_with_every_seed():
    cells = plan_cells(settings(), "embedded", list(TASKS.values()))
    trials, runs = [c for c in cells if c.rate is not None], [c for c in cells if c.rate is None]
    assert cells == trials + runs, "a rate is known before it is used"
    assert len(trials) == len({c.name for c in trials}) == len(TASKS) * len(TRAININGS) * len(RATES)
    assert {c.seed for c in trials} == {0}
    assert len(runs) == len({c.name for c in runs}) == 3 * len(TASKS) * len(TRAININGS)
    assert parse_way(runs[0].name) == ("embedded", "answers", PLUGIN, 0)
    few = plan_cells(settings(quick=True, seeds=(4,)), "m", [TASKS["answers"]])
    assert [c.name for c in few] == [way_name("m", "answers", way, 4) for way in (PLUGIN, FULL_TUNED, SPLIT)]
    for word in ("embedded", "m / answers / plug-in / 3", "m / answers / plugged / seed 3", "m / x / split / seed 3"):
        with pytest.raises(DataError, match="names no way"):
            parse_way(word)


@pytest.mark.parametrize(
    ("name", "given", "of"),
    [
        ("split", {"keep": 2}, "offsite"),
        ("split", {"distil_steps": 2}, "offsite"),
        ("utility", {"model": ("embedded",)}, "offsite"),
        ("utility", {"cache": Path("x")}, "split or offsite"),
        ("offsite", {"levels": ("none",)}, "utility"),
        ("offsite", {"shapes": ("8x8",)}, "split"),
    ],
)
def test_options_of_other_benchmarks_are_refused(name, given, of):
    with pytest.raises(UsageError, match="no effect") as refused:
        BenchSettings(name=name, **given)
    assert refused.value.expected is not None
    assert refused.value.expected.startswith(f"splitfl bench {of}")
    assert benchmarks_of("json") == BENCHMARKS


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model of six layers, its kit and files of rows."""
    folder = tmp_path_factory.mktemp("tiny")
    model = save_tiny("gpt2", folder / "model")
    rows = answer_rows()
    train, held_out = write_jsonl(folder / "train.jsonl", rows[:20]), write_jsonl(folder / "held.jsonl", rows[40:])
    return model, make_kit(model, folder / "kit", dtype="float32"), train, held_out


def test_models_have_names_and_half_of_their_trunk(tiny):
    [embedded] = find_models((), None)
    assert (embedded.name, embedded.layers, embedded.keep) == ("embedded", 12, 4)
    named, plain = find_models((f"small={tiny[0]}", str(tiny[0])), None)
    assert (named.name, plain.name, named.layers, named.keep) == ("small", "model", 6, 1)
    assert named.path == plain.path == tiny[0]
    assert find_models(("embedded",), 7)[0].keep == 7


def test_models_that_cannot_be_compared_are_refused(tiny, tmp_path):
    with pytest.raises(UsageError, match="holds no model") as refused:
        find_models((str(tmp_path / "none"),), None)
    assert "embedded" in refused.value.hint
    (tmp_path / "config.json").write_text('{"num_hidden_layers": "many"}')
    with pytest.raises(UsageError, match="ValueError"):
        find_models((str(tmp_path),), None)
    for layers, keep, said in ((4, None, "model of 6 layers"), (5, None, "model of 6 layers"), (8, 4, "--keep 1 to 3")):
        (tmp_path / "config.json").write_text(json.dumps({"n_layer": layers}))
        with pytest.raises(UsageError, match="no emulator") as refused:
            find_models((str(tmp_path),), keep)
        assert said in refused.value.expected
    with pytest.raises(UsageError, match="Two models"):
        find_models((f"a={tiny[0]}", f"a={tiny[0]}"), None)
    for word in ("=x", "a / b=x"):
        with pytest.raises(UsageError, match="no name"):
            find_models((word,), None)


def test_the_measuring_process_stays_light_and_knows_the_emulators_plan():
    code = "import sys, splitfl.bench.offsite; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
    assert EMULATOR_PLAN == EMULATOR_FILE


def test_bad_words_end_the_command_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(offsite, "Child", None)  # starting a process would fail
    for given, said in (
        ({"tasks": ("anwsers",)}, "no task 'anwsers'"),
        ({"model": (str(tmp_path),)}, "holds no model"),
        ({"keep": 8}, "no emulator of 8"),
        ({"resume": True}, "needs the file"),
    ):
        with pytest.raises(UsageError, match=said):
            bench(settings(**given))


# ---- rows and text


def test_rows_that_are_not_shipped_are_named_or_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("SPLITFL_SHARED", str(tmp_path))
    places, missing = find_tasks(())
    assert [place.task.name for place in places] == ["answers", "polarity"]
    assert all(place.shipped for place in places)
    assert [sentence.split()[1] for sentence in missing] == ["'restaurants'", "'spam'"]
    assert all("is left out" in sentence for sentence in missing)
    with pytest.raises(UsageError, match="data/e2e_nlg"):
        find_tasks(("restaurants",))


def test_validation_rows_are_taken_from_the_training_rows_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("SPLITFL_SHARED", str(tmp_path / "none"))
    places, _ = find_tasks(("answers", "polarity"))
    for place in places:
        files = write_rows(place, tmp_path, (60, 20))
        train, trial, validation, held_out = (
            [json.dumps(row) for row in read_jsonl(path)]
            for path in (files.train, files.trial, files.validation, files.held_out)
        )
        assert (len(train), len(validation), len(held_out)) == (60, 10, 20)
        assert sorted(trial + validation) == sorted(train)
        assert not set(trial) & set(validation)
        assert not set(train) & set(held_out)
    labels = [row["label"] for row in read_jsonl(files.train)]
    assert (labels.count(0), labels.count(1)) == (30, 30)


def test_a_prompt_that_comes_again_is_taken_once(tmp_path):
    task = TASKS["restaurants"]
    rows = [{"mr": f"name[{n // 3}]", "ref": f"place {n}"} for n in range(30)]
    source = write_jsonl(tmp_path / "all.jsonl", rows)
    files = write_rows(Place(task=task, train=source, held_out=source, shipped=False), tmp_path, (6, 50))
    assert read_jsonl(files.train)[1] == {"prompt": "name[1]", "completion": "place 3"}
    assert (len(read_jsonl(files.train)), len(read_jsonl(files.held_out))) == (6, 10)
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"mr": "a secret"}])
    with pytest.raises(DataError, match="lacks a field") as refused:
        write_rows(Place(task=task, train=bad, held_out=bad, shipped=False), tmp_path, (6, 6))
    assert "secret" not in str(refused.value)
    odd = write_jsonl(tmp_path / "odd.jsonl", [{"text": "a secret", "label": "eggs"}])
    with pytest.raises(DataError, match="holds a class") as refused:
        write_rows(Place(task=TASKS["spam"], train=odd, held_out=odd, shipped=False), tmp_path, (6, 6))
    assert (refused.value.expected, "secret" in str(refused.value)) == ("ham, spam", False)
    (tmp_path / "torn.jsonl").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="cannot be read as rows"):
        list(offsite_rows._read(tmp_path / "torn.jsonl"))


def test_public_text_is_not_of_the_tasks(tmp_path, monkeypatch):
    monkeypatch.setenv("SPLITFL_SHARED", str(tmp_path / "none"))
    path, shipped = write_public_text(tmp_path, quick=False)
    assert shipped
    texts = [row["text"] for row in read_jsonl(path)]
    assert len(texts) > 300
    rows = read_jsonl(assets() / "data" / "hospital.train.jsonl") + read_jsonl(
        assets() / "data" / "hospital.held.jsonl"
    )
    assert not [row for row in rows if any(row["completion"] in text for text in texts)]
    monkeypatch.undo()
    path, shipped = write_public_text(tmp_path, quick=False)
    if shipped:
        pytest.skip("the shared texts are not here: name their folder in SPLITFL_SHARED")
    texts = [row["text"] for row in read_jsonl(path)]
    assert 1500 < len(texts) <= 1800
    assert all(150 < len(text) <= 700 for text in texts)


# ---- real trainings on a tiny model


def tuning(tiny, folder, **more):
    _, kit, train, held_out = tiny
    return TuneSettings(
        kit=kit, train=train, eval=held_out, out=folder / "run", json=folder / "run.json", ledger=folder / "l.sqlite",
        max_steps=6, threads=1, per_device_train_batch_size=4, learning_rate=1e-2, target_modules=("all-linear",),
        protocol="guarded-offline", **more,
    )  # fmt: skip


def keeping(tiny, out, kept):
    kit = open_kit(tiny[1])
    write_emulator(whole_model(tiny[0]), kit, out, kept=kept, chosen_by="uniform")
    return out


def plugged(tiny, told):
    given = PluginSettings(
        model=str(tiny[0]), kit=told.kit, adapter=(told.out / "adapter",), eval=told.eval, json=told.out / "p.json"
    )
    from model_owner.plugin import plugin

    plugin(given, evaluate)
    results = json.loads(given.json.read_text(encoding="utf-8"))["results"]
    return next(r for r in results if (r["case"], r["metric"]) == ("plug-in", "loss"))


def test_with_every_layer_kept_the_margin_is_nothing_and_with_fewer_it_is_not(tiny, tmp_path):
    trunk = open_kit(tiny[1]).plan.trunk_layers
    margins = {}
    for name, kept in (("all", tuple(trunk)), ("one", (trunk[0],))):
        told = tuning(tiny, tmp_path / name, emulator=keeping(tiny, tmp_path / name / "emulator", kept))
        figures, result = train_cell(told, None), plugged(tiny, told)
        assert figures["held-out loss"] != figures["held-out loss before"]
        outcomes = Outcomes(settings=settings())
        cell = Cell(model="tiny", task=TASKS["answers"], training=OFFSITE, seed=0)
        full = {"held-out loss": result["value"], "held-out loss before": result["reference"]}
        outcomes.note(cell, figures, full)
        loss = {way: outcomes.ways[way_name("tiny", "answers", way, 0)]["held-out loss"] for way in WAYS[:4]}
        margins[name] = loss[EMULATOR_TUNED] - loss[PLUGIN], loss[EMULATOR_ZERO] - loss[FULL_ZERO]
    assert margins["all"] == (0.0, 0.0)
    assert abs(margins["one"][0]) > 1e-5
    assert abs(margins["one"][1]) > 1e-5


def test_training_on_the_emulator_computes_less_and_the_same_every_time(tiny, tmp_path):
    emulator = keeping(tiny, tmp_path / "emulator", (open_kit(tiny[1]).plan.trunk_layers[0],))
    told = tuning(tiny, tmp_path, emulator=emulator)
    to_toml(told, tmp_path / "t.toml")
    sides = [
        offsite_side.open_side(SideStart(settings=str(tmp_path / "t.toml"), whole=whole))
        for whole in (None, str(tiny[0]))
    ]
    flops = [side.answer(CountFlops(rows=2, length=16)).flops for side in sides]
    trained = [sum(p.numel() for p in side.model.parameters() if p.requires_grad) for side in sides]
    layers = open_kit(tiny[1]).plan.layers
    assert trained[1] / layers == trained[0] / len(open_kit(tiny[1]).plan.party_layers)
    assert 0 < flops[0] < flops[1]
    first, *_, last = [sides[0].answer(Step(rows=2, length=16)).loss for _ in range(5)]
    assert last < first, "the steps do train"
    assert all(param.grad is None for param in sides[1].model.parameters()), "counting leaves nothing behind"


def test_a_classifier_can_be_measured_too(tmp_path):
    model = save_tiny("gpt2", tmp_path / "model")
    kit = make_kit(model, tmp_path / "kit", task="sequence-classification", dtype="float32")
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": "fine", "label": "praise"}])
    told = tuning((model, kit, rows, rows), tmp_path, emulator=tmp_path / "none")
    to_toml(told, tmp_path / "t.toml")
    side = offsite_side.open_side(SideStart(settings=str(tmp_path / "t.toml"), whole=str(model)))
    assert math.isfinite(side.answer(Step(rows=3, length=8)).loss)


# ---- figures


def scores(loss, accuracy=None, **more):
    figures = {"held-out loss": loss[1], "held-out loss before": loss[0]}
    if accuracy is not None:
        figures |= {"held-out accuracy": accuracy[1], "held-out accuracy before": accuracy[0]}
    return {**figures, "seconds": 9.0, "steps": 60, "learning rate": 5e-3, **more}


def noted(outcomes, *tasks, seeds=(0, 1, 2), model="embedded"):
    """Every training of some tasks; the seeds differ a little."""
    for task in map(TASKS.__getitem__, tasks):
        facts = {"training rows": 300, "held-out rows": 40, "steps": 60, "rows of a batch": 8}
        outcomes.tell(task.name, {**facts, "rows come with splitfl": int(task.name == "answers")})
        for seed in seeds:
            off = 0.01 * seed
            for training, loss, hit in (
                (OFFSITE, (4.5, 3.2 + 2 * off), (0.5, 0.6)),
                (FULL_TUNED, (4.0, 2.0), (0.5, 0.75)),
                (SPLIT, (4.0, 2.4), (0.5, 0.72)),
            ):
                cell = Cell(model=model, task=task, training=training, seed=seed)
                owner = scores((4.0, 2.5 + 2 * off), (0.5, 0.7 - off)) if training == OFFSITE else None
                crossed = {} if training == FULL_TUNED else {"bytes sent": 5e5, "bytes received": 2e7}
                outcomes.note(cell, scores(loss, hit if task.classes else None, **crossed), owner)
    return outcomes


def test_differences_are_above_nothing_where_the_first_is_better():
    ways = noted(Outcomes(settings=settings()), "answers", "polarity").ways
    by_seed = {
        task: {seed: {way: ways[way_name("embedded", task, way, seed)] for way in WAYS} for seed in (0, 1, 2)}
        for task in ("answers", "polarity")
    }
    found = comparisons("answers", by_seed["answers"])
    assert found[MARGIN].mean == pytest.approx(0.7)
    assert found[GAIN] == Spread(mean=pytest.approx(1.48), low=pytest.approx(1.46), high=pytest.approx(1.5))
    assert found[GAP].mean == pytest.approx(0.52)
    assert found[SHARE].mean == pytest.approx(0.74)
    assert reached(found) == (True, False)
    found = comparisons("polarity", by_seed["polarity"])
    assert [found[name].mean for name in (MARGIN, GAIN, GAP)] == pytest.approx([0.09, 0.19, 0.06])
    assert found[SHARE].low == pytest.approx(0.18 / 0.25)
    assert reached(found) == (True, True)
    del by_seed["answers"][2][FULL_TUNED]
    assert comparisons("answers", by_seed["answers"])[GAIN].low == pytest.approx(1.48), "a seed without it is left out"
    hopeless = {0: {**by_seed["answers"][0], FULL_TUNED: by_seed["answers"][0][FULL_ZERO]}}
    tie = {name: Spread(mean=0.1 + 0.2 - 0.3, low=-0.1, high=0.1) for name in (MARGIN, GAIN)}
    assert tie[MARGIN].mean > 0
    assert reached(tie) == (False, False), "rounding is no margin"
    assert SHARE not in comparisons("answers", hopeless)
    assert reached(comparisons("answers", hopeless)) == (True, False)


def test_figures_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "f.json"
    outcomes = noted(Outcomes(settings=settings(json=path)), "answers")
    trial = Cell(model="embedded", task=TASKS["answers"], training=OFFSITE, seed=0, rate=RATES[0])
    outcomes.note_trial(trial, {"held-out loss": math.nan})
    costs = {SPEED: 100.0, MEMORY: 2e8, PEAK: 7e8, FLOPS: 1e7}
    outcomes.tell(cost_case("embedded", ON_EMULATOR), costs)
    outcomes.tell(cost_case("embedded", ON_WHOLE), {**costs, SPEED: 50.0, MEMORY: 4e8})
    again = Outcomes.resumed(settings(json=path, resume=True))
    assert (again.ways, again.told) == (outcomes.ways, outcomes.told)
    assert again.trials == {trial.name: math.inf}, "a loss that is no number is none to choose"
    assert again.has(trial)
    assert again.has(Cell(model="embedded", task=TASKS["answers"], training=SPLIT, seed=2))
    assert not again.has(Cell(model="other", task=TASKS["answers"], training=SPLIT, seed=2))
    found = {(r["case"], r["metric"]): r for r in json.loads(path.read_text(encoding="utf-8"))["results"]}
    assert found["embedded / answers", MARGIN]["reach"] == 0.0
    assert found["embedded / answers", SHARE]["reach"] == 0.75
    assert found["embedded / answers", SHARE]["value"] == pytest.approx(0.74)
    assert (found["embedded", SPEED_UP]["value"], found["embedded", SPEED_UP]["reach"]) == (2.0, 1.5)
    assert found["embedded", LESS_MEMORY]["value"] == 0.5
    case = way_name("embedded", "answers", PLUGIN, 1)
    assert found[case, "bytes received"] == {
        "case": case, "metric": "bytes received", "value": 2e7, "unit": "bytes", "reference": None, "ratio": None,
        "reach": None,
    }  # fmt: skip
    assert (way_name("embedded", "answers", FULL_TUNED, 1), "bytes sent") not in found


def test_figures_of_something_else_are_not_gone_on_with(tmp_path):
    path = tmp_path / "f.json"
    noted(Outcomes(settings=settings(json=path)), "answers", seeds=(0,))
    for change in ({"max_steps": 5}, {"quick": True}, {"keep": 3}, {"distil_steps": 1}):
        with pytest.raises(UsageError, match="other settings"):
            Outcomes.resumed(settings(json=path, **change))
    again = Outcomes.resumed(settings(json=path))
    with pytest.raises(UsageError, match="had other training rows"):
        again.tell("answers", {**again.told["answers"], "training rows": 299})
    again.tell("m / emulator for causal-lm", {"trunk": "aa", "distillation": 3.0})
    again.tell("m / emulator for causal-lm", {"trunk": "aa", "distillation": 4.0})
    with pytest.raises(UsageError, match="had other trunk"):
        again.tell("m / emulator for causal-lm", {"trunk": "bb", "distillation": 3.0})
    text = path.read_text(encoding="utf-8")
    for spoilt, said in (("[]", "not a file of figures"), (text.replace('"offsite"', '"utility"'), "other figures")):
        path.write_text(spoilt, encoding="utf-8")
        with pytest.raises(DataError, match=said):
            Outcomes.resumed(settings(json=path))


def test_the_rate_with_the_least_validation_loss_is_taken(tmp_path):
    outcomes, task = Outcomes(settings=settings()), TASKS["answers"]
    assert outcomes.best_rate("m", task, OFFSITE) == RATES[1], "without a trial"
    for rate, loss in zip(RATES, (2.0, 1.5), strict=True):
        cell = Cell(model="m", task=task, training=OFFSITE, seed=0, rate=rate)
        outcomes.note_trial(cell, {"held-out loss": loss})
    assert outcomes.best_rate("m", task, OFFSITE) == RATES[1]
    first = Cell(model="m", task=task, training=OFFSITE, seed=0, rate=RATES[0])
    outcomes.note_trial(first, {"held-out loss": 1.0})
    assert outcomes.best_rate("m", task, OFFSITE) == RATES[0]
    outcomes.note_trial(first, {"held-out loss": math.nan})
    assert outcomes.best_rate("m", task, OFFSITE) == RATES[1], "a loss that is no number is never the least"
    assert outcomes.best_rate("m", task, SPLIT) == RATES[1]
    assert outcomes.best_rate("other", task, OFFSITE) == RATES[1]


# ---- tables and the page


def test_the_terminal_shows_all_six_ways_in_their_order(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    print_tables(noted(Outcomes(settings=settings()), "answers"))
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "embedded, answers: loss in nats, lower is better; mean and range of 3 seeds"
    assert [re.split(r"\s{2,}|\s(?=\d)", line)[0] for line in lines[2:8]] == list(WAYS)
    assert lines[5].split() == ["plug-in", "2.520", "2.500", "to", "2.540", "2.520", "20.0", "MB", "500.0", "kB",
                                "9.0", "s"]  # fmt: skip
    assert "share of full fine-tuning's gain: 74.0% (73.0% to 75.0%); aim: at least 75%" in lines
    print_tables(Outcomes(settings=settings()))
    assert capsys.readouterr().out == ""


@pytest.fixture
def figures(tmp_path):
    """A file of figures, and a page with a place for them."""
    outcomes = noted(Outcomes(settings=settings(json=tmp_path / "f.json")), "answers", "polarity")
    noted(outcomes, "answers", model="other")
    facts = {
        "trunk": "aa", "layers given": 4, "layers of the trunk": 8, "parameters given": 2_000_000, "kit": 15_000_000,
        "emulator": 11_000_000, "public loss, full model": 3.0, "public loss, layers left out": 4.0,
        "public loss, as handed out": 3.5, "distilled steps": 400, "distillation": 100.0,
    }  # fmt: skip
    outcomes.tell("embedded / emulator for causal-lm", facts)
    costs = {SPEED: 100.0, MEMORY: 2e8, PEAK: 7e8, FLOPS: 1e7}
    outcomes.tell(cost_case("embedded", ON_EMULATOR), costs)
    outcomes.tell(cost_case("embedded", ON_WHOLE), {**costs, SPEED: 50.0, MEMORY: 4e8})
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "offsite.md").write_text(f"# Page\n\n{BEGIN}\nold\n{END}\n\nRest.\n", encoding="utf-8")
    return tmp_path / "f.json", docs


def test_the_page_is_filled_from_the_figures_and_again_from_its_summary(figures, capsys):
    file, docs = figures
    assert offsite_page.main([str(file), "--docs", str(docs)]) == 0
    page = (docs / "offsite.md").read_text(encoding="utf-8")
    assert page.startswith(f"# Page\n\n{BEGIN}\nWritten by")
    assert page.endswith(f"{END}\n\nRest.\n")
    assert "old" not in page.partition(BEGIN)[2].splitlines()
    assert "| *answers* | plug-in | 2.520 | 2.500 to 2.540 | 2.520 | 20.0 MB | 500.0 kB | 9.0 s |" in page
    assert "+0.700 (+0.700 to +0.700) | +1.480 (+1.460 to +1.500) | +0.520 (+0.500 to +0.540)" in page
    assert "| 74.0% (73.0% to 75.0%) | yes, no |" in page
    assert "2.00 times the tokens a second of full LoRA (aim: 1.5), 0.50 times its memory" in page
    assert (
        "- *embedded*: the plug-in is better than the tuned emulator and than zero-shot on 2 of 2 tasks, and has 75% "
        in page
    )
    assert "emulator for causal-lm: 4 of the trunk's 8 layers" in page
    assert "full model 3.000" in page
    assert max(len(line) for line in page.splitlines() if not line.startswith(("|", "- "))) <= 400
    assert not re.search(r"\b(private|secure|anonym\w+)\b", page, re.IGNORECASE)
    svg = (docs / offsite_page.PICTURE).read_text(encoding="utf-8")
    assert len(svg) < 200_000
    assert "embedded, answers" in svg
    (docs / "offsite.md").write_text(page.replace("2.520", "9.999"), encoding="utf-8")
    assert offsite_page.main(["--docs", str(docs)]) == 0
    assert (docs / "offsite.md").read_text(encoding="utf-8") == page
    (docs / "offsite.md").write_text("no place", encoding="utf-8")
    assert offsite_page.main(["--docs", str(docs)]) != 0
    assert "no place" in capsys.readouterr().err


def test_models_that_were_measured_before_can_be_kept(figures, tmp_path, capsys):
    file, docs = figures
    assert offsite_page.main([str(file), "--docs", str(docs)]) == 0
    page, summary = ((docs / name).read_text(encoding="utf-8") for name in ("offsite.md", offsite_page.SUMMARY))
    noted(Outcomes(settings=settings(json=tmp_path / "g.json")), "answers", model="third")
    assert offsite_page.main([str(tmp_path / "g.json"), "--docs", str(docs), "--keep"]) == 0
    after = json.loads((docs / offsite_page.SUMMARY).read_text(encoding="utf-8"))
    before = json.loads(summary)
    assert list(dict.fromkeys(row["model"] for row in after["rows"])) == ["embedded", "other", "third"]
    assert [row for row in after["rows"] if row["model"] != "third"] == before["rows"]
    assert (after["emulators"], after["costs"]) == (before["emulators"], before["costs"])
    assert set(after["comparisons"]) == {*before["comparisons"], "third / answers"}
    assert "#### The model *third*" in (docs / "offsite.md").read_text(encoding="utf-8")
    # What was measured elsewhere is told apart.
    before["machine"] |= {"processor": "Another Processor"}
    (docs / offsite_page.SUMMARY).write_text(json.dumps(before), encoding="utf-8")
    assert offsite_page.main([str(tmp_path / "g.json"), "--docs", str(docs), "--keep"]) == 0
    told = (docs / "offsite.md").read_text(encoding="utf-8")
    assert "*embedded*: Another Processor" in told
    assert "*third*: Another" not in told
    # The file's own models take the place of those kept; figures of other settings are no one table.
    assert offsite_page.main([str(file), "--docs", str(docs), "--keep"]) == 0
    assert "third" in (docs / "offsite.md").read_text(encoding="utf-8")
    assert offsite_page.main([str(file), "--docs", str(docs)]) == 0
    assert (docs / "offsite.md").read_text(encoding="utf-8") == page
    noted(Outcomes(settings=settings(json=tmp_path / "h.json", distil_steps=7)), "answers", model="third")
    assert offsite_page.main([str(tmp_path / "h.json"), "--docs", str(docs), "--keep"]) == 2
    assert "another settings" in capsys.readouterr().err
    assert (docs / offsite_page.SUMMARY).read_text(encoding="utf-8") == summary


def test_a_page_of_nothing_or_of_a_quick_run_is_refused(tmp_path, capsys):
    for given, said in (({}, "holds no run"), ({"quick": True}, "figures mean nothing")):
        outcomes = Outcomes(settings=settings(json=tmp_path / "f.json", **given))
        if given:
            noted(outcomes, "answers", seeds=(0,))
        outcomes.write()
        assert offsite_page.main([str(tmp_path / "f.json"), "--docs", str(tmp_path)]) == 2
        assert said in capsys.readouterr().err


def test_the_page_in_docs_is_made_from_the_summary_beside_it():
    record = json.loads((DOCS / "offsite.json").read_text(encoding="utf-8"))
    page = (DOCS / "offsite.md").read_text(encoding="utf-8")
    assert page == offsite_page.filled(page, record), "python -m splitfl.bench.offsite_page"
    assert (DOCS / offsite_page.PICTURE).is_file()
    for entry in record["rows"]:
        assert entry["score"]["low"] <= entry["score"]["mean"] <= entry["score"]["high"]
    assert not record["settings"]["quick"]
    assert "\n".join(section(record)) in page


# ---- the second model


@pytest.fixture(scope="module")
def taught():
    """A narrow teacher with the embedded tokenizer, and a model of GPT-2's shape that begins with its embeddings."""
    tokenizer = AutoTokenizer.from_pretrained(assets() / "model", local_files_only=True)
    shape = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    torch.manual_seed(1)
    teacher = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **shape))
    gpt2 = {"n_layer": 2, "n_embd": 24, "n_head": 2, "n_positions": 32}
    return teacher, build_gpt2(gpt2, tokenizer, teacher, seed=3)


def test_the_second_model_begins_with_its_teachers_embeddings_turned(taught):
    teacher, model = taught
    known, mine = (m.get_input_embeddings().weight.detach()[:50] for m in (teacher, model))
    angles = [torch.nn.functional.cosine_similarity(e[:, None], e[None], dim=-1) for e in (known, mine)]
    assert torch.allclose(*angles, atol=1e-5)
    assert model.get_input_embeddings().weight.std().item() == pytest.approx(0.02, rel=1e-3)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_teacher_counts_in_training_and_not_in_evaluation(taught, tmp_path):
    teacher, model = taught
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    ids = torch.randint(3, 4000, (2, 9), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    trainer = TaughtTrainer(model=model, args=args, teacher=teacher, teacher_weight=0.25)
    with torch.no_grad():
        plain = trainer.compute_loss(model.eval(), batch)
        taught_loss = trainer.compute_loss(model.train(), batch)
        model.eval()
        p, q = teacher(input_ids=ids).logits[:, :-1].softmax(-1), model(input_ids=ids).logits[:, :-1].softmax(-1)
        divergence = (p * (p.log() - q.log())).sum(-1).mean()
    assert plain.item() == pytest.approx(model(**batch).loss.item(), rel=1e-6)
    # The model's own dropout is 0.1 in this shape, so the two passes differ a little.
    assert taught_loss.item() == pytest.approx((0.75 * plain + 0.25 * divergence).item(), rel=0.02)
    assert abs(taught_loss.item() - plain.item()) > 0.5
    alone = TaughtTrainer(model=model, args=args, teacher=None, teacher_weight=0.25)
    assert alone.compute_loss(model.eval(), batch).item() == plain.item()


# ---- a whole run


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_that_was_broken_off_goes_on_and_ends_with_all_six_ways(tmp_path, monkeypatch, capsys):
    given = {"quick": True, "tasks": ("answers",), "json": tmp_path / "f.json", "cache": tmp_path / "cache"}
    done = offsite.UtilityCourse.done

    def stop(course, name, words):
        done(course, name, words)
        raise KeyboardInterrupt

    monkeypatch.setattr(offsite.UtilityCourse, "done", stop)
    with pytest.raises(KeyboardInterrupt):
        bench(settings(**given))
    monkeypatch.undo()
    first = Outcomes.resumed(settings(**given))
    assert {parse_way(case)[2] for case in first.ways} == {FULL_ZERO, EMULATOR_ZERO, EMULATOR_TUNED, PLUGIN}
    [emulator] = (tmp_path / "cache").glob("*/emulator/emulator.json")
    made = emulator.stat().st_mtime_ns
    capsys.readouterr()
    bench(settings(**given, resume=True))
    said = capsys.readouterr()
    assert "[2/2] embedded / answers / split / seed 0" in said.err
    assert "plug-in / seed 0" not in said.err, "what was done is not done again"
    assert emulator.stat().st_mtime_ns == made
    last = Outcomes.resumed(settings(**given))
    assert {case: last.ways[case] for case in first.ways} == first.ways
    [(model, task)] = {(row.model, row.task) for row in summarise(last.ways)}
    assert [row.way for row in summarise(last.ways)] == list(WAYS)
    assert all(math.isfinite(row.loss.mean) and 0 < row.loss.mean < 9 for row in summarise(last.ways))
    zero = {last.ways[way_name(model, task, way, 0)]["held-out loss"] for way in (FULL_ZERO, EMULATOR_ZERO)}
    assert len(zero) == 2
    mine, whole = (last.told[cost_case(model, what)] for what in (ON_EMULATOR, ON_WHOLE))
    assert mine[FLOPS] < 0.75 * whole[FLOPS]
    assert mine[MEMORY] > 0
    assert mine["tokens of a batch"] == ROWS * LENGTH
    before = (tmp_path / "f.json").read_bytes()
    bench(settings(**given, resume=True))  # nothing is left: only the table is shown
    assert (tmp_path / "f.json").read_bytes() == before
    assert "plug-in" in capsys.readouterr().out


def test_trainings_that_failed_are_told_at_the_end(monkeypatch):
    def opened(settings, outcomes, places, work, course):
        outcomes.failed["embedded / answers / split / seed 0"] = "no room"
        raise ResourceError("stopped")

    monkeypatch.setattr(offsite, "_opened", opened)
    with pytest.raises(ResourceError, match="stopped"):
        bench(settings(quick=True, tasks=("answers",)))
