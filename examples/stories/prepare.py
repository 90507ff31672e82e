"""Put together what the example needs: the model with a tokenizer that begins every text with <s>, and some rows.

    python prepare.py MODEL ROWS OUT

MODEL is stories260K in Hugging Face form, ROWS a folder with train.jsonl and test.jsonl of TinyStories ({"text": ...}).
Writes OUT/model, OUT/train.jsonl and OUT/held.jsonl.
"""

from __future__ import annotations

import shutil
import sys
from itertools import islice
from pathlib import Path

from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

TRAIN_ROWS, HELD_ROWS = 480, 60
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def prepare(model: Path, rows: Path, out: Path) -> None:
    """Write the model directory and the two files of rows."""
    (out / "model").mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(model / name, out / "model" / name)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(model / "tokenizer.json"), **SPECIAL)
    # The model was pretrained on stories that begin with <s>; its tokenizer file does not say so.
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(out / "model")
    for source, name, count in (("train", "train", TRAIN_ROWS), ("test", "held", HELD_ROWS)):
        with (rows / f"{source}.jsonl").open(encoding="utf-8") as file:
            (out / f"{name}.jsonl").write_text("".join(islice(file, count)), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    prepare(*map(Path, sys.argv[1:]))
