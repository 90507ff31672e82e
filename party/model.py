"""Step 2 of the journey: the party's model, an ordinary `PreTrainedModel` whose trunk is elsewhere."""

from __future__ import annotations

from typing import cast

import torch
from transformers import PreTrainedModel

from party.remote import put_remote_trunk
from splitfl.errors import ResourceError
from splitfl.kit import DTYPES, Kit
from splitfl.link import TrunkLink
from splitfl.wire.messages import DtypeName


def open_model(kit: Kit, link: TrunkLink, *, dtype: str = "auto", device: str = "cpu") -> PreTrainedModel:
    """Bottom and top from the kit, the trunk over `link`; frozen, ready for an adapter or for `generate()`.

    Args:
        dtype: of the computation; ``auto`` is the plan's.
        device: where bottom and top compute.
    """
    model = kit.load(DTYPES[resolve_dtype(kit, dtype)]).to(check_device(device))
    model.requires_grad_(False)
    put_remote_trunk(model, kit.plan, link)
    return model.eval()


def resolve_dtype(kit: Kit, dtype: str) -> DtypeName:
    """`dtype`, or the plan's where it is ``auto``."""
    return cast("DtypeName", kit.plan.dtype if dtype == "auto" else dtype)


def check_device(device: str) -> str:
    """`device`, if this machine has it.

    Raises:
        ResourceError: CUDA was asked for and is not there.
    """
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise ResourceError(
                f"--device {device} was asked for, but torch finds no CUDA device here.",
                expected="cpu",
                hint="install a CUDA build of torch and check the driver with nvidia-smi, or leave --device out",
            )
        index = int(device.partition(":")[2] or 0)
        if index >= torch.cuda.device_count():
            raise ResourceError(f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices.")
    return device
