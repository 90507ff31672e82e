"""What holds for every rule, what is refused, and how options are given."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitfl.aggregation.error import agrees
from splitfl.aggregation.factors import Pair
from splitfl.aggregation.page import page
from splitfl.aggregation.rule import check_combination, combine, mean_vector
from splitfl.aggregation.rules import DEFAULT_RULE, RULES, rule_named
from splitfl.aggregation.state import State
from splitfl.errors import InternalError, ModelError, UsageError, WireError
from tests.aggregation.parties import (
    BY_MEAN,
    CORES,
    FROM_ALL,
    WIDTHS,
    adapter,
    after_gradients,
    change,
    gap,
    like,
    trained,
)

PAGE = Path(__file__).resolve().parents[2] / "docs" / "aggregation.md"
WEIGHTS = [3.0, 1.0, 2.0]
MIXED = [name for name, rule in RULES.items() if not rule.one_rank]


def begun(name, round=0, options=None):
    rule = rule_named(name, options)
    return rule, after_gradients(rule, rule.first(adapter(0), 5), round)


def last(rule, round=0):
    return len(rule.steps(round)) - 1


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=8, deadline=None)
@given(
    order=st.permutations(range(4)),
    weights=st.lists(st.floats(0.1, 10), min_size=4, max_size=4),
    factor=st.floats(1e-3, 1e3),
    round=st.integers(0, 1),
)
def test_neither_order_nor_a_common_factor_of_the_weights_counts(name, order, weights, factor, round):
    rule, state = begun(name, round)
    updates = [trained(rule, state, round, k) for k in range(4)]
    one = combine(rule, state, updates, weights, round, last(rule, round))
    moved = [updates[k] for k in order]
    other = combine(rule, state, moved, [factor * weights[k] for k in order], round, last(rule, round))
    assert agrees(one, other, tolerance=2e-5)
    if rule.same_bits:  # the product of means of factors is then the same factor by factor
        for module in WIDTHS:
            np.testing.assert_allclose(one.adapter.pairs[module].b, other.adapter.pairs[module].b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [*BY_MEAN, *CORES])
def test_a_sum_in_other_hands_is_all_that_such_a_rule_needs(name):
    """Parties make vectors, somebody else adds, every party makes the next state by itself: the same at all."""
    rule = RULES[name]
    states = [rule.first(adapter(0), 5) for _ in range(3)]
    for round in range(3):
        for step in range(len(rule.steps(round))):
            vectors = []
            for k, state in enumerate(states):
                start = rule.start(state, round, step)
                own = (
                    like(7 + k, start, size=0.1)
                    if rule.steps(round)[step].does == "gradient"
                    else trained(rule, state, round, 10 * round + k)
                )
                vectors.append(rule.vector(state, own, round, step))
                assert vectors[-1].shape == (rule.length(state, round, step),)
            mean = mean_vector(vectors, WEIGHTS)
            states = [rule.from_mean(state, mean, round, step) for state in states]
            assert len({state.digest for state in states}) == 1
            assert State.from_bytes(states[0].to_bytes(), like=states[1]).digest == states[0].digest


@pytest.mark.parametrize("name", ["ffa", "rolora", "fedsa", "fedsvd"])
def test_half_the_values_are_sent(name):
    rule, state = begun(name)
    full = RULES["fedit"].length(state, 0)
    heads = sum(tensor.numel() for tensor in state.adapter.extras.values())
    a, b = (
        sum(p.numel() for p in half) for half in zip(*((p.a, p.b) for p in state.adapter.pairs.values()), strict=True)
    )
    assert rule.length(state, 0) == (a if name == "fedsa" else b + heads)
    assert a + b + heads == full


def test_fed_sb_sends_r_squared_values_a_module():
    rule, state = begun("fed-sb")
    heads = sum(tensor.numel() for tensor in state.adapter.extras.values())
    assert rule.length(state, 1) == 3 * 4 * 4 + heads


def test_rolora_alternates():
    rule = RULES["rolora"]
    assert [rule.trains(round) for round in range(4)] == ["B", "A", "B", "A"]
    assert [rule.sends(round) for round in range(4)] == ["B", "A", "B", "A"]
    state = rule.first(adapter(0), 5)
    for round in range(4):
        updates = [trained(rule, state, round, 10 * round + k) for k in range(3)]
        after = combine(rule, state, updates, WEIGHTS, round)
        for module in WIDTHS:
            old, new = state.adapter.pairs[module], after.adapter.pairs[module]
            assert torch.equal(old.a, new.a) == (round % 2 == 0)
            assert torch.equal(old.b, new.b) == (round % 2 == 1)
        state = after


@pytest.mark.parametrize(("name", "round"), [("ffa", 0), ("rolora", 0), ("rolora", 1), ("fedsvd", 0), ("fed-sb", 1)])
def test_a_frozen_factor_that_moved_is_refused_by_name(name, round):
    rule, state = begun(name, round)
    part = "B" if rule.trains(round) == "A" else "A"

    def moved(module, pair):
        if module != "layers.0.v_proj":
            return pair
        a, b = (pair.a + 1e-3, pair.b) if part == "A" else (pair.a, pair.b + 1e-3)
        return Pair(a, b, pair.scale, pair.core)

    own = trained(rule, state, round, 1)
    rule.vector(state, own, round, last(rule, round))
    with pytest.raises(ModelError, match=rf"Factor {part} of layers\.0\.v_proj is frozen"):
        rule.vector(state, own.map(moved), round, last(rule, round))


def test_another_seed_is_another_federation():
    rule, state = begun("ffa")
    other = rule.first(adapter(0), 6)
    assert state.digest != other.digest
    with pytest.raises(ModelError, match="is frozen"):
        rule.vector(state, trained(rule, other, 0, 1), 0)


def test_fedsa_leaves_b_and_the_head_at_home():
    rule, state = begun("fedsa")
    updates = [trained(rule, state, 0, k) for k in range(3)]
    after = combine(rule, state, updates, WEIGHTS, 0)
    for own in updates:
        mine = rule.start(after, 1, own=own)
        assert all(torch.equal(mine.pairs[n].b, own.pairs[n].b) for n in WIDTHS)
        assert all(torch.equal(mine.pairs[n].a, after.adapter.pairs[n].a) for n in WIDTHS)
        assert torch.equal(mine.extras["score.weight"], own.extras["score.weight"])
    new = rule.start(after, 1)
    assert not any(pair.b.any() for pair in new.pairs.values())
    assert rule.vector(after, rule.start(after, 1, own=updates[0]), 1).size == rule.length(after, 1)


class TestMixedRanks:
    @pytest.mark.parametrize("name", MIXED)
    def test_go_on_for_rounds(self, name):
        rule, state = begun(name)
        for round in range(3):
            starts = [rule.start(state, round, rank=rank) for rank in (1, 4, 2)]
            assert [start.ranks for start in starts] == [{1}, {4}, {2}]
            updates = [trained(rule, state, round, 9 * round + k, rank=r) for k, r in enumerate((1, 4, 2))]
            state = combine(rule, state, updates, WEIGHTS, round)
            assert state.adapter.ranks == {4}
            assert all(torch.isfinite(change(state, module)).all() for module in WIDTHS)

    @pytest.mark.parametrize("name", MIXED)
    def test_a_round_of_low_ranks_alone_keeps_the_rest_alive(self, name):
        """A row that is zero in both factors would never be trained again."""
        rule, state = begun(name)
        updates = [trained(rule, state, 0, k, rank=1) for k in range(2)]
        after = combine(rule, state, updates, [1.0, 1.0], 0)
        for pair in after.adapter.pairs.values():
            assert pair.rank == 4
            assert (pair.a.any(dim=1) | pair.b.any(dim=0)).all()

    @pytest.mark.parametrize("name", [n for n in RULES if RULES[n].one_rank and n != "fedlrt"])
    def test_are_refused_elsewhere(self, name):
        rule, state = begun(name)
        with pytest.raises(UsageError, match="rank 2 in a federation of rank 4"):
            rule.start(state, 0, last(rule), rank=2)
        if name not in CORES:
            with pytest.raises(UsageError, match="rank 2 in a federation of rank 4"):
                rule.vector(state, adapter(1, rank=2), 0)

    @pytest.mark.parametrize("name", MIXED)
    @pytest.mark.parametrize("rank", [0, 5])
    def test_of_impossible_size_are_refused(self, name, rank):
        rule, state = begun(name)
        with pytest.raises(UsageError, match="1 to 4"):
            rule.start(state, 0, rank=rank)

    def test_rblas_marks_bear_noise_of_an_encrypted_sum_and_a_cut(self):
        rule, state = begun("rbla")
        updates = [trained(rule, state, 0, k, rank=r) for k, r in enumerate((1, 4, 2))]
        vectors = [rule.vector(state, update, 0) for update in updates]
        mean = mean_vector(vectors, WEIGHTS)
        exact = rule.from_mean(state, mean, 0)
        noise = np.random.default_rng(0).uniform(-(2**-21), 2**-21, mean.shape).astype(np.float32)
        assert agrees(rule.from_mean(state, mean + noise, 0), exact, tolerance=1e-3)

    def test_a_mean_without_marks_is_refused(self):
        rule, state = begun("rbla")
        mean = rule.vector(state, trained(rule, state, 0, 1), 0)
        for broken in (mean[:-1], np.concatenate([mean[:-4], np.zeros(4, dtype=np.float32)])):
            with pytest.raises(WireError, match="none of this federation"):
                rule.from_mean(state, broken, 0)

    def test_hetlora_gives_up_ranks_whose_part_shrank(self):
        rule = rule_named("hetlora", {"gamma": 0.5})
        start = adapter(1)

        def shrunk(_, pair):
            factor = torch.tensor([1.0, 1.0, 0.1, 0.1])
            return Pair(pair.a * factor[:, None], pair.b, pair.scale)

        assert rule.pruned(start.map(shrunk), start).ranks == {2}
        assert rule.pruned(start, start.map(shrunk)).ranks == {4}
        pair = start.pairs["layers.0.q_proj"]
        assert float(rule.tail(pair)) == pytest.approx(float(pair.b[:, 2:].norm() * pair.a[2:].norm()), rel=1e-6)


class TestRefusals:
    @pytest.mark.parametrize("name", FROM_ALL)
    @pytest.mark.parametrize("summation", ["mask", "mask+hidden", "bfv", "ckks"])
    def test_rules_that_need_every_update_and_protected_sums(self, name, summation):
        with pytest.raises(UsageError, match="needs every party's factors in the clear"):
            check_combination(RULES[name], summation)
        check_combination(RULES[name], "plain")

    @pytest.mark.parametrize("name", [*BY_MEAN, *CORES])
    def test_rules_of_sums_go_with_all(self, name):
        for summation in ("plain", "mask", "mask+hidden", "bfv", "ckks"):
            check_combination(RULES[name], summation, parties=3)

    @pytest.mark.parametrize("name", RULES)
    def test_mixed_ranks(self, name):
        check_combination(RULES[name], "plain", ranks=[8, 8])
        if RULES[name].one_rank:
            with pytest.raises(UsageError, match="cannot combine ranks 4, 8"):
                check_combination(RULES[name], "plain", ranks=[8, 4])
        else:
            check_combination(RULES[name], "plain", ranks=[8, 4])

    @pytest.mark.parametrize("name", RULES)
    def test_noise(self, name):
        if RULES[name].no_dp:
            with pytest.raises(UsageError, match="differential privacy: "):
                check_combination(RULES[name], "plain", dp=True)
        else:
            check_combination(RULES[name], "plain", dp=True)

    def test_no_model_of_all(self):
        with pytest.raises(UsageError, match="B and a head of its own"):
            check_combination(RULES["fedsa"], "plain", one_model=True)
        check_combination(RULES["rolora"], "plain", one_model=True)

    def test_two_parties_behind_a_sum(self):
        with pytest.raises(UsageError, match="protects nothing between 2 parties"):
            check_combination(RULES["rolora"], "mask", parties=2)
        check_combination(RULES["rolora"], "mask", parties=2, dp=True)
        check_combination(RULES["rolora"], "plain", parties=2)

    @pytest.mark.parametrize("weights", [[], [1.0, 0.0, 1.0], [1.0, -1.0, 1.0], [1.0, float("nan"), 1.0]])
    @pytest.mark.parametrize("name", ["rolora", "flexlora"])
    def test_weights(self, name, weights):
        rule, state = begun(name)
        with pytest.raises((UsageError, ValueError), match=r"weights|zip"):
            combine(rule, state, [trained(rule, state, 0, k) for k in range(3)], weights, 0)

    @pytest.mark.parametrize("name", FROM_ALL)
    def test_a_mean_where_all_are_needed(self, name):
        rule, state = begun(name)
        with pytest.raises(InternalError, match="a mean is not enough"):
            rule.from_mean(state, np.zeros(rule.length(state, 0), dtype=np.float32), 0)

    def test_all_where_the_mean_is_enough(self):
        rule, state = begun("rolora")
        with pytest.raises(InternalError, match="mean alone"):
            rule.from_all(state, [adapter(1)], [1.0], 0)

    @pytest.mark.parametrize("name", RULES)
    def test_a_vector_of_another_length(self, name):
        rule, state = begun(name)
        short = np.zeros(rule.length(state, 0, last(rule)) - 1, dtype=np.float32)
        read = rule.from_mean if rule.by_mean(0) else rule.update
        with pytest.raises(WireError, match=r"float32|none of this federation"):
            read(state, short, 0, last(rule))

    @pytest.mark.parametrize("name", ["fedsvd", "fed-sb"])
    def test_modules_too_narrow_for_orthonormal_rows(self, name):
        with pytest.raises(UsageError, match=r"layers\.0\.v_proj is too narrow for rank 8"):
            RULES[name].first(adapter(0, rank=8), 5)

    def test_a_gradient_at_another_scale(self):
        rule = RULES["fed-sb"]
        state = rule.first(adapter(0), 5)
        with pytest.raises(ModelError, match="another scale"):
            rule.vector(state, adapter(1, scale=1.0), 0)


class TestOptions:
    def test_default(self):
        assert DEFAULT_RULE == "rolora"
        assert rule_named(DEFAULT_RULE) is not None

    def test_are_taken(self):
        assert rule_named("flexlora", {"rank": 32}).rank == 32
        assert rule_named("lora-fair", {"ridge": 1}).ridge == 1

    @pytest.mark.parametrize(
        ("name", "options", "said"),
        [
            ("flexlora", {"ranks": 3}, r"rank \(int\)"),
            ("rolora", {"rank": 3}, "it has none"),
            ("flexlora", {"rank": "3"}, r"rank \(int\)"),
            ("flexlora", {"rank": -1}, "no rank"),
            ("fedex", {"keep": -1}, "no rank"),
            ("lora-fair", {"ridge": -0.1}, "ridge"),
            ("lora-fair", {"ridge": float("nan")}, "ridge"),
            ("hetlora", {"gamma": 1.0}, "gamma"),
            ("fra-then-ffa", {"switch": 0}, "switch"),
            ("fed-sb", {"start_from": "nothing"}, "gradient or random"),
            ("fedlrt", {"tolerance": 1.0}, "tolerance"),
            ("fedlrt", {"max_rank": 0}, "max_rank"),
        ],
    )
    def test_that_make_no_sense_are_refused(self, name, options, said):
        with pytest.raises(UsageError, match=said):
            rule_named(name, options)

    def test_an_unknown_rule_names_the_nearest(self):
        with pytest.raises(UsageError, match="did you mean 'flexlora'"):
            rule_named("flexlorra")


def test_agreement_sees_other_changes_and_not_other_factors():
    rule, state = begun("flexlora")
    one = combine(rule, state, [trained(rule, state, 0, k) for k in range(3)], WEIGHTS, 0)
    turned = State(adapter=one.adapter.map(lambda _, p: Pair(-p.a, -p.b, p.scale)), merged=one.merged, seed=one.seed)
    assert turned.digest != one.digest
    assert agrees(one, turned)
    assert not agrees(one, state)
    off = State(adapter=one.adapter.map(lambda _, p: Pair(p.a, p.b * 1.001, p.scale)), seed=one.seed)
    assert not agrees(one, off)
    head = State(adapter=one.adapter.map(lambda _, p: p, {"score.weight": one.adapter.extras["score.weight"] + 1e-3}))
    assert not agrees(one, head)


def test_an_exact_rule_stays_exact_over_rounds():
    """rolora's whole change after each round is the mean of what the parties hold."""
    rule = RULES["rolora"]
    state = rule.first(adapter(0), 5)
    for round in range(4):
        updates = [trained(rule, state, round, 10 * round + k) for k in range(3)]
        state = combine(rule, state, updates, WEIGHTS, round)
        for module in WIDTHS:
            expected = sum(
                w / 6 * p.scale * p.b.double() @ p.a.double()
                for w, p in zip(WEIGHTS, (u.pairs[module] for u in updates), strict=True)
            )
            assert gap(change(state, module), expected) < 1e-6


def test_the_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make docs`"
