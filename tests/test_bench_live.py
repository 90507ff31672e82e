"""`splitfl bench split` as processes: children that die, hang or differ, and whole runs with a tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from splitfl.bench import children
from splitfl.bench.cases import BYTES, PARTY_MEMORY, RATE, STEP
from splitfl.bench.children import Child, Owner
from splitfl.bench.run import bench, stopped_by_sigterm
from splitfl.bench.split import prepare
from splitfl.config import BenchSettings
from splitfl.errors import InternalError, ResourceError, UnreachableError


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Start a child that runs these lines."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def start(text, **given):
        (tmp_path / "child_script.py").write_text(text, encoding="utf-8")
        return Child("test child", ["child_script"], threads=3, log=tmp_path / "log", **given)

    return start


def test_a_child_has_its_threads_and_a_dead_one_says_its_last_words(script):
    text = "import os, sys; print(os.environ['OMP_NUM_THREADS'], flush=True); sys.exit('no \\x1b memory')"
    with script(text) as child:
        assert child.line(30) == b"3\n"
        with pytest.raises(ResourceError, match="ended with code 1: no \N{REPLACEMENT CHARACTER} memory"):
            child.line(30)


@pytest.mark.slow
def test_an_owner_that_cannot_serve_says_why(tmp_path):
    log = tmp_path / "log"
    serve = ["--model", str(tmp_path), "--kit", str(tmp_path), "--insecure-loopback", "--bind", "tcp://127.0.0.1:0"]
    with Owner(serve, threads=1, log=log) as owner, pytest.raises(ResourceError, match=r"code 4: .* is not a kit"):
        owner.address()


def test_a_silent_child_is_given_up_and_a_stubborn_one_killed(script, monkeypatch):
    monkeypatch.setattr(children, "_END_S", 0.5)
    text = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); signal.pause()"
    with script(text, stop_with=signal.SIGTERM) as child:
        child.line(30)
        assert child.peak_rss() > 1_000_000
        with pytest.raises(UnreachableError, match="did not answer"):
            child.line(0.05)
    assert child.process.returncode == -signal.SIGKILL


def test_sigterm_ends_a_run_like_ctrl_c():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), stopped_by_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


# ---- whole runs: an owner with keys, a party, a monolith


TINY = ["--models", "tiny", "--shapes", "2x16", "--threads", "1", "--steps", "2", "--new-tokens", "8"]


def run_bench(*words, **popen):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    return subprocess.Popen(
        [sys.executable, "-m", "splitfl", "bench", "split", *TINY, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **popen,
    )


def results_in(path):
    record = json.loads(path.read_text(encoding="utf-8"))
    assert set(record) == {"command", "version", "machine", "settings", "results"}
    return {(result["case"], result["metric"]): result for result in record["results"]}


def children_of(process):
    """The processes that a running benchmark has started, once there are any."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if found := psutil.Process(process.pid).children(recursive=True):
            return found
        time.sleep(0.05)
    raise AssertionError("the benchmark started no process")


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_interrupted_run_keeps_its_figures_ends_its_children_and_is_resumed(tmp_path):
    figures, cache = tmp_path / "figures.json", tmp_path / "cache"
    words = ("--json", figures, "--cache", cache)
    with run_bench(*words) as process:
        for line in process.stderr:
            if line.startswith("[2/3]"):
                break
        started = children_of(process)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "train tiny 2x16 float32 1 thread" in said
    assert psutil.wait_procs(started, timeout=30)[1] == []
    first = results_in(figures)
    assert {case for case, _ in first} == {"train tiny 2x16 float32 1 thread"}
    assert [entry.name for entry in cache.iterdir()] == ["tiny-float32"]

    with run_bench(*words, "--resume") as process:
        _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    whole = results_in(figures)
    assert {key: whole[key] for key in first} == first
    check_training(whole)
    check_generation(whole, rows=1)
    check_generation(whole, rows=4)


def check_training(results):
    case = "train tiny 2x16 float32 1 thread"
    formula = 4 * 2 * 16 * 64 * 4
    step, bytes_moved = results[case, STEP], results[case, BYTES]
    assert step["value"] > 0
    assert step["reference"] > 0
    assert bytes_moved["reference"] == formula
    assert formula < bytes_moved["value"] <= formula + 4 * 128, "four headers, and nothing else"
    if (case, "on the loopback interface") in results:
        assert results[case, "on the loopback interface"]["value"] >= bytes_moved["value"]
    for metric in (PARTY_MEMORY, "peak memory of the owner"):
        assert 0 < results[case, metric]["value"] < 4e9
    assert results[case, "loss difference, relative"]["value"] <= 1e-4


def check_generation(results, *, rows):
    case = f"generate tiny batch {rows} float32 1 thread"
    assert results[case, RATE]["value"] > 0
    assert results[case, "equal tokens"]["reference"] == rows * 8
    assert results[case, "logit difference"]["value"] <= 1e-3
    formula = 2 * rows * (32 + 7) * 64 * 4
    assert results[case, "bytes a generation"]["reference"] == formula
    assert formula < results[case, "bytes a generation"]["value"] < formula + 8 * 512


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_split_that_computes_something_else_has_no_speed(tmp_path, monkeypatch, capsys):
    from safetensors.torch import load_file, save_file

    def prepare_badly(*given):
        files = prepare(*given)
        weights = files.kit / "model.safetensors"
        tensors = load_file(weights)
        name = next(name for name in tensors if "h.1.mlp" in name and "weight" in name)
        save_file({**tensors, name: tensors[name] * 1.5}, weights, metadata={"format": "pt"})
        return files

    monkeypatch.setattr("splitfl.bench.run.prepare", prepare_badly)
    figures = tmp_path / "figures.json"
    tiny = BenchSettings(
        name="split", models=("tiny",), shapes=("2x16",), threads=(1,), steps=2, work="train", json=figures
    )
    with pytest.raises(InternalError, match="did not compute the same"):
        bench(tiny)
    assert "step time" not in capsys.readouterr().out
    assert [metric for _, metric in results_in(figures)] == ["loss difference"]
