"""What an audit stands on: the recording, the rows behind it, their undefended twin, the attacker's own text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from party.audit_choice import Choice, choose
from party.audit_jobs import Ground
from party.recorded import Recorded, open_recorded
from party.rundir import RunDirectory
from splitfl.audit.baselines import by_model
from splitfl.audit.bottom import is_causal, open_bottom
from splitfl.audit.controls import SAME, distance, make_twins
from splitfl.audit.scoring import Truth, name_of
from splitfl.audit.truth import TrueRow
from splitfl.audit.view import Domain, Knowledge, Noise, Sent, View
from splitfl.audit.words import Marked, mark
from splitfl.config import TuneSettings
from splitfl.config_audit import AuditSettings
from splitfl.data import Rows, fingerprint, load_rows
from splitfl.demo import assets
from splitfl.errors import DataError, UsageError
from splitfl.kit import Kit, load_tokenizer, open_kit
from splitfl.records import open_records

QUICK_ROWS = 24
_LONGEST = 192
"""Tokens of one auxiliary text."""


def open_ground(settings: AuditSettings, say: Any, *, traffic: bool = True) -> tuple[Ground, float | None]:
    """Open everything that the audit needs.

    Args:
        settings: of the command.
        say: prints a line for people.
        traffic: whether what crossed is attacked; without it a run with an adapter needs no recording.

    Returns:
        The ground, and how far the traffic is from its twin (None where that cannot be told).

    Raises:
        UsageError: the run has no recording.
        DataError: it was defended and its twin cannot be made.
    """
    run = RunDirectory(settings.run)
    tuned = run.settings()
    kit = open_kit(settings.kit or tuned.kit)
    without = not traffic and not run.recording.is_dir()
    known = Recorded(run=run) if without else _recorded(settings, run, kit, ())
    if not known.truth and not known.updates and traffic:
        raise UsageError(
            "This recording does not say which rows crossed, so nothing could be scored.",
            expected="a run directory of `splitfl tune --record`, with its own recording",
        )
    several = not _plain(known.noise) or not _plain(known.gradient_noise)
    count = min(settings.records, QUICK_ROWS) if settings.quick else settings.records
    choice = choose(known, count, several=several, seed=settings.seed)
    recorded = known if without else _recorded(settings, run, kit, choice.numbers)
    sent = {each.number: each for each in recorded.sent}
    if sent:
        rows_sent = len({name_of(known.truth[number]) for number in choice.numbers})
        say(f"{rows_sent} rows of the run, as sent {len(sent)} times")
    twins, off = _twins(kit, recorded, choice, sent)
    auxiliary, labelled, domain = own_text(settings, kit)
    causal_text = kit.plan.task == "causal-lm" and settings.model is not None and bool(sent)
    rows = tuple(recorded.truth[number] for number in sorted(sent))
    truth = Truth(
        rows=rows,
        marks=_marks(kit, rows, tuned),
        model=by_model(rows, cast("Path", settings.model)) if causal_text else None,
    )
    bottom = open_bottom(View(kit=kit, knowledge=Knowledge.BASE))
    ground = Ground(
        kit=kit, recorded=recorded, choice=choice, truth=truth, sent=sent, twins=twins, auxiliary=auxiliary,
        labelled=labelled, domain=domain, model=settings.model, causal=is_causal(bottom),
        effort="quick" if settings.quick else "default", seed=settings.seed,
    )  # fmt: skip
    return ground, off


def _recorded(settings: AuditSettings, run: RunDirectory, kit: Kit, numbers: Any) -> Recorded:
    return open_recorded(
        run, kit, key=settings.key, owner_recording=settings.traffic, owner_key=settings.owner_key, numbers=numbers
    )


def _plain(noise: Noise) -> bool:
    return noise.name == "none"


def _twins(
    kit: Kit, recorded: Recorded, choice: Choice, sent: Mapping[int, Sent]
) -> tuple[dict[int, Sent], float | None]:
    """The undefended twin of a defended run, by number; and how far the traffic is from it at known adapters."""
    named = not _plain(recorded.noise) or not _plain(recorded.gradient_noise)
    if not sent:
        return {}, None
    if not choice.known:
        if named:
            raise DataError(
                "No adapter of this run is known at any moment at which rows crossed, so it has no undefended twin.",
                expected="a run with its checkpoints or its adapter",
                hint="without a twin no score of a defended run is reported",
            )
        return {}, None
    twins: dict[int, Sent] = {}
    off = 0.0
    for folder, numbers in choice.moments:
        here = [sent[number] for number in numbers if number in sent]
        made = make_twins(kit, here, recorded.truth, folder)
        off = max(off, distance(here, made))
        twins |= {each.number: each for each in made}
    if not named and off <= SAME:
        return {}, off
    by_folder: dict[Path | None, list[Sent]] = {}
    for number in choice.whole:
        if number in sent and number not in twins:
            by_folder.setdefault(choice.nearest[number], []).append(sent[number])
    for folder, others in by_folder.items():
        twins |= {each.number: each for each in make_twins(kit, others, recorded.truth, folder)}
    return twins, off


def datasets_of(tuned: TuneSettings, kit: Kit) -> tuple[str, ...]:
    """Fingerprints of the run's rows, under which the ledger has them; of those that can still be read."""
    found = []
    for path in (tuned.train, tuned.eval):
        if path is not None and path.exists():
            label2id = dict(kit.config.label2id or {}) if kit.plan.task == "sequence-classification" else None
            rows = load_rows(path, columns=tuned.column_map(), task=kit.plan.task, label2id=label2id)
            found.append(fingerprint(rows))
    return tuple(found)


