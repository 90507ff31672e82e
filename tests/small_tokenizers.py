"""Small real tokenizers: byte-level BPE trained on the fixture text, with and without a chat template."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

DATA = Path(__file__).parent / "data"
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]

# Turn by turn, as most templates do it.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Begins with bos, trims what it is given, joins turns without a mark of their end, and knows two roles only.
TERSE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ('user', 'assistant') %}{{ raise_exception('Only user and assistant.') }}{% endif %}"
    "{% if message['role'] == 'user' %}[INST] {{ message['content'] | trim }} [/INST]"
    "{% else %} {{ message['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
# Invites an answer with reasoning that the finished turn does not show.
THINKING = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'].split('</think>')[-1] | trim }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
)


def bpe(
    chat_template: str | None = None, *, adds_bos: bool = False, adds_eos: bool = False, vocab_size: int = 400
) -> PreTrainedTokenizerFast:
    """A byte-level BPE with bos, eos and pad; every text can be written with it and read back."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator((DATA / "harbour.txt").read_text(encoding="utf-8").splitlines(), trainer)
    begin, end = "<s> " * adds_bos, " </s>" * adds_eos
    if begin or end:
        core.post_processor = processors.TemplateProcessing(
            single=f"{begin}$A{end}",
            pair=f"{begin}$A{end} $B:1{end and end + ':1'}",
            special_tokens=[("<s>", 1), ("</s>", 2)],
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = chat_template
    return tokenizer
