"""`splitfl evaluate` and `splitfl generate`: use a run's tuned model through the split."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer, set_seed

from party.bookkeeping import DataSet, run_name
from party.drafting import OWN_EMULATOR, counting, drafting, open_draft
from party.evaluate import evaluate
from party.model import open_model
from party.offline import WITH_EMULATOR, emulated_model, find_emulator, untracked
from party.opening import connect, data_set, guarded, open_book, prepare, say
from party.protect import BatchRows, Guard, RowTracker, numbered
from party.rundir import RunDirectory
from party.session import Session
from party.whole import whole_model
from protocols import protocol_named
from splitfl.adapter_check import Adapter, check_adapter, plug_in
from splitfl.adapters import open_adapter
from splitfl.config import EvaluateSettings, GenerateSettings, TuneSettings
from splitfl.config_drafting import DRAFT_TOKENS
from splitfl.config_offsite import LARGEST_CHANGE
from splitfl.data import Collator, encode_prompt, load_rows, tokenise
from splitfl.errors import DataError, UsageError
from splitfl.kit import Kit, open_kit
from splitfl.load import quiet_library
from splitfl.metrics import Result, write_results
from splitfl.rows import Row, fingerprint


@dataclasses.dataclass(frozen=True, kw_only=True)
class TunedModel:
    """A run's model, connected; or, after an offline run, with the emulator in the trunk's place."""

    run: TuneSettings
    kit: Kit
    session: Session | None
    guard: Guard | None
    model: Any
    tokenizer: PreTrainedTokenizerBase
    draft: PreTrainedModel | None = None
    """Guesses tokens for a generation, if it was asked for."""


@contextlib.contextmanager
def open_run(settings: EvaluateSettings | GenerateSettings, *, adapter: bool = True) -> Iterator[TunedModel]:
    """Open the kit, the session and the adapter that a run remembers; options given now override what it remembers."""
    run = RunDirectory(settings.run)
    overrides = {
        name: getattr(settings, name)
        for name in ("kit", "emulator", "owner", "owner_key", "key", "timeout", "device", "threads")
        if getattr(settings, name) is not None
    }
    if isinstance(settings, GenerateSettings) and settings.draft is not None:
        overrides.pop("emulator", None)  # it guesses, beside the owner's trunk
    tuned = dataclasses.replace(run.settings(), **overrides)
    if tuned.threads:
        torch.set_num_threads(tuned.threads)
    kit = open_kit(tuned.kit)
    _check_draft(settings, tuned)
    given = _given_adapter(settings, kit)  # what does not fit is refused before anybody is spoken to

    def adapted(model: PreTrainedModel) -> Any:
        if not adapter:
            return model
        return open_adapter(model, run.adapter).eval() if given is None else plug_in(model, given, kit.plan)

    if protocol_named(tuned.protocol).offline:
        say(f"{WITH_EMULATOR}, not with the owner's model: what the adapter does there, the owner finds out")
        emulated = emulated_model(tuned, kit, find_emulator(tuned, kit))
        emulated.config.use_cache = True
        yield TunedModel(
            run=tuned, kit=kit, session=None, guard=None, model=adapted(emulated), tokenizer=kit.tokenizer()
        )
        return
    if protocol_named(tuned.protocol).whole:
        assert tuned.model is not None  # noqa: S101  such a run has one
        whole = whole_model(tuned, kit, Path(tuned.model)).eval()
        whole.config.use_cache = kit.plan.task == "causal-lm"
        yield TunedModel(run=tuned, kit=kit, session=None, guard=None, model=adapted(whole), tokenizer=kit.tokenizer())
        return
    preparation = prepare(tuned, kit, tuned.max_length or kit.plan.max_length or 2048)
    with contextlib.closing(connect(tuned, kit, preparation.protection)) as session:
        guard = guarded(tuned, session, preparation.protection, None)
        base = open_model(kit, guard, dtype=tuned.dtype, device=tuned.device)
        draft = _draft(settings, tuned, kit, base, adapted)
        model = adapted(base)
        yield TunedModel(
            run=tuned, kit=kit, session=session, guard=guard, model=model, tokenizer=kit.tokenizer(), draft=draft
        )


def _check_draft(settings: EvaluateSettings | GenerateSettings, run: TuneSettings) -> None:
    if not isinstance(settings, GenerateSettings) or settings.draft is None:
        return
    protocol = protocol_named(run.protocol)
    if protocol.offline or protocol.whole:
        raise UsageError(
            f"--draft saves round trips to an owner, and a run of {run.protocol} generates without one.",
            hint="leave it out",
        )


def _draft(
    settings: EvaluateSettings | GenerateSettings, run: TuneSettings, kit: Kit, base: PreTrainedModel,
    adapted: Callable[[PreTrainedModel], Any],
) -> PreTrainedModel | None:  # fmt: skip
    """What guesses tokens, with the run's adapter if it has the layers for one."""
    if not isinstance(settings, GenerateSettings) or settings.draft is None:
        return None
    draft = open_draft(
        settings.draft,
        run,
        kit,
        base,
        directory=settings.draft_model,
        emulator=settings.emulator or settings.run / OWN_EMULATOR,
    )
    if settings.draft == "model":
        return draft
    tuned: PreTrainedModel = adapted(draft).get_base_model()
    return tuned


