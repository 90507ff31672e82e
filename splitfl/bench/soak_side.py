"""A party of `splitfl bench soak`: trains and generates as it is told, and its figures are compared with earlier ones.

Only ever a process of its own, since it uses `party`. What it computes follows from its seed and the number of the step
alone, so that every cycle must bring the same losses, the same gradients and the same text, whatever befalls the link.
"""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path

import msgspec
import torch

from party.connect import open_session
from party.model import open_model
from party.session import Session
from splitfl.adapters import add_lora, lora_config
from splitfl.bench.lines import own_output, say
from splitfl.bench.soak_orders import SOAK_ORDERS, SoakReady, SoakStart, Trained, TrainOne, WriteSome, Wrote
from splitfl.kit import open_kit
from splitfl.quiet import silence_library_warnings

ROWS, LENGTH, PROMPT = 2, 32, 8
_LEARNING_RATE = 5e-3
_TIMEOUT_S = 240.0


class SoakParty:
    """One model with its adapter, and the session it trains through."""

    def __init__(self, start: SoakStart) -> None:
        kit = open_kit(Path(start.kit))
        self.session: Session = open_session(
            kit.plan, start.owner, owner_key=Path(start.owner_key), key=Path(start.key), timeout_s=_TIMEOUT_S
        )
        base = open_model(kit, self.session, dtype="float32")
        self.model = add_lora(base, lora_config(base, kit.plan), seed=start.seed)
        self.seed, self.words = start.seed, int(kit.config.get_text_config().vocab_size)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.fresh = [p.detach().clone() for p in self.trained]
        self.optimizer = self._optimizer()

    def _optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.trained, lr=_LEARNING_RATE)

    def train(self, order: TrainOne) -> Trained:
        """One step on the batch of that number."""
        began = time.perf_counter()
        if order.number == 0:
            with torch.no_grad():
                for parameter, fresh in zip(self.trained, self.fresh, strict=True):
                    parameter.copy_(fresh)
            self.optimizer = self._optimizer()
        self.model.train()
        torch.manual_seed(self.seed * 1009 + order.number)  # for dropout
        ids = self._ids(order.number, LENGTH)
        mask = torch.ones_like(ids)
        mask[0, LENGTH - 5 :] = 0
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        gradient = torch.stack([p.grad.norm() for p in self.trained if p.grad is not None]).norm()
        self.optimizer.step()
        return Trained(
            loss=loss.item(),
            gradient=gradient.item(),
            seconds=time.perf_counter() - began,
            openings=self.session.openings,
        )

    def write(self, order: WriteSome) -> Wrote:
        """Some tokens behind the same prompt."""
        began = time.perf_counter()
        self.model.eval()
        ids = self._ids(-1, PROMPT)[:1]
        with torch.no_grad():
            output = self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=order.new_tokens,
                min_new_tokens=order.new_tokens, do_sample=False, use_cache=True, pad_token_id=0,
            )  # fmt: skip
        return Wrote(tokens=tuple(output[0, PROMPT:].tolist()), seconds=time.perf_counter() - began)

    def _ids(self, number: int, length: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + number + 1)
        return torch.randint(0, self.words, (ROWS, length), generator=generator)


def main() -> None:
    """Answer until standard input ends, which it also does when the measuring process is gone."""
    silence_library_warnings()
    answers = own_output()
    torch.set_num_threads(1)
    party = SoakParty(msgspec.json.decode(sys.argv[1], type=SoakStart))
    with contextlib.closing(party.session):
        say(answers, SoakReady(trainable=sum(p.numel() for p in party.trained)))
        for line in sys.stdin:
            order = SOAK_ORDERS.decode(line)
            say(answers, party.train(order) if isinstance(order, TrainOne) else party.write(order))


if __name__ == "__main__":
    main()
