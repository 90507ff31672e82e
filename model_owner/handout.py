"""Hands out the emulator: opened and checked once, then read piece by piece, off the thread that owns the sockets.

The files are held open from the start. An emulator that is put in the directory's place later is not handed out, and
no fetch gets some bytes of the one and some of the other; that takes a new start of the owner. What is written into
the very same files would go out, and the party finds it by its hash.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from model_owner.refusals import Refusal
from splitfl.emulator import EMULATOR_FILE, check_belongs, open_emulator
from splitfl.errors import ResourceError
from splitfl.kit import Kit
from splitfl.report import as_size
from splitfl.wire.messages import Fetch, Piece
from splitfl.wire.pieces import part_of

_SHOWN = 20  # layers that are named


@dataclass(frozen=True, kw_only=True)
class OpenFile:
    """One file that is handed out."""

    descriptor: int
    size: int


@contextmanager
def handing_out(path: Path | None, kit: Kit) -> Iterator[Handout | None]:
    """A `Handout` of the emulator at `path`, closed on the way out; None without a path."""
    handout = None if path is None else Handout(path, kit)
    try:
        yield handout
    finally:
        if handout is not None:
            handout.close()


class Handout:
    """The emulator at `path`, for the parties of this kit.

    Raises:
        ModelError: no emulator, a damaged one, or one for another kit.
        ResourceError: it has more files than this machine opens at a time.
    """

    def __init__(self, path: Path, kit: Kit) -> None:
        emulator = open_emulator(path)
        check_belongs(emulator.plan, kit)
        self.plan = emulator.plan
        self._opened = ExitStack()
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="handout")
        """One thread: files are read in the order in which parts are asked for, whoever asks."""
        try:
            self._files = [self._open(path / name) for name in (EMULATOR_FILE, *emulator.plan.files)]
        except OSError as error:
            self.close()
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            raise ResourceError(
                f"The {len(emulator.plan.files)} files of {path} cannot all be held open.",
                hint="raise the limit (`ulimit -n`), or make an emulator of fewer files",
            ) from error

    def _open(self, file: Path) -> OpenFile:
        descriptor = os.open(file, os.O_RDONLY)
        self._opened.callback(os.close, descriptor)
        return OpenFile(descriptor=descriptor, size=os.fstat(descriptor).st_size)

    def __str__(self) -> str:
        kept = ", ".join(map(str, self.plan.kept[:_SHOWN])) + (" ..." if len(self.plan.kept) > _SHOWN else "")
        return f"layers {kept} are handed out: {as_size(self.size)} in {self.files} files"

    @property
    def files(self) -> int:
        """How many files there are, ``emulator.json`` included."""
        return len(self._files)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self._files)

    async def read(self, fetch: Fetch) -> tuple[Piece, torch.Tensor]:
        """The answer to `fetch` and its bytes, uint8 [N].

        Raises:
            Refusal: there is no such file, it ends before that, or it is not as long any more as it was at the start.
        """
        number, offset, length = part_of(fetch)
        if number >= self.files:
            raise Refusal(
                f"The emulator has no file number {number}.",
                code="unknown_piece",
                expected=f"0 to {self.files - 1}",
                hint="get the emulator again from its first file on",
            )
        file = self._files[number]
        if offset >= file.size:
            raise Refusal(
                f"File number {number} of the emulator ends before byte {offset}.",
                code="unknown_piece",
                expected=f"0 to {file.size - 1}",
                hint="get the emulator again from its first file on",
            )
        wanted = min(length, file.size - offset)
        content = await asyncio.get_running_loop().run_in_executor(
            self._reader, _bytes_at, file.descriptor, wanted, offset
        )
        if content.numel() != wanted:
            raise Refusal(
                "The emulator was altered at the owner after it had started.",
                code="internal",
                hint="ask the owner to write the emulator again and to start again",
            )
        piece = Piece(session=fetch.session, step=fetch.step, file=number, offset=offset, total=file.size)
        return piece, content

    def close(self) -> None:
        """Close the files, once nothing reads them any more. May be called twice."""
        self._reader.shutdown()
        self._opened.close()


def _bytes_at(descriptor: int, wanted: int, offset: int) -> torch.Tensor:
    """Those bytes of a file as uint8 [N]; fewer where it ends."""
    return torch.from_numpy(np.frombuffer(bytearray(os.pread(descriptor, wanted, offset)), dtype=np.uint8))
