"""Write a checkpoint with random weights: ``python -m splitfl.bench.checkpoint SIZE DTYPE OUT``.

A process of its own, so that whoever measures has never held the model.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig

from splitfl.bench.sizes import Size, size_named
from splitfl.load import quiet_library


def configuration(size: Size) -> PreTrainedConfig:
    """The library's configuration of a size; without an end token, so that generation runs to its full length."""
    return getattr(transformers, size.config_class)(
        **size.arguments, bos_token_id=None, eos_token_id=None, pad_token_id=None
    )


def write_checkpoint(size: Size, dtype: str, out: Path, *, seed: int = 0) -> None:
    """Write the model as a directory of config and safetensors, whole or not at all.

    Args:
        size: what to make.
        dtype: of the weights on disk, ``float32`` or ``bfloat16``.
        out: the directory; must not exist.
        seed: draws the weights.
    """
    torch.manual_seed(seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        with quiet_library():
            model = AutoModelForCausalLM.from_config(configuration(size), dtype=getattr(torch, dtype))
            model.save_pretrained(staging)
        os.replace(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


if __name__ == "__main__":
    write_checkpoint(size_named(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
