"""One sound example of every message, with its tensors. B=2, T=3, S=5, D=4."""

from __future__ import annotations

import torch

from splitfl.wire.frames import Limits
from splitfl.wire.messages import (
    WIRE_VERSION,
    AnyMessage,
    Backward,
    BackwardDone,
    Bye,
    Closed,
    Fetch,
    Forward,
    ForwardDone,
    Hello,
    Piece,
    Refused,
    Release,
    TensorName,
    Welcome,
)

SESSION = 77
LIMITS = Limits(width=4, max_tokens=24, max_length=8, wire_dtype="float32")

HELLO = Hello(session=SESSION, version=WIRE_VERSION, protocol="split", trunk="trunk", plan="plan", wire_dtype="float32")
WELCOME = Welcome(
    session=SESSION,
    version=WIRE_VERSION,
    max_tokens=24,
    max_length=8,
    memory="keep",
    lease_s=60.0,
    server="0.1.0",
)

Tensors = dict[TensorName, torch.Tensor]


def hidden(rows: int = 2, new: int = 3, width: int = 4) -> torch.Tensor:
    return torch.arange(rows * new * width, dtype=torch.float32).reshape(rows, new, width)


def mask(rows: int = 2, total: int = 3) -> torch.Tensor:
    return torch.ones(rows, total, dtype=torch.int64)


def content(size: int = 6) -> torch.Tensor:
    return torch.arange(size, dtype=torch.uint8)


def positions(rows: int = 1, new: int = 3) -> torch.Tensor:
    return torch.arange(new).repeat(rows, 1)


FROM_PARTY: list[tuple[AnyMessage, Tensors]] = [
    (HELLO, {}),
    (Forward(session=SESSION, step=0), {"hidden": hidden()}),
    (Forward(session=SESSION, step=1, keep=True), {"hidden": hidden(), "mask": mask(), "positions": positions()}),
    (
        Forward(session=SESSION, step=2, cache=9, past=2, rows=(1, 1)),
        {"hidden": hidden(), "mask": mask(total=5), "positions": positions(rows=2)},
    ),
    (Backward(session=SESSION, step=1), {"gradient": hidden()}),
    (Release(session=SESSION, caches=(9,), steps=(0, 1)), {}),
    (Fetch(session=SESSION, step=3, file=1, offset=4, length=6), {}),
    (Bye(session=SESSION), {}),
]
FROM_OWNER: list[tuple[AnyMessage, Tensors]] = [
    (WELCOME, {}),
    (ForwardDone(session=SESSION, step=1), {"hidden": hidden()}),
    (BackwardDone(session=SESSION, step=1), {"gradient": hidden()}),
    (Piece(session=SESSION, step=3, file=1, offset=4, total=11), {"piece": content()}),
    (Refused(session=SESSION, code="busy", problem="No room.", hint="wait", step=3), {}),
    (Closed(session=SESSION), {}),
]
