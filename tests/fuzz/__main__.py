"""``python -m tests.fuzz --minutes 60 --json FILE``: fuzz every decoder, guided by what is reached (needs atheris).

Begins from the seeds and from ``tests/fuzz/corpus``. With ``--keep``, inputs that reach lines which those do not are
added to the corpus at the end. A run that is broken off goes on with ``--work DIR``, where its inputs are. The exit
code is 1 if something was found.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from splitfl.errors import UsageError
from splitfl.metrics import machine
from tests.fuzz.choose import choose
from tests.fuzz.packing import LONGEST
from tests.fuzz.seeds import CORPUS, kept, seeds

_MOST_BYTES = 150_000
_TELL_S = 60.0
_GRACE_S = 120.0


def main(words: list[str] | None = None) -> int:
    """Run; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--json", type=Path, help="write the report here")
    parser.add_argument(
        "--work", type=Path, default=Path("fuzz-work"), help="inputs so far; findings; default fuzz-work"
    )
    parser.add_argument("--keep", action="store_true", help="add what reaches new lines to the corpus")
    given = parser.parse_args(words)
    if importlib.util.find_spec("atheris") is None:
        raise UsageError("Guided fuzzing needs atheris.", hint="pip install 'atheris>=3' (Python 3.11 to 3.13)")
    state = _fuzz(given.work, given.minutes)
    report = _report(state, given.work, keep=given.keep)
    text = json.dumps(report, indent=2)
    if given.json is not None:
        given.json.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 1 if report["findings"] else 0


def _fuzz(work: Path, minutes: float) -> dict[str, Any]:
    inputs = work / "inputs"
    inputs.mkdir(parents=True, exist_ok=True)
    for data in (*seeds(), *kept()):
        (inputs / hashlib.sha1(data, usedforsecurity=False).hexdigest()).write_bytes(data)  # libFuzzer's own names
    state = work / "state.json"
    state.unlink(missing_ok=True)
    seconds = round(minutes * 60)
    with (work / "log.txt").open("ab") as log:
        process = subprocess.Popen([sys.executable, "-m", "tests.fuzz.guided", str(work), str(seconds)], stderr=log)
    deadline = time.monotonic() + seconds + _GRACE_S
    try:
        while process.poll() is None and time.monotonic() < deadline:
            try:
                process.wait(_TELL_S)
            except subprocess.TimeoutExpired:
                _tell(state, seconds)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    found: dict[str, Any] = json.loads(state.read_text(encoding="utf-8"))
    for file in [*work.glob("crash-*"), *work.glob("timeout-*"), *work.glob("oom-*"), *work.glob("leak-*")]:
        found["findings"][file.name] = {"file": file.name, "trace": "libFuzzer ended the run here"}
    return found


def _tell(state: Path, seconds: int) -> None:
    if state.exists():
        held = json.loads(state.read_text(encoding="utf-8"))
        left = max(seconds - held["seconds"], 0) / 60
        done = sum(held["inputs"].values())
        print(
            f"{done:,} inputs, {len(held['findings'])} findings, about {left:.0f} min left", file=sys.stderr, flush=True
        )


def _report(state: dict[str, Any], work: Path, *, keep: bool) -> dict[str, Any]:
    grown = [path.read_bytes() for path in (work / "inputs").iterdir() if path.stat().st_size <= LONGEST]
    known = [*seeds(), *kept()]
    chosen, reached = choose(grown, known, _MOST_BYTES - sum(map(len, kept())))
    if keep:
        CORPUS.mkdir(exist_ok=True)
        for data in chosen:
            (CORPUS / f"{hashlib.blake2b(data, digest_size=8).hexdigest()}.bin").write_bytes(data)
    files = Counter(Path(file).name for file, _, line in {(file, 0, line) for file, _, line in reached})
    return {
        "command": "fuzz",
        "machine": machine(),
        "seconds": round(state["seconds"]),
        "inputs": state["inputs"],
        "inputs_total": sum(state["inputs"].values()),
        "slowest_s": round(state["slowest_s"], 3),
        "grown_to": len(grown),
        "seeds": len(known),
        "added": len(chosen) if keep else 0,
        "lines_reached": dict(files.most_common(30)),
        "findings": state["findings"],
    }


if __name__ == "__main__":
    sys.exit(main())
