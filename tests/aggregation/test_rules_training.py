"""Rules in rounds of real training: PEFT adapters on linear maps, whose loss is convex in the change of the weight."""

import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from splitfl.aggregation.core_training import gradients, trained_cores
from splitfl.aggregation.error import aggregation_error, agrees
from splitfl.aggregation.factors import Pair, Update
from splitfl.aggregation.peft_format import adapter_from_update, config_of, final_adapter, update_from_adapter
from splitfl.aggregation.rule import combine, mean_vector
from splitfl.aggregation.rules import RULES, rule_named
from splitfl.errors import ModelError
from tests.aggregation.parties import adapter, change, dense, gap, like, trained

D_IN, D_OUT, ROWS, RANK = 12, 10, 40, 4
CONFIG = LoraConfig(r=RANK, lora_alpha=8, target_modules=["one"])


class Party:
    """Rows of its own, seen through directions of its own; one map for all is behind them."""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        skew = torch.linspace(0.3, 2.0, D_IN)[torch.randperm(D_IN, generator=generator)]
        self.x = torch.randn(ROWS, D_IN, generator=generator) * skew
        self.y = self.x @ TARGET.T

    def loss(self, model):
        return ((model(self.x) - self.y) ** 2).mean()


def _target():
    generator = torch.Generator().manual_seed(99)
    return torch.randn(D_OUT, 3, generator=generator) @ torch.randn(3, D_IN, generator=generator) / 3


TARGET = _target()
PARTIES = [Party(seed) for seed in range(3)]
WEIGHTS = [1.0, 2.0, 1.0]


def model_with(update):
    """The base model (zero) with the adapter `update`, and PEFT's configuration for it."""
    base = nn.Sequential()
    base.add_module("one", nn.Linear(D_IN, D_OUT, bias=False))
    nn.init.zeros_(base.one.weight)
    config = config_of(update, CONFIG)
    model = get_peft_model(base, config)
    set_peft_model_state_dict(model, adapter_from_update(update, config))
    return model, config


def template():
    torch.manual_seed(0)
    base = nn.Sequential()
    base.add_module("one", nn.Linear(D_IN, D_OUT, bias=False))
    return update_from_adapter(get_peft_model_state_dict(get_peft_model(base, CONFIG)), CONFIG)


def whole_loss(state):
    weight = change(state, "one").float()
    own = [float(((p.x @ weight.T - p.y) ** 2).mean()) for p in PARTIES]
    return sum(w * loss for w, loss in zip(WEIGHTS, own, strict=True)) / sum(WEIGHTS)


def gradient(party, update):
    model, _ = model_with(update)
    party.loss(model).backward()
    return gradients(model, update)


def trained_core(party, update, *, rate, steps, correction=None):
    model, _ = model_with(update)
    with trained_cores(model, update) as now:
        trainable = [p for p in model.parameters() if p.requires_grad]
        assert [tuple(p.shape) for p in trainable] == [(update.pairs["one"].rank,) * 2]
        optimiser = torch.optim.SGD(trainable, lr=rate)
        for _ in range(steps):
            optimiser.zero_grad()
            party.loss(model).backward()
            if correction is not None:
                trainable[0].grad += correction["one"]
            optimiser.step()
        return now()


def trained_factors(party, update, part, merged, *, rate=0.02, steps=15):
    model, config = model_with(update)
    if merged is not None:
        model.base_model.model.one.base_layer.weight.data = dense(merged).float()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(("lora_A" in name and part != "B") or ("lora_B" in name and part != "A"))
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        optimiser.zero_grad()
        party.loss(model).backward()
        optimiser.step()
    return update_from_adapter(get_peft_model_state_dict(model), config)


FACTOR_RULES = [name for name in RULES if name not in ("fed-sb", "fedlrt", "fedsa")]


@pytest.mark.parametrize("name", FACTOR_RULES)
def test_rounds_of_training_bring_the_loss_down(name):
    rule = RULES[name]
    state = rule.first(template(), 3)
    first = whole_loss(state)
    for round in range(8):
        start = rule.start(state, round)
        updates = [trained_factors(p, start, rule.trains(round), state.merged.get("one")) for p in PARTIES]
        after = combine(rule, state, updates, WEIGHTS, round)
        error = aggregation_error(rule, state, after, updates, WEIGHTS)
        assert error < (1e-5 if rule.exact else 1.0), "merged changes are rounded, and large beside the last ones"
        state = after
    assert whole_loss(state) < (0.75 if name in ("ffa", "fedsvd") else 0.2) * first
    tensors, config = final_adapter(state, CONFIG)
    model, _ = model_with(update_from_adapter(tensors, config))
    x = PARTIES[0].x
    torch.testing.assert_close(model(x), x @ change(state, "one").float().T, atol=1e-4, rtol=1e-4)


