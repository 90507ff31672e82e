"""A step in overlapping micro-batches computes what the plain step computes: loss and gradients, several families."""

from __future__ import annotations

import functools
import threading

import pytest
import torch

from party.pipeline import MOST, Pipeline, run_pipelined, schedule, sizes_of, split_batch
from party.turns import Abandoned, Turns, meanwhile
from splitfl.privacy.decorrelation import distance_correlation, flatten_tokens
from tests.equivalence.measure import make_batch, make_pair
from tests.families import save_model

# Of the loss, and of the length of the whole gradient: additions in another order. These models have weights spread so
# widely that a few roundings of float32 show; in float64 what is left is what norms and loss compute in float32.
LOSS_BOUND, BOUND, BOUND_IN_DOUBLE = 1e-6, 2e-6, 2e-7
FAMILIES = ("gpt2", "llama", "gemma3", "bloom", "bert")
CLASSIFIERS = ("bert",)


@functools.cache
def pair_of(family, folder):
    task = "sequence-classification" if family in CLASSIFIERS else "causal-lm"
    return make_pair(save_model(family, folder / family), (2, 2), task)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def gradients_of(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def distance(found, expected):
    """Of two gradients, relative to the second one's length, all parameters together."""
    assert found.keys() == expected.keys()
    off = torch.cat([(found[name] - gradient).double().flatten() for name, gradient in expected.items()])
    return float(off.norm() / torch.cat([gradient.double().flatten() for gradient in expected.values()]).norm())


def loss_share(model, task, part, total):
    """The micro-batch's part of the batch's mean loss."""
    labels = part["labels"]
    mine = int((labels[:, 1:] if task == "causal-lm" else labels).ne(-100).sum())
    loss = model(**part).loss * (mine / total)
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_micro_batches_add_up_to_the_batch(family, padding, folder):
    pair = pair_of(family, folder)
    task, model = pair.plan.task, pair.party.train()
    batch = make_batch(padding, task, rows=7 if padding == "none" else 3)
    plain = model(**batch).loss
    plain.backward()
    expected = gradients_of(model)
    labels = batch["labels"]
    total = int((labels[:, 1:] if task == "causal-lm" else labels).ne(-100).sum())
    for count, window in ((2, MOST), (3, 2)):
        parts = split_batch(batch, count).parts
        assert len(parts) == count
        works = [functools.partial(loss_share, model, task, part, total) for part in parts]
        loss = sum(run_pipelined(works, window=window))
        found = gradients_of(model)
        assert abs(loss - plain).item() <= LOSS_BOUND * abs(plain).item()
        assert distance(found, expected) <= BOUND


def test_in_double_precision_next_to_nothing_is_left_of_the_difference(tmp_path):
    pair = make_pair(save_model("llama", tmp_path / "llama"), (2, 2))
    model, batch = pair.party.train().double(), make_batch("right", "causal-lm")
    trunk = next(module for module in model.modules() if hasattr(module, "on_hidden")).link.trunk
    trunk.base.double()
    trunk.dtype = torch.float64
    model(**batch).loss.backward()
    expected = gradients_of(model)
    total = int(batch["labels"][:, 1:].ne(-100).sum())
    works = [functools.partial(loss_share, model, "causal-lm", part, total) for part in split_batch(batch, 3).parts]
    run_pipelined(works, window=2)
    assert distance(gradients_of(model), expected) < BOUND_IN_DOUBLE


def test_a_wrong_gradient_would_be_noticed(folder):
    """The bound is far below what leaving out one row would change."""
    pair = pair_of("llama", folder)
    model, batch = pair.party.train(), make_batch("right", "causal-lm")
    grads = []
    for rows in (slice(None), slice(2)):
        model(**{name: tensor[rows] for name, tensor in batch.items()}).loss.backward()
        grads.append(gradients_of(model))
    assert distance(grads[1], grads[0]) > 1000 * BOUND


# ---- the split


def test_rows_of_similar_length_go_together_and_their_padding_stays_here():
    batch = make_batch("right", "causal-lm")  # lengths 11, 7, 9
    split = split_batch(batch, 3)
    assert [part["attention_mask"].shape for part in split.parts] == [(1, 7), (1, 9), (1, 11)]
    assert split.order.tolist() == [1, 2, 0]
    assert all(bool(part["attention_mask"].all()) for part in split.parts)
    joined = split.joined([part["input_ids"][..., None] for part in split.parts], 11)[..., 0]
    assert torch.equal(joined * batch["attention_mask"], batch["input_ids"] * batch["attention_mask"])


def test_the_first_and_the_last_part_are_small_for_nothing_overlaps_with_them():
    assert sizes_of(8, 4) == [1, 3, 3, 1]
    assert sizes_of(32, 8) == [2, 5, 5, 5, 5, 4, 4, 2]
    assert sizes_of(3, 3) == [1, 1, 1]
    for rows in range(1, 20):
        for count in range(1, rows + 1):
            sizes = sizes_of(rows, count)
            assert (len(sizes), sum(sizes), min(sizes) > 0) == (count, rows, True)


def test_columns_on_the_left_stay_for_they_are_positions():
    parts = split_batch(make_batch("left", "causal-lm"), 3).parts
    assert [part["input_ids"].shape[1] for part in parts] == [11, 11, 11]


def test_whoever_hides_lengths_tells_none_by_order_or_width():
    batch = make_batch("right", "causal-lm")
    split = split_batch(batch, 2, trim=False)
    assert torch.equal(torch.cat([part["input_ids"] for part in split.parts]), batch["input_ids"])


def test_what_is_not_by_row_is_not_split():
    batch = {**make_batch("none", "causal-lm"), "position_ids": torch.arange(11)[None]}
    assert split_batch(batch, 2).parts == [batch]
    assert len(split_batch(make_batch("none", "causal-lm"), 9).parts) == 3


# ---- the schedule


@pytest.mark.parametrize("window", range(1, 7))
@pytest.mark.parametrize("count", range(1, 9))
def test_each_micro_batch_has_three_turns_and_no_more_than_the_window_are_under_way(count, window):
    turns = list(schedule(count, window))
    assert sorted(turns) == sorted(list(range(count)) * 3)
    seen = dict.fromkeys(range(count), 0)
    for number in turns:
        seen[number] += 1
        assert sum(0 < times < 3 for times in seen.values()) <= window


def test_the_bound_in_bytes_is_of_the_largest_part():
    pipeline = Pipeline(micro_batches=3, in_flight_bytes=2 * 11 * 32 * 4, width=32)
    split = pipeline.split(make_batch("right", "causal-lm"))
    assert pipeline.window(split) == 2
    assert Pipeline(micro_batches=3, in_flight_bytes=1, width=32).window(split) == 1


def test_the_order_is_the_callers_and_not_that_of_the_answers():
    order = []

    def work(name):
        for step in range(3):
            order.append(f"{name}{step}")
            meanwhile()

    with Turns([functools.partial(work, "a"), functools.partial(work, "b")]) as turns:
        for number in (0, 1, 1, 0):
            turns.resume(number)
        turns.finish()
    assert order == ["a0", "b0", "b1", "a1", "a2", "b2"]


def test_what_fails_takes_the_others_with_it_and_leaves_no_thread():
    left = []

    def waits():
        try:
            meanwhile()
        except Abandoned:
            left.append(threading.current_thread().name)
            raise

    def fails():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        run_pipelined([waits, fails])
    assert left == ["micro-batch-0"]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("micro-batch")]


