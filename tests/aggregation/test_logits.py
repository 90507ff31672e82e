"""Logits on public rows: as bytes, averaged over those that sent an entry, and refused where they are not sound."""

from __future__ import annotations

import dataclasses
import math
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitfl.aggregation import logits
from splitfl.aggregation.logits import (
    LogitLayout,
    Upload,
    check_sum,
    check_upload,
    combine_uploads,
    largest,
    masked_mean,
    pack_knowledge,
    pack_upload,
    positions_of,
    read_knowledge,
    read_upload,
)
from splitfl.aggregation.sums import RoundTerms
from splitfl.errors import UsageError, WireError
from splitfl.rounds.sizes import update_bytes

P, V = 11, 37


def layout_of(keep=V, classes=V, positions=P, temperature=2.0):
    return LogitLayout(positions=positions, classes=classes, keep=keep, temperature=temperature)


def said(layout, seed, weight=1.0, scale=4.0):
    """What a model with random logits says, and the log-probabilities behind it."""
    draw = np.random.default_rng(seed).normal(0, scale, (layout.positions, layout.classes)).astype(np.float32)
    draw -= np.log(np.exp(draw).sum(axis=1, keepdims=True))
    ids, steps = largest(draw, layout)
    return Upload(ids=ids, steps=steps, weight=weight), draw


def terms_of(layout, parties=("a", "b", "c"), max_weight=100.0):
    return RoundTerms(
        federation="0" * 32, round=0, attempt=0, parties=tuple(parties), length=layout.words, clip=1.0,
        max_weight=max_weight, layout=layout.digest,
    )  # fmt: skip


def packed(layout, upload):
    return pack_upload(layout, upload.ids, upload.steps, upload.weight)


# ---- the mean


def test_all_classes_of_all_parties_is_the_dense_mean_to_the_bit():
    layout = layout_of()
    uploads = [said(layout, seed, weight)[0] for seed, weight in ((0, 3.0), (1, 0.7), (2, 11.0))]
    found = masked_mean(layout, uploads)
    total = np.zeros((P, V))
    for upload in uploads:
        total += upload.weight * layout.nats(upload.steps)
    dense = total / sum(upload.weight for upload in uploads)
    assert np.array_equal(found.log_probabilities, dense.reshape(-1))
    assert found.counts.tolist() == [V] * P
    assert found.ids.tolist() == list(range(V)) * P


def test_the_dense_mean_is_the_softmax_of_the_mean_of_the_logits():
    """The published average: what models add to every logit of a position does not count."""
    layout = layout_of()
    uploads, all_ = zip(*(said(layout, seed) for seed in range(3)), strict=True)
    shifted = [draw + 10 * number for number, draw in enumerate(all_)]
    mean = np.mean(shifted, axis=0)
    found = masked_mean(layout, uploads).log_probabilities.reshape(P, V)
    for both in zip(mean, found, strict=True):
        published, ours = (np.exp(row - row.max()) / np.exp(row - row.max()).sum() for row in both)
        np.testing.assert_allclose(ours, published, atol=2e-3)  # two steps of the grid, relative


@settings(max_examples=40, deadline=None)
@given(st.integers(2, V), st.lists(st.floats(0.1, 50), min_size=1, max_size=5), st.integers(0, 1000))
def test_each_entry_is_averaged_over_those_who_sent_it(keep, weights, seed):
    layout = layout_of(keep)
    uploads = [said(layout, seed + number, weight)[0] for number, weight in enumerate(weights)]
    found = masked_mean(layout, uploads)
    for position, where in enumerate(positions_of(found)):
        expected: dict[int, list[tuple[float, float]]] = {}
        for upload in uploads:
            for entry, value in zip(upload.ids[position].tolist(), layout.nats(upload.steps[position]), strict=True):
                expected.setdefault(entry, []).append((upload.weight, float(value)))
        assert found.ids[where].tolist() == sorted(expected)
        for entry, value in zip(found.ids[where].tolist(), found.log_probabilities[where].tolist(), strict=True):
            sent = expected[entry]
            by_hand = math.fsum(w * x for w, x in sent) / math.fsum(w for w, _ in sent)
            assert value == pytest.approx(by_hand, rel=1e-12, abs=1e-12)


