"""Coded frames at a live owner: honest ones are computed with bit by bit, hostile ones are refused or computed with.

What the owner makes of a payload is compared with the same trunk in this process, given the numbers that the payload
stands for; an honest party on uncoded frames works all the time, and its answers are compared as well.
"""

from __future__ import annotations

import logging
import math
import random
import struct
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model_owner.trunk import LocalLink, Trunk
from splitfl.errors import RefusedError, WireError
from splitfl.link import TrunkRequest
from splitfl.wire import frames as wire
from splitfl.wire.codecs import TORCH_DTYPES
from splitfl.wire.coding import CODINGS, Coded, coded_bytes, encode_grid16, encode_int4, encode_int8, encode_topk
from splitfl.wire.messages import BackwardDone, ForwardDone, Refused, Welcome
from tests.hostile.attacker import Attacker, new_number, pack
from tests.hostile.conftest import MARKER
from tests.hostile.honest import Honest
from tests.live.owner import PARTIES
from tests.model_owner.serving import Serving, raw, serving

STEP = 2.0**-8
KEPT = 8
ENCODERS: dict[str, Callable[[torch.Tensor], Coded]] = {
    "grid16": lambda x: encode_grid16(torch.round(x / STEP).to(torch.int32), STEP),
    "int8": encode_int8,
    "int4": encode_int4,
    "topk": lambda x: encode_topk(x, KEPT),
}
NAMES = sorted(ENCODERS)
assert set(NAMES) == CODINGS


