"""The kit: the directory a data holder receives. Config, tokenizer, bottom and top weights, plan; never a trunk tensor.

config.json, generation_config.json     of the whole model, unchanged
tokenizer files                         if the model has any
model*.safetensors                      tensors of bottom and top, under the names of the whole model
splitfl.json                            the plan (`splitfl.cut.Plan`)
"""

from __future__ import annotations

import copy
import inspect
import os
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from splitfl.cut import (
    FOREIGN_ARGUMENTS,
    PassThrough,
    Plan,
    Task,
    check_cut,
    entrance,
    find_stack,
    max_length_of,
    module_at,
)
from splitfl.errors import ModelError, printable
from splitfl.load import (
    fingerprint_trunk,
    is_trunk_tensor,
    load_config,
    load_party_side,
    model_class,
    quiet_library,
    tensor_names,
)
from splitfl.wire.messages import WIRE_VERSION

PLAN_FILE = "splitfl.json"
_MOST_LAYERS, _WIDEST, _LONGEST = 10_000, 1 << 20, 1 << 40  # some families say a huge number where nothing bounds them
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Kit:
    """An opened kit: its plan, and loaders for the rest."""

    path: Path
    plan: Plan

    @property
    def config(self) -> PreTrainedConfig:
        """The whole model's configuration."""
        return load_config(self.path)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer.

        Raises:
            ModelError: the kit holds none.
        """
        tokenizer = load_tokenizer(self.path)
        if tokenizer is None:
            raise ModelError(
                f"Kit {self.path} holds no tokenizer, which rows of text need.",
                hint="ask the owner to put the tokenizer's files into the model directory and write the kit again",
            )
        return tokenizer

    def load(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Bottom and top on the CPU; the trunk's places are pass-throughs until a remote trunk is put in."""
        return load_party_side(self.path, self.plan, dtype=dtype or DTYPES[self.plan.dtype])


@dataclass(frozen=True, kw_only=True)
class KitSummary:
    """What `write_kit` gave away, for people."""

    plan: Plan
    given_parameters: int
    all_tensors: int
    given_tensors: int
    new_head: list[str]
    bytes: int


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in `folder`, or None if there is none."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
        return None
    with quiet_library():
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def make_plan(
    model_dir: Path,
    *,
    bottom: int,
    top: int,
    task: Task = "causal-lm",
    dtype: str = "auto",
    config: PreTrainedConfig | None = None,
) -> Plan:
    """Work out the plan for a model directory; reads the trunk's bytes once, for their fingerprint.

    Raises:
        ModelError: the model cannot be cut, or not there.
    """
    config = config or load_config(model_dir)
    cls = model_class(config, task)
    with torch.device("meta"), quiet_library():
        model = cls(config)
        base = model.base_model
    if task == "causal-lm" and not cls._supports_default_dynamic_cache():
        raise ModelError(
            f"A {config.model_type} model cannot be cut: it keeps its past in a cache of its own kind.",
            expected="a model that generates with the library's own KV cache",
        )
    stack, layers = find_stack(base)
    entrance(base, stack)
    check_cut(len(layers), bottom, top)
    _refuse_shared_weights(model, layers[bottom : len(layers) - top])
    text = config.get_text_config()
    width, returns_tuple = _probe_layer(config, task, stack)
    plan = Plan(
        model_type=config.model_type,
        task=task,
        layers=len(layers),
        bottom=bottom,
        top=top,
        stack=stack,
        returns_tuple=returns_tuple,
        width=width,
        dtype=_dtype_name(dtype, config),
        layer_types=tuple(getattr(text, "layer_types", None) or ()),
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        max_length=max_length_of(config),
        trunk="",
    )
    return msgspec.structs.replace(plan, trunk=fingerprint_trunk(model_dir, plan))


def _refuse_shared_weights(model: PreTrainedModel, trunk: nn.ModuleList) -> None:
    """Refuse a cut through layers that share a tensor: the kit would hold a part of the trunk."""
    shared = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    shared.subtract(id(parameter) for _, parameter in trunk.named_parameters(remove_duplicate=False))
    if any(shared[id(parameter)] > 0 for parameter in trunk.parameters()):
        raise ModelError(
            f"A {model.config.model_type} model cannot be cut there: layers of the trunk share weights with others.",
            expected="a trunk whose tensors are its own, so that none of them has to be given away",
        )


