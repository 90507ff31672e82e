"""`splitfl federate` and `splitfl tune --federate`: real processes, keys and sums."""

from __future__ import annotations

import json
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from party.whole import whole_with_lora
from splitfl.aggregation.peft_format import adapter_from_update, update_from_adapter
from splitfl.aggregation.rules import rule_named
from splitfl.config import TuneSettings
from splitfl.data import Collator, load_rows, tokenise
from splitfl.kit import open_kit
from tests.federation.federation import PARTIES, coordinate, make_keys
from tests.live.child import splitfl
from tests.live.models import Rows, answer_rows, whole_model, write_jsonl
from tests.live.owner import serve
from tests.live.runs import adapter_in, events

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

STEPS = 3


@pytest.fixture
def places(tmp_path):
    make_keys(tmp_path)
    return tmp_path


def options(tiny_llama: tuple[Path, Path], rows: Rows, **more: Any) -> list[str]:
    """What all parties give to `splitfl tune`."""
    model_dir, kit_dir = tiny_llama
    given = {
        "protocol": "fed-params", "model": model_dir, "kit": kit_dir, "train": rows.train, "eval": rows.held_out,
        "local-steps": STEPS, "per-device-train-batch-size": 4, "learning-rate": 5e-3, "target-modules": "all-linear",
        "logging-steps": 1, "threads": 1, "lr-scheduler-type": "cosine", "timeout": 60, **more,
    }  # fmt: skip
    return [str(word) for name, value in given.items() if value is not None for word in (f"--{name}", value)]


def other_rows(folder: Path) -> dict[str, Rows]:
    """Other rows for each party, and the same held-out rows for all."""
    made = answer_rows()
    held = write_jsonl(folder / "held.jsonl", made[42:])
    return {
        name: Rows(train=write_jsonl(folder / f"{name}.jsonl", made[14 * n : 14 * n + 14]), held_out=held)
        for n, name in enumerate(PARTIES)
    }


def reference(tiny_llama, rows: Rows, rounds: int, rule: str) -> dict[str, torch.Tensor]:
    """Plain PEFT and the library's own trainer, begun anew each round from the same start: one party alone."""
    model_dir, kit_dir = tiny_llama
    kit = open_kit(kit_dir)
    settings = TuneSettings(
        kit=kit_dir, out=Path("none"), train=rows.train, protocol="fed-params", model=model_dir, sum="plain",
        federate="tcp://127.0.0.1:1", coordinator_key=Path("c"), key=Path("k"), target_modules=("all-linear",),
    )  # fmt: skip
    model = whole_with_lora(settings, kit, model_dir)
    chosen = rule_named(rule)
    config = model.peft_config["default"]
    start = chosen.first(update_from_adapter(_stored(model), config), 0)
    set_peft_model_state_dict(model, adapter_from_update(start.adapter, config))
    examples = tokenise(
        load_rows(rows.train, task="causal-lm"), kit.tokenizer(), max_length=kit.plan.max_length or 2048
    )
    for number in range(rounds):
        part = chosen.trains(number)
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.requires_grad_(part == "both" or f".lora_{part}." in name)
        args = TrainingArguments(
            output_dir="none", use_cpu=True, max_steps=STEPS, per_device_train_batch_size=4, learning_rate=5e-3,
            lr_scheduler_type="constant", seed=number, optim="adamw_torch", report_to="none", disable_tqdm=True,
            save_strategy="no",
            remove_unused_columns=False, label_names=["labels"], dataloader_pin_memory=False,
        )  # fmt: skip
        collator = Collator(kit.tokenizer(), pad_token_id=kit.config.pad_token_id)
        Trainer(model=model, args=args, train_dataset=list(examples), data_collator=collator).train()
    return _stored(model)


def _stored(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(model).items()}


