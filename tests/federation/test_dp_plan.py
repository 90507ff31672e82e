"""One bound for all updates: how it is worked out, what a party is held to, and what would go beyond it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting.pld import PLDAccountant

from party.bookkeeping import DataSet
from party.federated_bound_of import resting
from party.federated_bounds import (
    RECORD,
    Keeper,
    SumNoiser,
    promise_of_sum,
    refuse_unbounded,
    sum_preview,
)
from party.federated_private import plan_federated, promise_of_steps, terms_of_plan
from party.round_files import RoundFiles, to_bytes
from party.rundir import RunDirectory
from splitfl.aggregation.factors import Pair, Update
from splitfl.aggregation.masks import MaskSealer
from splitfl.aggregation.rules import rule_named
from splitfl.errors import DataError, UsageError, WireError
from splitfl.privacy.calibration import gaussian_epsilon
from splitfl.privacy.ledger import Ledger
from splitfl.wire.round_messages import Entered
from tests.aggregation.rounds_in_memory import Round, identities, pairs, terms_of
from tests.federation.test_dp_options import DP, NOISE, tuning

ROWS = DataSet(label="rows", fingerprint="f" * 16, unit="row", units=tuple(f"row {n}" for n in range(400)))
SMALL = {"per_device_train_batch_size": 20, "local_steps": 5}


# ---- the accountant, both ways


def by_pld(noise, rate, steps, delta):
    accountant = PLDAccountant()
    accountant.compose(dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise)), steps)
    return accountant.get_epsilon(delta)


@pytest.mark.parametrize(("rounds", "noise"), [(3, 1.0), (10, 2.0)])
def test_epsilon_is_that_of_all_local_steps_of_all_rounds(rounds, noise):
    plan = plan_federated(tuning(**{**DP, **SMALL, "dp_rounds": rounds, "dp_noise_multiplier": noise}), ROWS)
    assert (plan.steps, plan.sums, plan.sample_rate) == (5 * rounds, rounds, 0.05)
    exact = by_pld(noise, 0.05, 5 * rounds, 1e-5)
    assert exact <= plan.epsilon * (1 + 1e-6) + 1e-6
    assert plan.epsilon < exact + 0.03, "PRV lies 0.01 above; an RDP bound would lie further away"


@pytest.mark.slow
def test_noise_is_worked_out_from_epsilon_for_all_rounds():
    asked = {**DP, **SMALL, "dp_rounds": 4, "dp_noise_multiplier": None, "dp_epsilon": 2.0}
    plan = plan_federated(tuning(**asked), ROWS)
    assert by_pld(plan.noise_multiplier, 0.05, 20, 1e-5) <= 2.0
    assert by_pld(plan.noise_multiplier * 0.97, 0.05, 20, 1e-5) > 1.95


def test_one_pass_is_a_round_unless_steps_are_given():
    plan = plan_federated(tuning(**DP, per_device_train_batch_size=30), ROWS)
    assert (plan.local_steps, plan.steps) == (14, 42)


def test_a_person_is_a_unit_and_weighs_as_one():
    people = replace(ROWS, unit="person", units=tuple(f"person {n // 40}" for n in range(400)))
    plan = plan_federated(tuning(**{**DP, "dp_delta": 1e-3, "per_device_train_batch_size": 5}), people)
    assert (plan.units, plan.sample_rate) == (10, 0.5)
    assert "unit: one person" in plan.claim.sentence()
    assert (base().units, len(ROWS.units)) == (400, 400)


def test_the_claim_names_every_part():
    plan = plan_federated(tuning(**DP, **SMALL), ROWS)
    claim = plan.claim.sentence()
    for words in ("epsilon ", "delta 1e-05", "one row", "add or remove one", "whoever sees this party's updates",
                  "all updates of this party in 3 sums", "after 15 steps", "scores on held-out rows"):  # fmt: skip
        assert words in claim
    assert "this one adapter" not in claim
    assert any("signal to noise" in label for label, _ in plan.lines())


@pytest.mark.parametrize("rule", ["flora", "fedex", "rbla", "hetlora", "lora-fair", "fed-sb", "fedlrt"])
def test_rules_that_no_bound_goes_with_are_refused_with_the_reason(rule):
    with pytest.raises(UsageError, match=r"differential privacy: |with DP-SGD: "):
        plan_federated(tuning(**DP, **SMALL, rule=rule, sum="plain"), ROWS)


def test_what_makes_rows_depend_on_each_other_is_refused():
    for changes in ({"padding_side": "left"}, {"use_dora": True}, {"training_args": ("neftune_noise_alpha=5.0",)}):
        with pytest.raises(UsageError, match="DP-SGD"):
            plan_federated(tuning(**DP, **SMALL, **changes), ROWS)


# ---- what a party is held to


class Client:
    """As much of a `RoundClient` as a `Keeper` looks at."""

    def __init__(self, folder: Path, rounds: int = 3, federation: str = "a" * 32) -> None:
        self.files = RoundFiles(folder / "federation")
        self.entered = Entered(
            session=1, request=1, version=1, federation=federation, rounds=rounds, min_parties=2, clip=1.0,
            max_weight=1000.0, piece_bytes=1 << 16,
        )  # fmt: skip


@cache
def base():
    """Worked out once: rho takes seconds."""
    return promise_of_steps(plan_federated(tuning(**{**DP, **SMALL}), ROWS), ROWS, "run 1")


def promise(**changes):
    return replace(base(), terms=terms_of_plan(plan_federated(tuning(**{**DP, **SMALL, **changes}), ROWS)))


def test_each_update_is_made_once_and_noted_before_it_leaves(tmp_path):
    run, client = RunDirectory(tmp_path), Client(tmp_path)
    keeper = Keeper(run, promise(), resume=False)
    keeper.enter(client)
    keeper.admit(0)
    client.files.save("a" * 32, 0, "vector", to_bytes(np.ones(3, np.float32), 3), 5.0)
    assert json.loads((tmp_path / RECORD).read_text())["last"] == 0
    with pytest.raises(UsageError, match="has left this party already"):
        keeper.admit(0)
    keeper.admit(2)
    with pytest.raises(UsageError, match="asks for sum 4, and the bound is for 3"):
        keeper.admit(3)
    again = Keeper(run, promise(), resume=True)  # in another process
    with pytest.raises(UsageError, match="has left this party already"):
        again.admit(0)
    again.enter(Client(tmp_path))
    again.admit(1)
    assert keeper.weight(1000.0) == 400.0
    assert keeper.weight(50.0) == 50.0


def test_a_federation_of_more_rounds_or_another_one_is_refused(tmp_path):
    run = RunDirectory(tmp_path)
    with pytest.raises(UsageError, match="4 sums, and the bound is for 3"):
        Keeper(run, promise(), resume=False).enter(Client(tmp_path, rounds=4))
    assert not (tmp_path / RECORD).exists()
    Keeper(run, promise(), resume=False).enter(Client(tmp_path, rounds=2))
    with pytest.raises(UsageError, match="another federation"):
        Keeper(run, promise(), resume=True).enter(Client(tmp_path, federation="b" * 32))


def test_a_run_goes_on_under_its_own_bound_alone(tmp_path):
    run = RunDirectory(tmp_path)
    Keeper(run, promise(), resume=False).enter(Client(tmp_path))
    with pytest.raises(UsageError, match="other are noise_multiplier"):
        Keeper(run, promise(dp_noise_multiplier=0.7), resume=True)
    with pytest.raises(UsageError, match="other are local_steps"):
        Keeper(run, promise(local_steps=6), resume=True)
    with pytest.raises(UsageError, match="has no bound"):
        refuse_unbounded(run)
    (tmp_path / RECORD).write_text("{")
    with pytest.raises(DataError, match="damaged"):
        Keeper(run, promise(), resume=True)


def test_a_run_that_began_without_a_bound_gets_none(tmp_path):
    RoundFiles(tmp_path / "federation").save("a" * 32, 0, "vector", to_bytes(np.ones(3, np.float32), 3), 5.0)
    with pytest.raises(UsageError, match="left without the bound"):
        Keeper(RunDirectory(tmp_path), promise(), resume=True)
    refuse_unbounded(RunDirectory(tmp_path))


def test_the_ledger_has_one_entry_for_all_updates(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        first = promise().release
        assert ledger.charge(first)
        assert not ledger.charge(promise().release), "a second update is no second release: the first has all of them"
        assert first.rho is not None
        assert len(ledger.export(units=True)["entries"]) == 1


# ---- noise on the sum


def test_the_bound_on_sums_is_that_of_the_gaussian_mechanism():
    made = promise_of_sum(tuning(**NOISE, sum_colluders=1), 3, ROWS, "run 1")
    epsilon = gaussian_epsilon(1e-5, sensitivity=1.0, sigma=1.0, releases=3)
    accountant = PLDAccountant()
    accountant.compose(dp_accounting.GaussianDpEvent(1.0), 3)
    assert epsilon == pytest.approx(accountant.get_epsilon(1e-5), abs=2e-3)
    assert f"epsilon {math.ceil(epsilon * 1000) / 1000:g};" in made.claim
    assert "up to 1 of the other parties" in made.claim
    assert made.release.rho == pytest.approx(1.5)
    assert made.units is None


def test_few_parties_are_told_that_it_is_noise():
    few = sum_preview(tuning(**NOISE), 1_000_000)
    assert "667 times with 3 parties" in few[0]
    assert "200 times with 10 parties" in few[0]
    assert "about 2,000 parties" in few[1]
    assert len(sum_preview(tuning(**{**NOISE, "sum_noise": 0.01}), 100)) == 1


def test_an_attempt_of_other_parties_is_sat_out_and_not_noised_again(tmp_path):
    settings = tuning(**NOISE, sum_dropouts=1)

    def round_of(terms):
        members = {
            keys.public.decode(): SumNoiser(settings, tmp_path / str(place), 3).sealed(
                MaskSealer, terms, keys, identities(len(terms.parties))
            )
            for place, keys in enumerate(pairs()[: len(terms.parties)])
        }
        from splitfl.aggregation.mask_sums import MaskSummer

        plan = settings.sum_plan(terms, 3, "mask")
        return Round(members, MaskSummer(terms, identities(len(terms.parties)), noise=plan, allow_two=True))

    vectors = [np.zeros(50, np.float32)] * 4
    terms = terms_of(4, 50)
    weights = [terms.max_weight] * 4
    first = round_of(terms).run(vectors, weights)
    again = round_of(replace(terms, attempt=1)).run(vectors, weights)
    means = [what.sealers[what.summer.survivors[0]].open(what.result).mean for what in (first, again)]
    np.testing.assert_array_equal(*means)
    with pytest.raises(WireError, match="cannot be in the attempt"):
        round_of(replace(terms_of(3, 50), attempt=2)).run(vectors[:3], weights[:3])


@pytest.mark.parametrize("rule", ["fedit", "ffa", "rolora", "fedsa", "fedsvd", "fed-sb"])
def test_a_party_that_trained_nothing_changes_nothing(rule):
    """What is taken off before the sum and added again afterwards is the state itself."""
    chosen, generator = rule_named(rule), torch.Generator().manual_seed(0)
    template = Update({
        name: Pair(torch.randn(4, 12, generator=generator), torch.randn(10, 4, generator=generator), 2.0)
        for name in ("x", "y")
    })  # fmt: skip
    state = chosen.first(template, 7)
    for number in range(2):
        for step in range(len(chosen.steps(number))):
            length = chosen.length(state, number, step)
            still = resting(tuning(**NOISE), chosen, state, number, step, length + 3)
            if chosen.steps(number)[step].does == "gradient":
                assert still is None, "a gradient is a change already"
                mean = np.random.default_rng(step).standard_normal(length).astype(np.float32)
                state = chosen.from_mean(state, mean, number, step)
                continue
            assert still is not None
            assert still.shape == (length + 3,)
            after = chosen.from_mean(state, still[:length], number, step)
            for name, pair in state.adapter.pairs.items():
                (b, a), (b_after, a_after) = pair.wide(), after.adapter.pairs[name].wide()
                torch.testing.assert_close(b_after @ a_after, b @ a, rtol=1e-5, atol=1e-6)
            state = after
    assert resting(tuning(), chosen, state, 0, 0, 5) is None


def test_the_keeper_of_a_sum_tells_no_number_of_rows(tmp_path):
    keeper = Keeper(RunDirectory(tmp_path), promise_of_sum(tuning(**NOISE), 3, ROWS, "run 1"), resume=False)
    assert keeper.weight(1000.0) == 1000.0
    assert SimpleNamespace(units=keeper.promise.units).units is None
