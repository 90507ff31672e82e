"""DP-SGD on an adapter: gradients by row, clipping, noise, Poisson batches, and what is said about epsilon."""

from __future__ import annotations

import copy
import math

import dp_accounting
import pytest
import torch
from dp_accounting.pld import PLDAccountant
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch import nn
from transformers import TrainingArguments

from party.private_plan import TAIL, AdapterClaim, adapter_rho, epsilon_of, noise_for, plan_private
from party.private_sgd import (
    PoissonSampler,
    PrivateGradient,
    PrivateTrainer,
    freeze_a,
    gaussian_noise,
    grouped,
    losses_by_row,
    training_arguments,
)
from party.rundir import RunDirectory
from party.trainer import SplitTrainer
from splitfl.adapters import add_lora, lora_config
from splitfl.cut import Plan, find_stack
from splitfl.data import Collator
from splitfl.errors import InternalError, ModelError, UsageError
from splitfl.privacy.calibration import zcdp_epsilon
from tests.families import VOCAB, make_config, make_model
from tests.small_tokenizers import bpe

HUGE = 1e6
LENGTHS = (9, 4, 12, 7, 5, 12, 3)


def cut_of(base, task="causal-lm"):
    stack, layers = find_stack(base.base_model)
    return Plan(
        model_type=base.config.model_type, task=task, layers=len(layers), bottom=2, top=2, stack=stack,
        returns_tuple=False, width=32, dtype="float32", layer_types=(), tied=False, max_length=128, trunk="",
    )  # fmt: skip


