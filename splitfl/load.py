"""Load one side of a model and nothing else, through the library's own `from_pretrained`.

The library builds the model on the meta device, then fills in tensors one by one from the checkpoint's index. A
subclass whose constructor prunes the skeleton makes it skip every tensor that this side does not hold, and keeps its
handling of shards, dtypes, tied weights, buffers and fused experts. Only safetensors files are read: nothing is
unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as library_logging

from splitfl.cut import Plan, Task, keep_party_layers, keep_trunk_layers
from splitfl.errors import ModelError

_AUTO_CLASSES = {"causal-lm": AutoModelForCausalLM, "sequence-classification": AutoModelForSequenceClassification}

# Settings that do not change what the trunk computes.
_NOT_FINGERPRINTED = {
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "id2label",
    "label2id",
    "num_labels",
    "pad_token_id",
    "problem_type",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "vocab_size",
    "_name_or_path",
}


def load_config(model_dir: Path) -> PreTrainedConfig:
    """The configuration of a Hugging Face model directory.

    Raises:
        ModelError: not a model directory, or of a family the installed library does not know.
    """
    if not (model_dir / "config.json").is_file():
        raise ModelError(
            f"{model_dir} is not a model directory: it has no config.json.",
            expected="a directory written by `save_pretrained`, with config.json and *.safetensors",
        )
    try:
        return AutoConfig.from_pretrained(model_dir, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(
            f"{model_dir}/config.json cannot be used: {error}",
            hint="check the file, or install a transformers release that knows this family",
        ) from error


def model_class(config: PreTrainedConfig, task: Task | None) -> type[PreTrainedModel]:
    """The library's class for this family and task; `None` asks for the base model without a head.

    Raises:
        ModelError: the library has no such class for this family.
    """
    auto = AutoModel if task is None else _AUTO_CLASSES[task]
    try:
        found = auto._model_mapping[type(config)]
    except KeyError as error:
        raise ModelError(
            f"The library has no {task or 'base'} model for family {config.model_type!r}.",
            expected="a family of causal language models or encoder classifiers",
        ) from error
    return found[0] if isinstance(found, list | tuple) else found


def load_party_side(
    model_dir: Path, plan: Plan, *, dtype: torch.dtype, config: PreTrainedConfig | None = None, new_head: bool = False,
    also: Container[int] = (),
) -> PreTrainedModel:  # fmt: skip
    """Bottom and top of the model, on the CPU, in `dtype`, with pass-throughs where the trunk is.

    Args:
        new_head: allow head tensors that the checkpoint lacks, or has for another number of classes; they are drawn
            anew from torch's generator.
        also: trunk layers that this side has too: those of an emulator.

    Raises:
        ModelError: the checkpoint lacks tensors that this side holds.
    """
    config = config or load_config(model_dir)
    model, missing = _load_pruned(
        model_class(config, plan.task),
        model_dir,
        config,
        dtype,
        lambda model: keep_party_layers(model.base_model, plan, also),
    )
    prefix = model.base_model_prefix + "."
    if new_head:
        missing = {name for name in missing if name.startswith(prefix)}
    _refuse_missing(missing, model_dir)
    return model


def load_trunk_side(
    model_dir: Path, plan: Plan, *, dtype: torch.dtype, device: str = "cpu", placing: dict[str, Any] | None = None
) -> PreTrainedModel:
    """The trunk alone, frozen and in eval mode, as a base model whose other layers and embeddings are stand-ins.

    Args:
        device: where to put all of it.
        placing: in place of `device`, keyword arguments by which `from_pretrained` spreads it over several.

    Raises:
        ModelError: the checkpoint lacks tensors of the trunk.
    """
    config = load_config(model_dir)
    # Loaded as the party loads it: the base class alone may build another stack (an encoder in front of the decoder).
    model, missing = _load_pruned(
        model_class(config, plan.task), model_dir, config, dtype, lambda model: keep_trunk_layers(model, plan), placing
    )
    _refuse_missing(missing, model_dir)
    trunk = model.base_model.requires_grad_(False).eval()
    return trunk.to(device) if placing is None else trunk


def _refuse_missing(missing: set[str], model_dir: Path) -> None:
    if missing:
        raise ModelError(
            f"{model_dir} lacks {len(missing)} tensors of this side, or has them in another shape; the first is "
            f"{min(missing)}.",
            expected="a complete safetensors checkpoint of the model named in config.json",
        )


def _load_pruned(
    cls: type[PreTrainedModel],
    model_dir: Path,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    prune: Callable[[PreTrainedModel], None],
    placing: dict[str, Any] | None = None,
) -> tuple[PreTrainedModel, set[str]]:
    """Run `cls.from_pretrained` on a skeleton that `prune` has cut; returns the model and the names left unfilled."""
    checkpoint_files(model_dir)

    def build_pruned(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, *args, **kwargs)
        prune(self)
        held = {name for name, _ in self.named_parameters(remove_duplicate=False)}
        self.all_tied_weights_keys = {a: b for a, b in self.all_tied_weights_keys.items() if {a, b} <= held}

    # The library looks at the class's own name (loss function, attention support), so the subclass keeps it.
    pruned: Any = type(cls.__name__, (cls,), {"__init__": build_pruned, "__module__": cls.__module__})
    with quiet_library():
        try:
            model, info = pruned.from_pretrained(
                model_dir,
                config=config,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are told below, and only a head may be one of them
                output_loading_info=True,
                **(placing or {}),
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise ModelError(f"{model_dir} could not be loaded: {error}") from error
    model.__class__ = cls
    return model, set(info["missing_keys"]) | {str(entry[0]) for entry in info["mismatched_keys"]}


@contextlib.contextmanager
def quiet_library() -> Iterator[None]:
    """Keep the library's progress bars and load reports quiet: half a model always looks incomplete to it."""
    level, bars = library_logging.get_verbosity(), library_logging.is_progress_bar_enabled()
    library_logging.set_verbosity_error()
    library_logging.disable_progress_bar()
    try:
        yield
    finally:
        library_logging.set_verbosity(level)
        if bars:
            library_logging.enable_progress_bar()