def _given_adapter(settings: EvaluateSettings | GenerateSettings, kit: Kit) -> Adapter | None:
    """The adapter that was named, checked as an owner checks one; None if it is to be the run's own."""
    if settings.adapter is None:
        return None
    checked = check_adapter(settings.adapter, kit, max_norm=settings.max_norm or LARGEST_CHANGE)
    change = checked.change
    say(
        f"adapter {checked.name}: rank {checked.config.r}, digest {checked.digest}; it changes weights by "
        f"{change.total:.3g} times their norm together, {change.where} most, by {change.largest:.3g} times"
    )
    return checked


@contextlib.contextmanager
def booked(opened: TunedModel, data: DataSet, *, pieces: int | None = None) -> Iterator[RowTracker]:
    """Book what is sent of these rows.

    Args:
        opened: the model.
        data: the rows.
        pieces: book so many sends of the one row there is at once, before the first: for a generation, which sends a
            position at a time. None books each send by itself.
    """
    if opened.guard is None:  # nothing is sent
        yield untracked(data)
        return
    name = run_name(opened.run.out, resumed=True)
    with open_book(opened.run, name, {data.fingerprint: data}) as book:
        protection = opened.guard.protection
        if pieces is None:
            opened.guard.book = book
        else:
            rows = BatchRows(dataset=data.fingerprint, rows=(0,))
            book.charge("activations", protection.hidden, rows, formal=protection.formal, pieces=pieces)
        try:
            yield RowTracker(opened.guard, train=data.fingerprint)
        finally:
            opened.guard.book = None


def evaluate_run(settings: EvaluateSettings) -> None:
    """Measure a run's model on rows and print the figures."""
    with open_run(settings, adapter=settings.split == "tuned") as opened:
        kit, run = opened.kit, opened.run
        columns = settings.column_map() or run.column_map()
        label2id = dict(kit.config.label2id or {}) if kit.plan.task == "sequence-classification" else None
        rows = load_rows(
            settings.eval,
            columns=columns,
            task=kit.plan.task,
            label2id=label2id,
            person_column=run.person_column,
        )
        longest = settings.max_length or run.max_length or kit.plan.max_length or 2048
        examples = tokenise(
            rows,
            opened.tokenizer,
            max_length=longest,
            answer_only=run.answer_only,
            truncation=settings.truncation or run.truncation,
        )
        started = time.monotonic()
        with (
            booked(opened, data_set(rows, examples, settings.eval)) as tracker,
            Progress(disable=not sys.stderr.isatty(), transient=True) as bar,
        ):
            task = bar.add_task("evaluate", total=len(examples))
            score = evaluate(
                opened.model,
                numbered(examples),
                _collator(opened, longest),
                task=kit.plan.task,
                batch_size=settings.per_device_eval_batch_size,
                device=run.device,
                progress=lambda done: bar.update(task, completed=done),
                on_batch=tracker.scoring,
            )
        seconds = time.monotonic() - started
    case = "with --adapter" if settings.adapter is not None else str(settings.split)
    case = f"{case} {WITH_EMULATOR}" if protocol_named(run.protocol).offline else case
    units = {"loss": "nats", "counted": "tokens" if kit.plan.task == "causal-lm" else "rows", "accuracy": "share"}
    results = [
        Result(case=case, metric=name, value=value, unit=units.get(name, "")) for name, value in score.facts().items()
    ]
    results.append(Result(case=case, metric="seconds", value=seconds, unit="s"))
    for result in results:
        print(f"{result.metric:12} {result.value:.4f} {result.unit}".rstrip())
    if settings.json is not None:
        write_results(settings.json, "evaluate", settings, results)


def _collator(opened: TunedModel, longest: int) -> Collator:
    """Pads as the run did: to one length for all, if lengths were to be hidden."""
    return Collator(
        opened.tokenizer,
        padding_side=opened.run.padding_side,
        pad_token_id=opened.kit.config.pad_token_id,
        pad_to_multiple_of=longest if opened.run.hide_lengths else None,
    )


