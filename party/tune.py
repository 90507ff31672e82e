"""Step 0 of the journey: `splitfl tune`. Rows, model, session, training, figures; read from top to bottom."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainingArguments

from party.connect import open_session
from party.evaluate import Score, evaluate
from party.model import check_device, open_model, resolve_dtype
from party.progress import TrainingProgress
from party.rundir import RunDirectory
from party.session import Session
from party.trainer import SplitTrainer, StopRequest
from splitfl.adapters import add_lora, lora_config, save_adapter
from splitfl.config import TuneSettings
from splitfl.data import Collator, Examples, load_rows, tokenise
from splitfl.errors import INTERRUPTED_EXIT_CODE, UsageError
from splitfl.kit import Kit, open_kit
from splitfl.load import parameter_count
from splitfl.metrics import Result, RunLog, peak_rss_bytes, write_results
from splitfl.report import as_size, write_report
from splitfl.rows import FormName

_LONGEST_WITHOUT_LIMIT = 2048  # for models whose positions have no table; --max-length sets another


def say(text: str) -> None:
    """A line for the person at the terminal; stdout is left to figures."""
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True, kw_only=True)
class Data:
    """The tokenised rows of a run."""

    train: Examples
    held_out: Examples | None
    collator: Collator
    form: FormName
    """Of the training rows; prompts are rendered the same way later."""


def tune(settings: TuneSettings) -> int:
    """Train an adapter with the owner's trunk in the middle; returns the exit code."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    check_device(settings.device)
    kit = open_kit(settings.kit)
    run = RunDirectory(settings.out)
    run.check(resume=settings.resume)
    checkpoint = run.latest_checkpoint(kit.plan) if settings.resume else None
    data = read_data(settings, kit)
    say(f"train: {data.train.counts}")
    with contextlib.closing(connect(settings, kit)) as session:
        model = _tunable_model(settings, kit, session)
        run.prepare(settings)
        run.drop_unfinished()
        with RunLog(run.log) as log:
            return _train(settings, kit, run, data, session, model, log, checkpoint)


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
    options: dict[str, Any] = {
        "max_length": settings.max_length or limit or _LONGEST_WITHOUT_LIMIT,
        "answer_only": settings.answer_only,
        "truncation": settings.truncation,
    }
    label2id = dict(kit.config.label2id or {}) if kit.plan.task == "sequence-classification" else None
    rows = load_rows(settings.train, columns=columns, task=kit.plan.task, label2id=label2id)
    train = tokenise(rows, tokenizer, **options)
    held_out = None
    if settings.eval is not None:
        held_rows = load_rows(settings.eval, columns=columns, task=kit.plan.task, label2id=rows.label2id or label2id)
        held_out = tokenise(held_rows, tokenizer, **options)
    collator = Collator(tokenizer, padding_side=settings.padding_side, pad_token_id=kit.config.pad_token_id)
    return Data(train=train, held_out=held_out, collator=collator, form=rows.form)


def connect(settings: TuneSettings, kit: Kit) -> Session:
    """Open the session that the settings describe."""
    compute = resolve_dtype(kit, settings.dtype)
    session = open_session(
        kit.plan,
        settings.owner,
        owner_key=settings.owner_key,
        key=settings.key,
        insecure_loopback=settings.insecure_loopback,
        protocol=settings.protocol,
        wire_dtype=compute if settings.wire_dtype == "auto" else settings.wire_dtype,
        memory=settings.memory,
        timeout_s=settings.timeout,
    )
    say(f"session open with {settings.owner}; protocol {settings.protocol}, {session.terms.wire_dtype} on the wire")
    return session


def _train(
    settings: TuneSettings, kit: Kit, run: RunDirectory, data: Data, session: Session, model: PeftModel, log: RunLog,
    checkpoint: Path | None,
) -> int:  # fmt: skip
    started = time.monotonic()
    progress, stop = TrainingProgress(session, log), StopRequest()

    def note_eval(step: int, score: Score, when: str = "during") -> None:
        log.write("eval", step=step, when=when, tokens=score.counted, **score.facts())

    trainer = SplitTrainer(
        model=model,
        args=_training_arguments(settings, run),
        train_dataset=data.train,
        callbacks=[progress, stop],
        run=run,
        plan=kit.plan,
        collator=data.collator,
        held_out=data.held_out,
        on_eval=note_eval,
    )
    progress.trainer = trainer
    log.write("start", **_start_facts(settings, kit, data, session, model, resumed_from=checkpoint and checkpoint.name))
    before = None
    if data.held_out is not None and checkpoint is None:
        before = _score(settings, kit, data, model)
        note_eval(0, before, "before")
        say(f"held out, before: {_in_words(before)}")
    try:
        with stop.watching():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        progress.stop()
    step = trainer.state.global_step
    if stop.asked and step < trainer.state.max_steps:
        say(f"Stopped at step {step} of {trainer.state.max_steps}. The checkpoint is kept; continue with --resume.")
        return INTERRUPTED_EXIT_CODE
    save_adapter(model, run.adapter, base_name=str(kit.config.name_or_path or kit.plan.model_type))
    after = None
    if data.held_out is not None:
        after = _score(settings, kit, data, model)
        note_eval(step, after, "after")
        say(f"held out, after:  {_in_words(after)}")
    seconds = time.monotonic() - started
    log.write(
        "end",
        seconds=seconds,
        steps=step,
        peak_rss_bytes=peak_rss_bytes(),
        bytes_sent=session.bytes_sent,
        bytes_received=session.bytes_received,
    )
    _finish(settings, run, trainer, session, before, after, seconds)
    return 0