@pytest.mark.parametrize("rule", ["fedit", pytest.param("rolora", marks=pytest.mark.long)])
def test_one_party_alone_trains_as_plain_lora_does(tiny_llama, rows, places, rule):
    words = options(tiny_llama, rows, **{"sum": "plain", "rule": rule, "lr-scheduler-type": "constant"})
    with (
        coordinate(places, "--sum", "plain", "--rule", rule, "--rounds", 2, "--min-parties", 1) as there,
        ExitStack() as s,
    ):
        party = there.start(s, "hospital", places / "run", *words)
        assert party.wait() == 0, party.stderr.text
        assert there.running.wait() == 0
    expected = reference(tiny_llama, rows, 2, rule)
    came = load_file(places / "run" / "last" / "adapter_model.safetensors")  # beside it stands the best round's
    assert came.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(came[name], expected[name])] == []


@pytest.fixture(scope="module")
def plain_run(tiny_llama, tmp_path_factory):
    """Three parties with rows of their own, summed in the clear: what protected sums are compared with."""
    return run_three(tiny_llama, tmp_path_factory.mktemp("plain"), "plain")


def run_three(tiny_llama, folder: Path, summation: str, rule: str = "rolora", **more: Any) -> Path:
    make_keys(folder)
    with coordinate(folder, "--sum", summation, "--rule", rule, "--rounds", 2, "--min-parties", 3) as there:
        with ExitStack() as stack:
            parties = [
                there.start(
                    stack, name, folder / f"run-{name}",
                    *options(tiny_llama, rows, sum=summation, rule=rule, json=folder / f"{name}.json", **more),
                )
                for name, rows in other_rows(folder).items()
            ]  # fmt: skip
            for party in parties:
                assert party.wait() == 0, party.stderr.text + there.running.stderr.text
        assert there.running.wait() == 0
    return folder


def test_three_parties_end_with_one_adapter_that_fits_the_whole_model(tiny_llama, plain_run):
    adapters = [adapter_in(plain_run / f"run-{name}") for name in PARTIES]
    for other in adapters[1:]:
        assert all(torch.equal(adapters[0][name], other[name]) for name in adapters[0])
    model = PeftModel.from_pretrained(whole_model(tiny_llama[0]), plain_run / "run-clinic" / "adapter")
    assert model.peft_config["default"].r == 8
    rounds = events(plain_run / "run-clinic", "round")
    assert [r["kept"] for r in rounds] == [True, True]
    assert all(r["common"] is not None and r["personal"] is not None for r in rounds)
    before, *_, after = events(plain_run / "run-clinic", "eval")
    assert after["loss"] < before["loss"]
    splitfl("evaluate", "--run", plain_run / "run-clinic", "--eval", plain_run / "held.jsonl", "--json", "out.json",
            folder=plain_run)  # fmt: skip
    found = {
        r["metric"]: r["value"] for r in json.loads((plain_run / "out.json").read_text(encoding="utf-8"))["results"]
    }
    assert found["loss"] == pytest.approx(after["loss"], abs=1e-5)
    told = json.loads((plain_run / "run-clinic" / "disclosure.json").read_text(encoding="utf-8"))
    assert told["federation"]["coordinator_sees"].startswith("every update")


@pytest.mark.parametrize("summation", ["mask", pytest.param("mask+hidden", marks=pytest.mark.long), "bfv"])
def test_sums_that_hide_updates_give_the_adapter_of_plain_ones(tiny_llama, plain_run, tmp_path, summation):
    if summation == "bfv":
        pytest.importorskip("tenseal", reason="the extra he is not installed")
    hidden = adapter_in(run_three(tiny_llama, tmp_path, summation) / "run-hospital")
    # A step of the grid is 2 / 2^32 for each of three parties at the largest weight, 10,000; these have 14: about 1e-6.
    # Between the two rounds Adam divides by the size of a gradient, so values with next to none may go another way.
    plain = adapter_in(plain_run / "run-hospital")
    apart = torch.cat([(hidden[name] - tensor).abs().flatten() for name, tensor in plain.items()])
    assert float((apart > 1e-5).float().mean()) < 0.01
    assert float(apart.max()) < 5e-3  # the learning rate: less than one step of one value


