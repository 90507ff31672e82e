"""An adapter from somewhere else: could this kit have made it, and is it sound?

An owner asks that of what a data holder returns, a data holder of what an owner or another holder gives it.

Checked in this order, each before the next is looked at: size of the configuration, every field of it, size of the
weights, names, shapes, dtypes, finite, norms. Nothing of the holder's configuration reaches a library: a new one is
made from the values that were checked, and what it makes of the kit's own layers says which tensors are expected. Only
safetensors are read. The whole model is not needed: an adapter changes layers that are in the kit.

How large a change is: of a weight W under LoRA, ||W' - W|| / ||W|| (Frobenius). W' - W is s B A, measured from the
factors alone: ||B A||^2 = sum((B^T B) * (A A^T)); with DoRA it is m (W + s B A) / ||W + s B A|| - W. Of a tensor that
is stored whole (bias, head), the root mean square of its change; of a factor, that of its values.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from splitfl.adapters import ADAPTER_FILE, adapter_digest, add_lora, linear_names, lora_config
from splitfl.config_offsite import LARGEST_CHANGE
from splitfl.cut import Plan
from splitfl.errors import ModelError, printable
from splitfl.kit import Kit
from splitfl.load import layer_of

CONFIG_FILE = "adapter_config.json"
LARGEST_CONFIG = 1 << 16  # bytes
_HEADER, _HEADER_EACH = 1 << 16, 1 << 10  # bytes that the head of a safetensors file may take: in all, and a tensor
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_SHOWN = 5  # names in an error
_AGAIN = "get the adapter/ directory of a run of `splitfl tune` with this kit, or what `splitfl plugin --out` wrote"

Tensors: TypeAlias = dict[str, torch.Tensor]
Rule: TypeAlias = tuple[Callable[[Any], bool], str]


@dataclass(frozen=True, kw_only=True)
class Change:
    """How far an adapter moves the weights that it changes."""

    total: float
    """Norm of all changes of weights together, over the norm of those weights."""
    largest: float
    """The largest such ratio of one weight."""
    where: str
    """Which weight that is."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter that was checked, or made from such: all that is needed to plug it in."""

    name: str
    """For people."""
    config: LoraConfig
    """Ours, not the holder's."""
    tensors: Tensors
    """Under the names that PEFT stores them with; on the CPU."""
    change: Change

    @property
    def values(self) -> int:
        """Numbers in it."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def digest(self) -> str:
        """What a holder's ledger calls it (`splitfl.adapters.adapter_digest`)."""
        return adapter_digest(self.tensors)


def check_adapter(folder: Path, kit: Kit, *, max_norm: float = LARGEST_CHANGE) -> Adapter:
    """Read the PEFT directory `folder` if `kit` can have made it.

    Args:
        max_norm: the largest change of one weight as a multiple of its norm; of all of them together half of that; and
            the largest root mean square of a value of a factor, or of the change of a bias or head.

    Raises:
        ModelError: names the file, what is wrong with it, and what is allowed.
    """
    file = folder / CONFIG_FILE
    given, base = _read_config(file), kit.load()
    config, head = _own_config(given, base, kit.plan, file)
    wrapped = fresh(base, config)
    _check_head(head, wrapped, file)
    expected = stored(wrapped)
    tensors = _read_tensors(folder / ADAPTER_FILE, expected)
    change = measured_change(wrapped, tensors)
    _check_norms(folder, change, _root_mean_squares(expected, tensors), max_norm)
    return Adapter(name=str(folder), config=config, tensors=tensors, change=change)


