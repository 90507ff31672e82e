"""`splitfl margin`: how much better the model is than the emulator, and what is left once a holder trains that one on.

Read from top to bottom. In OUT stand report.md and margin.svg, points.json (one entry a copy that is done),
settings.json (what a resumed measurement must have in common with the one it resumes) and, while a copy is trained, its
folder.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from model_owner.distil import DistilOptions, train_learner
from model_owner.margin_copy import Copy, Holder, RowScores, choose_queries, copies, distance, grown, score_rows
from model_owner.margin_report import Point, margin_of, print_points, results, verdict, write_page
from model_owner.plugin import check_device, kit_of, load_full
from model_owner.student import Pair
from splitfl.adapter_check import Adapter, check_adapter, plug_in
from splitfl.config_offsite import MarginSettings
from splitfl.cut import module_at
from splitfl.data import Collator, Example, fingerprint, load_rows, tokenise
from splitfl.emulator import Emulator, check_belongs, check_out, open_emulator
from splitfl.errors import INTERRUPTED_EXIT_CODE, DataError, ModelError, UsageError
from splitfl.files import replace_text
from splitfl.kit import Kit
from splitfl.metrics import write_results

_HELD_OUT_EVERY, _KEPT_BACK_EVERY = 5, 10  # one row in so many, where nothing else is given
_WITHOUT_LIMIT = 2048  # tokens of a row, where the model's positions have no end
_FEW = 30  # held-out rows whose interval is wide whatever it is about


def measure_margin(settings: MarginSettings) -> int:
    """Measure what the settings say, print it and write the report; returns the exit code.

    Raises:
        ModelError: kit, emulator or adapter do not belong to the model, one of them computes no finite number, or
            `out` holds something else.
        UsageError: a measurement in the way or none to resume, other settings than it had, fewer queries than a row.
        DataError: rows that cannot be read, or too few.
        ResourceError: a device that this machine lacks.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    check_device(settings.device)
    record = _Record(settings.out)
    record.check(resume=settings.resume)
    kit = kit_of(Path(settings.model), settings.kit)
    emulator = open_emulator(settings.emulator)
    check_belongs(emulator.plan, kit)
    adapter = None if settings.adapter is None else check_adapter(settings.adapter, kit, max_norm=settings.max_norm)
    data = _read(settings, kit)
    budgets = sorted({min(one, data.holder.tokens) for one in settings.queries})
    for budget in budgets:
        choose_queries(data.holder, budget, settings.seed)  # refuses one that is too small, before any work
    _say("measuring the model and the emulator as it was handed out")
    measuring = _Measuring(settings, kit, data, _pair(settings, kit, emulator, adapter), emulator.plan.kept)
    first = measuring.handed_out()  # before anything is written: what computes no numbers leaves nothing
    made_of = {"plan": kit.plan.digest, "emulator": emulator.plan.files, "adapter": adapter and adapter.digest}
    record.begin(settings, data, made_of)
    if record.point(None) is None:
        record.add(first)
    return _measure(measuring, first, record, budgets)


def _measure(measuring: _Measuring, first: Point, record: _Record, budgets: Sequence[int]) -> int:
    points, seconds = [first], list[float]()
    for number, asked in enumerate((0, *budgets)):
        started, point = time.monotonic(), record.point(asked)
        if point is None:
            copies_left = len(budgets) + 1 - number
            about = f"; about {copies_left * sum(seconds) / len(seconds):.0f} s left for all" if seconds else ""
            _say(f"copy {number + 1} of {len(budgets) + 1}, up to {asked:,} tokens queried{about}")
            point = measuring.trained(asked, record.folder_of(asked))
            if point is None:
                _say("Stopped. What was done is kept; continue with --resume.")
                return INTERRUPTED_EXIT_CODE
            record.add(point)
            seconds.append(time.monotonic() - started)
        points.append(point)
    _tell(measuring, points)
    return 0


def _tell(measuring: _Measuring, points: Sequence[Point]) -> None:
    """Print the points and what they come to, and write it down."""
    settings, full = measuring.settings, measuring.full
    found, notes = verdict(points, settings.gone_at), _notes(measuring, points)
    classifies = measuring.kit.plan.task == "sequence-classification"
    print_points(points, full, found, notes, classifies=classifies)
    try:
        write_page(settings.out, points, full, found, notes, classifies=classifies)
    except UsageError as error:  # the extra is not installed; the page is complete without a drawing
        print(error, file=sys.stderr)
    print(f"written  {settings.out / 'report.md'}")
    if settings.json is not None:
        write_results(settings.json, "margin", settings, results(points, full, found, classifies=classifies))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---- what is read


@dataclass(frozen=True, kw_only=True)
class _Data:
    """Rows as token ids."""

    holder: Holder
    held_out: list[Example]
    collator: Collator
    prints: dict[str, str]
    """Fingerprints of the files' rows."""


