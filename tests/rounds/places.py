"""A coordinator on a thread of its own, and parties with real keys and sockets."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import numpy as np

from model_owner.rounds.coordinator import Coordinator
from model_owner.rounds.engine import Engine
from model_owner.rounds.room import Patience
from model_owner.rounds.store import Charter, RoundStore
from model_owner.rounds.vault import Vault
from party.rounds import RoundClient
from splitfl.rounds.records import Course
from splitfl.wire.channel import OwnerSocket, PartySocket
from splitfl.wire.keys import AllowList, load_keys, load_public, new_keys
from splitfl.wire.round_frames import PIECE_BYTES
from splitfl.wire.round_messages import Facts
from tests.rounds.plain_sum import PlainSealer, PlainSummer

LIMIT_S = 30.0
BRISK = Patience(deadline=5.0, stage_deadline=5.0, wait=0.3, farewell=5.0)
CLIP, MAX_WEIGHT = 10.0, 100.0


def course(**changes):
    return Course(**{"rounds": 2, "min_parties": 2, "stages": ("submit",), **changes}).check()


def facts(**changes):
    base = {"layout": "l" * 8, "base": "b" * 8, "rule": "fedit", "sum": "plain", "stages": ("submit",)}
    return Facts(**{**base, "lengths": (6,), **changes})


class Place:
    """A folder with keys, an allow-list and a state; a coordinator can be started in it again and again."""

    def __init__(self, path, parties, *, fresh=True):
        self.path, self.names = path, [f"p{number:02d}" for number in range(parties)]
        self.allow = AllowList(path / "parties")
        for name in ("owner", *self.names) if fresh else ():
            new_keys(name, path)
            if name != "owner":
                self.allow.add(path / f"{name}.key")

    def keys(self, name):
        return load_keys(self.path / f"{name}.key_secret")

    def key(self, name):
        return self.keys(name).public.decode()

    @contextmanager
    def coordinator(
        self, plan=None, *, patience=BRISK, resume=False, summer=PlainSummer, bind="tcp://127.0.0.1:0", **more
    ):
        running = Running(self, plan or course(), patience, resume, summer, bind, more)
        running.start()
        try:
            yield running
        finally:
            running.stop()

    def socket(self, address, name):
        return PartySocket(
            address, keys=self.keys(name), owner_public=load_public(self.path / "owner.key"),
            max_message_bytes=PIECE_BYTES,
        )  # fmt: skip

    def client(self, address, name, *, folder=None, sealer=PlainSealer, timeout_s=LIMIT_S, **changes):
        return RoundClient(
            self.socket(address, name), facts(**changes), folder or self.path / f"work-{name}", sealer_factory=sealer,
            timeout_s=timeout_s,
        )  # fmt: skip


class Running:
    """A coordinator that runs."""

    def __init__(self, place, plan, patience, resume, summer, bind, more):
        self.place, self.plan, self.patience, self.resume = place, plan, patience, resume
        self.summer, self.bind, self.more = summer, bind, more
        self.error = None
        self._ready, self._thread = threading.Event(), threading.Thread(target=self._run, name="coordinator")

    def start(self):
        self._thread.start()
        assert self._ready.wait(LIMIT_S)
        if self.error is not None:
            self._thread.join(LIMIT_S)
            raise self.error

    def stop(self):
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error

    def wait(self):
        """Until it has ended by itself."""
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive()

    @property
    def standing(self):
        return self.engine.standing

    def wait_until(self, holds, what="what was waited for"):
        for _ in range(int(LIMIT_S / 0.01)):
            if holds(self.engine.standing):
                return
            threading.Event().wait(0.01)
        raise AssertionError(f"{what} did not happen; it is {self.engine.standing}")

    def _run(self):
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self.error = error
        finally:
            self._ready.set()

    async def _serve(self):
        self._loop = asyncio.get_running_loop()
        folder = self.place.path / "state"
        charter = Charter(sum="plain", rule="fedit", stages=self.plan.stages, clip=CLIP, max_weight=MAX_WEIGHT)
        socket = OwnerSocket(
            self.bind, keys=self.place.keys("owner"), allow=self.place.allow, max_message_bytes=PIECE_BYTES
        )
        store = RoundStore(folder / "rounds.sqlite", charter, resume=self.resume)
        engine = None
        try:
            await socket.start()
            self.address = socket.address
            self.engine = engine = Engine(
                self.plan, store, Vault(folder / "blobs"), self.summer, clip=CLIP, max_weight=MAX_WEIGHT,
                max_state=1 << 26, traffic=lambda: (socket.bytes_received, socket.bytes_sent),
            )  # fmt: skip
            coordinator = Coordinator(
                socket, engine, self.place.allow, pinned=self.more.get("pinned", {}), patience=self.patience,
                max_update=1 << 26,
            )  # fmt: skip
            self.coordinator, self._task = coordinator, asyncio.ensure_future(coordinator.run())
            self._ready.set()
            with suppress(asyncio.CancelledError):
                await self._task
            self.rounds = store.rounds()
        finally:
            if engine is not None:
                engine.close()
            await socket.close()
            store.close()


def mean_of(vectors, weights):
    """The weighted mean, in float64."""
    total = sum(weights)
    return sum(w * v.astype(np.float64) for v, w in zip(vectors, weights, strict=True)) / total


def train(number, start, length=6):
    """What party `number` makes of a state: the same for the same state, and finite."""
    base = np.zeros(length, np.float32) if start is None else np.frombuffer(start, np.float32, offset=16)
    return (0.5 * base + np.linspace(number, number + 1, length)).astype(np.float32)


def take_part(place, address, number, *, scores=(), weight=None, **client):
    """All rounds, as an honest party; the means it has seen and the outcome."""
    means = []
    with place.client(address, place.names[number], **client) as rounds:
        for task in rounds:
            vector = task.saved_vector
            if vector is None:
                vector = train(number, task.state, rounds.facts.lengths[0])
            opened = task.submit(vector, weight or number + 1.0)
            if opened is None:
                continue
            means.append(opened)
            score = scores[task.round] if task.round < len(scores) else float(task.round)
            state = task.result if "sealer" not in client else bytes(16) + opened.mean.tobytes()
            task.finish(state, common=score, personal=score + 1, rows=10)
    return means, rounds.outcome


def chain(rounds, parties, length=6):
    """The means of `rounds` rounds of `parties`, as they must come out."""
    state, means = None, []
    for _ in range(rounds):
        mean = mean_of([train(n, state, length) for n in parties], [n + 1.0 for n in parties]).astype(np.float32)
        state = bytes(16) + mean.tobytes()
        means.append(mean)
    return means


def check(means, expected):
    assert len(means) == len(expected)
    for opened, mean in zip(means, expected, strict=True):
        np.testing.assert_allclose(opened.mean, mean, rtol=1e-5, atol=1e-6)


@contextmanager
def together(works):
    """Run each of `works` in a thread; a list of futures."""
    with ThreadPoolExecutor(len(works)) as pool:
        yield [pool.submit(work) for work in works]
