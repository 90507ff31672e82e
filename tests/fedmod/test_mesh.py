"""Peers over real sockets with real keys: who is answered, what is waited for, and who is never asked again."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace as changed

from party.fedmod_answers import Answers
from party.fedmod_model import Layout, Pair
from party.fedmod_peers import Neighbourhood
from party.mesh import MeshServer, PeerLink, PeerList
from protocols import PEER_PROTOCOLS, PROTOCOLS, protocol_named
from splitfl.config_mesh import FedmodSettings
from splitfl.errors import KeyFileError, RefusedError, ResourceError, UnreachableError, UsageError, WireError
from splitfl.privacy.disclosure import Disclosure
from splitfl.sketch import Sketch
from splitfl.wire import mesh_messages as say
from splitfl.wire.keys import load_keys, load_public, new_keys

DISCLOSURE = PEER_PROTOCOLS["fedmod"].disclosure
A, B = "m.lora_A.default.weight", "m.lora_B.default.weight"
LAYOUT = Layout(
    places={A: slice(0, 6), B: slice(6, 14)}, shapes={A: (2, 3), B: (4, 2)}, pairs=(Pair(a=A, b=B, scaling=1.0),)
)
HELLO = say.Hello(number=0, version=say.MESH_VERSION, model="model", layout="layout")
VALUES = {"all": 14, "A": 6, "B": 8, "sketch": 3}
NAMES = ("one", "two", "three", "stranger")


def sketch(*values: int) -> Sketch:
    return Sketch(values=np.array(values, dtype=np.int32), rows=10, grid=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Keys of four servers, three of them on the list."""
    folder = tmp_path_factory.mktemp("mesh")
    for name in NAMES:
        public, _ = new_keys(name, folder / "keys")
        if name != "stranger":
            (folder / "peers").mkdir(exist_ok=True)
            (folder / "peers" / public.name).write_bytes(public.read_bytes())
    return folder


def settings(folder: Path, name: str, **options) -> FedmodSettings:
    given = {
        "model": "m", "out": folder, "key": folder / "keys" / f"{name}.key_secret", "peers": folder / "peers",
        "train": folder, "rounds": 3, "local_steps": 1, "timeout": 4.0, **options,
    }  # fmt: skip
    return FedmodSettings(**given)


@contextmanager
def serving(
    folder: Path, name: str = "one", own: Sketch | None = None, hello: say.Hello = HELLO, bind: str = "tcp://127.0.0.1:0",
    disclosure: Disclosure = DISCLOSURE, opened: bool = True, **options,
) -> Iterator[tuple[MeshServer, Answers]]:  # fmt: skip
    chosen = settings(folder, name, **options)
    answers = Answers(chosen, hello, LAYOUT, rows=7)
    if opened:
        answers.open(own)
    keys = load_keys(chosen.key)
    server = MeshServer(
        bind, keys=keys, peers=PeerList(chosen.peers, deny=chosen.deny, own=keys.public), answer=answers,
        disclosure=disclosure, max_message_bytes=65536,
    )  # fmt: skip
    server.start()
    try:
        yield server, answers
    finally:
        server.close()


@contextmanager
def asking(
    folder: Path, address: str, name: str = "two", of: str = "one", disclosure: Disclosure = DISCLOSURE, values=VALUES
) -> Iterator[PeerLink]:
    link = PeerLink(
        of, address, public=load_public(folder / "keys" / f"{of}.key"),
        keys=load_keys(folder / "keys" / f"{name}.key_secret"), disclosure=disclosure, values=values,
        max_message_bytes=65536,
    )  # fmt: skip
    try:
        yield link
    finally:
        link.close()


