"""`splitfl tune --record`: what crosses, and which rows it came from, into RUN/recording.

A recorder looks on and changes nothing. The session shows it every message (its tap), the guard knows the rows of the
batch that leaves, and the trainer says how many steps the optimiser has made. A forward whose request was not let go by
the guard is the owner check's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from msgspec.structs import replace
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from party.opening import Preparation, say
from party.protect import Outgoing
from party.round_link import RoundLink
from party.rundir import RunDirectory
from splitfl.aggregation.state import State
from splitfl.audit.recording import About, Left, Origin, Probed, Record, Role, Room, Way, Writer
from splitfl.audit.recording_keys import make_vault, open_vault
from splitfl.audit.witness import Witness, opened
from splitfl.config import TuneSettings
from splitfl.data import Examples
from splitfl.errors import ResourceError
from splitfl.kit import Kit
from splitfl.link import TrunkLink, TrunkRequest
from splitfl.options.values import parse_size
from splitfl.privacy.mechanisms import Gauss, GradientGauss, Mechanism
from splitfl.report import as_size
from splitfl.wire.codecs import Frame
from splitfl.wire.coding import Coded
from splitfl.wire.keys import load_keys
from splitfl.wire.messages import Forward
from splitfl.wire.round_messages import PutItem

if TYPE_CHECKING:
    from party.tune import Data

UNCOUNTED = -1
"""Steps of the optimiser where nobody counts them: between the rounds of a federation adapters come and go."""


@contextlib.contextmanager
def recording_of(
    settings: TuneSettings, kit: Kit, run: RunDirectory, data: Data, preparation: Preparation
) -> Iterator[Recorder | None]:
    """What records this run, closed in order at the end; None where nobody asked for it.

    Raises:
        KeyFileError: the run was recorded so far under another key.
        UsageError: what was recorded so far has been forgotten.
    """
    if not settings.record:
        yield None
        return
    recorder = Recorder(settings, kit, run, data, preparation)
    with contextlib.closing(recorder):
        yield recorder


class Recorder:
    """Records one start of a run. Nothing is on disk before `begin`: only a run that begins leaves a directory."""

    def __init__(
        self, settings: TuneSettings, kit: Kit, run: RunDirectory, data: Data, preparation: Preparation
    ) -> None:
        self.folder, self.limit = run.recording, parse_size(settings.record_limit)
        self._keys = None if settings.insecure_loopback or settings.key is None else load_keys(settings.key)
        if self.folder.is_dir():
            open_vault(self.folder, self._keys)
        self.roles: dict[str, Role] = {data.train_set.fingerprint: "train"}
        if data.held_out_set is not None:
            self.roles.setdefault(data.held_out_set.fingerprint, "held-out")
        self._digests: dict[Role, str] = {"train": digest_of(data.train)}
        if data.held_out is not None:
            self._digests["held-out"] = digest_of(data.held_out)
        self.weights = UNCOUNTED if settings.federate is not None else _steps_made(settings, kit, run)
        protection = preparation.protection
        self._about = About(
            side="party",
            protocol=settings.protocol,
            hidden=facts_of(protection.hidden),
            gradient=facts_of(protection.gradient),
            trains_bottom=protection.trains_bottom,
        )
        self._here = threading.local()
        """The request that this thread has under way."""
        self._witness = Witness()
        self._waiting: list[tuple[Record, list[bytes]]] = []
        self._traffic: Writer | None = None
        self._truth: Writer | None = None
        self._sums_in_the_clear = settings.federate is not None and settings.sum == "plain"
        self._round: Left | None = None
        self._state = b""

    # ---- the file

    def begin(self) -> None:
        """There is a run now: make the files, and write what has waited for it. May be called again.

        Raises:
            ResourceError: they cannot be made.
        """
        if self._traffic is not None:
            return
        try:
            vault = make_vault(self.folder, self._keys)
            room = Room(self.limit, vault.size, self._told_to_stop)
            number = max(vault.numbers(), default=0) + 1
            self._traffic, self._truth = (vault.writer(stream, number, room) for stream in ("traffic", "truth"))
        except OSError as error:
            raise ResourceError(
                f"The recording {self.folder} cannot be written: {error.strerror}.",
                hint="free some space, or leave --record out",
            ) from error
        self._traffic.write(self._about)
        self._truth.write(replace(self._about, datasets=self._digests, weights=self.weights))
        for head, frames in self._waiting:
            self._traffic.write(head, frames)
        self._waiting.clear()
        say(f"recording what crosses in {self.folder}, up to {as_size(self.limit)}; `splitfl audit` reads it")

    def close(self) -> None:
        """Finish the files."""
        for writer in (self._traffic, self._truth):
            if writer is not None:
                writer.close()

    def _told_to_stop(self, why: str) -> None:
        say(f"recording stopped: {why}. The run goes on; what crosses from here on is not kept")

    # ---- messages

    def tap(self, way: str, frames: Sequence[Frame]) -> None:
        """To be given to the session."""
        side: Way = "sent" if way == "sent" else "received"
        if self._traffic is not None and self._traffic.room.is_full:
            return
        message = opened(frames, "party" if side == "sent" else "owner")
        head = self._witness.note(side, message, frames)
        if isinstance(message, Forward) and side == "sent" and not head.again:
            self._note_origin(message)
        if self._traffic is None:
            self._waiting.append((head, [bytes(frame) for frame in frames]))
        else:
            self._traffic.write(head, frames)

    def _note_origin(self, message: Forward) -> None:
        if self._truth is None or message.cache is not None:
            return
        request = {"session": message.session, "step": message.step}
        going = getattr(self._here, "request", None)
        if not isinstance(going, Outgoing) or not going.is_of_rows:
            self._truth.write(Probed(**request))
            return
        batch = going.made_of
        role = None if batch is None else self.roles.get(batch.dataset)
        rows = () if batch is None else batch.rows
        self._truth.write(Origin(**request, dataset=role, rows=rows, weights=self.weights))

    def watching(self, link: TrunkLink) -> TrunkLink:
        """`link`, watched for which requests go through it."""
        return _Watched(self, link)

    @contextlib.contextmanager
    def going(self, request: TrunkRequest) -> Iterator[None]:
        """While `request` is on its way."""
        self._here.request = request
        try:
            yield
        finally:
            self._here.request = None

    # ---- updates

    def round_begins(self, link: RoundLink, number: int, round_: int, stage: int, state: State) -> None:
        """A sum of a federation, and the common state that an update of it is made from; kept if it is in the clear.

        Args:
            link: to the coordinator.
            number: of the sum.
            round_: of the rule.
            stage: sum of the rule's round.
            state: before it.
        """
        if not self._sums_in_the_clear:
            return
        self.begin()
        link.on_put = self._put
        self._round = Left(time=0.0, number=number, round=round_, stage=stage, sizes=())
        self._state = state.to_bytes()

    def _put(self, item: PutItem, blob: bytes) -> None:
        if item != "submit" or self._round is None or self._traffic is None:
            return
        frames = [self._state, blob]
        sizes = tuple(map(len, frames))
        self._traffic.write(replace(self._round, time=time.time(), sizes=sizes), frames)

    # ---- the trainer

    @property
    def callbacks(self) -> list[TrainerCallback]:
        """For the trainer."""
        return [] if self.weights == UNCOUNTED else [_Counts(self)]


class _Watched:
    """The session, with a look at each request."""

    def __init__(self, recorder: Recorder, link: TrunkLink) -> None:
        self.recorder, self.link = recorder, link

    def forward(self, request: TrunkRequest) -> tuple[torch.Tensor, int]:
        """See `splitfl.link.TrunkLink`."""
        with self.recorder.going(request):
            return self.link.forward(request)

    def backward(self, step: int, gradient: torch.Tensor | Coded) -> torch.Tensor:
        """See `splitfl.link.TrunkLink`."""
        return self.link.backward(step, gradient)

    def release(self, *, caches: tuple[int, ...] = (), steps: tuple[int, ...] = ()) -> None:
        """See `splitfl.link.TrunkLink`."""
        self.link.release(caches=caches, steps=steps)


class _Counts(TrainerCallback):
    """Tells the recorder after how many steps of the optimiser what follows will cross."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After a resume it is not 0."""
        self.recorder.weights = state.global_step

    on_step_end = on_train_begin


def digest_of(examples: Examples) -> str:
    """BLAKE2b of ids and labels in their order: the numbers of rows mean something only for these very examples."""
    told = [[example["input_ids"], example["labels"]] for example in examples]
    return hashlib.blake2b(json.dumps(told).encode(), digest_size=16).hexdigest()


def facts_of(mechanism: Mechanism | None) -> dict[str, str | float]:
    """What is public of a mechanism, as `splitfl.audit.view.Noise` has it."""
    if mechanism is None:
        return {}
    facts: dict[str, str | float] = {"name": mechanism.name}
    if isinstance(mechanism, Gauss):
        facts |= {"sigma": float(mechanism.sigma), "clip": float(mechanism.clip), "unit": mechanism.unit}
    elif isinstance(mechanism, GradientGauss):
        facts |= {"sigma": float(mechanism.sigma), "clip": float(mechanism.clip), "unit": "token"}
    return facts


def _steps_made(settings: TuneSettings, kit: Kit, run: RunDirectory) -> int:
    """Steps that the optimiser made before this start."""
    checkpoint = run.latest_checkpoint(kit.plan) if settings.resume else None
    return 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
