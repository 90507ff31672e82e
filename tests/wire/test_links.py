"""Several parties at once, forged routing ids, and links that break."""

import socket
import struct
import threading
import time

import pytest
import zmq

from splitfl.errors import UnreachableError
from splitfl.wire import channel
from splitfl.wire.channel import QUEUE
from tests.wire.conftest import LIMIT_S, MAX_BYTES, Proxy, ask, insecure_owner, insecure_party, port_of

pytestmark = pytest.mark.usefixtures("leaves_nothing")


# ---- several parties


def test_parties_at_the_same_time_get_their_own_answers(folder):
    rounds, wrong = 50, []

    def talk(name, address):
        with folder.party(address, name) as party:
            party.open(LIMIT_S)
            for i in range(rounds):
                mine = f"{name} {i}".encode() * 100
                if ask(party, mine) != [mine]:
                    wrong.append((name, i))

    with folder.owner() as owner:
        threads = [threading.Thread(target=talk, args=(name, owner.address)) for name in ("party", "other") * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT_S)
        assert not wrong
        keys = {folder.keys(name).public.decode(): name for name in ("party", "other")}
        for _ in range(4 * rounds):
            envelope = owner.next()
            assert bytes(envelope.frames[0]).startswith(keys[envelope.sender].encode())
        assert owner.came.empty()


def test_a_message_too_large_ends_its_own_link_only(folder):
    with (
        folder.owner() as owner,
        folder.party(owner.address) as greedy,
        folder.party(owner.address, "other") as modest,
    ):
        greedy.open(LIMIT_S)
        modest.open(LIMIT_S)
        greedy.send([b"head", bytes(MAX_BYTES + 1000)])
        assert greedy.receive(LIMIT_S) is None  # at once when the link is up again
        assert greedy.links == 2
        assert ask(modest, b"still here") == [b"still here"]
        assert modest.links == 1
        assert ask(greedy, b"smaller", bytes(MAX_BYTES)) == [b"smaller", bytes(MAX_BYTES)]
        assert [len(owner.next().frames[0]) for _ in range(2)] == [10, 7]  # and nothing of the large one


def test_an_answer_too_large_ends_the_link_and_it_comes_back(folder):
    """libzmq itself would not connect again after this."""
    with folder.owner() as owner, folder.party(owner.address, max_message_bytes=1000) as party:
        party.open(LIMIT_S)
        assert ask(party, b"small") == [b"small"]
        party.send([bytes(5000)])
        assert party.receive(LIMIT_S) is None
        assert party.links == 2
        assert ask(party, b"small") == [b"small"]


def test_a_party_that_does_not_read_is_not_buffered_without_bound(folder):
    chunk, sent = bytes(MAX_BYTES), []

    def flood(owner, envelope):
        if bytes(envelope.frames[0]) != b"flood me":
            assert owner.send(envelope.route, envelope.frames)
            return
        while len(sent) < 500 and owner.send(envelope.route, [chunk]):
            sent.append(1)
        assert not owner.send(envelope.route, [chunk])

    with (
        folder.owner(flood) as owner,
        folder.party(owner.address) as deaf,
        folder.party(owner.address, "other") as party,
    ):
        deaf.open(LIMIT_S)
        party.open(LIMIT_S)
        deaf.send([b"flood me"])
        owner.next()
        assert ask(party, b"still served") == [b"still served"]
    assert QUEUE <= len(sent) < 100


def test_sending_to_nobody_says_so(folder):
    with folder.owner() as owner:
        assert owner.do(owner.socket.send, b"\0abcd", [b"answer"]) is False
        with folder.party(owner.address) as party:
            party.open(LIMIT_S)
            ask(party, b"hello")
        route = owner.next().route
        deadline = time.monotonic() + LIMIT_S
        while owner.do(owner.socket.send, route, [b"late"]):  # until the owner has noticed
            assert time.monotonic() < deadline
    assert owner.socket.send(route, [b"later"]) is False


# ---- routing ids


def forge(address, identity):
    """Speak ZMTP by hand, as a DEALER that claims `identity`; the connected socket after its handshake."""
    link = socket.create_connection(("127.0.0.1", port_of(address)), timeout=LIMIT_S)
    link.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32))
    greeting = b""
    while len(greeting) < 64:
        greeting += link.recv(64 - len(greeting))
    ready = b"\x05READY"
    for name, value in ((b"Socket-Type", b"DEALER"), (b"Identity", identity)):
        ready += bytes([len(name)]) + name + struct.pack(">I", len(value)) + value
    link.sendall(bytes([4, len(ready)]) + ready)
    flags, length = link.recv(1), link.recv(1)[0]
    assert flags == b"\x04"
    body = b""
    while len(body) < length:
        body += link.recv(length - len(body))
    assert body.startswith(b"\x05READY")
    return link