def test_a_conversation(folder):
    vector = torch.linspace(-1, 1, 14)
    with serving(folder, own=sketch(1, 2, 3)) as (server, answers), asking(folder, server.address) as link:
        assert link.greet(HELLO, 5).layout == "layout"
        reply, frame = link.ask(say.AskSketch(number=0), 5)
        assert (reply.rows, reply.grid, say.integers_of(frame).tolist()) == (10, 1, [1, 2, 3])
        again = link.ask(say.AskSketch(number=0), 5)[1]
        assert bytes(again) == bytes(frame), "a second question gets the same bytes"
        assert link.ask(say.Want(number=0, round=1, part="all"), 5)[0].round == 0
        answers.publish(2, vector)
        reply, frame = link.ask(say.Want(number=0, round=1, part="all"), 5)
        assert (reply.round, reply.rows, reply.values) == (2, 7, 14)
        assert torch.equal(say.floats_of(frame), vector)
        assert isinstance(link.ask(say.Want(number=0, round=3, part="all"), 5)[0], say.NotYet)
        assert answers.waiting == {"two"}
        link.ask(say.Finished(number=0), 5)
        assert answers.waiting == set()


def test_factors_in_turn_under_rolora(folder):
    vector = torch.linspace(-1, 1, 14)
    with serving(folder, rule="rolora") as (server, answers), asking(folder, server.address) as link:
        answers.publish(1, vector)
        link.greet(HELLO, 5)
        assert isinstance(link.ask(say.AskSketch(number=0), 5)[0], say.NoSketch)
        for part, expected in (("A", vector[:6]), ("B", vector[6:])):
            _, frame = link.ask(say.Want(number=0, round=1, part=part), 5)
            assert torch.equal(say.floats_of(frame), expected)
        with pytest.raises(RefusedError, match="not exchanged"):
            link.ask(say.Want(number=0, round=1, part="all"), 5)


@pytest.mark.parametrize("name", ["stranger", "one"])
def test_who_is_not_on_the_list_or_has_ones_own_key_gets_nothing(folder, name):
    with (
        serving(folder) as (server, _),
        asking(folder, server.address, name=name) as link,
        pytest.raises(RefusedError, match="not admit"),
    ):
        link.greet(HELLO, 5)


def test_the_denied_are_not_admitted(folder):
    with (
        serving(folder, deny=("two",)) as (server, _),
        asking(folder, server.address) as link,
        pytest.raises(RefusedError),
    ):
        link.greet(HELLO, 5)


def test_taken_off_the_list_while_connected(folder, tmp_path):
    peers = tmp_path / "peers"
    peers.mkdir()
    (peers / "two.key").write_bytes((folder / "peers" / "two.key").read_bytes())
    with serving(folder, peers=peers) as (server, _), asking(folder, server.address) as link:
        link.greet(HELLO, 5)
        (peers / "two.key").unlink()
        with pytest.raises(RefusedError, match="not admitted") as refused:
            link.ask(say.AskSketch(number=0), 5)
        assert refused.value.code == "denied"


def test_another_key_at_that_address(folder):
    with (
        serving(folder) as (server, _),
        asking(folder, server.address, of="three") as link,
        pytest.raises((KeyFileError, UnreachableError)),
    ):
        link.greet(HELLO, 3)


@pytest.mark.parametrize(("field", "value"), [("version", 9), ("model", "other"), ("layout", "other")])
def test_another_model_layout_or_version_is_refused_with_what_is_expected(folder, field, value):
    with serving(folder) as (server, _), asking(folder, server.address) as link:
        with pytest.raises(RefusedError) as refused:
            link.greet(changed(HELLO, **{field: value}), 5)
        assert refused.value.code == field
        assert refused.value.expected == str(getattr(HELLO, field))
        with pytest.raises(RefusedError, match="hello first"):
            link.ask(say.AskSketch(number=0), 5)


