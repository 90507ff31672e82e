"""Mechanisms as the settings ask for them, and the guard that lets nothing past which is not protected and booked."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch

from model_owner.trunk import LocalLink, Trunk
from party.bookkeeping import Book, DataSet
from party.opening import prepare
from party.protect import BatchRows, Guard, Protection, RowTracker, coder, numbered, plan_protection
from protocols import GUARDED_GRADFREE, GUARDED_ONLINE, SPLIT
from splitfl.config import TuneSettings
from splitfl.config_privacy import ProtectionSettings
from splitfl.errors import UsageError
from splitfl.kit import open_kit
from splitfl.link import TrunkRequest, decoded
from splitfl.load import load_trunk_side
from splitfl.privacy.ledger import BudgetError, Ledger
from splitfl.privacy.mechanisms import Chain, DChi, Gauss, GradientGauss, Quantise, TopK
from splitfl.wire.coding import Coded
from tests.live.models import make_kit, save_tiny

DATA = "d4" * 32
SIGMA = 0.5
NOISE = {"noise": "gauss", "clip": 20.0, "sigma": SIGMA}


@pytest.fixture(scope="module")
def cut_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    model = save_tiny("llama", folder / "model")
    return model, open_kit(make_kit(model, folder / "kit"))


@pytest.fixture
def cut_kit(cut_model):
    return cut_model[1]


@pytest.fixture(scope="module")
def trunk(cut_model):
    model, kit = cut_model
    return Trunk(load_trunk_side(model, kit.plan, dtype=torch.float32), kit.plan)


@pytest.fixture
def plan(trunk):
    return trunk.plan


def planned(plan, protocol=SPLIT, **settings):
    return plan_protection(ProtectionSettings(**settings), plan, protocol, sigma=settings.get("sigma"))


# ---- from settings to mechanisms


@pytest.mark.parametrize(
    ("protocol", "settings", "hidden", "gradient", "codings"),
    [
        (SPLIT, {}, None, None, ("raw", "raw")),
        (SPLIT, NOISE, Gauss(clip=20.0, sigma=SIGMA), None, ("grid16", "raw")),
        (SPLIT, {"quantise": "int4"}, Quantise(bits=4), Quantise(bits=4), ("int4", "int4")),
        (SPLIT, {"keep_largest": 3}, TopK(kept=3), TopK(kept=3), ("topk", "topk")),
        (SPLIT, {"noise": "dchi", "eta": 9.0}, DChi(eta=9.0), None, ("raw", "raw")),
        (
            SPLIT, {"noise": "dchi", "eta": 9.0, "quantise": "int8"},
            Chain((DChi(eta=9.0), Quantise(bits=8))), Quantise(bits=8), ("int8", "int8"),
        ),
        (
            SPLIT, {"gradient_clip": 1.0, "gradient_sigma": 2.0},
            None, GradientGauss(clip=1.0, sigma=2.0), ("raw", "grid16"),
        ),
        (GUARDED_ONLINE, {}, Quantise(bits=8), Quantise(bits=8), ("int8", "int8")),
        (GUARDED_ONLINE, {"quantise": "none"}, None, None, ("raw", "raw")),
        (GUARDED_ONLINE, {"keep_largest": 3}, TopK(kept=3), TopK(kept=3), ("topk", "topk")),
        (GUARDED_ONLINE, NOISE, Gauss(clip=20.0, sigma=SIGMA), Quantise(bits=8), ("grid16", "int8")),
        (GUARDED_GRADFREE, {}, None, None, ("raw", "raw")),
        (GUARDED_GRADFREE, {"quantise": "int8"}, Quantise(bits=8), None, ("int8", "raw")),
        (GUARDED_GRADFREE, NOISE, Gauss(clip=20.0, sigma=SIGMA), None, ("grid16", "raw")),
    ],
)  # fmt: skip
def test_what_is_planned(plan, protocol, settings, hidden, gradient, codings):
    found = planned(plan, protocol, **settings)
    assert (found.hidden, found.gradient) == (hidden, gradient)
    assert (found.hidden_coding, found.gradient_coding) == codings
    x = torch.randn(2, 3, plan.width)
    for mechanism, coding in zip((hidden, gradient), codings, strict=True):
        sent = x if mechanism is None else mechanism.protect(x, None)
        assert (sent.coding if isinstance(sent, Coded) else "raw") == coding, "the hello would state another coding"


@pytest.mark.parametrize(
    ("protocol", "settings", "formal"),
    [
        (GUARDED_GRADFREE, NOISE, True),
        (GUARDED_GRADFREE, {}, False),
        (GUARDED_GRADFREE, {"quantise": "int8"}, False),
        (GUARDED_GRADFREE, {"noise": "dchi", "eta": 9.0}, False),
        (GUARDED_ONLINE, NOISE, False),
        (GUARDED_ONLINE, {**NOISE, "freeze_bottom": True}, False),
        (SPLIT, NOISE, False),
        (SPLIT, {**NOISE, "gradient_clip": 1.0, "gradient_sigma": 9.0}, False),
    ],
)
def test_only_noise_on_rows_that_pass_what_no_row_has_trained_is_formal(plan, protocol, settings, formal):
    found = planned(plan, protocol, **settings)
    assert found.formal == formal
    assert bool(found.because) != formal


def test_what_is_trained(plan):
    assert planned(plan).trains_bottom
    assert not planned(plan, freeze_bottom=True).trains_bottom
    assert not planned(plan, GUARDED_GRADFREE).trains_bottom
    assert planned(plan, GUARDED_ONLINE).decorrelate == 0.01
    assert planned(plan, GUARDED_ONLINE, decorrelate=0.25).decorrelate == 0.25
    assert planned(plan, GUARDED_ONLINE, freeze_bottom=True).decorrelate == 0.0
    assert planned(plan, decorrelate=2.0).decorrelate == 2.0, "split takes every mechanism"


def test_a_bound_for_a_token_needs_a_cut_at_the_embeddings(plan):
    with pytest.raises(UsageError, match="cut above layer 2"):
        planned(plan, GUARDED_GRADFREE, **NOISE, unit="token")
    at_embeddings = msgspec.structs.replace(plan, bottom=0)
    assert planned(at_embeddings, GUARDED_GRADFREE, **NOISE, unit="token").gauss.unit == "token"


def test_marvell_is_for_two_classes(plan):
    classes = msgspec.structs.replace(plan, task="sequence-classification")
    settings = ProtectionSettings(label_noise="marvell")
    assert plan_protection(settings, classes, SPLIT, sigma=None, classes=2).label_noise == "marvell"
    with pytest.raises(UsageError, match="max-norm"):
        plan_protection(settings, classes, SPLIT, sigma=None, classes=3)


# ---- the guard


class Watched(LocalLink):
    """A link into a real trunk that notes what reaches it."""

    def __init__(self, trunk):
        super().__init__(trunk)
        self.requests, self.gradients = [], []

    def forward(self, request):
        self.requests.append(request)
        return super().forward(request)

    def backward(self, step, gradient):
        self.gradients.append(gradient)
        return super().backward(step, gradient)


@pytest.fixture
def book(tmp_path):
    data = DataSet(fingerprint=DATA, label="rows", units=[str(row) for row in range(8)])
    with Book(ledger=Ledger(tmp_path / "ledger.sqlite"), run="run", datasets={DATA: data}) as opened:
        yield opened


def entries(book):
    return book.ledger.export()["entries"]


def guard_for(trunk, book=None, *, rows=(0, 1), labels=None, **protection):
    guard = Guard(Watched(trunk), Protection(**protection), book)
    guard.batch = BatchRows(dataset=DATA, rows=rows, labels=labels)
    return guard


def hidden_of(trunk, length=5):
    return torch.randn(2, length, trunk.plan.width, generator=torch.Generator().manual_seed(1))


def test_without_protection_the_numbers_pass_untouched(trunk):
    hidden, mask = hidden_of(trunk), torch.tensor([[1, 1, 1, 0, 0], [1] * 5], dtype=torch.uint8)
    guard = guard_for(trunk)
    output, step = guard.forward(TrunkRequest(hidden=hidden, mask=mask, keep=True))
    gradient = torch.ones_like(output)
    back = guard.backward(step, gradient)
    plain = LocalLink(trunk)
    expected, there = plain.forward(TrunkRequest(hidden=hidden, mask=mask, keep=True))
    assert torch.equal(output, expected)
    assert torch.equal(back, plain.backward(there, gradient))


def test_what_is_not_booked_is_not_sent(trunk, book):
    book.ledger.set_budget(DATA, unit="row", adversary="owner", releases=1)
    guard = guard_for(trunk, book)
    output, step = guard.forward(TrunkRequest(hidden=hidden_of(trunk), keep=True))
    with pytest.raises(BudgetError):
        guard.backward(step, torch.ones_like(output))
    assert guard.link.gradients == []
    with pytest.raises(BudgetError):
        guard.forward(TrunkRequest(hidden=hidden_of(trunk)))
    assert len(guard.link.requests) == 1
    assert [entry["channel"] for entry in entries(book)] == ["activations"]


def test_a_send_is_on_disk_before_it_is_sent_and_confirmed_after(trunk, book):
    guard, seen = guard_for(trunk, book), []
    send, send_back = guard.link.forward, guard.link.backward
    note = lambda: seen.append([entry["confirmed"] is None for entry in entries(book)])  # noqa: E731
    guard.link.forward = lambda request: (note(), send(request))[1]
    guard.link.backward = lambda step, gradient: (note(), send_back(step, gradient))[1]
    output, step = guard.forward(TrunkRequest(hidden=hidden_of(trunk), keep=True))
    guard.batch = BatchRows(dataset=DATA, rows=(5,))  # the next batch: the gradient is still the first one's
    guard.backward(step, torch.ones_like(output))
    assert seen == [[True], [False, True]]
    assert [entry["confirmed"] is None for entry in entries(book)] == [False, False]
    first, second = book.ledger.export(units=True)["entries"]
    assert first["units"] == second["units"]
    assert second["unit_count"] == 2


def test_noise_is_on_padding_too_and_never_the_same(trunk):
    guard = guard_for(trunk, hidden=Gauss(clip=20.0, sigma=SIGMA))
    request = TrunkRequest(hidden=hidden_of(trunk), mask=torch.tensor([[1, 1, 0, 0, 0], [1] * 5], dtype=torch.uint8))
    for _ in range(2):
        torch.manual_seed(0)  # no seed of the process reaches the noise
        guard.forward(request)
    first, second = (decoded(each.hidden) for each in guard.link.requests)
    assert (first[0, 2:].abs().amax(-1) > 0).all()
    assert not torch.equal(first, second)
    # 320 numbers of noise: their standard deviation is within a tenth; the limit is a half.
    assert (first - second).std().item() == pytest.approx(SIGMA * 2**0.5, rel=0.5)
    unpadded = request.hidden * request.mask[..., None]
    assert (first - unpadded).norm(dim=(1, 2)).max() < 30 * SIGMA, "more than noise was changed"


def test_in_a_generation_the_mask_is_longer_than_what_is_new(trunk):
    guard = guard_for(trunk, hidden=Quantise(bits=8))
    mask = torch.ones(2, 5, dtype=torch.uint8)
    mask[0, :3] = 0
    guard.forward(TrunkRequest(hidden=hidden_of(trunk), mask=mask, cache=1))
    later = torch.ones(2, 6, dtype=torch.uint8)
    later[0, :3] = 0
    guard.forward(TrunkRequest(hidden=hidden_of(trunk, 1), mask=later, cache=1, past=5))
    first, second = guard.link.requests
    assert (decoded(first.hidden)[0, :3] == 0).all()
    assert (decoded(second.hidden).abs().amax(-1) > 0).all()
    assert second.mask.shape == (2, 6)


def test_hidden_lengths_take_the_mask_away_after_it_was_used(trunk):
    guard = guard_for(trunk, hidden=Gauss(clip=20.0, sigma=SIGMA), hide_lengths=True)
    mask = torch.tensor([[1, 0, 0, 0, 0], [1] * 5], dtype=torch.uint8)
    guard.forward(TrunkRequest(hidden=1000 * hidden_of(trunk), mask=mask))
    [request] = guard.link.requests
    assert request.mask is None
    # A padded position holds noise alone; the first, clipped one has the norm of the clip.
    norms = decoded(request.hidden)[0].norm(dim=-1)
    assert norms[0] > 15
    assert norms[1:].max() < 12


def test_gradients_of_padding_are_noise_and_the_mask_is_that_of_their_step(trunk):
    guard = guard_for(trunk, gradient=GradientGauss(clip=1.0, sigma=2.0))
    mask = torch.tensor([[1, 1, 0, 0, 0], [1] * 5], dtype=torch.uint8)
    output, first = guard.forward(TrunkRequest(hidden=hidden_of(trunk), mask=mask, keep=True))
    _, second = guard.forward(TrunkRequest(hidden=hidden_of(trunk), keep=True))
    for step in (first, second):
        guard.backward(step, 1e6 * torch.ones_like(output))
    sent = [decoded(gradient) for gradient in guard.link.gradients]
    assert all((gradient.abs().amax(-1) > 0).all() for gradient in sent)
    # Clipped to 1 a position under noise of norm 2 * sqrt(32) = 11: beyond 25 nothing can be.
    assert max(gradient.norm(dim=-1).max() for gradient in sent) < 25


def test_label_noise_needs_labels_and_takes_those_of_its_step(trunk, book):
    labels = torch.tensor([0, 1])
    guard = guard_for(trunk, book, labels=labels, label_noise="marvell")
    output, step = guard.forward(TrunkRequest(hidden=hidden_of(trunk), keep=True))
    guard.batch = None
    gradient = torch.stack([torch.ones_like(output[0]), -torch.ones_like(output[0])])
    guard.backward(step, gradient)
    [sent] = guard.link.gradients
    assert sent.shape == gradient.shape
    assert not torch.equal(sent, gradient)
    assert [entry["mechanism"] for entry in entries(book)] == ["none", "marvell"]
    guard.batch = BatchRows(dataset=DATA, rows=(0, 1))
    _, step = guard.forward(TrunkRequest(hidden=hidden_of(trunk), keep=True))
    with pytest.raises(UsageError, match="max-norm"):
        guard.backward(step, gradient)
    assert len(guard.link.gradients) == 1


def test_a_step_that_is_given_up_is_forgotten(trunk):
    guard = guard_for(trunk)
    _, step = guard.forward(TrunkRequest(hidden=hidden_of(trunk), keep=True))
    assert step in guard._kept
    guard.release(steps=(step,))
    assert guard._kept == {}


@pytest.mark.parametrize(
    "settings",
    [{}, {"quantise": "int8"}, {"quantise": "int4"}, {"keep_largest": 30}, NOISE,
     {"noise": "dchi", "eta": 9.0, "keep_largest": 30}],
    ids=str,
)  # fmt: skip
def test_checks_of_the_owner_are_coded_as_the_session_states(plan, settings):
    found = planned(plan, **settings)
    x = torch.randn(2, 4, plan.width)
    sent = coder(found)(x)
    assert (sent.coding if isinstance(sent, Coded) else "raw") == found.hidden_coding
    if found.gauss is not None:
        assert sent.step == found.gauss.step, "another grid would tell a check from a batch"
    assert (decoded(sent) - x).abs().max() < 0.5 * x.abs().max()
    assert torch.equal(decoded(coder(found)(x)), decoded(sent)), "a check must be able to repeat itself"


def test_row_numbers_are_taken_out_of_a_batch_and_told(trunk):
    guard = guard_for(trunk)
    tracker = RowTracker(guard, train=DATA, held_out="e5" * 32, labels=True)
    made = numbered([{"input_ids": [1, 2]}, {"input_ids": [3]}])
    assert [example["row"] for example in made] == [0, 1]
    batch = {"input_ids": torch.ones(2, 3), "row": torch.tensor([7, 3]), "labels": torch.tensor([1, 0])}
    tracker.training(batch)
    assert "row" not in batch
    assert (guard.batch.dataset, guard.batch.rows) == (DATA, (7, 3))
    assert torch.equal(guard.batch.labels, batch["labels"])
    tracker.scoring({"input_ids": torch.ones(1, 3), "row": torch.tensor([0])})
    assert (guard.batch.dataset, guard.batch.rows) == ("e5" * 32, (0,))
    tracker.training({"input_ids": torch.ones(1, 3)})
    assert guard.batch is None, "rows of a batch before would be booked for this one"


@pytest.mark.parametrize(("sigma", "formal"), [(400.0, True), (1.0, False)])
def test_a_bound_that_says_next_to_nothing_is_not_claimed(cut_kit, sigma, formal):
    """The preview shows it, with the verdict; what the run states of itself afterwards is empirical."""
    settings = TuneSettings(
        kit=cut_kit.path, out=Path("unused"), owner="tcp://127.0.0.1:1", insecure_loopback=True, train=Path("unused"),
        protocol="guarded-gradfree", noise="gauss", clip=40.0, sigma=sigma,
    )  # fmt: skip
    found = prepare(settings, cut_kit, longest=32)
    assert found.claim.formal == formal
    assert found.claim.sentence().startswith("empirical: ") == (not formal)
    assert "delta 1e-06" in found.claim.sentence()
    assert ("verdict" in dict(found.preview)) == (not formal)
