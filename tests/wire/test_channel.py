import asyncio
import os
import socket
import struct
import threading
import time

import pytest
import zmq

from splitfl.errors import InternalError, KeyFileError, RefusedError, ResourceError, UnreachableError, UsageError
from splitfl.wire import channel
from splitfl.wire.channel import INSECURE_SENDER, QUEUE, OwnerSocket, PartySocket
from splitfl.wire.keys import KeyPair, fingerprint, new_keys
from tests.wire.conftest import LIMIT_S, MAX_BYTES, OwnerThread, Proxy

pytestmark = pytest.mark.usefixtures("leaves_nothing")


def port_of(address):
    return int(address.rsplit(":", 1)[1])


def ask(party, *frames):
    """Send, and the answer as bytes."""
    party.send(list(frames), timeout_s=LIMIT_S)
    answer = party.receive(LIMIT_S)
    assert answer is not None
    return [bytes(frame) for frame in answer]


def insecure_owner(answer=None, bind="tcp://127.0.0.1:0"):
    return OwnerThread(
        OwnerSocket(bind, keys=None, allow=None, max_message_bytes=MAX_BYTES, insecure_loopback=True), answer
    )


def insecure_party(address):
    return PartySocket(address, keys=None, owner_public=None, max_message_bytes=MAX_BYTES, insecure_loopback=True)


# ---- who gets in


def test_an_admitted_party_is_known_by_its_key(folder):
    large = os.urandom(500_000)
    with folder.owner() as owner, folder.party(owner.address) as party:
        party.open(LIMIT_S)
        assert ask(party, b"head", large, b"") == [b"head", large, b""]
        envelope = owner.next()
        assert envelope.sender.encode() == folder.keys().public
        assert folder.allow.allowed(envelope.sender.encode()) == "party"
        assert [bytes(frame) for frame in envelope.frames] == [b"head", large, b""]
        assert party.bytes_sent == party.bytes_received == owner.socket.bytes_received == 500_004
        assert party.connected
        assert party.links == 1


def test_an_unknown_key_is_told_so_and_delivers_nothing(folder):
    with folder.owner() as owner, folder.party(owner.address, "stranger") as party:
        with pytest.raises(RefusedError) as caught:
            party.open(LIMIT_S)
        assert caught.value.code == "revoked"
        assert "keys allow" in str(caught.value)
        assert fingerprint(folder.keys("stranger").public) in str(caught.value)
        assert owner.came.empty()


def test_a_revoked_key_keeps_its_name_on_an_open_link_and_gets_no_new_one(folder):
    with folder.owner() as owner, folder.party(owner.address) as party:
        party.open(LIMIT_S)
        folder.allow.revoke("party")
        ask(party, b"still there")
        assert folder.allow.allowed(owner.next().sender.encode()) is None  # so the server can refuse
        with pytest.raises(RefusedError), folder.party(owner.address) as again:
            again.open(LIMIT_S)
        folder.allow.add(folder.path / "party.key")
        with folder.party(owner.address) as again:
            again.open(LIMIT_S)
            assert ask(again, b"back") == [b"back"]


def test_a_party_whose_key_is_revoked_while_its_link_is_down_is_told(folder):
    with folder.owner() as owner, Proxy(port_of(owner.address)) as proxy, folder.party(proxy.address) as party:
        party.open(LIMIT_S)
        folder.allow.revoke("party")
        proxy.cut()
        with pytest.raises(RefusedError) as caught:
            party.receive(LIMIT_S)
        assert caught.value.code == "revoked"


def test_a_broken_key_file_among_the_parties_keeps_nobody_else_out(folder):
    with folder.owner() as owner:
        (folder.allow.folder / "broken.key").write_text("nonsense", encoding="utf-8")
        with folder.party(owner.address) as party:
            party.open(LIMIT_S)
        with pytest.raises(RefusedError), folder.party(owner.address, "stranger") as stranger:
            stranger.open(LIMIT_S)
        with folder.party(owner.address) as party:
            party.open(LIMIT_S)
    assert list(folder.allow.problems) == ["broken.key"]


def test_without_a_folder_nobody_gets_in(folder):
    for path in folder.allow.folder.iterdir():
        path.unlink()
    folder.allow.folder.rmdir()
    with folder.owner() as owner, folder.party(owner.address) as party, pytest.raises(RefusedError):
        party.open(LIMIT_S)


# ---- what answers there