def test_policy_tags_are_asked_for_on_both_sides(folder):
    with serving(folder, require_tag=("hate",)) as (server, _), asking(folder, server.address) as link:
        with pytest.raises(RefusedError) as refused:
            link.greet(changed(HELLO, tags=("spam",)), 5)
        assert refused.value.code == "policy"
        link.greet(changed(HELLO, tags=("spam", "hate")), 5)
    with serving(folder, hello=changed(HELLO, tags=("spam",))) as (server, _):
        wants = settings(folder, "two", tags=("hate,nsfw",), shared_tags=1)
        with asking(folder, server.address) as link:
            peers = Neighbourhood(wants, [link], changed(HELLO, tags=("hate", "nsfw")), None)
            try:
                assert "shares 0 policy tags" in peers.gather(0.0)["one"]
                assert peers.ranked() == []
            finally:
                peers.close()


def test_before_the_sketch_is_booked_nobody_is_answered(folder):
    with serving(folder, opened=False) as (server, answers), asking(folder, server.address) as link:
        with pytest.raises(RefusedError) as refused:
            link.greet(HELLO, 5)
        assert refused.value.code == "out_of_order"
        answers.open(None)
        link.greet(HELLO, 5)


def test_what_the_protocol_does_not_list_neither_leaves_nor_is_believed(folder):
    kept = replace(DISCLOSURE, crossings=tuple(c for c in DISCLOSURE.crossings if c.tensor != "sketch"))
    with serving(folder, own=sketch(1, 2, 3), disclosure=kept) as (server, _), asking(folder, server.address) as link:
        link.greet(HELLO, 5)
        with pytest.raises(RefusedError) as refused:
            link.ask(say.AskSketch(number=0), 5)
        assert refused.value.code == "not_disclosed"
    with (
        serving(folder, own=sketch(1, 2, 3)) as (server, _),
        asking(folder, server.address, disclosure=kept) as link,
    ):
        link.greet(HELLO, 5)
        with pytest.raises(WireError, match="does not list"):
            link.ask(say.AskSketch(number=0), 5)


def test_an_adapter_of_another_size_is_refused(folder):
    with serving(folder) as (server, answers):
        answers.publish(1, torch.zeros(14))
        with asking(folder, server.address, values={"all": 15}) as link:
            link.greet(HELLO, 5)
            with pytest.raises(WireError, match="14 numbers"):
                link.ask(say.Want(number=0, round=1, part="all"), 5)


def test_nonsense_does_not_stop_the_server(folder):
    with serving(folder) as (server, _), asking(folder, server.address) as link:
        link.greet(HELLO, 5)
        for frames in ([b"nonsense"], [b"", b"", b""], say.encode(HELLO, b"more"), [b"\xc1" * 9000]):
            link._socket.send(frames)
        assert isinstance(link.ask(say.AskSketch(number=0), 5)[0], say.NoSketch)


def test_an_address_in_use_is_said(folder):
    with (
        serving(folder) as (server, _),
        pytest.raises(ResourceError, match="cannot be served"),
        serving(folder, bind=server.address),
    ):
        pass


def free_address() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{taken.getsockname()[1]}"


def everybody() -> torch.Tensor:
    return torch.ones(14, dtype=torch.bool)


@contextmanager
def neighbourhood(folder: Path, addresses: dict[str, str], own: Sketch | None, asker: str = "two", **options):
    with ExitStack() as stack:
        links = [stack.enter_context(asking(folder, at, name=asker, of=name)) for name, at in addresses.items()]
        peers = Neighbourhood(settings(folder, asker, **options), links, HELLO, own)
        stack.callback(peers.close)
        yield peers


