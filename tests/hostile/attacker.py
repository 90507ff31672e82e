"""A party with an admitted key that sends whatever it likes: raw frames, without any of the checks of ours."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import torch
import zmq

from splitfl.kit import open_kit
from splitfl.wire import frames as wire
from splitfl.wire.keys import load_keys, load_public
from splitfl.wire.messages import (
    WIRE_VERSION,
    AnyMessage,
    Backward,
    Bye,
    Closed,
    Forward,
    ForwardDone,
    Hello,
    Refused,
    TensorName,
    Welcome,
    kind,
)
from tests.live.owner import PARTIES, Owner

PATIENCE_S = 60.0

_numbers = itertools.count(1000)


def new_number() -> int:
    """A session number that no other attacker of this process has."""
    return next(_numbers)


def pack(**fields: Any) -> bytes:
    """A header of any fields whatever."""
    return msgspec.msgpack.encode(fields)


class Attacker:
    """One connection, as `party`, to `owner`."""

    def __init__(self, owner: Owner, context: zmq.Context[Any], party: str) -> None:
        assert owner.keys is not None
        self.plan = open_kit(owner.kit_dir).plan
        self.number = new_number()
        self.greeted: set[int] = set()
        """Sessions that it may have opened."""
        self.link: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        keys = load_keys(owner.keys / f"{party}.key_secret")
        self.link.curve_publickey, self.link.curve_secretkey = keys.public, keys.secret
        self.link.curve_serverkey = load_public(owner.keys / "owner.key")
        self.link.set(zmq.RCVHWM, 0)
        self.link.set(zmq.SNDTIMEO, round(PATIENCE_S * 1000))
        self.link.connect(owner.address)

    # ---- out

    def send(self, *frames: Any) -> None:
        """Exactly these frames."""
        self.link.send_multipart(frames, copy=True)

    def say(self, message: AnyMessage, **tensors: torch.Tensor) -> list[Any]:
        """A message with its tensors as our own code would send it, but unchecked; the frames that went out."""
        named: dict[TensorName, torch.Tensor] = dict(tensors)  # type: ignore[arg-type]
        frames = wire.encode(message, named, None)
        self.send(*frames)
        return frames

    def hello(self, number: int | None = None, **changes: Any) -> None:
        """A hello for a session of that number (by default this attacker's own)."""
        terms: dict[str, Any] = {
            "version": WIRE_VERSION,
            "protocol": "split",
            "trunk": self.plan.trunk,
            "plan": self.plan.digest,
            "wire_dtype": "float32",
        }
        chosen = self.number if number is None else number
        self.greeted.add(chosen)
        self.say(Hello(session=chosen, **(terms | changes)))

    def forward(self, step: int, hidden: torch.Tensor, *, session: int | None = None, **fields: Any) -> None:
        """A forward; `fields` are those of the message, or its further tensors."""
        tensors = {name: fields.pop(name) for name in ("mask", "positions") if name in fields}
        number = self.number if session is None else session
        self.say(Forward(session=number, step=step, **fields), hidden=hidden, **tensors)

    def backward(self, step: int, gradient: torch.Tensor) -> None:
        """A backward."""
        self.say(Backward(session=self.number, step=step), gradient=gradient)

    # ---- in

    def receive(self, timeout_s: float = PATIENCE_S) -> tuple[AnyMessage, list[memoryview]] | None:
        """What the owner says next, and its frames; None after `timeout_s`."""
        if not self.link.poll(round(timeout_s * 1000)):
            return None
        frames = [frame.buffer for frame in self.link.recv_multipart(copy=False)]
        return wire.open_header(frames, sender="owner"), frames

    def answer(self) -> AnyMessage:
        """What the owner says next; it must say something."""
        came = self.receive()
        assert came is not None, "the owner did not answer"
        return came[0]

    def result(self) -> torch.Tensor:
        """The tensor of the next answer, which must be a result."""
        came = self.receive()
        assert came is not None, "the owner did not answer"
        message, frames = came
        assert not isinstance(message, Refused), message
        return next(iter(wire.tensors_of(message, frames).values())).clone()

    def refused(self, *codes: str) -> Refused:
        """The next answer, which must be a refusal with one of these codes."""
        came = self.answer()
        assert isinstance(came, Refused), f"not refused: {kind(came)}"
        assert came.code in codes, came
        assert came.problem
        return came

    def opened(self) -> Attacker:
        """This one, with a session open."""
        self.hello()
        came = self.answer()
        assert isinstance(came, Welcome), came
        return self

    def leave(self, numbers: Sequence[int]) -> None:
        """Close these sessions, whether they are open or not."""
        for number in numbers:
            self.say(Bye(session=number))
            came = self.answer()
            assert isinstance(came, Closed) or (isinstance(came, Refused) and came.code == "unknown_session"), came

    def fill(self, requests: Iterator[tuple[int, dict[str, Any]]], hidden: torch.Tensor) -> tuple[list[int], Refused]:
        """Send forwards until one is refused; the steps that were answered, and the refusal."""
        done = []
        for step, fields in requests:
            self.forward(step, hidden, **fields)
            came = self.answer()
            if isinstance(came, Refused):
                return done, came
            assert isinstance(came, ForwardDone)
            done.append(step)
        raise AssertionError("never refused")


@contextmanager
def attackers(owner: Owner, count: int = 1, party: str = PARTIES[1]) -> Iterator[Sequence[Attacker]]:
    """Some connections of one admitted party, closed on the way out; their sessions are, too, for the next test."""
    context: zmq.Context[Any] = zmq.Context()
    made = [Attacker(owner, context, party) for _ in range(count)]
    try:
        yield made
    finally:
        if numbers := sorted(set().union(*(each.greeted for each in made))):
            made.append(Attacker(owner, context, party))
            made[-1].leave(numbers)
        for each in made:
            each.link.close(0)
        context.destroy(linger=0)


@contextmanager
def attacker(owner: Owner, party: str = PARTIES[1]) -> Iterator[Attacker]:
    """One of them."""
    with attackers(owner, 1, party) as (one,):
        yield one


def within(seconds: float) -> Iterator[None]:
    """Loop until so many seconds have passed, then fail."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        yield
    raise AssertionError(f"it did not come about within {seconds:.0f} s")
