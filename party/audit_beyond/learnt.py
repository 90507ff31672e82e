"""What the adapter gives back of its rows: their continuation from a beginning, and planted secrets (`--canaries`).

Rows that were tuned on are continued beside rows that were not: what both give back, the base model knew. Canaries are
those of ``python -m splitfl.audit.canaries``; each is ranked among candidates of the same making, and those that the
coin left out say what rank a secret has that nobody learnt.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from party.audit_beyond import Examination, Progress, Site
from party.audit_beyond.members import no_adapter, whole
from party.tune import read_data, reading_options
from splitfl.adapters import open_adapter
from splitfl.audit.attacks.canary import PREFIXES, continue_greedily, exposure, extract
from splitfl.audit.canaries import Canary, form_of, random_canaries, read_canaries, row_of
from splitfl.audit.examined import Examined, Fact
from splitfl.audit.intervals import Estimate, share
from splitfl.audit.results import Cost
from splitfl.data import load_rows, tokenise
from splitfl.metrics import peak_rss_bytes
from splitfl.records import open_records

NAME = "canary"
_ROWS = {"quick": 24, "default": 100}
_LENGTH = 16
_CANDIDATES = {"quick": 31, "default": 127}
_FEWEST = 7


def _examine(site: Site, progress: Progress) -> Examined | str:
    started = time.monotonic()
    model = open_adapter(whole(site.ground.model), site.run.adapter).eval()
    facts, alarming = _continued(site, model, progress)
    records = _ROWS[site.ground.effort]
    if site.settings.canaries is not None:
        canaries = read_canaries(site.settings.canaries)
        planted, exposed = _exposed(site, model, canaries, progress)
        facts, alarming, records = [*planted, *facts], alarming or exposed, len(canaries)
    if not facts:
        return f"no row is {PREFIXES[0] + _LENGTH} tokens long, and no --canaries were given"
    return Examined(
        name=NAME,
        title="what the adapter writes from the beginning of a row, and how it ranks planted secrets",
        source="Carlini and others 2019, section 4 (exposure); 2023, section 3 (extraction)",
        adversary="whoever gets the adapter, has the base model, and knows how a row begins",
        found=_sentence(facts, alarming),
        alarming=alarming,
        weak_point="rows are continued greedily, once; sampling many times and other beginnings find more",
        facts=tuple(facts),
        records=records,
        cost=Cost(seconds=time.monotonic() - started, peak_rss_bytes=peak_rss_bytes()),
    )


def _sentence(facts: Sequence[Fact], alarming: bool) -> str:
    first = facts[0]
    words = f"{first.name}: {first.shown}" + (f" ({first.compared})" if first.compared else "")
    return (
        f"{words}: {'rows come back that only the tuning can have taught' if alarming else 'no more than by chance'}."
    )


# ---- rows


def _continued(site: Site, model: Any, progress: Progress) -> tuple[list[Fact], bool]:
    """Continuations of rows tuned on, beside those of rows held out; and whether the first come back more often."""
    data = read_data(site.run.settings(), site.ground.kit)
    most = _ROWS[site.ground.effort]
    own = [example["input_ids"] for example in list(data.train)[:most]]
    others = [example["input_ids"] for example in list(data.held_out or ())[:most]]
    found = extract(model, own, length=_LENGTH, seed=site.ground.seed)
    progress(0.3)
    beside = {each.prefix: each for each in extract(model, others, length=_LENGTH, seed=site.ground.seed)}
    progress(0.5)
    facts, alarming = [], False
    for each in found:
        other = beside.get(each.prefix)
        for words, mine, theirs in (
            ("written on whole", each.exact, other.exact if other else None),
            ("likeness (BLEU-4)", each.bleu, other.bleu if other else None),
        ):
            reference = None if theirs is None else theirs.value
            alarming |= mine.low > (0.0 if theirs is None else theirs.high)
            facts.append(
                Fact.of(
                    f"{_LENGTH} tokens behind the first {each.prefix} of a row, {words}", mine, "share", reference,
                    "rows held out",
                )
            )  # fmt: skip
    return facts, alarming


# ---- canaries


def _exposed(site: Site, model: Any, canaries: Sequence[Canary], progress: Progress) -> tuple[list[Fact], bool]:
    """Exposure and extraction of canaries that were in, beside those that were left out."""
    exposures: dict[bool, list[float]] = {True: [], False: []}
    whole_ones: dict[bool, list[float]] = {True: [], False: []}
    for at, canary in enumerate(canaries):
        candidates = _candidates(site, canaries, canary)
        if len(candidates) >= _FEWEST:
            prefix, (own, *rest) = _ids_of(site, canary, candidates)
            exposures[canary.included].append(exposure(model, prefix, own, rest))
            (said,) = continue_greedily(model, [prefix], len(own))
            whole_ones[canary.included].append(float(said == own))
        progress(0.5 + 0.5 * (at + 1) / len(canaries))
    inside, outside = (_mean(exposures[which], site.ground.seed) for which in (True, False))
    if inside is None or outside is None:
        return [], False
    back, chance = (_mean(whole_ones[which], site.ground.seed) for which in (True, False))
    facts = [
        Fact.of("exposure of canaries in the rows", inside, "bits", outside.value, "canaries left out"),
        Fact(name="largest exposure", value=max(exposures[True]), unit="bits", reference=max(exposures[False]),
             beside="canaries left out"),
    ]  # fmt: skip
    if back is not None and chance is not None:
        facts.append(
            Fact.of("secrets of canaries written back whole", back, "share", chance.value, "canaries left out")
        )
    return facts, inside.low > outside.high or (back is not None and back.low > 0)


def _mean(values: Sequence[float], seed: int) -> Estimate | None:
    return share(values, [1.0] * len(values), range(len(values)), seed=seed) if values else None


def _candidates(site: Site, canaries: Sequence[Canary], canary: Canary) -> list[str]:
    """Secrets of the same making that nobody was tuned on."""
    most = _CANDIDATES[site.ground.effort]
    if canary.kind == "random":
        tokenizer = site.ground.kit.tokenizer()
        length = 2 * len(tokenizer(canary.secret, add_special_tokens=False)["input_ids"])
        drawn = random_canaries(tokenizer, most, length=max(2, length), seed=site.ground.seed + 7919)
        return [each.secret for each in drawn]
    alike = [each.secret for each in canaries if each.kind == canary.kind and not each.included]
    return [secret for secret in alike if secret != canary.secret][:most]


def _ids_of(site: Site, canary: Canary, others: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    """Token ids before the secret, and those of the secret and its candidates, as the run's own reading makes them."""
    settings, kit = site.run.settings(), site.ground.kit
    form = form_of([record for _, record in open_records(settings.train).pairs][:1])
    texts = [row_of(form, Canary(kind=canary.kind, prefix=canary.prefix, secret=s)) for s in (canary.secret, *others)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")
        rows = load_rows(path, task=kit.plan.task)
        ids = [example["input_ids"] for example in tokenise(rows, kit.tokenizer(), **reading_options(settings, kit))]
    start = _shared(ids)
    end = _shared([row[start:][::-1] for row in ids])
    return ids[0][:start], [row[start : len(row) - end] or row[-1:] for row in ids]


def _shared(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with alike; of the shortest one at least one is left."""
    most = min(map(len, rows)) - 1
    return next((at for at in range(max(most, 0)) if len({row[at] for row in rows}) > 1), max(most, 0))


def _why_not(site: Site) -> str | None:
    return no_adapter(site)


EXAMINATION = Examination(name=NAME, knowledge="K3", default=True, needs_traffic=False, why_not=_why_not, run=_examine)
