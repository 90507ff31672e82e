"""The guided part: Atheris in a process of its own, which `tests.fuzz.__main__` starts, watches and ends.

What a target lets out does not end the run: it is kept once for each place that it came from, and the run goes on. How
far it is stands in ``state.json``, written every few seconds, since libFuzzer ends a process without a word.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["splitfl", "protocols"]):
    from tests.fuzz.packing import LONGEST, change, unpack
    from tests.fuzz.targets import TARGETS

_TELL_S = 5.0


class Run:
    """Counts inputs, and keeps what failed."""

    def __init__(self, work: Path) -> None:
        self.work, self.counts = work, [0] * len(TARGETS)
        self.findings: dict[str, dict[str, str]] = {}
        self.began = self.told = time.monotonic()
        self.slowest = 0.0

    def one(self, data: bytes) -> None:
        """Read one input."""
        number, frames = unpack(data)
        number %= len(TARGETS)
        self.counts[number] += 1
        began = time.perf_counter()
        try:
            TARGETS[number].read(frames)
        except Exception as error:  # whatever it is, it is a finding
            self._keep(data, TARGETS[number].name, error)
        self.slowest = max(self.slowest, time.perf_counter() - began)
        if time.monotonic() - self.told > _TELL_S:
            self.tell()

    def _keep(self, data: bytes, target: str, error: Exception) -> None:
        frames = traceback.extract_tb(error.__traceback__)
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
        key = f"{target}, {type(error).__name__} at {place}"
        if key in self.findings:
            return
        file = self.work / f"finding-{hashlib.blake2b(data, digest_size=6).hexdigest()}.bin"
        file.write_bytes(data)
        lines = "".join(traceback.format_exception(error))[-3000:]
        self.findings[key] = {"file": file.name, "trace": lines}
        self.tell()

    def tell(self) -> None:
        """Write down how far the run is."""
        self.told = time.monotonic()
        state = {
            "seconds": self.told - self.began,
            "inputs": dict(zip((target.name for target in TARGETS), self.counts, strict=True)),
            "slowest_s": self.slowest,
            "findings": self.findings,
        }
        temporary = self.work / "state.json.part"
        temporary.write_text(json.dumps(state, indent=1), encoding="utf-8")
        temporary.replace(self.work / "state.json")


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """libFuzzer's own changes half of the time, and changes that keep msgpack and frames whole."""
    draw = random.Random(seed)

    def otherwise(whole: bytes) -> bytes:
        return bytes(atheris.Mutate(whole, max_size))

    return (otherwise(data) if draw.random() < 0.5 else change(data, draw, otherwise))[:max_size]


def main(words: list[str]) -> None:
    """``WORK SECONDS``: fuzz with the inputs in ``WORK/inputs``, which grows."""
    work, seconds = Path(words[0]), int(words[1])
    run = Run(work)
    options: list[Any] = [f"-max_total_time={seconds}", f"-max_len={LONGEST}", "-timeout=20", "-rss_limit_mb=4096"]
    options += ["-print_final_stats=1", "-verbosity=0", f"-artifact_prefix={work}/"]
    atheris.Setup([sys.argv[0], *options, str(work / "inputs")], run.one, custom_mutator=mutate)
    run.tell()
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
