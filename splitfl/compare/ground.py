"""What cells on one data set and cut share: rows, kit, what was measured at the cut, and an emulator."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from splitfl.bench.children import Child, run_to_end
from splitfl.bench.offsite_ground import folder_size
from splitfl.bench.offsite_rows import write_public_text
from splitfl.bench.utility_orders import CutMeasured, MeasureCut, UtilityReady
from splitfl.compare.cells import Cell
from splitfl.compare.grid import Grid
from splitfl.compare.places import Place, RowFiles, write_rows
from splitfl.config import TuneSettings
from splitfl.files import replace_text
from splitfl.options import to_toml
from splitfl.wire.keys import AllowList, new_keys

MAKING_LIMIT_S = 3600.0
_MEASURED_ROWS = 64
_TEXTS = 240  # public texts that an emulator is distilled on
_DISTIL_LENGTH = 96


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What was made."""

    place: Place
    folder: Path
    rows: RowFiles
    classifies: bool
    measured: Mapping[str, float]
    """r, clip and the tokens of a median row."""

    @property
    def kit(self) -> Path:
        """The kit's directory."""
        return self.folder / "kit"

    @property
    def emulator(self) -> Path:
        """The emulator's directory, once it is there."""
        return self.folder / "emulator"

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of what an owner may hand out."""
        weights = sum(path.stat().st_size for path in self.place.model.glob("*.safetensors"))
        emulator = folder_size(self.emulator) if self.emulator.is_dir() else 0
        return {"kit": folder_size(self.kit), "emulator": emulator, "model": weights}


class Grounds:
    """Makes each ground once, whichever cell asks first; what an earlier run has made is used again.

    Args:
        grid: the grid.
        places: by data set.
        out: the comparison's directory.
    """

    def __init__(self, grid: Grid, places: Mapping[str, Place], out: Path) -> None:
        self.grid, self.places, self.out, self.keys = grid, places, out, out / "keys"
        self._made: dict[Path, Ground] = {}
        self._locks: dict[Path, threading.Lock] = {}
        self._lock = threading.Lock()

    def prepare_keys(self) -> None:
        """A pair for the owner, the coordinator and every party, and the allow-list."""
        allow = AllowList(self.keys / "parties")
        for name in ("owner", "coordinator", *(f"party-{number}" for number in range(self.grid.course.parties))):
            if not (self.keys / f"{name}.key_secret").exists():
                public, _ = new_keys(name, self.keys)
                if name.startswith("party-"):
                    allow.add(public)

    def ground(self, cell: Cell) -> Ground:
        """The ground of a cell; errors as for the commands that make it."""
        folder = self._folder(cell)
        with self._lock_of(folder):
            if folder not in self._made:
                self._made[folder] = self._make(cell, folder)
            return self._made[folder]

    def emulator(self, cell: Cell) -> Path:
        """The emulator of a cell's ground."""
        ground = self.ground(cell)
        done = ground.folder / "emulator.json"
        with self._lock_of(ground.folder):
            if not done.is_file():
                self._emulate(cell, ground, done)
        return ground.emulator

    def _folder(self, cell: Cell) -> Path:
        size = "quick" if cell.quick else "full"
        course = self.grid.course
        digest = self.grid.digest(cell.task, cell.cut, course.parties, course.distil_steps, course.quick_distil_steps)
        return self.out / "grounds" / f"{cell.data}-{cell.cut.replace('+', '-')}-{size}-{digest}"

    def _lock_of(self, folder: Path) -> threading.Lock:
        with self._lock:
            return self._locks.setdefault(folder, threading.Lock())

    def _make(self, cell: Cell, folder: Path) -> Ground:
        place, task = self.places[cell.data], cell.task
        rows = write_rows(task, place, folder / "rows", cell.rows, self.grid.course.parties)
        kept = folder / "measured.json"
        if not kept.is_file():
            words = ["splitfl", "kit", str(folder / "kit"), "--model", str(place.model), "--bottom", str(cell.bottom),
                     "--top", str(cell.top), "--dtype", "float32", "--task", task.kind, "--no-verify",
                     "--overwrite"]  # fmt: skip
            if task.classes:
                words += ["--num-labels", str(task.classes)]
            run_to_end(words, log=folder / "kit.log")
            replace_text(kept, json.dumps(self._measure(cell, rows, folder)) + "\n")
        measured = json.loads(kept.read_text(encoding="utf-8"))
        return Ground(place=place, folder=folder, rows=rows, classifies=bool(task.classes), measured=measured)

    def _measure(self, cell: Cell, rows: RowFiles, folder: Path) -> dict[str, float]:
        """r, the root mean square of a token's norm at the cut before training, and the clip that mild noise has."""
        settings = TuneSettings(
            kit=folder / "kit", out=folder / "none", train=rows.train, eval=rows.held_out, dtype="float32", threads=1,
            max_length=cell.task.max_length, truncation="right", owner="tcp://127.0.0.1:9", insecure_loopback=True,
        )  # fmt: skip
        to_toml(settings, folder / "measure.toml")
        with Child("measuring process", ["party.utility_side"], threads=1, log=folder / "measure.log") as side:
            side.ready(UtilityReady)
            order = MeasureCut(settings=str(folder / "measure.toml"), rows=_MEASURED_ROWS)
            found = side.ask(order, CutMeasured)
        clip = found.norm * math.sqrt(found.median_length)
        return {"r": found.norm, "clip": clip, "tokens of a median row": found.median_length}

    def _emulate(self, cell: Cell, ground: Ground, done: Path) -> None:
        steps = self.grid.course.quick_distil_steps if cell.quick else self.grid.course.distil_steps
        words = ["splitfl", "emulator", str(ground.emulator), "--model", str(ground.place.model), "--kit",
                 str(ground.kit), "--keep", str(cell.task.keep), "--json", str(ground.folder / "emulator.figures.json"),
                 "--threads", "1"]  # fmt: skip
        if steps:
            text, _ = write_public_text(ground.folder, quick=False)
            lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
            replace_text(text, "".join(lines[:: max(1, len(lines) // _TEXTS)][:_TEXTS]))
            words += ["--text", str(text), "--max-length", str(_DISTIL_LENGTH), "--distil-steps", str(steps),
                      "--learning-rate", "5e-4", "--eval-steps", str(steps)]  # fmt: skip
        run_to_end(words, log=ground.folder / "emulator.log", limit_s=MAKING_LIMIT_S)
        replace_text(done, json.dumps({"steps": steps, "rows": asdict(ground.rows)["counts"]}) + "\n")
