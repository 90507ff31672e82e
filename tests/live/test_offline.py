"""Protocol guarded-offline: an emulator in the middle, nobody on the line, and an adapter that fits the full model."""

from __future__ import annotations

import json
import signal
import sys

import pytest
import torch
from peft import PeftModel
from transformers import Trainer, TrainingArguments

from party.bookkeeping import run_name
from party.offline import emulated_model, find_emulator, plan_offline, train_offline
from party.opening import open_book
from party.private_plan import adapter_rho
from party.rundir import RunDirectory
from party.tune import read_data
from protocols import PROTOCOLS
from splitfl.adapters import add_lora, lora_config, save_adapter
from splitfl.emulator import uniform_layers, write_emulator
from splitfl.errors import INTERRUPTED_EXIT_CODE
from splitfl.kit import open_kit
from splitfl.load import layer_of
from splitfl.privacy.ledger import Ledger, rho_for
from tests.live.child import child, splitfl_here
from tests.live.models import make_kit, save_tiny, whole_model
from tests.live.pairs import collator_of, examples_of
from tests.live.recording import recorded_commands
from tests.live.runs import adapter_in, checkpoints, events, loss_row_by_row, write_config

pytestmark = pytest.mark.slow
NAME = "guarded-offline"
ADVERSARY = "whoever gets the adapter"
DP = ("--dp-noise-multiplier", "1.5", "--dp-delta", "1e-5", "--dp-clip", "0.5")
PLAIN = {
    "max_steps": 20, "gradient_accumulation_steps": 1, "lora_dropout": 0.0, "optim": "sgd", "learning_rate": 0.3,
    "save_steps": 100, "max_grad_norm": 0.0, "eval_steps": 10,
}  # fmt: skip


def emulator_of(model_dir, kit_dir, folder, keep):
    kit = open_kit(kit_dir)
    kept = uniform_layers(kit.plan.trunk_layers, keep)
    write_emulator(whole_model(model_dir), kit, folder, kept=kept, chosen_by="uniform")
    return folder


@pytest.fixture(scope="module")
def emulator(tiny_llama, tmp_path_factory):
    """One of the two layers of the trunk."""
    return emulator_of(*tiny_llama, tmp_path_factory.mktemp("emulator") / "half", 1)


@pytest.fixture(scope="module")
def everything(tiny_llama, tmp_path_factory):
    """Both of them: the full model."""
    return emulator_of(*tiny_llama, tmp_path_factory.mktemp("emulator") / "whole", 2)


@pytest.fixture(scope="module")
def config(rows, tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("offline") / "tune.toml", rows, **PLAIN)


def words(tiny_llama, emulator, config, out, *more):
    """Of a run with a ledger of its own beside it."""
    link = ["--kit", tiny_llama[1], "--emulator", emulator, "--protocol", NAME, "--config", config]
    return ["tune", *link, "--out", out, "--ledger", out.parent / "ledger.sqlite", *more]


@pytest.fixture(scope="module")
def plain(tiny_llama, emulator, config, tmp_path_factory):
    out = tmp_path_factory.mktemp("plain") / "run"
    with recorded_commands() as recording:
        splitfl_here(*words(tiny_llama, emulator, config, out, "--json", out.parent / "tune.json"))
    assert recording.messages == [], "no session is opened"
    return out


@pytest.fixture(scope="module")
def bounded(tiny_llama, emulator, config, tmp_path_factory):
    """A run with DP-SGD."""
    out = tmp_path_factory.mktemp("bounded") / "run"
    splitfl_here(*words(tiny_llama, emulator, config, out, *DP))
    return out


def entries(out):
    with Ledger(out.parent / "ledger.sqlite", create=False) as ledger:
        ledger.verify()
        return ledger.export(units=True)["entries"]


