"""Step 0 of the journey: `splitfl tune`. Rows, model, session, training, figures; read from top to bottom."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainingArguments

from party.bookkeeping import DataSet, run_name
from party.dp_lora import with_preset
from party.evaluate import Score, evaluate
from party.fetch import since_fetch
from party.model import check_device, resolve_dtype
from party.offline import plan_offline
from party.opening import Preparation, data_set, open_book, prepare, say
from party.progress import TrainingProgress
from party.protect import numbered
from party.recording import recording_of
from party.rundir import RunDirectory
from party.trainer import SplitTrainer
from party.workplace import Workplace, open_workplace
from protocols import protocol_named
from splitfl.adapters import save_adapter
from splitfl.config import TuneSettings
from splitfl.data import Collator, Examples, load_rows, tokenise
from splitfl.errors import INTERRUPTED_EXIT_CODE, UsageError
from splitfl.interrupts import StopRequest
from splitfl.kit import Kit, open_kit
from splitfl.metrics import Result, peak_rss_bytes, write_results
from splitfl.report import as_size, write_report
from splitfl.rows import FormName

_LONGEST_WITHOUT_LIMIT = 2048  # for models whose positions have no table; --max-length sets another


@dataclass(frozen=True, kw_only=True)
class Data:
    """The tokenised rows of a run."""

    train: Examples
    held_out: Examples | None
    collator: Collator
    form: FormName
    """Of the training rows; prompts are rendered the same way later."""
    train_set: DataSet
    held_out_set: DataSet | None

    @property
    def sets(self) -> dict[str, DataSet]:
        """What the ledger must know of both files."""
        return {s.fingerprint: s for s in (self.train_set, self.held_out_set) if s is not None}


def tune(settings: TuneSettings) -> int:
    """Train an adapter with the owner's trunk in the middle; returns the exit code."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    check_device(settings.device)
    kit = open_kit(settings.kit)
    settings = with_preset(since_fetch(settings))
    run = RunDirectory(settings.out)
    run.check(resume=settings.resume)
    checkpoint = run.latest_checkpoint(kit.plan) if settings.resume else None
    data = read_data(settings, kit)
    say(f"train: {data.train.counts}")
    longest = max(len(example["input_ids"]) for example in data.train)
    preparation: Preparation
    if protocol_named(settings.protocol).whole:
        from party.whole import plan_whole  # it stands on what this file needs

        preparation = plan_whole(settings, kit, data.train_set)
    elif protocol_named(settings.protocol).offline:
        preparation = plan_offline(settings, kit, data.train_set)
    else:
        preparation = prepare(settings, kit, longest, len(data.train))
    preparation.show()
    book = open_book(settings, run_name(run.path, resumed=settings.resume), data.sets)
    with (
        book,
        recording_of(settings, kit, run, data, preparation) as recorder,
        open_workplace(settings, kit, run, data, preparation, book, recorder) as place,
    ):
        if settings.label_epsilon is not None:
            book.charge_labels(data.train_set.fingerprint, settings.label_epsilon)
            randomise_classes(settings, kit, run, data)
        if settings.federate is not None:
            from party.federated import tune_in_rounds  # it stands on this file
            from party.federated_kd import distil_in_rounds

            if preparation.protocol.distils:
                return distil_in_rounds(settings, kit, run, data, preparation, place, book)
            return tune_in_rounds(settings, kit, run, data, preparation, place, book)
        return _train(settings, kit, run, data, preparation, place, checkpoint)


def read_data(settings: TuneSettings, kit: Kit) -> Data:
    """Rows to token ids, before anything is sent anywhere.

    Raises:
        DataError: the first bad row, by file and line.
        UsageError: a length that the model does not have.
    """
    limit = kit.plan.max_length
    if settings.max_length and limit and settings.max_length > limit:
        raise UsageError(
            f"--max-length is {settings.max_length}, but the model's positions end at {limit}.",
            expected=f"at most {limit}",
        )
    tokenizer = kit.tokenizer()
    columns = settings.column_map()
    options = reading_options(settings, kit)
    label2id = dict(kit.config.label2id or {}) if kit.plan.task == "sequence-classification" else None
    person = settings.person_column
    rows = load_rows(settings.train, columns=columns, task=kit.plan.task, label2id=label2id, person_column=person)
    train = tokenise(rows, tokenizer, **options)
    held_out, held_out_set = None, None
    if settings.eval is not None:
        numbers = rows.label2id or label2id
        held_rows = load_rows(
            settings.eval, columns=columns, task=kit.plan.task, label2id=numbers, person_column=person
        )
        held_out = tokenise(held_rows, tokenizer, **options)
        held_out_set = data_set(held_rows, held_out, settings.eval)
    collator = Collator(
        tokenizer,
        padding_side=settings.padding_side,
        pad_token_id=kit.config.pad_token_id,
        pad_to_multiple_of=options["max_length"] if settings.hide_lengths else None,
    )
    return Data(
        train=train,
        held_out=held_out,
        collator=collator,
        form=rows.form,
        train_set=data_set(rows, train, settings.train),
        held_out_set=held_out_set,
    )


