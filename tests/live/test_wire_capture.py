"""What really crosses: all frames of whole commands before encryption, and the raw bytes of the TCP stream.

The owner of this file serves without encryption, so that the stream can be read, and its model directory is gone: once
it is ready, the trunk's files are moved away from where a party could find them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from party.model import open_model
from protocols import SPLIT
from splitfl.kit import open_kit
from splitfl.wire.messages import BYTES_PER_ELEMENT
from tests.live.child import splitfl_here
from tests.live.models import Rows, make_kit, read_jsonl, save_tiny, tokenizer_of
from tests.live.owner import serve
from tests.live.recording import Recording, recorded_commands
from tests.live.relay import relay
from tests.live.runs import adapter_in, write_config
from tests.live.search import found_in, windows

pytestmark = pytest.mark.slow
PROMPT = "Agnes carried forty-two crates"
DIRECTIONS = {"sent": "party to owner", "received": "owner to party"}
COMMON = {"type", "session", "tensors"}
FIELDS = {
    "hello": COMMON
    | {"version", "protocol", "trunk", "plan", "wire_dtype", "memory", "hidden_coding", "gradient_coding"},
    "forward": COMMON | {"step", "keep", "cache", "past", "rows"},
    "backward": COMMON | {"step"},
    "release": COMMON | {"caches", "steps"},
    "bye": COMMON,
    "welcome": COMMON | {"version", "max_tokens", "max_length", "memory", "lease_s", "server", "compute"},
    "forward_done": COMMON | {"step"},
    "backward_done": COMMON | {"step"},
    "closed": COMMON,
}
TENSORS = {
    "forward": {"hidden", "mask", "positions"},
    "backward": {"gradient"},
    "forward_done": {"hidden"},
    "backward_done": {"gradient"},
}
WORDS = (b"tensors", b"hidden", b"gradient", b"forward_done", b"float32", SPLIT.name.encode())


@dataclass(frozen=True)
class Captured:
    """One run of tune, then generate: its frames, and its TCP stream."""

    frames: Recording
    stream: bytes
    run: Path


@pytest.fixture(scope="module")
def open_owner(tmp_path_factory):
    """An owner on an unencrypted loopback channel whose model directory nobody can reach any more."""
    folder = tmp_path_factory.mktemp("open")
    model_dir = save_tiny("llama", folder / "model")
    kit_dir = make_kit(model_dir, folder / "kit")
    with serve(model_dir, kit_dir, folder, insecure_loopback=True) as running:
        model_dir.rename(tmp_path_factory.mktemp("away") / "model")
        yield running


@pytest.fixture(scope="module")
def captured(open_owner, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("captured")
    config = write_config(folder / "tune.toml", rows)
    with relay(open_owner.address) as line, recorded_commands() as recording:
        splitfl_here("tune", *open_owner.link(address=line.address), "--config", config, "--out", folder / "run")
        splitfl_here("generate", "--run", folder / "run", "--prompt", PROMPT, "--max-new-tokens", "8")
        stream = bytes(line.up) + bytes(line.down)
    return Captured(recording, stream, folder / "run")


@pytest.fixture(scope="module")
def secrets(open_owner, rows):
    """Runs of token ids of every row, and of masked labels; none of them may cross."""
    tokenizer = tokenizer_of(open_owner.kit_dir)
    return windows(private_ids(tokenizer, rows)) | {(-100, -100, -100, -100)}


def private_ids(tokenizer, rows: Rows):
    texts = [PROMPT]
    for path in (rows.train, rows.held_out):
        for row in read_jsonl(path):
            texts += [row["prompt"], row["completion"], row["prompt"] + row["completion"]]
    return tokenizer(texts)["input_ids"]


def private_words(rows: Rows):
    """Pieces of the rows' text: whoever sends sixteen characters in a row sends one of them."""
    texts = [text for path in (rows.train, rows.held_out) for row in read_jsonl(path) for text in row.values()]
    return {text[at : at + 8].encode() for text in texts for at in range(0, len(text) - 7, 8)}


def test_every_message_is_in_the_disclosure(captured):
    for each in captured.frames.messages:
        names = tuple(spec.name for spec in each.message.tensors)
        assert SPLIT.disclosure.allows(each.kind, names, DIRECTIONS[each.way])
        assert set(names) <= TENSORS.get(each.kind, set())
        assert len(each.frames) == 1 + len(names)
    counted = Counter(each.kind for each in captured.frames.messages)
    assert counted.keys() | {"release"} == FIELDS.keys()
    assert counted["backward"] == counted["backward_done"] == 24
    assert counted["forward"] == counted["forward_done"] > counted["backward"]


def test_every_header_holds_the_known_fields_and_no_more(captured):
    for each in captured.frames.messages:
        assert set(each.fields) == FIELDS[each.kind]
        for spec in each.fields["tensors"]:
            assert set(spec) == {"name", "dtype", "shape"}  # nothing is coded in this run
        # What could carry a row in disguise: texts and numbers of a header. All are accounted for.
        texts = {value for name, value in each.fields.items() if isinstance(value, str) and name != "type"}
        assert not texts or each.kind in ("hello", "welcome")
    forwards = [each.message for each in captured.frames.of("forward")]
    assert {message.rows for message in forwards} == {None}
    assert {message.cache for message in forwards} == {None, 1}
    trained = [message.step for message in forwards if message.cache is None]
    assert trained == list(range(1, len(trained) + 1))
    assert [message.past for message in forwards if message.cache == 1][1:] == list(
        range(forwards[len(trained)].tensors[0].shape[1], forwards[len(trained)].tensors[0].shape[1] + 7)
    )


