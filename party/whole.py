"""Training where a party holds the whole model itself (protocol `fed-params`): nothing of a row leaves; updates do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from peft import PeftModel

from party.bookkeeping import Book, keep_name
from party.model import check_device, resolve_dtype
from party.offline import untracked
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
    from party.tune import Data


def plan_whole(settings: TuneSettings) -> Preparation:
    """What such a run promises about rows: nothing is sent of them, and nothing bounds what updates tell."""
    claim = calibration.Claim(
        mechanism="plain training", channel="the adapter", unit="record",
        adversary="whoever sees an update or the sum", releases_planned=1, formal=False,
        because="it is tuned on the rows without any noise",
    )  # fmt: skip
    return Preparation(
        protocol=protocol_named(settings.protocol),
        protection=Protection(trains_bottom=True, because="nothing is sent of a row"),
        claim=claim,
        preview=tuple(calibration.preview(claim)),
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
    run.prepare(settings, {})
    keep_name(run.path, book.run)
    with RunLog(run.log) as log:
        yield Workplace(model=model, tracker=untracked(data.train_set, data.held_out_set), traffic=Counted(), log=log)


def whole_with_lora(settings: TuneSettings, kit: Kit, model_dir: Path, plan: Plan | None = None) -> PeftModel:
    """The model in one piece with LoRA on the layers that the plan gives to a party; without one, on all of them."""
    plan = plan or everywhere(kit.plan)
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
    targets = list(settings.target_modules) or None
    config = lora_config(whole, plan, **{**settings.lora_kwargs(), "target_modules": targets})
    return add_lora(whole.to(check_device(settings.device)), config, seed=settings.seed)


def everywhere(plan: Plan) -> Plan:
    """The plan, had a party all the layers."""
    return msgspec.structs.replace(plan, bottom=plan.layers, top=0)
