"""The report card: one page that a person answerable for the rows can read.

It says who saw what, what the attacks got from it, whether the attacks can be trusted, and what was not tried. It never
says that something is safe: a low score is a lower bound on what leaked, against the attacks that were run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitfl.audit.controls import SAME, Control
from splitfl.audit.examined import Examined
from splitfl.audit.results import Outcome, Shown, Skipped
from splitfl.audit.scoring import BLIND, BY_MODEL, ENOUGH
from splitfl.config import TuneSettings
from splitfl.errors import SplitflError
from splitfl.files import replace_text
from splitfl.kit import Kit, load_tokenizer
from splitfl.ledger_command import Shown as ShownAccount
from splitfl.ledger_command import epsilon_of
from splitfl.options import fields_of
from splitfl.privacy.ledger import Ledger, default_path
from splitfl.report import Run, gain, read_run_directory, render

PAGE = "audit.html"
KNOWN = {
    "K0": "knows the architecture only",
    "K1": "knows the base weights, which the owner wrote; the realistic case",
    "K2": "knows the base weights and the seed of the adapter",
    "K3": "knows the very bottom, adapter included; nobody has it, so this is the worst case",
}
_MORE = {
    "exact sequences": "whole rows without one mistake",
    "exact answers": "whole answers without one mistake",
    "content words": "words that carry the meaning",
    "entities": "names, numbers and dates",
    BLIND: "beyond guessing blindly",
    BY_MODEL: "beyond what the model guesses alone",
}
_CHANNELS = (
    ("forward", "hidden", "Activations at the lower cut", "the text of the rows, token by token"),
    ("backward", "gradient", "Gradients at the upper cut", "the answers, which positions are answers, and the classes"),
    ("forward", "mask", "Masks", "how long each row is"),
)
_SAYS_NOTHING = ("kit", "out", "owner", "owner_key", "key", "train", "eval", "json", "record", "threads", "ledger")


@dataclass(frozen=True, kw_only=True)
class Card:
    """All that the page is made of."""

    run: Path
    kit: Kit
    outcomes: tuple[Outcome, ...]
    skipped: tuple[Skipped, ...]
    controls: tuple[Control, ...]
    distance: float | None
    """How far the traffic is from its undefended twin; None where that is not known."""
    asked: int
    """Records that were asked for."""
    quick: bool
    texts: bool
    """Whether reconstructions are shown."""
    counts: Mapping[str, Any]
    """Of the recording."""
    ruled: bool
    """Whether entities were found by rules."""
    with_model: bool
    finished: bool
    examined: tuple[Examined, ...] = ()
    """What was looked at beside the traffic."""
    reference: Path | None = None
    """Run directory of the same tuning without protection."""
    datasets: tuple[str, ...] = ()
    """Fingerprints of the run's rows, for the ledger."""
    ledger: Path | None = None

    @property
    def attacked(self) -> list[Outcome]:
        """What crossed, as it crossed; the best first inside each kind."""
        mine = [each for each in self.outcomes if each.traffic == "as it crossed"]
        return sorted(mine, key=lambda each: (_rank(each), -_value(each)))

    def twin_of(self, outcome: Outcome) -> Outcome | None:
        """The same attack where nothing was done to the traffic."""
        return next(
            (each for each in self.outcomes if each.traffic == "undefended" and each.name == outcome.name), None
        )

    @property
    def records(self) -> int:
        """Most rows that one attack on traffic was held against; on the adapter, where there is no other."""
        traffic = [each.records for each in self.attacked if each.finds not in ("scores", "bags")]
        return max(traffic or [each.records for each in self.attacked], default=0)

    @property
    def few(self) -> bool:
        """Whether there are fewer rows than a report should stand on."""
        return self.records < ENOUGH

    @property
    def worst(self) -> list[Outcome]:
        """The best attack on tokens for each knowledge; other kinds where none reads tokens."""
        found: dict[str, Outcome] = {}
        for each in self.attacked:
            found.setdefault(each.knowledge, each)
        return [found[knowledge] for knowledge in sorted(found)]


def write_card(folder: Path, card: Card) -> Path:
    """Write the page.

    Args:
        folder: for it; the page gets mode 0600, since it may hold rows.
        card: what it says.

    Raises:
        UsageError: jinja2 is missing.
        DataError: a file of the run cannot be read.
    """
    run = read_run_directory(card.run)
    before, after = run.measured("before"), run.measured("after")
    page = render(
        "audit.html.j2",
        card=card,
        run=run,
        gains=[gain(name, before, after) for name in ("loss", "perplexity", "accuracy", "macro_f1") if name in after],
        known=KNOWN,
        more=_MORE,
        enough=ENOUGH,
        bars=[_bar(each, card.twin_of(each)) for each in card.attacked],
        channels=_channels(run),
        accounts=_accounts(card),
        texts=_texts(card),
        given_up=_given_up(card.reference, before, after),
        switches=_switches(run),
        controls=_controls(card),
        defended=any(each.traffic == "undefended" for each in card.outcomes),
        same=SAME,
    )
    replace_text(folder / PAGE, page)
    (folder / PAGE).chmod(0o600)
    return folder / PAGE


def _rank(outcome: Outcome) -> int:
    return ("tokens", "answers", "classes", "bags", "scores").index(outcome.finds)


def _value(outcome: Outcome) -> float:
    return outcome.main.value if outcome.main is not None else 0.0


