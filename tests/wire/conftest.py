"""Real keys, a real owner on its own thread, a link that can be cut, and a check that nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import threading
import time
from pathlib import Path

import pytest
from zmq.utils import garbage

from splitfl.wire.channel import OwnerSocket, PartySocket
from splitfl.wire.keys import AllowList, load_keys, load_public, new_keys
from tests.wire.samples import WELCOME
from tests.wire.talk import EVERYTHING, ROLES, TERMS, say

LIMIT_S = 20.0
MAX_BYTES = 1_000_000


class OwnerThread:
    """An `OwnerSocket` in its loop on a thread of its own; hands each message to `answer`, by default an echo."""

    def __init__(self, socket: OwnerSocket, answer=None):
        self.socket = socket
        self.answer = answer or (lambda owner, envelope: owner.send(envelope.route, envelope.frames))
        self.came: queue.Queue = queue.Queue()
        self._ready, self._error = threading.Event(), None
        self._thread = threading.Thread(target=self._run, name="owner")

    def __enter__(self):
        self._thread.start()
        assert self._ready.wait(LIMIT_S)
        if self._error is not None:
            self._thread.join(LIMIT_S)
            raise self._error
        return self

    def __exit__(self, *error):
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive()
        if self._error is not None:
            raise self._error

    @property
    def address(self):
        return self.socket.address

    def do(self, function, *arguments):
        """Call `function` in the owner's loop; its result."""

        async def call():
            return function(*arguments)

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(LIMIT_S)

    def next(self):
        """The next message that came."""
        return self.came.get(timeout=LIMIT_S)

    def _run(self):
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self._error = error
        finally:
            self._ready.set()

    async def _serve(self):
        self.loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        await self.socket.start()
        self._ready.set()
        try:
            while not self._stop.is_set():
                if (envelope := await self.socket.receive(0.05)) is not None:
                    self.came.put(envelope)
                    self.answer(self.socket, envelope)
        finally:
            await self.socket.close()


class Proxy:
    """A TCP link to `port` that can be cut, or held up without being closed."""

    def __init__(self, port: int):
        self._target, self._links = port, set()
        self._ready, self._held = threading.Event(), None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="proxy")

    def __enter__(self):
        self._thread.start()
        assert self._ready.wait(LIMIT_S)
        return self

    def __exit__(self, *error):
        self._call(self._stop.set)
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive()

    @property
    def address(self):
        return f"tcp://127.0.0.1:{self._port}"

    def cut(self):
        """Close every connection."""
        self._call(lambda: [link.close() for link in self._links])

    def hold(self):
        """Pass nothing on any more on the connections of this moment; new ones work."""
        self._call(lambda: setattr(self, "_held", set(self._links)))

    def _call(self, function):
        done = threading.Event()
        self._loop.call_soon_threadsafe(lambda: (function(), done.set()))
        assert done.wait(LIMIT_S)

    async def _serve(self):
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._link, "127.0.0.1", 0)
        self._port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        for link in self._links:
            link.close()
        await asyncio.sleep(0)
        pumps = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        await asyncio.wait_for(asyncio.gather(*pumps, return_exceptions=True), LIMIT_S)

    async def _link(self, reader, writer):
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.close()
            return
        self._links |= {writer, back}
        await asyncio.gather(self._pump(reader, back), self._pump(there, writer))

    async def _pump(self, reader, writer):
        with contextlib.suppress(OSError):
            while part := await reader.read(65536):
                if self._held is None or writer not in self._held:
                    writer.write(part)
                    await writer.drain()
        writer.close()


class Folder:
    """Key files of an owner and some parties, and the owner's allow-list, with `party` and `other` on it."""

    def __init__(self, path: Path):
        self.path = path
        self.owner_public, self.owner_secret = new_keys("owner", path)
        for name in ("party", "other", "stranger"):
            new_keys(name, path)
        self.allow = AllowList(path / "parties")
        for name in ("party", "other"):
            self.allow.add(path / f"{name}.key")

    def keys(self, name="party"):
        return load_keys(self.path / f"{name}.key_secret")

    def owner(self, answer=None, bind="tcp://127.0.0.1:0", max_message_bytes=MAX_BYTES):
        socket = OwnerSocket(bind, keys=self.keys("owner"), allow=self.allow, max_message_bytes=max_message_bytes)
        return OwnerThread(socket, answer)

    def party(self, address, name="party", owner="owner", max_message_bytes=MAX_BYTES):
        return PartySocket(
            address,
            keys=self.keys(name),
            owner_public=load_public(self.path / f"{owner}.key"),
            max_message_bytes=max_message_bytes,
        )


def port_of(address):
    return int(address.rsplit(":", 1)[1])


def ask(party, *frames):
    """Send, and the answer as bytes."""
    party.send(list(frames), timeout_s=LIMIT_S)
    answer = party.receive(LIMIT_S)
    assert answer is not None
    return [bytes(frame) for frame in answer]


def insecure_owner(answer=None, bind="tcp://127.0.0.1:0"):
    return OwnerThread(
        OwnerSocket(bind, keys=None, allow=None, max_message_bytes=MAX_BYTES, insecure_loopback=True), answer
    )


def insecure_party(address):
    return PartySocket(address, keys=None, owner_public=None, max_message_bytes=MAX_BYTES, insecure_loopback=True)


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def _left_behind():
    """Python's threads by name, the number of all threads (libzmq has its own), and the number of open files."""
    names = sorted(thread.name for thread in threading.enumerate())
    own = Path("/proc/self")
    return names, *(len(os.listdir(own / kind)) if own.exists() else 0 for kind in ("task", "fd"))


@pytest.fixture
def leaves_nothing():
    """Fails the test if a thread, a socket or a file stays open. pyzmq's one zero-copy thread is started before."""
    import zmq

    zmq.Frame(bytes(100_000), copy=False)
    assert garbage.gc.is_alive()
    before = _left_behind()
    yield
    deadline = time.monotonic() + 3
    while _left_behind() != before and time.monotonic() < deadline:
        pass  # a thread that was joined stays in /proc for a moment
    assert _left_behind() == before


@pytest.fixture(params=["party", "owner"])
def fresh(request):
    return ROLES[request.param](TERMS, EVERYTHING)


@pytest.fixture
def opened(fresh):
    say(fresh, TERMS.hello(), WELCOME)
    return fresh
