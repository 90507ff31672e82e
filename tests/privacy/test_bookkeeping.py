"""The book of a run: what one send of rows becomes in the ledger."""

from __future__ import annotations

import itertools
import math

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from party.bookkeeping import Book, DataSet, describe, keep_name, run_name
from party.protect import BatchRows
from splitfl.privacy.ledger import BudgetError, Ledger
from splitfl.privacy.ledger_records import gaussian_rho
from splitfl.privacy.mechanisms import Chain, DChi, Gauss, GradientGauss, Quantise

ROWS, PERSONS, BLOCKS = "a1" * 32, "b2" * 32, "c3" * 32
NOISE = Gauss(clip=5.0, sigma=8.0)
RHO = gaussian_rho(10.0, 8.0)  # of one row: replacing it moves it by twice the clip norm
SETS = (
    DataSet(fingerprint=ROWS, label="rows.jsonl", units=["0", "1", "2", "3"]),
    DataSet(fingerprint=PERSONS, label="visits.jsonl", units=["ada", "ada", "ada", "bo", "cy"], unit="person"),
    DataSet(fingerprint=BLOCKS, label="novel.txt", units=["0", "0", "0", "0", "1"]),  # a long text, cut into blocks
)


@pytest.fixture
def book(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    with Book(ledger=ledger, run="run 1234", datasets={each.fingerprint: each for each in SETS}) as opened:
        yield opened
        ledger.verify()


def entries(book):
    return book.ledger.export(units=True)["entries"]


def batch(*rows, of=ROWS):
    return BatchRows(dataset=of, rows=rows)


def test_what_is_written_down_of_a_plain_send(book):
    book.charge("activations", None, batch(2, 0), formal=False)
    [entry] = entries(book)
    expected = {
        "dataset": ROWS, "adversary": "owner", "unit": "row", "channel": "activations", "mechanism": "none",
        "sensitivity": None, "sigma": None, "rho": None, "run": "run 1234", "confirmed": None, "unit_count": 2,
    }  # fmt: skip
    assert {name: entry[name] for name in expected} == expected


def test_noise_counts_where_it_bounds_and_only_there(book):
    book.charge("activations", NOISE, batch(0), formal=True)
    book.charge("activations", NOISE, batch(1), formal=False)
    formal, empirical = entries(book)
    assert (formal["sensitivity"], formal["sigma"], formal["rho"]) == (10.0, 8.0, pytest.approx(RHO))
    assert (empirical["sensitivity"], empirical["sigma"], empirical["rho"]) == (10.0, 8.0, None)


def test_rows_of_one_person_in_one_send_add_up(book):
    book.charge("activations", NOISE, batch(0, 1, 3, of=PERSONS), formal=True)
    [entry] = entries(book)
    assert (entry["unit"], entry["unit_count"]) == ("person", 2)
    assert entry["sensitivity"] == pytest.approx(10 * math.sqrt(2))  # two of ada's
    assert entry["rho"] == pytest.approx(2 * RHO)


def test_blocks_of_one_text_in_one_send_add_up(book):
    book.charge("activations", NOISE, batch(0, 1, 2, 4, of=BLOCKS), formal=True)
    [entry] = entries(book)
    assert (entry["unit"], entry["unit_count"]) == ("row", 2)
    assert entry["rho"] == pytest.approx(3 * RHO)


def test_a_token_is_in_one_row_only(book):
    token = Gauss(clip=5.0, sigma=8.0, unit="token")
    book.charge("activations", token, batch(0, 1, 2, of=PERSONS), formal=True)
    [entry] = entries(book)
    assert (entry["unit"], entry["rho"]) == ("token", pytest.approx(RHO))


def test_a_send_of_unknown_rows_counts_for_all(book):
    book.charge("activations", NOISE, None, formal=True)
    by_set = {entry["dataset"]: entry for entry in entries(book)}
    assert by_set.keys() == {ROWS, PERSONS, BLOCKS}
    assert all(entry["unit_count"] is None for entry in by_set.values())
    assert {name: entry["rho"] / RHO for name, entry in by_set.items()} == {
        ROWS: pytest.approx(1), PERSONS: pytest.approx(3), BLOCKS: pytest.approx(4),
    }  # fmt: skip


def test_a_clip_of_each_position_is_no_sensitivity_of_a_row(book):
    book.charge("gradients", GradientGauss(clip=1.0, sigma=2.0), batch(0), formal=False)
    [entry] = entries(book)
    assert (entry["mechanism"], entry["sensitivity"], entry["sigma"]) == ("gradient-gauss", None, 2.0)


def test_sends_that_are_booked_as_one_cost_as_many(book):
    book.charge("activations", NOISE, batch(0), formal=True, pieces=9)
    assert entries(book)[0]["rho"] == pytest.approx(9 * RHO)


def test_the_same_bytes_are_booked_once_and_others_each_time(book):
    for _ in range(2):
        assert book.charge("activations", NOISE, batch(0), formal=True, release_id="pass:7") == [f"pass:7:{ROWS[:16]}"]
    assert len(entries(book)) == 1
    first, second = (book.charge("activations", NOISE, batch(0), formal=True) for _ in range(2))
    assert first != second
    assert len(entries(book)) == 3


def test_a_resumed_run_does_not_reuse_numbers(book):
    """Two starts of one run both count from 1; the second one's releases are others all the same."""
    again = Book(ledger=book.ledger, run=book.run, datasets=book.datasets)
    for each in (book, again):
        each.charge("activations", None, batch(0), formal=False)
    assert len(entries(book)) == 2


def test_beyond_the_budget_nothing_is_booked(book):
    book.ledger.set_budget(ROWS, unit="row", adversary="owner", releases=1)
    book.charge("activations", None, batch(0, 1), formal=False)
    before = entries(book)
    for channel in ("activations", "gradients", "labels"):
        with pytest.raises(BudgetError, match="Nothing was charged"):
            book.charge(channel, None, batch(1, 2), formal=False)
    assert entries(book) == before
    book.charge("gradients", None, batch(2, 3), formal=False)


def test_a_plan_is_checked_and_not_booked(book):
    book.ledger.set_budget(ROWS, unit="row", adversary="owner", rho=2.5 * RHO)
    book.check("activations", NOISE, ROWS, 2, formal=True)
    with pytest.raises(BudgetError):
        book.check("activations", NOISE, ROWS, 3, formal=True)
    with pytest.raises(BudgetError, match="no formal bound"):
        book.check("activations", None, ROWS, 1, formal=False)
    assert entries(book) == []


def test_an_answer_is_noted(book):
    first, second = (book.charge("activations", None, batch(row), formal=False) for row in (0, 1))
    book.confirm(second)
    assert [entry["confirmed"] is None for entry in entries(book)] == [True, False]
    book.confirm(first)
    assert all(entry["confirmed"] for entry in entries(book))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(5)), cuts=st.sets(st.integers(1, 4)))