def _read(settings: MarginSettings, kit: Kit) -> _Data:
    """Rows to train on, to keep back and to hold out, in the kit's tokens."""
    limit = kit.plan.max_length
    if settings.max_length and limit and settings.max_length > limit:
        raise UsageError(
            f"--max-length is {settings.max_length}, but the model's positions end at {limit}.",
            expected=f"at most {limit}",
        )
    longest, tokenizer, prints = settings.max_length or limit or _WITHOUT_LIMIT, kit.tokenizer(), {}
    label2id = dict(kit.config.label2id or {}) if kit.plan.task == "sequence-classification" else None

    def read(path: Path, name: str) -> list[Example]:
        rows = load_rows(path, columns=settings.column_map(), task=kit.plan.task, label2id=label2id)
        prints[name] = fingerprint(rows)
        examples = tokenise(rows, tokenizer, max_length=longest, answer_only=settings.answer_only,
                            truncation=settings.truncation)  # fmt: skip
        _say(f"{path}: {examples.counts}")
        return list(examples)

    rows = read(settings.rows, "rows")
    if settings.eval is not None:
        held_out = read(settings.eval, "eval")
    else:
        rows, held_out = _parted(rows, _HELD_OUT_EVERY)
    rows, kept_back = _parted(rows, _KEPT_BACK_EVERY)
    if not rows or not kept_back or not held_out:
        raise DataError(
            f"{settings.rows} holds too few rows to train on some, choose with others and measure on the rest.",
            expected="at least four rows, better hundreds",
        )
    text = []
    if settings.text is not None:
        words = load_rows(settings.text, task="causal-lm")  # for an encoder too: its labels are not used
        prints["text"] = fingerprint(words)
        examples = tokenise(words, tokenizer, max_length=longest, answer_only=False, truncation="right")
        _say(f"{settings.text}: {examples.counts}")
        text = [_of_the_task(one, kit) for one in examples]
    collator = Collator(tokenizer, pad_token_id=kit.config.pad_token_id)
    return _Data(
        holder=Holder(rows=rows, kept_back=kept_back, text=text), held_out=held_out, collator=collator, prints=prints
    )


def _parted(rows: list[Example], every: int) -> tuple[list[Example], list[Example]]:
    """Most of the rows, and one in `every`; of few rows the last one."""
    chosen = set(range(every - 1, len(rows), every)) or {len(rows) - 1}
    return [row for i, row in enumerate(rows) if i not in chosen], [row for i, row in enumerate(rows) if i in chosen]


def _of_the_task(example: Example, kit: Kit) -> Example:
    """An example of text in the form that rows of the task have."""
    if kit.plan.task == "causal-lm":
        return example
    return {**example, "labels": 0}


# ---- the models


def _pair(settings: MarginSettings, kit: Kit, emulator: Emulator, adapter: Adapter | None) -> Pair:
    """The full model, with the adapter if there is one, and the emulator's layers as its student; in float32."""
    model, _ = load_full(Path(settings.model), kit)
    model.float()
    if adapter is not None:
        plug_in(model, adapter, kit.plan)  # changes `model` itself
    layers = module_at(emulator.load(kit, torch.float32).base_model, kit.plan.stack)
    pair = Pair(model.to(settings.device), kit.plan, {})
    pair.student = {index: layers[index].to(settings.device) for index in kit.plan.trunk_layers}
    return pair


class _Measuring:
    """The models, the rows, and what the full model is worth on them."""

    def __init__(self, settings: MarginSettings, kit: Kit, data: _Data, pair: Pair, kept: tuple[int, ...]) -> None:
        self.settings, self.kit, self.data, self.pair = settings, kit, data, pair
        self.emulator: dict[int, nn.Module] = pair.student
        self.kept = kept
        size = settings.batch_size
        self.full: RowScores = score_rows(pair.model, kit.plan.task, data.held_out, data.collator, size)
        _check_finite(self.full, "the full model")

    def handed_out(self) -> Point:
        """The emulator as it is."""
        self.pair.student = self.emulator
        return self._point(None)

    def trained(self, asked: int, folder: Path) -> Point | None:
        """A copy that was trained on with so many tokens of queries; None if somebody interrupted it."""
        settings, data = self.settings, self.data
        train, queried = choose_queries(data.holder, asked, settings.seed)
        self.pair.student = copies(self.emulator)
        trained = self.kept
        if settings.grow:
            self.pair.student = grown(self.pair, self.kept)
            trained = tuple(self.pair.full)
        options = DistilOptions(
            max_steps=settings.steps,
            learning_rate=settings.learning_rate,
            batch_size=settings.batch_size,
            eval_steps=settings.eval_steps,
            save_steps=settings.save_steps,
            logging_steps=settings.logging_steps,
            seed=settings.seed,
            device=settings.device,
        )
        learner = Copy(self.pair, trained)
        outcome = train_learner(learner, train, data.holder.kept_back, data.collator, folder, options, resume=True)
        if outcome.interrupted:
            return None
        if outcome.diverged is not None:
            _say(f"The training of this copy diverged and was stopped. {outcome.diverged} Its best state is used.")
        return self._point(
            asked, queried=queried, best_step=outcome.best_step, seconds=outcome.seconds, diverged=outcome.diverged
        )

    def _point(self, asked: int | None, **facts: Any) -> Point:
        pair, data, size = self.pair, self.data, self.settings.batch_size
        with pair.with_student() as model:
            scores = score_rows(model, self.kit.plan.task, data.held_out, data.collator, size)
        _check_finite(scores, "the emulator" if asked is None else f"the copy of {asked} queries")
        margin, low, high = margin_of(scores, self.full, self.settings.seed)
        return Point(
            asked=asked,
            loss=scores.loss,
            accuracy=scores.accuracy,
            distance=distance(pair, data.held_out, data.collator, size),
            margin=margin,
            low=low,
            high=high,
            **facts,
        )


