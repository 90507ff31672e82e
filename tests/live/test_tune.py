"""`splitfl tune`, `evaluate` and `generate` as commands: what they leave, print and remember."""

from __future__ import annotations

import json
import tomllib

import pytest
import torch
from peft import PeftModel

import splitfl
from protocols import SPLIT
from splitfl.config import TuneSettings
from splitfl.options import read_config
from tests.live.child import splitfl_here
from tests.live.models import tokenizer_of, whole_model
from tests.live.runs import STEPS, checkpoints, events, loss_row_by_row

pytestmark = pytest.mark.slow


def figures(path, name):
    """The results of a ``--json`` file by metric, after its shape has been checked."""
    record = json.loads(path.read_text(encoding="utf-8"))
    assert list(record) == ["command", "version", "machine", "settings", "results"]
    assert (record["command"], record["version"]) == (name, splitfl.__version__)
    assert record["machine"]["torch"] == torch.__version__
    for result in record["results"]:
        assert list(result) == ["case", "metric", "value", "unit", "reference", "ratio", "reach"]
    return {result["metric"]: result for result in record["results"]}


@pytest.fixture(scope="module")
def tuned(owner, finished):
    """The whole model with the run's adapter, as anybody would load it."""
    return PeftModel.from_pretrained(whole_model(owner.model_dir), finished / "adapter").eval()


def test_a_run_directory_holds_what_it_should(finished):
    assert {path.name for path in finished.iterdir()} == {
        "adapter", "checkpoints", "config.toml", "disclosure.json", "ledger-run.txt", "report.html", "run.jsonl",
    }  # fmt: skip
    assert checkpoints(finished) == ["checkpoint-8", "checkpoint-12"]
    adapter = json.loads((finished / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert adapter["peft_type"] == "LORA"
    assert adapter["base_model_name_or_path"]
    disclosure = json.loads((finished / "disclosure.json").read_text(encoding="utf-8"))
    [start] = events(finished, "start")
    assert start["claim"].startswith("empirical: ")
    record = SPLIT.disclosure.with_bounds({("forward", "hidden"): start["claim"]})
    assert disclosure == {"protocol": "split", **json.loads(json.dumps(record.to_json()))}
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert page.rstrip().endswith("</html>")


def test_the_log_of_a_run_is_whole(finished):
    [start], [end] = events(finished, "start"), events(finished, "end")
    assert (start["protocol"], start["bottom"], start["top"], start["layers"]) == ("split", 2, 2, 6)
    assert (start["train_rows"], start["eval_rows"]) == (40, 10)
    training = events(finished, "train")
    assert [record["step"] for record in training] == list(range(1, STEPS + 1))
    assert training[-1]["loss"] < training[0]["loss"]
    assert sum(record["tokens"] for record in training) > 0
    assert [(record["step"], record["when"]) for record in events(finished, "eval")] == [
        (0, "before"), (6, "during"), (12, "during"), (12, "after"),
    ]  # fmt: skip
    assert end["steps"] == STEPS
    assert end["bytes_sent"] > sum(record["bytes_sent"] for record in training)


def test_the_settings_of_a_run_are_written_as_resolved(finished, tune_config):
    written = tomllib.loads((finished / "config.toml").read_text(encoding="utf-8"))
    asked = tomllib.loads(tune_config.read_text(encoding="utf-8"))["tune"]
    assert asked.items() <= written.items()
    assert (written["protocol"], written["weight_decay"]) == ("split", 0.0)
    again = read_config(finished / "config.toml", TuneSettings)
    assert TuneSettings(**{k: tuple(v) if isinstance(v, list) else v for k, v in again.items()}).max_steps == STEPS


def test_the_figures_of_a_run(finished):
    found = figures(finished.parent / "tune.json", "tune")
    assert found["steps"]["value"] == STEPS
    assert found["bytes sent"]["value"] > 0
    loss, [before, *_, after] = found["held-out loss"], events(finished, "eval")
    assert (loss["value"], loss["reference"]) == (after["loss"], before["loss"])
    assert loss["ratio"] == pytest.approx(after["loss"] / before["loss"])
    assert after["loss"] < before["loss"] - 0.1


def test_evaluate_agrees_with_the_whole_model(owner, rows, finished, tuned, tmp_path):
    splitfl_here("evaluate", "--run", finished, "--eval", rows.held_out, "--json", tmp_path / "out.json")
    found = figures(tmp_path / "out.json", "evaluate")
    expected = loss_row_by_row(tuned, owner.kit_dir, rows.held_out)
    assert found["loss"]["value"] == pytest.approx(expected, abs=1e-5)
    assert found["loss"]["value"] == pytest.approx(events(finished, "eval")[-1]["loss"], abs=1e-6)
    plain = loss_row_by_row(whole_model(owner.model_dir), owner.kit_dir, rows.held_out)
    assert events(finished, "eval")[0]["loss"] == pytest.approx(plain, abs=1e-5)


def test_generate_writes_what_the_whole_model_would(owner, finished, tuned, tmp_path, capsys):
    prompt = "Agnes sang,"
    words = ("--prompt", prompt, "--max-new-tokens", "16", "--json", tmp_path / "out.json")
    splitfl_here("generate", "--run", finished, *words)
    printed = capsys.readouterr().out
    tokenizer = tokenizer_of(owner.kit_dir)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    expected = tuned.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, pad_token_id=0,
        use_cache=True,
    )[0, ids.shape[1] :]  # fmt: skip
    found = figures(tmp_path / "out.json", "generate")
    assert found["text"]["value"] == tokenizer.decode(expected, skip_special_tokens=True)
    assert printed == found["text"]["value"] + "\n"
    assert found["new tokens"]["value"] == len(expected)