def adapted(family, *, seed=3, task="causal-lm"):
    """A tiny model with an adapter that changes what it says, in training mode."""
    torch.manual_seed(seed)
    encoder = task != "causal-lm"
    base = make_model(make_config(family), encoder=encoder).requires_grad_(False)
    cut = cut_of(base, task)
    model = add_lora(base, lora_config(base, cut, r=4, target_modules=["all-linear"]), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return model.train()


def rows_of(lengths=LENGTHS, *, seed=1, task="causal-lm"):
    """Examples of token ids; the first third of each is a prompt."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number, length in enumerate(lengths):
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        labels = [-100 if at < length // 3 else token for at, token in enumerate(ids)]
        label = number % 2 if task != "causal-lm" else labels
        found.append({"input_ids": ids, "attention_mask": [1] * length, "labels": label, "row": number})
    return found


def private(model, *, noise=0.0, clip=HUGE, expected=1.0, rows_at_once=100, task="causal-lm"):
    collator = Collator(bpe(), pad_token_id=0)
    return PrivateGradient(
        model, noise_multiplier=noise, clip=clip, expected=expected, rows_at_once=rows_at_once, collator=collator,
        task=task,
    )  # fmt: skip


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def apart(one, other):
    """The distances between the tuned values of two models, as one vector."""
    pairs = zip(trained(one), trained(other), strict=True)
    return torch.cat([(a.detach() - b.detach()).abs().reshape(-1) for a, b in pairs])


def gradient(model, gradients, units):
    """One flat vector of what `PrivateGradient` leaves in ``grad``."""
    gradients.compute(units)
    return torch.cat([p.grad.reshape(-1) for p in trained(model)]).double()


def one_by_one(model, unit, task="causal-lm"):
    """The gradient of a unit from passes over one row each, without padding or hooks."""
    parameters, total = trained(model), None
    for row in unit:
        ids = torch.tensor([row["input_ids"]])
        logits = model(input_ids=ids).logits
        if task == "causal-lm":
            loss = nn.functional.cross_entropy(logits[0, :-1], torch.tensor(row["labels"])[1:])
        else:
            loss = nn.functional.cross_entropy(logits, torch.tensor([row["labels"]]))
        found = torch.autograd.grad(loss / len(unit), parameters)
        flat = torch.cat([each.reshape(-1) for each in found]).double()
        total = flat if total is None else total + flat
    return total


CASES = [
    ("llama", "causal-lm"), ("gpt2", "causal-lm"), ("opt", "causal-lm"), ("bloom", "causal-lm"),
    ("gemma3", "causal-lm"), ("gpt_neox", "causal-lm"), ("falcon", "causal-lm"), ("bert", "sequence-classification"),
    ("roberta", "sequence-classification"), ("distilbert", "sequence-classification"),
]  # fmt: skip


# ---- the gradient


@pytest.mark.parametrize(("family", "task"), CASES, ids=[case[0] for case in CASES])
def test_it_is_the_sum_of_clipped_gradients_computed_one_by_one(family, task):
    model = adapted(family, task=task)
    rows = rows_of(task=task)
    alone = torch.stack([one_by_one(copy.deepcopy(model), [row], task) for row in rows])
    norms = alone.norm(dim=1)
    clip = math.sqrt(float(norms.min()) * float(norms.max()))
    assert clip > 1.1 * float(norms.min()), "the clip must matter for some"
    for bound in (HUGE, clip):
        factors = (bound / norms).clamp(max=1.0)
        expected = (alone * factors[:, None]).sum(0) / 3.5
        twin = copy.deepcopy(model)
        came = gradient(twin, private(twin, clip=bound, expected=3.5, task=task), [[row] for row in rows])
        assert (came - expected).norm() < 1e-4 * expected.norm()


def test_rows_of_one_person_count_together():
    model, rows = adapted("llama"), rows_of()
    units = [rows[:4], rows[4:5], rows[5:]]
    alone = torch.stack([one_by_one(model, unit) for unit in units])
    clip = float(alone.norm(dim=1).median())
    expected = (alone * (clip / alone.norm(dim=1)).clamp(max=1.0)[:, None]).sum(0)
    for rows_at_once in (1, 2, 3, 100):  # within a person, across persons, all at once
        twin = copy.deepcopy(model)
        came = gradient(twin, private(twin, clip=clip, rows_at_once=rows_at_once), units)
        assert (came - expected).norm() < 1e-4 * expected.norm(), rows_at_once


def test_one_unit_more_or_less_moves_the_sum_by_no_more_than_the_clip():
    """The sensitivity that the accounting is about, whatever else is in the batch; a long row and a tiny clip too."""
    model = adapted("llama")
    clip = 0.05
    gradients = private(model, clip=clip, rows_at_once=3)
    rows = rows_of((5, 40, 3, 8, 21, 2), seed=9)
    units = [[rows[0], rows[1]], [rows[2]], [rows[3]], [rows[4], rows[5]]]
    whole = gradient(model, gradients, units)
    for left_out in range(len(units)):
        rest = units[:left_out] + units[left_out + 1 :]
        moved = float((gradient(model, gradients, rest) - whole).norm())
        assert 0.5 * clip < moved <= clip * (1 + 1e-4)


def test_a_row_s_gradient_does_not_depend_on_the_rows_beside_it():
    model = adapted("llama")
    gradients = private(model)
    short, long = rows_of((4, 60))
    both, one, other = (gradient(model, gradients, units) for units in ([[short], [long]], [[short]], [[long]]))
    assert (both - one - other).norm() < 1e-5 * both.norm()


def test_losses_are_means_over_a_row_s_own_tokens():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(3, 5, 11, generator=generator), torch.randint(0, 11, (3, 5), generator=generator)
    labels[0, 3:], labels[1, :2] = -100, -100
    for row in range(3):
        expected = nn.functional.cross_entropy(logits[row, :-1], labels[row, 1:])
        assert losses_by_row(logits, labels, "causal-lm")[row].item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_frozen_first_matrix_is_left_as_it_is():
    model = adapted("llama")
    freeze_a(model)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names
    assert all(".lora_B." in name for name in names)
    rows = rows_of()
    expected = sum(one_by_one(model, [row]) for row in rows)
    gradients = private(model)
    assert (gradient(model, gradients, [[row] for row in rows]) - expected).norm() < 1e-4 * expected.norm()


def test_a_parameter_that_comes_later_is_refused_and_not_trained_without_noise():
    model = adapted("llama")
    freeze_a(model)
    gradients = private(model, noise=1.0, clip=1.0)
    next(p for name, p in model.named_parameters() if "lora_A" in name).requires_grad_(True)
    with pytest.raises(InternalError, match="have changed"):
        gradients.compute([[row] for row in rows_of()])


def test_a_gradient_that_is_not_finite_stops_the_run():
    model = adapted("llama")
    gradients = private(model, noise=1.0, clip=1.0)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).fill_(math.inf)
    with pytest.raises(ModelError, match="not finite"):
        gradients.compute([[row] for row in rows_of()])


class _Flattening(nn.Module):
    """Joins rows before its linear module, as routed experts do."""

    def __init__(self):
        super().__init__()
        self.embed, self.inner = nn.Embedding(VOCAB, 8).requires_grad_(False), nn.Linear(8, VOCAB)

    def forward(self, input_ids, attention_mask, use_cache):
        rows, length = input_ids.shape
        logits = self.inner(self.embed(input_ids).view(rows * length, 8)).view(rows, length, VOCAB)
        return type("Output", (), {"logits": logits})


def test_a_module_that_joins_rows_is_refused():
    gradients = private(_Flattening())
    with pytest.raises(ModelError, match="rows one by one"):
        gradients.compute([[row] for row in rows_of()])


def test_half_precision_parameters_are_refused():
    with pytest.raises(ModelError, match="float32"):
        private(adapted("llama").to(torch.bfloat16))


# ---- noise


def test_an_empty_batch_is_noise_of_the_size_that_was_promised():
    model = adapted("llama")
    noise, clip, expected = 1.7, 0.3, 4.0
    gradients = private(model, noise=noise, clip=clip, expected=expected)
    first, second = (gradient(model, gradients, []) for _ in range(2))
    sigma = noise * clip / expected
    both = torch.cat([first, second]) / sigma
    count = both.numel()
    assert count > 10_000
    assert abs(float(both.mean())) < 7 / math.sqrt(count)
    assert abs(float(both.pow(2).mean()) - 1) < 7 * math.sqrt(2 / count)
    assert abs(float(torch.dot(first, second)) / sigma**2) < 7 * math.sqrt(len(first)), "drawn anew for each step"


def test_noise_is_on_the_sum_once_however_many_passes_it_took():
    model = adapted("llama")
    rows = [[row] for row in rows_of()]
    clip = 1e-6  # so small that only noise is left
    for rows_at_once in (1, 100):
        twin = copy.deepcopy(model)
        came = gradient(twin, private(twin, noise=1e6, clip=clip, rows_at_once=rows_at_once), rows)
        assert abs(float(came.pow(2).mean()) - 1) < 7 * math.sqrt(2 / came.numel())


def test_the_noise_is_normal():
    drawn = gaussian_noise(200_000, 2.5).sort().values / 2.5
    assert drawn.dtype == torch.float64
    reached = torch.arange(1, len(drawn) + 1) / len(drawn)
    distance = float((torch.special.ndtr(drawn) - reached).abs().max())
    assert distance < 3.4 / math.sqrt(len(drawn))  # Massart 2 exp(-2 t^2): below 2e-10
    fresh = gaussian_noise(200_000, 1.0)
    assert abs(float(torch.dot(fresh[:100_000], fresh[100_000:]))) < 7 * math.sqrt(100_000)
    assert abs(float(fresh.mean())) < 7 / math.sqrt(200_000)


def test_no_seed_repeats_the_noise_or_the_batches():
    drawn, batches = [], []
    for _ in range(2):
        torch.manual_seed(0)
        drawn.append(gaussian_noise(50, 1.0))
        batches.append(list(PoissonSampler(num_samples=100, sample_rate=0.5, steps=3)))
    assert not torch.equal(*drawn)
    assert batches[0] != batches[1]


# ---- batches


def test_each_unit_joins_each_batch_by_itself():
    count, rate, steps = 200, 0.07, 5000
    sampler = PoissonSampler(num_samples=count, sample_rate=rate, steps=steps)
    assert isinstance(sampler, UniformWithReplacementSampler)
    assert len(sampler) == steps
    joined = torch.zeros(steps, count, dtype=torch.float64)
    for step, batch in enumerate(sampler):
        assert len(set(batch)) == len(batch)
        joined[step, batch] = 1
    spread = rate * (1 - rate)
    assert abs(float(joined.mean()) - rate) < 7 * math.sqrt(spread / (steps * count))
    assert float((joined.mean(0) - rate).abs().max()) < 8 * math.sqrt(spread / steps), "no unit is favoured"
    sizes = joined.sum(1)
    assert float(sizes.var()) == pytest.approx(count * spread, rel=7 * math.sqrt(2 / steps)), "a shuffle has none"
    centred = joined - rate
    assert abs(float((centred[:, :100] * centred[:, 100:]).mean())) < 7 * spread / math.sqrt(steps * 100)
    assert abs(float((centred[:-1] * centred[1:]).mean())) < 7 * spread / math.sqrt(steps * count)


def test_empty_batches_and_full_ones_come():
    assert [] in list(PoissonSampler(num_samples=3, sample_rate=0.1, steps=200))  # without one: 0.27^200
    assert list(PoissonSampler(num_samples=3, sample_rate=1.0, steps=2)) == [[0, 1, 2]] * 2


def test_examples_are_grouped_by_unit():
    assert grouped([{"a": 1}, {"a": 2}, {"a": 3}], ["x", "y", "x"]) == [[{"a": 1}, {"a": 3}], [{"a": 2}]]


# ---- the loop


class _Planned(PoissonSampler):
    """Batches that were drawn before."""

    batches: tuple = ()

    def __iter__(self):
        return iter(self.batches)


def trainer_of(model, folder, plan, rows, **more):
    arguments = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", label_names=["labels"],
        remove_unused_columns=False, dataloader_pin_memory=False, logging_steps=1, **training_arguments(plan), **more,
    )  # fmt: skip
    return PrivateTrainer(
        model=model, args=arguments, train_dataset=rows, run=RunDirectory(folder), plan=cut_of(model.base_model.model),
        collator=Collator(bpe(), pad_token_id=0), held_out=None, private=plan, units=[str(r["row"]) for r in rows],
        rows_at_once=2,
    )  # fmt: skip


def plan_of(rows, *, noise=1.0, clip=1.0, batch=3, steps=5, **more):
    units = [str(row["row"]) for row in rows]
    return plan_private(
        units=units, unit="row", batch=batch, max_steps=steps, epochs=1.0, clip=clip, delta=1e-5,
        noise_multiplier=noise, epsilon=None, **more,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_without_noise_and_with_a_huge_clip_it_is_plain_training_on_the_same_batches(tmp_path, monkeypatch, optim):
    rows = rows_of()
    plan = plan_of(rows)
    batches = ([0, 2, 5], [], [1], [6, 3, 4, 0, 2], [2, 4])
    monkeypatch.setattr(_Planned, "batches", batches)
    monkeypatch.setattr("party.private_sgd.PoissonSampler", _Planned)
    object.__setattr__(plan, "noise_multiplier", 0.0)
    object.__setattr__(plan, "clip", HUGE)
    object.__setattr__(plan, "sample_rate", 1 / len(batches))  # so that all batches are of one pass
    model, plain = adapted("llama"), adapted("llama")
    rate = {"learning_rate": 0.02 if optim == "sgd" else 1e-2, "lr_scheduler_type": "constant"}
    trainer = trainer_of(model, tmp_path, plan, rows, optim=optim, **rate)
    assert isinstance(trainer, SplitTrainer)
    trainer.train()
    kinds = {"sgd": torch.optim.SGD, "adamw_torch": torch.optim.AdamW}
    optimiser = kinds[optim](trained(plain), lr=rate["learning_rate"], weight_decay=0.0)
    collator = Collator(bpe(), pad_token_id=0)
    for batch in batches:
        optimiser.zero_grad()
        for p in trained(plain):
            p.grad = torch.zeros_like(p)
        if batch:
            inputs = collator([{k: v for k, v in rows[at].items() if k != "row"} for at in batch])
            labels = inputs.pop("labels")
            (losses_by_row(plain(**inputs).logits, labels, "causal-lm").sum() / plan.expected).backward()
        optimiser.step()
    moved, left = float(apart(adapted("llama"), plain).max()), apart(model, plain)
    assert moved > 1e-2
    assert float(left.median()) < 1e-5 * moved
    # Adam divides by the size of a gradient: where that is nothing but rounding, steps differ by their own size.
    assert float(left.max()) < (1e-4 if optim == "sgd" else 0.5) * moved


@pytest.mark.slow
def test_the_trainer_adds_noise_in_every_step(tmp_path):
    """Plain descent by nothing but noise is a walk whose length is known."""
    rows = rows_of()
    plan = plan_of(rows, noise=2.0, clip=1e-7, steps=20)
    model = adapted("llama")
    start = torch.cat([p.detach().reshape(-1).clone() for p in trained(model)])
    rate = 1e4
    trainer = trainer_of(model, tmp_path, plan, rows, optim="sgd", learning_rate=rate, lr_scheduler_type="constant")
    trainer.train()
    assert trainer.state.global_step == 20
    walked = torch.cat([p.detach().reshape(-1) for p in trained(model)]) - start
    sigma = rate * 2.0 * 1e-7 / plan.expected * math.sqrt(20)
    # The rows' own part is at most clip a step, far below the noise over all coordinates.
    assert float((walked / sigma).pow(2).mean()) == pytest.approx(1, abs=8 * math.sqrt(2 / len(walked)) + 0.01)


# ---- accounting


def pld(noise, rate, steps, relation="ADD_OR_REMOVE_ONE", runs=1):
    accountant = PLDAccountant(dp_accounting.NeighboringRelation[relation])
    event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
    return accountant.compose(event, steps * runs)


EVENTS = [(1.0, 0.0032, 938, 1e-5), (0.8, 0.1, 30, 1e-5), (50.0, 0.01, 100, 1e-6), (2.0, 1.0, 12, 1e-5)]


@pytest.mark.parametrize("event", EVENTS)
def test_epsilon_is_that_of_dp_accounting_for_the_same_event(event):
    noise, rate, steps, delta = event
    expected = pld(noise, rate, steps).get_epsilon(delta)
    came = epsilon_of(noise, rate, steps, delta)
    assert expected - 1e-4 <= came <= expected * 1.02 + 2.5e-3  # the error that the PRV tables are made for


def test_the_worked_example():
    """privacy.md, 3.11: 10,000 rows, batches of 32, three epochs, noise 1, delta 1e-5: 0.52."""
    plan = plan_private(
        units=[str(n) for n in range(10_000)], unit="row", batch=32, max_steps=-1, epochs=3.0, clip=1.0, delta=1e-5,
        noise_multiplier=1.0, epsilon=None,
    )  # fmt: skip
    assert (plan.steps, plan.sample_rate) == (938, 0.0032)
    assert plan.epsilon == pytest.approx(0.52, abs=0.01)


@pytest.mark.slow
def test_noise_from_epsilon_keeps_it_and_not_much_more():
    for epsilon in (0.05, 3.0):
        noise = noise_for(epsilon, 1e-6, 0.1, 50)
        assert epsilon_of(noise, 0.1, 50, 1e-6) <= epsilon
        assert epsilon_of(noise * 0.93, 0.1, 50, 1e-6) > epsilon
    with pytest.raises(UsageError, match="No noise up to"):
        noise_for(1e-9, 1e-9, 1.0, 10_000)


@pytest.mark.slow
@pytest.mark.parametrize("event", EVENTS)
def test_the_ledger_s_rho_covers_the_adapter_and_several_of_them(event):
    noise, rate, steps, _ = event
    rho = adapter_rho(noise, rate, steps)
    assert rho <= 2 * steps / noise**2 * (1 + 1e-9), "no more than without sampling"
    for runs in (1, 3):
        exact = pld(noise, rate, steps, "REPLACE_ONE", runs)
        for delta in (1e-4, 1e-7):
            assert zcdp_epsilon(runs * rho, delta) >= exact.get_epsilon(delta + runs * TAIL) * (1 - 1e-6)
    if rate < 1:
        assert rho < 0.1 * 2 * steps / noise**2, "sampling counts for something"
    else:
        assert rho == pytest.approx(2 * steps / noise**2, rel=1e-2)


def test_what_is_claimed_has_all_its_parts():
    rows = rows_of()
    plan = plan_of(rows, noise=3.0, steps=12)
    assert isinstance(plan.claim, AdapterClaim)
    told = plan.claim.sentence()
    for part in ("epsilon ", "delta 1e-05", "one row", "add or remove one", "whoever gets the adapter", "12 steps"):
        assert part in told
    assert str(plan.claim) == told
    persons = plan_private(
        units=["ada", "bo", "ada"], unit="person", batch=2, max_steps=3, epochs=1.0, clip=1.0, delta=1e-5,
        noise_multiplier=2.0, epsilon=None,
    )  # fmt: skip
    assert (persons.units, persons.sample_rate) == (2, 1.0)
    assert "one person" in persons.claim.sentence()


def test_the_signal_to_noise_that_is_printed():
    plan = plan_of(rows_of(), noise=2.0, batch=3)
    assert any("= 1.5 for one value" in text for _, text in plan.lines())


def test_a_delta_that_gives_a_row_away_is_refused():
    with pytest.raises(UsageError, match="gives one of them away"):
        plan_private(units=["a", "b"], unit="row", batch=1, max_steps=1, epochs=1.0, clip=1.0, delta=0.5,
                     noise_multiplier=1.0, epsilon=None)  # fmt: skip