def reading_options(settings: TuneSettings, kit: Kit) -> dict[str, Any]:
    """How rows become tokens in this run: keyword arguments for `tokenise`."""
    return {
        "max_length": settings.max_length or kit.plan.max_length or _LONGEST_WITHOUT_LIMIT,
        "answer_only": settings.answer_only,
        "truncation": settings.truncation,
    }


def randomise_classes(settings: TuneSettings, kit: Kit, run: RunDirectory, data: Data) -> None:
    """Randomised response on the training labels, in place; drawn once a run and the same after a resume."""
    assert settings.label_epsilon is not None  # noqa: S101
    classes = int(kit.config.num_labels)
    labels = run.randomised_labels(
        torch.tensor([example["labels"] for example in data.train]), classes, settings.label_epsilon
    )
    for example, label in zip(data.train, labels.tolist(), strict=True):
        example["labels"] = label


def _train(
    settings: TuneSettings, kit: Kit, run: RunDirectory, data: Data, preparation: Preparation, place: Workplace,
    checkpoint: Path | None,
) -> int:  # fmt: skip
    started = time.monotonic()
    log, model, stop = place.log, place.model, StopRequest()
    progress = TrainingProgress(place.traffic, log)

    def note_eval(step: int, score: Score, when: str = "during") -> None:
        log.write("eval", step=step, when=when, tokens=score.counted, **score.facts())

    trainer = place.trainer(
        model=model,
        args=_training_arguments(settings, run, place.arguments),
        train_dataset=numbered(data.train),
        callbacks=[progress, stop, *(place.recorder.callbacks if place.recorder is not None else ())],
        run=run,
        plan=kit.plan,
        collator=data.collator,
        held_out=None if data.held_out is None else numbered(data.held_out),
        on_eval=note_eval,
        tracker=place.tracker,
        extra_loss=place.extra_loss,
    )
    progress.trainer = trainer
    facts = _start_facts(settings, kit, data, preparation, model)
    log.write("start", **facts, resumed_from=checkpoint and checkpoint.name)
    before = None
    if data.held_out is not None and checkpoint is None:
        before = _score(settings, kit, data, place)
        note_eval(0, before, "before")
        say(f"held out, before: {_in_words(before)}{place.measured}")
    try:
        with stop.watching():
            trainer.go_on(checkpoint)
    finally:
        progress.stop()
    step = trainer.state.global_step
    if stop.asked and step < trainer.state.max_steps:
        say(f"Stopped at step {step} of {trainer.state.max_steps}. The checkpoint is kept; continue with --resume.")
        return INTERRUPTED_EXIT_CODE
    if place.release is not None:
        place.release(model)
    save_adapter(model, run.adapter, base_name=str(kit.config.name_or_path or kit.plan.model_type))
    after = None
    if data.held_out is not None:
        # Every pass over held-out rows is a release of them: the same weights are not scored twice.
        scored = trainer.last_score
        after = scored[1] if scored is not None and scored[0] == step else _score(settings, kit, data, place)
        note_eval(step, after, "after")
        say(f"held out, after:  {_in_words(after)}{place.measured}")
    _tell_of_probes(place)
    seconds = time.monotonic() - started
    moved = {"bytes_sent": place.traffic.bytes_sent, "bytes_received": place.traffic.bytes_received}
    log.write("end", seconds=seconds, steps=step, peak_rss_bytes=peak_rss_bytes(), **moved)
    _finish(settings, run, trainer, place, before, after, seconds)
    return 0


def _tell_of_probes(place: Workplace) -> None:
    """What the checks of the owner found; no check at all is not told as a good one."""
    if place.probe is None:
        return
    facts = place.probe.evidence()
    place.log.write("owner checked", **facts)
    if facts["inconclusive"] > facts["consistent"]:
        say(f"owner: {facts['inconclusive']} of its gradients could not be judged, {facts['consistent']} were right")
    if facts["repeats_not_bitwise"]:
        say(f"owner: the same input gave other bits {facts['repeats_not_bitwise']} times, first at step "
            f"{facts['first_change_at']}")  # fmt: skip