# ---- the attacker's own text


def own_text(
    settings: AuditSettings, kit: Kit
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[tuple[int, ...], int], ...], Domain]:
    """Texts as token ids, those that have an attribute with it, and what domain they are of."""
    tokenizer = load_tokenizer(kit.path)
    if settings.domain == "none" or tokenizer is None:
        return (), (), "none"
    files = [settings.auxiliary] if settings.auxiliary is not None else _of_another_domain(kit)
    texts: list[tuple[int, ...]] = []
    labelled: list[tuple[tuple[int, ...], int]] = []
    for file in files:
        rows = _any_rows(file, settings.column_map() if settings.auxiliary is not None else {})
        for row in rows:
            ids = tuple(tokenizer(_words(row), truncation=True, max_length=_LONGEST, verbose=False)["input_ids"])
            if len(ids) < 2:
                continue
            texts.append(ids)
            if rows.task == "sequence-classification":
                labelled.append((ids, rows.class_number(row)))
    return tuple(texts), tuple(labelled), settings.domain or "other"


def _of_another_domain(kit: Kit) -> list[Path]:
    """Rows that come with splitfl: opinions on films for models that answer, questions on health for classifiers."""
    names = ["sentiment.train.csv", "sentiment.test.csv"]
    if kit.plan.task == "sequence-classification":
        names = ["hospital.train.jsonl", "clinic.train.jsonl"]
    return [assets() / "data" / name for name in names]


def _any_rows(path: Path, columns: Mapping[str, str]) -> Rows:
    """Rows of whatever form: with a label where they have one."""
    try:
        return load_rows(path, columns=columns, task="sequence-classification")
    except (DataError, UsageError):
        return load_rows(path, columns=columns, task="causal-lm")


def _words(row: Any) -> str:
    turns = [str(turn["content"]) for turn in row.messages]
    return "\n".join(part for part in (row.text, row.text_pair, row.prompt, row.completion, *turns) if part)


# ---- what is worth more than its tokens


def _marks(kit: Kit, rows: Sequence[TrueRow], tuned: TuneSettings) -> dict[tuple[str, int], Marked]:
    tokenizer = load_tokenizer(kit.path)
    if tokenizer is None:
        return {}
    told = {"train": _told(tuned.train), "held-out": _told(tuned.eval)}
    found: dict[tuple[str, int], Marked] = {}
    for row in rows:
        if name_of(row) not in found:
            values = told[row.dataset]
            known = values[row.row] if values is not None and row.row < len(values) else None
            found[name_of(row)] = mark(row.ids, row.special, tokenizer, known)
    return found


def _told(path: Path | None) -> list[list[str]] | None:
    """For each row of a file the values of the entities in it, where every row has them under ``spans``."""
    if path is None or not path.exists():
        return None
    found = []
    for _, record in open_records(path).pairs:
        spans = record.get("spans") if isinstance(record, dict) else None
        if not isinstance(spans, list):
            return None
        found.append([str(span["value"]) for span in spans if isinstance(span, dict) and "value" in span])
    return found
