"""Tuning without the owner: the party's model with an emulator of the trunk in the middle (protocol `guarded-offline`).

Kit and emulator are checked against each other and make one ordinary, frozen model; LoRA goes on bottom and top, under
the names of the whole model. No session is opened, but to fetch an emulator where none was given (`party.fetch`). What
leaves later is the adapter, so that is what is booked: once, before it is written, in the ledger's account of adapters.
With DP-SGD (`party.private_sgd`) the entry carries a bound.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from transformers import PreTrainedModel

from party.bookkeeping import Book, DataSet, keep_name
from party.fetch import obtain
from party.model import check_device, resolve_dtype
from party.opening import Preparation, say
from party.protect import BatchRows, Protection, RowTracker
from party.rundir import RunDirectory
from party.workplace import Counted, Workplace
from protocols import protocol_named
from splitfl.adapter_check import stored
from splitfl.adapters import adapter_digest, add_lora, lora_config, tuned_parameters
from splitfl.config import TuneSettings
from splitfl.emulator import Emulator, check_belongs, open_emulator
from splitfl.errors import UsageError
from splitfl.files import replace_text
from splitfl.kit import DTYPES, Kit
from splitfl.load import layer_of, parameter_count
from splitfl.metrics import RunLog
from splitfl.privacy import calibration
from splitfl.privacy.ledger import Release
from splitfl.report import as_size

if TYPE_CHECKING:
    from party.private_plan import PrivatePlan
    from party.tune import Data

WITH_EMULATOR = "with the emulator"
"""Stands beside every figure of such a run."""
ADVERSARY = "whoever gets the adapter"
_NO_BOUND = "it is tuned on the rows without any noise"
_DP_FILE = "dp-sgd.json"
_HARMLESS_ARGUMENTS = {"adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "lr_scheduler_kwargs"}


@dataclass(frozen=True, kw_only=True)
class OfflinePreparation(Preparation):
    """What an offline run trains on and what its adapter promises, settled before anything is trained."""

    emulator: Emulator
    private: PrivatePlan | None = None
    fetched: Counted = field(default_factory=Counted)
    """What it took to get the emulator."""

    def show(self) -> None:
        """Say what leaves, and under which bound."""
        say("nothing is sent while this run trains; what leaves later is the adapter")
        wide = max(len(label) for label, _ in self.preview)
        for label, text in self.preview:
            say(f"{label:{wide}}  {text}")

    @property
    def bounds(self) -> dict[tuple[str, str], str]:
        """No tensor is sent; the adapter's bound stands in ``disclosure.json`` by itself."""
        return {}


def plan_offline(settings: TuneSettings, kit: Kit, train: DataSet) -> OfflinePreparation:
    """Open the emulator, which may have to be fetched first, and work out the noise of DP-SGD if it was asked for.

    Raises:
        ModelError: no emulator, a damaged one, or one for another kit.
        UsageError: settings that an offline run, or DP-SGD, has no place for; an extra that is not installed.
        ResourceError, PeerError: the emulator could not be fetched.
    """
    if settings.bias == "all":
        raise UsageError(
            "--bias all would tune the emulator's biases too, and the full model has others in their place.",
            expected="--bias none or lora_only",
        )
    private = plan_bound(settings, train) if settings.dp_sgd else None
    if settings.emulator is not None:
        emulator, fetched = find_emulator(settings, kit), Counted()
    else:
        emulator, fetched = obtain(settings, kit)
    claim = private.claim if private else calibration.Claim(
        mechanism="plain training", channel="the adapter", unit="record", adversary=ADVERSARY, releases_planned=1,
        formal=False, because=_NO_BOUND,
    )  # fmt: skip
    return OfflinePreparation(
        protocol=protocol_named(settings.protocol),
        protection=Protection(trains_bottom=not settings.freeze_bottom, because="nothing is sent"),
        claim=claim,
        preview=(*(private.lines() if private else []), *calibration.preview(claim)),
        emulator=emulator,
        private=private,
        fetched=fetched,
    )


def find_emulator(settings: TuneSettings, kit: Kit) -> Emulator:
    """The emulator that the settings name, whole and made for this kit.

    Raises:
        ModelError: it is not.
    """
    assert settings.emulator is not None  # noqa: S101  the settings saw to it
    emulator = open_emulator(settings.emulator)
    check_belongs(emulator.plan, kit)
    return emulator


