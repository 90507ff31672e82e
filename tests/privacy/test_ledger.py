"""The ledger: what is charged, what adds up, and what is refused."""

from __future__ import annotations

import json
import math
from collections import defaultdict

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from splitfl.errors import UsageError
from splitfl.privacy.ledger import BudgetError, Ledger, Release, rho_for
from splitfl.privacy.ledger_records import Spent, gaussian_rho

DATA, OTHER = "d1" * 32, "e2" * 32
RHO = gaussian_rho(2.0, 10.0)  # 0.02


def release(name, units=(0, 1), **changes):
    """A noised release of rows; `changes` are fields of `Release`."""
    fields = {
        "release_id": name, "dataset": DATA, "unit": "row", "units": units, "channel": "activations",
        "mechanism": "gauss", "sensitivity": 2.0, "sigma": 10.0, "rho": RHO, "adversary": "owner", "run": "run-1",
    }  # fmt: skip
    return Release(**{**fields, **changes})


def bare(name, units=(0, 1), **changes):
    """A release that nothing bounds."""
    return release(name, units, **{"mechanism": "none", "sensitivity": None, "sigma": None, "rho": None, **changes})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "books" / "ledger.sqlite"


@pytest.fixture
def ledger(path):
    with Ledger(path) as opened:
        yield opened
        opened.verify()  # whatever a test did, the totals are the sums of the entries


def only(ledger, dataset=DATA):
    (account,) = ledger.spent(dataset)
    return account


# ---- what is kept


def test_no_unit_is_in_the_file_or_the_export(path, ledger):
    ledger.charge(release("a", ["Ada Lovelace-Unmistakable", "person 31415926"], unit="person"))
    exported = json.dumps(ledger.export(units=True))
    held = b"".join(each.read_bytes() for each in path.parent.iterdir())
    for word in ("Unmistakable", "31415926"):
        assert word.encode() not in held
        assert word not in exported
        assert word not in repr(release("a", [word]))
    entry = ledger.export(units=True)["entries"][0]
    assert entry["unit_count"] == len(entry["units"]) == 2
    assert "units" not in ledger.export()["entries"][0]


def test_hashes_are_keyed_and_differ_between_ledgers_and_data_sets(tmp_path):
    seen = []
    for name, dataset in (("one", DATA), ("two", DATA), ("two", OTHER)):
        with Ledger(tmp_path / name) as ledger:
            ledger.charge(release(dataset[:2], [7], dataset=dataset))
            seen.append(ledger.export(units=True)["entries"][-1]["units"][0])
    assert len(set(seen)) == 3


# ---- charge, replay, confirm


def test_a_release_is_charged_once_and_survives(path):
    with Ledger(path) as ledger:
        assert ledger.charge(release("a", [0, 1, 2])) is True
        assert ledger.charge(release("a", [2, 0, 1])) is False  # the order of the units is no content
    with Ledger(path) as ledger:
        assert ledger.charge(release("a", [0, 1, 2])) is False
        account = only(ledger)
        assert (account.releases, account.units, account.most.releases) == (1, 3, 1)
        assert account.most.rho == RHO


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dataset", OTHER), ("unit", "person"), ("units", (0, 2)), ("units", (0,)), ("units", None),
        ("channel", "gradients"), ("mechanism", "other"), ("sensitivity", 1.9), ("sigma", 11.0), ("rho", 0.03),
        ("rho", None), ("adversary", "another"), ("run", "run-2"),
    ],
)  # fmt: skip
def test_a_replay_with_other_contents_is_none(ledger, field, value):
    ledger.charge(release("a"))
    with pytest.raises(UsageError, match=f"differs in .*{field}"):
        ledger.charge(release("a", **{field: value}))
    assert [account.releases for account in ledger.summary()] == [1]


def test_confirming_is_noted_once(ledger):
    ledger.charge(release("a"))
    ledger.charge(release("b"))
    ledger.confirm("a")
    ledger.confirm("a")
    assert only(ledger).confirmed == 1
    with pytest.raises(UsageError, match="never charged"):
        ledger.confirm("c")
    first, second = ledger.export()["entries"]
    assert first["confirmed"] >= first["charged"]
    assert second["confirmed"] is None


