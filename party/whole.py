"""Training where a party holds the whole model itself (protocol `fed-params`): nothing of a row leaves; updates do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from peft import PeftModel
from transformers import PreTrainedModel

from party.bookkeeping import Book, DataSet, keep_name
from party.dp_lora import WITHHELD, Literal, LiteralTrainer, check_literal, literal_preview
from party.model import check_device, resolve_dtype
from party.offline import plan_bound, private_loop, untracked
from party.opening import Preparation, say
from party.protect import Protection
from party.rundir import RunDirectory
from party.workplace import Counted, Workplace
from protocols import protocol_named
from splitfl.adapters import add_lora, lora_config
from splitfl.config import TuneSettings
from splitfl.cut import Plan
from splitfl.kit import DTYPES, Kit
from splitfl.load import model_class, parameter_count, quiet_library
from splitfl.metrics import RunLog
from splitfl.privacy import calibration

if TYPE_CHECKING:
    from party.private_plan import PrivatePlan
    from party.tune import Data


@dataclass(frozen=True, kw_only=True)
class WholePreparation(Preparation):
    """What a run on the whole model promises about its updates."""

    private: PrivatePlan | None = None

    def show(self) -> None:
        """Say what leaves, and under which bound."""
        what = "answers of the tuned model to public rows" if self.protocol.distils else "updates of the adapter"
        say(f"no tensor of a row is sent; what leaves are {what}")
        wide = max((len(label) for label, _ in self.preview), default=0)
        for label, text in self.preview:
            say(f"{label:{wide}}  {text}")

    @property
    def bounds(self) -> dict[tuple[str, str], str]:
        """No tensor of a row is sent."""
        return {}


def plan_whole(settings: TuneSettings, kit: Kit, train: DataSet) -> WholePreparation:
    """What such a run promises: nothing is sent of a row; with DP-SGD, a bound on what updates tell.

    Raises:
        UsageError: settings under which a bound would not hold, or that a preset has no place for.
    """
    private = plan_bound(settings, train) if settings.dp_sgd else None
    if settings.preset is not None:
        check_literal(settings, kit)
    because = "it is tuned on the rows without any noise"
    if settings.sum_noise is not None:
        because = "noise is on the sums alone"
    elif settings.preset is not None:
        because = WITHHELD.removeprefix("epsilon: none; ")
    claim = private.claim if private else calibration.Claim(
        mechanism="plain training" if settings.preset is None else f"dp-lora, {settings.preset}",
        channel="each update", unit="record", adversary="whoever sees an update", releases_planned=1, formal=False,
        because=because,
    )  # fmt: skip
    said = settings.sum_noise is None
    return WholePreparation(
        protocol=protocol_named(settings.protocol),
        protection=Protection(trains_bottom=True, because="nothing is sent of a row"),
        claim=claim,
        # The bound on the sums is told where the rule is known, in `party.federated_bound_of`.
        preview=(*(private.lines() if private else []), *(calibration.preview(claim) if said else [])),
        private=private,
    )


@contextlib.contextmanager
def train_whole(
    settings: TuneSettings, kit: Kit, run: RunDirectory, data: Data, preparation: Preparation, book: Book
) -> Iterator[Workplace]:
    """The whole model with LoRA on every layer; see `party.workplace.open_workplace`."""
    assert settings.model is not None  # noqa: S101  the settings saw to it
    book.ledger.check_run(book.run, data.train_set.fingerprint)
    model = whole_with_lora(settings, kit, Path(settings.model))
    tuned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"model: {kit.plan.model_type}, all {kit.plan.layers} layers here; {tuned:,} of {parameter_count(model):,} "
        "parameters are tuned")  # fmt: skip
    if settings.preset is not None:
        in_a = sum(p.numel() for name, p in model.named_parameters() if ".lora_A." in name)
        for label, text in literal_preview(settings, in_a):
            say(f"{label:12}  {text}")
    run.prepare(settings, {})
    keep_name(run.path, book.run)
    with RunLog(run.log) as log:
        yield Workplace(
            model=model,
            tracker=untracked(data.train_set, data.held_out_set),
            traffic=Counted(),
            log=log,
            **_loop(settings, data, preparation, log),
        )


def _loop(settings: TuneSettings, data: Data, preparation: Preparation, log: RunLog) -> dict[str, Any]:
    """The trainer and the training arguments, where they are not the usual ones."""
    assert isinstance(preparation, WholePreparation)  # noqa: S101  `plan_whole` made it
    if settings.preset is not None:
        return {"trainer": partial(LiteralTrainer, literal=Literal.of(settings.preset), log=log)}
    return private_loop(settings, data, preparation.private)


def whole_with_lora(settings: TuneSettings, kit: Kit, model_dir: Path, plan: Plan | None = None) -> PeftModel:
    """The model in one piece with LoRA on the layers that the plan gives to a party; without one, on all of them."""
    whole = whole_model(settings, kit, model_dir)
    targets = list(settings.target_modules) or None
    chosen = {**settings.lora_kwargs(), "target_modules": targets}
    return add_lora(whole, lora_config(whole, plan or everywhere(kit.plan), **chosen), seed=settings.seed)


def whole_model(settings: TuneSettings, kit: Kit, model_dir: Path) -> PreTrainedModel:
    """The model in one piece, frozen, on the settings' device; a head that it lacks is the kit's."""
    dtype = DTYPES[resolve_dtype(kit, settings.dtype)]
    with quiet_library():
        whole, info = model_class(kit.config, kit.plan.task).from_pretrained(
            model_dir,
            config=kit.config,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        fresh = set(info["missing_keys"]) | {str(entry[0]) for entry in info["mismatched_keys"]}
        drawn = {name: tensor for name, tensor in kit.load(dtype).state_dict().items() if name in fresh}
    whole.load_state_dict(drawn, strict=False)
    whole.requires_grad_(False)
    whole.config.use_cache = False
    moved: PreTrainedModel = whole.to(check_device(settings.device))
    return moved


def everywhere(plan: Plan) -> Plan:
    """The plan, had a party all the layers."""
    return msgspec.structs.replace(plan, bottom=plan.layers, top=0)
