"""A coordinator and parties as processes that kill themselves (SIGKILL) where they are told to, and are started again.

`python -m tests.rounds.forks SPEC.json` loads everything once and forks: a new incarnation is there within
milliseconds, so that many kills are affordable. The specification:

    path      folder with keys and an allow-list (`Place`); each party writes what it saw to NAME.jsonl there
    parties   how many
    rounds, sum ("plain" or "mask"), min_parties, seconds (Patience)
    kills     who -> list of numbers: the first incarnation dies at its n-th step, and so on; one without a number lives
    for_good  those who are not started again after their last number
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import numpy as np

from model_owner.rounds.store import RoundStore
from model_owner.rounds.vault import Vault
from splitfl.aggregation.identity import load_identities
from splitfl.aggregation.mask_sums import MaskSummer
from splitfl.aggregation.masks import MaskSealer
from splitfl.aggregation.plain import PlainSealer, PlainSummer
from splitfl.aggregation.sums import STAGES
from splitfl.wire.channel import OwnerSocket, PartySocket
from tests.rounds.places import Patience, Place, Running, course

_STEPS = {
    "coordinator": ((RoundStore, "commit"), (Vault, "take"), (OwnerSocket, "send")),
    "party": ((PartySocket, "send"),),
}
LENGTH = 6


def die_at(number, methods):
    """Be killed at step `number`; a step is the beginning and the end of a call of any of `methods`."""
    left = [number]

    def count():
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(plain):
        def call(*arguments, **named):
            count()
            result = plain(*arguments, **named)
            count()
            return result

        return call

    for owner, name in methods:
        setattr(owner, name, counted(getattr(owner, name)))


def update(number, state):
    """What party `number` makes of a state (float32 [LENGTH], or None)."""
    base = np.zeros(LENGTH, np.float32) if state is None else np.frombuffer(state, np.float32)
    return (0.5 * base + np.linspace(number, number + 1, LENGTH)).astype(np.float32)


def next_state(mean):
    """Coarse, so that a sum on a grid and one in floats come to the same bytes in a test."""
    return np.round(mean, 3).astype(np.float32).tobytes()


def stages_of(spec):
    return STAGES if spec["sum"] == "mask" else ("submit",)


def coordinate(spec, place, bind):
    identities = load_identities(place.allow.folder)
    summer = PlainSummer if spec["sum"] == "plain" else lambda terms: MaskSummer(terms, identities)
    plan = course(rounds=spec["rounds"], min_parties=spec["min_parties"], stages=stages_of(spec), attempts=9)
    running = Running(place, plan, Patience(**spec["seconds"]), True, summer, bind, {})
    asyncio.run(running._serve())
    if running.error is not None:
        raise running.error


def take_part(spec, place, address, number):
    """Every round; one line for each that this party has opened."""
    name = place.names[number]
    identities = load_identities(place.allow.folder)

    def sealer(terms):
        return PlainSealer(terms) if spec["sum"] == "plain" else MaskSealer(terms, place.keys(name), identities)

    facts = {"sum": spec["sum"], "stages": stages_of(spec)}
    client = place.client(address, name, sealer=sealer, timeout_s=60.0, **facts)
    with client as rounds, (place.path / f"{name}.jsonl").open("a", encoding="utf-8") as out:
        for task in rounds:
            start = task.state
            opened = task.submit(update(number, start), number + 1.0)
            if opened is None:
                continue
            line = {
                "round": task.round,
                "mean": opened.mean.tolist(),
                "weight": opened.weight,
                "parties": opened.parties,
            }
            out.write(json.dumps(line) + "\n")
            out.flush()
            task.finish(next_state(opened.mean), common=float(task.round), rows=10)


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def supervise(spec):
    """Start everybody, start those again who were killed, and wait for the end of all; the number of kills."""
    place = Place(Path(spec["path"]), spec["parties"], fresh=False)
    bind = f"tcp://127.0.0.1:{free_port()}"
    who = ["coordinator", *place.names]
    left = {name: list(spec["kills"].get(name, [])) for name in who}
    running, kills = {}, 0

    def start(name):
        number = os.fork()
        if number:
            running[number] = name
            return
        code = 1
        try:
            if left[name]:
                die_at(left[name][0], _STEPS["coordinator" if name == "coordinator" else "party"])
            if name == "coordinator":
                coordinate(spec, place, bind)
            else:
                take_part(spec, place, bind, place.names.index(name))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    for name in who:
        start(name)
    while running:
        number, status = os.wait()
        name = running.pop(number)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            kills += 1
            del left[name][:1]
            if left[name] or name not in spec["for_good"]:
                time.sleep(0.02)
                start(name)
        elif status:
            for other in running:
                os.kill(other, signal.SIGKILL)
            raise SystemExit(f"{name} ended with {status}")
    return kills


if __name__ == "__main__":
    print("kills", supervise(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), flush=True)