def close(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


# ---- the run


def test_a_run_trains_without_an_owner(plain):
    losses = [record["loss"] for record in events(plain, "train")]
    assert min(losses) < losses[0] - 0.3
    [before, *_, after] = events(plain, "eval")
    assert after["loss"] < before["loss"] - 0.1
    [end] = events(plain, "end")
    assert (end["bytes_sent"], end["bytes_received"]) == (0, 0)
    metrics = {each["metric"] for each in json.loads((plain.parent / "tune.json").read_text())["results"]}
    assert "held-out loss (with the emulator)" in metrics
    assert "held-out loss" not in metrics


def test_its_adapter_loads_onto_the_full_model_by_name_and_shape(plain, tiny_llama):
    kit, held = open_kit(tiny_llama[1]), adapter_in(plain)
    assert {layer_of(name.removeprefix("base_model.model."), kit.plan) for name in held} == {0, 1, 4, 5}
    full = whole_model(tiny_llama[0])
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        untouched = full(input_ids=ids).logits
        tuned = PeftModel.from_pretrained(full, plain / "adapter").eval()  # warnings are errors: no name is missing
        assert (tuned(input_ids=ids).logits - untouched).abs().max() > 1e-2
    on_model = {n.replace(".default", ""): p for n, p in tuned.named_parameters() if "lora_" in n}
    assert close({n: p.detach() for n, p in on_model.items()}, held) == 0


def test_an_untouched_adapter_changes_nothing_on_the_full_model(tiny_llama, emulator, config, tmp_path):
    splitfl_here(*words(tiny_llama, emulator, config, tmp_path / "first", "--max-steps", "1"))
    settings = RunDirectory(tmp_path / "first").settings()
    run, kit = RunDirectory(tmp_path / "run"), open_kit(tiny_llama[1])
    data = read_data(settings, kit)
    preparation = plan_offline(settings, kit, data.train_set)
    with (
        open_book(settings, run_name(run.path, resumed=False), data.sets) as book,
        train_offline(settings, kit, run, data, preparation, book) as place,
    ):
        save_adapter(place.model, run.adapter, base_name="full")
    full = whole_model(tiny_llama[0])
    ids = torch.arange(3, 60).view(3, 19)
    with torch.no_grad():
        untouched = full(input_ids=ids).logits
        assert torch.equal(PeftModel.from_pretrained(full, run.adapter).eval()(input_ids=ids).logits, untouched)


def test_on_an_emulator_of_all_layers_it_is_plain_lora_on_the_full_model(
    tiny_llama, everything, config, rows, tmp_path
):
    out = tmp_path / "run"
    splitfl_here(*words(tiny_llama, everything, config, out))
    kit, whole = open_kit(tiny_llama[1]), whole_model(tiny_llama[0])
    train, _ = examples_of(kit, rows)
    model = add_lora(whole, lora_config(whole, kit.plan, target_modules=["all-linear"]), seed=5)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=20, per_device_train_batch_size=4, optim="sgd", learning_rate=0.3, seed=5,
        lr_scheduler_type="cosine", max_grad_norm=0.0, logging_steps=1, report_to="none", save_strategy="no",
        use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, label_names=["labels"],
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=train, data_collator=collator_of(kit))
    trainer.train()
    expected = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert [record["loss"] for record in events(out, "train")] == pytest.approx(expected, abs=1e-6)
    theirs = {name.replace(".default", ""): p.detach() for name, p in model.named_parameters() if p.requires_grad}
    assert close(adapter_in(out), theirs) < 1e-6


def test_disclosure_and_ledger_say_what_leaves(plain):
    told = json.loads((plain / "disclosure.json").read_text(encoding="utf-8"))
    assert told["protocol"] == NAME
    conversation = {"hello", "welcome", "bye", "closed", "refused"}
    assert {each["message"] for each in told["crossings"]} == conversation | {"fetch", "piece"}
    assert told["adapter"]["bound"].startswith("empirical")
    [entry] = entries(plain)
    assert (entry["channel"], entry["adversary"], entry["unit"]) == ("adapter", ADVERSARY, "row")
    assert (entry["rho"], entry["unit_count"], entry["mechanism"]) == (None, None, "none")