def fresh(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """`model` with new adapters of that configuration; torch's generator is left as it was."""
    own = copy.deepcopy(config)
    own.base_model_name_or_path = None  # PEFT notes the model here, and would wonder at another one
    with torch.random.fork_rng(devices=[]):
        return add_lora(model, own)


def plug_in(model: PreTrainedModel, adapter: Adapter, plan: Plan) -> PeftModel:
    """Put a checked adapter onto the full model, or onto a party's; `model` is changed in place."""
    plugged = fresh(model, adapter.config)
    assert stored(plugged).keys() == adapter.tensors.keys()  # noqa: S101  they were checked against the kit's layers
    in_layers = [layer_of(module_of(name), plan) for name in adapter.tensors]
    assert not any(layer in plan.trunk_layers for layer in in_layers)  # noqa: S101
    set_peft_model_state_dict(plugged, adapter.tensors)
    return plugged.requires_grad_(False).eval()


def stored(model: PeftModel) -> Tensors:
    """The tensors of a model's adapter under the names of its file."""
    found: Tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    return found


def module_of(name: str) -> str:
    """Name of a module in the whole model, of PEFT's name of the module or of one of its tensors."""
    return name.removeprefix("base_model.model.")


# ---- the configuration


def _read(file: Path, limit: int) -> bytes:
    """A file's content, if it is no larger than it can be.

    Raises:
        ModelError: missing or too large; it is not read then.
    """
    if not file.is_file():
        pickled = file.name == ADAPTER_FILE and (file.parent / "adapter_model.bin").exists()
        raise ModelError(
            f"{file.parent} holds no {file.name}" + (", but a pickled adapter, which is not read." if pickled else "."),
            expected=f"a PEFT directory: {CONFIG_FILE} and {ADAPTER_FILE}",
            hint=_AGAIN,
        )
    size = file.stat().st_size
    content = b""
    if size <= limit:
        with file.open("rb") as opened:
            content = opened.read(limit + 1)  # it may have grown meanwhile
    if max(size, len(content)) > limit:
        raise ModelError(
            f"{file} has {max(size, len(content))} bytes and was not read.", expected=f"at most {limit}", hint=_AGAIN
        )
    return content


def _read_config(file: Path) -> dict[str, Any]:
    content = _read(file, LARGEST_CONFIG)
    try:
        return msgspec.json.decode(content, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{file} is not a JSON object.", expected="what PEFT writes", hint=_AGAIN) from error


def _own_config(given: dict[str, Any], base: PreTrainedModel, plan: Plan, file: Path) -> tuple[LoraConfig, Any]:
    """A configuration of our own with the holder's values, and the modules it says are stored whole.

    Raises:
        ModelError: a field that this kit's adapters do not have that way.
    """
    rules, defaults = _rules(base, plan), LoraConfig().to_dict()
    for name in sorted(rules.keys() - given.keys()):
        raise ModelError(f"{file} does not say {name}.", expected=rules[name][1], hint=_AGAIN)
    for name, value in given.items():
        test, expected = rules.get(name) or _otherwise(name, defaults)
        if not test(value):
            raise ModelError(f"{file} says {_shown(value)} for {printable(name, 60)}.", expected=expected, hint=_AGAIN)
    taken = ("r", "lora_alpha", "lora_dropout", "target_modules", "bias", "use_rslora", "use_dora")
    config = lora_config(base, plan, **{name: given[name] for name in taken})
    config.layers_to_transform = sorted(given["layers_to_transform"])
    return config, given["modules_to_save"]


def _rules(base: PreTrainedModel, plan: Plan) -> dict[str, Rule]:
    """What each field must say that has to do with the kit."""
    linear, layers = linear_names(base, plan), plan.party_layers
    pattern = plan.stack.rsplit(".", 1)[-1]
    task = "CAUSAL_LM" if plan.task == "causal-lm" else "SEQ_CLS"
    transposed = any(isinstance(module, Conv1D) for module in base.modules())

    def is_module(name: Any) -> bool:
        return isinstance(name, str) and any(f".{module}".endswith(f".{name}") for module in linear)

    def is_layer(index: Any) -> bool:
        return _is_int(index) and index in layers

    flag: Rule = (lambda value: isinstance(value, bool), "true or false")
    return {
        "peft_type": (lambda value: value == "LORA", "LORA: no other kind of adapter is plugged in"),
        "task_type": (lambda value: value == task, f"{task}: the kit is for {plan.task}"),
        # No matrix of the layers has a rank above their width.
        "r": (lambda value: _is_int(value) and 1 <= value <= plan.width, f"a rank from 1 to {plan.width}"),
        "lora_alpha": (lambda value: _is_int(value) and 1 <= value <= 1 << 20, f"1 to {1 << 20}"),
        "lora_dropout": (lambda value: type(value) in (int, float) and 0 <= value <= 1, "0 to 1"),
        "target_modules": (
            lambda value: _is_set(value, is_module),
            f"a list of linear modules of the kit's layers, each once: {', '.join(linear[:20])}",
        ),
        "layers_to_transform": (
            lambda value: _is_set(value, is_layer),
            f"a list of layers that the kit holds, each once: some of {layers}",
        ),
        "layers_pattern": (lambda value: value == pattern, pattern),
        "fan_in_fan_out": (lambda value: value is transposed, str(transposed).lower()),
        "bias": (
            lambda value: value in ("none", "lora_only"),
            "none or lora_only: with all, biases of layers that are not the holder's could be in it",
        ),
        "use_rslora": flag,
        "use_dora": flag,
        "modules_to_save": (lambda value: value is None or _is_set(value, lambda name: isinstance(name, str)), "names"),
    }


def _otherwise(name: str, defaults: Mapping[str, Any]) -> Rule:
    """Any other field: what it says is not used, so it may only say that something is off, or name things."""
    if name in ("base_model_name_or_path", "peft_version"):  # nothing is looked for under these
        return (lambda value: value is None or isinstance(value, str), "text")
    if name == "inference_mode":
        return (lambda value: isinstance(value, bool), "true or false")
    if name in defaults:
        default = defaults[name]
        return (
            lambda value: type(value) is type(default) and value == default,
            f"{_shown(default)}: adapters of this kit do without it",
        )
    return (lambda value: value is None or value is False or value in ({}, []), "nothing: it is not known here")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_set(value: Any, test: Callable[[Any], bool]) -> bool:
    """Whether this is a list of one or more different values that all pass."""
    return isinstance(value, list) and all(map(test, value)) and 0 < len(set(value)) == len(value)


def _shown(value: Any) -> str:
    """A value of somebody's JSON for an error: what is nested is not walked through."""
    if isinstance(value, list):
        return "a list of " + (", ".join(_shown(one) for one in value[:_SHOWN] if not isinstance(one, list)) or "lists")
    return "an object" if isinstance(value, dict) and value else printable(repr(value), 80)


def _check_head(said: Any, wrapped: PeftModel, file: Path) -> None:
    """What is stored whole is what PEFT stores for the kit's task: the head of a classifier, else nothing."""
    ours = set(wrapped.peft_config["default"].modules_to_save or ())
    if set(said or ()) != ours:
        raise ModelError(
            f"{file} says {_shown(said)} for modules_to_save.",
            expected=", ".join(sorted(ours)) or "null: a causal model's head is not tuned",
            hint=_AGAIN,
        )


# ---- the weights


def _read_tensors(file: Path, expected: Tensors) -> Tensors:
    """The tensors in `file`, if they are those expected.

    Raises:
        ModelError: too large, no safetensors, or other names, shapes or dtypes; names the tensors.
    """
    values = sum(tensor.numel() for tensor in expected.values())
    content = _read(file, 4 * values + _HEADER + _HEADER_EACH * len(expected))
    try:
        tensors: Tensors = load(content)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"{file} is not a whole safetensors file: it is cut off, altered, or something else.", hint=_AGAIN
        ) from error
    missing, extra = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing or extra:
        found = [
            f"{len(names)} {what} ({_names(names)})"
            for what, names in (("missing", missing), ("extra", extra))
            if names
        ]
        raise ModelError(
            f"{file} does not hold the tensors that its configuration makes of this kit: {', '.join(found)}.",
            expected=f"{len(expected)} tensors, all of layers that the kit holds",
            hint=_AGAIN,
        )
    for name, tensor in sorted(tensors.items()):
        if tensor.shape != expected[name].shape or tensor.dtype not in _DTYPES:
            raise ModelError(
                f"{file}: {module_of(name)} is {list(tensor.shape)} in {_type_name(tensor.dtype)}.",
                expected=f"{list(expected[name].shape)} in {', '.join(map(_type_name, _DTYPES))}",
                hint=_AGAIN,
            )
    broken = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise ModelError(
            f"{file} holds values that are not finite, in {len(broken)} tensors ({_names(broken)}).",
            expected="finite values",
            hint="the training diverged; ask the holder to tune again with a lower --learning-rate",
        )
    return tensors


def _names(names: Iterable[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(printable(module_of(name), 120) for name in listed[:_SHOWN]) + more


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- how large the change is


def measured_change(wrapped: PeftModel, tensors: Tensors) -> Change:
    """How far `tensors` move the weights that `wrapped` has under LoRA; the model is left as it is."""
    ratios: dict[str, float] = {}
    changed = whole = 0.0
    for name, module in wrapped.named_modules():
        if isinstance(module, LoraLayer):
            moved, norm = _moved(module, name, tensors)
            changed, whole = changed + moved**2, whole + norm**2
            # A weight that is zero has no scale of its own.
            ratios[module_of(name)] = moved / (norm or 1.0)
    if not ratios:
        return Change(total=0.0, largest=0.0, where="")
    where = max(ratios, key=lambda name: math.inf if math.isnan(ratios[name]) else ratios[name])
    return Change(total=math.sqrt(changed / (whole or 1.0)), largest=ratios[where], where=where)


def _moved(module: LoraLayer, name: str, tensors: Tensors) -> tuple[float, float]:
    """Norms of the change of one weight and of the weight, in float64: products of large factors do not overflow."""
    a, b = tensors[f"{name}.lora_A.weight"].double(), tensors[f"{name}.lora_B.weight"].double()
    weight, scale = module.get_base_layer().weight.detach().double(), float(module.scaling["default"])
    norm = float(weight.norm())
    magnitude = tensors.get(f"{name}.lora_magnitude_vector")
    if magnitude is None:
        return scale * math.sqrt(max(float(((b.T @ b) * (a @ a.T)).sum()), 0.0)), norm
    weight = weight.T if getattr(module, "fan_in_fan_out", False) else weight
    adapted = weight + scale * (b @ a)
    return float((magnitude.double()[:, None] * adapted / adapted.norm(dim=1, keepdim=True) - weight).norm()), norm


def _root_mean_squares(expected: Tensors, tensors: Tensors) -> dict[str, float]:
    """Of the values of factors, and of the change of what is stored whole. DoRA's magnitudes are in `Change`."""
    found = {}
    for name, tensor in tensors.items():
        if name.endswith(".lora_magnitude_vector"):
            continue
        is_factor = name.endswith((".lora_A.weight", ".lora_B.weight"))
        change = tensor.double() if is_factor else tensor.double() - expected[name].double()
        found[name] = float(change.pow(2).mean().sqrt())
    return found


def _check_norms(folder: Path, change: Change, values: Mapping[str, float], limit: float) -> None:
    """Refuse a change that is no tuning any more. Written so that a figure that is not a number is refused too."""
    hint = "look at how it was trained; if it is wanted all the same, raise --max-norm"
    if not change.largest <= limit:
        raise ModelError(
            f"The adapter in {folder} would change {change.where} by {change.largest:.3g} times its norm.",
            expected=f"at most {limit:g} times (--max-norm)",
            hint=hint,
        )
    if not change.total <= limit / 2:
        raise ModelError(
            f"The adapter in {folder} would change its weights together by {change.total:.3g} times their norm.",
            expected=f"at most {limit / 2:g} times, half of --max-norm",
            hint=hint,
        )
    for name, value in sorted(values.items()):
        if not value <= limit:
            raise ModelError(
                f"The values of {module_of(name)} in {folder} are too large: their root mean square is {value:.3g}.",
                expected=f"at most {limit:g} (--max-norm)",
                hint=hint,
            )