def _check_finite(scores: RowScores, what: str) -> None:
    """Figures of what computes no numbers would say nothing.

    Raises:
        ModelError: the loss is not finite.
    """
    if not math.isfinite(scores.loss):
        raise ModelError(
            f"The loss of {what} on the held-out rows is no finite number.",
            hint="look at how it was made; `splitfl plugin --eval` measures the full model with an adapter",
        )


def _notes(measuring: _Measuring, points: Sequence[Point]) -> list[str]:
    settings, data = measuring.settings, measuring.data
    notes = []
    if settings.adapter is None:
        notes.append(
            "no --adapter: the copies were tuned on these rows and the model was not, so a part of what is gone is "
            "tuning; give the holder's adapter, or rows of the kind that the model was made for"
        )
    if max(settings.queries, default=0) > data.holder.tokens:
        notes.append(
            f"there are {data.holder.tokens:,} tokens to query; more than that was asked for and not measured (--text "
            "adds some)"
        )
    of_rows = sum(len(one["input_ids"]) for one in (*data.holder.rows, *data.holder.kept_back))
    notes.append(f"one pass over these rows in a split session queries {of_rows:,} tokens")
    if len(data.held_out) < _FEW:
        notes.append(
            f"{len(data.held_out)} held-out rows are few: the intervals are wide and may be too narrow at that"
        )
    notes.append(
        f"{len(data.holder.rows)} rows to train on, {len(data.holder.kept_back)} to choose the best state with, "
        f"{len(data.held_out)} held out"
    )
    notes += [f"{one.name}: the training diverged, its best state was used" for one in points if one.diverged]
    notes.append("a holder who trains longer, or more than the emulator, can do more than this")
    return notes


# ---- what is kept


class _Record:
    """The directory of a measurement: what it was started with, and the points that are done."""

    _SAME = ("grow", "steps", "learning_rate", "batch_size", "eval_steps", "seed", "max_length", "answer_only",
             "truncation")  # fmt: skip

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings, self.file = folder / "settings.json", folder / "points.json"

    def check(self, *, resume: bool) -> None:
        """Is there a measurement to resume, or room for a new one?

        Raises:
            UsageError: one is in the way, or none is there.
            ModelError: something else is in the way.
        """
        if resume and not self.settings.exists():
            raise UsageError(f"{self.folder} holds no measurement to resume.", hint="leave --resume out to start one")
        if not resume and self.settings.exists():
            raise UsageError(
                f"{self.folder} already holds a measurement.",
                hint="add --resume to continue it, or choose another directory",
            )
        if not resume:
            check_out(self.folder)

    def begin(self, settings: MarginSettings, data: _Data, made_of: dict[str, Any]) -> None:
        """Write what is asked, or compare it with what was asked before.

        Raises:
            UsageError: names what differs.
        """
        asked = {name: getattr(settings, name) for name in self._SAME} | made_of | data.prints
        if not self.settings.exists():
            replace_text(self.settings, json.dumps(asked, indent=2) + "\n")
            return
        before = json.loads(self.settings.read_text(encoding="utf-8"))
        other = sorted(name for name in asked.keys() | before.keys() if before.get(name) != asked.get(name))
        if other:
            raise UsageError(
                f"The measurement in {self.folder} was started with another {', '.join(other)}.",
                hint="resume with what it was started with, or choose another directory",
            )

    def points(self) -> list[Point]:
        """Those that are done."""
        return msgspec.json.decode(self.file.read_bytes(), type=list[Point]) if self.file.exists() else []

    def point(self, asked: int | None) -> Point | None:
        """The one of so many queries, if it is done."""
        return next((one for one in self.points() if one.asked == asked), None)

    def add(self, point: Point) -> None:
        """Keep a point; what its training left is not needed any more."""
        points = sorted([*self.points(), point], key=lambda one: -1 if one.asked is None else one.asked)
        content = msgspec.json.format(msgspec.json.encode(points), indent=2)
        replace_text(self.file, content.decode() + "\n")
        shutil.rmtree(self.folder_of(point.asked), ignore_errors=True)

    def folder_of(self, asked: int | None) -> Path:
        """Where the copy of so many queries is trained."""
        return self.folder / f"copy-{asked}"