@pytest.mark.parametrize(
    "rule",
    ["flora", *(pytest.param(rule, marks=pytest.mark.long) for rule in ("fedex", "fedsa", "fed-sb", "fedlrt", "fra"))],
)
def test_rules_that_merge_keep_apart_or_train_cores_go_through_the_network(tiny_llama, tmp_path, rule):
    folder = run_three(tiny_llama, tmp_path, "plain", rule)
    runs = [adapter_in(folder / f"run-{name}") for name in PARTIES]
    same = all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert same is (rule != "fedsa")
    before, *_, after = events(folder / "run-clinic", "eval")
    assert after["loss"] < before["loss"]


def test_a_party_that_is_killed_comes_back_and_the_federation_ends(tiny_llama, tmp_path):
    make_keys(tmp_path)
    rows = other_rows(tmp_path)
    asked = ("--sum", "mask", "--rounds", 3, "--min-parties", 3, "--wait", 60, "--deadline", 60, "--stage-deadline", 30)
    with coordinate(tmp_path, *asked) as there, ExitStack() as stack:
        running = {
            name: there.start(stack, name, tmp_path / name, *options(tiny_llama, rows[name])) for name in PARTIES
        }
        running["surgery"].stderr.wait_for("round 0 kept")
        running["surgery"].process.send_signal(signal.SIGKILL)
        running["surgery"].wait()
        again = there.start(stack, "surgery", tmp_path / "surgery", *options(tiny_llama, rows["surgery"]), "--resume")
        for party in (running["hospital"], running["clinic"], again):
            assert party.wait() == 0, party.stderr.text + there.running.stderr.text
        assert there.running.wait() == 0
    adapters = [adapter_in(tmp_path / name) for name in PARTIES]
    assert all(torch.equal(adapters[0][name], adapters[2][name]) for name in adapters[0])


def test_parties_split_against_one_owner(tiny_llama, tmp_path):
    folder = tmp_path / "rounds"
    make_keys(folder)
    with serve(*tiny_llama, tmp_path / "owner", options=["--parties", folder / "parties"]) as owner:
        link = {"owner": owner.address, "owner-key": owner.keys / "owner.key"}
        with coordinate(folder, "--rounds", 2) as there, ExitStack() as stack:
            parties = [
                there.start(
                    stack, name, folder / f"run-{name}",
                    *options(tiny_llama, rows, **{"protocol": "fed-split", "model": None, **link}),
                )
                for name, rows in other_rows(folder).items()
            ]  # fmt: skip
            for party in parties:
                assert party.wait() == 0, party.stderr.text
    layers = {name.split(".layers.")[1].split(".")[0] for name in adapter_in(folder / "run-clinic")}
    assert layers == {"0", "1", "4", "5"}
    assert events(folder / "run-clinic", "end")[0]["bytes_sent"] > 0


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"rule": "fedit"}, "rule"),
        ({"r": 4}, "layout"),
        ({"federation-seed": 7}, "tuned"),
    ],
)
def test_a_party_of_another_federation_is_refused(tiny_llama, rows, places, changed, says):
    with coordinate(places, "--rounds", 1, "--sum", "plain", "--min-parties", 2) as there, ExitStack() as stack:
        first = there.start(stack, "hospital", places / "one", *options(tiny_llama, rows, sum="plain"))
        there.running.stderr.wait_for("hospital has entered")
        second = there.start(stack, "clinic", places / "two", *options(tiny_llama, rows, sum="plain", **changed))
        assert second.wait() == 8, second.stderr.text
        assert says in second.stderr.text.lower()
        first.end()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"peers": None}, "--peers"),
        ({"model": None}, "--model"),
        ({"rule": "flora"}, "in the clear"),
        ({"rule": "rolara"}, "rolora"),
        ({"rule-option": "speed=3"}, "option"),
        ({"federation-r": 4}, "--federation-r"),
    ],
)
def test_what_cannot_be_is_refused_before_anybody_is_reached(tiny_llama, rows, places, changed, says):
    keys = places / "keys"
    link = {
        "federate": "tcp://127.0.0.1:9", "coordinator-key": keys / "coordinator.key", "key": keys / "clinic.key_secret",
        "peers": places / "parties", "out": places / "run",
    }  # fmt: skip
    ended = splitfl("tune", *options(tiny_llama, rows, **{**link, **changed}), folder=places, code=2)
    assert says in ended.stderr.text
