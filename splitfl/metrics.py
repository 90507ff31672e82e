"""Figures: what `--json` writes, what a run records line by line, and how fast and how big it is.

Nothing here sends anything anywhere: curves of private data are data.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePath
from types import TracebackType
from typing import Any

import psutil

import splitfl
from splitfl.errors import DataError
from splitfl.files import replace_text


@dataclass(frozen=True, kw_only=True)
class Result:
    """One figure.

    Where `reference` and `value` are numbers and `ratio` is left out, it becomes ``value / reference``.
    """

    case: str
    """What was measured, for example the model and the shape of a batch."""
    metric: str
    value: float | int | str | None
    unit: str
    reference: float | int | None = None
    """The compared figure, measured in the same run."""
    ratio: float | None = None
    reach: float | int | None = None
    """The figure that is aimed at."""

    def __post_init__(self) -> None:
        if self.ratio is None and self.reference and isinstance(self.value, int | float):
            object.__setattr__(self, "ratio", self.value / self.reference)


def write_results(path: Path, command: str, settings: object, results: Iterable[Result]) -> None:
    """Write the figures of one command in the shape that `--json` has everywhere.

    Numbers that are not finite become null, paths under the home directory begin with ``~``. Secrets stay out because
    settings hold paths of keys and never what is in them.

    Args:
        path: the file, replaced as a whole.
        command: the command's name.
        settings: the resolved settings, a dataclass or a mapping.
        results: the figures.
    """
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        settings = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    record = {
        "command": command,
        "version": splitfl.__version__,
        "machine": machine(),
        "settings": settings,
        "results": [dataclasses.asdict(result) for result in results],
    }
    replace_text(path, json.dumps(_plain(record), indent=2, allow_nan=False) + "\n")


def machine() -> dict[str, Any]:
    """What a figure depends on: versions, processor, memory; no name of a host or a person."""
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cpu_count": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "accelerator": _accelerator(),
        "torch": _version("torch"),
        "transformers": _version("transformers"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str | None:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or None
    models = (line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name"))
    return next(models, None)


def _accelerator() -> str | None:
    torch = sys.modules.get("torch")  # a command that never loaded torch has not used a device
    return torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, PurePath):
        home = Path.home()
        return f"~/{value.relative_to(home)}" if value.is_relative_to(home) else str(value)
    if hasattr(value, "item"):  # a number of numpy or torch
        return _plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)


class RunLog:
    """The record of a run, `run.jsonl`: one JSON object a line, flushed at once, safe to open again on resume.

    Events are ``start``, ``train``, ``eval`` and ``end``. In a ``train`` record ``tokens``, ``seconds``, ``bytes_sent``
    and ``bytes_received`` count since the record before it; in ``end`` they count since ``start``. ``time`` is added.

    Args:
        path: the file; made if it is missing. A last line that a crash left torn is dropped.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _drop_torn_line(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, event: str, **facts: Any) -> None:
        """Append one record; numbers that are not finite become null."""
        line = json.dumps(_plain({"event": event, "time": round(time.time(), 3), **facts}), allow_nan=False)
        self._file.write(line + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; writing after that is an error."""
        self._file.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _drop_torn_line(path: Path) -> None:
    with path.open("r+b") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def read_run(path: Path) -> list[dict[str, Any]]:
    """The records of a run, oldest first. A torn last line is left out.

    Raises:
        DataError: the file cannot be read, or a line is not a record; names the line and not what is in it.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"The record of the run, {path}, cannot be read: {error.strerror}.") from error
    records = []
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("event"), str):
            raise DataError(
                f"{path}, line {number}: not a record of a run.", expected='a JSON object with a text under "event"'
            )
        records.append(record)
    return records


def peak_rss_bytes() -> int:
    """The most memory that this process has held at once, in bytes."""
    try:
        # ru_maxrss would be wrong here: Linux hands it down from the process that started this one.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    usage = psutil.Process().memory_info()
    if hasattr(usage, "peak_wset"):  # Windows
        return int(usage.peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Meter:
    """A rate over the last seconds, and the time that is left at that rate.

    Args:
        window: seconds to look back.
        clock: gives seconds; never runs backwards.
    """

    def __init__(self, window: float = 30.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._window, self._clock = window, clock
        self._marks: deque[tuple[float, float]] = deque([(clock(), 0.0)])
        self.total = 0.0

    def add(self, amount: float) -> None:
        """Count `amount` more, done by now."""
        now = self._clock()
        self.total += amount
        self._marks.append((now, self.total))
        while len(self._marks) > 2 and self._marks[1][0] <= now - self._window:
            self._marks.popleft()

    def rate(self) -> float:
        """Amount a second between the oldest mark of the window and the newest; 0 before there is any."""
        (start, before), (end, after) = self._marks[0], self._marks[-1]
        return (after - before) / (end - start) if end > start else 0.0

    def seconds_left(self, remaining: float) -> float | None:
        """Seconds until `remaining` more is done; None while there is no rate."""
        rate = self.rate()
        return remaining / rate if rate > 0 else None
