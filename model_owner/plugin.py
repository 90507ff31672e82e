"""`splitfl plugin`: check adapters that came back, plug them into the full model, measure it, write it out.

Read from top to bottom. Nothing is written before everything was checked and measured, and nothing but OUT is: the
owner's model and kit are only read. What comes out is an adapter of the kit's layers, so a party puts it on its side of
the cut and the trunk is served as it is.

Several adapters are combined by stacking (FLoRA, Wang et al. 2024): with A the A_i below each other and B the
w_i s_i B_i beside each other, B A is the weighted mean of the s_i B_i A_i, which the product of the factors' means is
not. Ranks add up; each value of B is rounded once. What is stored whole (bias, head) is averaged. DoRA divides by a
norm, so several such adapters are refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

from model_owner.adapter_check import Adapter, check_adapter, fresh, measured_change, plug_in, stored
from splitfl.adapters import lora_config, save_adapter
from splitfl.config_offsite import PluginSettings
from splitfl.cut import Task
from splitfl.data import Collator, Examples, load_rows, tokenise
from splitfl.emulator import check_out
from splitfl.errors import ModelError, ResourceError, UsageError
from splitfl.kit import DTYPES, Kit, open_kit
from splitfl.load import fingerprint_trunk, load_config, load_party_side
from splitfl.metrics import Result, write_results

_UNITS = {"loss": "nats", "accuracy": "share"}
_WITHOUT_LIMIT = 2048  # tokens of a row, where the model's positions have no end


class Figures(Protocol):
    """What an evaluator finds."""

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood."""

    def facts(self) -> dict[str, Any]:
        """All figures by name."""


class Evaluator(Protocol):
    """Measures a model on rows. It is the party's, and given from outside: the two sides do not import each other."""

    def __call__(
        self, model: nn.Module, examples: Sequence[dict[str, Any]], collator: Collator, *, task: Task, batch_size: int,
        device: str,
    ) -> Figures:  # fmt: skip
        """The figures over all examples."""


