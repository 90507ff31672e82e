"""Figures: the file that `--json` writes, the record of a run, memory and rates."""

from __future__ import annotations

import getpass
import json
import math
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import splitfl
from splitfl.config import DemoSettings
from splitfl.errors import DataError
from splitfl.metrics import Meter, Result, RunLog, machine, peak_rss_bytes, read_run, write_results

ROOT = Path(__file__).resolve().parents[1]


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, cwd=ROOT
    )
    return done.stdout.strip()


def test_the_shape_of_a_results_file(tmp_path):
    path = tmp_path / "deep" / "out.json"
    results = [
        Result(case="S 8x128", metric="step", value=0.5, unit="s", reference=0.25, reach=0.3),
        Result(case="S 8x128", metric="text", value="hello", unit="text"),
    ]
    write_results(path, "demo", DemoSettings(json=path), results)
    written = json.loads(path.read_text(encoding="utf-8"))
    assert list(written) == ["command", "version", "machine", "settings", "results"]
    assert (written["command"], written["version"]) == ("demo", splitfl.__version__)
    assert written["settings"] == {"out": "demo-out", "max_steps": 60, "seed": 0, "keep": True, "json": str(path)}
    assert written["results"] == [
        {
            "case": "S 8x128",
            "metric": "step",
            "value": 0.5,
            "unit": "s",
            "reference": 0.25,
            "ratio": 2.0,
            "reach": 0.3,
        },
        {
            "case": "S 8x128",
            "metric": "text",
            "value": "hello",
            "unit": "text",
            "reference": None,
            "ratio": None,
            "reach": None,
        },
    ]
    assert {"python", "platform", "cpu_count", "memory_bytes", "torch", "transformers"} <= set(written["machine"])
    assert [p.name for p in path.parent.iterdir()] == ["out.json"], "nothing unfinished is left"


def test_a_ratio_is_kept_where_it_was_given_and_left_out_where_it_makes_no_sense():
    assert Result(case="c", metric="m", value=2, unit="s", reference=4, ratio=9.0).ratio == 9.0
    assert Result(case="c", metric="m", value=2, unit="s", reference=0).ratio is None
    assert Result(case="c", metric="m", value=None, unit="s", reference=4).ratio is None


def test_what_json_cannot_hold_is_made_plain(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    odd = {
        "nan": math.nan,
        "inf": [math.inf, 1.5],
        "numpy": np.float32(0.5),
        "torch": torch.tensor(3),
        "diverged": torch.tensor(math.nan),
        "home": tmp_path / "keys" / "a.key",
        "elsewhere": Path("/srv/rows"),
        "tuple": ("a", Path("b")),
    }
    write_results(tmp_path / "o.json", "c", odd, [])
    assert json.loads((tmp_path / "o.json").read_text(encoding="utf-8"))["settings"] == {
        "nan": None,
        "inf": [None, 1.5],
        "numpy": 0.5,
        "torch": 3,
        "diverged": None,
        "home": "~/keys/a.key",
        "elsewhere": "/srv/rows",
        "tuple": ["a", "b"],
    }


def test_the_machine_has_no_name():
    words = json.dumps(machine()).lower().replace('"', " ").replace("-", " ").split()
    assert socket.gethostname().lower() not in words
    assert getpass.getuser().lower() not in words
    assert machine()["torch"] == torch.__version__


def test_metrics_load_no_library_to_name_its_version():
    code = (
        "import sys; from splitfl.metrics import machine; machine(); print({'torch', 'transformers'} & {*sys.modules})"
    )
    assert python(code) == "set()"


# --- the record of a run ----------------------------------------------------------------------------------------------


def test_records_are_there_at_once_and_stay_after_a_crash(tmp_path):
    path = tmp_path / "run.jsonl"
    with RunLog(path) as log:
        log.write("start", protocol="split")
        log.write("train", step=10, loss=math.nan)
        assert [r["event"] for r in read_run(path)] == ["start", "train"], "flushed while the log is open"
    assert read_run(path)[1]["loss"] is None
    code = (
        "import os, sys, pathlib, splitfl.metrics as m; m.RunLog(pathlib.Path(sys.argv[1])).write('end'); os._exit(1)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], timeout=60, check=False, cwd=ROOT)
    assert done.returncode == 1
    assert [r["event"] for r in read_run(path)] == ["start", "train", "end"]
    assert all(isinstance(r["time"], float) for r in read_run(path))


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1))
def test_a_torn_last_line_is_dropped_wherever_it_was_torn(share):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "run.jsonl"
        with RunLog(path) as log:
            for step in range(3):
                log.write("train", step=step, text="\N{SNOWMAN}\n")
        whole = path.read_bytes()
        length = round(share * len(whole))
        path.write_bytes(whole[:length])
        complete = whole[:length].count(b"\n")
        assert [r["step"] for r in read_run(path)] == list(range(complete))
        with RunLog(path) as log:
            log.write("train", step=9)
        assert [r["step"] for r in read_run(path)] == [*range(complete), 9]


@pytest.mark.parametrize("line", ["not json: the patient has measles", '["measles"]', '{"step": "measles"}', ""])
def test_a_damaged_line_is_named_but_not_quoted(tmp_path, line):
    path = tmp_path / "run.jsonl"
    path.write_text(f'{{"event": "start"}}\n{line}\n{{"event": "end"}}\n', encoding="utf-8")
    with pytest.raises(DataError, match="line 2") as refused:
        read_run(path)
    assert "measles" not in str(refused.value)


def test_a_missing_record(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_run(tmp_path / "run.jsonl")


# --- memory and rates -------------------------------------------------------------------------------------------------


def test_the_peak_stays_after_the_memory_is_given_back():
    size = 256 * 2**20
    code = f"""
from splitfl.metrics import peak_rss_bytes
import psutil
before = peak_rss_bytes()
block = bytearray(b"x" * {size // 2}) + bytearray({size // 2})
del block
print(before, peak_rss_bytes(), psutil.Process().memory_info().rss)
"""
    before, peak, now = map(int, python(code).split())
    assert peak - before > size // 2
    assert peak > now


def test_the_peak_of_a_process_is_not_that_of_its_parent():
    block = bytearray(b"x" * (512 * 2**20))
    child = int(python("from splitfl.metrics import peak_rss_bytes; print(peak_rss_bytes())"))
    assert peak_rss_bytes() > len(block)
    assert child < len(block) // 2


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_rate_is_over_the_window_only():
    clock = Clock()
    meter = Meter(window=10.0, clock=clock)
    assert meter.rate() == 0.0
    assert meter.seconds_left(5) is None
    for _ in range(20):
        clock.now += 1
        meter.add(100)
    assert meter.rate() == pytest.approx(100)
    for _ in range(10):
        clock.now += 1
        meter.add(300)
    assert meter.rate() == pytest.approx(300), "the slow start has left the window"
    assert meter.total == 20 * 100 + 10 * 300
    assert meter.seconds_left(600) == pytest.approx(2)


def test_a_rate_over_steps_longer_than_the_window():
    clock = Clock()
    meter = Meter(window=1.0, clock=clock)
    for _ in range(3):
        clock.now += 60
        meter.add(120)
    assert meter.rate() == pytest.approx(2)
