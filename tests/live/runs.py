"""Runs of `splitfl tune` as a person makes them, and what can be read from a run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tomli_w
import torch
from safetensors.torch import load_file
from torch import nn

from splitfl.data import Truncation, load_rows, tokenise
from splitfl.kit import open_kit
from splitfl.metrics import read_run
from tests.live.models import Rows

STEPS, SAVE_EVERY = 12, 4

# Dropout and accumulation, so that a resumed run only comes out the same if generators and counters are restored.
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS,
    "save_steps": SAVE_EVERY,
    "save_total_limit": 2,
    "eval_steps": 6,
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "cosine",
    "lora_dropout": 0.1,
    "target_modules": ["all-linear"],
    "seed": 5,
}


def write_config(path: Path, rows: Rows, **more: Any) -> Path:
    """A config file for `splitfl tune`, rows included."""
    table = {"train": str(rows.train), "eval": str(rows.held_out), **SETTINGS, **more}
    path.write_text(tomli_w.dumps({"tune": table}), encoding="utf-8")
    return path


def adapter_in(run: Path) -> dict[str, torch.Tensor]:
    """The tensors of a run's adapter."""
    return load_file(run / "adapter" / "adapter_model.safetensors")


def events(run: Path, name: str) -> list[dict[str, Any]]:
    """The records of one kind in `run.jsonl`."""
    return [record for record in read_run(run / "run.jsonl") if record["event"] == name]


def checkpoints(run: Path) -> list[str]:
    """Names of what stands in the folder of checkpoints, in the order of their steps."""
    names = [path.name for path in (run / "checkpoints").iterdir()]
    return sorted(names, key=lambda name: int(name.rpartition("-")[2]))


def loss_row_by_row(model: nn.Module, kit_dir: Path, path: Path, *, truncation: Truncation = "error") -> float:
    """Mean loss a token in nats, each row alone and so without any padding."""
    kit = open_kit(kit_dir)
    rows = load_rows(path, task="causal-lm")
    total, counted = 0.0, 0
    for example in tokenise(rows, kit.tokenizer(), max_length=kit.plan.max_length or 2048, truncation=truncation):
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor(example["labels"])[1:]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        total += nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        counted += int((labels != -100).sum())
    return total / counted
