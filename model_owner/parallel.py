"""One trunk over several processes, each with a share of every layer: tensor parallelism, started by ``torchrun``.

    torchrun --nproc-per-node 2 -m splitfl serve --tensor-parallel ...

How layers are shared out is the transformers library's own plan for the family. Process 0 owns sockets, sessions and
the account; the others hold no key and hear no party. Before process 0 computes it tells the others what, and all do
the same, each with its own share of the cache or graph; the library's collectives add the parts up.

What is told is a small msgpack record and the raw bytes of tensors: nothing is unpickled. All processes run as one: one
that fails ends the others, the request that it failed in is answered with ``draining``, so that the party comes back to
the owner that takes the place, and repeats what was lost. A batch that one process has no memory for ends all too.
"""

from __future__ import annotations

import itertools
import logging
import os
import signal
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, Self

import msgspec
import torch
import torch.distributed as dist
from transformers import Cache, PreTrainedModel
from transformers.distributed import DistributedConfig

from model_owner.trunk import CacheMismatchError, Kept, Trunk
from splitfl.cut import Plan
from splitfl.errors import ResourceError, UsageError
from splitfl.link import TrunkRequest, decoded

log = logging.getLogger("splitfl.owner")

_PATIENCE_S = 600.0  # for the others, in any one exchange
_SIGN_OF_LIFE_S = 60.0
_DTYPES = {str(d): d for d in (torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.uint8)}


class RankLostError(ResourceError):
    """Another process of the trunk failed or is gone."""


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """What process 0 says to the others; tensors follow in the order of `tensors`."""

    kind: Literal["forward", "keep", "backward", "idle", "stop"]
    number: int = 0
    """Of the cache, or of the kept step; 0 for none."""
    past: int = 0
    rows: tuple[int, ...] | None = None
    tensors: tuple[tuple[str, str, tuple[int, ...]], ...] = ()
    """Name, dtype and shape of each."""
    dropped: tuple[int, ...] = ()
    """Caches and kept steps that are needed no more."""


class Ranks:
    """The processes of one trunk; a context that joins them and leaves in order.

    Args:
        number: of this one.
        count: of all.
        device: where this one computes.
    """

    def __init__(self, number: int, count: int, device: torch.device) -> None:
        self.number, self.count, self.device = number, count, device
        self.lost = False
        self.lock = threading.RLock()
        self.dropped: deque[int] = deque()
        self._numbers = itertools.count(1)
        self._stopping = threading.Event()
        self._life = threading.Thread(target=self._show_life, name="ranks", daemon=True)

    def __enter__(self) -> Self:
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=_PATIENCE_S))
        if self.number == 0:
            self._life.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stopping.set()
        if self.number == 0:
            self._life.join()
            if not self.lost and kind is None:  # else its end is what the others hear
                with suppress(RankLostError):
                    self.tell(Told(kind="stop"), {})
        if not self.lost and kind is None:
            dist.destroy_process_group()
        if self.lost and kind is None:
            raise _lost()

    def ticket(self) -> tuple[int, object]:
        """A number for a cache or a kept step, and what to hold on to for as long as it is needed."""
        number, ticket = next(self._numbers), _Ticket()
        weakref.finalize(ticket, self.dropped.append, number).atexit = False
        return number, ticket

    @contextmanager
    def together(self) -> Iterator[None]:
        """One piece of work that all take part in; whatever fails in it but a cache's length fails for all.

        Raises:
            RankLostError: another process is gone, or this one has left the others behind.
        """
        with self.lock:
            if self.lost:
                raise _lost()
            try:
                yield
            except (CacheMismatchError, RankLostError):
                raise
            except BaseException as error:
                self._lose(error)
                raise _lost() from error

    def tell(self, told: Told, tensors: Mapping[str, torch.Tensor]) -> None:
        """Say to all others what comes next.

        Raises:
            RankLostError: one of them is gone.
        """
        with self.together():
            gone = tuple(self.dropped.popleft() for _ in range(len(self.dropped)))
            shapes = tuple((name, str(t.dtype), tuple(t.shape)) for name, t in tensors.items())
            header = msgspec.msgpack.encode(msgspec.structs.replace(told, tensors=shapes, dropped=gone))
            self._exchange(torch.tensor([len(header)]))
            self._exchange(torch.frombuffer(bytearray(header), dtype=torch.uint8))
            for tensor in tensors.values():
                self._exchange(tensor.contiguous().view(torch.uint8))

    def hear(self) -> tuple[Told, dict[str, torch.Tensor]]:
        """What process 0 says next.

        Raises:
            RankLostError: it is gone.
        """
        with self.together():
            size = int(self._exchange(torch.zeros(1, dtype=torch.int64)))
            header = self._exchange(torch.empty(size, dtype=torch.uint8))
            told = msgspec.msgpack.decode(bytes(header.cpu().numpy()), type=Told)
            tensors = {}
            for name, dtype, shape in told.tensors:
                held = torch.empty(shape, dtype=_DTYPES[dtype], device=self.device)
                tensors[name] = self._exchange(held.view(torch.uint8)).view(_DTYPES[dtype])
            return told, tensors

    def _exchange(self, tensor: torch.Tensor) -> torch.Tensor:
        moved = tensor.to(self.device)
        if moved.numel():
            dist.broadcast(moved, src=0)
        return moved

    def _lose(self, error: BaseException) -> None:
        self.lost = True
        log.error("the processes of the trunk have lost each other (%s)", type(error).__name__)
        serving = signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        if self.number == 0 and serving:  # as if told to stop: sessions hear it, and parties wait for the next owner
            os.kill(os.getpid(), signal.SIGTERM)

    def _show_life(self) -> None:
        """While nobody asks for anything the others hear so, and know that this process is there."""
        while not self._stopping.wait(_SIGN_OF_LIFE_S) and not self.lost:
            try:
                self.tell(Told(kind="idle"), {})
            except RankLostError:
                return