def test_a_person_spends_the_same_however_the_rows_are_batched(tmp_path_factory, order, cuts):
    data = SETS[1]
    path = tmp_path_factory.mktemp("book") / "ledger.sqlite"
    with Book(ledger=Ledger(path), run="run", datasets={PERSONS: data}) as book:
        edges = [0, *sorted(cuts), 5]
        for start, end in itertools.pairwise(edges):
            book.charge("activations", NOISE, batch(*order[start:end], of=PERSONS), formal=True)
        [account] = book.ledger.spent(PERSONS)
    # Ada has three rows. Whoever shares a batch with her is charged as much as she is, so only the most is exact.
    assert account.most.rho == pytest.approx(3 * RHO)


def test_mechanisms_in_words():
    assert describe(None) == "none"
    assert describe(NOISE) == "gauss"
    assert describe(Chain((DChi(eta=3.0), Quantise(bits=8)))) == "dchi+quantise"
    assert describe(None, "max-norm") == "max-norm"
    assert describe(Quantise(bits=4), "marvell") == "marvell+quantise"


def test_a_run_has_one_name_for_good(tmp_path):
    folder = tmp_path / "my run"
    first = run_name(folder, resumed=False)
    assert first.startswith("my run ")
    assert run_name(folder, resumed=False) != first, "two runs in folders of one name are two runs"
    folder.mkdir()
    keep_name(folder, first)
    assert run_name(folder, resumed=True) == first
    assert run_name(folder, resumed=False) != first