def _tunable_model(settings: TuneSettings, kit: Kit, session: Session) -> PeftModel:
    base = open_model(kit, session, dtype=settings.dtype, device=settings.device)
    lora = settings.lora_kwargs()
    targets = list(settings.target_modules) or None
    config = lora_config(base, kit.plan, **{**lora, "target_modules": targets})
    model = add_lora(base, config, seed=settings.seed)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(
        f"model: {kit.plan.model_type}, layers {kit.plan.party_layers} here, {len(kit.plan.trunk_layers)} with the "
        f"owner; {trainable:,} of {parameter_count(model):,} parameters held here are tuned"
    )
    return model


def _training_arguments(settings: TuneSettings, run: RunDirectory) -> TrainingArguments:
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
    return TrainingArguments(**{**fixed, **settings.training_kwargs()})


def _score(settings: TuneSettings, kit: Kit, data: Data, model: PeftModel) -> Score:
    assert data.held_out is not None  # noqa: S101
    return evaluate(
        model,
        data.held_out,
        data.collator,
        task=kit.plan.task,
        batch_size=settings.per_device_eval_batch_size,
        device=settings.device,
    )


def _start_facts(
    settings: TuneSettings, kit: Kit, data: Data, session: Session, model: PeftModel, **more: Any
) -> dict[str, Any]:
    return {
        "role": "data holder",
        "protocol": settings.protocol,
        "architecture": kit.plan.model_type,
        "task": kit.plan.task,
        "bottom": kit.plan.bottom,
        "top": kit.plan.top,
        "layers": kit.plan.layers,
        "fingerprint": kit.plan.trunk,
        "dtype": resolve_dtype(kit, settings.dtype),
        "wire_dtype": session.terms.wire_dtype,
        "memory": settings.memory,
        "form": data.form,
        "train_rows": data.train.counts.rows,
        "train_tokens": data.train.counts.tokens,
        "eval_rows": data.held_out.counts.rows if data.held_out is not None else None,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        **more,
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
    settings: TuneSettings, run: RunDirectory, trainer: SplitTrainer, session: Session, before: Score | None,
    after: Score | None, seconds: float,
) -> None:  # fmt: skip
    """Figures, the report, and where things are."""
    sent, received = as_size(session.bytes_sent), as_size(session.bytes_received)
    say(f"{trainer.state.global_step} steps in {seconds:.0f} s; {sent} sent, {received} received")
    if settings.json is not None:
        write_results(settings.json, "tune", settings, _results(trainer, session, before, after, seconds))
    try:
        say(f"report: {write_report(run.path)}")
    except UsageError as error:  # the extra is not installed; the run is complete without a page
        say(str(error))
    say(f"adapter: {run.adapter}")


def _results(
    trainer: SplitTrainer, session: Session, before: Score | None, after: Score | None, seconds: float
) -> list[Result]:
    def one(metric: str, value: float, unit: str, reference: float | None = None) -> Result:
        return Result(case="tune", metric=metric, value=value, unit=unit, reference=reference)

    results = [
        one("steps", trainer.state.global_step, "steps"),
        one("seconds", seconds, "s"),
        one("tokens trained on", trainer.tokens_seen, "tokens"),
        one("bytes sent", session.bytes_sent, "bytes"),
        one("bytes received", session.bytes_received, "bytes"),
        one("peak memory", peak_rss_bytes(), "bytes"),
    ]
    for name, unit in (("loss", "nats"), ("perplexity", ""), ("accuracy", "share"), ("macro_f1", "")):
        value = getattr(after, name, None)
        if value is not None:
            results.append(one(f"held-out {name}", value, unit, getattr(before, name, None)))
    return results