class _Ticket:
    """Something that can be held on to."""


def ranks_of_environment(device: str) -> Ranks:
    """The processes that ``torchrun`` has started.

    Raises:
        UsageError: it has started none, or only one.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count < 2 or "RANK" not in os.environ:
        raise UsageError(
            "--tensor-parallel needs several processes, and this one is alone.",
            hint="start it with torchrun --nproc-per-node 2 -m splitfl serve --tensor-parallel ...",
        )
    place = torch.device("cpu")
    if device.startswith("cuda"):
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(place)
    return Ranks(int(os.environ["RANK"]), count, place)


def check_division(plan: Plan, config: Any, count: int) -> None:
    """Refuse a number of processes that a layer's heads and widths cannot be shared out to.

    Raises:
        UsageError: with what would have to be divisible; or there is no plan for this family.
    """
    text = config.get_text_config()
    if not getattr(text, "base_model_tp_plan", None):
        raise UsageError(
            f"The library has no plan by which {plan.model_type} layers are shared out.",
            hint="use --device-map auto, which puts whole layers on each device",
        )
    heads = int(text.num_attention_heads)
    sizes = {
        "attention heads": heads,
        "key and value heads": int(getattr(text, "num_key_value_heads", None) or heads),
        "inner width": int(getattr(text, "intermediate_size", None) or text.hidden_size),
    }
    for what, size in sizes.items():
        if size % count:
            divisors = [n for n in range(2, size + 1) if all(each % n == 0 for each in sizes.values())]
            raise UsageError(
                f"{count} processes cannot share {size} {what} evenly.",
                expected="2 or more of: " + ", ".join(map(str, divisors[:8])) if divisors else "one process",
            )


def placing(ranks: Ranks) -> dict[str, Any]:
    """Keyword arguments for `splitfl.load.load_trunk_side`, by which this process loads its share."""
    return {"distributed_config": DistributedConfig(tp_size=ranks.count)}


@dataclass(frozen=True, kw_only=True)
class SharedKept(Kept):
    """A kept step whose graph has a part in every process."""

    number: int = 0
    ticket: object = None


class SharedTrunk(Trunk):
    """Process 0's share of a trunk, which has the others compute along.

    Args:
        base: this process's share.
        plan: as for `Trunk`.
        ranks: all processes.
    """

    def __init__(self, base: PreTrainedModel, plan: Plan, ranks: Ranks) -> None:
        super().__init__(base, plan)
        self.ranks = ranks
        self._caches: weakref.WeakKeyDictionary[Cache, int] = weakref.WeakKeyDictionary()

    def new_cache(self) -> Cache:
        """See `Trunk`; the others make theirs when they first hear its number."""
        cache = super().new_cache()
        self._caches[cache], ticket = self.ranks.ticket()
        cache.ticket = ticket
        return cache

    def forward(self, request: TrunkRequest, cache: Cache | None = None) -> torch.Tensor:
        """See `Trunk`."""
        with self.ranks.together():
            number = 0 if cache is None else self._caches[cache]
            self.ranks.tell(
                Told(kind="forward", number=number, past=request.past, rows=request.rows), _tensors_of(request)
            )
            return super().forward(request, cache)

    def forward_kept(self, request: TrunkRequest, *, recompute: bool) -> tuple[torch.Tensor, Kept]:
        """See `Trunk`."""
        if recompute:
            return super().forward_kept(request, recompute=True)
        with self.ranks.together():
            number, ticket = self.ranks.ticket()
            self.ranks.tell(Told(kind="keep", number=number), _tensors_of(request))
            output, kept = super().forward_kept(request, recompute=False)
        entry, above = kept.entry, kept.output
        return output, SharedKept(request=request, entry=entry, output=above, number=number, ticket=ticket)

    def backward(self, kept: Kept, gradient: torch.Tensor) -> torch.Tensor:
        """See `Trunk`."""
        with self.ranks.together():
            if kept.output is None:
                _, kept = self.forward_kept(kept.request, recompute=False)
            assert isinstance(kept, SharedKept)  # noqa: S101  made above, now or earlier
            self.ranks.tell(Told(kind="backward", number=kept.number), {"gradient": gradient})
            return super().backward(kept, gradient)


def _tensors_of(request: TrunkRequest) -> dict[str, torch.Tensor]:
    given = {"hidden": decoded(request.hidden), "mask": request.mask, "positions": request.positions}
    return {name: tensor for name, tensor in given.items() if tensor is not None}


def follow(trunk: Trunk, ranks: Ranks) -> None:
    """Compute along with process 0 until it says that it stops.

    Raises:
        RankLostError: it is gone, or this process failed.
    """
    caches: dict[int, Cache] = {}
    kept: dict[int, Kept] = {}
    while True:
        told, tensors = ranks.hear()
        for number in told.dropped:
            caches.pop(number, None)
            kept.pop(number, None)
        if told.kind == "stop":
            return
        with ranks.together():
            _compute(trunk, told, tensors, caches, kept)


def _compute(
    trunk: Trunk, told: Told, tensors: dict[str, torch.Tensor], caches: dict[int, Cache], kept: dict[int, Kept]
) -> None:
    if told.kind == "idle":
        return
    if told.kind == "backward":
        trunk.backward(kept.pop(told.number), tensors["gradient"])
        return
    request = TrunkRequest(
        hidden=tensors["hidden"], mask=tensors.get("mask"), positions=tensors.get("positions"),
        keep=told.kind == "keep", cache=told.number or None, past=told.past, rows=told.rows,
    )  # fmt: skip
    if told.kind == "keep":
        _, kept[told.number] = trunk.forward_kept(request, recompute=False)
        return
    cache = None
    if told.number:
        cache = caches.setdefault(told.number, trunk.new_cache())
    with suppress(CacheMismatchError):  # process 0 meets the same, and says so to its party
        trunk.forward(request, cache)


def _lost() -> RankLostError:
    return RankLostError(
        "A process of the trunk has failed, and the others cannot go on without it.",
        hint="see its own last lines, then start all of them again; parties come back by themselves",
    )