def plan_bound(settings: TuneSettings, train: DataSet) -> PrivatePlan:
    """The noise that the settings ask for: of this run's own steps, or of all rounds of a federation.

    Raises:
        UsageError: settings under which the bound would not hold; the extra is not installed.
    """
    _module("party.private_sgd")  # whether it can be had is known before there is a run
    if settings.federate is not None:
        federated: PrivatePlan = _module("party.federated_private").plan_federated(settings, train)
        return federated
    check_private(settings)
    assert settings.dp_clip is not None  # noqa: S101
    assert settings.dp_delta is not None  # noqa: S101
    plan: PrivatePlan = _module("party.private_plan").plan_private(
        units=train.units,
        unit=train.unit,
        batch=settings.per_device_train_batch_size * settings.gradient_accumulation_steps,
        max_steps=settings.max_steps,
        epochs=settings.num_train_epochs,
        clip=settings.dp_clip,
        delta=settings.dp_delta,
        noise_multiplier=settings.dp_noise_multiplier,
        epsilon=settings.dp_epsilon,
        freeze_a=settings.dp_freeze_a,
    )
    return plan


def _module(name: str) -> Any:
    """A module of ours that needs the extra."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("opacus", "dp_accounting"):
            raise
        raise UsageError(
            f"DP-SGD needs {error.name}, which is not installed.", hint="pip install 'splitfl[dp,privacy]'"
        ) from error


def check_private(settings: TuneSettings) -> None:
    """Refuse whatever would make the gradient of one row depend on another, or train past the noise."""
    if settings.padding_side == "left":
        raise UsageError(
            "--padding-side left with DP-SGD: a row's positions, and so its gradient, would depend on the longest row "
            "beside it.",
            hint="use --padding-side right",
        )
    for flag, asked in (("--use-dora", settings.use_dora), (f"--bias {settings.bias}", settings.bias != "none")):
        if asked:
            raise UsageError(
                f"{flag} with DP-SGD: gradients by row are known for the two LoRA matrices and a new head alone.",
                hint="leave it out",
            )
    for pair in settings.training_args:
        name = pair.partition("=")[0].strip().replace("-", "_")
        if name not in _HARMLESS_ARGUMENTS:
            raise UsageError(
                f"--training-args {name} with DP-SGD: whether the bound would still hold is not known.",
                expected=", ".join(sorted(_HARMLESS_ARGUMENTS)),
            )


def emulated_model(settings: TuneSettings, kit: Kit, emulator: Emulator) -> PreTrainedModel:
    """Bottom, emulator and top as one frozen model, on the settings' device."""
    model = emulator.load(kit, DTYPES[resolve_dtype(kit, settings.dtype)])
    model.name_or_path = str(kit.path)  # not the folder it was put together in: PEFT looks there for a config file
    return model.to(check_device(settings.device))


@contextlib.contextmanager
def train_offline(
    settings: TuneSettings, kit: Kit, run: RunDirectory, data: Data, preparation: OfflinePreparation, book: Book
) -> Iterator[Workplace]:
    """The model to train, and what stands ready to book its adapter; see `party.workplace.open_workplace`."""
    private, train = preparation.private, data.train_set
    book.ledger.check_run(book.run, train.fingerprint)
    release = partial(_release, private, train, book.run, _rho(private))
    book.ledger.check(release("planned"))
    _check_resumed(settings, run, private)
    model = _adapted(settings, kit, preparation.emulator, private)
    _begin(settings, run, preparation, book)

    def charge(tuned: PeftModel) -> None:
        # The same bytes are the same release, however often the end of a run is repeated.
        book.ledger.charge(release(adapter_digest(stored(tuned))))

    with RunLog(run.log) as log:
        kept = preparation.emulator.plan
        log.write("emulator", kept=list(kept.kept), distilled_steps=kept.distilled_steps, parameters=kept.parameters)
        yield Workplace(
            model=model,
            tracker=untracked(data.train_set, data.held_out_set),
            traffic=preparation.fetched,
            log=log,
            release=charge,
            measured=f" ({WITH_EMULATOR})",
            **private_loop(settings, data, private),
        )


def private_loop(settings: TuneSettings, data: Data, private: PrivatePlan | None) -> dict[str, Any]:
    """The trainer and the training arguments, where they are not the usual ones."""
    if private is None:
        return {}
    sgd = _module("party.private_sgd")
    trainer = partial(
        sgd.PrivateTrainer,
        private=private,
        units=data.train_set.units,
        rows_at_once=settings.per_device_train_batch_size,
    )
    return {"trainer": trainer, "arguments": sgd.training_arguments(private)}


