"""Who holds what in an encrypted sum, and the process that holds the key."""

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tenseal")


from splitfl.aggregation.he_child import key_words
from splitfl.aggregation.he_worker import Worker
from splitfl.aggregation.lattice import (
    BFV,
    DATA_PRIME,
    DEGREE,
    SCHEMES,
    seeds_size,
    words_size,
)
from splitfl.aggregation.seal_objects import Scratch
from splitfl.errors import InternalError, ResourceError, UsageError, WireError
from tests.aggregation.encrypted_rounds import KINDS, Round, key_pairs, plain_mean, updates_of

SECRET = bytes(range(32))
ROOT = Path(__file__).parents[2]
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads a process's memory as Linux shows it")


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker() as started:
        started.check()
        yield started


@pytest.fixture(scope="module")
def pairs():
    return key_pairs(4)


@pytest.fixture(params=KINDS, ids=lambda kind: "-".join(kind))
def fresh(request, worker, pairs):
    """A round in which the four parties have agreed on their secret."""
    scheme, form = request.param
    round_ = Round(pairs, worker, scheme, form)
    round_.agree_on_key()
    return round_


@pytest.fixture
def four(fresh):
    """The same, and all four have submitted."""
    for party, vector in zip(fresh.sealers, updates_of(4, 50), strict=True):
        fresh.submit(party, vector)
    return fresh


# ---- who holds what


def _secrets(round_: Round) -> dict[str, bytes]:
    """Everything that would open a sum or an update of the round."""
    sealer = next(iter(round_.sealers.values()))
    scratch = Scratch()
    words = key_words(scratch, sealer._secret.key)
    scratch.close()
    found = {
        "group key": sealer._secret.key,
        "tag key": sealer._secret.tags,
        "secret key, first prime": words[:8].tobytes(),
        "secret key, second prime": words[DEGREE : DEGREE + 8].tobytes(),
    }
    for name, each in round_.sealers.items():
        found[f"part of {name}"] = each._agreement._part
        found[f"X25519 key of {name}"] = each._agreement._private.private_bytes_raw()
    return found


def _reachable(thing: object) -> bytes:
    """The bytes, words and texts that can be reached from an object."""
    seen, stack, out = set(), [thing], []
    while stack:
        each = stack.pop()
        if id(each) in seen or isinstance(each, type) or callable(each):
            continue
        seen.add(id(each))
        if isinstance(each, bytes | bytearray | memoryview):
            out.append(bytes(each))
        elif isinstance(each, np.ndarray):
            out.append(each.tobytes())
        elif isinstance(each, str):
            out.append(each.encode())
        else:
            stack.extend(gc.get_referents(each))
    return b"\0".join(out)


def test_the_coordinator_holds_no_secret(four):
    four.summer.finish({})
    state = _reachable(four.summer) + b"\0".join(four.messages)
    assert four.messages[0][:32] in state  # the search finds what is there
    for what, secret in _secrets(four).items():
        assert secret not in state, what
    with pytest.raises(InternalError, match="no key"):
        four.summer.open(four.summer.finish({}))


COORDINATOR = """
import sys
sys.modules["tenseal"] = sys.modules["zstandard"] = None  # importing them would fail
import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from splitfl.aggregation.bfv import BfvSummer
from splitfl.aggregation.sums import RoundTerms

def blob():
    return sys.stdin.buffer.read(int(sys.stdin.buffer.readline()))

terms = msgspec.json.decode(blob(), type=RoundTerms)
identities = {party: Ed25519PublicKey.from_public_bytes(blob()) for party in terms.parties}
summer = BfvSummer(terms, identities)
messages = []
for party in terms.parties:
    messages.append(blob())
    summer.accept(party, messages[-1])
messages += [blob() for _ in range(int(sys.stdin.buffer.readline()))]
result = summer.finish({})
sys.stdout.buffer.write(b"%d\\n" % len(result) + result)
sys.stdout.buffer.flush()
sys.stdin.buffer.read()
"""


def _memory(pid: int) -> bytes:
    out = []
    with open(f"/proc/{pid}/maps", encoding="ascii") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in maps:
            span, rights, *_ = line.split()
            if rights.startswith("rw"):
                start, end = (int(side, 16) for side in span.split("-"))
                memory.seek(start)
                try:
                    out.append(memory.read(end - start))
                except OSError:
                    continue
    return b"".join(out)


@linux
def test_the_memory_of_a_coordinator_process(worker, pairs):
    """A process of its own that has seen all messages of a round, without TenSEAL; its memory is searched."""
    import msgspec

    round_ = Round(pairs, worker)
    round_.agree_on_key()
    vectors = updates_of(4, 50)
    updates = [round_.submission(name, vector) for name, vector in zip(round_.sealers, vectors, strict=True)]
    identities = [round_.identities[name].public_bytes_raw() for name in round_.sealers]
    rest = [message for message in round_.messages if message not in updates]
    with subprocess.Popen(
        [sys.executable, "-c", COORDINATOR], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    ) as child:
        for blob in (msgspec.json.encode(round_.terms), *identities, *updates):
            child.stdin.write(b"%d\n" % len(blob) + blob)
        child.stdin.write(b"%d\n" % len(rest))
        for blob in rest:
            child.stdin.write(b"%d\n" % len(blob) + blob)
        child.stdin.flush()
        result = child.stdout.read(int(child.stdout.readline()))
        memory = _memory(child.pid)
        child.stdin.close()
    assert identities[0] in memory  # the search finds what is there
    assert rest[0] in memory
    for what, secret in _secrets(round_).items():
        assert secret not in memory, what
    opened = round_.sealers[pairs[2].public.decode()].open(result)
    assert np.abs(opened.mean - plain_mean(vectors, [1.0] * 4, 0.5)).max() < 1e-3


