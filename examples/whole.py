"""What the recipes share: the whole model with an adapter on it, its scores and its greedy answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from party.evaluate import Score, evaluate
from splitfl.data import Collator, encode_prompt, load_rows, tokenise
from splitfl.kit import Kit, open_kit
from splitfl.load import model_class, quiet_library
from splitfl.quiet import silence_library_warnings


class Whole:
    """The whole model, and adapters put onto it one after the other, as anybody with PEFT would.

    Args:
        model: directory of the whole model.
        kit: its kit, for the tokenizer, the classes and a head that the checkpoint lacks.
    """

    def __init__(self, model: Path, kit: Path) -> None:
        silence_library_warnings()
        self.folder, self.kit = model, open_kit(kit)
        self.tokenizer = self.kit.tokenizer()
        self.collator = Collator(self.tokenizer, pad_token_id=self.kit.config.pad_token_id)

    @contextmanager
    def tuned(self, adapter: Path | None) -> Iterator[Any]:
        """The model as it came, or with the adapter of this directory."""
        from peft import PeftModel  # loads libraries that talk, so only after they were silenced

        base = _base(self.folder, self.kit)
        yield (base if adapter is None else PeftModel.from_pretrained(base, adapter)).eval()

    def score(self, model: Any, rows: Path, *, max_length: int) -> Score:
        """Held-out figures on a file of rows; longer rows are cut on the right."""
        task = self.kit.plan.task
        found = load_rows(rows, task=task, label2id=self.kit.config.label2id if task != "causal-lm" else None)
        examples = tokenise(found, self.tokenizer, max_length=max_length, truncation="right")
        return evaluate(model, examples, self.collator, task=task, batch_size=8)

    def classes(
        self, model: Any, texts: Sequence[str], *, max_length: int, offsets: Sequence[float] | None = None
    ) -> list[int]:
        """The likeliest class of each text, by its logits plus `offsets`."""
        found, more = list[int](), 0.0 if offsets is None else torch.tensor(offsets)
        with torch.no_grad():
            for start in range(0, len(texts), 32):
                batch = self.tokenizer(
                    list(texts[start : start + 32]), truncation=True, max_length=max_length, padding=True,
                    return_tensors="pt",
                )  # fmt: skip
                found += (model(**batch).logits + more).argmax(-1).tolist()
        return found

    def answers(self, model: Any, prompts: Sequence[str], *, max_new_tokens: int, batch: int = 12) -> list[str]:
        """What the model answers greedily to prompts of rows with ``prompt`` and ``completion``."""
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        coded = [encode_prompt(self.tokenizer, prompt) for prompt in prompts]
        found = [""] * len(coded)
        order = sorted(range(len(coded)), key=lambda index: len(coded[index]))
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            width = max(len(coded[index]) for index in chosen)
            ids = torch.tensor([[pad] * (width - len(coded[i])) + coded[i] for i in chosen])
            mask = torch.tensor([[0] * (width - len(coded[i])) + [1] * len(coded[i]) for i in chosen])
            with torch.no_grad():
                made = model.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False,
                    pad_token_id=pad, eos_token_id=self.tokenizer.eos_token_id,
                )  # fmt: skip
            for index, row in zip(chosen, made[:, width:].tolist(), strict=True):
                found[index] = self.tokenizer.decode(row, skip_special_tokens=True)
        return found


def _base(folder: Path, kit: Kit) -> PreTrainedModel:
    """The whole model in float32; a head that the checkpoint lacks is the kit's."""
    with quiet_library():
        model, info = model_class(kit.config, kit.plan.task).from_pretrained(
            folder, config=kit.config, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        fresh = set(info["missing_keys"])
        if fresh:
            own = kit.load(torch.float32).state_dict()
            model.load_state_dict({name: own[name] for name in fresh if name in own}, strict=False)
    model.config.use_cache = True
    return model