def test_fedsas_own_models_learn():
    rule = RULES["fedsa"]
    state, own = rule.first(template(), 3), [None] * 3
    losses = []
    for round in range(6):
        starts = [rule.start(state, round, own=mine) for mine in own]
        own = [trained_factors(p, s, "both", None) for p, s in zip(PARTIES, starts, strict=True)]
        state = combine(rule, state, own, WEIGHTS, round)
        mine = [rule.start(state, round + 1, own=o) for o in own]
        losses.append(sum(p.loss(model_with(m)[0]).item() for p, m in zip(PARTIES, mine, strict=True)))
    assert losses[-1] < 0.2 * losses[0]


class TestFeDLRT:
    def rounds(self, rule, count, *, corrected=True, rate=0.02, steps=5):
        state = rule.first(template(), 3)
        losses, ranks = [whole_loss(state)], []
        for round in range(count):
            start = rule.start(state, round, 0)
            vectors = [rule.vector(state, gradient(p, start), round, 0) for p in PARTIES]
            own = [rule.own_gradient(state, vector) for vector in vectors]
            state = rule.from_mean(state, mean_vector(vectors, WEIGHTS), round, 0)
            start = rule.start(state, round, 1)
            updates = [
                trained_core(
                    p, start, rate=rate, steps=steps, correction=rule.correction(state, mine) if corrected else None
                )
                for p, mine in zip(PARTIES, own, strict=True)
            ]
            state = combine(rule, state, updates, WEIGHTS, round, 1)
            losses.append(whole_loss(state))
            ranks.append(state.adapter.pairs["one"].rank)
        return losses, ranks

    def test_the_loss_never_grows_and_the_rank_finds_that_of_the_target(self):
        rule = rule_named("fedlrt", {"tolerance": 1e-3, "max_rank": 8})
        losses, ranks = self.rounds(rule, 25, steps=15)
        assert all(later <= earlier * (1 + 1e-5) for earlier, later in itertools.pairwise(losses))
        assert losses[-1] < 0.02 * losses[0]
        assert max(ranks) <= 8
        assert ranks[-1] == 3

    def test_the_gradients_are_those_of_the_weight(self):
        """What the probe gives, against the dense gradient."""
        rule = RULES["fedlrt"]
        state = rule.first(template(), 3)
        state = combine(rule, state, [gradient(p, rule.start(state, 0, 0)) for p in PARTIES], WEIGHTS, 0, 0)
        core = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)) / 8
        state = combine(
            rule, state, [rule.start(state, 0, 1).map(lambda _, p: Pair(p.a, p.b, p.scale, core))], [1.0], 0, 1
        )
        pair, party = state.adapter.pairs["one"], PARTIES[1]
        weight = change(state, "one").requires_grad_()
        ((party.x.double() @ weight.T - party.y.double()) ** 2).mean().backward()
        g, b, a = weight.grad, pair.b.double(), pair.a.double()
        vector = rule.vector(state, gradient(party, rule.start(state, 1, 0)), 1, 0)
        right, left, inner = (2.0 * t for t in (g @ a.T, b.T @ g, b.T @ g @ a.T))
        expected = torch.cat([right.reshape(-1), left.reshape(-1), inner.reshape(-1)])
        assert gap(torch.from_numpy(vector).double(), expected) < 1e-5
        assert gap(rule.own_gradient(state, vector)["one"].double(), inner) < 1e-5

    def test_bases_stay_orthonormal_and_the_old_ones_stay(self):
        rule = RULES["fedlrt"]
        before = rule.first(template(), 3)
        after = combine(rule, before, [gradient(p, rule.start(before, 0, 0)) for p in PARTIES], WEIGHTS, 0, 0)
        pair = after.adapter.pairs["one"]
        assert pair.rank == 8
        torch.testing.assert_close(pair.a @ pair.a.T, torch.eye(8), atol=1e-5, rtol=0)
        torch.testing.assert_close(pair.b.T @ pair.b, torch.eye(8), atol=1e-5, rtol=0)
        assert torch.equal(pair.a[:4], before.adapter.pairs["one"].a)
        assert torch.equal(pair.b[:, :4], before.adapter.pairs["one"].b)

    def test_corrections_of_all_parties_cancel(self):
        rule = RULES["fedlrt"]
        state = rule.first(template(), 3)
        vectors = [rule.vector(state, gradient(p, rule.start(state, 0, 0)), 0, 0) for p in PARTIES]
        own = [rule.own_gradient(state, vector) for vector in vectors]
        state = rule.from_mean(state, mean_vector(vectors, WEIGHTS), 0, 0)
        total = sum(w * rule.correction(state, mine)["one"] for w, mine in zip(WEIGHTS, own, strict=True))
        assert float(total.abs().max()) < 1e-5

    def test_corrected_all_parties_begin_in_the_same_direction(self):
        rule = RULES["fedlrt"]
        state = rule.first(template(), 3)
        vectors = [rule.vector(state, gradient(p, rule.start(state, 0, 0)), 0, 0) for p in PARTIES]
        own = [rule.own_gradient(state, vector) for vector in vectors]
        state = rule.from_mean(state, mean_vector(vectors, WEIGHTS), 0, 0)
        start, begun = rule.start(state, 0, 1), []
        for party, mine in zip(PARTIES, own, strict=True):
            moved = trained_core(party, start, rate=1.0, steps=1, correction=rule.correction(state, mine))
            begun.append(moved.pairs["one"].core[:4, :4])
        assert float(begun[0].abs().max()) > 0.01
        torch.testing.assert_close(begun[1], begun[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(begun[2], begun[0], atol=1e-5, rtol=1e-4)

    def test_the_correction_is_what_keeps_long_local_training_together(self):
        rule = rule_named("fedlrt", {"tolerance": 1e-3, "max_rank": 8})
        corrected, _ = self.rounds(rule, 6, steps=30)
        alone, _ = self.rounds(rule, 6, steps=30, corrected=False)
        assert all(ours < theirs for ours, theirs in zip(corrected[1:], alone[1:], strict=True))
        assert corrected[-1] < 0.9 * alone[-1]


class TestFedSB:
    def begun(self):
        rule = RULES["fed-sb"]
        state = rule.first(template(), 3)
        for step in range(2):
            start = rule.start(state, 0, step)
            state = combine(rule, state, [gradient(p, start) for p in PARTIES], WEIGHTS, 0, step)
        return rule, state

    def test_its_factors_are_directions_of_the_mean_gradient(self):
        _, state = self.begun()
        weight = torch.zeros(D_OUT, D_IN, dtype=torch.float64, requires_grad=True)
        for party, share in zip(PARTIES, WEIGHTS, strict=True):
            (share / 4 * ((party.x.double() @ weight.T - party.y.double()) ** 2).mean()).backward()
        pair = state.adapter.pairs["one"]
        inside = pair.b.double() @ pair.b.double().T @ weight.grad @ pair.a.double().T @ pair.a.double()
        assert gap(inside, weight.grad) < 0.05  # of rank 3, as the target; four directions are taken
        assert not dense(pair).any()
        # Singular vectors, strongest first, and not any basis of that space.
        between = pair.b.double().T @ weight.grad @ pair.a.double().T
        strengths = between.diagonal()
        assert float((between - torch.diag(strengths)).abs().max()) < 1e-4 * float(strengths[0])
        assert (strengths[:-1] >= strengths[1:]).all()

    def test_rounds_bring_the_loss_down_further_than_random_factors(self):
        last = {}
        for name in ("gradient", "random"):
            rule = rule_named("fed-sb", {"start_from": name})
            _, state = self.begun() if name == "gradient" else (None, rule.first(template(), 3))
            first = whole_loss(state)
            for round in range(6):
                step = len(rule.steps(round)) - 1
                start = rule.start(state, round, step)
                updates = [trained_core(p, start, rate=0.1, steps=20) for p in PARTIES]
                after = combine(rule, state, updates, WEIGHTS, round, step)
                assert aggregation_error(rule, state, after, updates, WEIGHTS) < 1e-6
                state = after
            last[name] = whole_loss(state) / first
        assert last["gradient"] < 0.3
        assert last["gradient"] < 0.5 * last["random"]


class TestCoreTraining:
    def update(self):
        generator = torch.Generator().manual_seed(1)
        shapes = ((4, D_IN), (D_OUT, 4), (4, 4))
        a, b, core = (torch.randn(*shape, generator=generator) for shape in shapes)
        return Update({"one": Pair(a, b, 2.0, core)})

    def test_the_model_computes_the_same_inside_and_after(self):
        update = self.update()
        model, _ = model_with(Update({"one": update.pairs["one"].without_core()}))
        x, kinds = PARTIES[0].x, [(n, p.requires_grad) for n, p in model.named_parameters()]
        expected = x @ dense(update.pairs["one"]).float().T
        with trained_cores(model, update) as now:
            torch.testing.assert_close(model(x), expected, atol=1e-3, rtol=1e-4)
            assert torch.equal(now().pairs["one"].core, update.pairs["one"].core)
        torch.testing.assert_close(model(x), expected, atol=1e-3, rtol=1e-4)
        assert sorted((n, p.requires_grad) for n, p in model.named_parameters()) == sorted(kinds)
        saved = update_from_adapter(get_peft_model_state_dict(model), CONFIG)
        assert gap(dense(saved.pairs["one"]), dense(update.pairs["one"])) < 1e-6

    def test_training_leaves_the_given_update_as_it_is(self):
        update = self.update()
        begun = trained_core(PARTIES[0], update, rate=0.0, steps=1)
        moved = trained_core(PARTIES[0], update, rate=0.1, steps=3)
        assert torch.equal(begun.pairs["one"].core, update.pairs["one"].core)
        assert not torch.equal(moved.pairs["one"].core, update.pairs["one"].core)
        assert torch.equal(update.pairs["one"].core, self.update().pairs["one"].core)
        assert torch.equal(update.pairs["one"].b, self.update().pairs["one"].b)

    def test_an_adapter_that_does_not_fit_is_refused_and_nothing_is_left_changed(self):
        update = self.update()
        model, _ = model_with(Update({"one": update.pairs["one"].without_core()}))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with (
            pytest.raises(ModelError, match="another rank or scale"),
            trained_cores(model, update.map(lambda _, p: Pair(p.a, p.b, 1.0, p.core))),
        ):
            pass
        with (
            pytest.raises(ModelError, match="no LoRA layer at two"),
            trained_cores(model, Update({"two": update.pairs["one"]})),
        ):
            pass
        with (
            pytest.raises(ModelError, match="no core"),
            trained_cores(model, Update({"one": update.pairs["one"].without_core()})),
        ):
            pass
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class LargestTensor(TorchDispatchMode):
    """Remembers how many values the largest tensor had that any operation made."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.values = max(self.values, tensor.numel())
        return made


def test_the_watch_sees_a_dense_product():
    with LargestTensor() as watch:
        dense(Pair(torch.ones(2, 50), torch.ones(40, 2)))
    assert watch.values == 40 * 50


@pytest.mark.parametrize("name", RULES)
def test_no_rule_forms_a_product(name):
    rule, wide, parties, rank = RULES[name], (500, 400), 3, 4
    state = rule.first(adapter(0, widths={"one": wide}, rank=rank), 3)
    with LargestTensor() as watch:
        for step in range(len(rule.steps(0))):
            updates = [like(k, rule.start(state, 0, step)) for k in range(parties)]
            if rule.steps(0)[step].does == "train":
                updates = [trained(rule, state, 0, k) for k in range(parties)]
            before, state = state, combine(rule, state, updates, WEIGHTS, 0, step)
        aggregation_error(rule, before, state, updates, WEIGHTS)
        agrees(before, state)
    # Twice the ranks of all and of the state, of the wider side; what is tuned whole is smaller.
    assert watch.values <= 2 * (parties + 2) * 3 * rank * max(wide) < wide[0] * wide[1]


@pytest.mark.slow
def test_a_large_set_goes_through_fra():
    """Eight modules of a 7B model, 4096 x 4096, ten parties, r = 16: a dense product would be 134 MB a module."""
    widths = {f"layers.{k}.q_proj": (4096, 4096) for k in range(8)}
    updates = [adapter(k, rank=16, widths=widths) for k in range(10)]
    state = RULES["fra"].first(updates[0], 3)
    with LargestTensor() as watch:
        after = RULES["fra"].from_all(state, updates, [1.0] * 10, 0)
    assert after.adapter.ranks == {16}
    assert watch.values == 10 * 16 * 4096
    error = aggregation_error(RULES["fra"], state, after, updates, [1.0] * 10)
    # 160 directions of about the same strength, of which 16 are kept.
    assert error == pytest.approx((1 - 16 / 160) ** 0.5, abs=0.05)
