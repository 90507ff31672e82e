"""The data holder's process under measurement: its own code from the socket up. ``python -m`` this, with a start.

Only ever a process of its own: it is what `splitfl.bench` starts, never what it imports, since it uses `party`.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from dataclasses import replace
from pathlib import Path
from typing import cast

import msgspec
import torch

from party.connect import open_session
from party.model import open_model
from party.pipeline import run_pipelined, split_batch
from party.turns import share_heap
from splitfl.adapters import add_lora, lora_config
from splitfl.bench.orders import PartyStart
from splitfl.bench.side import Side, answer_orders, own_output
from splitfl.kit import open_kit
from splitfl.link import TrunkLink, TrunkRequest
from splitfl.quiet import silence_library_warnings
from splitfl.wire.coding import Coded, encode_int4, encode_int8
from splitfl.wire.messages import DtypeName

_ENCODERS = {"int8": encode_int8, "int4": encode_int4}


class PartySide(Side):
    """The party's model: knows of micro-batches."""

    def loss_with_gradient(self, ids: torch.Tensor, parts: int) -> torch.Tensor:
        """Forward and backward of a batch [B, T], in `parts` micro-batches that overlap."""
        if parts == 1:
            return super().loss_with_gradient(ids, parts)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        works = [functools.partial(self._part, part, ids[:, 1:].numel()) for part in split_batch(batch, parts).parts]
        return torch.stack(run_pipelined(works)).sum()

    def _part(self, part: dict[str, torch.Tensor], items: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(**part, num_items_in_batch=items).loss
        loss.backward()
        return loss.detach()


class Coding:
    """A `splitfl.link.TrunkLink` that codes what is sent, as a mechanism does, and nothing else."""

    def __init__(self, link: TrunkLink, coding: str) -> None:
        self.link, self.encode = link, _ENCODERS[coding]

    def forward(self, request: TrunkRequest) -> tuple[torch.Tensor, int]:
        """See `splitfl.link.TrunkLink`."""
        assert isinstance(request.hidden, torch.Tensor)  # noqa: S101
        return self.link.forward(replace(request, hidden=self.encode(request.hidden)))

    def backward(self, step: int, gradient: torch.Tensor | Coded) -> torch.Tensor:
        """See `splitfl.link.TrunkLink`."""
        assert isinstance(gradient, torch.Tensor)  # noqa: S101
        return self.link.backward(step, self.encode(gradient))

    def release(self, *, caches: tuple[int, ...] = (), steps: tuple[int, ...] = ()) -> None:
        """See `splitfl.link.TrunkLink`."""
        self.link.release(caches=caches, steps=steps)


def main() -> None:
    """Open the session and the model, and run until standard input ends."""
    silence_library_warnings()
    answers = own_output()
    start = msgspec.json.decode(sys.argv[1], type=PartyStart)
    torch.set_num_threads(start.threads)
    share_heap()
    kit = open_kit(Path(start.kit))
    session = open_session(
        kit.plan,
        start.owner,
        owner_key=Path(start.owner_key),
        key=Path(start.key),
        wire_dtype=cast("DtypeName", start.dtype),
        hidden_coding=start.coding,
        gradient_coding=start.coding,
        timeout_s=600,
    )
    with contextlib.closing(session):
        link: TrunkLink = session if start.coding == "raw" else Coding(session, start.coding)
        model = add_lora(base := open_model(kit, link, dtype=start.dtype), lora_config(base, kit.plan))
        side = PartySide(model, lambda: (session.bytes_sent, session.bytes_received))
        answer_orders(side, answers)


if __name__ == "__main__":
    main()