@pytest.fixture(scope="module")
def here(trunk: Trunk, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """An owner on a thread of this process."""
    with serving(trunk, tmp_path_factory.mktemp("here")) as running:
        yield running


@pytest.fixture(scope="module")
def neighbour(here: Serving) -> Iterator[Honest]:
    """A party that keeps to the rules; idle."""
    with closing(here.session(PARTIES[0])) as session:
        yield Honest(session, here.trunk)


@pytest.fixture
def watched(here: Serving, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """The owner met no error of its own while the test ran, and wrote no value down."""
    caplog.set_level(logging.DEBUG)
    yield
    records = [*caplog.get_records("setup"), *caplog.get_records("call")]
    assert [r.getMessage() for r in records if r.levelno >= logging.ERROR or r.exc_info] == []
    assert any(r.name.startswith("splitfl.owner") for r in records), "the owner's log is not watched"
    assert not any(str(MARKER)[:6] in r.getMessage() for r in records)
    assert here.do(lambda: here.server.counters.refusals.get("internal", 0)) == 0


@pytest.fixture
def foe(here: Serving, neighbour: Honest, tiny_llama: tuple[Path, Path], watched: None) -> Iterator[Attacker]:
    """An admitted party that sends what it likes, while the other one works."""
    with neighbour.working(), raw(here, tiny_llama, PARTIES[1]) as one:
        yield one


def opened(foe: Attacker, name: str) -> Attacker:
    """`foe` in a session that codes its frames as `name`."""
    foe.number = new_number()
    foe.hello(hidden_coding=name, gradient_coding=name)
    assert isinstance(foe.answer(), Welcome)
    return foe


def numbers_of(foe: Attacker, seed: int = 6, shape: tuple[int, int] = (2, 3)) -> torch.Tensor:
    return torch.randn(*shape, foe.plan.width, generator=torch.Generator().manual_seed(seed))


def altered(coded: Coded, at: int, part: bytes) -> Coded:
    payload = coded.payload.clone()
    payload[at : at + len(part)] = torch.tensor(list(part), dtype=torch.uint8)
    return replace(coded, payload=payload)


def filled(coded: Coded, byte: int) -> Coded:
    return replace(coded, payload=torch.full_like(coded.payload, byte))


def checked(value: torch.Tensor) -> torch.Tensor | str:
    return value if bool(torch.isfinite(value).all()) else "not_finite"


def expected(trunk: Trunk, hidden: Coded, gradient: Coded | None = None) -> tuple[torch.Tensor | str, ...]:
    """What a forward with `hidden`, and a backward with `gradient`, have to be answered with: a tensor or a code."""
    answers: list[torch.Tensor | str] = []
    link, step = LocalLink(trunk), 0
    for coded in (hidden, gradient):
        if coded is None:
            continue
        try:
            given = checked(coded.decode())
        except WireError:
            given = "malformed"
        if isinstance(given, torch.Tensor):
            if not answers:
                output, step = link.forward(TrunkRequest(hidden=given, keep=gradient is not None))
                given = checked(output)
            else:
                given = checked(link.backward(step, given))
        answers.append(given)
        if isinstance(given, str):
            break
    return tuple(answers)


def assert_answered(foe: Attacker, step: int, wanted: torch.Tensor | str) -> None:
    if isinstance(wanted, str):
        assert foe.refused(wanted).step == step
    else:
        assert torch.equal(foe.result(), wanted)


# ---- honest


def cached(link, sent: list[Coded]) -> list[torch.Tensor]:
    """Five positions, then one more of rows that change places, through one cache."""
    (first, _), (second, _) = (
        link.forward(TrunkRequest(hidden=coded, cache=1, past=past, rows=rows))
        for coded, past, rows in zip(sent, (0, 5), (None, (1, 0)), strict=True)
    )
    link.release(caches=(1,))
    return [first, second]


@pytest.mark.parametrize("wire_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("memory", ["keep", "recompute"])
@pytest.mark.parametrize(("up", "down"), [*((name, name) for name in NAMES), ("grid16", "int8"), ("raw", "int4")])
def test_a_step_equals_one_in_this_process_on_the_decoded_numbers(here, watched, up, down, memory, wire_dtype):
    width, dtype = here.trunk.plan.width, TORCH_DTYPES[wire_dtype]
    generator = torch.Generator().manual_seed(7)
    x, gradient, more = (torch.randn(2, length, width, generator=generator).to(dtype).float() for length in (5, 5, 1))
    mask = torch.ones(2, 5, dtype=torch.uint8)
    mask[0, :2] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0).to(torch.int32)
    sent = ENCODERS[up](x) if up != "raw" else x
    returned = ENCODERS[down](gradient)
    tapped = []
    local = LocalLink(here.trunk, recompute=memory == "recompute")
    terms = {"memory": memory, "wire_dtype": wire_dtype, "hidden_coding": up, "gradient_coding": down}
    with closing(here.session(**terms, tap=lambda way, frames: tapped.append((way, [*map(bytes, frames)])))) as session:
        output, step = session.forward(TrunkRequest(hidden=sent, mask=mask, positions=positions, keep=True))
        back = session.backward(step, returned)
        plain = sent.decode() if isinstance(sent, Coded) else x
        wanted, there = local.forward(TrunkRequest(hidden=plain, mask=mask, positions=positions, keep=True))
        assert output.dtype == back.dtype == dtype
        assert torch.equal(output, wanted.to(dtype))
        assert torch.equal(back, local.backward(there, returned.decode()).to(dtype))
        if up != "raw":
            exact, _ = local.forward(TrunkRequest(hidden=x, mask=mask, positions=positions))
            assert not torch.equal(wanted, exact)  # the codes cost something, or the comparison would say nothing
            generation = [sent, ENCODERS[up](more)]
            for came, other in zip(cached(session, generation), cached(local, generation), strict=True):
                assert torch.equal(came, other.to(dtype))
    payloads = {frames[1] for way, frames in tapped if way == "sent" and len(frames) > 1}
    assert bytes(returned.payload.tolist()) in payloads
    assert up == "raw" or bytes(sent.payload.tolist()) in payloads


@pytest.mark.parametrize("name", NAMES)
def test_a_party_that_forgets_its_coding_is_told_and_can_go_on(here, watched, name):
    x = torch.randn(2, 3, here.trunk.plan.width, generator=torch.Generator().manual_seed(8))
    coded = ENCODERS[name](x)
    with closing(here.session(hidden_coding=name, gradient_coding="raw")) as session:
        for wrong in (x, *(ENCODERS[other](x) for other in NAMES if other != name)):
            with pytest.raises(RefusedError) as caught:
                session.forward(TrunkRequest(hidden=wrong))
            assert caught.value.code == "malformed"
        output, step = session.forward(TrunkRequest(hidden=coded, keep=True))
        with pytest.raises(RefusedError):
            session.backward(step, coded)  # gradients are raw here
        assert torch.equal(output, LocalLink(here.trunk).forward(TrunkRequest(hidden=coded))[0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("answer", ["hidden", "gradient"])
def test_an_owner_that_codes_its_answer_is_not_believed(here, watched, monkeypatch, name, answer):
    """Though the party's own frames are coded just so."""
    honest = here.answerer._reply

    def lying(held, message, tensor, result):
        if tensor != answer:
            return honest(held, message, tensor, result)
        return wire.encode(message, {tensor: ENCODERS[name](result)}, held.limits.wire_dtype)

    monkeypatch.setattr(here.answerer, "_reply", lying)
    coded = ENCODERS[name](torch.randn(1, 2, here.trunk.plan.width, generator=torch.Generator().manual_seed(9)))
    with closing(here.session(hidden_coding=name, gradient_coding=name)) as session:
        if answer == "hidden":
            with pytest.raises(WireError, match="coded as"):
                session.forward(TrunkRequest(hidden=coded))
        else:
            _, step = session.forward(TrunkRequest(hidden=coded, keep=True))
            with pytest.raises(WireError, match="coded as"):
                session.backward(step, coded)


# ---- hostile


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["int8", "int4", "topk"])
def test_scales_and_values_that_are_not_finite_are_refused(foe, trunk, name, value):
    """One of six tokens, forward and backward; the step can then still be used."""
    good = ENCODERS[name](numbers_of(foe))
    at, part = (4 * 4, struct.pack("<f", value)) if name != "topk" else (6 * KEPT * 2 + 6, struct.pack("<e", value))
    bad = altered(good, at, part)
    opened(foe, name).forward(1, bad, keep=True)
    refused = foe.refused("not_finite")
    assert refused.step == 1
    assert "hidden state" in refused.problem  # what came, and not what would have come of it
    foe.forward(2, good, keep=True)
    output, back = expected(trunk, good, good)
    assert_answered(foe, 2, output)
    foe.backward(2, bad)
    refused = foe.refused("not_finite")
    assert refused.step == 2
    assert "gradient" in refused.problem
    foe.backward(2, good)
    assert_answered(foe, 2, back)


@pytest.mark.parametrize("column", [32, 33, 0x8080, 0xFFFF])
def test_a_column_beyond_the_width_is_refused(foe, trunk, column):
    good = ENCODERS["topk"](numbers_of(foe))
    assert good.shape[-1] == 32
    for place in (0, 3 * KEPT, 6 * KEPT - 1):
        bad = altered(good, 2 * place, struct.pack("<H", column))
        opened(foe, "topk").forward(1, bad)
        refused = foe.refused("malformed")
        assert (refused.step, refused.expected) == (1, "below 32")
        foe.forward(2, good, keep=True)
        output, back = expected(trunk, good, good)
        assert_answered(foe, 2, output)
        foe.backward(2, bad)
        assert foe.refused("malformed").step == 2
        foe.backward(2, good)
        assert_answered(foe, 2, back)
        foe.leave([foe.number])


@pytest.mark.parametrize("name", NAMES)
def test_a_column_named_twice_and_codes_that_no_encoder_writes_are_answered(foe, trunk, name):
    """-128, a nibble of 0, a negative scale, all columns the same: strange, and finite."""
    bad = filled(ENCODERS[name](numbers_of(foe)), 0)
    if name in ("int8", "int4"):
        bad = filled(bad, {"int8": 0x80, "int4": 0x0F}[name])
        for token in range(6):
            bad = altered(bad, 4 * token, struct.pack("<f", -0.5))
    elif name == "topk":
        bad = altered(bad, 2 * 6 * KEPT, struct.pack(f"<{6 * KEPT}e", *range(6 * KEPT)))
    wanted = expected(trunk, bad, bad)
    assert all(isinstance(each, torch.Tensor) for each in wanted)
    opened(foe, name).forward(1, bad, keep=True)
    assert_answered(foe, 1, wanted[0])
    foe.backward(1, bad)
    assert_answered(foe, 1, wanted[1])


@pytest.mark.parametrize("byte", [0x00, 0x01, 0x7F, 0x80, 0xFF])
@pytest.mark.parametrize("name", NAMES)
def test_frames_of_one_byte_all_over_are_refused_or_answered_as_they_read(foe, trunk, name, byte):
    frame = filled(ENCODERS[name](numbers_of(foe)), byte)
    (wanted,) = expected(trunk, frame)
    opened(foe, name).forward(1, frame)
    assert_answered(foe, 1, wanted)
    if (name, byte) in {("topk", 0x80), ("topk", 0x7F), ("topk", 0xFF)}:
        assert wanted == "malformed"
    if (name, byte) in {("int8", 0xFF), ("int4", 0xFF)}:
        assert wanted == "not_finite"


@pytest.mark.parametrize("name", NAMES)
def test_random_payloads_are_refused_or_answered_as_they_read(foe, trunk, name):
    """Bytes at random, and sound frames with some bytes changed; every fourth is kept and has such a gradient."""
    drawn = random.Random(f"payloads {name}")
    opened(foe, name)
    seen = set()
    for step in range(60):
        sound = [ENCODERS[name](numbers_of(foe, 2 * step + n, (1 + step % 2, 1 + step % 3))) for n in range(2)]
        if name == "grid16":
            sound = [replace(each, step=2.0 ** drawn.randint(-60, 60)) for each in sound]
        tried = []
        for each in sound:
            size = each.payload.numel()
            if drawn.random() < 0.5:
                tried.append(altered(each, 0, drawn.randbytes(size)))
            else:
                for _ in range(drawn.randint(0, 4)):
                    each = altered(each, drawn.randrange(size), drawn.randbytes(1))
                tried.append(each)
        hidden, gradient = tried
        wanted = expected(trunk, hidden, gradient if step % 4 == 0 else None)
        foe.forward(step, hidden, keep=step % 4 == 0)
        assert_answered(foe, step, wanted[0])
        if len(wanted) == 2:
            foe.backward(step, gradient)
            assert_answered(foe, step, wanted[1])
        seen |= {each if isinstance(each, str) else "answered" for each in wanted}
    assert "answered" in seen
    assert name == "grid16" or seen & {"malformed", "not_finite"}


WRONG = {
    "another coding": {"coding": "raw"},
    "a coding that does not exist": {"coding": "pickle"},
    "a step of NaN": {"step": math.nan},
    "an infinite step": {"step": math.inf},
    "a negative step": {"step": -1.0},
    "a step that is no power of two": {"step": 3.0},
    "a huge step": {"step": 1e300},
    "kept of 64 bits": {"kept": 2**64 - 1},
    "more kept than there are": {"kept": 33},
    "a negative number kept": {"kept": -8},
    "a field that does not exist": {"codebook": [1, 2]},
    "another width": {"shape": [2, 3, 31]},
    "a product that overflows": {"shape": [2**62, 4, 32]},
}


@pytest.mark.parametrize("name", NAMES)
def test_a_header_that_lies_is_refused_and_the_session_goes_on(foe, trunk, name):
    good = ENCODERS[name](numbers_of(foe))
    size = good.payload.numel()
    opened(foe, name)
    spec = {"name": "hidden", "dtype": "float32", "shape": [2, 3, 32], "coding": name} | {
        "step": good.step,
        "kept": good.kept,
    }
    assert coded_bytes(name, (2, 3, 32), good.kept) == size
    for what, fields in WRONG.items():
        foe.send(pack(type="forward", session=foe.number, step=1, tensors=[spec | fields]), bytes(size))
        refused = foe.answer()
        assert isinstance(refused, Refused), what
        assert refused.code == ("too_large" if what == "a product that overflows" else "malformed"), (what, refused)
    for length in (0, size - 1, size + 1):
        foe.send(pack(type="forward", session=foe.number, step=1, tensors=[spec]), bytes(length))
        foe.refused("malformed")
    foe.forward(1, good)
    assert_answered(foe, 1, expected(trunk, good)[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_hello_with_other_codings_changes_nothing(foe, trunk, name):
    good = ENCODERS[name](numbers_of(foe))
    opened(foe, name)
    for other in {*NAMES, "raw"} - {name}:
        foe.hello(hidden_coding=other, gradient_coding=name)
        foe.refused("out_of_order")
        foe.hello(hidden_coding=name, gradient_coding=other)
        foe.refused("out_of_order")
    foe.hello()
    foe.refused("out_of_order")
    foe.hello(hidden_coding=name, gradient_coding=name)
    assert isinstance(foe.answer(), Welcome)
    foe.forward(1, good)
    assert_answered(foe, 1, expected(trunk, good)[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_party_cannot_send_what_the_owner_says(foe, name):
    coded = ENCODERS[name](numbers_of(foe))
    opened(foe, name)
    foe.say(ForwardDone(session=foe.number, step=1), hidden=coded)
    foe.say(BackwardDone(session=foe.number, step=1), gradient=coded)
    for _ in range(2):
        foe.refused("malformed")


def test_coded_values_are_in_no_log(foe):
    """`watched` looks for the marker, which the scale of every token holds."""
    good = encode_int8(torch.full((2, 3, foe.plan.width), 127 * MARKER))
    assert str(float(good.payload[:4].view(torch.float32)))[:6] == str(MARKER)[:6]
    opened(foe, "int8").forward(1, good)
    foe.result()
    foe.forward(2, altered(good, 4, struct.pack("<f", math.nan)))
    foe.refused("not_finite")
