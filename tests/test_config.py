"""The settings of every command: their names, their limits, their way to the libraries."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from splitfl import config, config_keys
from splitfl.errors import UsageError
from splitfl.options import fields_of, on_loopback, parse_address, parse_shape, parse_size
from tests.toy import COMMANDS, KEYS, TUNE, Toy, refusal, settings_of


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPLITFL_DEBUG", raising=False)
    return Toy()


def test_the_settings_load_nothing_heavy():
    heavy = ["torch", "transformers", "peft", "matplotlib", "jinja2", "yaml", "datasets", "zmq"]
    code = f"import sys, splitfl.config; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_the_conversation_of_the_readme_is_understood(toy):
    assert settings_of(toy, "keys new hospital --out keys/") == config_keys.KeysNew(name="hospital", out=Path("keys"))
    allow = settings_of(toy, "keys allow keys/hospital.key --parties parties/")
    assert allow == config_keys.KeysAllow(key=Path("keys/hospital.key"), parties=Path("parties"))
    shown = settings_of(toy, "keys show a.key keys/")
    assert shown == config_keys.KeysShow(paths=(Path("a.key"), Path("keys")))
    kit = settings_of(toy, "kit kit/ --model MODEL --bottom 2 --top 2")
    assert kit == config.KitSettings(out=Path("kit"), model="MODEL", bottom=2, top=2)
    words = "serve --model MODEL --kit kit/ --bind tcp://127.0.0.1:0 --key o.key_secret --parties parties/"
    assert settings_of(toy, words).bind == "tcp://127.0.0.1:0"
    words = f"{TUNE} --eval held.jsonl --protocol split --max-steps 100 --learning-rate 1e-3 --seed 0"
    tune = settings_of(toy, words)
    assert (tune.max_steps, tune.learning_rate, tune.eval) == (100, 1e-3, Path("held.jsonl"))
    words = ["generate", "--run", "run/", "--prompt", "two words", "--max-new-tokens", "50", "--json", "out.json"]
    assert settings_of(toy, words) == config.GenerateSettings(
        run=Path("run"), prompt="two words", max_new_tokens=50, json=Path("out.json")
    )
    evaluate = settings_of(toy, "evaluate --run run/ --eval test.jsonl --json out.json")
    assert evaluate == config.EvaluateSettings(run=Path("run"), eval=Path("test.jsonl"), json=Path("out.json"))


def test_switches_lists_and_second_spellings(toy):
    tune = settings_of(toy, f"{TUNE} --no-answer-only --use-dora --lora-r 4 --columns prompt=q --columns completion=a")
    assert (tune.answer_only, tune.use_dora, tune.r) == (False, True, 4)
    assert tune.column_map() == {"prompt": "q", "completion": "a"}
    assert settings_of(toy, "bench wire").models == ("S", "M", "L")
    assert settings_of(toy, "bench wire --models S").models == ("S",)


@pytest.mark.parametrize("name", [*COMMANDS, *(f"keys {name}" for name in KEYS)])
def test_help_names_every_option_and_the_default(toy, capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "200")
    assert toy(f"{name} --help") == 0
    text = capsys.readouterr().out
    settings_class = COMMANDS.get(name) or KEYS[name.split()[1]]
    for field in fields_of(settings_class):
        assert field.flag in text or field.name in text
    assert "--config" in text
    if name == "tune":
        assert "[default: 0.0002]" in text
        assert "[default: answer-only]" in text


def test_training_and_adapter_options_are_those_of_the_libraries(tmp_path):
    from peft import LoraConfig
    from transformers import TrainingArguments

    tune = config.TuneSettings(
        kit=tmp_path,
        out=tmp_path,
        owner="tcp://owner:1",
        owner_key=tmp_path,
        key=tmp_path,
        train=tmp_path,
        warmup_steps=5,
        target_modules=("c_attn", "c_proj"),
        training_args=("adam_beta2=0.95", "lr_scheduler_kwargs={}"),
    )
    training = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **tune.training_kwargs())
    for name in config.TRAINING_NAMES:
        if name not in ("eval_steps", "report_to"):
            assert getattr(training, name) == getattr(tune, name), name
    assert training.adam_beta2 == 0.95
    assert training.report_to == []
    lora = LoraConfig(**tune.lora_kwargs())
    assert (lora.r, lora.lora_alpha, lora.target_modules) == (8, 16, {"c_attn", "c_proj"})
    all_linear = dataclasses.replace(tune, target_modules=("all-linear",))
    assert LoraConfig(**all_linear.lora_kwargs()).target_modules == "all-linear"
    assert "target_modules" not in dataclasses.replace(tune, target_modules=()).lora_kwargs()


BAD_OPTIONS = [
    ("kit k --model m --bottom -1", ["--bottom was given as -1", "Expected: 0 or more"]),
    ("kit k --model m --bottom two", ["--bottom", "valid integer"]),
    ("kit k --model m --label-names yes", ["add --task sequence-classification"]),
    ("kit k --model m --task sequence-classification --num-labels 3 --label-names a", ["3", "1 --label-names"]),
    ("kit k --modle m", ["--modle", "--model"]),
    ("keys new ../x", ["NAME was given as '../x'"]),
    ("keys new .hidden", ["NAME was given as '.hidden'"]),
    ("serve --model m --kit k --bind 127.0.0.1:1 --insecure-loopback", ["--bind", "Expected: tcp://HOST:PORT"]),
    ("serve --model m --kit k --bind tcp://0.0.0.0:1 --insecure-loopback", ["not a loopback address"]),
    ("serve --model m --kit k", ["Missing option --key"]),
    ("serve --model m --kit k --key a", ["Missing option --parties"]),
    ("serve --model m --kit k --key a --parties b --insecure-loopback", ["--key has no effect"]),
    ("serve --model m --kit k --memory-budget much --key a --parties b", ["Expected: a size such as 4GB"]),
    ("serve --model m --kit k --memory all --key a --parties b", ["'all' is not one of 'keep', 'recompute'"]),
    ("serve --model m --kit k --device gpu --key a --parties b", ["Expected: cpu, cuda or cuda:N"]),
    (f"{TUNE} --learning-rate 0", ["--learning-rate was given as 0.0", "Expected: more than 0"]),
    (f"{TUNE} --learning-rate inf", ["--learning-rate was given as inf"]),
    (f"{TUNE} --learning-rate nan", ["--learning-rate was given as nan"]),
    (f"{TUNE} --max-steps 0", ["nothing would be trained"]),
    (f"{TUNE} --owner tcp://127.0.0.1:0", ["--owner", "splitfl serve"]),
    (f"{TUNE} --columns prompt", ["Expected: NAME=VALUE"]),
    (f"{TUNE} --columns prompt=a --columns prompt=b", ["'prompt' twice"]),
    (f"{TUNE} --training-args adam_beta=0.9", ["'adam_beta'", "did you mean 'adam_beta"]),
    (f"{TUNE} --training-args adam_beta1=high", ["adam_beta1", "Expected: float"]),
    (f"{TUNE} --training-args learning_rate=1", ["use --learning-rate"]),
    (f"{TUNE} --training-args output_dir=x", ["use --out"]),
    (f"{TUNE} --training-args full_determinism=perhaps", ["full_determinism", "Expected: bool"]),
    (f"{TUNE} --training-args hub_strategy=evry_save", ["did you mean 'every_save'?"]),
    ("generate --run r", ["neither was given", "exactly one"]),
    ("generate --run r --prompt a --prompt-file b", ["both was given"]),
    ("generate --run r --prompt a --temperature 0.5", ["no effect without --do-sample"]),
    (
        "serve --model m --kit k --insecure-loopback --tensor-parallel --device-map auto",
        ["put on devices whole, or shared out, not both"],
    ),
    ("serve --model m --kit k --insecure-loopback --tensor-parallel --workers 2", ["one piece of work at a time"]),
    ("generate --run r --prompt a --draft-tokens 4", ["--draft-tokens has no effect without --draft"]),
    ("generate --run r --prompt a --draft model", ["--draft model and --draft-model DIR need each other"]),
    ("generate --run r --prompt a --draft ends --draft-model d", ["need each other"]),
    ("generate --run r --prompt a --draft ends --num-beams 2", ["beams are several"]),
    ("generate --run r --prompt a --draft ends --prefill-chunk 9", ["--prefill-chunk with --draft"]),
    ("generate --run r --prompt a --do-sample --top-p 1.5", ["Expected: from 0 to 1"]),
    ("bench x --shapes 8*128", ["Expected: ROWSxLENGTH"]),
    ("nope", ["No such command 'nope'", "splitfl --help"]),
]


@pytest.mark.parametrize(("words", "said"), BAD_OPTIONS)
def test_options_that_cannot_be_meant_are_refused(toy, capsys, words, said):
    message = refusal(toy, capsys, words)
    for part in said:
        assert part in message


def test_misspelt_schedules_are_refused_before_training():
    tune = config.TuneSettings(
        kit=Path("k"),
        out=Path("o"),
        owner="tcp://127.0.0.1:1",
        insecure_loopback=True,
        train=Path("t"),
        lr_scheduler_type="cosin",
    )
    with pytest.raises(UsageError) as refused:
        tune.training_kwargs()
    assert refused.value.hint == "did you mean 'cosine'?"


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GB", 4 * 10**9), ("512MiB", 2**29), ("1.5 kb", 1500), ("2t", 2 * 10**12), ("1000", 1000), ("7B", 7)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-4GB", "4 potatoes", "0", "0.1B", "4iB", "4GBB", "1e9", "٤GB", "nan"])
def test_what_is_not_a_size(text):
    with pytest.raises(UsageError, match="not a size"):
        parse_size(text)


def test_addresses():
    assert parse_address("tcp://127.0.0.1:5555") == ("127.0.0.1", 5555)
    assert parse_address("tcp://[::1]:0") == ("::1", 0)
    assert [on_loopback(a) for a in ("tcp://127.9.9.9:1", "tcp://localhost:1", "tcp://[::1]:1")] == [True] * 3
    assert [on_loopback(a) for a in ("tcp://*:1", "tcp://10.0.0.1:1", "tcp://localhost.example:1")] == [False] * 3
    for text in ("tcp://127.0.0.1", "tcp://:1", "tcp://a:70000", "ipc:///tmp/x", "tcp://a:1/../b", "tcp://a b:1"):
        with pytest.raises(UsageError):
            parse_address(text)
    assert parse_shape("8x128") == (8, 128)