def _check_room(prompt: int, settings: GenerateSettings, limit: int | None) -> None:
    """Whether a prompt of so many tokens and what is asked for fit the model's positions."""
    if limit and prompt + settings.max_new_tokens > limit:
        raise UsageError(
            f"The prompt has {prompt} tokens; with --max-new-tokens {settings.max_new_tokens} that is beyond the "
            f"model's {limit} positions.",
            hint="shorten the prompt or lower --max-new-tokens",
        )


def generate_from_run(settings: GenerateSettings) -> None:
    """Continue a prompt with a run's model; the text goes to stdout."""
    prompt = _prompt(settings)
    with open_run(settings) as opened:
        if opened.kit.plan.task != "causal-lm":
            raise UsageError("This run tuned a classifier, which generates nothing.", hint="use `splitfl evaluate`")
        tokenizer = opened.tokenizer
        if settings.chat:
            ids = encode_prompt(tokenizer, prompt, form=RunDirectory(settings.run).form())
        else:
            ids = tokenizer(prompt)["input_ids"]
            if ids and ids[-1] == tokenizer.eos_token_id:  # some tokenizers end every text
                ids = ids[:-1]
        if not ids:
            raise UsageError("The prompt holds no token.", expected="some text")
        _check_room(len(ids), settings, opened.kit.plan.max_length)
        streams = settings.stream and settings.num_beams == 1 and sys.stdout.isatty()
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if streams else None
        set_seed(settings.seed)
        started = time.monotonic()
        asked = DataSet(fingerprint=fingerprint([Row(line=1, text=prompt)]), label="a prompt", units=["0"], unit="row")
        with (
            booked(opened, asked, pieces=_sends(settings, len(ids))),
            counting(opened.model) as passes,
            _hushed(opened.draft),
            torch.no_grad(),
        ):
            output = opened.model.generate(
                input_ids=torch.tensor([ids], device=opened.run.device),
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64, device=opened.run.device),
                streamer=streamer,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                **_sampling(settings),
                **({} if opened.draft is None else drafting(opened.draft, settings.draft_tokens or DRAFT_TOKENS)),
            )
        seconds = time.monotonic() - started
    new = output[0, len(ids) :].tolist()
    text = tokenizer.decode(new, skip_special_tokens=True)
    if streamer is None:
        print(text)
    if settings.json is not None:
        figures: dict[str, tuple[float | str, str]] = {
            "text": (text, ""),
            "prompt tokens": (len(ids), "tokens"),
            "new tokens": (len(new), "tokens"),
            "rate": (len(new) / seconds, "tokens/s"),
            "round trips": (passes.passes, "requests"),
            "positions sent": (passes.positions, "positions"),
        }
        if opened.draft is not None:
            figures["guesses sent"] = (passes.guessed(len(ids)), "tokens")
            figures["guesses kept"] = (passes.gained(len(new)), "tokens")
        results = [
            Result(case="generate", metric=name, value=value, unit=unit) for name, (value, unit) in figures.items()
        ]
        write_results(settings.json, "generate", settings, results)


def _sends(settings: GenerateSettings, prompt: int) -> int:
    """How often the text goes up at most: once for each beam, each of which goes on for itself; guesses save some."""
    pieces = 1 if settings.prefill_chunk is None else math.ceil(prompt / settings.prefill_chunk)
    return (pieces + settings.max_new_tokens - 1) * settings.num_beams


def _hushed(draft: PreTrainedModel | None) -> contextlib.AbstractContextManager[None]:
    """The library warns of arguments that it gives a draft model itself."""
    return contextlib.nullcontext() if draft is None else quiet_library()


def _prompt(settings: GenerateSettings) -> str:
    if settings.prompt is not None:
        return settings.prompt
    path = Path(settings.prompt_file or "")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The prompt file {path} cannot be read as UTF-8 text.") from error


def _sampling(settings: GenerateSettings) -> dict[str, Any]:
    options: dict[str, Any] = {
        "max_new_tokens": settings.max_new_tokens,
        "do_sample": settings.do_sample,
        "num_beams": settings.num_beams,
        "repetition_penalty": settings.repetition_penalty,
    }
    for name in ("temperature", "top_k", "top_p"):
        if getattr(settings, name) is not None:
            options[name] = getattr(settings, name)
    if settings.prefill_chunk is not None:
        options["prefill_chunk_size"] = settings.prefill_chunk
    return options
