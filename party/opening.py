"""What a run needs before its first tensor: mechanisms, the preview of what they promise, the book, and the session."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from party.bookkeeping import Book, DataSet
from party.connect import open_session
from party.honesty import HonestyProbe
from party.model import resolve_dtype
from party.protect import Guard, Protection, coder, plan_protection
from party.session import Session
from protocols import Protocol, protocol_named
from splitfl.config import TuneSettings
from splitfl.data import Examples
from splitfl.kit import Kit
from splitfl.link import TrunkLink
from splitfl.privacy import calibration
from splitfl.privacy.ledger import Ledger
from splitfl.rows import Rows, fingerprint
from splitfl.wire.codecs import TORCH_DTYPES

if TYPE_CHECKING:
    from party.recording import Recorder

_DELTA = 1e-6  # of a claim made from --sigma alone


def say(text: str) -> None:
    """A line for the person at the terminal; stdout is left to figures."""
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How a run protects what it sends, settled before anything is sent."""

    protocol: Protocol
    protection: Protection
    claim: calibration.Claim
    preview: tuple[tuple[str, str], ...]

    def show(self) -> None:
        """Say what the run promises, before anything is sent."""
        if self.protection.hidden is None:
            say("protection: none; whoever knows the base weights can read most of the text from what is sent")
            return
        wide = max(len(label) for label, _ in self.preview)
        for label, text in self.preview:
            say(f"{label:{wide}}  {text}")

    @property
    def bounds(self) -> dict[tuple[str, str], str]:
        """The bound on each tensor, for ``disclosure.json``."""
        return {("forward", "hidden"): self.claim.sentence()}


def prepare(settings: TuneSettings, kit: Kit, longest: int, rows: int = 1) -> Preparation:
    """Choose the mechanisms and work out what they promise.

    Args:
        settings: of the run.
        kit: the kit.
        longest: tokens of the longest row.
        rows: how many there are to train on.

    Raises:
        UsageError: a mechanism or a promise that this run has no place for.
    """
    protocol = protocol_named(settings.protocol)
    releases = settings.releases or (1 if protocol.sends_once else planned_releases(settings, rows))
    sigma = settings.sigma
    if settings.epsilon is not None:
        plan_protection(settings, kit.plan, protocol, sigma=1.0)  # whether epsilon may be asked for at all
        assert settings.clip is not None  # noqa: S101
        assert settings.delta is not None  # noqa: S101
        sigma = calibration.zcdp_sigma(
            settings.epsilon, settings.delta, sensitivity=2 * settings.clip, releases=releases
        )
    table = embedding_table(kit) if settings.snap else None
    classes = int(kit.config.num_labels) if kit.plan.task == "sequence-classification" else None
    protection = plan_protection(settings, kit.plan, protocol, sigma=sigma, table=table, classes=classes)
    claim = _claim(settings, kit, protection, releases)
    preview = _preview(settings, kit, protection, claim, longest)
    return Preparation(protocol=protocol, protection=protection, claim=_tenable(claim), preview=tuple(preview))


def _tenable(claim: calibration.Claim) -> calibration.Claim:
    """The claim, or an empirical one where its bound says next to nothing: such a run is not one with a bound."""
    if not claim.formal or calibration.verdict(claim) is None:
        return claim
    return dataclasses.replace(
        claim,
        epsilon_one=None,
        epsilon_all=None,
        formal=False,
        because=f"its bound would say almost nothing ({claim.bound(claim.releases_planned)})",
    )


def planned_releases(settings: TuneSettings, rows: int) -> int:
    """How often training sends a row of `rows`; evaluations come on top, for their own rows."""
    if settings.max_steps > 0:
        batch = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
        return max(1, math.ceil(settings.max_steps * batch / rows))
    return max(1, math.ceil(settings.num_train_epochs))


def check_budget(
    settings: TuneSettings, preparation: Preparation, book: Book, train: str, held_out: str | None
) -> None:
    """Refuse before the first byte what the ledger would refuse in the middle.

    Raises:
        BudgetError: the run does not fit into the budget of its rows.
    """
    protection, protocol = preparation.protection, preparation.protocol
    times = preparation.claim.releases_planned
    book.check("activations", protection.hidden, train, times, formal=protection.formal)
    if protocol.sends_gradients:
        book.check("gradients", protection.gradient, train, 2 * times, formal=False)
    if held_out is not None:
        passes = 1 if protocol.sends_once else 2  # before and after; more with --eval-steps
        book.check("activations", protection.hidden, held_out, passes, formal=protection.formal)


def embedding_table(kit: Kit) -> torch.Tensor:
    """Input embeddings of the kit's model, float32 [V, D]."""
    return kit.load(torch.float32).get_input_embeddings().weight.detach()


