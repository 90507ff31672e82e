"""All that a party sends and receives, as it is before encryption."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import pytest
import torch

import party.fetch
import party.opening
from party.connect import open_session
from splitfl.wire import frames as wire
from splitfl.wire.codecs import Frame
from splitfl.wire.frames import Sender
from splitfl.wire.messages import AnyMessage, TensorName, kind

_SENDERS: dict[str, Sender] = {"sent": "party", "received": "owner"}


@dataclass(frozen=True)
class Recorded:
    """One message."""

    way: Literal["sent", "received"]
    frames: list[bytes]

    @property
    def message(self) -> AnyMessage:
        """Its header, decoded as the other side decodes it."""
        return wire.open_header(self.frames, sender=_SENDERS[self.way])

    @property
    def kind(self) -> str:
        """Its tag."""
        return kind(self.message)

    @property
    def fields(self) -> dict[str, Any]:
        """The header as plain msgpack, whatever we believe a header to be."""
        plain: dict[str, Any] = msgspec.msgpack.decode(self.frames[0])
        return plain

    @property
    def tensors(self) -> dict[TensorName, torch.Tensor]:
        """Its tensors by name."""
        return wire.tensors_of(self.message, self.frames)


@dataclass
class Recording:
    """Messages in the order in which they crossed."""

    messages: list[Recorded] = field(default_factory=list)

    def tap(self, way: Any, frames: Sequence[Frame]) -> None:
        """To be given to a session."""
        self.messages.append(Recorded(way, [bytes(frame) for frame in frames]))

    def of(self, word: str) -> list[Recorded]:
        """The messages of one kind."""
        return [each for each in self.messages if each.kind == word]

    @property
    def raw(self) -> bytes:
        """Every frame, end to end."""
        return b"".join(frame for each in self.messages for frame in each.frames)


@contextmanager
def recorded_commands() -> Iterator[Recording]:
    """Record every session that a command opens in this process."""
    recording = Recording()
    with pytest.MonkeyPatch.context() as patch:
        for module in (party.opening, party.fetch):
            patch.setattr(module, "open_session", functools.partial(open_session, tap=recording.tap))
        yield recording
