"""A model of GPT-2's shape instead of a Llama, and a trainer whose text is explained by the small Llama.

A few million tokens are little for 30 million weights. Two things make more of them. The token embeddings begin as the
teacher's, turned into the wider space by a matrix with orthonormal rows, so that their inner products are kept. And at
every position the loss counts the teacher's whole distribution beside the one token that came:

    loss = (1 - w) * cross-entropy + w * KL(teacher || model)

Held-out losses are plain cross-entropy. Teacher and model share the tokenizer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerBase, Trainer


def build_gpt2(
    shape: dict[str, Any], tokenizer: PreTrainedTokenizerBase, teacher: LlamaForCausalLM | None, seed: int
) -> GPT2LMHeadModel:
    """Random float32 weights, but for the embeddings where there is a teacher.

    Args:
        shape: names of `transformers.GPT2Config`.
        tokenizer: of the texts, and of the teacher.
        teacher: at most as wide as the model.
        seed: of the turn.
    """
    config = GPT2Config(
        **shape,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=False,
    )
    model = GPT2LMHeadModel(config)
    if teacher is not None:
        known = teacher.get_input_embeddings().weight.detach().float()
        draw = torch.randn(config.n_embd, known.shape[1], generator=torch.Generator().manual_seed(seed))
        turned = known @ torch.linalg.qr(draw).Q.T
        model.transformer.wte.weight.data.copy_(turned * (config.initializer_range / turned.std()))
    return model


class TaughtTrainer(Trainer):
    """`transformers.Trainer` with the loss above.

    Args:
        teacher: frozen; None trains on the text alone.
        teacher_weight: w, from 0 to 1.
    """

    def __init__(self, *args: Any, teacher: LlamaForCausalLM | None, teacher_weight: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weight = teacher_weight
        self.teacher = None if teacher is None else teacher.requires_grad_(False).eval().to(self.args.device)

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """In evaluation the cross-entropy alone."""
        outputs = model(**inputs)
        loss = outputs.loss
        if self.teacher is not None and model.training:
            with torch.no_grad():
                said = self.teacher(input_ids=inputs["input_ids"], use_cache=False).logits[:, :-1].float()
            mine = functional.log_softmax(outputs.logits[:, :-1].float(), dim=-1).flatten(0, 1)
            wanted = functional.log_softmax(said, dim=-1).flatten(0, 1)
            divergence = functional.kl_div(mine, wanted, reduction="batchmean", log_target=True)
            loss = (1 - self.weight) * loss + self.weight * divergence
        return (loss, outputs) if return_outputs else loss
