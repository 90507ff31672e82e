"""The emulator: a compressed trunk that a data holder may have, to tune on offline (offsite-tuning).

An emulator directory holds some of the trunk's layers under their own names, and `emulator.json`, which says which
ones, what was done to them, and the hash of every file. With a kit it makes an ordinary model: the kit's bottom and top, the
emulator's layers where they stood, pass-throughs for the rest. So an adapter tuned on it has the names of the full
model's modules, and an emulator that keeps every layer *is* the full model, exactly.

    emulator.json           the plan
    emulator-*.safetensors  the layers; weights may be stored as codes and scales, or as two factors

(Xiao, Lin and Han, "Offsite-Tuning: Transfer Learning without Full Model", 2023: uniform layer drop, section 4.)
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from splitfl.compression import factored, quantised, unquantised
from splitfl.errors import ModelError, UsageError
from splitfl.kit import DTYPES, Kit
from splitfl.load import checkpoint_files, is_trunk_tensor, layer_of, load_party_side, tensor_names

EMULATOR_FILE = "emulator.json"
EMULATOR_VERSION = 1
LARGEST_FILE = 16 << 30  # bytes of one file that a holder accepts
_CODES, _SCALES, _LEFT, _RIGHT = ".codes", ".scales", ".left", ".right"


class EmulatorPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an emulator is; ``emulator.json``."""

    emulator_version: int = EMULATOR_VERSION
    plan: str
    """Digest of the kit's plan that it belongs to."""
    trunk: str
    """Fingerprint of the trunk that it was made from."""
    kept: tuple[int, ...]
    """Layers that are in it, by their numbers in the whole model."""
    chosen_by: str
    """How they were chosen: ``uniform`` or ``sensitivity``."""
    pruned: float = 0.0
    """Share of each weight matrix that was set to zero, the smallest first."""
    rank: int | None = None
    """Rank to which weight matrices were reduced; None if they were not."""
    bits: int | None = None
    """Bits a weight is stored in; None if it is stored as it is."""
    distilled_steps: int = 0
    dtype: str
    parameters: int
    files: dict[str, str]
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
    # Python rounds halves to even, which could name one layer twice for no keep and M in use; halves go up here.
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
        model: has those layers, compressed and distilled as the arguments say; other layers are not looked at.
        kit: the kit it belongs to.
        out: the directory; must not hold anything.

    Raises:
        ModelError: `out` is not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise ModelError(f"{out} exists and is not empty.", hint="choose another directory")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        staging = Path(folder) / "emulator"
        staging.mkdir(mode=0o755)
        # The library's own writer gives the tensors the names they have in a checkpoint.
        model.save_pretrained(Path(folder) / "whole")
        parameters, names = 0, {}
        for number, file in enumerate(checkpoint_files(Path(folder) / "whole")):
            held = {
                name: tensor
                for name, tensor in load_file(file).items()
                if is_trunk_tensor(name, kit.plan) and layer_of(name, kit.plan) in kept
            }
            parameters += sum(tensor.numel() for tensor in held.values())
            if held:
                name = f"emulator-{number:05d}.safetensors"
                save_file(_stored(held, rank=rank, bits=bits), staging / name)
                names[name] = file_hash(staging / name)
        plan = EmulatorPlan(
            plan=kit.plan.digest,
            trunk=kit.plan.trunk,
            kept=kept,
            chosen_by=chosen_by,
            pruned=pruned,
            rank=rank,
            bits=bits,
            distilled_steps=distilled_steps,
            dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
            parameters=parameters,
            files=names,
        )
        (staging / EMULATOR_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(plan), indent=2) + b"\n")
        if out.exists():
            out.rmdir()
        os.replace(staging, out)
    return plan


