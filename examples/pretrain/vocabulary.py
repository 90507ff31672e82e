"""The tokenizer: byte-level BPE trained on the corpus itself, with a chat template in plain words."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<s>", "</s>"

# Words instead of role marks: a small model never meets a special token that it has not learnt. The generation block
# tells `return_assistant_tokens_mask` which tokens are the answer.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ 'Answer:' }}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\\n' }}"
    "{% else %}{{ 'Question: ' + message['content'] + '\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Answer:' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int, length: int) -> PreTrainedTokenizerBase:
    """A tokenizer that can write any bytes: no unknown token, digits one by one, `decode(encode(text)) == text`.

    Args:
        texts: what the merges are learnt from.
        vocab_size: entries in all, the three marks and the 256 bytes among them.
        length: the model's context, in tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B:1", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=length,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def save_whole(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the folder in one move; where another process was faster, keep its files (they are the same)."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    written = folder.parent / f".tokenizer-{os.getpid()}"
    try:
        tokenizer.save_pretrained(written)
        os.replace(written, folder)
    except OSError:
        if not (folder / "tokenizer.json").is_file():
            raise
    finally:
        shutil.rmtree(written, ignore_errors=True)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer as a user gets it."""
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)