def _training_arguments(
    settings: TuneSettings, run: RunDirectory, settled: Mapping[str, Any] | None = None
) -> TrainingArguments:
    evaluates = settings.eval is not None and settings.eval_steps is not None
    fixed = {
        "output_dir": str(run.checkpoints),
        "use_cpu": settings.device == "cpu",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "save_strategy": "steps",
        "eval_strategy": "steps" if evaluates else "no",
        "dataloader_pin_memory": settings.device != "cpu",
    }
    return TrainingArguments(**{**fixed, **settings.training_kwargs(), **(settled or {})})


def _score(settings: TuneSettings, kit: Kit, data: Data, place: Workplace) -> Score:
    assert data.held_out is not None  # noqa: S101
    return evaluate(
        place.model,
        numbered(data.held_out),
        data.collator,
        task=kit.plan.task,
        batch_size=settings.per_device_eval_batch_size,
        device=settings.device,
        on_batch=place.tracker.scoring,
    )


def _start_facts(
    settings: TuneSettings, kit: Kit, data: Data, preparation: Preparation, model: PeftModel
) -> dict[str, Any]:
    compute, protection = resolve_dtype(kit, settings.dtype), preparation.protection
    return {
        "role": "data holder",
        "protocol": settings.protocol,
        "architecture": kit.plan.model_type,
        "task": kit.plan.task,
        "bottom": kit.plan.bottom,
        "top": kit.plan.top,
        "layers": kit.plan.layers,
        "fingerprint": kit.plan.trunk,
        "dtype": compute,
        "wire_dtype": compute if settings.wire_dtype == "auto" else settings.wire_dtype,
        "hidden_coding": protection.hidden_coding,
        "gradient_coding": protection.gradient_coding,
        "trains_bottom": protection.trains_bottom,
        "sends_gradients": preparation.protocol.sends_gradients,
        "mechanism": "none" if protection.hidden is None else protection.hidden.name,
        "claim": preparation.claim.sentence(),
        "memory": settings.memory,
        "form": data.form,
        "train_rows": data.train.counts.rows,
        "train_tokens": data.train.counts.tokens,
        "eval_rows": data.held_out.counts.rows if data.held_out is not None else None,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def _in_words(score: Score) -> str:
    parts = [f"loss {score.loss:.4f}"]
    if score.perplexity is not None:
        parts.append(f"perplexity {score.perplexity:.2f}")
    parts.append(f"accuracy {score.accuracy:.3f}")
    if score.macro_f1 is not None:
        parts.append(f"macro F1 {score.macro_f1:.3f}")
    return ", ".join(parts)


def _finish(
    settings: TuneSettings, run: RunDirectory, trainer: SplitTrainer, place: Workplace, before: Score | None,
    after: Score | None, seconds: float,
) -> None:  # fmt: skip
    """Figures, the report, and where things are."""
    sent, received = as_size(place.traffic.bytes_sent), as_size(place.traffic.bytes_received)
    say(f"{trainer.state.global_step} steps in {seconds:.0f} s; {sent} sent, {received} received")
    if settings.json is not None:
        write_results(settings.json, "tune", settings, _results(trainer, place, before, after, seconds))
    try:
        say(f"report: {write_report(run.path)}")
    except UsageError as error:  # the extra is not installed; the run is complete without a page
        say(str(error))
    say(f"adapter: {run.adapter}")


def _results(
    trainer: SplitTrainer, place: Workplace, before: Score | None, after: Score | None, seconds: float
) -> list[Result]:
    def one(metric: str, value: float, unit: str, reference: float | None = None) -> Result:
        return Result(case="tune", metric=metric, value=value, unit=unit, reference=reference)

    results = [
        one("steps", trainer.state.global_step, "steps"),
        one("seconds", seconds, "s"),
        one("tokens trained on", trainer.tokens_seen, "tokens"),
        one("bytes sent", place.traffic.bytes_sent, "bytes"),
        one("bytes received", place.traffic.bytes_received, "bytes"),
        one("peak memory", peak_rss_bytes(), "bytes"),
    ]
    for name, unit in (("loss", "nats"), ("perplexity", ""), ("accuracy", "share"), ("macro_f1", "")):
        value = getattr(after, name, None)
        if value is not None:
            results.append(one(f"held-out {name}{place.measured}", value, unit, getattr(before, name, None)))
    return results
