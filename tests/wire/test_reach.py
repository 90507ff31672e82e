import socket
import threading
import time

import pytest

from splitfl.errors import UsageError
from splitfl.wire.reach import Address, look, parse_address


@pytest.mark.parametrize(
    ("text", "host", "port", "endpoint"),
    [
        ("tcp://127.0.0.1:5555", "127.0.0.1", 5555, "tcp://127.0.0.1:5555"),
        ("tcp://localhost:0", "localhost", 0, "tcp://127.0.0.1:0"),
        ("tcp://[::1]:80", "::1", 80, "tcp://[::1]:80"),
        ("tcp://owner.example:65535", "owner.example", 65535, "tcp://owner.example:65535"),
        ("tcp://*:5555", "*", 5555, "tcp://*:5555"),
    ],
)
def test_addresses(text, host, port, endpoint):
    address = parse_address(text)
    assert address == Address(host=host, port=port)
    assert str(address) == text
    assert address.endpoint == endpoint


NO_ADDRESSES = [
    *("", "127.0.0.1:5555", "tcp://127.0.0.1", "tcp://:5555", "tcp://a:65536", "tcp://a:-1", "tcp://a:5555/x"),
    *("tcp://::1:5555", "inproc://x", "udp://a:1", "ipc://x", "tcp://a;tcp://b:1", "tcp://a b:1", "tcp://a:1\n"),
    "tcp://\u00e9:1",
]


@pytest.mark.parametrize("text", NO_ADDRESSES)
def test_other_texts_are_no_addresses(text):
    with pytest.raises(UsageError, match="is not an address"):
        parse_address(text)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_hosts_that_are_this_machine(host):
    assert Address(host=host, port=1).is_loopback


@pytest.mark.parametrize(
    "host",
    ["0.0.0.0", "::", "*", "10.0.0.1", "128.0.0.1", "localhost.example", "owner", "127.1", "2130706433"],  # noqa: S104
)
def test_hosts_that_may_be_another_machine(host):
    assert not Address(host=host, port=1).is_loopback


def test_a_peer_that_never_stops_talking_slowly_does_not_hold_us_up():
    """One byte at a time: each wait is short, only their sum is limited."""
    done = threading.Event()

    def drip(listener):
        link, _ = listener.accept()
        with link:
            while not done.wait(0.2):
                try:
                    link.sendall(b"\xff")
                except OSError:
                    return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip, args=(listener,))
        thread.start()
        began = time.monotonic()
        seen = look(Address(host="127.0.0.1", port=listener.getsockname()[1]), 0.7)
        took = time.monotonic() - began
        done.set()
        thread.join(10)
    assert 0.5 < took < 6
    assert seen.answered
    assert seen.mechanism is None
