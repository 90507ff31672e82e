"""The emulator over the authenticated session: whole, broken off and resumed, and altered at the owner."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import party.fetch
from party.connect import open_session
from party.rundir import RunDirectory
from splitfl.emulator import EMULATOR_FILE, uniform_layers, write_emulator
from splitfl.errors import INTERRUPTED_EXIT_CODE, ResourceError
from splitfl.kit import open_kit
from splitfl.load import quiet_library
from splitfl.wire.messages import MAX_PIECE
from tests.families import make_config, make_model
from tests.live.child import PATIENCE_S, child, splitfl_here
from tests.live.models import make_kit, whole_model
from tests.live.owner import PARTIES, make_keys, serve
from tests.live.recording import recorded_commands
from tests.live.relay import relay
from tests.live.runs import adapter_in, events, write_config
from tests.small_tokenizers import bpe

pytestmark = pytest.mark.slow
NAME = "guarded-offline"
STEPS = 3


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model whose layers take megabytes, and its kit: an emulator of it is a dozen pieces."""
    folder = tmp_path_factory.mktemp("wide")
    config, tokenizer = make_config("llama"), bpe()
    config.vocab_size, config.intermediate_size, config.num_hidden_layers = len(tokenizer), 10_000, 8
    with quiet_library():
        make_model(config, encoder=False).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
    return folder / "model", make_kit(folder / "model", folder / "kit")


def emulator_of(wide, folder, keep=3, **more):
    kit = open_kit(wide[1])
    kept = uniform_layers(kit.plan.trunk_layers, keep)
    write_emulator(whole_model(wide[0]), kit, folder, kept=kept, chosen_by="uniform", **more)
    return folder


@pytest.fixture(scope="module")
def emulator(wide, tmp_path_factory):
    return emulator_of(wide, tmp_path_factory.mktemp("emulator") / "emulator")


@pytest.fixture(scope="module")
def giver(wide, emulator, tmp_path_factory):
    with serve(*wide, tmp_path_factory.mktemp("giver"), options=["--emulator", emulator]) as running:
        yield running


@pytest.fixture(scope="module")
def config(rows, tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("offline") / "tune.toml", rows, max_steps=STEPS, lora_dropout=0.0)


@pytest.fixture(scope="module")
def upwards(giver, tmp_path_factory):
    """Bytes that a party sends while it fetches all of it."""
    with relay(giver.address) as between:
        splitfl_here("fetch", tmp_path_factory.mktemp("all") / "got", *giver.link(address=between.address))
        return len(between.up)


def same(one, other):
    """Whether two directories hold the same files with the same bytes."""
    names = sorted(each.name for each in one.iterdir())
    return names == sorted(each.name for each in other.iterdir()) and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names
    )


def tune(giver, config, out, *more, address=None):
    link = giver.link(address=address) if giver is not None else []
    return ["tune", *link, "--protocol", NAME, "--config", config, "--out", out, "--ledger", out.parent / "ledger.db",
            *more]  # fmt: skip


def pieces(recording):
    """Bytes of each file in the pieces that came."""
    came = Counter()
    for each in recording.of("piece"):
        came[each.message.file] += len(each.frames[1])
    return came


# ---- whole


def test_what_is_fetched_is_what_the_owner_has(giver, emulator, tmp_path, capsys):
    with recorded_commands() as recording:
        splitfl_here("fetch", tmp_path / "got", *giver.link(), "--json", tmp_path / "out.json")
    assert same(tmp_path / "got", emulator)
    assert "MB/s" in capsys.readouterr().err
    [weights] = emulator.glob("*.safetensors")
    size = weights.stat().st_size
    assert size > 10 * MAX_PIECE
    # One byte of each file comes first, and says how long it is.
    assert pieces(recording) == {0: (emulator / EMULATOR_FILE).stat().st_size, 1: size + 1}
    sent = {each.kind for each in recording.messages if each.way == "sent"}
    assert sent == {"hello", "fetch", "bye"}
    figures = {each["metric"]: each["value"] for each in json.loads((tmp_path / "out.json").read_text())["results"]}
    assert figures["bytes received"] == sum(
        sum(map(len, each.frames)) for each in recording.messages if each.way == "received"
    )
    assert f"{sum(pieces(recording).values())} bytes handed out" in giver.running.stderr.wait_for("bytes handed out")


def test_a_whole_one_is_not_fetched_again(giver, emulator, tmp_path, capsys):
    shutil.copytree(emulator, tmp_path / "got")
    with recorded_commands() as recording:
        splitfl_here("fetch", tmp_path / "got", *giver.link())
    assert recording.messages == []
    assert "is whole; the owner is not needed" in capsys.readouterr().err
    [weights] = (tmp_path / "got").glob("*.safetensors")
    with weights.open("r+b") as file:
        file.write(b"\xff")
    with recorded_commands() as recording:
        splitfl_here("fetch", tmp_path / "got", *giver.link())
    assert same(tmp_path / "got", emulator)
    assert pieces(recording)[1] == weights.stat().st_size + 1