def _claim(settings: TuneSettings, kit: Kit, protection: Protection, releases: int) -> calibration.Claim:
    gauss = protection.gauss
    if gauss is not None and protection.formal:
        return calibration.gauss_claim(
            channel="activations",
            unit=gauss.unit,
            depth=kit.plan.bottom,
            clip=gauss.clip,
            sigma=gauss.sigma,
            delta=settings.delta or _DELTA,
            releases=releases,
        )
    return calibration.Claim(
        mechanism="no mechanism" if protection.hidden is None else protection.hidden.name,
        channel="activations",
        unit=settings.unit or "record",
        sensitivity=None if gauss is None else gauss.sensitivity,
        sigma=None if gauss is None else gauss.sigma,
        releases_planned=releases,
        formal=False,
        because=protection.because,
    )


def _preview(
    settings: TuneSettings, kit: Kit, protection: Protection, claim: calibration.Claim, longest: int
) -> list[tuple[str, str]]:
    signal, worst = None, None
    if (gauss := protection.gauss) is not None:
        # A record at the bound spreads it over its tokens: r = clip / sqrt(T).
        signal = gauss.clip / (math.sqrt(longest) if gauss.unit == "record" else 1.0)
    if settings.eta is not None and kit.plan.bottom == 0:
        worst = calibration.dchi_worst_case(settings.eta, calibration.embedding_diameter(embedding_table(kit)))
    vocabulary = int(kit.config.get_text_config().vocab_size)
    return calibration.preview(claim, signal=signal, vocabulary=vocabulary, eta_diameter=worst)


# ---- the book


def data_set(rows: Rows, examples: Examples, label: Path) -> DataSet:
    """What the book must know of these rows."""
    unit: Literal["row", "person"] = "person" if rows[0].person is not None else "row"
    units = [rows[source].person if unit == "person" else str(source) for source in examples.sources]
    return DataSet(fingerprint=fingerprint(rows), label=label.name, units=units, unit=unit)


def open_book(settings: TuneSettings, run: str, datasets: Mapping[str, DataSet]) -> Book:
    """The ledger that the settings name, ready for this run.

    Raises:
        UsageError: the run began with other rows.
        DataError, ResourceError: a ledger that cannot be used.
    """
    ledger = Ledger(settings.ledger)
    try:
        for data in datasets.values():
            ledger.note_dataset(data.fingerprint, data.label)
    except BaseException:
        ledger.close()
        raise
    return Book(ledger=ledger, run=run, datasets=dict(datasets))


# ---- the session


def connect(settings: TuneSettings, kit: Kit, protection: Protection, recorder: Recorder | None = None) -> Session:
    """Open the session that the settings describe; a recorder sees every message of it."""
    compute = resolve_dtype(kit, settings.dtype)
    assert settings.owner is not None  # noqa: S101  the settings saw to it
    session = open_session(
        kit.plan,
        settings.owner,
        owner_key=settings.owner_key,
        key=settings.key,
        insecure_loopback=settings.insecure_loopback,
        protocol=settings.protocol,
        wire_dtype=compute if settings.wire_dtype == "auto" else settings.wire_dtype,
        memory=settings.memory,
        hidden_coding=protection.hidden_coding,
        gradient_coding=protection.gradient_coding,
        timeout_s=settings.timeout,
        **({} if recorder is None else {"tap": recorder.tap}),
    )
    codings = {protection.hidden_coding, protection.gradient_coding} - {"raw"}
    coded = f", coded as {', '.join(sorted(codings))}" if codings else ""
    wire = f"{session.terms.wire_dtype} on the wire{coded}"
    say(f"session open with {settings.owner}; protocol {settings.protocol}, {wire}")
    return session


def guarded(
    settings: TuneSettings, session: Session, protection: Protection, book: Book | None,
    on_probe: Callable[[dict[str, object]], None] | None = None, recorder: Recorder | None = None,
) -> Guard:  # fmt: skip
    """Mechanisms and book in front of a check of the owner, in front of the session; a recorder sees what goes out."""
    link: TrunkLink = session if recorder is None else recorder.watching(session)
    if settings.probe_every:
        link = HonestyProbe(
            link,
            every=settings.probe_every,
            dtype=_coarser(session),
            encode=coder(protection),
            # With the bottom kept as it is, no gradient is asked for, whatever the protocol allows.
            gradients=protocol_named(settings.protocol).sends_gradients and protection.trains_bottom,
            on_probe=on_probe,
            on_failure=on_probe,
        )
    return Guard(link, protection, book)


def _coarser(session: Session) -> torch.dtype:
    """The coarser of what the wire carries and what the owner says it computes in."""
    said = session.welcome.compute if session.welcome is not None else session.terms.wire_dtype
    both = [TORCH_DTYPES[session.terms.wire_dtype], TORCH_DTYPES[said]]
    return max((dtype for dtype in both if dtype.is_floating_point), key=lambda dtype: torch.finfo(dtype).eps)