def test_the_protocol_lets_no_tensor_cross_but_parts_of_the_emulator():
    disclosure = PROTOCOLS[NAME].disclosure
    carried = {(crossing.tensor, crossing.direction) for crossing in disclosure.crossings if crossing.tensor}
    assert carried == {("piece", "owner to party")}
    assert not PROTOCOLS[NAME].sends_gradients
    assert not disclosure.allows("forward", ("hidden",), "party to owner")


# ---- using it


def test_evaluate_and_generate_work_with_the_emulator_and_say_so(plain, tiny_llama, rows, tmp_path, capsys):
    splitfl_here("evaluate", "--run", plain, "--eval", rows.held_out, "--json", tmp_path / "out.json")
    assert "with the emulator, not with the owner's model" in capsys.readouterr().err
    results = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["results"]
    assert {each["case"] for each in results} == {"tuned with the emulator"}
    found = {each["metric"]: each["value"] for each in results}
    assert found["loss"] == pytest.approx(events(plain, "eval")[-1]["loss"], abs=1e-6)
    settings, kit = RunDirectory(plain).settings(), open_kit(tiny_llama[1])
    model = PeftModel.from_pretrained(
        emulated_model(settings, kit, find_emulator(settings, kit)), plain / "adapter"
    ).eval()
    assert found["loss"] == pytest.approx(loss_row_by_row(model, tiny_llama[1], rows.held_out), abs=1e-5)
    splitfl_here("generate", "--run", plain, "--prompt", "Agnes sang", "--max-new-tokens", "12", "--json",
                 tmp_path / "text.json")  # fmt: skip
    assert "with the emulator" in capsys.readouterr().err
    text = json.loads((tmp_path / "text.json").read_text(encoding="utf-8"))["results"][0]["value"]
    tokenizer = kit.tokenizer()
    ids = tokenizer("Agnes sang")["input_ids"]
    ids = torch.tensor([ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids])
    with torch.no_grad():
        for _ in range(12):  # greedy, without any cache
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
            if int(ids[0, -1]) == tokenizer.eos_token_id:
                break
    whole = tokenizer.decode(ids[0], skip_special_tokens=True)
    assert whole.endswith(text)
    assert len(text) > 3
    assert len(entries(plain)) == 1, "nothing was sent, so nothing is booked"


def test_broken_off_it_resumes_to_the_same_adapter(tiny_llama, emulator, rows, tmp_path):
    config = write_config(tmp_path / "tune.toml", rows, max_steps=60, eval_steps=30, save_steps=1000)
    splitfl_here(*words(tiny_llama, emulator, config, tmp_path / "apart" / "whole"))
    out = tmp_path / "run"
    with child(["-m", "splitfl", *words(tiny_llama, emulator, config, out)], tmp_path) as party:
        party.stderr.wait_for("step 2/60")
        party.process.send_signal(signal.SIGINT)
        assert party.wait() == INTERRUPTED_EXIT_CODE
    step = events(out, "train")[-1]["step"]
    assert checkpoints(out) == [f"checkpoint-{step}"]
    assert entries(out) == [], "an adapter that was not written is not booked"
    splitfl_here(*words(tiny_llama, emulator, config, out, "--resume"))
    assert close(adapter_in(out), adapter_in(tmp_path / "apart" / "whole")) == 0
    assert len(entries(out)) == 1


# ---- DP-SGD


def test_dp_sgd_is_booked_with_its_bound_and_told(bounded, plain):
    [entry] = entries(bounded)
    rate = 4 / 40
    assert entry["rho"] == pytest.approx(adapter_rho(1.5, rate, 20))
    assert (entry["adversary"], entry["unit_count"]) == (ADVERSARY, None)
    assert "DP-SGD, noise 1.5, rate 0.1, 20 steps" in entry["mechanism"]
    bound = json.loads((bounded / "disclosure.json").read_text(encoding="utf-8"))["adapter"]["bound"]
    for part in ("epsilon", "delta 1e-05", "one row", "add or remove one", ADVERSARY, "20 steps"):
        assert part in bound
    assert events(bounded, "start")[0]["claim"] == bound
    assert adapter_in(bounded).keys() == adapter_in(plain).keys()


