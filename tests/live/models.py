"""Tiny models with a real tokenizer, as an owner would have them on disk, and rows to tune them on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from splitfl.cut import Task
from splitfl.kit import open_kit, write_kit
from splitfl.load import load_config, model_class, quiet_library
from tests.families import ENCODERS, make_config, make_model
from tests.small_tokenizers import bpe

CUT = (2, 2)

# Subjects, what happened, and how it was taken: combined into rows that differ in length and can be learnt.
_WHO = ("The Heron", "Agnes", "The miller", "A boat from the mill", "The old harbour master")
_WHAT = ("left before the fog", "carried forty-two crates of apples", "came home late and wet", "sang", "was sold")
_TAKEN = (("which pleased everybody.", "praise"), ("and nobody was glad of it.", "complaint"))


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Files of rows."""

    train: Path
    held_out: Path


def save_tiny(family: str, folder: Path) -> Path:
    """A tiny checkpoint of `family` with a byte-level tokenizer of its own; an encoder comes without a head."""
    tokenizer = bpe()
    config = make_config(family)
    config.vocab_size = len(tokenizer)
    model = make_model(config, encoder=family in ENCODERS)
    with quiet_library():
        (model.base_model if family in ENCODERS else model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def make_kit(model_dir: Path, folder: Path, *, task: Task = "causal-lm", dtype: str = "auto") -> Path:
    """The kit of `model_dir`, cut at `CUT`."""
    labels = ["complaint", "praise"] if task == "sequence-classification" else None
    with quiet_library():
        write_kit(model_dir, folder, bottom=CUT[0], top=CUT[1], task=task, dtype=dtype, label_names=labels)
    return folder


def whole_model(model_dir: Path, task: Task = "causal-lm", **options: object) -> PreTrainedModel:
    """The unsplit model, frozen, as the library loads it."""
    with quiet_library():
        model: PreTrainedModel = model_class(load_config(model_dir), task).from_pretrained(model_dir, **options)
    model.config.use_cache = False
    return model.requires_grad_(False).eval()


def tokenizer_of(kit_dir: Path) -> PreTrainedTokenizerFast:
    """The kit's tokenizer."""
    return open_kit(kit_dir).tokenizer()


def sentences() -> list[tuple[str, str]]:
    """Text and label of fifty different sentences, lengths mixed."""
    made = [
        (f"{who} {what}, {taken}", label)
        for taken, label in _TAKEN
        for number, what in enumerate(_WHAT)
        for who in (*_WHO[number:], *_WHO[:number])
    ]
    return made[::2] + made[1::2]


def answer_rows() -> list[dict[str, str]]:
    """The sentences as prompt and completion."""
    rows = []
    for text, _ in sentences():
        prompt, _, completion = text.partition(", ")
        rows.append({"prompt": prompt + ",", "completion": " " + completion})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> Path:
    """Rows as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict[str, str]]:
    """The rows of a file of JSON Lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