def test_dropout_is_the_same_in_every_run(folder):
    """Which numbers are drawn for which micro-batch does not depend on threads."""
    pair = pair_of("gpt2", folder)
    model, batch = pair.party.train(), make_batch("right", "causal-lm")
    dropped = torch.nn.Dropout(0.5)
    handles = [
        module.register_forward_hook(lambda _m, _i, output: dropped(output))
        for name, module in model.named_modules()
        if name.endswith("mlp")
    ]
    try:
        runs = []
        for _ in range(2):
            torch.manual_seed(3)
            parts = split_batch(batch, 3).parts
            run_pipelined([functools.partial(loss_share, model, "causal-lm", part, 20) for part in parts], window=2)
            runs.append(gradients_of(model))
    finally:
        for handle in handles:
            handle.remove()
    assert all(torch.equal(runs[0][name], gradient) for name, gradient in runs[1].items())


def test_what_depends_on_the_whole_batch_is_computed_on_all_of_it(folder):
    """The distance correlation of all bottoms' outputs, with its gradient, between forwards and backwards."""
    pair = pair_of("llama", folder)
    model, batch = pair.party.train(), make_batch("right", "causal-lm")
    remote = next(module for module in model.modules() if hasattr(module, "on_hidden"))
    target = torch.randn(3, 11, 5, generator=torch.Generator().manual_seed(1))
    mask, passed = batch["attention_mask"], []
    remote.on_hidden = passed.append
    try:

        def extra(hidden):
            return 3.0 * distance_correlation(flatten_tokens(target, mask), flatten_tokens(hidden, mask))

        loss = model(**batch).loss
        (loss + extra(passed.pop())).backward()
        expected = gradients_of(model)
        split = split_batch(batch, 3)
        total = int(batch["labels"][:, 1:].ne(-100).sum())
        works = [functools.partial(loss_share, model, "causal-lm", part, total) for part in split.parts]
        run_pipelined(works, forwards_done=lambda: extra(split.joined(passed, 11)).backward())
        found = gradients_of(model)
    finally:
        remote.on_hidden = None
    assert distance(found, expected) <= BOUND
