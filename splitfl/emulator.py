"""The emulator: a compressed trunk that a data holder may have, to tune on offline (offsite-tuning).

An emulator directory holds some of the trunk's layers under their own names, and `emulator.json`, which says which
ones, what was done to them, and the hash of every file. With a kit it makes an ordinary model: the kit's bottom and
top, the emulator's layers where they stood, pass-throughs for the rest. So an adapter tuned on it has the names of the
full model's modules, and an emulator that keeps every layer *is* the full model, exactly.

    emulator.json           the plan
    emulator-*.safetensors  the layers; weights may be stored as codes and scales, or as two factors

(Xiao, Lin and Han, "Offsite-Tuning: Transfer Learning without Full Model", 2023: uniform layer drop, section 4.)
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeAlias, cast

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from splitfl.compression import Header, compressed, expanded, expanded_shapes, is_compressed
from splitfl.cut import module_at
from splitfl.errors import ModelError, UsageError, printable
from splitfl.kit import DTYPES, Kit
from splitfl.load import (
    checkpoint_files,
    is_trunk_tensor,
    layer_of,
    load_party_side,
    model_class,
    quiet_library,
    tensor_names,
)

EMULATOR_FILE = "emulator.json"
EMULATOR_VERSION = 1
LARGEST_FILE = 16 << 30  # bytes of one file that a holder accepts
_AGAIN = "get the emulator again"
LARGEST_PLAN = 1 << 20  # bytes of its plan
_MOST_LAYERS = 10_000
_SHOWN = 20  # layers that an error names
_SHARD = 4 << 30  # bytes of one file before it is compressed

FileHash: TypeAlias = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class EmulatorPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an emulator is; ``emulator.json``."""

    emulator_version: int = EMULATOR_VERSION
    plan: str
    """Digest of the kit's plan that it belongs to."""
    trunk: str
    """Fingerprint of the trunk that it was made from."""
    kept: Annotated[tuple[int, ...], msgspec.Meta(min_length=1, max_length=_MOST_LAYERS)]
    """Layers that are in it, by their numbers in the whole model."""
    chosen_by: Literal["uniform", "sensitivity"]
    """How they were chosen."""
    pruned: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    """Share of each weight matrix that was set to zero, the smallest first."""
    rank: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """Rank to which weight matrices were reduced, where that is fewer values; None if they were not."""
    bits: Literal[8, 4] | None = None
    """Bits a weight is stored in; None if it is stored as it is."""
    distilled_steps: Annotated[int, msgspec.Meta(ge=0)] = 0
    dtype: Literal["float32", "float16", "bfloat16"]
    parameters: Annotated[int, msgspec.Meta(ge=1)]
    """Values in the layers, as they are once opened."""
    files: Annotated[dict[str, FileHash], msgspec.Meta(min_length=1, max_length=_MOST_LAYERS)]
    """File name to BLAKE2b (32 bytes, hexadecimal) of its content."""