def test_numbers_and_their_texts_are_one_unit(ledger):
    ledger.charge(release("a", [7]))
    ledger.charge(release("b", ["7"]))
    assert (only(ledger).units, only(ledger).most.releases) == (1, 2)


@pytest.mark.parametrize(
    "changes",
    [
        {"units": []}, {"units": [1, 1]}, {"units": [1, "1"]}, {"units": "ab"}, {"units": [1.5]}, {"units": [True]},
        {"unit": "record"}, {"channel": "weights"}, {"rho": 0.0}, {"rho": -1.0}, {"rho": math.nan}, {"rho": math.inf},
        {"sigma": 0.0}, {"sensitivity": -2.0}, {"dataset": ""}, {"dataset": "a b"}, {"adversary": " "}, {"run": ""},
        {"mechanism": "x\x1b[2J"}, {"release_id": "x" * 201}, {"rho": 0.0199},
    ],
)  # fmt: skip
def test_what_cannot_be_a_release(changes):
    with pytest.raises(UsageError) as caught:
        release("a", **changes)
    assert caught.value.expected or caught.value.hint


def test_an_adapter_may_claim_less_than_its_noise_alone_gives():
    assert release("a", channel="adapter", rho=1e-6).rho == 1e-6  # subsampling amplifies there


# ---- what adds up


def test_channels_of_one_adversary_add_up_and_groups_and_adversaries_do_not(ledger):
    for number, channel in enumerate(("activations", "gradients", "labels", "adapter")):
        ledger.charge(release(f"r{number}", [5], channel=channel, rho=0.5))
    ledger.charge(release("other", [5], adversary="The  Public", rho=0.5))
    found = {(account.group, account.adversary): account for account in ledger.spent(DATA)}
    assert set(found) == {("cut", "owner"), ("adapter", "owner"), ("cut", "the public")}
    assert found["cut", "owner"].most == Spent(releases=3, rho=1.5)
    assert found["adapter", "owner"].most == Spent(releases=1, rho=0.5)


def test_releases_of_every_unit_count_for_each(ledger):
    ledger.charge(release("a", [1, 2], rho=0.25))
    ledger.charge(release("b", [2, 3], rho=0.25))
    ledger.charge(release("all", None, rho=0.5))
    account = only(ledger)
    assert account.most == Spent(releases=3, rho=1.0)
    assert (account.units, account.releases, account.of_all) == (3, 3, 1)
    ledger.set_budget(DATA, unit="row", adversary="owner", rho=1.0)
    assert ledger.check(release("c", [1], rho=0.25)) == 1
    assert ledger.check(release("c", [4], rho=0.25)) == 2
    for units in ([2], None):
        with pytest.raises(BudgetError):
            ledger.charge(release("c", units, rho=0.25))


def test_one_release_without_a_bound_voids_the_claim(ledger):
    ledger.charge(release("a", [1]))
    assert only(ledger).empirical is None
    ledger.charge(bare("b", [2], channel="gradients"))
    account = only(ledger)
    assert account.empirical == "1 of 2 releases had no formal bound"
    assert account.unbounded == 1
    ledger.charge(release("c", [1], channel="adapter"))  # another group is another account
    assert [each.empirical is None for each in ledger.spent(DATA) if each.group == "adapter"] == [True]


def test_units_that_do_not_add_up_void_the_claim(ledger):
    ledger.charge(release("a", [1]))
    ledger.charge(release("b", ["p"], unit="person"))
    assert {account.unit for account in ledger.spent(DATA)} == {"row", "person"}
    assert all("do not add up" in (account.empirical or "") for account in ledger.spent(DATA))


# ---- budgets


def test_a_budget_in_releases(ledger):
    ledger.set_budget(DATA, unit="row", adversary="OWNER", releases=2)
    ledger.charge(release("a", [1, 2]))
    ledger.charge(bare("b", [2, 3]))
    with pytest.raises(BudgetError, match=r"1 of its 3 units had no room .*Nothing was charged") as caught:
        ledger.charge(release("c", [2, 4, 5]))
    assert (caught.value.exit_code, caught.value.fits_releases, caught.value.fits_sigma) == (2, 0, None)
    assert "2 of its units have room" in caught.value.hint
    assert ledger.charge(release("a", [1, 2])) is False  # a replay is not refused
    assert ledger.charge(release("c", [4, 5])) is True
    assert only(ledger).releases == 3


