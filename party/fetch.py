"""Fetches the emulator from the owner: its plan first, then its files in pieces; what was broken off goes on.

Nothing of a file is asked for before the plan was read, found to be of this kit, and the sizes of all files are known
and possible. A file grows under ``NAME.part`` and gets its name once its hash is that of the plan; the plan gets its
own name last of all. So a directory with an ``emulator.json`` was whole, and one without it is no emulator.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from party.connect import open_session
from party.opening import say
from party.session import Session
from party.workplace import Counted
from splitfl.config import TuneSettings
from splitfl.config_offsite import FetchSettings
from splitfl.config_privacy import OFFLINE_PROTOCOL
from splitfl.emulator import (
    EMULATOR_FILE,
    LARGEST_FILE,
    LARGEST_PLAN,
    Emulator,
    EmulatorPlan,
    check_belongs,
    file_hash,
    open_emulator,
    read_emulator_plan,
    values_in,
)
from splitfl.errors import ModelError, ResourceError, WireError
from splitfl.kit import DTYPES, Kit, open_kit
from splitfl.metrics import Result, write_results
from splitfl.report import as_duration, as_size
from splitfl.wire.messages import MAX_PIECE
from splitfl.wire.pieces import parts_of

PART = ".part"
_SCALED = 4  # bytes a value at most, where weights are stored as codes with float32 scales
_SLACK = 1 << 20  # bytes for names, shapes and padding of a layer's tensors
_TELL_EVERY_S = 5.0


@dataclass(kw_only=True)
class Wanted:
    """One file of the emulator."""

    number: int
    """As a fetch names it."""
    path: Path
    hash: str
    size: int
    held: int = 0
    """Bytes that are here already."""

    @property
    def part(self) -> Path:
        """Where it grows."""
        return self.path.with_name(self.path.name + PART)


def since_fetch(settings: TuneSettings) -> TuneSettings:
    """The settings of a run that is to begin, where what was broken off was no more than the fetch before it."""
    begun = (settings.out / "config.toml").exists()
    if settings.resume and not begun and emulator_folder(settings.out).is_dir():
        return dataclasses.replace(settings, resume=False)
    return settings


def emulator_folder(run: Path) -> Path:
    """Where a run keeps the emulator that it has fetched."""
    return run / "emulator"


def obtain(settings: TuneSettings, kit: Kit) -> tuple[Emulator, Counted]:
    """The emulator of a run that was given none: the one it has fetched before, or the owner's.

    Raises:
        ModelError: the one that is there, or the owner's, belongs to another kit.
        ResourceError, PeerError: as their names say.
    """
    return _obtain(settings, kit, emulator_folder(settings.out), "go on with --resume")


def fetch(settings: FetchSettings) -> None:
    """`splitfl fetch`: the emulator alone, into a directory of its own."""
    started = time.monotonic()
    kit = open_kit(settings.kit)
    emulator, moved = _obtain(settings, kit, settings.out, "give the same command again to go on")
    say(f"emulator: {settings.out}, layers {list(emulator.plan.kept)} in {as_size(emulator.bytes)}")
    if settings.json is not None:
        figures = {
            "emulator": (emulator.bytes, "bytes"),
            "bytes received": (moved.bytes_received, "bytes"),
            "bytes sent": (moved.bytes_sent, "bytes"),
            "seconds": (time.monotonic() - started, "s"),
        }
        results = [Result(case="fetch", metric=name, value=value, unit=unit) for name, (value, unit) in figures.items()]
        write_results(settings.json, "fetch", settings, results)


def _obtain(settings: TuneSettings | FetchSettings, kit: Kit, folder: Path, again: str) -> tuple[Emulator, Counted]:
    if (emulator := whole_emulator(folder, kit)) is not None:
        say(f"emulator: the one in {folder} is whole; the owner is not needed")
        return emulator, Counted()
    check_folder(folder)
    assert settings.owner is not None  # noqa: S101  the settings saw to it
    session = open_session(
        kit.plan,
        settings.owner,
        owner_key=settings.owner_key,
        key=settings.key,
        insecure_loopback=settings.insecure_loopback,
        protocol=OFFLINE_PROTOCOL,
        timeout_s=settings.timeout,
    )
    with contextlib.closing(session):
        say(f"session open with {settings.owner}, to fetch the emulator")
        try:
            fetch_emulator(session, kit, folder)
        except KeyboardInterrupt:
            say(f"Stopped. What has come of the emulator is kept in {folder}; {again}.")
            raise
    return open_emulator(folder), Counted(bytes_sent=session.bytes_sent, bytes_received=session.bytes_received)


def whole_emulator(folder: Path, kit: Kit) -> Emulator | None:
    """The emulator in `folder` if all of it is there and right, else None.

    Raises:
        ModelError: it is there, and belongs to another kit.
    """
    if not (folder / EMULATOR_FILE).is_file():
        return None
    try:
        emulator = open_emulator(folder)
    except ModelError as error:
        say(f"{error.problem} It is fetched again.")
        return None
    check_belongs(emulator.plan, kit)
    return emulator


def check_folder(folder: Path) -> None:
    """Refuse a place that holds something other than an emulator, or a part of one.

    Raises:
        ModelError: it does.
    """
    if folder.exists() and (not folder.is_dir() or any(not _is_ours(file) for file in folder.iterdir())):
        raise ModelError(
            f"{folder} holds something other than an emulator.",
            hint="choose another directory, or remove what is there",
        )


def _is_ours(file: Path) -> bool:
    name = file.name.removesuffix(PART)
    return name == EMULATOR_FILE or (name.startswith("emulator-") and name.endswith(".safetensors"))


# ---- the transfer


def fetch_emulator(session: Session, kit: Kit, folder: Path) -> None:
    """Fetch the owner's emulator into `folder`, beginning with whatever of it is there already.

    Raises:
        ModelError: it is damaged, or was made for another kit.
        ResourceError: there is no room for it.
        WireError: sizes or bytes that cannot be those of this emulator; what came of that file is removed.
        RefusedError, UnreachableError: as their names say. What has come is kept.
    """
    content = _plan_bytes(session)
    plan = read_emulator_plan(content, folder)
    check_belongs(plan, kit)
    values = values_in(kit, plan.kept)
    if plan.parameters != values:
        raise ModelError(
            f"The owner's emulator says that it holds {plan.parameters} values.",
            expected=f"{values}, as many as {len(plan.kept)} layers of this model have",
            hint="ask the owner for one that was made for this kit",
        )
    sizes = _sizes(session, plan, values)
    _begin(folder, content)
    files = [
        Wanted(number=number, path=folder / name, hash=expected, size=sizes[number - 1])
        for number, (name, expected) in enumerate(plan.files.items(), start=1)
    ]
    missing = [file for file in files if not _is_here(file)]
    _check_room(folder, sum(file.size - file.held for file in missing))
    _bring(session, missing, have=sum(sizes) - sum(file.size - file.held for file in missing), total=sum(sizes))
    os.replace(folder / (EMULATOR_FILE + PART), folder / EMULATOR_FILE)


def _plan_bytes(session: Session) -> bytes:
    """``emulator.json`` as the owner has it; one piece holds the longest there may be."""
    assert LARGEST_PLAN <= MAX_PIECE  # noqa: S101
    piece, content = next(session.fetch([(0, 0, LARGEST_PLAN)]))
    if piece.total > LARGEST_PLAN:
        raise WireError(f"The owner's {EMULATOR_FILE} has {piece.total} bytes.", expected=f"at most {LARGEST_PLAN}")
    return content.numpy().tobytes()


def _sizes(session: Session, plan: EmulatorPlan, values: int) -> list[int]:
    """Bytes of each file, by the owner's word: one byte of each is asked for.

    Raises:
        WireError: more than this emulator can take.
    """
    numbers = range(1, len(plan.files) + 1)
    sizes = [piece.total for piece, _ in session.fetch((number, 0, 1) for number in numbers)]
    each = _SCALED if plan.bits is not None else DTYPES[plan.dtype].itemsize
    most = each * values + _SLACK * (len(plan.kept) + 1)
    if sum(sizes) > most or max(sizes) > LARGEST_FILE:
        raise WireError(
            f"The files of the owner's emulator have {sum(sizes)} bytes together, the largest {max(sizes)}.",
            expected=f"at most {most} for {values} values, and {LARGEST_FILE} in one file",
            hint="ask the owner whether its emulator is in order",
        )
    return sizes


def _begin(folder: Path, content: bytes) -> None:
    """Make `folder` one of this emulator, unfinished; what is there of another one is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    plan, whole = folder / (EMULATOR_FILE + PART), folder / EMULATOR_FILE
    known = [file.read_bytes() for file in (plan, whole) if file.is_file()]
    if known and content not in known:
        say(f"the owner hands out another emulator than the one begun in {folder}; it is fetched from the start")
        for file in folder.iterdir():
            if _is_ours(file):
                file.unlink()
    plan.write_bytes(content)
    whole.unlink(missing_ok=True)


