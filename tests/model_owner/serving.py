"""A whole owner on a thread of this process, with real sockets and keys; a test can look inside and hold it up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from model_owner.admission import ServerLimits
from model_owner.answer import Answerer
from model_owner.memory import Costs, MemoryBudget, measure
from model_owner.scheduler import Scheduler
from model_owner.server import Server
from model_owner.trunk import Trunk
from party.connect import open_session
from party.session import Session
from splitfl.wire.channel import OwnerSocket
from splitfl.wire.keys import AllowList, load_keys
from tests.hostile.attacker import Attacker, attacker
from tests.live.owner import PARTIES, make_keys

T = TypeVar("T")
PATIENCE_S = 60.0
ENOUGH = 1 << 30


class Serving:
    """An owner that serves `trunk`; `address` is known once it runs. For the arguments see `serving`."""

    def __init__(
        self,
        trunk: Trunk,
        keys: Path,
        *,
        bind: str,
        budget: int,
        workers: int,
        costs: Costs | None,
        limits: ServerLimits,
    ) -> None:
        self.trunk, self.keys, self.bind, self.workers, self.limits = trunk, keys, bind, workers, limits
        self.budget = MemoryBudget(budget)
        self.allow = AllowList(keys / "parties")
        self.answerer = Answerer(trunk, self.budget, costs or measure(trunk, caches=True))
        self.address = ""
        self.error: BaseException | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="owner in a thread")

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(PATIENCE_S)
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        """What SIGTERM does; returns at once."""
        self.loop.call_soon_threadsafe(self._running.cancel)

    def join(self) -> None:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "the owner does not stop"
        if self.error is not None:
            raise self.error

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def do(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call `function` in the owner's loop, where its state may be touched."""

        async def call() -> T:
            return function(*arguments)

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(PATIENCE_S)

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds, looking at it in the owner's loop."""

        async def look() -> None:
            while not condition():
                await asyncio.sleep(0.005)

        asyncio.run_coroutine_threadsafe(asyncio.wait_for(look(), PATIENCE_S), self.loop).result(2 * PATIENCE_S)

    @contextmanager
    def busy(self, workers: int | None = None) -> Iterator[None]:
        """All workers are held up while the block runs: requests wait."""
        gate, count = threading.Event(), workers or self.workers
        held = threading.Semaphore(0)

        def hold() -> None:
            held.release()
            gate.wait(PATIENCE_S)

        waiting = [
            asyncio.run_coroutine_threadsafe(self.server.scheduler.run(f"held {n}", 0, hold), self.loop)
            for n in range(count)
        ]
        for _ in waiting:
            assert held.acquire(timeout=PATIENCE_S)
        try:
            yield
        finally:
            gate.set()
            for each in waiting:
                each.result(PATIENCE_S)

    def session(self, party: str = PARTIES[0], *, address: str | None = None, **options: Any) -> Session:
        """An open session of `party`, to be closed by whoever asked."""
        return open_session(
            self.trunk.plan,
            address or self.address,
            owner_key=self.keys / "owner.key",
            key=self.keys / f"{party}.key_secret",
            **{"timeout_s": PATIENCE_S, **options},
        )

    def held(self) -> list[Any]:
        """The sessions that are open."""
        return self.do(lambda: list(self.server.table))

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self.error = error
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        most = self.limits.max_tokens * self.trunk.plan.width * 4
        keys = load_keys(self.keys / "owner.key_secret")
        socket = OwnerSocket(self.bind, keys=keys, allow=self.allow, max_message_bytes=most)
        await socket.start()
        self.address = socket.address
        scheduler = Scheduler(self.workers, 1)
        self.server = Server(socket, self.trunk.plan, self.answerer, scheduler, self.allow, self.limits)
        self._running = asyncio.ensure_future(self.server.run())
        self._ready.set()
        try:
            await self._running
        finally:
            await asyncio.to_thread(scheduler.stop)
            await socket.close()


@contextmanager
def serving(
    trunk: Trunk,
    folder: Path,
    *,
    bind: str = "tcp://127.0.0.1:0",
    budget: int = ENOUGH,
    workers: int = 1,
    costs: Costs | None = None,
    **limits: Any,
) -> Iterator[Serving]:
    """Serve `trunk` while the block runs; `limits` are those of `ServerLimits` that matter to the test."""
    keys = folder / "keys"
    if not keys.exists():
        make_keys(keys)
    chosen = {"max_tokens": 4096, "max_length": 128, "max_sessions": 16, "lease_s": 600.0, "recompute": False}
    owner = Serving(
        trunk, keys, bind=bind, budget=budget, workers=workers, costs=costs, limits=ServerLimits(**{**chosen, **limits})
    )
    owner.start()
    try:
        yield owner
    finally:
        if owner.is_running:
            owner.stop()
        owner.join()


@contextmanager
def raw(owner: Serving, kit: tuple[Path, Path], party: str = PARTIES[0]) -> Iterator[Attacker]:
    """A connection on which a test sends whatever it likes; `kit` is the model directory and the kit's."""
    reach: Any = SimpleNamespace(address=owner.address, keys=owner.keys, kit_dir=kit[1])
    with attacker(reach, party) as one:
        yield one
