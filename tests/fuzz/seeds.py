"""Sound inputs for every target, to begin from; made anew each time, so that they follow the code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import torch
from safetensors.numpy import save

from splitfl.aggregation.logits import Knowledge, LogitLayout, pack_knowledge, pack_upload
from splitfl.aggregation.mask_blobs import Layout, Reveal, Trailer
from splitfl.aggregation.plain import PlainSealer
from splitfl.aggregation.sealed import SIGNATURE, seal_for
from splitfl.aggregation.shamir import split
from splitfl.audit.recording import About, Crossed
from splitfl.cut import Plan
from splitfl.emulator import EmulatorPlan
from splitfl.wire import frames as wire
from splitfl.wire import mesh_messages as mesh
from splitfl.wire import round_frames as rounds
from splitfl.wire.coding import encode_grid16, encode_int4, encode_int8, encode_topk
from splitfl.wire.messages import Backward, Forward
from tests.fedmod.test_messages import ASKS, HAVE, REPLIES
from tests.fuzz.packing import pack, unpack
from tests.fuzz.targets import DENSE, LOGITS, TARGETS, pairs, terms
from tests.wire import samples
from tests.wire.test_round_messages import FROM_COORDINATOR, FROM_PARTY, PIECE, PUT

CORPUS = Path(__file__).parent / "corpus"


def seeds() -> list[bytes]:
    """One input for each kind of message, blob and file."""
    numbers = {target.name: number for number, target in enumerate(TARGETS)}
    return [pack(numbers[name], [bytes(frame) for frame in frames]) for name, frames in _sound()]


def kept() -> list[bytes]:
    """What a guided run found worth keeping, those that once failed among it."""
    return [path.read_bytes() for path in sorted(CORPUS.glob("*.bin"))]


def of_target(number: int) -> list[bytes]:
    """All inputs of one target."""
    return [data for data in (*seeds(), *kept()) if unpack(data)[0] % len(TARGETS) == number]


def _sound() -> Iterator[tuple[str, list[wire.Frame]]]:
    for message, tensors in samples.FROM_PARTY:
        yield "messages of a party", wire.encode(message, tensors)
        yield "messages of a party", wire.encode(message, tensors, "bfloat16")
    for message, tensors in samples.FROM_OWNER:
        yield "messages of an owner", wire.encode(message, tensors)
    yield from _coded()
    for said in FROM_PARTY:
        yield "rounds, of a party", rounds.encode(said)
    for answer in FROM_COORDINATOR:
        yield "rounds, of a coordinator", rounds.encode(answer)
    yield "rounds, of a party", rounds.encode(PUT, b"xyz")
    yield "rounds, of a coordinator", rounds.encode(PIECE, b"xyz")
    yield "rounds, parts and names", [rounds.pack_parts({"a": b"one", "b": b""})]
    yield "rounds, parts and names", [rounds.pack_names(["a", "b"])]
    for ask in ASKS:
        yield "mesh, questions", mesh.encode(ask)
    for reply in REPLIES:
        yield "mesh, answers", mesh.encode(reply)
    yield "mesh, answers", mesh.encode(HAVE, mesh.frame_of_floats(torch.linspace(-1, 1, 5)))
    sketch = mesh.SketchIs(number=1, rows=9, grid=128, values=5)
    yield "mesh, answers", mesh.encode(sketch, mesh.frame_of_integers(np.arange(5, dtype=np.int32)))
    yield from _of_sums()
    yield from _files()


def _coded() -> Iterator[tuple[str, list[wire.Frame]]]:
    hidden = samples.hidden()
    codes = torch.arange(24, dtype=torch.int32).reshape(2, 3, 4)
    for coded in (encode_grid16(codes, 0.25), encode_int8(hidden), encode_int4(hidden), encode_topk(hidden, 2)):
        forward, backward = Forward(session=77, step=5), Backward(session=77, step=1)
        yield "messages of a party", wire.encode(forward, {"hidden": coded}, "float32")
        yield "messages of a party", wire.encode(backward, {"gradient": coded}, "float32")


def _of_sums() -> Iterator[tuple[str, list[wire.Frame]]]:
    sender, receiver, third = pairs()
    names = terms().parties
    to = [receiver.public.decode(), third.public.decode()]
    yield "sealed blobs", [seal_for(to, b"content", sender, b"fuzz", b"\0" * 32)[:-SIGNATURE]]
    layout = Layout(terms())
    yield "masked sums", [layout.write_trailer(Trailer(*(bytes(32),) * 5, names, names[:2]))]
    shares = dict.fromkeys(names, bytes(33))
    yield "masked sums", [layout.write_reveal(Reveal(names[:2], shares, {names[2]: bytes(32)}), names)]
    yield "masked sums", [layout.write_result(bytes(32), names, np.arange(layout.numbers, dtype=np.uint32))]
    yield "masked sums", list[wire.Frame](split(bytes(range(32)), 3, 2))
    update = PlainSealer(terms()).submit(np.linspace(-1, 1, 6, dtype=np.float32), 2.0, {}, {})
    yield "plain sums", [update]
    yield "plain sums", [update[:-32]]
    for layout_of in (LOGITS, DENSE):
        yield from _of_logits(layout_of)


def _of_logits(layout: LogitLayout) -> Iterator[tuple[str, list[wire.Frame]]]:
    ids = np.tile(np.arange(layout.keep, dtype=np.int64), (layout.positions, 1))
    yield "logits", [pack_upload(layout, ids, np.zeros(ids.shape, dtype=np.uint16), 3.0)]
    counts = np.full(layout.positions, layout.keep, dtype=np.int64)
    values = np.linspace(-1, 0, ids.size)
    known = Knowledge(counts=counts, ids=ids.reshape(-1), log_probabilities=values, parties=2)
    yield "logits", [pack_knowledge(layout, known)]


def _files() -> Iterator[tuple[str, list[wire.Frame]]]:
    plan = Plan(
        model_type="llama", task="causal-lm", layers=6, bottom=2, top=2, stack="layers", returns_tuple=False, width=4,
        dtype="float32", layer_types=("full_attention",) * 6, max_length=128, trunk="ab",
    )  # fmt: skip
    emulator = EmulatorPlan(
        plan="p", trunk="ab", kept=(2, 3), chosen_by="uniform", dtype="float32", parameters=9,
        files={"emulator-00001.safetensors": "ab" * 32},
    )  # fmt: skip
    yield "kit", [msgspec.json.encode(plan)]
    yield "emulator", [msgspec.json.encode(emulator)]
    yield "adapter", [b'{"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "modules_to_save": null}']
    yield "adapter", [save({"a": np.zeros(2, dtype=np.float32)})]
    yield "key files", [f'metadata\n    name = "x"\ncurve\n    public-key = "{pairs()[0].public.decode()}"\n'.encode()]
    about = About(side="party", protocol="split")
    yield "recordings", [msgspec.msgpack.encode(about)]
    crossed = Crossed(way="sent", time=1.0, kind="forward", session=77, step=1, sizes=(4, 8))
    yield "recordings", [msgspec.msgpack.encode(crossed), b"head", b"tensors!"]
