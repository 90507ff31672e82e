"""Where a run trains: the party's model with the trunk over the network, or with the trunk's replies kept on disk."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel

from party.bookkeeping import Book, describe, keep_name
from party.cache import CacheKey, TrunkCache, cache_bytes, fill, put_cached_trunk
from party.honesty import HonestyProbe
from party.model import open_model, resolve_dtype
from party.opening import Preparation, check_budget, connect, guarded, say
from party.outbox import Outbox
from party.pipeline import Pipeline, Split
from party.progress import Traffic
from party.protect import RowTracker
from party.remote import RemoteTrunk
from party.rundir import RunDirectory
from party.session import Session
from party.trainer import ExtraLoss, SplitTrainer
from party.turns import share_heap
from splitfl.adapters import add_lora, lora_config
from splitfl.config import TuneSettings
from splitfl.cut import module_at
from splitfl.data import Examples
from splitfl.errors import UsageError
from splitfl.kit import DTYPES, Kit
from splitfl.load import parameter_count
from splitfl.metrics import RunLog
from splitfl.options.values import parse_size
from splitfl.privacy.decorrelation import distance_correlation, flatten_tokens
from splitfl.report import as_duration, as_size
from splitfl.wire.messages import BYTES_PER_ELEMENT

if TYPE_CHECKING:
    from party.recording import Recorder
    from party.tune import Data


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """Everything that training needs and that differs between protocols."""

    model: PeftModel
    tracker: RowTracker
    traffic: Traffic
    log: RunLog
    extra_loss: ExtraLoss | None = None
    trainer: Callable[..., SplitTrainer] = SplitTrainer
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Training arguments that the run has no choice about."""
    release: Callable[[PeftModel], None] | None = None
    """Books the adapter, before it is written."""
    probe: HonestyProbe | None = None
    """What checks the owner."""
    recorder: Recorder | None = None
    """Keeps what crosses, where that was asked for."""
    measured: str = ""
    """How figures were measured, where that is not with the owner's trunk: stands behind them."""


@dataclass(kw_only=True)
class Counted:
    """Bytes of sessions that are over."""

    bytes_sent: int = 0
    bytes_received: int = 0


@contextlib.contextmanager
def open_workplace(
    settings: TuneSettings, kit: Kit, run: RunDirectory, data: Data, preparation: Preparation, book: Book,
    recorder: Recorder | None = None,
) -> Iterator[Workplace]:  # fmt: skip
    """The model, ready to be trained; whatever was opened for it is closed afterwards."""
    protocol = preparation.protocol
    if settings.micro_batches != "1" and (protocol.offline or protocol.whole or protocol.sends_once):
        raise UsageError(
            f"--micro-batches with protocol {settings.protocol!r}: no step of its training waits for the owner.",
            hint="leave --micro-batches out",
        )
    if preparation.protocol.offline:
        from party.offline import OfflinePreparation, train_offline  # it stands on this module

        assert isinstance(preparation, OfflinePreparation)  # noqa: S101
        with train_offline(settings, kit, run, data, preparation, book) as place:
            yield replace(place, recorder=recorder)
        return
    if preparation.protocol.whole:
        from party.whole import train_whole  # it stands on this module

        with train_whole(settings, kit, run, data, preparation, book) as place:
            yield replace(place, recorder=recorder)
        return
    opened = _kept_replies if preparation.protocol.sends_once else _over_the_network
    with opened(settings, kit, run, data, preparation, book, recorder) as place:
        yield place


def _admit(settings: TuneSettings, preparation: Preparation, book: Book, data: Data) -> None:
    """Whether the ledger lets this run send its rows at all; asked before anybody is reached."""
    book.ledger.check_run(book.run, data.train_set.fingerprint)
    if not settings.resume:  # how much of its plan a broken-off run has used is not known
        held_out = data.held_out_set.fingerprint if data.held_out_set else None
        check_budget(settings, preparation, book, data.train_set.fingerprint, held_out)


