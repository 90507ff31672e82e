"""A party's own adapters in RUN/federation, where the federation has no model of all (`fed-kd`).

The state of such a federation is no model, so it can lead nobody back to an earlier one. Each party keeps its adapter
after every round that was kept, and takes up the one that belongs to the state it is told to start from. What it must
not lose between two processes is how far it is in a round, and the adapter of that moment.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

import msgspec
from msgspec.structs import replace

from party.federated_model import SharedModel
from splitfl.aggregation.state import State
from splitfl.errors import DataError, WireError
from splitfl.files import replace_text

_KEPT = "kept.json"

Phase: TypeAlias = Literal["trained", "taught", "done"]
"""In a round: trained on private rows; also on public ones; over."""


class Place(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far a party is."""

    file: str = ""
    """The adapter of this moment; empty for the one that every run begins with."""
    round: int = -1
    phase: Phase = "done"
    state: str = ""
    """Digest of the state that this party has learnt from last."""
    after: dict[str, str] = {}
    """By digest of a state: the adapter after the round that gave it."""
    rounds: dict[str, str] = {}
    """By number of a kept round, in digits: the adapter after it."""


class KeptRounds:
    """The adapters and the place.

    Args:
        folder: made with mode 0700 when something is kept.
        shared: the model; the adapter of where this party was is loaded into it.
        resume: whether to go on where an earlier process was.

    Raises:
        DataError: what lies there cannot be used.
    """

    def __init__(self, folder: Path, shared: SharedModel, *, resume: bool) -> None:
        self.folder, self.shared, self.at = folder, shared, Place()
        path = folder / _KEPT
        if resume and path.is_file():
            try:
                self.at = msgspec.json.decode(path.read_bytes(), type=Place)
            except msgspec.MsgspecError as error:
                raise self._damaged(_KEPT) from error
            if self.at.file:
                self.load(self.at.file)

    def load(self, file: str) -> None:
        """Put an adapter that is kept here into the model.

        Raises:
            DataError: it is not there, or damaged.
        """
        try:
            if file not in self._held():
                raise self._damaged(file)
            self.shared.load(State.from_bytes((self.folder / file).read_bytes()).adapter, {})
        except (WireError, OSError) as error:
            raise self._damaged(file) from error

    def keep(self, phase: Phase, *, round: int | None = None, state: str | None = None) -> None:
        """Write the model's adapter as it is now; then say that this party is there."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        at = replace(self.at, phase=phase, round=self.at.round if round is None else round)
        file = f"{at.round + 1:06d}-{phase}.safetensors"
        staging = self.folder / f".{file}.new"
        staging.write_bytes(State(adapter=self.shared.read()).to_bytes())
        staging.replace(self.folder / file)
        self._note(replace(at, file=file, state=at.state if state is None else state))

    def close(self, round: int, state: str, *, kept: bool) -> None:
        """A round is over; `state` is what the next one starts from, as far as this party knows."""
        at = replace(self.at, phase="done", state=state)
        if kept:
            at = replace(at, after={**at.after, state: at.file}, rounds={**at.rounds, str(round): at.file})
        self._note(at)

    def go_back(self, state: str) -> None:
        """Take up the adapter after the round that gave `state`."""
        self.load(self.at.after[state])
        self._note(replace(self.at, phase="done", state=state, file=self.at.after[state]))

    def _note(self, at: Place) -> None:
        """Write the place down; adapters that nothing names any more are removed."""
        replace_text(self.folder / _KEPT, msgspec.json.encode(at).decode() + "\n")
        self.at = at
        for file in self._held() - {at.file, *at.after.values(), *at.rounds.values()}:
            (self.folder / file).unlink(missing_ok=True)

    def _held(self) -> set[str]:
        return {path.name for path in self.folder.glob("*.safetensors")}

    def _damaged(self, name: str) -> DataError:
        return DataError(f"{self.folder / name} is missing or damaged.", hint="begin another run with --out")
