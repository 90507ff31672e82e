"""Texts on disk -> token streams -> a fixed plan of training windows.

A source is a folder of the data directory with `train`, `validation` and `test` files (`.jsonl` or `.txt`, or either
with `.gz`).
Each source becomes one long stream `<s> document </s> <s> document </s> ...`. A training window is `length` consecutive
tokens of one stream. Every epoch cuts the streams at another offset, so that no two epochs see the same windows: with
seven million tokens and many epochs this is the cheapest regularisation there is.

The whole plan is drawn before training, from the seed alone. A resumed run therefore needs no state of its own: it goes
on at the window where the killed one stopped.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerBase

Tokens = npt.NDArray[np.uint16]

# Typewriter quotes everywhere: curly ones are one in a hundred here, too rare to be learnt.
_STRAIGHT = str.maketrans(
    {"\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'", "\u2013": "-", "\u2212": "-", "\xa0": " ", "\r": None}
)


@dataclass(frozen=True)
class Source:
    """One data set and how its rows become documents; the keys of a `[sources.NAME]` table."""

    name: str
    kind: str
    weight: float = 1.0
    join: Sequence[str] = ()
    prompt: Sequence[str] = ()
    completion: str = ""


@dataclass(frozen=True)
class Document:
    """A text, or (for chat rows) the messages of one exchange."""

    text: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)


def read_sources(table: Mapping[str, Mapping[str, Any]], weights: Mapping[str, float]) -> list[Source]:
    """The `[sources]` table as records; `weights` overrides single weights."""
    unknown = set(weights) - set(table)
    if unknown:
        raise ValueError(f"weights names no source: {sorted(unknown)}. Expected: {sorted(table)}")
    return [Source(name=name, **{**keys, "weight": weights.get(name, keys["weight"])}) for name, keys in table.items()]


def find_split(data: Path, source: str, split: str) -> Path | None:
    """The file that holds a split, or None where the source has no such split."""
    for ending in (".jsonl", ".jsonl.gz", ".txt", ".txt.gz"):
        path = data / source / f"{split}{ending}"
        if path.is_file():
            return path
    return None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file; a plain text file is one row `{"text": ...}`."""
    text = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode("utf-8")
    if ".txt" in path.suffixes:
        return [{"text": text}]
    return [json.loads(line) for line in text.split("\n") if line]


def clean(text: str) -> str:
    """Straight quotes and no calculator marks (`<<48/2=24>>` in gsm8k)."""
    text = text.translate(_STRAIGHT)
    while "<<" in text and ">>" in text.split("<<", 1)[1]:
        before, rest = text.split("<<", 1)
        text = before + rest.split(">>", 1)[1]
    return text.strip()


def documents(source: Source, rows: Sequence[Mapping[str, Any]]) -> Iterator[Document]:
    """The rows of one split as documents, in their order."""
    if source.kind == "chat":
        for row in rows:
            question = "\n".join(clean(row[name]) for name in source.prompt if row[name])
            answer = clean(row[source.completion])
            yield Document(messages=[{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
    elif source.join:
        for _, chunks in groupby(rows, key=lambda row: tuple(row[name] for name in source.join)):
            yield Document(text="\n\n".join(clean(chunk["text"]) for chunk in chunks))
    else:
        yield from (Document(text=clean(row["text"])) for row in rows)


def load_split(data: Path, source: Source, split: str) -> list[Document]:
    """All documents of a split; a source that comes as one file `all` gives every tenth row to validation.

    Raises:
        FileNotFoundError: the data directory lacks the source.
    """
    path = find_split(data, source.name, split)
    if path is not None:
        return list(documents(source, read_rows(path)))
    whole = find_split(data, source.name, "all")
    if whole is None:
        raise FileNotFoundError(f"no {split} or all file in {data / source.name}; is --data the right folder?")
    rows = read_rows(whole)
    chosen = {"train": [r for i, r in enumerate(rows) if i % 10], "validation": rows[::10], "test": []}
    return list(documents(source, chosen[split]))


def render(document: Document, tokenizer: PreTrainedTokenizerBase) -> str:
    """The document's text with its begin and end marks."""
    if document.messages:
        return str(tokenizer.apply_chat_template(document.messages, tokenize=False))
    return f"{tokenizer.bos_token}{document.text}{tokenizer.eos_token}"


def encode(items: Sequence[Document], tokenizer: PreTrainedTokenizerBase, seed: int | None) -> Tokens:
    """One stream of token ids, shape [tokens]; the documents in an order drawn from `seed` (None: as they come)."""
    texts = [render(item, tokenizer) for item in items]
    if seed is not None:
        random.Random(seed).shuffle(texts)  # noqa: S311 (no secret)
    if not texts:
        return np.zeros(0, np.uint16)
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return np.concatenate([np.asarray(row, dtype=np.uint16) for row in ids])


def plan_windows(
    lengths: Sequence[int], weights: Sequence[float], window: int, epochs: int, seed: int
) -> npt.NDArray[np.int64]:
    """Which window is seen when.

    Args:
        lengths: tokens of each stream.
        weights: passes over each stream in one epoch; the fraction is a random part of the stream.
        window: tokens of one window.
        epochs: how often.
        seed: fixes offsets and order.

    Returns:
        (stream, first token) of every window in training order, shape [windows, 2].
    """
    draw = np.random.default_rng(seed)
    plan = []
    for _ in range(epochs):
        epoch = []
        for stream, (length, weight) in enumerate(zip(lengths, weights, strict=True)):
            while weight > 0:
                starts = np.arange(int(draw.integers(window)), length - window + 1, window)
                if weight < 1:
                    starts = draw.permutation(starts)[: round(weight * len(starts))]
                epoch.append(np.stack([np.full_like(starts, stream), starts], axis=1))
                weight -= 1
        plan.append(draw.permutation(np.concatenate(epoch)))
    return np.concatenate(plan).astype(np.int64)


def held_out_windows(lengths: Sequence[int], window: int, most: int) -> npt.NDArray[np.int64]:
    """Up to `most` windows of each stream, spread evenly over it, shape [windows, 2]; short streams are left out."""
    chosen = []
    for stream, length in enumerate(lengths):
        starts = np.arange(0, length - window + 1, window)
        if len(starts) < most:  # too short to count as much as the others
            continue
        starts = starts[np.linspace(0, len(starts) - 1, most).astype(np.int64)]
        chosen.append(np.stack([np.full_like(starts, stream), starts], axis=1))
    return np.concatenate(chosen).astype(np.int64)


class Windows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The windows of a plan as model inputs: `input_ids` and `labels`, int64, shape [window]."""

    def __init__(self, streams: Sequence[Tokens], plan: npt.NDArray[np.int64], window: int) -> None:
        self.streams, self.plan, self.window = streams, plan, window

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        stream, start = self.plan[index]
        ids = torch.from_numpy(self.streams[stream][start : start + self.window].astype(np.int64))
        return {"input_ids": ids, "labels": ids}
