"""Step 4 of the journey: what is done to a tensor before it leaves, and the book that is kept of it.

`plan_protection` makes mechanisms from the settings, for the model, cut and protocol at hand; what makes no sense is
refused there. `Guard` is a `splitfl.link.TrunkLink` around the session: it applies the mechanisms, books each release
*before* its bytes leave, and hands the coded tensor on. A retry below it sends the same bytes and books nothing.

When is there a formal claim? Noise of known size on a clipped tensor bounds what that tensor tells about its own row,
as long as the weights that made it depend on no row. A bottom that is being trained, and a top whose gradients are
sent, do depend on other rows. So only rows that pass a frozen bottom, with no gradient after them, carry one
(`guarded-gradfree`). Everything else is reported as empirical, however much noise there is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any
from typing import Protocol as Shape

import torch

from party.bookkeeping import Book
from protocols import Protocol
from splitfl.config_privacy import ProtectionSettings
from splitfl.cut import Plan
from splitfl.data import Example
from splitfl.errors import UsageError
from splitfl.link import TrunkLink, TrunkRequest
from splitfl.privacy.mechanisms import (
    Chain,
    DChi,
    Gauss,
    GradientGauss,
    Mechanism,
    Quantise,
    TopK,
    marvell,
    max_norm,
)
from splitfl.wire.coding import Coded, encode_grid16, encode_int4, encode_int8, encode_topk
from splitfl.wire.messages import CodingName

if TYPE_CHECKING:
    from party.outbox import Outbox


@dataclass(frozen=True, kw_only=True)
class Protection:
    """Everything that a run does to what it sends."""

    hidden: Mechanism | None = None
    gradient: Mechanism | None = None
    hidden_coding: CodingName = "raw"
    gradient_coding: CodingName = "raw"
    trains_bottom: bool = True
    decorrelate: float = 0.0
    label_noise: str = "none"
    label_power: float = 4.0
    hide_lengths: bool = False
    formal: bool = False
    """Whether the noise on activations carries a formal claim for every row."""
    because: str = "nothing is added to what is sent"
    """Why it does not."""

    @property
    def gauss(self) -> Gauss | None:
        """The Gaussian mechanism on activations, if there is one."""
        return self.hidden if isinstance(self.hidden, Gauss) else None


def plan_protection(
    settings: ProtectionSettings, plan: Plan, protocol: Protocol, *, sigma: float | None,
    table: torch.Tensor | None = None, classes: int | None = None,
) -> Protection:  # fmt: skip
    """Mechanisms for this model, cut and protocol.

    Args:
        settings: as given.
        plan: of the kit.
        protocol: of the run.
        sigma: of the Gaussian noise, given or calibrated; None without one.
        table: input embeddings [V, D], for ``snap``.
        classes: of a classifier.

    Raises:
        UsageError: a mechanism that this model, cut or protocol has no place for; names the nearest right setting.
    """
    trains_bottom = protocol.trains_bottom and not settings.freeze_bottom
    _check_fit(settings, plan, protocol, classes)
    quantise = protocol.quantise if settings.quantise is None else settings.quantise
    if settings.quantise is None and settings.keep_largest is not None:
        quantise = "none"  # the protocol's own choice gives way to what was asked for
    on_hidden = "none" if settings.noise == "gauss" else quantise  # noise goes out on a grid of its own
    decorrelate = protocol.decorrelate if settings.decorrelate is None else settings.decorrelate
    hidden = _hidden_mechanism(settings, on_hidden, sigma, table)
    gradient = _gradient_mechanism(settings, quantise) if protocol.sends_gradients else None
    formal, because = _claim(settings, protocol, trains_bottom=trains_bottom)
    return Protection(
        hidden=hidden,
        gradient=gradient,
        hidden_coding=_coding_of(settings, on_hidden, noisy=settings.noise == "gauss"),
        gradient_coding=_coding_of(settings, quantise, noisy=settings.gradient_sigma is not None)
        if protocol.sends_gradients
        else "raw",
        trains_bottom=trains_bottom,
        decorrelate=decorrelate if trains_bottom else 0.0,
        label_noise=settings.label_noise,
        label_power=settings.label_power,
        hide_lengths=settings.hide_lengths,
        formal=formal,
        because=because,
    )


def _check_fit(settings: ProtectionSettings, plan: Plan, protocol: Protocol, classes: int | None) -> None:
    trains_bottom = protocol.trains_bottom and not settings.freeze_bottom
    if settings.unit == "token" and plan.bottom > 0:
        raise UsageError(
            f"--unit token at a cut above layer {plan.bottom}: there every position holds something of all tokens "
            "before it, so noise for one token bounds none.",
            hint="use --unit record, or a kit with --bottom 0",
        )
    if settings.snap and plan.bottom > 0:
        raise UsageError(
            "--snap replaces a token's embedding, and this kit is cut above the embeddings.",
            hint="leave --snap out, or use a kit with --bottom 0",
        )
    if not protocol.sends_gradients:
        for name in ("gradient_clip", "gradient_sigma", "label_epsilon"):
            if getattr(settings, name) is not None:
                flag = "--" + name.replace("_", "-")
                raise UsageError(
                    f"{flag} with protocol {protocol.name!r}: it sends no gradient, and nothing of a label.",
                    hint=f"leave {flag} out",
                )
        if settings.label_noise != "none":
            raise UsageError(f"--label-noise with protocol {protocol.name!r}: it sends no gradient.")
    if settings.decorrelate and not trains_bottom:
        raise UsageError(
            "--decorrelate trains the bottom, which this run keeps as it is.",
            hint="leave it out, or use protocol guarded-online",
        )
    if plan.task != "sequence-classification" and (settings.label_noise != "none" or settings.label_epsilon):
        raise UsageError(
            "--label-noise and --label-epsilon are for classes; in a language model the labels are the text.",
            hint="use --gradient-clip and --gradient-sigma, or protocol guarded-gradfree",
        )
    if settings.label_noise == "marvell" and classes not in (None, 2):
        raise UsageError(
            f"--label-noise marvell is for two classes, and this kit has {classes}.", hint="use --label-noise max-norm"
        )
    if settings.epsilon is not None and not _claim(settings, protocol, trains_bottom=trains_bottom)[0]:
        reason = _claim(settings, protocol, trains_bottom=trains_bottom)[1]
        raise UsageError(
            f"--epsilon {settings.epsilon:g} cannot be promised with protocol {protocol.name!r}: {reason}.",
            hint="use protocol guarded-gradfree, or give the noise as --sigma and read the result as empirical",
        )
    _check_lengths(settings, plan, protocol)


def _check_lengths(settings: ProtectionSettings, plan: Plan, protocol: Protocol) -> None:
    if settings.hide_lengths and settings.noise != "gauss":
        raise UsageError(
            "--hide-lengths without noise: padding can be told from text by its activations.",
            hint="add --noise gauss, or leave it out",
        )
    if settings.hide_lengths and protocol.sends_gradients and settings.gradient_sigma is None:
        raise UsageError(
            "--hide-lengths without noise on gradients: those of the padding are zero, which tells every length.",
            hint="add --gradient-clip and --gradient-sigma, or use protocol guarded-gradfree",
        )
    if settings.hide_lengths and plan.task != "causal-lm":
        raise UsageError(
            "--hide-lengths pads without a mask, and only a causal model is blind to what comes after a row.",
            hint="leave it out: the lengths of rows cross in the mask",
        )


def _claim(settings: ProtectionSettings, protocol: Protocol, *, trains_bottom: bool) -> tuple[bool, str]:
    if settings.noise == "dchi":
        return False, "dchi noise promises something that shrinks with distance, which is no differential privacy"
    if settings.noise != "gauss":
        return False, "no noise is added to what is sent"
    if trains_bottom:
        return False, "what is sent of one row passes layers that other rows have trained"
    if protocol.sends_gradients:
        return False, "this protocol lets gradients cross, and they come from a top that other rows have trained"
    return True, ""


def _hidden_mechanism(
    settings: ProtectionSettings, quantise: str, sigma: float | None, table: torch.Tensor | None
) -> Mechanism | None:
    steps: list[Mechanism] = []
    if settings.noise == "gauss":
        assert settings.clip is not None  # noqa: S101  the settings saw to it
        assert sigma is not None  # noqa: S101
        return Gauss(clip=settings.clip, sigma=sigma, unit=settings.unit or "record")
    if settings.noise == "dchi":
        assert settings.eta is not None  # noqa: S101
        steps.append(DChi(eta=settings.eta, table=table if settings.snap else None))
    return _with_coding(settings, quantise, steps)


def _gradient_mechanism(settings: ProtectionSettings, quantise: str) -> Mechanism | None:
    if settings.gradient_clip is not None and settings.gradient_sigma is not None:
        return GradientGauss(clip=settings.gradient_clip, sigma=settings.gradient_sigma)
    return _with_coding(settings, quantise, [])


def _with_coding(settings: ProtectionSettings, quantise: str, steps: list[Mechanism]) -> Mechanism | None:
    if settings.keep_largest is not None:
        steps.append(TopK(kept=settings.keep_largest))
    elif quantise != "none":
        steps.append(Quantise(bits=8 if quantise == "int8" else 4))
    if not steps:
        return None
    return steps[0] if len(steps) == 1 else Chain(tuple(steps))


def _coding_of(settings: ProtectionSettings, quantise: str, *, noisy: bool) -> CodingName:
    if noisy:
        return "grid16"
    if settings.keep_largest is not None:
        return "topk"
    return "raw" if quantise == "none" else "int8" if quantise == "int8" else "int4"


@dataclass(frozen=True, kw_only=True)
class BatchRows:
    """Which rows the next tensors come from; set by whoever made the batch."""

    dataset: str
    """Fingerprint of the rows."""
    rows: tuple[int, ...]
    """Numbers of the examples, from 0."""
    labels: torch.Tensor | None = None
    """Classes [B], where a mechanism needs them."""


@dataclass(frozen=True, kw_only=True)
class Outgoing(TrunkRequest):
    """A request as a guard lets it go. Copies of it, such as an owner check makes, do not say so of themselves."""

    made_of: BatchRows | None = field(init=False, default=None)
    """The rows that it was made of, where whoever made the batch said so."""
    is_of_rows: bool = field(init=False, default=False)

    @classmethod
    def of(cls, request: TrunkRequest, batch: BatchRows | None) -> Outgoing:
        """`request`, made of a batch of rows."""
        made = cls(**{each.name: getattr(request, each.name) for each in fields(request)})
        object.__setattr__(made, "made_of", batch)
        object.__setattr__(made, "is_of_rows", True)
        return made


class HasBatch(Shape):
    """Where a `RowTracker` leaves its word."""

    batch: BatchRows | None


class Guard:
    """A `splitfl.link.TrunkLink` that lets nothing past which is not protected and booked.

    Args:
        link: the session, or what checks the owner in front of it.
        protection: what to do.
        book: where releases are booked; None where nothing leaves the process.
    """

    def __init__(self, link: TrunkLink, protection: Protection, book: Book | None) -> None:
        self.link, self.protection, self.book = link, protection, book
        self.batch: BatchRows | None = None
        """Rows of the batch under way; None where the caller does not say: then every row is booked."""
        self.outbox: Outbox | None = None  # in a run that draws noise, and may have to be resumed
        self._kept: dict[int, tuple[torch.Tensor | None, BatchRows | None]] = {}

    def forward(self, request: TrunkRequest) -> tuple[torch.Tensor, int]:
        """See `splitfl.link.TrunkLink`."""
        assert isinstance(request.hidden, torch.Tensor)  # noqa: S101  nothing is protected twice
        mask = None if request.mask is None else request.mask[:, -request.hidden.shape[1] :]
        batch = self.batch  # another micro-batch may have its turn before the answer comes
        sent, name = self._sent("activations", batch, x := request.hidden, lambda: self.protect_hidden(x, mask))
        booked = self._book(
            "activations", self.protection.hidden, batch, formal=self.protection.formal, release_id=name
        )
        output, step = self.link.forward(self.outgoing(request, sent))
        self._confirm(booked)
        if request.keep:
            self._kept[step] = mask, batch
        return output, step

    def protect_hidden(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | Coded:
        """What is sent for `hidden` [B, T, D]; `mask` [B, T] is 1 where there is a token."""
        mechanism = self.protection.hidden
        return hidden if mechanism is None else mechanism.protect(hidden, mask)

    def outgoing(self, request: TrunkRequest, sent: torch.Tensor | Coded) -> TrunkRequest:
        """The request as it leaves: with what was made of its hidden state, and without what shall not be told."""
        shown = None if self.protection.hide_lengths else request.mask
        return Outgoing.of(replace(request, hidden=sent, mask=shown), self.batch)

    def backward(self, step: int, gradient: torch.Tensor | Coded) -> torch.Tensor:
        """See `splitfl.link.TrunkLink`."""
        assert isinstance(gradient, torch.Tensor)  # noqa: S101
        mask, batch = self._kept.pop(step, (None, None))
        label_noise = None if self.protection.label_noise == "none" else self.protection.label_noise
        mechanism = self.protection.gradient

        def make() -> torch.Tensor | Coded:
            hiding = gradient if label_noise is None else self._hide_labels(gradient, batch)
            return hiding if mechanism is None else mechanism.protect(hiding, mask)

        sent, name = self._sent("gradients", batch, gradient, make)
        booked = self._book("gradients", mechanism, batch, formal=False, before=label_noise, release_id=name)
        result = self.link.backward(step, sent)
        self._confirm(booked)
        return result

    def _book(self, channel: str, mechanism: Mechanism | None, batch: BatchRows | None, **more: Any) -> list[str]:
        return [] if self.book is None else self.book.charge(channel, mechanism, batch, **more)

    def _sent(
        self, channel: str, batch: BatchRows | None, x: torch.Tensor, make: Callable[[], torch.Tensor | Coded]
    ) -> tuple[torch.Tensor | Coded, str | None]:
        return (make(), None) if self.outbox is None else self.outbox.sent(channel, batch, x, make)

    def _confirm(self, booked: list[str]) -> None:
        if self.book is not None:
            self.book.confirm(booked)

    def release(self, *, caches: tuple[int, ...] = (), steps: tuple[int, ...] = ()) -> None:
        """See `splitfl.link.TrunkLink`."""
        for step in steps:
            self._kept.pop(step, None)
        self.link.release(caches=caches, steps=steps)

    def _hide_labels(self, gradient: torch.Tensor, batch: BatchRows | None) -> torch.Tensor:
        if self.protection.label_noise == "max-norm":
            return max_norm(gradient)
        if batch is None or batch.labels is None:
            raise UsageError(
                "--label-noise marvell needs to know the labels of a batch, and this trainer does not tell them.",
                hint="use --label-noise max-norm",
            )
        return marvell(gradient, batch.labels, self.protection.label_power)


class RowTracker:
    """Tells a guard, or kept replies, which rows each batch holds.

    Args:
        target: has an attribute `batch`.
        train: fingerprint of the training rows.
        held_out: fingerprint of the held-out rows.
        labels: whether labels are classes, which some mechanisms need.
    """

    def __init__(self, target: HasBatch, *, train: str, held_out: str | None = None, labels: bool = False) -> None:
        self.target, self.train, self.held_out, self.labels = target, train, held_out, labels

    def training(self, batch: dict[str, torch.Tensor]) -> None:
        """Take the row numbers out of a collated training batch: the model would not know what to do with them."""
        self._take(batch, self.train)

    def scoring(self, batch: dict[str, torch.Tensor]) -> None:
        """The same for a batch of held-out rows."""
        self._take(batch, self.held_out or self.train)

    def _take(self, batch: dict[str, torch.Tensor], dataset: str) -> None:
        rows = batch.pop("row", None)
        labels = batch.get("labels") if self.labels else None
        self.target.batch = (
            None if rows is None else BatchRows(dataset=dataset, rows=tuple(rows.tolist()), labels=labels)
        )


def numbered(examples: Sequence[Example]) -> list[Example]:
    """The examples with their numbers, which the collator passes on and a `RowTracker` takes out again."""
    return [{**example, "row": number} for number, example in enumerate(examples)]


def coder(protection: Protection) -> Callable[[torch.Tensor], torch.Tensor | Coded]:
    """How a tensor that was not made by the mechanism is written for this session: for checks of the owner."""
    mechanism = protection.hidden
    if isinstance(mechanism, Gauss):
        step = mechanism.step
        return lambda x: encode_grid16(torch.round(x / step).to(torch.int32), step)
    match protection.hidden_coding:
        case "int8":
            return encode_int8
        case "int4":
            return encode_int4
        case "topk":
            last = mechanism.mechanisms[-1] if isinstance(mechanism, Chain) else mechanism
            assert isinstance(last, TopK)  # noqa: S101
            return lambda x: encode_topk(x, last.kept)
    return lambda x: x