def test_the_most_similar_is_asked_and_one_that_vanishes_gives_way_to_the_next(folder):
    near, far = sketch(9, 1, 0), sketch(0, 1, 9)
    with serving(folder, "one", own=near) as (first, gives), serving(folder, "three", own=far) as (second, also):
        addresses = {"one": first.address, "three": second.address}
        with neighbourhood(folder, addresses, sketch(8, 1, 1), neighbours=1, min_similarity=-1.0) as peers:
            assert peers.gather(5.0) == {}
            assert [peer.name for peer in peers.ranked()] == ["one", "three"]
            gives.publish(1, torch.full((14,), 1.0))
            also.publish(2, torch.full((14,), 3.0))
            came = peers.exchange(1, "all", torch.zeros(14), everybody())
            assert [(u.name, u.rows, u.vector.tolist()) for u in came.updates] == [("one", 7, [1.0] * 14)]
            assert came.updates[0].similarity == peers.peers["one"].similarity > 0
            first.close()
            began = time.monotonic()
            gone = peers.exchange(2, "all", torch.zeros(14), everybody())
            assert time.monotonic() - began < 8, "a peer that is gone costs its limit and no more"
            assert gone.updates == []
            assert "one" in gone.missing
            assert [u.name for u in peers.exchange(2, "all", torch.zeros(14), everybody()).updates] == ["three"]
            with serving(folder, "one", own=near, bind=addresses["one"]) as (_, back):
                back.publish(3, torch.full((14,), 5.0))
                returned = peers.exchange(3, "all", torch.zeros(14), everybody())
                assert [u.name for u in returned.updates] == ["one"]


def test_a_peer_that_is_behind_is_waited_for_and_taken_late_only_if_not_too_old(folder):
    with serving(folder) as (server, answers):
        answers.publish(2, torch.zeros(14))
        for lag, taken in ((0, []), (1, ["one"])):
            with neighbourhood(folder, {"one": server.address}, None, timeout=2.0, max_lag=lag) as peers:
                assert peers.gather(5.0) == {}
                came = peers.exchange(3, "all", torch.zeros(14), everybody())
                assert [u.name for u in came.updates] == taken
                assert came.seconds >= 1.0


def test_two_that_ask_each_other_at_once_both_get_their_answer(folder):
    with (
        serving(folder, "one") as (first, a),
        serving(folder, "two") as (second, b),
        neighbourhood(folder, {"two": second.address}, None, asker="one") as left,
        neighbourhood(folder, {"one": first.address}, None, asker="two") as right,
        ThreadPoolExecutor(2) as pool,
    ):
        a.publish(1, torch.full((14,), 1.0))
        b.publish(1, torch.full((14,), 2.0))
        sides = [
            pool.submit(lambda p: p.gather(5.0) or p.exchange(1, "all", torch.zeros(14), everybody()), side)
            for side in (left, right)
        ]
        assert [side.result(20).updates[0].vector[0].item() for side in sides] == [2.0, 1.0]


def test_who_refuses_for_good_is_not_asked_again_and_the_absent_are_looked_for(folder):
    later = free_address()
    with (
        serving(folder, "one", hello=changed(HELLO, layout="other")) as (server, _),
        neighbourhood(folder, {"one": server.address, "three": later}, None, timeout=3.0) as peers,
    ):
        reasons = peers.gather(0.5)
        assert set(reasons) == {"one", "three"}
        assert peers.peers["one"].refused is not None
        assert peers.peers["three"].refused is None
        with serving(folder, "three", bind=later) as (_, answers):
            answers.publish(1, torch.zeros(14))
            assert [u.name for u in peers.exchange(1, "all", torch.zeros(14), everybody()).updates] == ["three"]


def test_only_so_many_candidates_are_looked_at_and_the_draw_is_that_of_the_seed(folder):
    nowhere = {name: free_address() for name in ("one", "three")}
    chosen = set()
    for seed in range(8):
        drawn = []
        for _ in range(2):
            with neighbourhood(folder, nowhere, None, candidates=1, seed=seed) as peers:
                drawn.append(list(peers.peers))
        assert drawn[0] == drawn[1]
        chosen.update(drawn[0])
    assert chosen == {"one", "three"}


def test_no_owner_serves_this_protocol():
    assert "fedmod" not in PROTOCOLS
    with pytest.raises(UsageError, match="no owner"):
        protocol_named("fedmod")