def _begin(
    settings: TuneSettings, run: RunDirectory, preparation: Preparation, book: Book, recorder: Recorder | None
) -> None:
    """The run directory; nothing may be refused for its settings any more."""
    run.prepare(settings, preparation.bounds)
    keep_name(run.path, book.run)
    run.drop_unfinished()
    if recorder is not None:
        recorder.begin()


def tunable(settings: TuneSettings, kit: Kit, base: PreTrainedModel, *, top_alone: bool) -> PeftModel:
    """`base` with fresh adapters, as the settings say."""
    model = add_lora(base, _lora(settings, kit, base, top_alone=top_alone), seed=settings.seed)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(
        f"model: {kit.plan.model_type}, layers {kit.plan.party_layers} here, {len(kit.plan.trunk_layers)} with the "
        f"owner; {trainable:,} of {parameter_count(model):,} parameters held here are tuned"
    )
    return model


def _lora(settings: TuneSettings, kit: Kit, base: PreTrainedModel, *, top_alone: bool) -> LoraConfig:
    targets = list(settings.target_modules) or None
    return lora_config(base, kit.plan, **{**settings.lora_kwargs(), "target_modules": targets}, top_alone=top_alone)


# ---- the trunk over the network


@contextlib.contextmanager
def _over_the_network(
    settings: TuneSettings, kit: Kit, run: RunDirectory, data: Data, preparation: Preparation, book: Book,
    recorder: Recorder | None,
) -> Iterator[Workplace]:  # fmt: skip
    protection = preparation.protection
    _admit(settings, preparation, book, data)
    with contextlib.closing(connect(settings, kit, protection, recorder)) as session, contextlib.ExitStack() as stack:
        logs: list[RunLog] = []
        guard = guarded(settings, session, protection, book, lambda facts: logs[0].write("probe", **facts), recorder)
        base = open_model(kit, guard, dtype=settings.dtype, device=settings.device)
        model = tunable(settings, kit, base, top_alone=not protection.trains_bottom)
        _begin(settings, run, preparation, book, recorder)
        guard.outbox = _outbox(settings, kit, run)
        logs.append(stack.enter_context(RunLog(run.log)))
        weight = protection.decorrelate
        yield Workplace(
            model=model,
            tracker=_tracker(guard, data, kit),
            traffic=session,
            log=logs[0],
            extra_loss=Decorrelation(base, remote_trunk(base, kit), weight) if weight else None,
            trainer=functools.partial(
                SplitTrainer,
                pipeline=_pipeline(settings, kit, session),
                on_checkpoint=None if guard.outbox is None else guard.outbox.begin_at,
            ),
            probe=guard.link if isinstance(guard.link, HonestyProbe) else None,
            recorder=recorder,
        )
        if guard.outbox is not None:
            guard.outbox.close()


def _outbox(settings: TuneSettings, kit: Kit, run: RunDirectory) -> Outbox | None:
    """Where noise is drawn: so that a run that is resumed draws none for what it has sent before."""
    draws = settings.noise != "none" or settings.gradient_sigma is not None or settings.label_noise != "none"
    if not draws or settings.federate is not None:
        return None
    checkpoint = run.latest_checkpoint(kit.plan) if settings.resume else None
    return Outbox(run.path / "outbox", checkpoint.name if checkpoint is not None else None)


def _pipeline(settings: TuneSettings, kit: Kit, session: Session) -> Pipeline | None:
    if settings.micro_batches == "1":
        return None
    share_heap()
    return Pipeline(
        micro_batches=0 if settings.micro_batches == "auto" else int(settings.micro_batches),
        in_flight_bytes=parse_size(settings.in_flight_bytes),
        width=kit.plan.width,
        itemsize=BYTES_PER_ELEMENT[session.terms.wire_dtype],
        trim=not settings.hide_lengths,
    )


