"""Choose the best trial by held-out loss, store it in 16 bits with its tokenizer and write its model card.

    python examples/pretrain/publish.py --data ../shared/data --runs runs/pretrain --out splitfl/assets/model

The weights are rounded to bfloat16 and to float16, both are measured on the validation windows, and the one that loses
less is kept. A float16 gain under `WORTH` goes to bfloat16 all the same: float16 gradients underflow without a loss
scaler, so float16 weights would make a poor default for tuning.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from card import HeldOut, draw_losses, write_card
from corpus import Source, Tokens, Windows, encode, load_split, read_sources
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.utils import logging
from vocabulary import load_tokenizer

WORTH = 1e-3  # nats per token
PROMPTS = (
    "Once upon a time, there was",
    "One day, a boy named Tim found a strange box. He opened it and",
    "It was late in the evening when the old captain",
    "ROMEO:\n",
    "Question: Tom has 3 apples and buys 5 more. How many apples does Tom have?\nAnswer:",
    "Question: Write a short letter to a friend.\nAnswer:",
)


def read_results(runs: Path) -> dict[str, dict[str, Any]]:
    """The finished trials, best first.

    Raises:
        SystemExit: none is finished.
    """
    found = {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in runs.glob("*/result.json")}
    if not found:
        raise SystemExit(f"no result.json under {runs}. Next: run pretrain.py --out {runs} to its end")
    return dict(sorted(found.items(), key=lambda item: float(item[1]["eval_loss"])))


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, stream: Tokens, most: int) -> tuple[float, int]:
    """Mean loss in nats over up to `most` windows spread over a stream, and the number of tokens predicted."""
    window = min(model.config.max_position_embeddings, len(stream))
    starts = np.arange(0, len(stream) - window + 1, window)
    starts = starts[np.linspace(0, len(starts) - 1, min(most, len(starts))).astype(np.int64)]
    windows = Windows([stream], np.stack([np.zeros_like(starts), starts], axis=1), window)
    losses = []
    for batch in torch.utils.data.DataLoader(windows, batch_size=8):
        loss = model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss
        losses += [loss.item()] * len(batch["input_ids"])
    return sum(losses) / len(losses), len(losses) * (window - 1)


def measure(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, data: Path, sources: list[Source], most: int
) -> list[HeldOut]:
    """Held-out loss of every source and split that has one."""
    figures = []
    for source in sources:
        for split in ("validation", "test"):
            stream = encode(load_split(data, source, split), tokenizer, seed=None)
            if len(stream) == 0:
                continue
            loss, tokens = held_out_loss(model, stream, most)
            size = len(tokenizer.decode(stream.tolist(), skip_special_tokens=True).encode())
            bits = loss / math.log(2) * len(stream) / size
            figures.append(HeldOut(source.name, split, tokens, loss, bits))
            print(f"{source.name} {split}: perplexity {math.exp(loss):.1f}", flush=True)
    return figures


def rounded(folder: Path, dtype: torch.dtype) -> LlamaForCausalLM:
    """The model with weights rounded to `dtype`, computing in float32, in eval mode."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).to(dtype).float().eval()


def compare_dtypes(folder: Path, streams: list[Tokens], most: int) -> dict[str, float]:
    """Mean validation loss over the sources with the weights in 32 and in both kinds of 16 bits."""
    losses = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = rounded(folder, dtype)
        name = str(dtype).removeprefix("torch.")
        losses[name] = sum(held_out_loss(model, stream, most)[0] for stream in streams) / len(streams)
        print(f"{name} weights: validation loss {losses[name]:.5f}", flush=True)
    return losses


def choose_dtype(losses: dict[str, float]) -> torch.dtype:
    """float16 only where it is clearly better (see the top of this file)."""
    return torch.float16 if losses["float16"] < losses["bfloat16"] - WORTH else torch.bfloat16


@torch.no_grad()
def write_samples(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, tokens: int = 90
) -> list[tuple[str, str]]:
    """(prompt, continuation) pairs, sampled at temperature 0.7 from the 40 likeliest tokens with a fixed seed."""
    torch.manual_seed(1)
    samples = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=True, temperature=0.7, top_k=40)[0]
        samples.append((prompt, tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True)))
    return samples


def store(folder: Path, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Weights, config and tokenizer as `from_pretrained` expects them, in one safetensors file."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    model.config.use_cache, model.config.attention_dropout = True, 0.0
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def publish(data: Path, runs: Path, out: Path, most: int) -> None:
    """Write the model folder anew and put it in place of the old one."""
    results = read_results(runs)
    best = next(iter(results))
    settings, folder = results[best]["settings"], runs / best / "best"
    sources = read_sources(settings["sources"], settings["training"]["weights"])
    tokenizer = load_tokenizer(folder)
    # The windows that pretrain.py selects by; the tiny source is left out there too.
    main_sources = [source for source in sources if source.name != "self_instruct_seed"]
    validation = [encode(load_split(data, source, "validation"), tokenizer, seed=0) for source in main_sources]
    losses = compare_dtypes(folder, validation, settings["training"]["evaluation_windows"])
    dtype = choose_dtype(losses)
    written = out.with_name(f".{out.name}-{os.getpid()}")
    try:
        store(folder, dtype, tokenizer, written)
        model = LlamaForCausalLM.from_pretrained(written, dtype=torch.float32).eval()
        figures = measure(model, tokenizer, data, sources, most)
        draw_losses(results, best, written / "loss_curve.png")
        samples = write_samples(model, tokenizer)
        names = {"parameters": model.num_parameters(), "dtype": str(dtype).removeprefix("torch.")}
        write_card(written, results, best, figures, losses, samples, **names)
        for path in written.iterdir():
            path.chmod(0o644)  # safetensors writes for its owner only; a package is read by everybody
        shutil.rmtree(out, ignore_errors=True)
        os.replace(written, out)
    finally:
        shutil.rmtree(written, ignore_errors=True)
    size = sum(path.stat().st_size for path in out.iterdir()) / 1e6
    print(f"{best} published in {str(dtype).removeprefix('torch.')}: {out}, {size:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with one folder a source")
    parser.add_argument("--runs", type=Path, default=Path("runs/pretrain"), help="the --out of pretrain.py")
    parser.add_argument("--out", type=Path, default=Path("splitfl/assets/model"), help="the model folder; replaced")
    parser.add_argument("--windows", type=int, default=100, help="at most so many windows of each split are measured")
    options = parser.parse_args()
    logging.set_verbosity_error()  # whole books are longer than the context, and meant to be
    logging.disable_progress_bar()
    publish(options.data, options.runs, options.out, options.windows)


if __name__ == "__main__":
    main()
