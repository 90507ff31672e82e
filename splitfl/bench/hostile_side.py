"""One attacker of `splitfl bench hostile`: an admitted party that sends what it likes, or a stranger with TCP alone.

Only ever a process of its own. It attacks until its standard input ends, and says at the end how much it has sent.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np

from splitfl.bench.hostile_orders import Attacked, AttackStart
from splitfl.bench.lines import own_output, say
from splitfl.errors import SplitflError
from splitfl.kit import open_kit
from splitfl.wire.channel import PartySocket
from splitfl.wire.keys import load_keys, load_public
from splitfl.wire.messages import WIRE_VERSION
from splitfl.wire.reach import parse_address

GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"CURVE".ljust(20, b"\0") + bytes(32)
_AT_ONCE, _STRIDE = 200, 50
_ROWS, _LENGTH = 1, 32


def pack(**fields: object) -> bytes:
    """A header of any fields whatever."""
    return msgspec.msgpack.encode(fields)


class Attack:
    """What is sent, until `stop` is set."""

    def __init__(self, start: AttackStart) -> None:
        self.start, self.stop, self.sent, self.opened = start, threading.Event(), 0, 0
        self.plan = open_kit(Path(start.kit)).plan

    def run(self) -> None:
        """Go on until stopped."""
        match self.start.attack:
            case "connections":
                self.silent_links()
            case "greetings":
                self.greetings()
            case "storm":
                self.storm()
            case _:
                self.messages()

    # ---- without a key

    def silent_links(self) -> None:
        """Connections that say nothing; the owner hangs up after a while, and they come again."""
        address = parse_address(self.start.owner)
        links: set[socket.socket] = set()
        with selectors.DefaultSelector() as selector:
            while not self.stop.is_set():
                for _ in range(min(_STRIDE, self.start.connections - len(links))):
                    link = _begin(address.host, address.port)
                    links.add(link)
                    selector.register(link, selectors.EVENT_READ)
                    self.sent += 1
                self.opened = max(self.opened, len(links))
                for key, _ in selector.select(0.01):
                    ended = key.fileobj
                    assert isinstance(ended, socket.socket)  # noqa: S101
                    if not _says_something(ended):
                        selector.unregister(ended)
                        links.discard(ended)
                        ended.close()
        for link in links:
            link.close()

    def storm(self) -> None:
        """Connections that are dropped as soon as the owner has said its first word."""
        address = parse_address(self.start.owner)
        while not self.stop.is_set():
            with contextlib.suppress(OSError), socket.create_connection((address.host, address.port), 5) as link:
                link.recv(10)
            self.sent += 1

    def greetings(self) -> None:
        """Halves of a handshake, and bytes that are none, again and again."""
        address = parse_address(self.start.owner)
        words = (GREETING[:11], GREETING, GREETING + b"\x04\xff" + b"\x05HELLO" + bytes(194), b"\xff" * 500)
        while not self.stop.is_set():
            with contextlib.ExitStack() as stack:
                for number in range(_AT_ONCE):
                    with contextlib.suppress(OSError):
                        link = stack.enter_context(socket.create_connection((address.host, address.port), 5))
                        link.sendall(words[number % len(words)])
                        self.sent += 1
                self.stop.wait(0.2)

    # ---- with a key

    def messages(self) -> None:
        """Frames through an encrypted link of an admitted party."""
        pair, owner = load_keys(Path(self.start.key)), load_public(Path(self.start.owner_key))
        link = PartySocket(self.start.owner, keys=pair, owner_public=owner, max_message_bytes=1 << 26)
        try:
            link.open(30)
            link.send([self._hello()])
            link.receive(10)
            for frames in self._frames():
                if self.stop.is_set():
                    break
                link.send(frames, timeout_s=10)
                self.sent += 1
                while self.start.attack != "slow reader" and link.receive(0.0) is not None:
                    pass
        finally:
            link.close()

    def _hello(self) -> bytes:
        return pack(
            type="hello", session=7, version=WIRE_VERSION, protocol="split", trunk=self.plan.trunk,
            plan=self.plan.digest, wire_dtype="float32",
        )  # fmt: skip

    def _forward(self, step: int, shape: tuple[int, ...], **more: object) -> bytes:
        spec = {"name": "hidden", "dtype": "float32", "shape": shape}
        return pack(type="forward", session=7, step=step, tensors=[spec], **more)

    def _frames(self) -> Iterator[list[bytes]]:
        shape = (_ROWS, _LENGTH, self.plan.width)
        zeros = np.zeros(shape, dtype="<f4").tobytes()
        step = 0
        while True:
            step += 1
            match self.start.attack:
                case "garbage":
                    yield [bytes([step % 251]) * (step % 200 + 1)]
                case "lying headers":
                    huge = ((1 << 40, _LENGTH, self.plan.width), (_ROWS, 1 << 62, self.plan.width), (2**32, 2**32, 1))
                    yield [self._forward(step, huge[step % 3]), b"\0" * 64]
                case "hellos":
                    yield [
                        self._hello().replace(
                            b"\xa7session\x07", b"\xa7session\xcd" + (step % 60000).to_bytes(2, "big")
                        )
                    ]
                case "replayed":
                    yield [self._forward(1, shape), zeros]
                case "slow reader":
                    yield [self._forward(step, shape), zeros]
                case "adversarial floats":
                    value = (np.nan, np.inf, 1e-42, 3e38)[step % 4]
                    yield [self._forward(step, shape), np.full(shape, value, dtype="<f4").tobytes()]
                    time.sleep(0.02)
                case other:
                    raise SplitflError(f"There is no attack {other!r}.")


def _says_something(link: socket.socket) -> bool:
    """Whether a link lives; what it says is dropped."""
    try:
        return bool(link.recv(1 << 12))
    except BlockingIOError:
        return True
    except OSError:
        return False


def _begin(host: str, port: int) -> socket.socket:
    link = socket.socket()
    link.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        link.connect((host, port))
    return link


def main() -> None:
    """Attack until standard input ends."""
    answers = own_output()
    attack = Attack(msgspec.json.decode(sys.argv[1], type=AttackStart))
    problem = ""
    thread = threading.Thread(target=attack.run, daemon=True)
    thread.start()
    say(answers, Attacked(sent=0, opened=0, problem=problem))
    sys.stdin.readline()
    say(answers, Attacked(sent=attack.sent, opened=attack.opened, problem=problem))
    sys.stdin.read()
    attack.stop.set()
    thread.join(20)


if __name__ == "__main__":
    main()