# ---- the attacks


def _bar(outcome: Outcome, twin: Outcome | None) -> dict[str, Any]:
    """One line of the picture; lengths in per cent."""
    main = outcome.main
    assert main is not None  # noqa: S101  an outcome without one is left out
    return {
        "outcome": outcome,
        "value": 100 * main.value,
        "low": 100 * main.low,
        "high": 100 * main.high,
        "twin": None if twin is None or twin.main is None else 100 * twin.main.value,
        "lines": [(words, outcome.figures[name]) for name, words in _MORE.items() if name in outcome.figures],
        "low_score": main.value < (0.6 if outcome.finds == "scores" else 0.5),
    }


def _controls(card: Card) -> list[dict[str, Any]]:
    """One line a kind of control; of the negative ones the worst, and how many there were."""
    found = []
    for name, question in (
        ("positive", "Does the best attack read what nobody defended?"),
        ("negative", "Do all attacks find nothing where there is nothing to find?"),
        ("sensitivity", "Does the score rise by the right amount when a known part is left open?"),
    ):
        mine = [each for each in card.controls if each.name == name]
        if mine:
            shown = max(mine, key=lambda each: (not each.works, each.found.value if each.found else 0.0))
            works = all(each.works for each in mine)
            found.append({"name": name, "question": question, "shown": shown, "works": works, "count": len(mine)})
        else:
            found.append({"name": name, "question": question, "shown": None, "works": None, "count": 0})
    return found


# ---- what crossed, and what the ledgers say


def _channels(run: Run) -> list[dict[str, str]]:
    """Who sees what: one line a channel that the protocol lets cross."""
    crossings = (run.disclosure or {}).get("crossings", ())
    rows = []
    for message, tensor, what, tells in _CHANNELS:
        mine = [c for c in crossings if c["message"] == message and c["tensor"] == tensor]
        for c in mine[:1]:
            rows.append({"what": what, "who": "the owner", "how_often": c["how_often"], "tells": tells,
                         "bound": c["bound"]})  # fmt: skip
    return rows


def _accounts(card: Card) -> list[dict[str, Any]] | None:
    """The ledger's lines of this run's rows, by what they are about; None where the ledger cannot be read."""
    path = card.ledger or default_path()
    if not path.exists():
        return None
    try:
        with Ledger(path, create=False) as ledger:
            accounts = [each for name in card.datasets for each in ledger.spent(name)]
        return [
            {"group": each.group, "name": each.name, "adversary": each.adversary, "unit": each.unit,
             "releases": each.releases, "most": each.most.releases,
             "claim": ShownAccount(account=each, epsilon=epsilon_of(each)).claim}
            for each in accounts if each.releases
        ]  # fmt: skip
    except SplitflError:
        return None


def _switches(run: Run) -> dict[str, Any]:
    """Settings of the run that are not the defaults; paths and places say nothing."""
    defaults = {field.name: field.default for field in fields_of(TuneSettings)}
    return {
        name: value
        for name, value in run.settings.items()
        if name in defaults and name not in _SAYS_NOTHING and value != _plain(defaults[name])
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _given_up(reference: Path | None, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The run's held-out figures beside those of the same tuning without protection, and the share of the gain kept."""
    if reference is None:
        return []
    other = read_run_directory(reference)
    first, last = other.measured("before"), other.measured("after")
    rows = []
    for name in ("loss", "perplexity", "accuracy", "macro_f1"):
        if name in after and name in last:
            start = first.get(name, before.get(name))
            gained = None if start is None else last[name] - start
            kept = None if not gained or start is None else (after[name] - start) / gained
            rows.append({"name": name, "run": after[name], "open": last[name], "kept": kept})
    return rows


# ---- reconstructions


def _texts(card: Card) -> list[dict[str, Any]]:
    """The worst reconstructions of the best attack on tokens, each as marked pieces of text."""
    tokenizer = load_tokenizer(card.kit.path)
    best = next((each for each in card.attacked if each.shown), None)
    if not card.texts or best is None or tokenizer is None:
        return []
    return [_side_by_side(shown, best, tokenizer) for shown in best.shown]


def _side_by_side(shown: Shown, outcome: Outcome, tokenizer: Any) -> dict[str, Any]:
    original = [t for t, special in zip(shown.original, shown.special, strict=True) if not special]
    guess = [t for t, special in zip(shown.guess, shown.special, strict=True) if not special]
    pieces: list[tuple[str, bool]] = []
    for ids, right in _runs(guess, original):
        text = str(tokenizer.decode([t for t in ids if t >= 0])) if any(t >= 0 for t in ids) else ""
        pieces.append((text or " \N{HORIZONTAL ELLIPSIS} ", right))
    return {
        "share": shown.share,
        "where": f"{shown.dataset} row {shown.row + 1}",
        "attack": outcome.name,
        "original": tokenizer.decode(original),
        "pieces": pieces,
    }


def _runs(guess: Sequence[int], original: Sequence[int]) -> list[tuple[list[int], bool]]:
    """Stretches of tokens that are all right, or all wrong."""
    runs: list[tuple[list[int], bool]] = []
    for one, other in zip(guess, original, strict=True):
        if runs and runs[-1][1] == (one == other):
            runs[-1][0].append(one)
        else:
            runs.append(([one], one == other))
    return runs
