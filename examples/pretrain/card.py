"""The model card (README.md of the model folder) and the loss curve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

DATA = {
    "gutenberg_books": ("75 books by 27 authors, printed before 1928", "public domain (Project Gutenberg texts)"),
    "tinystories_4mb": ("4,407 short stories in simple English, written by a language model", "CDLA-Sharing-1.0"),
    "tinyshakespeare": ("scenes from Shakespeare's plays", "public domain"),
    "gsm8k": ("7,117 school maths questions with worked answers, in the chat template", "MIT"),
    "self_instruct_seed": ("158 instructions with answers, in the chat template", "Apache-2.0"),
}

CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [llama, tiny]
---

# The small Llama that comes with splitfl

An ordinary `LlamaForCausalLM`, small enough to travel inside a Python package, so that every command of splitfl can be
tried offline on a model that really reads and writes English. It is a test piece. It is no assistant.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("splitfl/assets/model")
tokenizer = AutoTokenizer.from_pretrained("splitfl/assets/model")
```

| | |
| --- | --- |
| shape | {layers} layers, hidden {hidden}, {heads} heads ({kv} key/value), feed-forward {ffn}, tied embeddings |
| parameters | {parameters:,} |
| context | {context} tokens |
| tokenizer | byte-level BPE, {vocab:,} entries, digits one by one; `<s>` begins, `</s>` ends, `<pad>` pads |
| chat template | plain words: `Question: ...` and `Answer: ...` on lines of their own |
| stored as | {dtype} |

## Data

Only the training splits were used. No medical text, no film reviews, no messages and no personal data: these are left
for tuning.

| source | what it is | licence | passes in one epoch |
| --- | --- | --- | --- |
{data}

Citations are in `NOTICE.md` beside this folder. Curly quotes were made straight, and the calculator marks of gsm8k
removed.

## Training

{epochs} epochs, {steps:,} steps of {batch_tokens:,} tokens, on one {device}. AdamW (learning rate {learning_rate:g},
cosine; weight decay {weight_decay:g}), dropout {dropout:g} on what each layer adds. Of these settings, the first has
the best held-out loss (the mean over the four larger sources, nats per token):

{trials}

![held-out loss](loss_curve.png)

Mean validation loss after rounding the weights (nats per token): {rounding}.
Kept: {dtype}.

## Held-out perplexity

Measured on this folder's weights, windows of {context} tokens, per token of this tokenizer; bits per byte can be
compared across tokenizers. The authors of the held-out books are in no other split; Shakespeare is split by place in
the text, the other sources by row.

| source | split | tokens | perplexity | bits per byte |
| --- | --- | ---: | ---: | ---: |
{figures}

## What it writes

Temperature 0.7, the 40 likeliest tokens, one fixed seed, first try. Prompts in bold.

{samples}

## What it cannot do

- It knows nothing. Names, facts and numbers are invented; it has read fewer than five million words, most of them in
  stories and old books.
- It cannot do sums: it writes what a worked answer looks like. Most questions get an answer in the style of school
  maths, because most questions it saw were school maths.
- It loses the thread after a few sentences, repeats itself, and reads no more than {context} tokens.
- English only. The old books carry the prejudices and some slurs of their time, and the model may repeat them.
- It has had no safety training. Do not put it in front of people as a product.
- The TinyStories text is the head of that data set's training file. Other TinyStories models have seen it too, which
  matters to anyone who measures membership.

## Make it again

```
{command}
```

Seeds are fixed. Runs on different devices agree closely, not to the bit.
"""


@dataclass(frozen=True)
class HeldOut:
    """What the model makes of one split of one source."""

    source: str
    split: str
    tokens: int
    loss: float  # nats per token
    bits_per_byte: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


def draw_losses(results: dict[str, dict[str, Any]], best: str, path: Path) -> None:
    """Training loss of the chosen trial and held-out loss of every trial against the step."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, result in results.items():
        points = [(entry["step"], float(entry["eval_loss"])) for entry in result["log"] if "eval_loss" in entry]
        style = {"linewidth": 2.2, "zorder": 3} if name == best else {"linewidth": 1, "alpha": 0.8}
        axes.plot(*zip(*points, strict=True), label=f"{name}, held out", **style)
    points = [(entry["step"], float(entry["loss"])) for entry in results[best]["log"] if "loss" in entry]
    axes.plot(*zip(*points, strict=True), ":", color="grey", label=f"{best}, training (with dropout)")
    axes.set(xlabel="step", ylabel="loss (nats per token)", ylim=(None, min(6.0, points[0][1])))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def table(rows: Sequence[Sequence[object]]) -> str:
    """Rows as the body of a Markdown table."""
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)


def trial_lines(results: dict[str, dict[str, Any]]) -> str:
    """One table line for each trial."""
    head = "| trial | epochs | learning rate | weight decay | dropout | held-out loss |\n| --- " + "| ---: " * 5 + "|\n"
    keys = ("epochs", "learning_rate", "weight_decay", "dropout")
    rows = [
        (name, *(result["settings"]["training"][key] for key in keys), f"{result['eval_loss']:.4f}")
        for name, result in results.items()
    ]
    return head + table(rows)


def quote(prompt: str, continuation: str) -> str:
    """A sample as a Markdown quotation, the prompt in bold."""
    bold = "\n".join(f"**{line}**" if line else "" for line in prompt.rstrip("\n").split("\n"))
    text = bold + ("\n" if prompt.endswith("\n") else "") + continuation.rstrip()
    return "\n".join(f"> {line}  " if line else ">" for line in text.split("\n"))


def write_card(
    folder: Path,
    results: dict[str, dict[str, Any]],
    best: str,
    figures: Sequence[HeldOut],
    losses: dict[str, float],
    samples: Sequence[tuple[str, str]],
    *,
    parameters: int,
    dtype: str,
) -> None:
    """Write `README.md` into the model folder."""
    settings, result = results[best]["settings"], results[best]
    model, training = settings["model"], settings["training"]
    weights = {name: training["weights"].get(name, keys["weight"]) for name, keys in settings["sources"].items()}
    text = CARD.format(
        layers=model["num_hidden_layers"],
        hidden=model["hidden_size"],
        heads=model["num_attention_heads"],
        kv=model["num_key_value_heads"],
        ffn=model["intermediate_size"],
        context=model["max_position_embeddings"],
        parameters=parameters,
        vocab=settings["tokenizer"]["vocab_size"],
        dtype=dtype,
        data=table([(f"`{name}`", *DATA[name], f"{weight:g}") for name, weight in weights.items()]),
        steps=result["steps"],
        batch_tokens=training["batch"] * model["max_position_embeddings"],
        device=result["device"].replace("NVIDIA ", "") + (" GPU" if result["device"] != "cpu" else ""),
        trials=trial_lines(results),
        rounding=", ".join(f"{name} {loss:.5f}" for name, loss in losses.items()),
        figures=table(
            [(f.source, f.split, f"{f.tokens:,}", f"{f.perplexity:.1f}", f"{f.bits_per_byte:.2f}") for f in figures]
        ),
        samples="\n\n".join(quote(*sample) for sample in samples),
        command=(
            f"python examples/pretrain/pretrain.py --data DATA --out runs/pretrain --trial {best}\n"
            "python examples/pretrain/publish.py --data DATA --runs runs/pretrain --out splitfl/assets/model"
        ),
        **{key: training[key] for key in ("epochs", "learning_rate", "weight_decay", "dropout")},
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