def _tracker(target: object, data: Data, kit: Kit) -> RowTracker:
    return RowTracker(
        target,  # type: ignore[arg-type]
        train=data.train_set.fingerprint,
        held_out=data.held_out_set.fingerprint if data.held_out_set else None,
        labels=kit.plan.task == "sequence-classification",
    )


def remote_trunk(base: PreTrainedModel, kit: Kit) -> RemoteTrunk:
    """The remote trunk of a party's model."""
    found = module_at(base.base_model, kit.plan.stack)[kit.plan.bottom]
    assert isinstance(found, RemoteTrunk)  # noqa: S101
    return found


class Decorrelation:
    """A loss on what is sent: its squared distance correlation with the tokens' embeddings, times a weight.

    Args:
        base: the party's model.
        remote: its remote trunk, which shows what comes out of the bottom.
        weight: of the loss; GuardedTuning's lambda.
    """

    def __init__(self, base: PreTrainedModel, remote: RemoteTrunk, weight: float) -> None:
        self.weight = weight
        self._embedded: torch.Tensor | None = None
        self._passed: list[tuple[torch.Tensor, torch.Tensor]] = []
        base.get_input_embeddings().register_forward_hook(self._note_embedded)
        remote.on_hidden = self._note_hidden

    def _note_embedded(self, _module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> None:
        self._embedded = output.detach()

    def _note_hidden(self, hidden: torch.Tensor) -> None:
        if torch.is_grad_enabled():
            assert self._embedded is not None  # noqa: S101
            self._passed.append((self._embedded, hidden))

    def __call__(self, mask: torch.Tensor, split: Split | None = None) -> torch.Tensor:
        """The loss of the batch that has just passed; `mask` [B, T] is 1 where there is a token."""
        count = 1 if split is None else len(split.parts)
        passed, self._passed = self._passed[-count:], []  # the graphs go with the batch
        assert len(passed) == count  # noqa: S101
        if split is None:
            [(embedded, hidden)] = passed
        else:
            embedded, hidden = (split.joined(parts, mask.shape[1]) for parts in zip(*passed, strict=True))
        mask = mask.to(hidden.device)
        embedded, hidden = flatten_tokens(embedded, mask), flatten_tokens(hidden, mask)
        return self.weight * distance_correlation(embedded, hidden)


# ---- the trunk's replies on disk


@contextlib.contextmanager
def _kept_replies(
    settings: TuneSettings, kit: Kit, run: RunDirectory, data: Data, preparation: Preparation, book: Book,
    recorder: Recorder | None,
) -> Iterator[Workplace]:  # fmt: skip
    """Send what has not been sent, then train without the owner."""
    compute = resolve_dtype(kit, settings.dtype)
    dtype = DTYPES[compute if settings.wire_dtype == "auto" else settings.wire_dtype]
    files = {data.train_set.fingerprint: ("train", data.train)}
    if data.held_out is not None and data.held_out_set is not None:
        files[data.held_out_set.fingerprint] = ("held-out", data.held_out)
    _admit(settings, preparation, book, data)
    caches = {
        name: _open_cache(settings, kit, run, preparation, name, folder, examples, dtype)
        for name, (folder, examples) in files.items()
    }
    traffic = Counted()
    base = open_model(kit, NoLink(), dtype=settings.dtype, device=settings.device)
    _lora(settings, kit, base, top_alone=True)  # refuses, before anything is sent, what cannot be trained afterwards
    with contextlib.ExitStack() as stack:
        session = None
        if any(cache.missing for cache in caches.values()):
            session = stack.enter_context(contextlib.closing(connect(settings, kit, preparation.protection, recorder)))
        else:
            say("every row has been sent; the owner is not needed")
        _begin(settings, run, preparation, book, recorder)
        log = stack.enter_context(RunLog(run.log))
        if session is not None:
            with contextlib.closing(session):
                _send_once(settings, kit, data, preparation, book, session, base, caches, files, dtype, log, recorder)
            traffic.bytes_sent, traffic.bytes_received = session.bytes_sent, session.bytes_received
        cached = put_cached_trunk(base, kit.plan, settings.padding_side)
        for cache in caches.values():
            cache.load()
        cached.caches = caches
        model = tunable(settings, kit, base, top_alone=True)
        tracker = _tracker(cached, data, kit)
        yield Workplace(model=model, tracker=tracker, traffic=traffic, log=log, recorder=recorder)


def _open_cache(
    settings: TuneSettings, kit: Kit, run: RunDirectory, preparation: Preparation, name: str, folder: str,
    examples: Examples, dtype: torch.dtype,
) -> TrunkCache:  # fmt: skip
    protection = preparation.protection
    key = CacheKey(
        plan=kit.plan.digest,
        dataset=name,
        tokens=hashlib.blake2b(
            json.dumps([example["input_ids"] for example in examples]).encode(), digest_size=16
        ).hexdigest(),
        protection=f"{protection.hidden!r} {protection.hidden_coding} {settings.snap} {protection.hide_lengths}"
        if protection.hidden
        else describe(None),
        compute=resolve_dtype(kit, settings.dtype),
        dtype=str(dtype).removeprefix("torch."),
        padding_side=settings.padding_side,
        batch_size=settings.per_device_eval_batch_size,
        examples=len(examples),
    )
    lengths = [len(example["input_ids"]) for example in examples]
    cache = TrunkCache(run.replies / folder, key, lengths)
    size = as_size(cache_bytes(lengths, kit.plan.width, dtype))
    say(f"{folder}: {len(lengths)} rows, {sum(lengths):,} tokens; the trunk's replies take {size} in {cache.folder}")
    return cache


def _send_once(
    settings: TuneSettings, kit: Kit, data: Data, preparation: Preparation, book: Book, session: Session,
    base: PreTrainedModel, caches: dict[str, TrunkCache], files: dict[str, tuple[str, Examples]], dtype: torch.dtype,
    log: RunLog, recorder: Recorder | None,
) -> None:  # fmt: skip
    protection = preparation.protection
    guard = guarded(settings, session, protection, book, lambda facts: log.write("probe", **facts), recorder)
    for name, (folder, examples) in files.items():
        cache = caches[name]
        cache.start()
        rows = sum(len(cache.batches[batch]) for batch in cache.missing)
        told = _Told(folder)
        fill(
            cache,
            base,
            remote_trunk(base, kit),
            guard,
            examples=examples,
            collator=data.collator,
            dtype=dtype,
            device=settings.device,
            told=told,
        )
        log.write("pass", rows=rows, of=folder, seconds=told.seconds)
    sent, received = as_size(session.bytes_sent), as_size(session.bytes_received)
    say(f"every row has been sent once: {sent} sent, {received} received")


class _Told:
    """A line every few seconds: how far the pass is, how fast, and how long it will take."""

    def __init__(self, folder: str) -> None:
        self.folder, self.seconds, self._next = folder, 0.0, 2.0

    def __call__(self, done: int, total: int, seconds: float) -> None:
        self.seconds = seconds
        if seconds >= self._next and done < total:
            self._next = seconds + 5
            left = as_duration(seconds / done * (total - done))
            say(f"{self.folder}: batch {done}/{total}, {done / seconds:.1f} batches/s, about {left} left")


class NoLink:
    """The road to a trunk that nobody needs any more."""

    def forward(self, request: object) -> tuple[torch.Tensor, int]:
        """Nobody asks."""
        raise UsageError("The trunk was asked for, but this run works with kept replies.")

    def backward(self, step: int, gradient: object) -> torch.Tensor:
        """Nobody asks."""
        raise UsageError("The trunk was asked for, but this run works with kept replies.")

    def release(self, *, caches: tuple[int, ...] = (), steps: tuple[int, ...] = ()) -> None:
        """Nothing is held anywhere."""