def test_shares_are_read_by_their_receiver_alone(worker, pairs):
    round_ = Round(pairs, worker)
    round_.agree_on_key()
    a, b, c, _ = round_.sealers
    swapped = {**round_.shares_for(a), b: round_.shares[b][c]}
    with pytest.raises(WireError, match="signature"):
        round_.sealers[a].submit(updates_of(1, 50)[0], 1.0, round_.adverts, swapped)


def test_a_key_put_in_by_the_coordinator_is_refused(worker, pairs):
    round_, strangers = Round(pairs, worker), Round(key_pairs(4), worker)
    adverts = {name: sealer.advertise() for name, sealer in round_.sealers.items()}
    a, b, *_ = adverts
    stranger = next(iter(strangers.sealers.values())).advertise()
    for changed in ({**adverts, b: stranger}, {**adverts, a: stranger}, {**adverts, "x" * 40: stranger}):
        with pytest.raises(WireError):
            round_.sealers[a].share(changed)


def test_parties_told_of_different_parties_do_not_meet(worker, pairs):
    """The coordinator shows one party a smaller round: the secrets differ, and the sum takes only one of them."""
    round_ = Round(pairs, worker)
    round_.agree_on_key()
    names, vectors = list(round_.sealers), updates_of(4, 50)
    round_.submit(names[0], vectors[0])
    fewer = {name: blob for name, blob in round_.shares_for(names[1]).items() if name != names[3]}
    blob = round_.sealers[names[1]].submit(vectors[1], 1.0, round_.adverts, fewer)
    with pytest.raises(WireError, match="another secret"):
        round_.summer.accept(names[1], blob)
    assert round_.summer.survivors == (names[0],)


# ---- the worker


@pytest.mark.parametrize(("scheme", "form"), KINDS)
def test_the_parser_survives_whatever_it_is_given(worker, scheme, form):
    """Without signatures in between: words and seeds at random, and mutated ones, straight into SEAL; 320 in all."""
    rng, known = np.random.default_rng(0), SCHEMES[scheme]
    values, split = np.arange(20, dtype=np.int32), seeds_size(1, form)
    honest = worker.encrypt(known, form, SECRET, values)
    for index in range(80):
        blob = bytearray(honest)
        for _ in range(rng.integers(1, 20)):
            blob[rng.integers(len(blob))] = rng.integers(256)
        if index % 3 == 0:
            blob[split:] = rng.integers(0, DATA_PRIME, words_size(1, form) // 8).astype("<u8").tobytes()
        there = worker.pid
        with suppress(WireError):
            opened = worker.open(known, form, SECRET, 20, [bytes(blob[:split])] if split else [], bytes(blob[split:]))
            assert opened.shape == (20,)
        assert worker.pid == there  # whatever it said, it is still the same process
    seeds = [honest[:split]] if split else []
    assert np.array_equal(worker.open(known, form, SECRET, 20, seeds, honest[split:]), values)


def test_sizes_are_checked_before_the_child_sees_anything(worker):
    blob = worker.encrypt(BFV, "seeded", SECRET, np.arange(20, dtype=np.int32))
    seed, words = blob[:64], blob[64:]
    for seeds, body in (([], words), ([seed[:-1]], words), ([seed], words[:-8]), ([seed], b"")):
        with pytest.raises(WireError):
            worker.open(BFV, "seeded", SECRET, 20, seeds, body)


def test_a_child_that_dies_is_replaced():
    values = np.arange(20, dtype=np.int32)
    with Worker() as worker:
        assert worker.pid is None
        blob = worker.encrypt(BFV, "public", SECRET, values)
        first = worker.pid
        os.kill(first, signal.SIGKILL)
        os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
        assert np.array_equal(worker.open(BFV, "public", SECRET, 20, [], blob), values)
        assert worker.pid not in (None, first)
    assert worker.pid is None


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs a process that can be stopped")
def test_a_child_that_hangs_is_ended():
    with Worker(limit_s=0.3) as worker:
        worker._limit_s = 60.0
        worker.check()
        worker._limit_s = 0.3
        os.kill(worker.pid, signal.SIGSTOP)
        with pytest.raises(ResourceError, match=r"took longer than 0\.3 s"):
            worker.encrypt(BFV, "public", SECRET, np.arange(20, dtype=np.int32))
        assert worker.pid is None


def test_a_sealer_without_a_worker_starts_its_own(worker, pairs):
    round_ = Round(pairs, worker)
    alone = round_.sealers[pairs[0].public.decode()]
    alone._worker = None
    result = round_.run(updates_of(4, 50), [1.0] * 4)
    assert alone.open(result).parties == 4


def test_without_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="tenseal") as error:
        Worker()
    assert "splitfl[he]" in str(error.value)