def _dtype_name(asked: str, config: PreTrainedConfig) -> str:
    name = str(config.dtype or "float32").removeprefix("torch.") if asked == "auto" else asked
    if name not in DTYPES:
        raise ModelError(f"Dtype {name!r} cannot be used.", expected=", ".join(DTYPES))
    return name


class _Seen(Exception):
    """Leaves the probe's forward pass: everything was seen."""


@dataclass
class _Probe:
    """Hooks that note what reaches the entrance, leaves the first layer and reaches the second."""

    mask: Any = None
    output: Any = None
    handed_on: tuple[str, ...] = ()
    """Arguments of the second layer that are results of the first, beside the hidden state."""

    def watch(self, inside: nn.Module, layers: nn.ModuleList) -> None:
        """Put the hooks in; the pass ends at the second layer, or behind the only one."""
        entry, second = inspect.signature(inside.forward), inspect.signature(layers[-1].forward)

        def at_entrance(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = entry.bind_partial(*args, **kwargs).arguments
            self.mask = given.get("attention_mask")

        def behind_first(_module: nn.Module, _args: Any, output: Any) -> None:
            self.output = output
            if len(layers) == 1:
                raise _Seen

        def before_second(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            beside = self.output[1:] if isinstance(self.output, tuple) else ()
            results = {id(result) for result in beside if result is not None}
            taken = second.bind_partial(*args, **kwargs).arguments
            self.handed_on = tuple(name for name, value in taken.items() if id(value) in results)
            raise _Seen

        inside.register_forward_pre_hook(at_entrance, with_kwargs=True)
        layers[0].register_forward_hook(behind_first)
        for layer in layers[1:2]:
            layer.register_forward_pre_hook(before_second, with_kwargs=True)


def _probe_layer(config: PreTrainedConfig, task: Task, stack: str) -> tuple[int, bool]:
    """Width of the hidden state, and whether a layer returns a tuple: run the first layer of the class and look.

    Runs on a skeleton whose parameters are zeros and whose other layers are gone, so no checkpoint is touched.

    Raises:
        ModelError: the layers take or pass on more than a mask, positions and one hidden state.
    """
    family = config.model_type
    with init_empty_weights(include_buffers=False), quiet_library():
        model = model_class(config, task)(copy.deepcopy(config)).eval()
    layers = module_at(model.base_model, stack)
    probe = _Probe()
    probe.watch(entrance(model.base_model, stack), layers)
    for index in range(2, len(layers)):
        layers[index] = PassThrough(layers[index], index, returns_tuple=False)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.zeros(parameter.shape), requires_grad=False))
    try:
        with torch.no_grad():
            ids = torch.ones(1, 4, dtype=torch.long)
            model(input_ids=ids, attention_mask=torch.tensor([[0, 1, 1, 1]]), use_cache=False)
    except _Seen:
        pass
    except Exception as error:
        raise ModelError(
            f"A {family} model cannot be run on token ids alone: {error}",
            expected="a language model of text that needs nothing but token ids and a mask",
        ) from error
    hidden = probe.output[0] if isinstance(probe.output, tuple) else probe.output
    if not isinstance(probe.mask, torch.Tensor) or probe.mask.ndim != 2:
        raise ModelError(
            f"The attention mask of a {family} model is made outside the module around its layers.",
            expected="a model whose masks follow from a mask of the tokens: [rows, positions]",
            hint="if a language model stands inside it, save that alone with `save_pretrained` and cut it",
        )
    if hidden.ndim != 3 or hidden.shape[:2] != (1, 4):
        raise ModelError(
            f"The layers of a {family} model pass on {list(hidden.shape)} for 4 positions, not one state each.",
            expected="one vector a position: [rows, positions, width]",
        )
    for name in set(probe.handed_on) - FOREIGN_ARGUMENTS.keys():
        raise ModelError(
            f"The layers of a {family} model hand on `{name}` besides the hidden state, past the cut.",
            expected="layers that depend on hidden state, mask, positions and their own cache slot alone",
        )
    return hidden.shape[-1], isinstance(probe.output, tuple)


