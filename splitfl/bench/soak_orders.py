"""What `splitfl bench soak` asks of its long-lived parties, and what they answer: one JSON line each."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from splitfl.bench.orders import Line


class SoakStart(Line, frozen=True, kw_only=True):
    """How a party is started: the first argument of its command line."""

    kit: str
    owner: str
    owner_key: str
    key: str
    seed: int


class TrainOne(Line, frozen=True, kw_only=True, tag="train"):
    """Train step `number` of a cycle; step 0 begins from the fresh adapter."""

    number: int


class WriteSome(Line, frozen=True, kw_only=True, tag="write"):
    """Continue a prompt greedily with the adapter as it is, with a KV cache at the owner."""

    new_tokens: int


SoakOrder: TypeAlias = TrainOne | WriteSome


class SoakReady(Line, frozen=True, kw_only=True):
    """The party is connected."""

    trainable: int


class Trained(Line, frozen=True, kw_only=True):
    """One step is done. `loss` is the float32 number, exactly."""

    loss: float
    gradient: float
    """Norm of the whole gradient, the same way."""
    seconds: float
    openings: int
    """Sessions opened anew at an owner that had forgotten this one."""


class Wrote(Line, frozen=True, kw_only=True):
    """One generation is done."""

    tokens: tuple[int, ...]
    seconds: float


SoakAnswer: TypeAlias = Trained | Wrote
SOAK_ORDERS = msgspec.json.Decoder(SoakOrder)