@dataclass(frozen=True, kw_only=True)
class Emulator:
    """An opened emulator."""

    path: Path
    plan: EmulatorPlan

    def load(self, kit: Kit, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The kit's model with the emulator's layers in the middle, on the CPU, everything frozen.

        Raises:
            ModelError: the two do not belong together, or a file is damaged.
        """
        check_belongs(self.plan, kit)
        with _joined(kit, self) as folder:
            model = load_party_side(
                folder, kit.plan, dtype=dtype or DTYPES[kit.plan.dtype], config=kit.config, also=self.plan.kept
            )
        layers = module_at(model.base_model, kit.plan.stack)
        if not all(bool(p.isfinite().all()) for index in self.plan.kept for p in layers[index].parameters()):
            raise ModelError(f"{self.path} holds weights that are not finite.", hint="ask the owner for another one")
        model.requires_grad_(False)
        model.config.use_cache = False
        return model.eval()

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return sum((self.path / name).stat().st_size for name in (*self.plan.files, EMULATOR_FILE))


# ---- which layers


def uniform_layers(trunk: range, keep: int) -> tuple[int, ...]:
    """`keep` layers of `trunk` at even distances, first and last among them (offsite-tuning, section 4).

    The i-th is number round(i (M - 1) / (keep - 1)) of the M layers; one alone is the middle one.

    Raises:
        UsageError: fewer than 1 or more than there are.
    """
    check_keep(trunk, keep)
    if keep == 1:
        return (trunk[(len(trunk) - 1) // 2],)
    # Halves go up; Python's own rounding would send some up and some down.
    return tuple(trunk[int(i * (len(trunk) - 1) / (keep - 1) + 0.5)] for i in range(keep))


def check_keep(trunk: range, keep: int) -> None:
    """Refuse a number of layers that the trunk does not have.

    Raises:
        UsageError: fewer than 1, or more than there are.
    """
    if not 1 <= keep <= len(trunk):
        raise UsageError(
            f"An emulator of {keep} layers cannot be made of a trunk of {len(trunk)}.",
            expected=f"1 to {len(trunk) - 1}: with all of them it would be the model itself",
        )


# ---- writing


def write_emulator(
    model: PreTrainedModel, kit: Kit, out: Path, *, kept: tuple[int, ...], chosen_by: str, pruned: float = 0.0,
    rank: int | None = None, bits: int | None = None, distilled_steps: int = 0,
) -> EmulatorPlan:  # fmt: skip
    """Write the trunk layers `kept` of `model` as an emulator directory; whole, or not at all.

    Args:
        model: has those layers, pruned and distilled as the arguments say; other layers are not looked at.
        kit: the kit it belongs to.
        out: the directory; must not hold anything.
        rank: matrices are written as two factors of this rank, where that is fewer values.
        bits: matrices (or their factors) are written in so many bits.

    Raises:
        ModelError: `out` is not empty, or `model` lacks one of the layers.
    """
    check_out(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        staging = Path(folder) / "emulator"
        staging.mkdir(mode=0o755)
        # The library's own writer gives the tensors the names they have in a checkpoint.
        with quiet_library():
            model.save_pretrained(Path(folder) / "whole", max_shard_size=_SHARD)
        parameters, found, names = 0, set(), {}
        for number, file in enumerate(checkpoint_files(Path(folder) / "whole")):
            held = _tensors_of(file, kit, kept)
            parameters += sum(tensor.numel() for tensor in held.values())
            found |= {layer_of(name, kit.plan) for name in held}
            if held:
                name = f"emulator-{number:05d}.safetensors"
                save_file(compressed(held, rank=rank, bits=bits), staging / name)
                (staging / name).chmod(0o644)
                names[name] = file_hash(staging / name)
        if found != set(kept):
            raise ModelError(f"The model lacks layers {sorted(set(kept) - found)}.", expected=f"layers {list(kept)}")
        plan = EmulatorPlan(
            plan=kit.plan.digest,
            trunk=kit.plan.trunk,
            kept=kept,
            chosen_by=cast("Literal['uniform', 'sensitivity']", chosen_by),
            pruned=pruned,
            rank=rank,
            bits=cast("Literal[8, 4] | None", bits),
            distilled_steps=distilled_steps,
            dtype=cast("Literal['float32']", str(model.dtype).removeprefix("torch.")),
            parameters=parameters,
            files=names,
        )
        (staging / EMULATOR_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(plan), indent=2) + b"\n")
        if out.exists():
            out.rmdir()
        os.replace(staging, out)
    return plan


def check_out(out: Path) -> None:
    """Refuse a directory that holds something.

    Raises:
        ModelError: it does, or is a file.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"{out} exists and is not empty.", hint="choose another directory, or remove this one")