def test_persons_are_sampled_and_clipped_as_one(tiny_llama, emulator, rows, config, tmp_path, capsys):
    read = [json.loads(line) for line in rows.train.read_text(encoding="utf-8").splitlines()]
    owned = tmp_path / "owned.jsonl"
    lines = [json.dumps({**row, "who": f"p{number % 8}"}) for number, row in enumerate(read)]
    owned.write_text("\n".join(lines) + "\n", encoding="utf-8")
    held = tmp_path / "held.jsonl"
    held.write_text("".join(f"{line}\n" for line in lines[:3]), encoding="utf-8")
    out = tmp_path / "run"
    more = ("--train", owned, "--eval", held, "--person-column", "who", "--dp-freeze-a", "--max-steps", "3")
    splitfl_here(*words(tiny_llama, emulator, config, out, *DP, *more))
    assert "each person of 8 with probability 0.5" in capsys.readouterr().err
    [entry] = entries(out)
    assert (entry["unit"], entry["rho"]) == ("person", pytest.approx(adapter_rho(1.5, 0.5, 3)))
    assert "unit: one person" in (out / "disclosure.json").read_text(encoding="utf-8")
    fresh = [name for name in adapter_in(out) if "lora_B" in name]
    assert fresh
    # The first matrices are as they were drawn: those of any other run of one step and the same seed are the same.
    splitfl_here(*words(tiny_llama, emulator, config, tmp_path / "other", *DP, *more[:-1], "1"))
    first, other = adapter_in(out), adapter_in(tmp_path / "other")
    assert all(torch.equal(first[name], other[name]) for name in first if "lora_A" in name)
    assert not any(torch.equal(first[name], other[name]) for name in fresh)


def test_dp_sgd_goes_on_under_the_same_noise_or_not_at_all(tiny_llama, emulator, config, tmp_path, capsys):
    out = tmp_path / "run"
    short = words(tiny_llama, emulator, config, out, *DP, "--dp-freeze-a", "--save-steps", "2", "--max-steps", "4")
    splitfl_here(*short)
    capsys.readouterr()
    for other in (("--dp-noise-multiplier", "0.5"), ("--dp-clip", "9"), ("--per-device-train-batch-size", "8")):
        splitfl_here(*short, "--resume", *other, code=2)
        assert "were not made under the DP-SGD that is asked for now" in " ".join(capsys.readouterr().err.split())
    splitfl_here(*words(tiny_llama, emulator, config, out, "--resume"), code=2)
    assert "whether there is DP-SGD at all" in " ".join(capsys.readouterr().err.split())
    first, booked = adapter_in(out), entries(out)
    splitfl_here(*short, "--resume")
    assert close(adapter_in(out), first) == 0
    assert entries(out) == booked, "the same bytes are the same release"
    splitfl_here(*short, "--resume", "--max-steps", "6")
    assert [entry["rho"] for entry in entries(out)] == pytest.approx([adapter_rho(1.5, 0.1, n) for n in (4, 6)])
    assert all(torch.equal(adapter_in(out)[name], first[name]) for name in first if "lora_A" in name)


def test_a_budget_is_asked_before_anything_is_trained(tiny_llama, emulator, config, tmp_path, capsys):
    out = tmp_path / "run"
    splitfl_here(*words(tiny_llama, emulator, config, out, *DP))
    with Ledger(out.parent / "ledger.sqlite") as ledger:
        [account] = ledger.summary()
        ledger.set_budget(account.dataset, "adapter", unit="row", adversary=ADVERSARY, epsilon=0.5, delta=1e-6,
                          rho=rho_for)  # fmt: skip
    capsys.readouterr()
    splitfl_here(*words(tiny_llama, emulator, config, tmp_path / "second", *DP), code=2)
    assert "beyond its budget" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "second").exists()


# ---- refused