def write_kit(
    model_dir: Path,
    out: Path,
    *,
    bottom: int,
    top: int,
    task: Task = "causal-lm",
    dtype: str = "auto",
    label_names: list[str] | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> KitSummary:
    """Cut the model in `model_dir` and write the kit to `out`; all of it or nothing.

    Args:
        label_names: classes of a sequence classification; gives the head its size where the checkpoint has none.
        seed: draws a classification head that the checkpoint lacks.

    Raises:
        ModelError: the model cannot be cut there, or `out` exists.
    """
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise ModelError(f"{out} exists and is not empty.", hint="choose another directory, or add --overwrite")
    config = load_config(model_dir)
    if label_names:
        config.id2label = dict(enumerate(label_names))
        config.label2id = {name: index for index, name in enumerate(label_names)}
    plan = make_plan(model_dir, bottom=bottom, top=top, task=task, dtype=dtype, config=config)
    torch.manual_seed(seed)
    checkpoint = tensor_names(model_dir)
    model = load_party_side(
        model_dir, plan, dtype=DTYPES[plan.dtype], config=config, new_head=task == "sequence-classification"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        staging.chmod(0o755)
        with quiet_library():
            model.save_pretrained(staging)
            tokenizer = load_tokenizer(model_dir)
            if tokenizer is not None:
                tokenizer.save_pretrained(staging)
        (staging / PLAN_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(plan), indent=2) + b"\n")
        given = tensor_names(staging)
        _assert_no_trunk(given, plan)
        classifies = task == "sequence-classification"
        new_head = _not_in(checkpoint, given, model.base_model_prefix) if classifies else []
        if out.exists():
            shutil.rmtree(out)
        os.replace(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return KitSummary(
        plan=plan,
        given_parameters=sum(p.numel() for p in model.parameters()),
        all_tensors=len(checkpoint),
        given_tensors=len(given),
        new_head=new_head,
        bytes=sum(file.stat().st_size for file in out.iterdir()),
    )


def _not_in(checkpoint: dict[str, Path], given: dict[str, Path], prefix: str) -> list[str]:
    """Head tensors of the kit that the checkpoint lacks or has in another shape.

    A checkpoint of a bare base model names its tensors without the prefix.
    """

    def is_new(name: str) -> bool:
        if name not in checkpoint:
            return name.removeprefix(prefix + ".") not in checkpoint
        return not name.startswith(prefix + ".") and _shape(name, given) != _shape(name, checkpoint)

    return sorted(filter(is_new, given))


def _shape(name: str, files: dict[str, Path]) -> list[int]:
    with safe_open(files[name], framework="pt") as file:
        return list(file.get_slice(name).get_shape())


def _assert_no_trunk(names: dict[str, Path], plan: Plan) -> None:
    leaked = [name for name in names if is_trunk_tensor(name, plan)]
    assert not leaked, f"trunk tensors in the kit: {leaked[:3]}"  # noqa: S101  a bug of ours, never the user's


def open_kit(path: Path) -> Kit:
    """Open the kit at `path`.

    Raises:
        ModelError: not a kit, damaged, or of another wire version.
    """
    file = path / PLAN_FILE
    if not file.is_file():
        raise ModelError(
            f"{path} is not a kit: it has no {PLAN_FILE}.", hint="write one with `splitfl kit OUT --model DIR`"
        )
    try:
        plan = msgspec.json.decode(file.read_bytes(), type=Plan)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(
            f"{file} cannot be read: {printable(str(error), 160)}.",
            hint="write the kit again with the owner's version of splitfl",
        ) from error
    if plan.wire_version != WIRE_VERSION:
        raise ModelError(
            f"Kit {path} speaks wire version {plan.wire_version}, this splitfl version {WIRE_VERSION}.",
            hint="install the owner's version of splitfl, or ask for a new kit",
        )
    _check_plan(plan, file)
    return Kit(path=path, plan=plan)


def _check_plan(plan: Plan, file: Path) -> None:
    """Refuse figures that no kit of ours has: sizes and indices follow from them."""
    check_cut(plan.layers, plan.bottom, plan.top)
    largest = (plan.layers, _MOST_LAYERS), (plan.width, _WIDEST), (plan.max_length or 1, _LONGEST)
    if not all(0 < figure <= bound for figure, bound in largest) or plan.dtype not in DTYPES:
        raise ModelError(
            f"{file} names sizes or a dtype that no model here has.",
            expected=f"1 to {_MOST_LAYERS} layers, a width up to {_WIDEST}, {', '.join(DTYPES)}",
            hint="get the kit again",
        )