def _tensors_of(file: Path, kit: Kit, kept: Container[int | None]) -> dict[str, torch.Tensor]:
    with safe_open(file, framework="pt") as tensors:
        return {
            name: tensors.get_tensor(name)
            for name in tensors.keys()  # noqa: SIM118  no mapping
            if is_trunk_tensor(name, kit.plan) and layer_of(name, kit.plan) in kept
        }


def file_hash(path: Path) -> str:
    """BLAKE2b (32 bytes) of a file, hexadecimal."""
    digest = hashlib.blake2b(digest_size=32)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


# ---- opening


def open_emulator(path: Path, *, verify: bool = True) -> Emulator:
    """Open the emulator at `path`.

    Args:
        verify: compare every file with its hash.

    Raises:
        ModelError: not an emulator, damaged, too large, or of another version.
    """
    file = path / EMULATOR_FILE
    if file.is_file() and file.stat().st_size > LARGEST_PLAN:
        raise ModelError(f"{file} has {file.stat().st_size} bytes.", expected=f"at most {LARGEST_PLAN}", hint=_AGAIN)
    plan = read_emulator_plan(file.read_bytes() if file.is_file() else None, path)
    for name, expected in plan.files.items():
        if not (path / name).is_file():
            raise ModelError(f"{path} lacks {name}.", hint="get the emulator again; what is there is kept")
        if (path / name).stat().st_size > LARGEST_FILE:
            raise ModelError(f"{path / name} is too large.", expected=f"at most {LARGEST_FILE} bytes", hint=_AGAIN)
        if verify and file_hash(path / name) != expected:
            raise ModelError(
                f"{path / name} is not the file that {EMULATOR_FILE} names: it is cut off or altered.",
                hint="remove this one file and get the emulator again",
            )
    return Emulator(path=path, plan=plan)


def read_emulator_plan(content: bytes | None, path: Path) -> EmulatorPlan:
    """The plan in `content`, checked; `path` is for errors.

    Raises:
        ModelError: there is none, it is damaged, or of another version.
    """
    if content is None:
        raise ModelError(
            f"{path} is no emulator: it has no {EMULATOR_FILE}.", hint="make one with `splitfl emulator OUT`"
        )
    try:
        plan = msgspec.json.decode(content, type=EmulatorPlan)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ModelError(f"{path / EMULATOR_FILE} cannot be read: {printable(str(error))}.", hint=_AGAIN) from error
    if plan.emulator_version != EMULATOR_VERSION:
        raise ModelError(
            f"{path} is an emulator of version {plan.emulator_version}.",
            expected=f"version {EMULATOR_VERSION}",
            hint="install the owner's version of splitfl",
        )
    if any(not _is_plain(name) for name in plan.files) or not plan.files:
        raise ModelError(f"{path / EMULATOR_FILE} names files that no emulator has.", expected="emulator-*.safetensors")
    return plan


def _is_plain(name: str) -> bool:
    """Whether a peer's file name is one that we would have written: it becomes part of a path."""
    middle = name.removeprefix("emulator-").removesuffix(".safetensors")
    return name == f"emulator-{middle}.safetensors" and middle.isascii() and middle.isdigit() and len(middle) <= 9


def check_belongs(plan: EmulatorPlan, kit: Kit) -> None:
    """Whether an emulator was made for this kit.

    Raises:
        ModelError: another model or another cut; names both.
    """
    if (plan.plan, plan.trunk) != (kit.plan.digest, kit.plan.trunk):
        raise ModelError(
            f"The emulator belongs to plan {printable(plan.plan, 64)} (trunk {printable(plan.trunk, 64)}).",
            expected=f"plan {kit.plan.digest} (trunk {kit.plan.trunk}), that of the kit {kit.path}",
            hint="use the kit that the emulator was made for",
        )
    foreign = [index for index in plan.kept if index not in kit.plan.trunk_layers]
    if foreign or not plan.kept or list(plan.kept) != sorted(set(plan.kept)):
        trunk = kit.plan.trunk_layers
        raise ModelError(
            f"The emulator names layers {list(plan.kept[:_SHOWN])}.",
            expected=f"some of {trunk.start} to {trunk.stop - 1}, each once and in order",
            hint=_AGAIN,
        )