REFUSED = {
    "noise": (("--noise", "gauss", "--clip", "1", "--sigma", "1"), ["--noise", "no activation, gradient or label"]),
    "clip": (("--clip", "1"), ["--clip", "leave --clip out"]),
    "quantise": (("--quantise", "int8"), ["--quantise", "What leaves is the adapter"]),
    "gradient noise": (("--gradient-clip", "1", "--gradient-sigma", "1"), ["--gradient-clip"]),
    "label noise": (("--label-epsilon", "1"), ["--label-epsilon", "DP-SGD"]),
    "decorrelate": (("--decorrelate", "1"), ["--decorrelate"]),
    "lengths": (("--hide-lengths", "--max-length", "64"), ["--hide-lengths"]),
    "all biases": (("--bias", "all"), ["the emulator's biases", "lora_only"]),
    "epsilon without delta": (("--dp-epsilon", "8", "--dp-clip", "1"), ["without --dp-delta", "1e-6"]),
    "epsilon without clip": (("--dp-epsilon", "8", "--dp-delta", "1e-5"), ["without --dp-clip"]),
    "delta alone": (("--dp-delta", "1e-5"), ["--dp-delta has no effect without --dp-epsilon"]),
    "frozen first matrix alone": (("--dp-freeze-a",), ["--dp-freeze-a has no effect"]),
    "both sizes": ((*DP, "--dp-epsilon", "8"), ["both were given"]),
    "a large delta": ((*DP, "--dp-delta", "0.1"), ["gives one of them away", "1 / 40"]),
    "left padding": ((*DP, "--padding-side", "left"), ["longest row beside it", "--padding-side right"]),
    "magnitudes": ((*DP, "--use-dora"), ["--use-dora", "leave it out"]),
    "biases": ((*DP, "--bias", "lora_only"), ["--bias lora_only"]),
    "other arguments": ((*DP, "--training-args", "label_smoothing_factor=0.1"), ["label_smoothing_factor", "adam_"]),
    "no noise is enough": (("--dp-epsilon", "1e-7", "--dp-delta", "1e-9", "--dp-clip", "1"), ["No noise up to"]),
}  # fmt: skip


def refused(command, out, capsys, code=2):
    splitfl_here(*command, code=code)
    assert not out.exists()
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("case", REFUSED)
def test_settings_without_sense_are_refused(tiny_llama, emulator, config, tmp_path, capsys, case):
    more, found = REFUSED[case]
    told = refused(words(tiny_llama, emulator, config, tmp_path / "run", *more), tmp_path / "run", capsys)
    assert [part for part in found if part not in told] == [], told


def test_what_belongs_to_one_route_is_refused_on_the_other(tiny_llama, emulator, config, tmp_path, capsys):
    kit, out = tiny_llama[1], tmp_path / "run"
    start = ["tune", "--kit", kit, "--config", config, "--out", out]
    assert "Missing option --emulator" in refused([*start, "--protocol", NAME], out, capsys)
    assert "Missing option --owner" in refused(start, out, capsys)
    told = refused([*start, "--emulator", emulator], out, capsys)
    assert "--protocol guarded-offline" in told
    told = refused([*start, *DP], out, capsys)
    assert "says nothing of what is sent of each row" in told


def test_an_emulator_that_does_not_fit_is_refused(tiny_llama, emulator, config, tmp_path, capsys):
    out, other = tmp_path / "run", make_kit(save_tiny("qwen2", tmp_path / "model"), tmp_path / "kit")
    link = ["--config", config, "--out", out, "--protocol", NAME]
    told = refused(["tune", "--kit", other, "--emulator", emulator, *link], out, capsys, code=4)
    assert "belongs to plan" in told
    told = refused(["tune", "--kit", other, "--emulator", tmp_path, *link], out, capsys, code=4)
    assert "is no emulator" in told
    copy = emulator_of(*tiny_llama, tmp_path / "copy", 1)
    [file] = copy.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    told = refused(["tune", "--kit", tiny_llama[1], "--emulator", copy, *link], out, capsys, code=4)
    assert "cut off or altered" in told


def test_a_missing_extra_is_named(tiny_llama, emulator, config, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus", None)
    monkeypatch.delitem(sys.modules, "party.private_sgd", raising=False)
    told = refused(words(tiny_llama, emulator, config, tmp_path / "run", *DP), tmp_path / "run", capsys)
    assert "pip install 'splitfl[dp" in told
