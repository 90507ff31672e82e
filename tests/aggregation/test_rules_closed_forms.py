"""Every rule against its formula, computed with dense matrices in float64."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from splitfl.aggregation.error import aggregation_error
from splitfl.aggregation.factors import Pair, Update
from splitfl.aggregation.peft_format import adapter_from_update
from splitfl.aggregation.rule import combine
from splitfl.aggregation.rules import RULES, rule_named
from tests.aggregation.parties import (
    HEAD,
    WIDTHS,
    adapter,
    after_gradients,
    change,
    dense,
    gap,
    mean_change,
    same_bits,
    trained,
)

WEIGHTS = [3.0, 1.0, 2.0]
SHARES = [0.5, 1 / 6, 1 / 3]


def round_of(name, round=0, *, ranks=(4, 4, 4), options=None, seed=1):
    """State before the last step of `round`, after rounds before it; updates, state after."""
    rule = rule_named(name, options)
    state = rule.first(adapter(0), 5)
    for past in range(round):
        state = after_gradients(rule, state, past)
        state = combine(rule, state, [trained(rule, state, past, 50 + past)], [1.0], past, len(rule.steps(past)) - 1)
    state = after_gradients(rule, state, round)
    updates = [trained(rule, state, round, seed + k, rank=r if r != 4 else None) for k, r in enumerate(ranks)]
    return state, updates, combine(rule, state, updates, WEIGHTS[: len(ranks)], round, len(rule.steps(round)) - 1)


def mean(tensors, shares=SHARES):
    return sum(s * t.double() for s, t in zip(shares, tensors, strict=True))


def closest(whole, rank):
    u, s, vh = torch.linalg.svd(whole, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank]


@pytest.mark.parametrize("module", WIDTHS)
class TestFormulas:
    def test_fedit(self, module):
        _, updates, after = round_of("fedit")
        own = [update.pairs[module] for update in updates]
        expected = 2.0 * mean([p.b for p in own]) @ mean([p.a for p in own])
        assert gap(change(after, module), expected) < 1e-6
        # The error is the weighted covariance of the factors.
        a, b = mean([p.a for p in own]), mean([p.b for p in own])
        covariance = 2.0 * sum(s * (p.b - b) @ (p.a - a) for s, p in zip(SHARES, own, strict=True))
        assert gap(mean_change(updates, WEIGHTS, module) - expected, covariance) < 1e-6

    @pytest.mark.parametrize(("name", "round"), [("ffa", 0), ("ffa", 3), ("rolora", 0), ("rolora", 2)])
    def test_mean_of_b(self, module, name, round):
        before, updates, after = round_of(name, round)
        assert torch.equal(after.adapter.pairs[module].a, before.adapter.pairs[module].a)
        assert gap(after.adapter.pairs[module].b.double(), mean([u.pairs[module].b for u in updates])) < 1e-6

    @pytest.mark.parametrize(("name", "round"), [("rolora", 1), ("fedsa", 0)])
    def test_mean_of_a(self, module, name, round):
        before, updates, after = round_of(name, round)
        assert torch.equal(after.adapter.pairs[module].b, before.adapter.pairs[module].b)
        assert gap(after.adapter.pairs[module].a.double(), mean([u.pairs[module].a for u in updates])) < 1e-6

    @pytest.mark.parametrize("name", ["ffa", "rolora", "fedsvd", "fed-sb", "flora", "fedex"])
    def test_exact_rules_give_the_mean_of_the_products(self, module, name):
        assert RULES[name].exact
        _, updates, after = round_of(name)
        assert gap(change(after, module), mean_change(updates, WEIGHTS, module)) < 1e-6

    def test_fedex_keeps_the_means_in_the_adapter(self, module):
        _, _, after = round_of("fedex")
        _, _, plain = round_of("fedit")
        assert torch.equal(after.adapter.pairs[module].a, plain.adapter.pairs[module].a)
        assert torch.equal(after.adapter.pairs[module].b, plain.adapter.pairs[module].b)
        assert after.merged[module].rank == min(8, *WIDTHS[module])  # (n - 1) r, and never wider than the module

    def test_fedex_cut(self, module):
        _, updates, after = round_of("fedex", options={"keep": 2})
        missed = mean_change(updates, WEIGHTS, module) - dense(after.adapter.pairs[module])
        assert gap(dense(after.merged[module]), closest(missed, 2)) < 1e-5

    @pytest.mark.parametrize("name", ["flexlora", "fra", "fra-then-ffa"])
    @pytest.mark.parametrize("ranks", [(4, 4, 4), (1, 4, 2)])
    def test_best_adapter_of_the_rank(self, module, name, ranks):
        if name == "fra-then-ffa" and ranks != (4, 4, 4):
            ranks = (4, 4, 4)
        _, updates, after = round_of(name, ranks=ranks)
        assert gap(change(after, module), closest(mean_change(updates, WEIGHTS, module), 4)) < 1e-5

    def test_fra_then_ffa_changes_to_the_mean_of_b(self, module):
        before, updates, after = round_of("fra-then-ffa", 5)
        assert torch.equal(after.adapter.pairs[module].a, before.adapter.pairs[module].a)
        assert gap(change(after, module), mean_change(updates, WEIGHTS, module)) < 1e-6

    def test_flexlora_of_all_ranks_together_is_exact(self, module):
        _, updates, after = round_of("flexlora", options={"rank": 12}, ranks=(5, 5, 2))
        assert gap(change(after, module), mean_change(updates, WEIGHTS, module)) < 1e-6

    @pytest.mark.parametrize("ridge", [0.0, 0.01, 1.0])
    def test_lora_fair(self, module, ridge):
        _, updates, after = round_of("lora-fair", options={"ridge": ridge})
        own = [update.pairs[module] for update in updates]
        a, b = mean([p.a for p in own]), mean([p.b for p in own])
        missed = mean_change(updates, WEIGHTS, module) / 2.0 - b @ a
        gram = a @ a.T
        correction = missed @ a.T @ torch.linalg.inv(gram + ridge * gram.diagonal().mean() * torch.eye(4))
        assert gap(change(after, module), 2.0 * (b + correction) @ a) < 1e-5

    def test_fedsvd_rewrites_the_product(self, module):
        before, _, after = round_of("fedsvd")
        pair = after.adapter.pairs[module]
        torch.testing.assert_close(pair.a @ pair.a.T, torch.eye(4), atol=1e-5, rtol=0)
        b = pair.b.double()
        crossed = b.T @ b
        assert float((crossed - torch.diag(crossed.diagonal())).abs().max()) < 1e-5 * float(crossed.max())
        # Nothing outside the rows of the first A.
        rows = torch.linalg.qr(before.adapter.pairs[module].a.double().T).Q
        assert gap(pair.a.double() @ rows @ rows.T, pair.a.double()) < 1e-6

    @pytest.mark.parametrize("ranks", [(1, 4, 2), (4, 4, 4), (2, 3, 1)])
    def test_rbla_is_the_mean_over_those_who_have_the_row(self, module, ranks):
        before, updates, after = round_of("rbla", ranks=ranks)
        for row in range(4):
            held = [(w, u.pairs[module]) for w, u in zip(WEIGHTS, updates, strict=True) if u.pairs[module].rank > row]
            total = sum(w for w, _ in held)
            old = before.adapter.pairs[module]
            a = sum(w / total * p.a[row].double() for w, p in held) if held else old.a[row].double()
            b = sum(w / total * p.b[:, row].double() for w, p in held) if held else old.b[:, row].double()
            np.testing.assert_allclose(after.adapter.pairs[module].a[row], a, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(after.adapter.pairs[module].b[:, row], b, rtol=1e-5, atol=1e-6)

    def test_rbla_is_not_zero_padding(self, module):
        _, updates, after = round_of("rbla", ranks=(1, 4, 1))
        alone = updates[1].pairs[module]
        np.testing.assert_allclose(after.adapter.pairs[module].a[3], alone.a[3], rtol=1e-5)
        padded = WEIGHTS[1] / sum(WEIGHTS) * alone.a[3]
        assert float((after.adapter.pairs[module].a[3] - padded).norm()) > 0.5 * float(alone.a[3].norm())

    def test_rbla_canonical_puts_the_strongest_first(self, module):
        _, _, plain = round_of("rbla", ranks=(2, 4, 3))
        _, _, after = round_of("rbla", ranks=(2, 4, 3), options={"canonical": True})
        assert gap(change(after, module), change(plain, module)) < 1e-5
        cut = RULES["rbla"].start(after, 1, rank=2).pairs[module]
        assert gap(dense(cut), closest(change(plain, module), 2)) < 1e-5

    @pytest.mark.parametrize("ranks", [(4, 4, 4), (1, 4, 2)])
    def test_hetlora(self, module, ranks):
        _, updates, after = round_of("hetlora", ranks=ranks)
        sizes = [sum(float(torch.linalg.norm(dense(p)) ** 2) for p in u.pairs.values()) ** 0.5 for u in updates]
        shares = [size / sum(sizes) for size in sizes]
        a = mean(
            [torch.nn.functional.pad(u.pairs[module].a, (0, 0, 0, 4 - u.pairs[module].rank)) for u in updates], shares
        )
        b = mean([torch.nn.functional.pad(u.pairs[module].b, (0, 4 - u.pairs[module].rank)) for u in updates], shares)
        assert gap(change(after, module), 2.0 * b @ a) < 1e-6

    def test_fed_sb(self, module):
        before, updates, after = round_of("fed-sb")
        pair = before.adapter.pairs[module]
        core = mean([update.pairs[module].core for update in updates])
        assert gap(change(after, module), 2.0 * pair.b.double() @ core @ pair.a.double()) < 1e-6
        assert torch.equal(after.adapter.pairs[module].a, pair.a)

    def test_fedlrt_is_exact_before_the_cut(self, module):
        _, updates, after = round_of("fedlrt", options={"tolerance": 0.0})
        assert gap(change(after, module), mean_change(updates, WEIGHTS, module)) < 1e-5
        _, updates, cut = round_of("fedlrt", options={"tolerance": 0.3})
        error = gap(change(cut, module), mean_change(updates, WEIGHTS, module))
        assert 1e-3 < error <= 0.3 + 1e-6
        assert cut.adapter.pairs[module].rank < after.adapter.pairs[module].rank


@pytest.mark.parametrize("name", RULES)
def test_what_is_tuned_whole_is_a_plain_mean(name):
    before, updates, after = round_of(name)
    for head in HEAD:
        if name == "fedsa":
            assert torch.equal(after.adapter.extras[head], before.adapter.extras[head])
        else:
            assert gap(after.adapter.extras[head].double(), mean([u.extras[head] for u in updates])) < 1e-6


@pytest.mark.parametrize("name", [n for n in RULES if n != "fedsa"])
@pytest.mark.parametrize("round", [0, 1])
def test_the_error_is_the_dense_one(name, round):
    before, updates, after = round_of(name, round)
    found = aggregation_error(RULES[name], before, after, updates, WEIGHTS)
    off = whole = 0.0
    for module in WIDTHS:
        expected = mean_change(updates, WEIGHTS, module)
        kept = dense(before.merged[module]) if module in before.merged else 0.0
        off += float(torch.linalg.norm(change(after, module) - kept - expected) ** 2)
        whole += float(torch.linalg.norm(expected) ** 2)
    assert found == pytest.approx((off / whole) ** 0.5, rel=1e-3, abs=1e-7)
    if RULES[name].exact:
        assert found < 1e-6
    elif name != "fedlrt" and not (name == "fra-then-ffa" and round >= 5):
        assert found > 1e-3


def test_the_error_of_personal_models_is_not_known():
    before, updates, after = round_of("fedsa")
    assert aggregation_error(RULES["fedsa"], before, after, updates, WEIGHTS) is None


def test_the_error_goes_on_over_rounds_with_merged_changes():
    rule = RULES["flora"]
    state = rule.first(adapter(0), 5)
    for round in range(3):
        updates = [trained(rule, state, round, 10 * round + k) for k in range(3)]
        after = combine(rule, state, updates, WEIGHTS, round)
        assert aggregation_error(rule, state, after, updates, WEIGHTS) < 1e-6
        state = after
    assert state.merged["layers.0.v_proj"].rank == 6  # 36 stacked rows, squeezed to the module's width


def test_lora_fair_is_between_the_means_and_the_best():
    errors = {}
    for name in ("fedit", "lora-fair", "flexlora"):
        before, updates, after = round_of(name)
        errors[name] = aggregation_error(RULES[name], before, after, updates, WEIGHTS)
    assert errors["flexlora"] < errors["lora-fair"] < errors["fedit"]


def test_floras_weights_count_once():
    """Published code has put them on both factors, and on none."""
    _, updates, after = round_of("flora")
    name = "layers.0.q_proj"
    twice = sum(s * s * dense(u.pairs[name]) for s, u in zip(SHARES, updates, strict=True))
    never = sum(dense(u.pairs[name]) for u in updates)
    assert gap(change(after, name), twice) > 0.1
    assert gap(change(after, name), never) > 0.1


def test_flora_begins_anew_each_round_and_the_same_everywhere():
    before, _, after = round_of("flora")
    _, _, again = round_of("flora")
    _, _, other = round_of("flora", 1)
    for name, pair in after.adapter.pairs.items():
        assert not pair.b.any()
        assert torch.equal(pair.a, again.adapter.pairs[name].a)
        assert not torch.equal(pair.a, before.adapter.pairs[name].a)
        assert not torch.equal(pair.a, other.adapter.pairs[name].a)


class TestScalingTrap:
    """alpha/r differs between parties of different rank; whoever averages B without it gets another model."""

    def parties(self):
        return [adapter(1, rank=4, scale=16 / 4), adapter(2, rank=4, scale=4 / 4)]

    def test_factors_are_brought_to_one_scale(self):
        rule = RULES["fedit"]
        state = rule.first(adapter(0), 5)
        updates = self.parties()
        after = combine(rule, state, updates, [1.0, 1.0], 0)
        for name in WIDTHS:
            a = mean([u.pairs[name].a for u in updates], [0.5, 0.5])
            b = mean([u.pairs[name].b.double() * u.pairs[name].scale for u in updates], [0.5, 0.5])
            assert gap(change(after, name), b @ a) < 1e-6

    def test_without_it_the_result_is_another_model(self):
        rule = RULES["fedit"]
        updates = self.parties()
        state = rule.first(adapter(0), 5)
        planted = [u.map(lambda _, p: Pair(p.a, p.b, 2.0)) for u in updates]  # forgets alpha/r
        right, wrong = combine(rule, state, updates, [1.0, 1.0], 0), combine(rule, state, planted, [1.0, 1.0], 0)
        for name in WIDTHS:
            assert gap(change(wrong, name), change(right, name)) > 0.1

    @pytest.mark.parametrize("name", ["flora", "flexlora"])
    def test_exact_whatever_the_scales(self, name):
        rule = rule_named(name, {"rank": 12} if name == "flexlora" else {})
        template = adapter(0, rank=4)
        state = rule.first(template, 5)
        updates = [adapter(1, rank=4, scale=4.0), adapter(2, rank=1, scale=16.0), adapter(3, rank=2, scale=8.0)]
        after = combine(rule, state, updates, WEIGHTS, 0)
        for module in WIDTHS:
            assert gap(change(after, module), mean_change(updates, WEIGHTS, module)) < 1e-6


class TestPeftAsOracle:
    """`add_weighted_adapter` of PEFT: "cat" is the exact mean of the products, "linear" is not."""

    @pytest.fixture
    def parts(self):
        torch.manual_seed(0)
        base = nn.Sequential()
        base.add_module("one", nn.Linear(12, 10))
        base.add_module("two", nn.Linear(10, 6))
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["one", "two"])
        model = get_peft_model(base, config, adapter_name="p0")
        updates = [adapter(k + 1, widths={"one": (12, 10), "two": (10, 6)}) for k in range(3)]
        for k, update in enumerate(updates):
            if k:
                model.add_adapter(f"p{k}", config)
            tensors = adapter_from_update(Update(update.pairs), config)
            own = {name.replace(".weight", f".p{k}.weight"): tensor for name, tensor in tensors.items()}
            assert not model.load_state_dict(own, strict=False).unexpected_keys
        return model, updates

    def combined(self, parts, kind):
        model, _ = parts
        model.add_weighted_adapter(["p0", "p1", "p2"], SHARES, "mean", combination_type=kind)
        layers = {"one": model.base_model.model.one, "two": model.base_model.model.two}
        return {name: layer.get_delta_weight("mean").detach().double() for name, layer in layers.items()}

    @pytest.mark.parametrize("name", ["flora", "fedex"])
    def test_cat(self, parts, name):
        rule, updates = RULES[name], [Update(update.pairs) for update in parts[1]]
        after = combine(rule, rule.first(updates[0], 5), updates, WEIGHTS, 0)
        for module, delta in self.combined(parts, "cat").items():
            assert gap(change(after, module), delta) < 1e-6

    def test_svd(self, parts):
        rule, updates = RULES["flexlora"], [Update(update.pairs) for update in parts[1]]
        after = combine(rule, rule.first(updates[0], 5), updates, WEIGHTS, 0)
        for module, delta in self.combined(parts, "svd").items():
            assert gap(change(after, module), delta) < 1e-5

    def test_linear_is_neither_the_mean_of_products_nor_the_product_of_means(self, parts):
        rule, updates = RULES["fedit"], [Update(update.pairs) for update in parts[1]]
        after = combine(rule, rule.first(updates[0], 5), updates, WEIGHTS, 0)
        for module, delta in self.combined(parts, "linear").items():
            assert gap(change(after, module), delta) > 0.1
            assert gap(mean_change(updates, WEIGHTS, module), delta) > 0.1


class TestOneParty:
    """One party with weight 1 gets its own adapter back."""

    @pytest.mark.parametrize("weight", [1.0, 0.37])
    @pytest.mark.parametrize("round", [0, 1])
    @pytest.mark.parametrize(
        "name",
        ["rolora", "fedit", "ffa", "fedsa", "rbla", "hetlora", "flexlora", "fra", "fra-then-ffa", "fedex", "lora-fair"],
    )
    def test_bit_for_bit(self, name, round, weight):
        rule = RULES[name]
        state = rule.first(adapter(0), 5)
        own = trained(rule, state, round, 3)
        after = combine(rule, state, [own], [weight], round)
        assert same_bits(rule.start(after, round + 1, own=own), own)
        assert not after.merged

    def test_flora_bit_for_bit_in_what_it_merged(self):
        rule = RULES["flora"]
        state = rule.first(adapter(0), 5)
        own = trained(rule, state, 0, 3)
        after = combine(rule, state, [own], [1.0], 0)
        assert same_bits(Update(after.merged, after.adapter.extras), own)

    def test_fed_sb_bit_for_bit_in_its_cores(self):
        rule = RULES["fed-sb"]
        state = after_gradients(rule, rule.first(adapter(0), 5), 0)
        own = trained(rule, state, 0, 3)
        after = combine(rule, state, [own], [1.0], 0, 2)
        assert same_bits(after.adapter, own)
        assert all(torch.equal(pair.core, own.pairs[name].core) for name, pair in after.adapter.pairs.items())

    @pytest.mark.parametrize(("name", "within"), [("fedsvd", 1e-6), ("fedlrt", 0.011)])
    def test_the_same_change_where_factors_are_written_anew(self, name, within):
        rule = RULES[name]
        state = after_gradients(rule, rule.first(adapter(0), 5), 0)
        own = trained(rule, state, 0, 3)
        after = combine(rule, state, [own], [1.0], 0, len(rule.steps(0)) - 1)
        for module in WIDTHS:
            assert gap(change(after, module), dense(own.pairs[module])) < within