def test_an_entry_of_one_party_alone_is_not_diluted_by_the_others():
    layout = layout_of(keep=2, classes=6, positions=1)
    one = Upload(ids=np.array([[0, 1]]), steps=layout.steps(np.array([[-0.1, -3.0]])), weight=1.0)
    two = Upload(ids=np.array([[0, 5]]), steps=layout.steps(np.array([[-0.5, -2.0]])), weight=3.0)
    found = masked_mean(layout, [one, two])
    assert found.ids.tolist() == [0, 1, 5]
    np.testing.assert_allclose(found.log_probabilities, [-0.4, -3.0, -2.0], atol=layout.floor / 65535)


def test_chunks_do_not_change_a_bit(monkeypatch):
    layout = layout_of(keep=5)
    uploads = [said(layout, seed, 1.0 + seed)[0] for seed in range(3)]
    whole = pack_knowledge(layout, masked_mean(layout, uploads))
    monkeypatch.setattr(logits, "_CHUNK", 17)
    assert pack_knowledge(layout, masked_mean(layout, uploads)) == whole


# ---- bytes


@pytest.mark.parametrize(("keep", "classes"), [(2, V), (7, V), (V, V), (3, 70_000)])
def test_uploads_and_knowledge_survive_the_way(keep, classes):
    layout = layout_of(keep, classes)
    upload, draw = said(layout, 3, 2.5)
    blob = packed(layout, upload)
    assert len(blob) == layout.upload_bytes <= update_bytes("plain", layout.words)
    again, read = read_upload(blob, layout_digest=layout.digest, max_weight=3.0)
    assert again == layout
    assert np.array_equal(read.ids, upload.ids)
    assert np.array_equal(read.steps, upload.steps)
    top = np.sort(draw, axis=1)[:, -keep:]
    np.testing.assert_allclose(np.sort(layout.nats(read.steps), axis=1), np.maximum(top, -24), atol=24 / 65535)
    result = combine_uploads(terms_of(layout), {"b": blob, "a": packed(layout, said(layout, 4)[0])})
    knowledge = read_knowledge(result, layout)
    mean = masked_mean(layout, [said(layout, 4)[0], upload])
    assert np.array_equal(knowledge.ids, mean.ids)
    np.testing.assert_allclose(knowledge.log_probabilities, mean.log_probabilities, atol=12 / 65535 + 1e-12)
    assert knowledge.parties == 2