@contextmanager
def _joined(kit: Kit, emulator: Emulator) -> Iterator[Path]:
    """A folder that looks like one checkpoint of kit and emulator; nothing of the kit is copied."""
    plain_names = _check_files(kit, emulator)
    with tempfile.TemporaryDirectory(prefix="splitfl-emulator-") as name:
        folder = Path(name)
        weight_map: dict[str, str] = {}
        for tensor, file in tensor_names(kit.path).items():
            if is_trunk_tensor(tensor, kit.plan):  # it would be loaded in the emulator's place
                raise ModelError(
                    f"The kit {kit.path} holds tensors of the trunk.", expected="a kit written by `splitfl kit`"
                )
            weight_map[tensor] = f"model-kit-{file.name}"
            if not (folder / weight_map[tensor]).exists():
                (folder / weight_map[tensor]).symlink_to(file.absolute())
        for file_name, tensors in plain_names.items():
            plain = _plain_file(emulator.path / file_name, folder)
            weight_map.update(dict.fromkeys(tensors, plain.name))
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        (folder / "config.json").symlink_to((kit.path / "config.json").absolute())
        yield folder


def _check_files(kit: Kit, emulator: Emulator) -> dict[str, list[str]]:
    """Each file's tensors, once opened, from headers alone: only those of the layers kept, each once, and all of them.

    Two small factors can stand for a matrix of any size, so the sum of all sizes is compared before any is made.
    """
    plan, seen, values = emulator.plan, set[str](), 0
    names: dict[str, list[str]] = {}
    for file_name in plan.files:
        shapes = expanded_shapes(_headers(emulator.path / file_name))
        names[file_name] = list(shapes)
        foreign = [name for name in shapes if name in seen or not _is_kept(name, kit, plan)]
        if foreign:
            raise ModelError(
                f"{emulator.path / file_name} holds {printable(foreign[0], 120)}, which is not of the layers that the "
                "plan names, or there twice.",
                expected=f"layers {list(plan.kept[:_SHOWN])}, each tensor once",
                hint=_AGAIN,
            )
        seen.update(shapes)
        values += sum(math.prod(shape) for shape in shapes.values())
    expected = values_in(kit, plan.kept)
    if not values == plan.parameters == expected:
        raise ModelError(
            f"The files of {emulator.path} hold {values} values, and its plan says {plan.parameters}.",
            expected=f"{expected}, as many as {len(plan.kept)} layers of this model have",
            hint=_AGAIN,
        )
    return names


def _headers(file: Path) -> dict[str, Header]:
    try:
        with safe_open(file, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118  no mapping
            return {name: (tuple(part.get_shape()), str(part.get_dtype())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} cannot be read.", hint="remove this one file and get the emulator again") from error


def _is_kept(tensor: str, kit: Kit, plan: EmulatorPlan) -> bool:
    return is_trunk_tensor(tensor, kit.plan) and layer_of(tensor, kit.plan) in plan.kept


def values_in(kit: Kit, kept: tuple[int, ...]) -> int:
    """Values that these layers have, by the model's class; nothing is loaded."""
    config = kit.config
    with torch.device("meta"), quiet_library():
        layers = module_at(model_class(config, kit.plan.task)(config).base_model, kit.plan.stack)
    return sum(tensor.numel() for index in kept for tensor in layers[index].state_dict().values())


def _plain_file(file: Path, folder: Path) -> Path:
    """`file` with its weights as matrices, in `folder`: as it is where nothing was coded."""
    target = folder / f"model-{file.name}"
    if not is_compressed(_headers(file)):
        target.symlink_to(file.absolute())
    else:
        save_file(expanded(load_file(file)), target)
    return target