def _stored(held: dict[str, torch.Tensor], *, rank: int | None, bits: int | None) -> dict[str, torch.Tensor]:
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in held.items():
        matrix = tensor.ndim == 2 and tensor.is_floating_point()
        if matrix and rank is not None and rank < min(tensor.shape):
            stored[name + _LEFT], stored[name + _RIGHT] = factored(tensor, rank)
        elif matrix and bits is not None:
            stored[name + _CODES], stored[name + _SCALES] = quantised(tensor, bits)
        else:
            stored[name] = tensor.contiguous()
    return stored


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
        ModelError: not an emulator, damaged, or of a newer version.
    """
    plan = read_emulator_plan((path / EMULATOR_FILE).read_bytes() if (path / EMULATOR_FILE).is_file() else None, path)
    for name, expected in plan.files.items():
        if not (path / name).is_file():
            raise ModelError(f"{path} lacks {name}.", hint="get the emulator again; what is there is kept")
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
    except msgspec.MsgspecError as error:
        raise ModelError(f"{path / EMULATOR_FILE} cannot be read: {error}.", hint="get the emulator again") from error
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
            f"The emulator belongs to plan {plan.plan} (trunk {plan.trunk}).",
            expected=f"plan {kit.plan.digest} (trunk {kit.plan.trunk}), that of the kit {kit.path}",
            hint="use the kit that the emulator was made for",
        )
    foreign = [index for index in plan.kept if index not in kit.plan.trunk_layers]
    if foreign or not plan.kept or list(plan.kept) != sorted(set(plan.kept)):
        raise ModelError(f"The emulator names layers {list(plan.kept)}.", expected=f"some of {kit.plan.trunk_layers}")


@contextmanager
def _joined(kit: Kit, emulator: Emulator) -> Iterator[Path]:
    """A folder that looks like one checkpoint of kit and emulator; nothing of the kit is copied."""
    with tempfile.TemporaryDirectory(prefix="splitfl-emulator-") as name:
        folder = Path(name)
        weight_map: dict[str, str] = {}
        for tensor, file in tensor_names(kit.path).items():
            weight_map[tensor] = f"model-kit-{file.name}"
            if not (folder / weight_map[tensor]).exists():
                (folder / weight_map[tensor]).symlink_to(file.absolute())
        for file_name in emulator.plan.files:
            plain = _plain_file(emulator.path / file_name, folder)
            with safe_open(plain, framework="pt") as tensors:
                for tensor in tensors.keys():  # noqa: SIM118  no mapping
                    _check_kept(tensor, kit, emulator)
                    weight_map[tensor] = plain.name
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        (folder / "config.json").symlink_to((kit.path / "config.json").absolute())
        yield folder


def _check_kept(tensor: str, kit: Kit, emulator: Emulator) -> None:
    if not is_trunk_tensor(tensor, kit.plan) or layer_of(tensor, kit.plan) not in emulator.plan.kept:
        raise ModelError(
            f"{emulator.path} holds a tensor of another layer than it says.",
            expected=f"layers {list(emulator.plan.kept)}",
            hint="get the emulator again",
        )


def _plain_file(file: Path, folder: Path) -> Path:
    """`file` with its weights as matrices, in `folder`: as it is where nothing was coded."""
    try:
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
        target = folder / f"model-{file.name}"
        if not any(name.endswith((_CODES, _LEFT)) for name in names):
            target.symlink_to(file.absolute())
            return target
        held = load_file(file)
    except SafetensorError as error:
        raise ModelError(f"{file} cannot be read.", hint="remove this one file and get the emulator again") from error
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in held.items():
        if name.endswith(_CODES):
            plain[name.removesuffix(_CODES)] = unquantised(tensor, held[name.removesuffix(_CODES) + _SCALES])
        elif name.endswith(_LEFT):
            plain[name.removesuffix(_LEFT)] = tensor @ held[name.removesuffix(_LEFT) + _RIGHT]
        elif not name.endswith((_SCALES, _RIGHT)):
            plain[name] = tensor
    save_file({name: tensor.contiguous() for name, tensor in plain.items()}, target)
    return target
