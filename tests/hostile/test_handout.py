"""The hand-out of an emulator between sides that do not keep to the rules: a lying owner, and a greedy party."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
import torch

from party.connect import open_session
from party.fetch import fetch_emulator
from splitfl.emulator import EMULATOR_FILE, LARGEST_PLAN, file_hash, uniform_layers, write_emulator
from splitfl.errors import ModelError, RefusedError, WireError
from splitfl.kit import open_kit
from splitfl.wire import frames as wire
from splitfl.wire.channel import QUEUE
from splitfl.wire.messages import (
    MAX_PIECE,
    WIRE_VERSION,
    Bye,
    Closed,
    Fetch,
    Hello,
    Piece,
    Refused,
    TensorSpec,
    Welcome,
)
from splitfl.wire.steps import MAX_FETCHES
from tests.hostile.attacker import attacker, pack
from tests.live.models import whole_model
from tests.live.owner import PARTIES, serve
from tests.wire.conftest import Folder

HUGE = 2**62


@pytest.fixture(scope="module")
def emulator(tiny_llama, tmp_path_factory):
    kit, folder = open_kit(tiny_llama[1]), tmp_path_factory.mktemp("emulator") / "emulator"
    kept = uniform_layers(kit.plan.trunk_layers, 1)
    write_emulator(whole_model(tiny_llama[0]), kit, folder, kept=kept, chosen_by="uniform")
    return folder


# ---- a lying owner


class Liar:
    """Answers hello and goodbye as it should, and each fetch with the frames that `lie` makes of it and the truth."""

    def __init__(self, files, lie):
        self.files, self.lie, self.asked = files, lie, []

    def __call__(self, socket, envelope):
        message = wire.open_header(envelope.frames, sender="party")
        match message:
            case Hello():
                socket.send(
                    envelope.route,
                    wire.encode(
                        Welcome(session=message.session, version=WIRE_VERSION, max_tokens=64, max_length=64,
                                memory="keep", lease_s=60.0, server="0"), {},
                    ),
                )  # fmt: skip
            case Fetch():
                self.asked.append(message)
                for frames in self.lie(message, self.truth(message)):
                    socket.send(envelope.route, frames)
            case Bye():
                socket.send(envelope.route, wire.encode(Closed(session=message.session), {}))

    def truth(self, fetch):
        whole = self.files[fetch.file] if fetch.file < len(self.files) else b"?"
        return told(fetch, whole[fetch.offset : fetch.offset + fetch.length] or b"?", total=len(whole))


def told(fetch, content, *, total, step=None, file=None, offset=None):
    """Frames of a piece that says so, whether it is true or not."""
    message = Piece(
        session=fetch.session,
        step=fetch.step if step is None else step,
        file=fetch.file if file is None else file,
        offset=fetch.offset if offset is None else offset,
        total=total,
    )
    return wire.encode(message, {"piece": torch.frombuffer(bytearray(content), dtype=torch.uint8)})


def honest(_, truth):
    return [truth]


def on_file(number, change, *, length=None):
    """A lie about one file (or, with `length`, about fetches of that length alone), the truth about the rest."""
    return lambda fetch, truth: change(fetch) if fetch.file == number and length in (None, fetch.length) else [truth]


@contextlib.contextmanager
def fetching(tiny_llama, folder, files, lie):
    """A `Liar`, and a call that fetches from it."""
    keys, liar, kit = Folder(folder / "keys"), Liar(files, lie), open_kit(tiny_llama[1])
    with keys.owner(liar, max_message_bytes=1 << 20) as running:
        session = open_session(
            kit.plan, running.address, owner_key=keys.path / "owner.key", key=keys.path / "party.key_secret",
            protocol="guarded-offline", timeout_s=5.0,
        )  # fmt: skip
        with contextlib.closing(session):
            yield liar, lambda: fetch_emulator(session, kit, folder / "got")


def files_of(emulator):
    return [(emulator / EMULATOR_FILE).read_bytes(), *(f.read_bytes() for f in sorted(emulator.glob("*.safetensors")))]


def left(folder):
    return sorted(each.name for each in folder.glob("got/*"))


def test_the_truth_is_taken(tiny_llama, emulator, tmp_path):
    with fetching(tiny_llama, tmp_path, files_of(emulator), honest) as (liar, fetch):
        fetch()
    assert left(tmp_path) == sorted(each.name for each in emulator.iterdir())
    assert all((tmp_path / "got" / each.name).read_bytes() == each.read_bytes() for each in emulator.iterdir())
    assert [(f.file, f.offset) for f in liar.asked] == [(0, 0), (1, 0), (1, 0)]


LIES = {
    "a size of exabytes": on_file(1, lambda f: [told(f, b"x", total=HUGE)], length=1),
    "a size that it could not have": on_file(1, lambda f: [told(f, b"x", total=50_000_000)], length=1),
    "fewer bytes than were sent": on_file(1, lambda f: [told(f, bytes(f.length), total=f.length - 1)]),
    "a piece of another file": on_file(1, lambda f: [told(f, bytes(f.length), total=9_000, file=0)]),
    "a piece of a file that is not there": on_file(1, lambda f: [told(f, bytes(f.length), total=9_000, file=HUGE)]),
    "a piece from elsewhere": on_file(1, lambda f: [told(f, bytes(f.length), total=HUGE, offset=9)]),
    "more than was asked for": on_file(1, lambda f: [told(f, bytes(f.length + 1), total=HUGE)]),
    "two megabytes": on_file(0, lambda f: [told(f, bytes(2 * MAX_PIECE), total=2 * MAX_PIECE)]),
    "less, and not at the end": on_file(0, lambda f: [told(f, b"{", total=LARGEST_PLAN)]),
    "a plan without end": on_file(0, lambda f: [told(f, bytes(f.length), total=HUGE)]),
    "an answer to nothing": on_file(1, lambda f: [told(f, b"x", total=9, step=99)]),
    "floats": on_file(1, lambda f: [[
        msgspec.msgpack.encode(Piece(session=f.session, step=f.step, file=1, offset=0, total=4, tensors=(
            TensorSpec(name="piece", dtype="float32", shape=(1,)),))), bytes(4)]]),
    "gigabytes that are not there": on_file(1, lambda f: [[
        msgspec.msgpack.encode(Piece(session=f.session, step=f.step, file=1, offset=0, total=HUGE, tensors=(
            TensorSpec(name="piece", dtype="uint8", shape=(HUGE,)),))), bytes(4)]]),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_what_cannot_be_is_not_taken(tiny_llama, emulator, tmp_path, name):
    with fetching(tiny_llama, tmp_path, files_of(emulator), LIES[name]) as (_, fetch), pytest.raises(WireError):
        fetch()
    assert left(tmp_path) == []


def test_another_size_in_the_middle_is_seen(tiny_llama, emulator, tmp_path):
    files = files_of(emulator)
    bigger = on_file(1, lambda f: [told(f, files[1][: f.length], total=len(files[1]) + 7)], length=1)
    with (
        fetching(tiny_llama, tmp_path, files, bigger) as (_, fetch),
        pytest.raises(WireError, match="said"),
    ):
        fetch()
    assert [name for name in left(tmp_path) if name.endswith(".safetensors")] == []


def test_bytes_that_the_plan_does_not_name_are_removed(tiny_llama, emulator, tmp_path):
    files = files_of(emulator)
    altered = bytearray(files[1])
    altered[-1] ^= 1
    with fetching(tiny_llama, tmp_path, [files[0], bytes(altered)], honest) as (_, fetch):
        with pytest.raises(WireError, match="it was removed"):
            fetch()
        assert left(tmp_path) == [EMULATOR_FILE + ".part"]


def changed(emulator, **fields):
    plan = msgspec.json.decode((emulator / EMULATOR_FILE).read_bytes())
    return msgspec.json.encode({**plan, **fields})


PLANS = {
    "of another kit": ({"plan": "0" * 32}, "belongs to plan"),
    "of another trunk": ({"trunk": "f" * 32}, "belongs to plan"),
    "of layers that the kit has itself": ({"kept": [0]}, "names layers"),
    "of layers that no model has": ({"kept": [10**9]}, "names layers"),
    "with a path for a name": ({"files": {"../emulator-00000.safetensors": "0" * 64}}, "names files"),
    "with a file of another kind": ({"files": {"model.bin": "0" * 64}}, "names files"),
    "without files": ({"files": {}}, "cannot be read"),
    "with more values than its layers": ({"parameters": 10**12}, "values"),
    "of the future": ({"emulator_version": 99}, "version 99"),
    "with more in it": ({"run": "rm"}, "cannot be read"),
}


@pytest.mark.parametrize("name", PLANS)
def test_no_file_is_asked_for_after_a_plan_that_is_wrong(tiny_llama, emulator, tmp_path, name):
    fields, said = PLANS[name]
    files = [changed(emulator, **fields), *files_of(emulator)[1:]]
    with fetching(tiny_llama, tmp_path, files, honest) as (liar, fetch), pytest.raises(ModelError, match=said):
        fetch()
    assert {asked.file for asked in liar.asked} == {0}
    assert left(tmp_path) == []


def test_a_plan_that_is_no_plan(tiny_llama, emulator, tmp_path):
    with (
        fetching(tiny_llama, tmp_path, [b"\x80\x04 pickled", b""], honest) as (_, fetch),
        pytest.raises(ModelError, match="cannot be read"),
    ):
        fetch()


# ---- a greedy party


@pytest.fixture(scope="module")
def giver(tiny_llama, emulator, tmp_path_factory):
    """An owner that hands the emulator out."""
    with serve(*tiny_llama, tmp_path_factory.mktemp("giver"), options=["--emulator", emulator]) as running:
        yield running


@pytest.fixture
def greedy(giver):
    with attacker(giver) as one:
        one.hello(protocol="guarded-offline")
        assert isinstance(one.answer(), Welcome)
        yield one


def ask(foe, **fields):
    foe.send(pack(type="fetch", session=foe.number, **{"step": 1, "file": 1, "offset": 0, "length": 8, **fields}))


REFUSED = {
    "a length of exabytes": ({"length": HUGE}, "too_large"),
    "a length beyond 64 bits": ({"length": 2**63}, "malformed"),
    "one byte more than there may be": ({"length": MAX_PIECE + 1}, "too_large"),
    "no byte": ({"length": 0}, "malformed"),
    "a negative length": ({"length": -1}, "malformed"),
    "a negative offset": ({"offset": -8}, "malformed"),
    "an offset behind the end": ({"offset": HUGE}, "unknown_piece"),
    "a file that is not there": ({"file": 2}, "unknown_piece"),
    "a file of exabytes": ({"file": HUGE}, "unknown_piece"),
    "a name": ({"file": "emulator.json"}, "malformed"),
    "a path": ({"path": "../kit/config.json"}, "malformed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_handed_out_is_refused(greedy, giver, emulator, name):
    fields, code = REFUSED[name]
    ask(greedy, **fields)
    greedy.refused(code)
    ask(greedy, step=2)
    assert bytes(greedy.result().numpy()) == files_of(emulator)[1][:8]
    assert "Traceback" not in giver.running.stderr.text


def test_the_first_byte_behind_the_end_is_not_there(greedy, emulator):
    whole = files_of(emulator)[1]
    ask(greedy, offset=len(whole) - 3)
    assert bytes(greedy.result().numpy()) == whole[-3:]
    ask(greedy, step=2, offset=len(whole))
    assert str(len(whole) - 1) in greedy.refused("unknown_piece").expected


def test_a_flood_of_fetches_is_answered_or_refused(greedy, emulator):
    count, came = 200, []
    for step in range(1, count + 1):
        ask(greedy, step=step)
        if step > QUEUE // 2:  # beyond what its link may hold, an owner drops what a peer does not read
            came.append(greedy.answer())
    came += [greedy.answer() for _ in range(count - len(came))]
    codes = {each.code for each in came if isinstance(each, Refused)}
    assert codes <= {"too_large"}
    assert sum(isinstance(each, Piece) for each in came) >= MAX_FETCHES
    ask(greedy, step=count + 1)
    assert bytes(greedy.result().numpy()) == files_of(emulator)[1][:8]


def test_other_protocols_get_nothing(giver, owner):
    with attacker(giver) as foe:
        foe.opened()  # protocol split
        ask(foe)
        foe.refused("not_disclosed")
    with attacker(owner) as foe:  # one that hands nothing out
        foe.hello(protocol="guarded-offline")
        assert isinstance(foe.answer(), Welcome)
        ask(foe)
        assert "--emulator" in foe.refused("unknown_piece").hint
        foe.forward(2, torch.zeros(1, 1, foe.plan.width))
        foe.refused("not_disclosed")


def test_our_own_party_does_not_even_ask_under_another_protocol(giver):
    with contextlib.closing(giver.session(PARTIES[0])) as session:
        sent = session.bytes_sent
        with pytest.raises(WireError) as caught:
            next(session.fetch([(0, 0, 8)]))
        assert caught.value.code == "not_disclosed"
        assert session.bytes_sent == sent


@pytest.mark.slow
def test_a_file_cut_short_at_the_owner_is_told(tiny_llama, tmp_path):
    kit = open_kit(tiny_llama[1])
    kept = uniform_layers(kit.plan.trunk_layers, 1)
    write_emulator(whole_model(tiny_llama[0]), kit, tmp_path / "emulator", kept=kept, chosen_by="uniform")
    [file] = (tmp_path / "emulator").glob("*.safetensors")
    before = file_hash(file)
    with serve(*tiny_llama, tmp_path, options=["--emulator", tmp_path / "emulator"]) as owner:
        with file.open("r+b") as opened:
            opened.truncate(100)
        assert file_hash(file) != before
        session = open_session(
            kit.plan, owner.address, owner_key=owner.keys / "owner.key", key=owner.keys / f"{PARTIES[0]}.key_secret",
            protocol="guarded-offline",
        )  # fmt: skip
        with contextlib.closing(session), pytest.raises(RefusedError, match="altered at the owner") as caught:
            fetch_emulator(session, kit, tmp_path / "got")
        assert caught.value.code == "internal"
