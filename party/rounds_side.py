"""Parties of `splitfl bench rounds`, one or many in a process: ``python -m party.rounds_side START``.

They train nothing: an update is there at once, so what is measured is the round itself.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import msgspec
import numpy as np
import psutil

from party.rounds import RoundClient
from splitfl.aggregation.identity import load_identities
from splitfl.aggregation.masks import MaskSealer
from splitfl.aggregation.plain import PlainSealer
from splitfl.aggregation.sums import RoundTerms, Sealer, Stage, Vector
from splitfl.bench.lines import own_output, say
from splitfl.bench.rounds_orders import PartiesReady, PartiesStart, RoundsOver, update_of
from splitfl.errors import UsageError
from splitfl.wire.channel import PartySocket
from splitfl.wire.keys import KeyPair, load_keys, load_public
from splitfl.wire.round_frames import PIECE_BYTES
from splitfl.wire.round_messages import Facts

_PATIENCE_S = 600.0
_SETTLE_S, _LOOK_S = 10.0, 0.05


def take_part(start: PartiesStart, number: int, common: Vector) -> tuple[int, float]:
    """All rounds of one party; how many there were, and the largest difference of a mean."""
    keys, place = load_keys(Path(start.keys[number])), start.places[number]
    vector = (common * np.float32(update_of(place, start.parties))).astype(np.float32)
    rounds, error = 0, 0.0
    with ExitStack() as stack:
        stages, factory = _sealers(start, keys, stack)
        facts = Facts(
            layout="a benchmark",
            base="a benchmark",
            rule="fedit",
            sum=start.sum,
            stages=stages,
            lengths=(start.values,),
        )
        client = RoundClient(
            _socket(start, keys),
            facts,
            Path(start.folder) / str(place),
            sealer_factory=factory,
            timeout_s=_PATIENCE_S,
        )
        for task in stack.enter_context(client):
            opened = task.submit(vector, 1.0)
            if opened is None or task.result is None:
                continue
            error = max(error, float(np.abs(opened.mean - common * np.float32(0.5)).max()))
            if task.finish(task.result):  # every party has the same bytes, and so has the coordinator
                rounds += 1
    return rounds, error


def _socket(start: PartiesStart, keys: KeyPair) -> PartySocket:
    return PartySocket(
        start.address,
        keys=keys,
        owner_public=load_public(Path(start.coordinator_key)),
        max_message_bytes=PIECE_BYTES,
    )


def _sealers(
    start: PartiesStart, keys: KeyPair, stack: ExitStack
) -> tuple[tuple[Stage, ...], Callable[[RoundTerms], Sealer]]:
    if start.sum == "plain":
        return PlainSealer.stages, PlainSealer
    identities = load_identities(Path(start.peers))
    if start.sum == "mask":
        return MaskSealer.stages, lambda terms: MaskSealer(terms, keys, identities)
    if start.sum == "bfv":
        from splitfl.aggregation.bfv import BfvSealer
        from splitfl.aggregation.he_worker import Worker

        worker = stack.enter_context(Worker())
        worker.check()
        return BfvSealer.stages, lambda terms: BfvSealer(terms, keys, identities, worker=worker)
    raise UsageError(f"Rounds summed as {start.sum} are not measured.", expected="plain, mask or bfv")


def _held() -> int:
    """Open files and threads of this process."""
    process = psutil.Process()
    files = process.num_fds() if os.name == "posix" else process.num_handles()
    return int(files) + int(process.num_threads())


def run(start: PartiesStart) -> RoundsOver:
    """Every party of this process, each in a thread of its own."""
    common = np.random.default_rng(0).uniform(-0.9, 0.9, start.values).astype(np.float32)
    first = _socket(start, load_keys(Path(start.keys[0])))
    first.open(_PATIENCE_S)  # brings the network library's own threads and files, which a process has once
    first.send([bytes(PIECE_BYTES)])  # no message: refused. The thread for large frames comes with the first of them
    first.close()
    before = _held()
    count = len(start.keys)
    with ThreadPoolExecutor(count, thread_name_prefix="party") as pool:
        done = list(pool.map(lambda number: take_part(start, number, common), range(count)))
    deadline = time.monotonic() + _SETTLE_S
    while _held() > before and time.monotonic() < deadline:  # the network library closes its sockets in the background
        time.sleep(_LOOK_S)
    return RoundsOver(
        rounds=min(rounds for rounds, _ in done),
        error=max(error for _, error in done),
        left=max(0, _held() - before),
    )


def main() -> None:
    """Wait for a line on standard input, take part in all rounds, say how it went."""
    answers = own_output()
    start = msgspec.json.decode(sys.argv[1], type=PartiesStart)
    say(answers, PartiesReady())
    if sys.stdin.readline():
        say(answers, run(start))


if __name__ == "__main__":
    main()