def plugin(settings: PluginSettings, evaluate: Evaluator) -> None:
    """Do what the settings say, and print it.

    Raises:
        ModelError: the kit is of another model, an adapter is not one of the kit, or `out` holds something.
        UsageError: adapters that cannot be combined.
        DataError: rows that cannot be read.
        ResourceError: a device that this machine lacks.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if settings.out is not None:
        check_out(settings.out)
    check_device(settings.device)
    folder = Path(settings.model)
    kit = kit_of(folder, settings.kit)
    adapters = [check_adapter(path, kit, max_norm=settings.max_norm) for path in settings.adapter]
    merged = combined(adapters, kit, settings.weights)
    told = adapters if len(adapters) == 1 else [*adapters, merged]
    for adapter in told:
        _print_adapter(adapter)
    results = [result for adapter in told for result in _facts(adapter)]
    if settings.eval is None and settings.out is None:
        print("checked; neither --eval nor --out was given, so it was not plugged in")
    else:
        results += _plug(settings, folder, kit, merged, evaluate)
    if settings.json is not None:
        write_results(settings.json, "plugin", settings, results)


def _plug(settings: PluginSettings, folder: Path, kit: Kit, adapter: Adapter, evaluate: Evaluator) -> list[Result]:
    """Measure without it and with it, then write it; the figures."""
    rows = _rows(settings, kit)

    def measured(model: nn.Module) -> Figures | None:
        if rows is None:
            return None
        collator = Collator(kit.tokenizer(), pad_token_id=kit.config.pad_token_id)
        size = settings.per_device_eval_batch_size
        return evaluate(model, rows, collator, task=kit.plan.task, batch_size=size, device=settings.device)

    model, kits_own = load_full(folder, kit)
    model.to(settings.device)
    before = measured(model)
    plugged = plug_in(model, adapter, kit.plan)
    after = measured(plugged)
    if after is not None and not math.isfinite(after.loss):
        raise ModelError(
            f"With the adapter, the loss of the full model on {settings.eval} is not finite; nothing was written.",
            hint="look at how it was trained; a kit of another --dtype may help where float16 overflows",
        )
    if settings.out is not None:
        # Not the whole path: whoever gets the directory need not know it.
        save_adapter(plugged, settings.out, base_name=folder.resolve().name)
    if before is not None and after is not None:
        _print_figures(before, after)
    if settings.out is not None:
        _print_written(settings.out, [name for name in kits_own if f"base_model.model.{name}" not in adapter.tensors])
    return _compared(before, after) if before is not None and after is not None else []


# ---- the pieces


def kit_of(folder: Path, path: Path) -> Kit:
    """The kit at `path`, if its trunk is that of the model in `folder`.

    Raises:
        ModelError: it is not.
    """
    kit = open_kit(path)
    config = load_config(folder)
    found = None if config.model_type != kit.plan.model_type else fingerprint_trunk(folder, kit.plan)
    if found != kit.plan.trunk:
        raise ModelError(
            f"The kit {path} was cut from a {kit.plan.model_type} model with trunk {kit.plan.trunk}; {folder} holds a "
            f"{config.model_type} model" + (f" with trunk {found}." if found else "."),
            hint="give the model that the kit was written from",
        )
    return kit


def load_full(folder: Path, kit: Kit) -> tuple[PreTrainedModel, list[str]]:
    """The whole model in the kit's dtype, frozen, on the CPU, and names of head tensors that the kit alone has.

    A classifier's head is the kit's: it may have been drawn anew for it.

    Raises:
        ModelError: other layers of the kit than the head are not those of the model: what was tuned on them belongs
            to another model.
    """
    classifies = kit.plan.task == "sequence-classification"
    model = load_party_side(
        folder,
        kit.plan,
        dtype=DTYPES[kit.plan.dtype],
        config=kit.config,
        new_head=classifies,
        also=kit.plan.trunk_layers,
    )
    given, held = kit.load().state_dict(), model.state_dict()
    other = sorted(name for name, tensor in given.items() if not torch.equal(tensor, held[name]))
    head = [name for name in other if classifies and not name.startswith(f"{model.base_model_prefix}.")]
    if other != head:
        foreign = [name for name in other if name not in head]
        raise ModelError(
            f"{len(foreign)} tensors of the kit {kit.path} are not those of the model {folder}; the first is "
            f"{foreign[0]}.",
            expected="a kit that was cut from this very model",
            hint="give the model that the kit was written from",
        )
    for name in head:
        held[name].copy_(given[name])
    model.config.use_cache = False
    return model.requires_grad_(False).eval(), head


def combined(adapters: Sequence[Adapter], kit: Kit, weights: Sequence[float] = ()) -> Adapter:
    """One adapter whose change of every weight is the weighted mean of the adapters' changes.

    Args:
        weights: one for each, positive; divided by their sum. Empty: all alike.

    Returns:
        The adapter itself, if there is one; else one of rank `sum of ranks`, with scale 1, in float32. Of a module
        that an adapter leaves alone, that adapter's change is zero.

    Raises:
        UsageError: one of several is a DoRA adapter.
    """
    if len(adapters) == 1:
        return adapters[0]
    for adapter in adapters:
        if adapter.config.use_dora:
            raise UsageError(
                f"{adapter.name} is a DoRA adapter, which divides by a norm: the mean of several is no adapter.",
                expected="adapters without --use-dora, or one alone",
            )
    shares = [weight / math.fsum(weights) for weight in weights] or [1 / len(adapters)] * len(adapters)
    rank, base = sum(adapter.config.r for adapter in adapters), kit.load()
    config = lora_config(
        base,
        kit.plan,
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(set().union(*(adapter.config.target_modules for adapter in adapters))),
        bias="lora_only" if any(adapter.config.bias == "lora_only" for adapter in adapters) else "none",
    )
    config.layers_to_transform = sorted(set().union(*(adapter.config.layers_to_transform for adapter in adapters)))
    wrapped = fresh(base, config)
    template = stored(wrapped)
    tensors = {name: _stacked(name, as_is, adapters, shares) for name, as_is in template.items()}
    change = measured_change(wrapped, tensors)
    return Adapter(name=f"mean of {len(adapters)}", config=config, tensors=tensors, change=change)


def _stacked(name: str, as_is: torch.Tensor, adapters: Sequence[Adapter], shares: Sequence[float]) -> torch.Tensor:
    """One tensor of the combined adapter; `as_is` is what stands there without any, of the shape it has."""
    if not name.endswith((".lora_A.weight", ".lora_B.weight")):
        mean = torch.zeros(as_is.shape, dtype=torch.float64)
        for adapter, share in zip(adapters, shares, strict=True):
            mean += share * adapter.tensors.get(name, as_is).double()
        return mean.float()
    dim, result, start = (0 if name.endswith(".lora_A.weight") else 1), torch.zeros(as_is.shape), 0
    for adapter, share in zip(adapters, shares, strict=True):
        rank = adapter.config.r
        if name in adapter.tensors:
            factor = adapter.tensors[name].double() * (share * _scale(adapter) if dim else 1.0)
            result.narrow(dim, start, rank).copy_(factor)
        start += rank
    return result


def _scale(adapter: Adapter) -> float:
    config = adapter.config
    return float(config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r))


# ---- what is asked


def check_device(device: str) -> None:
    """Whether this machine has the device.

    Raises:
        ResourceError: it does not.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ResourceError(
            f"--device {device} was asked for, but torch finds no CUDA device here.",
            expected="cpu",
            hint="install a CUDA build of torch and check the driver with nvidia-smi, or leave --device out",
        )


