"""`splitfl ledger show|budget|export`, as people meet it."""

from __future__ import annotations

import json
import re
import sqlite3
import stat
import sys
from contextlib import closing

import pytest

from splitfl.cli import app
from splitfl.data import fingerprint, load_rows
from splitfl.ledger_command import _up
from splitfl.options import run_app
from splitfl.privacy.ledger import Ledger
from tests.privacy.test_ledger import DATA, OTHER, RHO, bare, release

FORMAL = re.compile(
    r"formal: epsilon (\S+) at delta (\S+) for each (\S+), neighbours: replace one, adversary: (.+), over the (\d+) "
    r"releases? of the \S+ sent most \(rho (\S+); (\d+) in all\)"
)


@pytest.fixture
def book(tmp_path, monkeypatch):
    """The path of the default ledger; nothing is there yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPLITFL_LEDGER", str(tmp_path / "ledger.sqlite"))
    monkeypatch.delenv("SPLITFL_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def run(book, capsys):
    """Runs a command line; gives its output, or with `code` its error."""

    def call(words: str, code: int = 0) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_app(app, ["ledger", *words.split()])
        out, err = capsys.readouterr()
        assert (stop.value.code, err if code == 0 else out) == (code, ""), err
        return out if code == 0 else err

    return call


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"sentence {n}", "label": n % 2}) + "\n" for n in range(5)))
    return path


def figures(path):
    record = json.loads(path.read_text())
    assert record["command"] == "ledger show"
    return {(each["case"], each["metric"]): each for each in record["results"]}


# ---- show


def test_before_there_is_anything(run, book):
    assert "no release has been recorded" in run("show --json out.json")
    assert figures(book.with_name("out.json")) == {}
    assert not book.exists()
    assert "There is no ledger" in run("show --ledger elsewhere", code=3)
    assert "There is no ledger" in run("export", code=3)


def test_a_formal_account_is_shown_with_all_that_belongs_to_it(run, book):
    with Ledger(book) as ledger:
        ledger.note_dataset(DATA, "rows.jsonl")
        ledger.set_budget(DATA, unit="row", adversary="owner", epsilon=8.0, delta=1e-5, rho=1.5, releases=5)
        for name in "abc":
            ledger.charge(release(name, [1, 2]))
        ledger.charge(release("d", [2]))
        ledger.confirm("a")
    shown = run("show --json out.json")
    assert f"rows.jsonl ({DATA[:12]})" in shown
    epsilon, delta, unit, adversary, most, rho, releases = FORMAL.search(shown).groups()
    assert (delta, unit, adversary, most, rho, releases) == ("1e-05", "row", "owner", "4", "0.08", "4")
    assert "budget    5 releases of each row, and rho 1.5 for each row" in shown
    assert "left      1 release and rho 1.42" in shown
    assert "releases  4; most for one row: 4; 3 without an answer" in shown
    found = figures(book.with_name("out.json"))
    case = f"{DATA}, cut, owner, row"
    figure = found[case, "epsilon, most for one unit"]
    assert figure["unit"] == "delta 1e-05, row, replace one, owner, 4 releases"
    assert (figure["reach"], figure["value"]) == (8.0, pytest.approx(float(epsilon), abs=0.01))
    assert figure["value"] <= float(epsilon)
    assert found[case, "rho, most for one unit"]["value"] == pytest.approx(4 * RHO)
    assert (found[case, "releases left"]["value"], found[case, "releases"]["value"]) == (1, 4)


def test_the_epsilon_is_that_of_the_accountant(run, book):
    from splitfl.privacy.calibration import zcdp_epsilon

    with Ledger(book) as ledger:
        ledger.charge(release("a", [1], rho=0.5))
        ledger.charge(release("b", [1], rho=0.25, channel="gradients"))
    epsilon, delta, *_ = FORMAL.search(run("show")).groups()
    exact = zcdp_epsilon(0.75, 1e-6)
    assert delta == "1e-06"
    assert exact <= float(epsilon) <= exact + 0.01


def test_no_epsilon_is_printed_for_an_empirical_account(run, book):
    with Ledger(book) as ledger:
        ledger.charge(release("a", [1]))
        ledger.charge(bare("b", [2]))
        ledger.charge(release("c", [1], channel="adapter"))
    shown = run("show --json out.json")
    first, second = shown.split("counted ")[1:]
    assert ("(cut)" in first, "(adapter)" in second) == (True, True)
    assert "empirical: 1 of 2 releases had no formal bound" in first
    assert "epsilon" not in first
    assert FORMAL.search(second)
    found = figures(book.with_name("out.json"))
    assert found[f"{DATA}, cut, owner, row", "epsilon, most for one unit"]["value"] is None
    assert found[f"{DATA}, cut, owner, row", "rho, most for one unit"]["value"] is None


def test_without_the_accountant_rho_is_shown(run, book, monkeypatch):
    with Ledger(book) as ledger:
        ledger.charge(release("a", [1]))
    monkeypatch.setitem(sys.modules, "dp_accounting", None)  # as if it were not installed
    shown = run("show")
    assert "formal: zCDP for each row" in shown
    assert "pip install 'splitfl[privacy]'" in shown
    assert "epsilon 0" not in shown
    assert "dp-accounting" in run(f"budget {DATA} --epsilon 8 --delta 1e-6", code=2)


def test_one_data_set_by_the_beginning_of_its_fingerprint(run, book):
    with Ledger(book) as ledger:
        for name, dataset in (("a", DATA), ("b", OTHER), ("c", DATA[:-1] + "f")):
            ledger.charge(release(name, dataset=dataset))
    assert OTHER[:12] in run("show")
    assert OTHER[:12] not in run(f"show --dataset {DATA}")
    assert DATA[:12] not in run("show --dataset e2")
    assert "2 data sets of the ledger begin with 'd1'" in run("show --dataset d1", code=2)
    assert "No data set of the ledger" in run("show --dataset 77", code=2)


@pytest.mark.parametrize(
    ("epsilon", "text"),
    [
        (1.0, "1.00"),
        (1.001, "1.01"),
        (0.994, "1.00"),
        (0.0123456, "0.0124"),
        (0.0999, "0.0999"),
        (0.0, "0.00"),
        (12.34, "12.34"),
    ],
)
def test_an_epsilon_is_rounded_up(epsilon, text):
    assert _up(epsilon) == text
    assert float(_up(epsilon)) >= epsilon


# ---- budget


def test_a_budget_for_a_file_of_rows(run, book, rows):
    told = run("budget rows.jsonl --releases 3 --task sequence-classification")
    dataset = fingerprint(load_rows(rows, task="sequence-classification"))
    assert f"5 rows, read as labelled text for sequence-classification: data set rows.jsonl ({dataset[:12]})" in told
    assert "left: 3 releases" in told
    assert stat.S_IMODE(book.stat().st_mode) == 0o600
    with Ledger(book) as ledger:
        (account,) = ledger.spent(dataset)
        assert (account.budget.releases, account.adversary, account.group) == (3, "owner", "cut")
    # Read for another task they are other rows: the answer says which were meant.
    assert dataset[:12] not in run("budget rows.jsonl --releases 3")


def test_a_budget_in_epsilon(run, book):
    from splitfl.privacy.calibration import zcdp_epsilon

    told = run(f"budget {DATA} --epsilon 8 --delta 1e-6 --unit person --adversary owner")
    assert "neighbours: replace one (epsilon 8 at delta 1e-06)" in told
    with Ledger(book) as ledger:
        (account,) = ledger.summary()
        assert zcdp_epsilon(account.budget.rho, 1e-6) == pytest.approx(8, rel=1e-6)
    assert "nothing was released" in run("show")
    run(f"budget {DATA[:6]} --releases 2 --unit person")  # now by its beginning; replaces the one before
    with Ledger(book) as ledger:
        (account,) = ledger.summary()
        assert (account.budget.rho, account.budget.releases) == (None, 2)


def test_a_budget_for_an_adversary_that_nothing_was_released_to_is_remarked(run, book):
    with Ledger(book) as ledger:
        ledger.charge(release("a", adversary="the public"))
    assert "note: nothing was released to 'owner' so far, but to 'the public'" in run(f"budget {DATA} --releases 2")
    book.with_name("budget.toml").write_text('adversary = "The  Public"\nreleases = 2\n')
    told = run(f"budget {DATA} --config budget.toml")
    assert "left: 1 release\n" in told
    assert "note:" not in told


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--epsilon 8", "without --delta"),
        ("--delta 1e-6", "without --epsilon"),
        ("", "without a limit"),
        ("--epsilon -8 --delta 1e-6", "more than 0"),
        ("--epsilon 8 --delta 1", "between 0 and 1"),
        ("--releases -1", "0 or more"),
        ("--releases 1 --unit record", "'row', 'person'"),
        ("--releases 1 --channels activations", "'cut', 'adapter'"),
    ],
)
def test_budgets_that_make_no_sense(run, book, words, says):
    assert says in run(f"budget {DATA} {words}", code=2)
    assert not book.exists()


def test_a_data_set_that_is_neither_a_file_nor_known(run):
    error = run("budget missing.jsonl --releases 1", code=2)
    assert "missing.jsonl" in error
    assert "is no file of rows here" in error


def test_a_budget_for_another_unit_than_the_releases(run, book):
    with Ledger(book) as ledger:
        ledger.charge(release("a"))
    assert "--unit 'row'" in run(f"budget {DATA} --releases 3 --unit person", code=2)


# ---- export, and a ledger in trouble


def test_the_export_holds_every_release_and_no_unit(run, book):
    with Ledger(book) as ledger:
        ledger.charge(release("a", ["Ada"], unit="person"))
        ledger.charge(bare("b", ["Ada", "Bob"], unit="person"))
        ledger.confirm("a")
    printed = run("export")
    run("export --json out.json")
    assert book.with_name("out.json").read_text() == printed
    record = json.loads(printed)
    assert [(e["release_id"], e["unit_count"], e["rho"]) for e in record["entries"]] == [("a", 1, RHO), ("b", 2, None)]
    assert "Ada" not in printed
    hashed = json.loads(run("export --units"))
    assert hashed["entries"][0]["units"][0] in hashed["entries"][1]["units"]


@pytest.mark.parametrize("words", ["show", "export", f"budget {DATA} --releases 1"])
def test_a_ledger_in_trouble(run, book, words):
    Ledger(book).close()
    with closing(sqlite3.connect(book)) as db:
        db.execute("PRAGMA user_version = 2")
        db.commit()
    assert "newer splitfl" in run(words, code=3)
    book.write_bytes(b"\0" * 8192)
    assert "damaged" in run(words, code=3)
    assert book.read_bytes() == b"\0" * 8192
    book.unlink()
    book.mkdir()
    assert "cannot be" in run(words, code=6)