def test_a_run_that_fetches_ends_with_the_adapter_of_one_that_was_given_it(giver, emulator, config, rows, tmp_path):
    with recorded_commands() as recording:
        splitfl_here(*tune(giver, config, tmp_path / "fetched" / "run"))
        splitfl_here(*tune(giver, config, tmp_path / "given" / "run", "--emulator", emulator))
    assert len(recording.of("hello")) == 1, "the second run opened no session"
    run = tmp_path / "fetched" / "run"
    given = adapter_in(tmp_path / "given" / "run")
    assert all(torch.equal(tensor, given[name]) for name, tensor in adapter_in(run).items())
    assert same(run / "emulator", emulator)
    assert RunDirectory(run).settings().emulator == (run / "emulator").absolute()
    [end] = events(run, "end")
    assert end["bytes_received"] > 10 * MAX_PIECE
    crossings = json.loads((run / "disclosure.json").read_text())["crossings"]
    assert {"fetch", "piece"} <= {each["message"] for each in crossings}
    with recorded_commands() as recording:
        splitfl_here("evaluate", "--run", run, "--eval", rows.held_out)
        splitfl_here(*tune(giver, config, run, "--resume", "--max-steps", str(STEPS + 1)))
    assert recording.messages == []


# ---- broken off


def hold_at(upwards):
    """Far enough into the transfer that some pieces were written, and far enough from its end."""
    return round(upwards * 0.75)


def part_of(folder):
    [part] = folder.glob("*.safetensors.part")
    return part


def test_killed_and_resumed_only_what_is_missing_comes(giver, emulator, config, upwards, tmp_path):
    out, whole = tmp_path / "run", next(iter(emulator.glob("*.safetensors"))).stat().st_size
    with (
        relay(giver.address, hold_at=hold_at(upwards)) as between,
        child(["-m", "splitfl", *tune(giver, config, out, address=between.address)], tmp_path) as running,
    ):
        between.wait_until_holding()
        running.process.send_signal(signal.SIGKILL)
        running.wait()
    held = part_of(out / "emulator").stat().st_size
    assert 0 < held < whole
    assert not (out / "emulator" / EMULATOR_FILE).exists()
    assert not (out / "config.toml").exists()
    with recorded_commands() as recording:
        splitfl_here(*tune(giver, config, out, "--resume"))
    assert same(out / "emulator", emulator)
    assert pieces(recording)[1] == whole - held + 1
    assert len(events(out, "train")) == STEPS


@pytest.mark.timeout(400)  # two owners, one after the other
def test_an_owner_that_was_killed_and_started_again_goes_on(wide, emulator, upwards, tmp_path):
    keys, kit = make_keys(tmp_path / "keys"), open_kit(wide[1])
    what = ["--model", wide[0], "--kit", wide[1], "--emulator", emulator]
    what += ["--key", keys / "owner.key_secret", "--parties", keys / "parties", "--bind"]
    with child(["-m", "splitfl", "serve", *what, "tcp://127.0.0.1:0"], tmp_path) as first:
        _, address, _ = first.stdout.wait_for("ready ").split()
        with relay(address, hold_at=hold_at(upwards)) as between, ThreadPoolExecutor(1) as beside:
            fetched = beside.submit(fetch_from, between.address, keys, kit, tmp_path / "got")
            between.wait_until_holding()
            first.process.kill()
            first.wait()
            with child(["-m", "splitfl", "serve", *what, address], tmp_path) as second:
                second.stdout.wait_for("ready ")
                between.release()
                fetched.result(PATIENCE_S)
                assert second.end() == 0
                told = second.stderr.text
    assert same(tmp_path / "got", emulator)
    handed_out = int(told.rpartition(" bytes handed out")[0].rpartition(" ")[2])
    assert 0 < handed_out < sum(each.stat().st_size for each in emulator.iterdir())


def fetch_from(address, keys, kit, folder):
    session = open_session(
        kit.plan, address, owner_key=keys / "owner.key", key=keys / f"{PARTIES[0]}.key_secret", protocol=NAME,
        timeout_s=300.0,
    )  # fmt: skip
    with contextlib.closing(session):
        party.fetch.fetch_emulator(session, kit, folder)


def test_ctrl_c_keeps_what_has_come(giver, emulator, upwards, tmp_path):
    with (
        relay(giver.address, hold_at=hold_at(upwards)) as between,
        child(["-m", "splitfl", "fetch", "got", *giver.link(address=between.address)], tmp_path) as running,
    ):
        between.wait_until_holding()  # so much goes up only once the first pieces are written
        running.process.send_signal(signal.SIGINT)
        assert running.wait() == INTERRUPTED_EXIT_CODE
    assert "is kept" in running.stderr.text
    assert part_of(tmp_path / "got").stat().st_size > 0
    splitfl_here("fetch", tmp_path / "got", *giver.link())
    assert same(tmp_path / "got", emulator)