def _is_here(file: Wanted) -> bool:
    """Whether all of `file` is here; what cannot be of it is removed, and what can is noted."""
    if file.path.is_file():
        if file.path.stat().st_size == file.size and file_hash(file.path) == file.hash:
            return True
        file.path.unlink()
    if file.part.is_file():
        file.held = file.part.stat().st_size
        if file.held > file.size:
            say(f"{file.part} is longer than the owner's file; it is fetched from the start")
            file.part.unlink()
            file.held = 0
    return False


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ResourceError(
            f"The rest of the emulator takes {as_size(needed)}, and there are {as_size(free)} free at {folder}.",
            hint="make room, or choose another place; what has come is kept",
        )


def _bring(session: Session, files: list[Wanted], *, have: int, total: int) -> None:
    """Fetch what is missing of `files`, and give each its name once it is whole and right."""
    by_number = {file.number: file for file in files}
    parts = (part for file in files for part in parts_of(file.number, file.held, file.size))
    if have and files:
        say(f"emulator: {as_size(have)} of {as_size(total)} are here already")
    with _shown(have, total) as shown:
        for piece, content in session.fetch(parts):
            file = by_number[piece.file]
            if piece.total != file.size:
                raise WireError(
                    f"The owner says now that {file.path.name} has {piece.total} bytes, and said {file.size} before.",
                    hint="its emulator was replaced; fetch again",
                )
            with file.part.open("ab") as out:
                out.write(content.numpy().data)
            file.held += content.numel()
            shown.add(content.numel())
            if file.held == file.size:
                _finish(file)
    for file in files:
        if file.part.is_file():  # nothing was missing but its name
            _finish(file)


