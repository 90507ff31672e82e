"""What the worker of `splitfl bench rules` computes: federations of tiny models, against training by hand."""

from __future__ import annotations

import copy

import msgspec
import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from party.rules_course import Federation, _batches
from party.rules_model import Ground, MeanOfTokens
from party.rules_side import Worker
from splitfl.aggregation.factors import Pair
from splitfl.aggregation.peft_format import update_from_adapter
from splitfl.aggregation.rules import RULES
from splitfl.aggregation.state import State
from splitfl.bench.rules_cases import (
    AFTER,
    ALL,
    BEFORE,
    DOWN,
    ERROR,
    HEAD,
    KEPT,
    LOCAL,
    OWN,
    POOLED,
    SECONDS,
    UP,
    VALIDATION,
    WORST,
    Setting,
    of_round,
    rule_of,
)
from splitfl.bench.rules_orders import OpenTask, PartyFiles, RunRule
from tests.live.models import answer_rows, save_tiny, sentences, whole_model, write_jsonl

# ---- a federation


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rules")


def opening(folder, family, *, tuned_layers, parties=2):
    """The order for a tiny model and a few rows, dealt out to the parties."""
    kind = "causal-lm" if family == "llama" else "sequence-classification"
    model = folder / family
    if not model.exists():
        save_tiny(family, model)
    rows = answer_rows() if family == "llama" else [
        {"text": text, "label": int(label == "praise")} for text, label in sentences()
    ]  # fmt: skip
    files = []
    for number in range(parties):
        own = rows[number::parties]
        parts = {"train": own[:12], "validation": own[12:15], "held_out": own[15:20]}
        named = {what: write_jsonl(folder / f"{family}-{number}-{what}.jsonl", part) for what, part in parts.items()}
        files.append(PartyFiles(**{what: str(path) for what, path in named.items()}))
    return OpenTask(
        task="answers" if family == "llama" else "polarity", model=str(model), kind=kind,
        classes=0 if family == "llama" else 2, tuned_layers=tuned_layers, max_length=64, parties=tuple(files),
    )  # fmt: skip


@pytest.fixture(scope="module")
def llama(folder):
    return Ground(opening(folder, "llama", tuned_layers=2))


@pytest.fixture(scope="module")
def bert(folder):
    return Ground(opening(folder, "bert", tuned_layers=2))


def federation(ground, name, *, seed=3, rounds=2, local_steps=2, parties=None, rate=0.01, **given):
    rule = rule_of(Setting(task="answers", rule=name), rounds)
    made = Federation(
        ground, ground.model(seed), rule, parties or ground.parties, rate=rate, batch=3, seed=seed, **given
    )
    made.run(rounds, local_steps)
    return made


def whole_of(ground, tuned):
    """The library's own model with the adapter that `tuned` has now: nothing is remembered, every layer is computed."""
    options = {"num_labels": 2} if ground.order.classes else {}
    whole = whole_model(ground.folder, ground.plan.task, dtype=torch.float32, **options)
    if hasattr(whole.base_model, "pooler"):
        whole.base_model.pooler = MeanOfTokens()
    model = get_peft_model(whole, copy.deepcopy(tuned.model.peft_config["default"])).eval()
    set_peft_model_state_dict(model, get_peft_model_state_dict(tuned.model))
    return model


def whole_loss(ground, model, rows):
    batch = ground.collator(rows)
    batch.pop("row")
    if hasattr(model.base_model.model.base_model, "pooler"):
        model.base_model.model.base_model.pooler.mask = batch["attention_mask"]
    return model(**batch).loss


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_what_is_remembered_of_the_lower_layers_changes_nothing(name, request):
    ground = request.getfixturevalue(name)
    tuned = ground.model(0)
    generator = torch.Generator().manual_seed(1)
    update = tuned.template.map(
        lambda _, pair: Pair(pair.a, 0.1 * torch.randn(pair.b.shape, generator=generator), pair.scale)
    )
    tuned.load(State(adapter=update), update)
    whole = whole_of(ground, tuned)
    rows = [*ground.parties[0].train[:3], *ground.parties[1].held_out[:2]]
    gradients = []
    for model, loss in ((tuned.model, tuned.loss(ground.collator, rows)), (whole, whole_loss(ground, whole, rows))):
        loss.backward()
        gradients.append([loss.detach()] + [p.grad for n, p in model.named_parameters() if "lora_" in n])
    assert len(gradients[0]) == len(gradients[1]) > 10
    for one, other in zip(*gradients, strict=True):
        assert float(other.norm()) > 0
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_party_alone_is_trained_as_by_hand(name, request):
    """AdamW anew in each round with half of the rate in the second of two, gradients clipped, the same batches."""
    ground = request.getfixturevalue(name)
    party, seed, rate, head_rate = ground.parties[1], 3, 0.01, 0.02
    made = federation(ground, "fedit", parties=[party], seed=seed, rate=rate, head_rate=head_rate)
    tuned = ground.model(seed)
    first = RULES["fedit"].first(tuned.template, seed)
    tuned.load(first, first.adapter)
    model = whole_of(ground, tuned)
    batches = _batches(party.train, 3, party.number, seed)
    for part in (1.0, 0.5):
        groups = [
            {"params": [p for n, p in model.named_parameters() if p.requires_grad and ("lora_" in n) == lora], "lr": lr}
            for lora, lr in ((True, rate * part), (False, head_rate * part))
        ]
        optimiser = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
        for _ in range(2):
            optimiser.zero_grad()
            whole_loss(ground, model, next(batches)).backward()
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
            optimiser.step()
    by_hand = update_from_adapter(get_peft_model_state_dict(model), model.peft_config["default"])
    for module, pair in by_hand.pairs.items():
        own = made.state.adapter.pairs[module]
        learnt = first.adapter.pairs[module]
        for one, other, begun in ((own.a, pair.a, learnt.a), (own.b, pair.b, learnt.b)):
            assert float((one - other).norm()) < 1e-2 * float((other - begun).norm()), "up to the order of sums"
    for module, tensor in by_hand.extras.items():
        torch.testing.assert_close(made.state.adapter.extras[module], tensor, atol=2e-5, rtol=1e-3)
        assert not torch.equal(tensor, first.adapter.extras[module])