def test_integers_are_masks_and_counted_positions_only(captured):
    seen = Counter()
    for each in captured.frames.messages:
        for name, tensor in each.tensors.items():
            seen[name] += 1
            if name == "mask":  # one block of ones a row: its length, and nothing else
                assert tensor.dtype == torch.uint8
                assert set(tensor.unique().tolist()) <= {0, 1}
                assert (tensor[:, 1:] <= tensor[:, :-1]).all()
            elif name == "positions":
                assert tensor.dtype == torch.int32
                assert (tensor.diff(dim=1) == 1).all()
                assert (tensor[:, 0] == each.message.past).all()
            else:
                assert tensor.dtype == torch.float32
    assert seen["mask"] > 0
    assert seen["positions"] > 0


def test_no_token_id_no_label_and_no_word_crosses(captured, secrets, rows):
    for haystack in (captured.frames.raw, captured.stream):
        assert found_in(haystack, secrets) == set()
        assert [word for word in private_words(rows) if word in haystack] == []


def test_the_search_does_find_what_crosses(captured, secrets, rows, open_owner):
    """Token ids in the place of positions do cross, and are found in frames and stream: the search is no formality."""
    kit = open_kit(open_owner.kit_dir)
    ids = torch.tensor([private_ids(kit.tokenizer(), rows)[0]])
    recording = Recording()
    with relay(open_owner.address) as line:
        session = open_owner.session(address=line.address, tap=recording.tap)
        with torch.no_grad():
            open_model(kit, session)(input_ids=ids, position_ids=ids % 128)
        session.close()
        needles = windows((ids % 128).tolist())
        assert found_in(recording.raw, needles) == needles
        assert found_in(line.up, needles) == needles
    planted = b"x" + ids.numpy().astype("<i8").tobytes()
    assert found_in(captured.stream[:1001] + planted, secrets) >= windows(ids.tolist())
    assert any(word in captured.stream + rows.train.read_bytes() for word in private_words(rows))


def test_the_stream_is_the_frames(captured):
    """The recording misses nothing: frames, their framing and the handshake are all of the stream."""
    sizes = sum(len(frame) for each in captured.frames.messages for frame in each.frames)
    frames = sum(len(each.frames) for each in captured.frames.messages)
    for each in captured.frames.messages:
        for frame in each.frames:
            assert frame in captured.stream
    assert sizes < len(captured.stream) < sizes + 9 * frames + 4096


def test_an_encrypted_stream_shows_none_of_it(captured, owner, rows):
    assert all(word in captured.stream for word in WORDS)
    recording = Recording()
    kit = open_kit(owner.kit_dir)
    ids = kit.tokenizer()([PROMPT], return_tensors="pt")["input_ids"]
    with relay(owner.address) as line:
        session = owner.session(address=line.address, tap=recording.tap)
        with torch.no_grad():
            open_model(kit, session)(input_ids=ids, labels=ids)
        session.close()
        stream = bytes(line.up) + bytes(line.down)
    assert len(stream) > len(recording.raw)
    assert [word for word in WORDS if word in stream] == []
    for each in recording.messages:
        for frame in each.frames:
            assert frame[:24] not in stream
            assert frame[-24:] not in stream


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_training_step_moves_four_tensors_and_next_to_nothing_else(open_owner, dtype):
    rows, length = 8, 128
    recording = Recording()
    kit = open_kit(open_owner.kit_dir)
    with relay(open_owner.address) as line:
        session = open_owner.session(address=line.address, wire_dtype=dtype, tap=recording.tap)
        model = open_model(kit, session).train()
        model.get_input_embeddings().weight.requires_grad_(True)
        ids = torch.randint(3, 400, (rows, length), generator=torch.Generator().manual_seed(0))
        greeted = len(recording.messages)
        streamed = len(line.up) + len(line.down)
        model(input_ids=ids, labels=ids).loss.backward()
        step = recording.messages[greeted:]
        streamed = len(line.up) + len(line.down) - streamed
        session.close()
    assert [each.kind for each in step] == ["forward", "forward_done", "backward", "backward_done"]
    assert {spec.dtype for each in step for spec in each.message.tensors} == {dtype}
    expected = 4 * rows * length * kit.plan.width * BYTES_PER_ELEMENT[dtype]
    assert sum(len(frame) for each in step for frame in each.frames[1:]) == expected
    assert sum(len(each.frames[0]) for each in step) < 0.01 * expected
    assert expected < streamed < 1.01 * expected


def test_a_party_needs_no_trunk_file(open_owner, captured):
    """The run above was made while the model directory was gone."""
    assert not open_owner.model_dir.exists()
    assert len(adapter_in(captured.run)) > 0