def _finish(file: Wanted) -> None:
    if file_hash(file.part) != file.hash:
        file.part.unlink()
        raise WireError(
            f"What came of {file.path.name} is not the file that the owner's {EMULATOR_FILE} names; it was removed.",
            expected="a file with the hash of the plan",
            hint="fetch again; if it happens again, the emulator was altered at the owner",
        )
    os.replace(file.part, file.path)


# ---- what a person sees


class Shown:
    """A bar on a terminal; elsewhere a line every few seconds."""

    def __init__(self, have: int, total: int, bar: Progress | None) -> None:
        self.total, self.done, self.come = total, have, 0
        self.started = time.monotonic()
        self._next = _TELL_EVERY_S
        self._bar = bar
        self._task = bar.add_task("emulator", total=total, completed=have) if bar is not None else None

    def add(self, count: int) -> None:
        """So many bytes more."""
        self.done, self.come = self.done + count, self.come + count
        seconds = time.monotonic() - self.started
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done)
        elif seconds >= self._next and self.done < self.total:
            self._next = seconds + _TELL_EVERY_S
            left = as_duration(seconds / self.come * (self.total - self.done))
            rate = as_size(self.come / seconds)
            say(f"emulator: {as_size(self.done)} of {as_size(self.total)}, {rate}/s, about {left} left")


@contextlib.contextmanager
def _shown(have: int, total: int) -> Iterator[Shown]:
    console = Console(file=sys.stderr, stderr=True)
    if not console.is_terminal:
        shown = Shown(have, total, None)
        yield shown
    else:
        columns = (TextColumn("emulator"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            shown = Shown(have, total, bar)
            yield shown
    seconds = max(time.monotonic() - shown.started, 1e-9)
    say(f"emulator: {as_size(shown.come)} fetched in {as_duration(seconds)}, {as_size(shown.come / seconds)}/s")