def _rows(settings: PluginSettings, kit: Kit) -> Examples | None:
    """The rows to measure on, in the kit's tokens."""
    if settings.eval is None:
        return None
    limit = kit.plan.max_length
    if settings.max_length and limit and settings.max_length > limit:
        raise UsageError(
            f"--max-length is {settings.max_length}, but the model's positions end at {limit}.",
            expected=f"at most {limit}",
        )
    label2id = dict(kit.config.label2id or {}) if kit.plan.task == "sequence-classification" else None
    rows = load_rows(settings.eval, columns=settings.column_map(), task=kit.plan.task, label2id=label2id)
    longest = settings.max_length or limit or _WITHOUT_LIMIT
    return tokenise(
        rows,
        kit.tokenizer(),
        max_length=longest,
        answer_only=settings.answer_only,
        truncation=settings.truncation,
    )


# ---- what is said


def _print_adapter(adapter: Adapter) -> None:
    config, change = adapter.config, adapter.change
    layers, modules = ", ".join(map(str, config.layers_to_transform)), ", ".join(sorted(config.target_modules))
    print(f"adapter  {adapter.name}: rank {config.r}, layers {layers}, modules {modules}; {adapter.values:,} values")
    print(f"digest   {adapter.digest}")
    print(
        f"change   {change.total:.3g} times the norm of the weights together; most of {change.where}, "
        f"{change.largest:.3g} times"
    )


def _print_figures(before: Figures, after: Figures) -> None:
    table = Table(title="the full model on the rows of --eval", title_justify="left")
    for column in ("", "without", "with the adapter"):
        table.add_column(column, justify="right" if column else "left")
    found = after.facts()
    for name, value in before.facts().items():
        if name != "counted":
            table.add_row(name.replace("_", " "), f"{value:.4f}", f"{found[name]:.4f}")
    Console(highlight=False).print(table)
    if after.loss > before.loss:
        print("note     on these rows the model is worse with the adapter than without")


def _print_written(out: Path, kits_own: list[str]) -> None:
    print(f"written  {out}: a PEFT directory for the full model, and for bottom and top in a run of a party")
    if kits_own:
        print(f"note     of the head, {', '.join(kits_own)} are in the kit alone: load them from there")


def _facts(adapter: Adapter) -> list[Result]:
    case = adapter.name
    return [
        Result(case=case, metric="digest", value=adapter.digest, unit=""),
        Result(case=case, metric="rank", value=adapter.config.r, unit=""),
        Result(case=case, metric="values", value=adapter.values, unit="values"),
        Result(case=case, metric="change of all weights", value=adapter.change.total, unit="of their norm"),
        Result(case=case, metric="largest change of a weight", value=adapter.change.largest, unit="of its norm"),
    ]


def _compared(before: Figures, after: Figures) -> list[Result]:
    was = before.facts()
    return [
        Result(case="plug-in", metric=name, value=value, unit=_UNITS.get(name, ""), reference=was[name])
        for name, value in after.facts().items()
    ]