def _adapted(settings: TuneSettings, kit: Kit, emulator: Emulator, private: PrivatePlan | None) -> PeftModel:
    """The model with fresh adapters on bottom and top, and on nothing of the emulator."""
    base = emulated_model(settings, kit, emulator)
    asked = {**settings.lora_kwargs(), "target_modules": list(settings.target_modules) or None}
    config = lora_config(base, kit.plan, **asked, top_alone=settings.freeze_bottom)
    model = add_lora(base, config, seed=settings.seed)
    if private is not None and private.freeze_a:
        _module("party.private_sgd").freeze_a(model)
    names = [name.removeprefix("base_model.model.") for name, _ in tuned_parameters(model)]
    assert not any(layer_of(name, kit.plan) in kit.plan.trunk_layers for name in names)  # noqa: S101
    trained = sum(p.numel() for _, p in tuned_parameters(model))
    say(
        f"model: {kit.plan.model_type}, layers {kit.plan.party_layers} of the kit, {list(emulator.plan.kept)} of the "
        f"emulator ({as_size(emulator.bytes)}); {trained:,} of {parameter_count(model):,} parameters are tuned"
    )
    if private is not None:
        ratio = private.expected / (private.noise_multiplier * math.sqrt(trained))
        say(f"the noise on a step's whole gradient is {1 / ratio:.3g} times as long as the gradient can be at most")
    return model


def _begin(settings: TuneSettings, run: RunDirectory, preparation: OfflinePreparation, book: Book) -> None:
    """The run directory; nothing may be refused for its settings any more."""
    run.prepare(dataclasses.replace(settings, emulator=preparation.emulator.path))  # a fetched one is remembered
    path = run.path / "disclosure.json"
    told = json.loads(path.read_text(encoding="utf-8"))
    told["adapter"] = {
        "direction": "party to owner" if settings.federate is None else "party to coordinator",
        "content": "LoRA weights of bottom and top (with a classifier, its head), tuned on the rows",
        "how_often": "once, by hand, after the run"
        if settings.federate is None
        else "in every round of the federation",
        "bound": preparation.claim.sentence(),
    }
    replace_text(path, json.dumps(told, indent=2) + "\n")
    if preparation.private is not None:
        replace_text(run.path / _DP_FILE, json.dumps(_kept(preparation.private), indent=2) + "\n")
    keep_name(run.path, book.run)
    run.drop_unfinished()
    say("no owner is needed from here on")


# ---- the one release


def _rho(private: PrivatePlan | None) -> float | None:
    if private is None:
        return None
    rho: float = _module("party.private_plan").adapter_rho(private.noise_multiplier, private.sample_rate, private.steps)
    return rho


def _release(private: PrivatePlan | None, train: DataSet, run: str, rho: float | None, name: str) -> Release:
    """The adapter as a release of every unit: whether one was in a batch nobody shall know."""
    return Release(
        release_id=f"adapter:{run}:{name}",
        dataset=train.fingerprint,
        unit=train.unit,
        units=None,
        channel="adapter",
        mechanism="none" if private is None else private.mechanism,
        sensitivity=None,  # rho comes from all steps together, not from one sensitivity and one sigma
        sigma=None,
        rho=rho,
        adversary=ADVERSARY,
        run=run,
    )


def _kept(private: PrivatePlan) -> dict[str, Any]:
    """What all steps of a run must have in common for its bound to hold."""
    names = ("noise_multiplier", "clip", "sample_rate", "unit", "freeze_a")
    return {name: getattr(private, name) for name in names}


def _check_resumed(settings: TuneSettings, run: RunDirectory, private: PrivatePlan | None) -> None:
    """Refuse to go on under another noise than the steps that are done.

    Raises:
        UsageError: the run was begun with other settings of DP-SGD, or without it.
    """
    if not settings.resume:
        return
    path = run.path / _DP_FILE
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    now = None if private is None else _kept(private)
    if before != now:
        other = ["whether there is DP-SGD at all"]
        if before is not None and now is not None:
            other = [name for name in now if before.get(name) != now[name]]
        raise UsageError(
            f"The steps that this run has made were not made under the DP-SGD that is asked for now: other are "
            f"{', '.join(other)}.",
            expected="the settings that the run began with (with --dp-epsilon the number of steps belongs to them)",
            hint="resume with those, or begin another run with --out",
        )


# ---- rows that go nowhere


class _Nowhere:
    """Where a `RowTracker` leaves which rows a batch holds, when nobody has to know."""

    batch: BatchRows | None = None


def untracked(train: DataSet, held_out: DataSet | None = None) -> RowTracker:
    """A tracker that takes the row numbers out of batches, and that is all."""
    return RowTracker(_Nowhere(), train=train.fingerprint, held_out=held_out.fingerprint if held_out else None)