def test_rules_that_are_the_same_here_end_alike(llama):
    by_name = {name: federation(llama, name) for name in ("fra", "flexlora", "rbla", "fedit", "fedex")}
    assert by_name["fra"].state.digest == by_name["flexlora"].state.digest
    assert by_name["rbla"].state.digest == by_name["fedit"].state.digest, "one rank for all"
    assert by_name["fedit"].state.digest != by_name["fedex"].state.digest


@pytest.mark.parametrize("name", [name for name in RULES if name != "fra"])
def test_every_rule_learns_and_says_what_crossed(name, bert):
    made = federation(bert, name, local_steps=2, rate=0.03 if RULES[name].trains(1) == "core" else 0.01)
    told, rule = made.told, made.rule
    assert len(told.up) == len(told.down) == len(told.validation) == len(told.aggregator) == 2
    assert made.state.digest != rule.first(made.tuned.template, 3).digest
    lengths = made.state.layout
    if name in ("rolora", "ffa", "fedsvd"):
        assert told.up[0] == told.down[0] == lengths.length("B")
    if name == "fedsa":
        assert told.up == [lengths.length("A", extras=False)] * 2
    if not rule.by_mean(0):
        assert told.up[0] == lengths.length("both")
        assert told.down[0] >= told.up[0]
    if rule.no_global:
        assert told.errors == [None, None]
    elif rule.exact:
        assert max(told.errors) < 1e-5
    else:
        assert 0 < max(told.errors) < 1
    extra = {"fedlrt": 4, "fed-sb": 4}.get(name, 0)  # batches whose gradient is taken without a step
    assert made.passes == 4 + extra


def test_parties_of_lower_rank_train_and_send_theirs(llama):
    exact = federation(llama, "flora", ranks=(8, 2))
    assert max(exact.told.errors) < 1e-5
    for name in ("rbla", "hetlora", "flexlora"):
        made = federation(llama, name, ranks=(8, 2))
        assert [update.ranks for update in made.own] == [{8}, {2}]
        assert made.told.up == exact.told.up or name == "rbla"
        made.after_steps(1)
        assert made.score(llama.parties[1].held_out).counted > 0


def test_a_part_that_stays_at_home_makes_the_partys_own_model(llama):
    made = federation(llama, "fedsa")
    found = []
    for number in made.models(2):
        found.append(made.score(llama.parties[number].held_out).loss)
        update = made.tuned.update()
        assert all(torch.equal(pair.a, made.state.adapter.pairs[name].a) for name, pair in update.pairs.items())
        assert all(torch.equal(pair.b, made.own[number].pairs[name].b) for name, pair in update.pairs.items())
    assert len(set(found)) == 2


# ---- the worker


@pytest.fixture(scope="module")
def worker(folder):
    made = Worker()
    for family in ("llama", "bert"):
        opened = made.answer(opening(folder, family, tuned_layers=2))
        assert (opened.train_rows, opened.validation_rows, opened.held_out_rows) == ((12, 12), (3, 3), (5, 5))
    return made


def order(rule, *, task="answers", rate=0.01, ranks=()):
    return RunRule(task=task, rule=rule, ranks=ranks, rate=rate, seed=0, rounds=2, local_steps=1, batch=3)


def test_a_run_answers_with_its_figures(worker):
    figures = worker.answer(order("fedex")).figures
    assert {BEFORE, ALL, OWN, WORST, AFTER, VALIDATION, KEPT, ERROR, UP, DOWN, SECONDS} < figures.keys()
    assert figures[ALL] == figures[OWN] < figures[BEFORE], "one model for all, and a loss"
    assert figures[WORST] > figures[OWN]
    assert figures[VALIDATION] == figures[of_round(VALIDATION, 2)] < figures[of_round(VALIDATION, 0)]
    assert figures == worker.answer(order("fedex")).figures | {
        name: figures[name] for name in (SECONDS, "aggregator")
    }, "the same again but for time"


def test_references_combine_nothing(worker):
    local, pooled = (worker.answer(order(name)).figures for name in (LOCAL, POOLED))
    assert ERROR not in local
    assert local[OWN] == local[AFTER] != local[ALL]
    assert pooled[OWN] == pooled[ALL]
    assert {local[BEFORE], pooled[BEFORE]} == {worker.answer(order("ffa")).figures[BEFORE]}
    head = worker.answer(order(HEAD, task="polarity", rate=0.0)).figures
    assert head[of_round(VALIDATION, 0)] == head[of_round(VALIDATION, 2)], "without a rate for the head nothing moves"
    moved = worker.answer(msgspec.structs.replace(order(HEAD, task="polarity", rate=0.0), head_rate=0.01)).figures
    assert moved[of_round(VALIDATION, 2)] < head[of_round(VALIDATION, 2)]


def test_a_rate_at_which_numbers_end_is_a_failed_run(worker):
    run = worker.answer(order("fedit", rate=1e30))
    assert run.figures == {}
    assert "not finite" in run.failed
