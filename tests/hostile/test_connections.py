"""Links that are cut, half open, or no ZeroMQ at all."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import time

import pytest
import torch
import zmq

from splitfl.options import parse_address
from splitfl.wire.keys import load_public
from splitfl.wire.messages import Closed, Forward, ForwardDone, Welcome
from tests.hostile.attacker import PATIENCE_S, attacker, new_number, within

GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"CURVE".ljust(20, b"\0") + bytes(32)


@contextlib.contextmanager
def raw_links(owner, count):
    """TCP connections to the owner's port."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection(parse_address(owner.address), 30)) for _ in range(count)]


@pytest.mark.parametrize(
    "first_bytes",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost: owner\r\n\r\n",
        GREETING[:11],
        GREETING,
        GREETING[:12] + b"NULL".ljust(20, b"\0") + bytes(32),
        GREETING + b"\x04\xff" + b"\x05HELLO" + bytes(194),
        GREETING + b"\x06" + b"\xff" * 8 + b"\x05HELLO",
        b"\xff" * 5000,
    ],
    ids=["silence", "http", "part", "greeting", "null", "hello of zeros", "endless command", "noise"],
)
def test_a_link_that_is_no_party(besieged, owner, first_bytes):
    """Fifty of each, still open while the honest party goes on and another one comes in."""
    with raw_links(owner, 50) as links:
        for link in links:
            with contextlib.suppress(OSError):  # the owner may have hung up already
                link.sendall(first_bytes)
        with owner.session() as another:
            assert another.welcome is not None


def test_strangers_who_use_up_all_file_handles_revoke_nobody(honest, owner):
    """Who is admitted is read from files: without a handle to look with, what was seen last holds."""
    resource = pytest.importorskip("resource")
    if not hasattr(resource, "prlimit"):
        pytest.skip("sets another process's limits")
    process = owner.running.process.pid
    before = resource.prlimit(process, resource.RLIMIT_NOFILE)
    used = len(os.listdir(f"/proc/{process}/fd"))
    resource.prlimit(process, resource.RLIMIT_NOFILE, (used + 10, before[1]))
    try:
        with raw_links(owner, 40):
            for _ in within(PATIENCE_S):
                if len(os.listdir(f"/proc/{process}/fd")) >= used + 10:
                    break
            os.kill(process, signal.SIGHUP)
            deadline = time.monotonic() + 1.2  # two rounds of the owner's upkeep
            while time.monotonic() < deadline:
                honest.round()
    finally:
        resource.prlimit(process, resource.RLIMIT_NOFILE, before)
    with owner.session() as another:
        assert another.welcome is not None


@pytest.mark.parametrize("secured", [False, True], ids=["no security", "a stranger's key"])
def test_who_is_not_admitted_gets_no_word_in(besieged, owner, secured):
    context = zmq.Context()
    try:
        link = context.socket(zmq.DEALER)
        if secured:
            link.curve_publickey, link.curve_secretkey = zmq.curve_keypair()
            link.curve_serverkey = load_public(owner.keys / "owner.key")
        news = link.get_monitor_socket(zmq.Event.HANDSHAKE_FAILED_AUTH | zmq.Event.DISCONNECTED)
        link.connect(owner.address)
        assert news.poll(PATIENCE_S * 1000), "the owner did not hang up"
        link.disable_monitor()
        news.close(0)
        link.close(0)
    finally:
        context.destroy(linger=0)


def test_a_link_that_goes_while_requests_wait(besieged, owner):
    """The answers find nobody; another link of the same party asks again and gets them."""
    number, hidden = new_number(), torch.ones(4, 128, 32)
    for round_number in range(5):
        with attacker(owner) as foe:
            foe.hello(number)
            assert isinstance(foe.answer(), Welcome)
            foe.greeted.clear()  # the session stays
            for step in range(10):
                foe.forward(10 * round_number + step, hidden, session=number, keep=step % 2 == 0)
            foe.link.close(1000)
    with attacker(owner) as foe:
        foe.hello(number)
        assert isinstance(foe.answer(), Welcome)
        for step, _ in zip(itertools.count(1000), within(PATIENCE_S), strict=False):
            foe.forward(step, hidden, session=number)
            came = foe.answer()  # too much waits until the others are done
            if isinstance(came, ForwardDone) and came.step >= 1000:
                break


def test_a_session_may_move_from_link_to_link(besieged, owner):
    """An answer goes to where its session was heard last."""
    hidden = torch.ones(1, 3, 32)
    with attacker(owner) as one, attacker(owner) as two:
        one.opened()
        two.number = one.number
        for step in range(0, 20, 2):
            one.forward(step, hidden)
            one.result()
            two.forward(step + 1, hidden)
            two.result()


@pytest.mark.parametrize("chosen", [b"hospital", b"\x00", b"\x00" * 6, b"\xff" * 5, b"x" * 255])
def test_a_routing_id_chosen_by_the_peer_is_not_heard(besieged, owner, chosen):
    with attacker(owner) as foe:
        foe.link.disconnect(owner.address)
        foe.link.set(zmq.ROUTING_ID, chosen)
        foe.link.connect(owner.address)
        foe.hello()
        foe.greeted.clear()
        for _ in range(3):  # when these are answered, the owner has had time for the other one's hello
            with attacker(owner) as other:
                other.opened()
        assert foe.receive(0) is None


def test_many_links_of_one_party(besieged, owner):
    """All for one session."""
    number = new_number()
    with contextlib.ExitStack() as stack:
        foes = [stack.enter_context(attacker(owner)) for _ in range(40)]
        for foe in foes:
            foe.hello(number)
            foe.greeted.clear()
            assert isinstance(foe.answer(), Welcome)
        for step, foe in enumerate(foes):
            foe.say(Forward(session=number, step=step), hidden=torch.ones(1, 4, 32))
            foe.result()
        foes[0].leave([number])
        foes[1].leave([number])
        assert not isinstance(foes[2].receive(0), Closed)
