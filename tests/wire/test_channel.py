"""Who gets in, what answers, what can be bound, and how waiting and closing end."""

import asyncio
import os
import socket
import threading
import time

import pytest
import zmq

from splitfl.errors import InternalError, KeyFileError, RefusedError, ResourceError, UnreachableError, UsageError
from splitfl.wire.channel import INSECURE_SENDER, OwnerSocket, PartySocket
from splitfl.wire.keys import KeyPair, fingerprint, new_keys
from tests.wire.conftest import LIMIT_S, MAX_BYTES, Proxy, ask, insecure_owner, insecure_party, port_of

pytestmark = pytest.mark.usefixtures("leaves_nothing")


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
