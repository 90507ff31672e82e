"""`splitfl serve --record DIR`: what crosses, as the owner sees it, one encrypted file a session.

The socket itself looks on: nothing of the server knows about it. A file begins when a session is open, with the hello
that opened it; what nobody was admitted for is not kept. A party that comes back after its session was forgotten begins
another file.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from splitfl.audit.recording import About, Crossed, Room, Writer
from splitfl.audit.recording_keys import Vault, make_vault
from splitfl.audit.witness import Witness, opened
from splitfl.errors import ResourceError
from splitfl.wire.channel import Envelope, OwnerSocket
from splitfl.wire.codecs import Frame
from splitfl.wire.keys import KeyPair
from splitfl.wire.messages import Closed, Hello, Welcome

log = logging.getLogger("splitfl.owner")

SessionKey: TypeAlias = tuple[str, int]
"""The party's public key and the number it drew."""

_HELLOS = 256  # that wait for their welcome; the oldest is forgotten when there are more


@dataclass(kw_only=True)
class _Kept:
    """A session that is recorded."""

    writer: Writer
    witness: Witness = field(default_factory=Witness)


class Recorder:
    """Keeps the traffic of many sessions.

    Args:
        folder: where; made if it is missing.
        keys: the owner's pair, by which the files can be opened; None where it serves without keys.
        limit: bytes that all files together may take.
        name_of: what a party is called, by its public key.
        most_open: files that are open at a time; the one that was silent for longest is closed when there are more.

    Raises:
        ResourceError: the folder cannot be written.
        KeyFileError: it holds recordings of another key.
    """

    def __init__(
        self, folder: Path, keys: KeyPair | None, limit: int, name_of: Callable[[str], str | None], most_open: int
    ) -> None:
        self.folder, self._name_of, self._most_open = folder, name_of, most_open
        try:
            self.vault: Vault = make_vault(folder, keys)
            self._room = Room(limit, self.vault.size, self._told_to_stop)
        except OSError as error:
            raise ResourceError(f"The recordings {folder} cannot be written: {error.strerror}.") from error
        self._kept: OrderedDict[SessionKey, _Kept] = OrderedDict()
        self._hellos: OrderedDict[SessionKey, tuple[Crossed, list[bytes], Hello]] = OrderedDict()

    def received(self, sender: str, frames: Sequence[Frame]) -> None:
        """A message of a party came."""
        if self._room.is_full:
            return
        message = opened(frames, "party")
        if message is None:
            return
        key = sender, message.session
        if isinstance(message, Hello) and key not in self._kept:
            head = Witness().note("received", message, frames)
            self._hellos[key] = head, [bytes(frame) for frame in frames], message
            while len(self._hellos) > _HELLOS:
                self._hellos.popitem(last=False)
        elif (kept := self._find(key)) is not None:
            kept.writer.write(kept.witness.note("received", message, frames), frames)

    def sent(self, sender: str, frames: Sequence[Frame]) -> None:
        """A message to a party left."""
        if self._room.is_full:
            return
        message = opened(frames, "owner")
        if message is None:
            return
        key = sender, message.session
        if isinstance(message, Welcome) and key in self._hellos:
            self._begin(key)
        if (kept := self._find(key)) is None:
            return
        kept.writer.write(kept.witness.note("sent", message, frames), frames)
        if isinstance(message, Closed):
            self._kept.pop(key).writer.close()

    def close(self) -> None:
        """Finish every file."""
        while self._kept:
            self._kept.popitem()[1].writer.close()

    def _find(self, key: SessionKey) -> _Kept | None:
        kept = self._kept.get(key)
        if kept is not None:
            self._kept.move_to_end(key)
        return kept

    def _begin(self, key: SessionKey) -> None:
        """A session is open: make its file, and write the hello that opened it."""
        head, frames, hello = self._hellos.pop(key)
        name = self._name_of(key[0]) or "party"
        try:
            writer = self._new_file(f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{name}")
        except OSError as error:
            self._room.stop(f"{self.folder} cannot be written: {error.strerror}")
            return
        writer.write(About(side="owner", protocol=hello.protocol))
        writer.write(head, frames)
        self._kept[key] = _Kept(writer=writer)
        while len(self._kept) > self._most_open:
            self._kept.popitem(last=False)[1].writer.close()

    def _new_file(self, stem: str) -> Writer:
        number = 0
        while True:
            path = self.folder / f"{stem}{f'-{number}' if number else ''}.traffic"
            with contextlib.suppress(FileExistsError):
                return Writer(path, self.vault.key, stream="traffic", number=0, room=self._room)
            number += 1

    def _told_to_stop(self, why: str) -> None:
        log.warning("recording stopped: %s; sessions go on, and what crosses from here on is not kept", why)


class RecordedSocket(OwnerSocket):
    """An owner's end that shows a recorder what passes. Arguments as for `OwnerSocket`."""

    def __init__(self, *args: Any, recorder: Recorder, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._recorder = recorder
        self._senders: OrderedDict[bytes, str] = OrderedDict()
        """Who is at the other end of a route."""

    async def receive(self, timeout_s: float = 1.0) -> Envelope | None:
        """See `OwnerSocket.receive`."""
        envelope = await super().receive(timeout_s)
        if envelope is not None:
            self._senders[envelope.route] = envelope.sender
            self._senders.move_to_end(envelope.route)
            while len(self._senders) > 4 * _HELLOS:
                self._senders.popitem(last=False)
            self._recorder.received(envelope.sender, envelope.frames)
        return envelope

    def send(self, route: bytes, frames: Sequence[Frame]) -> bool:
        """See `OwnerSocket.send`."""
        sent = super().send(route, frames)
        if sent and (sender := self._senders.get(route)) is not None:
            self._recorder.sent(sender, frames)
        return sent

    async def close(self) -> None:
        """See `OwnerSocket.close`."""
        await super().close()
        self._recorder.close()
