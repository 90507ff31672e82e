"""The proxy and the relay do what they say, and what they once brought to light stays mended."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import pytest

from party.connect import open_session
from splitfl.bench.faults import Fault, Proxy
from splitfl.bench.message_faults import Rates, altered
from splitfl.kit import open_kit
from splitfl.wire.channel import PartySocket
from splitfl.wire.keys import load_keys, load_public
from splitfl.wire.reach import parse_address
from tests.chaos.conftest import PARTY, open_road

PATIENCE_S = 20.0


@pytest.fixture
def echo():
    """A server that says everything again; its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threads = []

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    link, _ = listener.accept()
                    threads.append(threading.Thread(target=say_again, args=(link,)))
                    threads[-1].start()

        def say_again(link):
            with link, contextlib.suppress(OSError):
                while part := link.recv(1 << 16):
                    link.sendall(part)

        server = threading.Thread(target=serve)
        server.start()
        yield f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        server.join(PATIENCE_S)
        for thread in threads:
            thread.join(PATIENCE_S)


@contextlib.contextmanager
def linked(proxy):
    port = int(proxy.address.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as link:
        link.settimeout(PATIENCE_S)
        yield link


def asked(link, content):
    """What comes back for `content`, until as much is there or the link ends."""
    came = b""
    with contextlib.suppress(ConnectionError):
        link.sendall(content)
        while len(came) < len(content) and (part := link.recv(1 << 16)):
            came += part
    return came


def test_bytes_pass_unchanged_and_are_counted(echo):
    content = bytes(range(256)) * 2000
    with Proxy(echo) as proxy, linked(proxy) as link:
        assert asked(link, content) == content
        assert proxy.passed.up == proxy.passed.down == len(content)


def test_a_cut_ends_the_link_and_the_next_one_works(echo):
    with Proxy(echo) as proxy:
        with linked(proxy) as link:
            assert asked(link, b"one") == b"one"
            proxy.apply(Fault(kind="cut"))
            assert asked(link, b"two") == b""
        with linked(proxy) as link:
            assert asked(link, b"three") == b"three"


def test_a_cut_in_a_frame_lets_a_part_through(echo):
    with Proxy(echo) as proxy, linked(proxy) as link:
        proxy.apply(Fault(kind="cut in a frame"))
        assert asked(link, bytes(1000)) in (b"", bytes(500))
        assert proxy.passed.up == 0


@pytest.mark.parametrize(
    ("fault", "size"),
    [
        (Fault(kind="half open", seconds=0.4), 10),
        (Fault(kind="delay", seconds=30, amount=0.2), 10),
        (Fault(kind="trickle", seconds=30, amount=10_000), 4000),
    ],
    ids=str,
)
def test_what_slows_a_link_takes_its_time_and_loses_nothing(echo, fault, size):
    with Proxy(echo) as proxy, linked(proxy) as link:
        assert asked(link, b"warm") == b"warm"
        proxy.apply(fault)
        began = time.monotonic()
        assert asked(link, bytes(size)) == bytes(size)
        assert time.monotonic() - began > 0.3
        proxy.clear()


def test_a_port_that_refuses_opens_again(echo):
    with Proxy(echo) as proxy:
        proxy.apply(Fault(kind="refuse", seconds=0.3))
        with pytest.raises(ConnectionRefusedError), linked(proxy):
            pass
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            with contextlib.suppress(ConnectionRefusedError), linked(proxy) as link:
                assert asked(link, b"again") == b"again"
                return
        raise AssertionError("it did not open again")


def test_something_happens_when_so_many_bytes_have_passed(echo):
    seen = []
    with Proxy(echo) as proxy, linked(proxy) as link:
        proxy.after(1000, lambda: seen.append(proxy.passed.up))
        for _ in range(30):
            asked(link, bytes(100))
    assert seen == [900]


def test_requests_in_other_bytes_are_found():
    same, other = (b"header", b"tensor"), (b"header", b"another")
    assert altered({(1, "forward", 1): [same, same], (1, "forward", 2): [same]}) == []
    assert altered({(1, "forward", 1): [same, other]}) == [(1, "forward", 1)]


# ---- what was found


@pytest.mark.slow
def test_a_link_that_is_cut_during_handshakes_is_no_owner_with_another_key(home, owner):
    """The proxy answers and hangs up, as long as nobody is behind it; then there is the owner."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
    with Proxy(f"tcp://127.0.0.1:{port}") as proxy:
        link = PartySocket(
            proxy.address, keys=load_keys(home.keys / f"{PARTY}.key_secret"),
            owner_public=load_public(home.keys / "owner.key"), max_message_bytes=1 << 20,
        )  # fmt: skip

        def arrive():
            deadline = time.monotonic() + PATIENCE_S
            while proxy.passed.refused < 4 and time.monotonic() < deadline:
                time.sleep(0.05)
            proxy._owner = parse_address(owner.address)

        thread = threading.Thread(target=arrive)
        thread.start()
        try:
            link.open(PATIENCE_S)
            assert proxy.passed.refused >= 4
        finally:
            thread.join(PATIENCE_S)
            link.close()


@pytest.mark.slow
@pytest.mark.parametrize("rates", [Rates(drop=0.3), Rates(duplicate=1.0)], ids=["lost", "repeated"])
def test_a_session_opens_and_closes_whatever_is_lost_or_repeated(home, owner, rates):
    """Hello, welcome, goodbye: a session that stays behind would keep one of the party's four places for a minute."""
    with open_road(home, owner, rates, 8) as road:
        for _ in range(6):  # two more than there are places
            open_session(
                open_kit(home.kit).plan, road.proxy.address, owner_key=home.keys / "relay.key",
                key=home.keys / f"{PARTY}.key_secret", timeout_s=PATIENCE_S,
            ).close()  # fmt: skip