def test_another_emulator_is_begun_from_its_start(wide, giver, emulator, tmp_path, capsys):
    other, got = emulator_of(wide, tmp_path / "other", keep=2, pruned=0.5), tmp_path / "got"
    got.mkdir()
    (got / f"{EMULATOR_FILE}.part").write_bytes((other / EMULATOR_FILE).read_bytes())
    weights = next(iter(other.glob("*.safetensors"))).read_bytes()
    (got / "emulator-00000.safetensors.part").write_bytes(weights[:MAX_PIECE])
    with recorded_commands() as recording:
        splitfl_here("fetch", got, *giver.link())
    assert "hands out another emulator" in " ".join(capsys.readouterr().err.split())
    assert same(got, emulator)
    assert pieces(recording)[1] == (got / "emulator-00000.safetensors").stat().st_size + 1


# ---- refused


def test_bytes_altered_at_the_owner_are_found_and_removed(wide, tmp_path, capsys):
    held = emulator_of(wide, tmp_path / "held")
    with serve(*wide, tmp_path, options=["--emulator", held]) as owner:
        [weights] = held.glob("*.safetensors")
        with weights.open("r+b") as file:
            file.seek(-9, os.SEEK_END)
            file.write(b"altered!!")
        splitfl_here("fetch", tmp_path / "got", *owner.link(), code=9)
        told = " ".join(capsys.readouterr().err.split())
        assert "it was removed" in told
        assert "altered" in told
        assert [each.name for each in (tmp_path / "got").iterdir()] == [f"{EMULATOR_FILE}.part"]


def test_an_owner_does_not_start_with_an_emulator_that_does_not_fit(wide, tiny_llama, emulator, tmp_path, capsys):
    link = ["--bind", "tcp://127.0.0.1:0", "--insecure-loopback", "--emulator"]
    splitfl_here("serve", "--model", tiny_llama[0], "--kit", tiny_llama[1], *link, emulator, code=4)
    assert "belongs to plan" in capsys.readouterr().err
    start = ["serve", "--model", wide[0], "--kit", wide[1], *link]
    splitfl_here(*start, tmp_path, code=4)
    assert "is no emulator" in capsys.readouterr().err
    copy = shutil.copytree(emulator, tmp_path / "copy")
    [weights] = copy.glob("*.safetensors")
    os.truncate(weights, 1000)
    splitfl_here(*start, copy, code=4)
    assert "cut off or altered" in capsys.readouterr().err


def test_an_owner_without_one_says_so(owner, config, tmp_path, capsys):
    splitfl_here(*tune(owner, config, tmp_path / "run"), code=8)
    told = " ".join(capsys.readouterr().err.split())
    assert "No emulator is handed out here" in told
    assert "serve with --emulator" in told
    assert not (tmp_path / "run").exists()
    link = owner.link(PARTIES[0])
    splitfl_here("fetch", tmp_path / "got", *link, code=8)
    assert not (tmp_path / "got").exists()


def test_places_that_hold_something_else_are_left_alone(giver, wide, emulator, tiny_llama, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    splitfl_here("fetch", tmp_path, *giver.link(), code=4)
    assert "holds something other than an emulator" in " ".join(capsys.readouterr().err.split())
    assert [each.name for each in tmp_path.iterdir()] == ["notes.txt"]
    other = shutil.copytree(emulator, tmp_path / "other")
    plan = json.loads((other / EMULATOR_FILE).read_text())
    (other / EMULATOR_FILE).write_text(json.dumps({**plan, "plan": "0" * 32}), encoding="utf-8")
    splitfl_here("fetch", other, *giver.link(), code=4)
    assert "belongs to plan" in capsys.readouterr().err


def test_no_room_is_seen_before_anything_comes(giver, tmp_path, capsys, monkeypatch):
    small = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(party.fetch.shutil, "disk_usage", lambda _: small)
    splitfl_here("fetch", tmp_path / "got", *giver.link(), code=ResourceError.exit_code)
    assert "1.0 kB free" in " ".join(capsys.readouterr().err.split())
    assert [each.name for each in (tmp_path / "got").iterdir()] == [f"{EMULATOR_FILE}.part"]


def test_settings_are_checked_before_anybody_is_asked(giver, config, tmp_path, capsys):
    with recorded_commands() as recording:
        splitfl_here(*tune(giver, config, tmp_path / "run", "--bias", "all"), code=2)
        splitfl_here(*tune(giver, config, tmp_path / "run", "--resume"), code=2)
    assert recording.messages == []
    assert "holds no run to resume" in capsys.readouterr().err