def test_another_owner_than_the_pinned_one_is_found_out(folder):
    with folder.owner() as owner, folder.party(owner.address, owner="stranger") as party:
        with pytest.raises(KeyFileError) as caught:
            party.open(LIMIT_S)
        assert fingerprint(folder.keys("stranger").public) in str(caught.value)
        assert owner.came.empty()


def test_nothing_listens(folder):
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{reserved.getsockname()[1]}"
        began = time.monotonic()
        with folder.party(address) as party, pytest.raises(UnreachableError) as caught:
            party.open(0.5)
        assert time.monotonic() - began < LIMIT_S
        assert address in str(caught.value)
        assert "connection refused" in str(caught.value)


def test_a_name_that_does_not_resolve(folder):
    with folder.party("tcp://no-such-host.invalid:5555") as party, pytest.raises(UnreachableError) as caught:
        party.open(0.5)
    assert "no-such-host.invalid" in str(caught.value)


class Impostor:
    """Something that listens and is no owner: says `word` to whoever connects, or nothing."""

    def __init__(self, word: bytes):
        self._word, self._listener, self._links = word, socket.create_server(("127.0.0.1", 0)), []
        self._thread = threading.Thread(target=self._run)
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(LIMIT_S)
        for link in (self._listener, *self._links):
            link.close()

    def _run(self):
        while True:
            try:
                link, _ = self._listener.accept()
            except OSError:
                return
            self._links.append(link)
            if self._word:
                link.sendall(self._word)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (b"", "no answer in time|without a word"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n" + b" " * 64, "not a splitfl owner"),
    ],
)
def test_something_else_listens(folder, word, said):
    with (
        Impostor(word) as impostor,
        folder.party(impostor.address) as party,
        pytest.raises(UnreachableError, match=said),
    ):
        party.open(0.5)


def test_one_side_with_keys_and_one_without_do_not_meet(folder):
    with insecure_owner() as owner, folder.party(owner.address) as party:
        with pytest.raises(UnreachableError, match="NULL security"):
            party.open(LIMIT_S)
        assert owner.came.empty()
    with folder.owner() as owner, insecure_party(owner.address) as party:
        with pytest.raises(UnreachableError, match="CURVE security"):
            party.open(LIMIT_S)
        assert owner.came.empty()


def test_open_can_be_tried_again(folder):
    with folder.owner() as owner, folder.party(owner.address, "stranger") as party:
        with pytest.raises(RefusedError):
            party.open(LIMIT_S)
        folder.allow.add(folder.path / "stranger.key")
        party.open(LIMIT_S)
        assert ask(party, b"hello") == [b"hello"]


# ---- binding


def test_a_port_in_use_is_said(folder):
    with folder.owner() as owner:
        with pytest.raises(ResourceError) as caught, folder.owner(bind=owner.address):
            pass
        assert owner.address in str(caught.value)
        with folder.party(owner.address) as party:  # the first one goes on
            party.open(LIMIT_S)


def test_an_address_of_another_machine_cannot_be_served(folder):
    with pytest.raises(ResourceError), folder.owner(bind="tcp://192.0.2.1:0"):
        pass


@pytest.mark.parametrize("address", ["tcp://10.0.0.1:5555", "tcp://*:5555", "tcp://owner.example:5555", "tcp://[::]:1"])
def test_an_unencrypted_channel_does_not_leave_the_machine(address):
    with pytest.raises(UsageError):
        insecure_owner(bind=address)
    with pytest.raises(UsageError):
        insecure_party(address)


def test_security_is_not_left_out_by_accident(folder):
    limits = {"max_message_bytes": MAX_BYTES}
    keys, public, here = folder.keys(), folder.keys("owner").public, "tcp://127.0.0.1:5555"
    with pytest.raises(UsageError):
        PartySocket(here, keys=None, owner_public=public, **limits)
    with pytest.raises(UsageError):
        PartySocket(here, keys=keys, owner_public=None, **limits)
    with pytest.raises(UsageError):
        PartySocket(here, keys=keys, owner_public=public, insecure_loopback=True, **limits)
    with pytest.raises(UsageError):
        OwnerSocket(here, keys=None, allow=folder.allow, **limits)
    with pytest.raises(UsageError):
        OwnerSocket(here, keys=keys, allow=None, **limits)