def test_a_budget_in_rho_and_what_would_still_fit(ledger):
    ledger.set_budget(DATA, unit="row", adversary="owner", rho=3.5 * RHO)
    run = release("plan", [1, 2])
    assert ledger.check(run, times=3) == 3
    ledger.charge(release("a", [1]))
    with pytest.raises(BudgetError) as caught:
        ledger.check(run, times=10)
    assert caught.value.fits_releases == 2
    sigma = caught.value.fits_sigma
    assert sigma == pytest.approx(10 * math.sqrt(10 / 2.5))
    for scale, fits in ((1.0001, True), (0.999, False)):
        quieter = release("plan", [1, 2], sigma=sigma * scale, rho=gaussian_rho(2.0, sigma * scale))
        if fits:
            assert ledger.check(quieter, times=10) == 10
            continue
        with pytest.raises(BudgetError):
            ledger.check(quieter, times=10)
    printed = caught.value.hint.partition("with sigma ")[2].split()[0]
    assert ledger.check(release("plan", [1, 2], sigma=float(printed), rho=gaussian_rho(2.0, float(printed))), 10) == 10
    assert only(ledger).releases == 1  # nothing of all this was charged


def test_a_release_without_a_bound_fits_no_budget_in_rho(ledger):
    ledger.charge(bare("a", [1]))
    ledger.set_budget(DATA, unit="row", adversary="owner", rho=1e9)
    for refused in (bare("b", [2]), release("c", [1]), release("d", None)):
        with pytest.raises(BudgetError):
            ledger.charge(refused)
    with pytest.raises(BudgetError, match=None) as caught:
        ledger.charge(bare("b", [2]))
    assert "formal bound" in caught.value.hint
    assert ledger.charge(release("e", [2])) is True  # row 2 was never sent bare


def test_a_budget_below_what_is_spent_refuses_everything(ledger):
    for name in "abc":
        ledger.charge(release(name, [1]))
    ledger.set_budget(DATA, unit="row", adversary="owner", rho=RHO, releases=5)
    assert only(ledger).left == (2, 0.0)
    with pytest.raises(BudgetError) as caught:
        ledger.charge(release("d", [1], sigma=1e6, rho=1e-12, sensitivity=1.0))
    assert caught.value.fits_sigma is None
    ledger.set_budget(DATA, unit="row", adversary="owner", releases=0)
    with pytest.raises(BudgetError):
        ledger.charge(release("d", [77]))
    assert only(ledger).releases == 3


def test_sums_of_floats_do_not_eat_the_last_release(ledger):
    third = 0.1
    ledger.set_budget(DATA, unit="row", adversary="owner", rho=0.3)  # 0.1 + 0.1 + 0.1 > 0.3
    assert third + third + third > 0.3
    for name in "abc":
        ledger.charge(release(name, [1], rho=third))
    with pytest.raises(BudgetError):
        ledger.charge(release("d", [1], sigma=1e4, rho=1e-7))


def test_a_budget_is_for_one_unit(ledger):
    ledger.set_budget(DATA, unit="person", adversary="owner", releases=2)
    with pytest.raises(UsageError, match="for each person; this release is counted by row"):
        ledger.charge(release("a"))
    ledger.set_budget(DATA, unit="row", adversary="owner", releases=2)  # nothing was released: it may change
    assert only(ledger).unit == "row"
    ledger.charge(release("a"))
    with pytest.raises(UsageError, match="counted by row"):
        ledger.set_budget(DATA, unit="person", adversary="owner", releases=2)
    assert only(ledger).budget.unit == "row"


def test_a_budget_is_for_one_data_set_group_and_adversary(ledger):
    ledger.set_budget(DATA, unit="row", adversary="owner", releases=0)
    assert ledger.charge(release("a", dataset=OTHER)) is True
    assert ledger.charge(release("b", channel="adapter")) is True
    assert ledger.charge(release("c", adversary="somebody else")) is True
    for channel in ("activations", "gradients", "labels"):
        with pytest.raises(BudgetError):
            ledger.charge(release("d", channel=channel))