def checkpoint_files(model_dir: Path) -> list[Path]:
    """The safetensors files of a model directory, in name order.

    Raises:
        ModelError: there are none.
    """
    files = sorted(model_dir.glob("model*.safetensors"))
    if not files:
        raise ModelError(
            f"{model_dir} holds no model*.safetensors file.",
            expected="safetensors weights; pickled checkpoints are not read",
            hint="load the model with transformers where you trust it and call `save_pretrained` again",
        )
    return files


def is_trunk_tensor(name: str, plan: Plan) -> bool:
    """Whether a checkpoint tensor of this name belongs to a trunk layer of `plan`."""
    found = _layer_in(name, plan)
    return found is not None and int(found[2]) in plan.trunk_layers


def layer_of(name: str, plan: Plan) -> int | None:
    """Number of the layer that a checkpoint tensor of this name belongs to; None if it is in none of the stack."""
    found = _layer_in(name, plan)
    return None if found is None else int(found[2])


def _layer_in(name: str, plan: Plan) -> re.Match[str] | None:
    """The part of a tensor's name from the number of its layer on; None if it is in no layer of the stack.

    The stack stands at the root of a base model's checkpoint, else below one or two names (the base model, a part of
    it); a language model inside a larger one may have its own ``model.`` in front of its layers. Layers further down
    that are called the same belong to something else (an image encoder).
    """
    stack = r"\.(?:model\.)?".join(map(re.escape, plan.stack.split(".")))
    return re.match(rf"(?:\w+\.){{0,2}}{stack}\.((\d+)\..+)", name)


def tensor_names(model_dir: Path) -> dict[str, Path]:
    """Every tensor of a checkpoint, with the file that holds it; reads headers alone."""
    names: dict[str, Path] = {}
    for file in checkpoint_files(model_dir):
        with safe_open(file, framework="pt") as tensors:
            names.update(dict.fromkeys(tensors.keys(), file))
    return names


def fingerprint_trunk(model_dir: Path, plan: Plan) -> str:
    """Hash of the trunk: every tensor's name, shape, dtype and bytes, and the settings that it runs under.

    Returns:
        32 hexadecimal digits (BLAKE2b, 16 bytes). `plan.trunk` is not looked at.

    Raises:
        ModelError: the checkpoint holds no tensor of the trunk.
    """
    names = [(name, file) for name, file in sorted(tensor_names(model_dir).items()) if is_trunk_tensor(name, plan)]
    if not names:
        raise ModelError(
            f"{model_dir} holds no tensor named {plan.stack}.{plan.trunk_layers.start} and so on: "
            "it names its tensors otherwise than the model its modules.",
            hint="save the language model inside it alone with `save_pretrained`",
        )
    with ThreadPoolExecutor(max_workers=4) as pool:
        tensors = list(pool.map(lambda entry: _hash_tensor(entry[0], entry[1], plan), names))
    settings = {k: v for k, v in load_config(model_dir).to_dict().items() if k not in _NOT_FINGERPRINTED}
    # Sorted by the layer-relative name: how a checkpoint is prefixed or sharded does not change what it computes.
    summary = json.dumps([sorted(tensors), settings, [*plan.trunk_layers]], sort_keys=True, default=str)
    return hashlib.blake2b(summary.encode(), digest_size=16).hexdigest()


def _hash_tensor(name: str, file: Path, plan: Plan) -> tuple[str, str, list[int], str]:
    with safe_open(file, framework="pt") as tensors:
        tensor = tensors.get_tensor(name)
    raw = tensor.reshape(-1).view(torch.uint8).numpy()
    found = _layer_in(name, plan)
    assert found is not None  # noqa: S101  chosen by `is_trunk_tensor`
    return found[1], str(tensor.dtype), list(tensor.shape), hashlib.blake2b(raw, digest_size=16).hexdigest()


def parameter_count(model: nn.Module) -> int:
    """Number of parameters, shared tensors counted once."""
    return sum(p.numel() for p in model.parameters())
