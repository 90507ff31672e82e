"""The reference: the whole model in one process, tuned with PEFT on the same layers. ``python -m`` this, with a start.

Nothing of the split is in here but the plan, which says which layers get adapters.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import torch
from transformers import AutoModelForCausalLM

from splitfl.adapters import add_lora, lora_config
from splitfl.bench.orders import MonolithStart
from splitfl.bench.side import Side, answer_orders, own_output
from splitfl.kit import open_kit
from splitfl.load import quiet_library
from splitfl.quiet import silence_library_warnings


def open_side(start: MonolithStart) -> Side:
    """Load the checkpoint from disk and put the adapters on."""
    with quiet_library():
        model = AutoModelForCausalLM.from_pretrained(
            start.checkpoint, dtype=getattr(torch, start.dtype), local_files_only=True, use_safetensors=True
        )
    model.requires_grad_(False)
    model.config.use_cache = False  # as at the party: training makes no KV cache
    plan = open_kit(Path(start.kit)).plan
    return Side(add_lora(model, lora_config(model, plan)))


def main() -> None:
    """Run until standard input ends."""
    silence_library_warnings()
    answers = own_output()
    start = msgspec.json.decode(sys.argv[1], type=MonolithStart)
    torch.set_num_threads(start.threads)
    answer_orders(open_side(start), answers)


if __name__ == "__main__":
    main()