def message_bytes(link, wait_s):
    """What arrives within `wait_s`, without ZMTP's own commands (heartbeats)."""
    link.settimeout(wait_s)
    came = b""
    try:
        while part := link.recv(65536):
            came += part
    except TimeoutError:
        pass
    messages = b""
    while came:
        length = came[1]
        if not came[0] & 4:
            messages += came[2 : 2 + length]
        came = came[2 + length :]
    return messages


def test_a_forged_routing_id_does_not_get_anothers_answer():
    def hold(owner, envelope):
        pass

    with insecure_owner(hold) as owner, insecure_party(owner.address) as victim:
        victim.open(LIMIT_S)
        victim.send([b"request"])
        route = owner.next().route
        with forge(owner.address, route) as forger:
            forger.sendall(b"\x01\x00\x00\x04mine")
            assert owner.do(owner.socket.send, route, [b"for the victim"])
            assert bytes(victim.receive(LIMIT_S)[0]) == b"for the victim"
            assert message_bytes(forger, 0.3) == b""
        assert owner.came.empty()


def test_the_forger_can_receive_at_all():
    """The test above would also pass with a forger that cannot speak: this one shows that it can."""
    with insecure_owner() as owner, forge(owner.address, b"") as honest:
        honest.sendall(b"\x00\x04mine")
        assert bytes(owner.next().frames[0]) == b"mine"
        assert message_bytes(honest, 0.3) == b"mine"


def test_a_chosen_routing_id_is_not_listened_to(folder):
    context = zmq.Context()
    with folder.owner() as owner:
        link = context.socket(zmq.DEALER)
        link.routing_id = b"chosen"
        link.curve_publickey, link.curve_secretkey = folder.keys().public, folder.keys().secret
        link.curve_serverkey = folder.keys("owner").public
        link.connect(owner.address)
        link.send(b"lie in wait")
        deadline = time.monotonic() + LIMIT_S
        while owner.socket.dropped == 0:
            assert time.monotonic() < deadline
        assert owner.came.empty()
        link.close(0)
    context.term()


# ---- links that break


def test_a_lost_link_comes_back_and_says_so(folder):
    with folder.owner() as owner, Proxy(port_of(owner.address)) as proxy, folder.party(proxy.address) as party:
        party.open(LIMIT_S)
        assert ask(party, b"before") == [b"before"]
        proxy.cut()
        assert party.receive(LIMIT_S) is None
        assert (party.connected, party.links) == (True, 2)
        assert ask(party, b"after") == [b"after"]
        assert owner.next().route != owner.next().route


def test_a_link_that_hangs_is_given_up_after_its_heartbeats(folder, monkeypatch):
    monkeypatch.setattr(channel, "_HEARTBEAT_MS", 100)
    monkeypatch.setattr(channel, "_SLOWEST_BYTES_PER_MS", MAX_BYTES)
    with folder.owner() as owner, Proxy(port_of(owner.address)) as proxy, folder.party(proxy.address) as party:
        party.open(LIMIT_S)
        proxy.hold()
        assert party.receive(LIMIT_S) is None
        assert party.links == 2
        assert ask(party, b"after") == [b"after"]


def test_an_owner_that_restarts_is_found_again(folder):
    with folder.owner() as owner:
        address = owner.address
        party = folder.party(address)
        party.open(LIMIT_S)
        assert ask(party, b"first") == [b"first"]
    deadline = time.monotonic() + LIMIT_S
    while party.connected:
        assert party.receive(0.05) is None
        assert time.monotonic() < deadline
    with pytest.raises(UnreachableError):
        party.send([b"nobody"], timeout_s=0.3)
    with folder.owner(bind=address):
        party.send([b"second"], timeout_s=LIMIT_S)
        while (answer := party.receive(LIMIT_S)) is None:  # None once: the link came back
            pass
        assert bytes(answer[0]) == b"second"
        assert party.links == 2
        party.close()


def test_a_large_message_to_an_owner_that_goes_away_does_not_hold_up_close(folder):
    with folder.owner() as owner, Proxy(port_of(owner.address)) as proxy:
        party = folder.party(proxy.address)
        party.open(LIMIT_S)
        proxy.hold()
        for _ in range(3):
            party.send([bytes(MAX_BYTES)])
        began = time.monotonic()
        party.close()
        assert time.monotonic() - began < 5
