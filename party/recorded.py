"""A run's recording, opened: what crossed as its receiver saw it, the truth behind it, and the adapter it came from.

What an attacker may see (`sent`, `updates`) and what scoring alone may see (`truth`) stay apart here, as on disk.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from party.recorded_updates import federated_updates, offline_update
from party.recording import UNCOUNTED, digest_of
from party.rundir import RunDirectory
from party.tune import Data, read_data
from protocols import protocol_named
from splitfl.adapters import ADAPTER_FILE
from splitfl.audit.recording import About, Origin, Probed, Reader, Record, Role
from splitfl.audit.recording_keys import Vault, open_vault
from splitfl.audit.recording_keys import forget as forget_folder
from splitfl.audit.traffic import Replay, Request, replay
from splitfl.audit.truth import TrueRow
from splitfl.audit.view import Noise, Sent, Update
from splitfl.config import TuneSettings
from splitfl.data import IGNORED
from splitfl.errors import DataError, ResourceError
from splitfl.kit import Kit
from splitfl.metrics import read_run
from splitfl.wire.keys import KeyPair, load_keys

_COUNTED_BY_MASK = {"opt", "biogpt", "roberta", "xlm-roberta", "camembert"}
"""Families that count positions over tokens alone; the others go on counting over padding on the left."""


@dataclass(frozen=True, kw_only=True)
class AdapterState:
    """The adapter that a bottom had when a row crossed."""

    weights: int
    """Optimiser steps made before it; -1 where nobody counted them, as in a federation."""
    known: bool
    """Whether this very adapter can be had."""
    folder: Path | None = None
    """Where it is; None for a bottom as the owner wrote it, if `known`."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What a recording holds, for the report; messages and bytes without those that were sent again."""

    messages_sent: int = 0
    messages_received: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    rows: int = 0
    """Rows that crossed: all that `Sent` can be made of."""
    retries: int = 0
    """Messages that crossed once more with the very same bytes."""
    changed_retries: int = 0
    """Those that crossed once more with other bytes, which must not happen: noise was drawn twice."""
    probes: int = 0
    """Forwards of the owner check: made from a row that had crossed, or from random numbers."""
    generations: int = 0
    """Forwards with a KV cache."""
    segments: int = 0
    """Starts of the run that recorded."""
    broken_off: int = 0
    """Segments without an end: the run was killed, or bytes were cut off."""
    full: bool = False
    """Whether the recording stopped at its size limit and the run went on."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Recorded:
    """All that an audit reads of one run. Numbers are those of `Sent` (or of `Update`)."""

    run: RunDirectory
    sent: tuple[Sent, ...] = ()
    """In the order in which they crossed; only the numbers that were asked for."""
    truth: Mapping[int, TrueRow] = field(default_factory=dict)
    """By number, for every row that crossed and whose origin was noted; scoring and controls alone may read it."""
    updates: tuple[Update, ...] = ()
    noise: Noise = field(default_factory=Noise)
    gradient_noise: Noise = field(default_factory=Noise)
    lora: Mapping[str, object] | None = None
    """For `View.lora` (K2); None where the adapter did not begin as one of that seed."""
    counts: Counts = field(default_factory=Counts)
    states: Mapping[int, AdapterState] = field(default_factory=dict)
    """By number."""

    def adapter_at(self, number: int) -> AdapterState:
        """For `View.adapter` (K3): what the bottom had when row `number` crossed."""
        return self.states.get(number, AdapterState(weights=-1, known=False))

    def by_adapter(self) -> dict[Path | None, tuple[int, ...]]:
        """Numbers whose adapter is known, by its folder; under None those of an untouched bottom."""
        found: dict[Path | None, list[int]] = {}
        for number, state in sorted(self.states.items()):
            if state.known:
                found.setdefault(state.folder, []).append(number)
        return {folder: tuple(numbers) for folder, numbers in found.items()}


def open_recorded(
    run: RunDirectory, kit: Kit, *, key: Path | None = None, owner_recording: Path | None = None,
    owner_key: Path | None = None, numbers: Collection[int] | None = None,
) -> Recorded:  # fmt: skip
    """Open the recording of a run.

    Args:
        run: written by ``splitfl tune --record``; of an offline run the adapter alone is needed.
        kit: the kit that the run was made with.
        key: secret key file of whoever ran it; by default the one that the run remembers.
        owner_recording: a file of ``splitfl serve --record``: what crossed is read from it and not from the run's own
            recording, which still tells the truth behind it.
        owner_key: secret key file of that owner; not needed where it served without keys.
        numbers: make `Sent` of these numbers only; counts, truth and states are always of all. None for all.

    Raises:
        UsageError: the run has no recording, or it was forgotten.
        KeyFileError: the key does not open it.
        DataError: a recording that was altered, or rows that have changed since the run.
    """
    settings = run.settings()
    update = offline_update(settings, kit, run)
    if update is not None and not run.recording.is_dir():
        return Recorded(run=run, updates=(update,))
    vault = open_vault(run.recording, _keys(settings, key))
    truth = _Truth(vault)
    readers = [vault.reader("traffic", number) for number in vault.numbers()]
    if owner_recording is not None:
        readers = [_owners_reader(owner_recording, owner_key)]
    wanted = (lambda number: True) if numbers is None else frozenset(numbers).__contains__
    found = replay(
        readers,
        kit.plan.width,
        left_out=truth.probed,
        wanted=wanted,
        counts_padding=kit.plan.model_type not in _COUNTED_BY_MASK,
    )
    data = read_data(settings, kit)
    _check_rows(settings, data, truth.datasets)
    about = found.about
    trains_bottom = protocol_named(settings.protocol).trains_bottom and not settings.freeze_bottom
    return Recorded(
        run=run,
        sent=tuple(found.sent),
        truth=_true_rows(found, truth, data, kit),
        updates=(update,) if update is not None else federated_updates(settings, found.left),
        noise=noise_of(about.hidden if about else {}),
        gradient_noise=noise_of(about.gradient if about else {}),
        lora=_lora(settings, trains_bottom=trains_bottom),
        counts=_counts(found, len(readers)),
        states=_states(found, truth, run, trains_bottom=trains_bottom),
    )


def forget(run: RunDirectory) -> int:
    """Destroy a run's recording: its key first, then its files. What is missing already is no trouble.

    Returns:
        Bytes that were removed.

    Raises:
        ResourceError: something is there that cannot be removed.
    """
    try:
        return forget_folder(run.recording)
    except OSError as error:
        raise ResourceError(
            f"The recording {run.recording} cannot be removed: {error.strerror}.",
            hint="remove the folder by hand, the file `key` first",
        ) from error


# ---- keys and files


def _keys(settings: TuneSettings, key: Path | None) -> KeyPair | None:
    chosen = key or (None if settings.insecure_loopback else settings.key)
    return None if chosen is None else load_keys(chosen)


def _owners_reader(path: Path, key: Path | None) -> Reader:
    vault = open_vault(path.parent, None if key is None else load_keys(key))
    return Reader(path=path, key=vault.key, stream="traffic", number=0)


class _Truth:
    """What the stream of truth says."""

    def __init__(self, vault: Vault) -> None:
        self.origins: dict[Request, tuple[Origin, int]] = {}
        """With the segment that says so, from 0."""
        self.probed: set[Request] = set()
        self.datasets: dict[Role, str] = {}
        self.starts: list[int] = []
        """Optimiser steps made when each segment began."""
        for segment, number in enumerate(vault.numbers()):
            self.starts.append(UNCOUNTED)
            reader = vault.reader("truth", number)
            for head, _ in reader if reader.path.is_file() else ():
                self._take(head, segment)

    def _take(self, head: Record, segment: int) -> None:
        match head:
            case About():
                self.datasets, self.starts[segment] = dict(head.datasets), head.weights
            case Origin():
                self.origins[head.session, head.step] = head, segment
            case Probed():
                self.probed.add((head.session, head.step))


# ---- rows


def _check_rows(settings: TuneSettings, data: Data, recorded: Mapping[Role, str]) -> None:
    """Whether the files still hold the rows that crossed."""
    now = {"train": data.train, "held-out": data.held_out}
    for role, digest in recorded.items():
        found = now[role]
        if found is None or digest_of(found) != digest:
            path = settings.train if role == "train" else settings.eval
            raise DataError(
                f"{path} does not hold the rows any more that the run was made with.",
                expected="the file as it was, in its order: else nobody can say what an attack got right",
            )


def _true_rows(found: Replay, truth: _Truth, data: Data, kit: Kit) -> dict[int, TrueRow]:
    tokenizer = kit.tokenizer()
    special = torch.tensor(sorted(set(tokenizer.all_special_ids)), dtype=torch.int64)
    rows = {}
    for number, place in enumerate(found.places):
        origin, _ = truth.origins.get(place.request, (None, 0))
        if origin is None or origin.dataset is None or place.place >= len(origin.rows):
            continue
        examples = data.train if origin.dataset == "train" else data.held_out
        assert examples is not None  # noqa: S101  `_check_rows` saw to it
        row = origin.rows[place.place]
        example = examples[row]
        missing = place.tokens - len(example["input_ids"])
        if missing < 0:
            raise DataError("A row that crossed is shorter than the row that it was made of.")
        ids = _filled(example["input_ids"], missing, data.collator.pad_token_id)
        labels = example["labels"]
        is_special = torch.isin(ids, special)
        is_special[len(ids) - missing :] = True
        rows[number] = TrueRow(
            number=number,
            dataset=origin.dataset,
            row=row,
            ids=ids,
            labels=labels if isinstance(labels, int) else _filled(labels, missing, IGNORED),
            special=is_special,
        )
    return rows


def _filled(values: list[int], missing: int, value: int) -> torch.Tensor:
    """Where lengths are hidden, padding crosses like text, on the right."""
    return torch.tensor([*values, *[value] * missing], dtype=torch.int64)


# ---- adapters


def _lora(settings: TuneSettings, *, trains_bottom: bool) -> dict[str, object] | None:
    if settings.federate is not None:  # the federation's seed, and its rule's way of drawing, made the first one
        return None
    targets = list(settings.target_modules) or None
    named = {**settings.lora_kwargs(), "target_modules": targets}
    return {**named, "top_alone": not trains_bottom, "seed": settings.seed}


def _states(found: Replay, truth: _Truth, run: RunDirectory, *, trains_bottom: bool) -> dict[int, AdapterState]:
    ends = [record.get("steps") for record in read_run(run.log) if record["event"] == "end"]
    final = ends[-1] if ends and (run.adapter / ADAPTER_FILE).is_file() else None
    states = {}
    for number, place in enumerate(found.places):
        origin, segment = truth.origins.get(place.request, (None, 0))
        weights = UNCOUNTED if origin is None else origin.weights
        later = truth.starts[segment + 1 :]
        if not trains_bottom or weights == 0:
            states[number] = AdapterState(weights=weights, known=True)
        elif weights == UNCOUNTED or any(weights > start for start in later):  # steps that were made again
            states[number] = AdapterState(weights=weights, known=False)
        else:
            folder = run.adapter if weights == final else run.checkpoints / f"checkpoint-{weights}"
            is_there = (folder / ADAPTER_FILE).is_file()
            states[number] = AdapterState(weights=weights, known=is_there, folder=folder if is_there else None)
    return states


# ---- the rest


def noise_of(facts: Mapping[str, str | float]) -> Noise:
    """A mechanism as the recording tells it."""
    unit: Literal["record", "token"] = "token" if facts.get("unit") == "token" else "record"
    return Noise(
        name=str(facts.get("name", "none")),
        sigma=float(facts.get("sigma", 0.0)),
        clip=float(facts.get("clip", math.inf)),
        unit=unit,
    )


def _counts(found: Replay, segments: int) -> Counts:
    tally = found.tally
    return Counts(
        messages_sent=tally.messages["sent"],
        messages_received=tally.messages["received"],
        bytes_sent=tally.bytes["sent"],
        bytes_received=tally.bytes["received"],
        rows=len(found.places),
        retries=tally.retries,
        changed_retries=tally.changed_retries,
        probes=tally.probes,
        generations=tally.generations,
        segments=segments,
        broken_off=tally.broken_off,
        full=tally.full,
    )