@pytest.mark.parametrize(
    "limits",
    [
        {}, {"epsilon": 8.0}, {"delta": 1e-6}, {"epsilon": -8.0, "delta": 1e-6}, {"epsilon": 8.0, "delta": 0.0},
        {"epsilon": 8.0, "delta": 1.0}, {"epsilon": math.nan, "delta": 1e-6}, {"rho": -0.1}, {"rho": math.inf},
        {"releases": -1}, {"releases": 1.5}, {"releases": True}, {"rho": 1.0, "delta": 1e-6},
    ],
)  # fmt: skip
def test_what_cannot_be_a_budget(ledger, limits):
    with pytest.raises(UsageError) as caught:
        ledger.set_budget(DATA, unit="row", adversary="owner", **limits)
    assert caught.value.expected
    assert ledger.summary() == []


def test_a_budget_for_what_does_not_exist(ledger):
    for words in ({"channel_group": "activations", "unit": "row"}, {"unit": "record"}):
        with pytest.raises(UsageError, match="There is no"):
            ledger.set_budget(DATA, adversary="owner", releases=1, **words)


def test_the_rho_of_an_epsilon_can_be_given_or_worked_out(ledger):
    words = {"unit": "row", "adversary": "owner", "epsilon": 8.0, "delta": 1e-6}
    assert ledger.set_budget(DATA, **words, rho=0.25).rho == 0.25
    assert ledger.set_budget(DATA, **words, rho=lambda epsilon, delta: epsilon * delta).rho == 8e-6
    pytest.importorskip("dp_accounting", reason="the extra `privacy` is not installed")
    from splitfl.privacy.calibration import zcdp_epsilon

    budget = ledger.set_budget(DATA, **words)
    assert (budget.epsilon, budget.delta) == (8.0, 1e-6)
    assert zcdp_epsilon(budget.rho, 1e-6) <= 8.0 < zcdp_epsilon(budget.rho * (1 + 1e-6), 1e-6)
    # Bun and Steinke's closed form is a looser bound: it can only allow less.
    closed = (math.sqrt(8.0 + math.log(1e6)) - math.sqrt(math.log(1e6))) ** 2
    assert closed <= budget.rho < 1.5 * closed
    assert rho_for(0.1, 1e-9) < rho_for(0.1, 1e-6) < rho_for(0.2, 1e-6)


# ---- against a model of it

OPERATIONS = st.lists(
    st.tuples(
        st.integers(0, 30),  # release id: repeats happen
        st.one_of(st.none(), st.sets(st.integers(0, 4), min_size=1)),
        st.sampled_from([0.125, 0.25, 1.0, None]),
    ),
    max_size=25,
)


@settings(max_examples=25, deadline=None)
@given(operations=OPERATIONS, releases=st.integers(0, 6), rho=st.sampled_from([None, 0.5, 1.5]))
def test_it_does_what_a_plain_dictionary_would(tmp_path_factory, operations, releases, rho):
    spent, of_all, stored = defaultdict(lambda: (0, 0.0, 0)), (0, 0.0, 0), {}

    def add(one, other):
        return tuple(a + b for a, b in zip(one, other, strict=True))

    with Ledger(tmp_path_factory.mktemp("model") / "ledger") as ledger:
        ledger.set_budget(DATA, unit="row", adversary="owner", releases=releases, rho=rho)
        for number, units, each in operations:
            asked = release(str(number), units and sorted(units), rho=each, sigma=None)
            cost = (1, each or 0.0, int(each is None))
            if number in stored:
                if stored[number] == (units, each):
                    assert ledger.charge(asked) is False
                else:
                    with pytest.raises(UsageError, match="Another release"):
                        ledger.charge(asked)
                continue
            after = [add(add(spent[u], of_all), cost) for u in (range(5) if units is None else units)]
            fits = all(n <= releases and (rho is None or (r <= rho and not bare)) for n, r, bare in after)
            if not fits:
                with pytest.raises(BudgetError):
                    ledger.charge(asked)
                continue
            assert ledger.charge(asked) is True
            stored[number] = (units, each)
            of_all = add(of_all, cost) if units is None else of_all
            for unit in units or ():
                spent[unit] = add(spent[unit], cost)
        ledger.verify()
        totals = zip(*(add(spent[unit], of_all) for unit in range(5)), strict=True)
        most = only(ledger).most
        assert [most.releases, most.rho, most.unbounded] == [max(column) for column in totals]