def test_bytes_fall_with_k():
    sizes = [layout_of(keep, classes=4096, positions=100).upload_bytes for keep in (4096, 256, 32, 8, 2)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 100 * 2 * 4 + 100  # four bytes an entry
    assert sizes[0] / sizes[2] > 50


def test_the_order_of_the_parties_is_that_of_their_keys():
    layout = layout_of(keep=4)
    blobs = {name: packed(layout, said(layout, seed)[0]) for seed, name in enumerate("abc")}
    assert combine_uploads(terms_of(layout), blobs) == combine_uploads(terms_of(layout), dict(reversed(blobs.items())))


@pytest.mark.parametrize("clip", [0.25, 1.0, 10.0])
def test_a_mean_of_vectors_is_the_dense_mean(clip):
    """What a masked sum adds: the same mean as in the clear, up to float32."""
    layout = layout_of()
    uploads = [said(layout, seed)[0] for seed in range(3)]
    vectors = [layout.to_vector(upload.steps, clip) for upload in uploads]
    assert all(np.abs(vector).max() <= clip for vector in vectors)
    mean = np.mean([vector.astype(np.float64) for vector in vectors], axis=0).astype(np.float32)
    np.testing.assert_allclose(
        layout.from_vector(mean, clip), masked_mean(layout, uploads).log_probabilities, atol=24 * 2**-23
    )


# ---- what is refused


def broken(layout, blob):
    """Uploads that are not sound, each with a word of its refusal."""
    start = struct.calcsize("<4sQIIddd")
    ids = np.frombuffer(blob, "<u2", count=P * layout.keep, offset=start).reshape(P, -1).copy()

    def with_ids(changed):
        return blob[:start] + changed.astype("<u2").tobytes() + blob[start + changed.nbytes :]

    doubled, beyond, falling = ids.copy(), ids.copy(), ids[:, ::-1].copy()
    doubled[3, 1] = doubled[3, 0]
    beyond[0, -1] = V
    yield blob[:10], "too short"
    yield b"", "too short"
    yield blob[:-1], "bytes"
    yield blob + b"\0", "bytes"
    yield b"KDx9" + blob[4:], "no logits"
    yield with_ids(doubled), "ids"
    yield with_ids(beyond), "ids"
    yield with_ids(falling), "ids"
    for weight in (0.0, -1.0, math.nan, math.inf, 101.0):
        yield blob[: start - 8] + struct.pack("<d", weight) + blob[start:], "weight"
    yield struct.pack("<4sQIIddd", b"KDu1", 1 << 60, V, 3, 2.0, 24.0, 1.0), "no logits"
    yield struct.pack("<4sQIIddd", b"KDu1", P, V, 0, 2.0, 24.0, 1.0), "cannot be"
    yield struct.pack("<4sQIIddd", b"KDu1", P, V, 3, math.nan, 24.0, 1.0), "cannot be"
    other = dataclasses.replace(layout, temperature=3.0)
    yield packed(other, said(other, 0)[0]), "another layout"


def test_an_upload_that_is_not_sound_is_refused_before_it_counts():
    layout = layout_of(keep=3)
    blob = packed(layout, said(layout, 0)[0])
    check_upload(terms_of(layout), "a", blob)
    for bad, words in broken(layout, blob):
        with pytest.raises(WireError, match=words):
            check_upload(terms_of(layout), "a", bad)


def test_knowledge_that_is_not_sound_is_refused():
    layout = layout_of(keep=3)
    terms = terms_of(layout)
    blob = combine_uploads(terms, {name: packed(layout, said(layout, n)[0]) for n, name in enumerate("ab")})
    head = struct.calcsize("<4sQIIddIQ")
    counts = np.frombuffer(blob, "<u4", count=P, offset=head).copy()
    counts[0], counts[1] = counts[0] + 1, counts[1] - 1
    moved = blob[:head] + counts.tobytes() + blob[head + counts.nbytes :]
    swapped = bytearray(blob)
    at = head + counts.nbytes
    swapped[at : at + 2], swapped[at + 2 : at + 4] = swapped[at + 2 : at + 4], swapped[at : at + 2]
    for bad in (blob[:20], blob[:-2], blob + b"\0\0", b"KDu1" + blob[4:], moved, bytes(swapped)):
        with pytest.raises(WireError):
            read_knowledge(bad, layout)
    with pytest.raises(WireError, match="another layout"):
        read_knowledge(blob, layout_of(keep=4))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_changed_byte_is_an_error_or_a_value_and_never_a_crash(data):
    layout = layout_of(keep=3)
    blob = bytearray(packed(layout, said(layout, 0)[0]))
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    try:
        _, upload = read_upload(bytes(blob), layout_digest=layout.digest, max_weight=100.0)
    except WireError:
        return
    assert upload.ids.max() < V
    assert np.isfinite(masked_mean(layout, [upload]).log_probabilities).all()


def test_layouts_that_make_no_sense():
    for change in ({"keep": 1}, {"keep": V + 1}, {"positions": 0}, {"temperature": 0.0}, {"floor": math.inf}):
        with pytest.raises(UsageError):
            dataclasses.replace(layout_of(), **change)


def test_sums_that_cannot_be_made_of_logits():
    check_sum("plain", dense=False)
    check_sum("mask", dense=True)
    with pytest.raises(UsageError, match="differs from party to party"):
        check_sum("mask", dense=False)
    for hidden in ("mask+hidden", "bfv", "ckks"):
        with pytest.raises(UsageError, match="come late"):
            check_sum(hidden)