def test_halves_of_two_pairs_are_found_out(folder):
    mixed = KeyPair(public=folder.keys("party").public, secret=folder.keys("other").secret)
    with pytest.raises(KeyFileError) as caught:
        PartySocket("tcp://127.0.0.1:1", keys=mixed, owner_public=mixed.public, max_message_bytes=1)
    assert mixed.secret.decode() not in str(caught.value)
    assert mixed.secret.decode() not in repr(mixed)


def test_an_unencrypted_channel_on_this_machine(folder):
    with insecure_owner(bind="tcp://localhost:0") as owner, insecure_party(owner.address) as party:
        party.open(LIMIT_S)
        assert ask(party, b"plain") == [b"plain"]
        assert owner.next().sender == INSECURE_SENDER


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


# ---- waiting and closing


def test_waiting_has_limits(folder):
    async def wait(owner):
        began = time.monotonic()
        assert await owner.receive(0.05) is None
        assert await owner.receive(0) is None
        return time.monotonic() - began

    with folder.owner() as owner, folder.party(owner.address) as party:
        party.open(LIMIT_S)
        began = time.monotonic()
        assert party.receive(0.05) is None
        assert party.receive(0) is None
        assert 0.05 <= time.monotonic() - began < LIMIT_S
    other = OwnerSocket("tcp://127.0.0.1:0", keys=folder.keys("owner"), allow=folder.allow, max_message_bytes=MAX_BYTES)

    async def run():
        await other.start()
        took = await wait(other)
        await other.close()
        await other.close()
        return took

    assert 0.05 <= asyncio.run(run()) < LIMIT_S


def test_a_cancelled_receive_loses_nothing(folder):
    """Cancelled after each small number of turns of the loop, so at every point at which it can be."""
    numbers = [str(i).encode() for i in range(40)]
    owner = OwnerSocket("tcp://127.0.0.1:0", keys=folder.keys("owner"), allow=folder.allow, max_message_bytes=MAX_BYTES)

    def talk():
        with folder.party(owner.address) as party:
            party.open(LIMIT_S)
            for number in numbers:
                party.send([number])
            party.receive(LIMIT_S)

    async def collect():
        came, cancelled = [], 0
        while len(came) < len(numbers):
            task = asyncio.create_task(owner.receive(LIMIT_S))
            for _ in range(cancelled % 12):
                await asyncio.sleep(0)
            task.cancel()
            try:
                envelope = await task
            except asyncio.CancelledError:
                cancelled += 1
            else:
                came.append(bytes(envelope.frames[0]))
                cancelled += 1
        owner.send(envelope.route, [b"enough"])
        return came

    async def run():
        await owner.start()
        thread = threading.Thread(target=talk)
        thread.start()
        try:
            return await asyncio.wait_for(collect(), LIMIT_S)
        finally:
            await asyncio.to_thread(thread.join, LIMIT_S)
            await owner.close()

    assert asyncio.run(run()) == numbers


def test_sockets_that_are_not_open_say_so(folder):
    with folder.party("tcp://127.0.0.1:5555") as party, pytest.raises(InternalError):
        party.send([b"x"])
    owner = OwnerSocket("tcp://127.0.0.1:0", keys=folder.keys("owner"), allow=folder.allow, max_message_bytes=1)
    with pytest.raises(InternalError):
        asyncio.run(owner.receive(0))
    asyncio.run(owner.close())


def test_closing_twice_and_never_opening_are_harmless(folder):
    party = folder.party("tcp://127.0.0.1:5555")
    party.close()
    party.close()
    with folder.owner() as owner:
        party = folder.party(owner.address)
        party.open(LIMIT_S)
        party.close()
        party.close()


def test_no_key_reaches_a_log(folder, caplog):
    caplog.set_level(0)
    with folder.owner() as owner:
        with folder.party(owner.address) as party:
            party.open(LIMIT_S)
            ask(party, b"hello")
        with pytest.raises(RefusedError), folder.party(owner.address, "stranger") as stranger:
            stranger.open(LIMIT_S)
    for name in ("owner", "party", "stranger"):
        for key in (folder.keys(name).public, folder.keys(name).secret):
            assert key.decode() not in caplog.text


def test_new_keys_come_from_libzmq(tmp_path):
    public, secret = new_keys("fresh", tmp_path)
    loaded = zmq.auth.load_certificate(secret)
    assert zmq.curve_public(loaded[1]) == loaded[0] == zmq.auth.load_certificate(public)[0]
    assert zmq.auth.load_certificate(public)[1] is None
