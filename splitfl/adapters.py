"""LoRA through PEFT on the layers a party holds; adapter to vector and back; an ordinary PEFT directory on disk.

The adapter is made so that it fits the *full* model too: `layers_to_transform` names the party's layers by their own
indices, so `PeftModel.from_pretrained(full_model, directory)` puts nothing into the trunk.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from splitfl.cut import Plan, module_at
from splitfl.errors import ModelError, UsageError, nearest
from splitfl.load import quiet_library

ADAPTER_FILE = "adapter_model.safetensors"


def linear_names(model: PreTrainedModel, plan: Plan) -> list[str]:
    """Names of the linear modules in the party's layers, relative to their layer: ``self_attn.q_proj``, ..."""
    layers = module_at(model.base_model, plan.stack)
    return sorted(
        {
            name
            for index in plan.party_layers
            for name, module in layers[index].named_modules()
            if isinstance(module, nn.Linear | Conv1D)
        }
    )


def choose_targets(model: PreTrainedModel, plan: Plan, asked: list[str] | None) -> list[str]:
    """The modules that get LoRA: those asked for, else the library's default for the family, else every linear module.

    Raises:
        UsageError: a name that matches no linear module of the party's layers.
    """
    linear = linear_names(model, plan)
    if asked == ["all-linear"]:
        return linear
    if not asked:
        default = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(plan.model_type, [])
        found = [name for name in default if any(_ends_with(module, name) for module in linear)]
        return sorted(found) or linear
    for name in asked:
        if not any(_ends_with(module, name) for module in linear):
            last_parts = {module.rsplit(".", 1)[-1] for module in linear}
            raise UsageError(
                f"--target-modules {name!r} matches no linear module in layers {plan.party_layers}.",
                hint=nearest(name, last_parts | {"all-linear"}),
            )
    return sorted(asked)


def _ends_with(module: str, name: str) -> bool:
    return module == name or module.endswith("." + name)


def lora_config(
    model: PreTrainedModel,
    plan: Plan,
    *,
    r: int = 8,
    lora_alpha: int = 16,
    lora_dropout: float = 0.0,
    target_modules: list[str] | None = None,
    bias: str = "none",
    use_rslora: bool = False,
    use_dora: bool = False,
    top_alone: bool = False,
) -> LoraConfig:
    """A `peft.LoraConfig` (same names, same meanings) confined to the party's layers of `model`.

    Args:
        top_alone: leave the layers below the cut as they are.

    Raises:
        UsageError: a target that is not there, or no layer above the cut to tune.
    """
    layers = [index for index in plan.party_layers if not top_alone or index >= plan.trunk_layers.stop]
    if not layers:  # an empty list would mean every layer to PEFT
        raise UsageError(
            f"Nothing is left to tune: the kit holds {plan.bottom} layers below the cut, which stay as they are, and "
            f"{plan.top} above it.",
            hint="use a kit with --top 1 or more",
        )
    return LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=choose_targets(model, plan, target_modules),
        layers_to_transform=layers,
        layers_pattern=plan.stack.rsplit(".", 1)[-1],
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        bias=bias,
        use_rslora=use_rslora,
        use_dora=use_dora,
        task_type=TaskType.CAUSAL_LM if plan.task == "causal-lm" else TaskType.SEQ_CLS,
    )


def add_lora(model: PreTrainedModel, config: LoraConfig, *, seed: int = 0) -> PeftModel:
    """Wrap `model` with fresh adapters; a classification head is tuned whole, as PEFT does for that task.

    Raises:
        UsageError: PEFT cannot adapt one of the modules chosen.
    """
    torch.manual_seed(seed)
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UsageError(
            f"PEFT cannot adapt {', '.join(sorted(config.target_modules or ()))} of this model: {error}",
            hint="name other modules with --target-modules",
        ) from error


def open_adapter(model: PreTrainedModel, folder: Path, *, trainable: bool = False) -> PeftModel:
    """Put the adapter saved in `folder` onto a party's model.

    Raises:
        ModelError: there is none, or it does not fit.
    """
    if not (folder / ADAPTER_FILE).is_file():
        raise ModelError(
            f"{folder} holds no adapter ({ADAPTER_FILE}).", hint="give the run directory of `splitfl tune`"
        )
    try:
        with quiet_library():
            return PeftModel.from_pretrained(model, folder, is_trainable=trainable)
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            f"The adapter in {folder} does not fit this model: {str(error).splitlines()[0]}",
            hint="use the kit that the adapter was tuned with",
        ) from error


def save_adapter(model: PeftModel, folder: Path, *, base_name: str) -> None:
    """Write the adapter as a PEFT directory; the old one is replaced whole or not at all.

    Args:
        base_name: what ``base_model_name_or_path`` shall say: the model that the adapter belongs to.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        staging.chmod(0o755)
        for config in model.peft_config.values():
            config.base_model_name_or_path = base_name
        # "auto" would ask a hub whether the vocabulary grew; embeddings are never tuned here.
        model.save_pretrained(staging, save_embedding_layers=False)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def tuned_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that training changes, in name order: the order of `adapter_to_vector`."""
    return sorted((name, p) for name, p in model.named_parameters() if p.requires_grad)


def adapter_to_vector(model: nn.Module) -> torch.Tensor:
    """All tuned parameters end to end, float32 [P] on the CPU."""
    return torch.cat([p.detach().reshape(-1).to("cpu", torch.float32) for _, p in tuned_parameters(model)])


def adapter_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """What an adapter is called in a ledger and in talk: BLAKE2b (16 bytes, hexadecimal) of its stored tensors.

    Names, dtypes, shapes and values count, the order of the tensors does not: the holder has it before the adapter is
    written, the owner from the file.
    """
    digest = hashlib.blake2b(digest_size=16, person=b"splitfl adapter")
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def vector_to_adapter(model: nn.Module, vector: torch.Tensor) -> None:
    """Write `vector` [P] back into the tuned parameters, in place.

    Raises:
        ModelError: of another length than the adapter.
    """
    parameters = tuned_parameters(model)
    expected = sum(p.numel() for _, p in parameters)
    if vector.shape != (expected,):
        raise ModelError(
            f"A vector of shape {tuple(vector.shape)} is no adapter of this model.", expected=f"({expected},)"
        )
    start = 0
    with torch.no_grad():
        for _, parameter in parameters:
            chunk = vector[start : start + parameter.numel()]
            parameter.copy_(chunk.view_as(parameter))
            start += parameter.numel()
