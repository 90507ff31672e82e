"""Where a state lies: versions and the way between them, places that cannot be used, one owner at a time."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import inspect

from model_owner.state import Database
from model_owner.state.pending import day_of
from model_owner.state.reading import parties, usage
from model_owner.state.schema import META, METADATA, SCHEMA
from splitfl.errors import DataError, ResourceError, UsageError
from tests.model_owner.state.test_keeper import NOON, kept, served, sessions_in

OLD = Path(__file__).with_name("schema1.sql")


def old_state(tmp_path):
    path = tmp_path / "old.sqlite"
    with sqlite3.connect(path) as db:
        db.executescript(OLD.read_text(encoding="utf-8"))
    db.close()
    return path


def test_an_old_state_is_brought_up_to_date(tmp_path):
    path = old_state(tmp_path)
    with pytest.raises(DataError, match="has schema 1"):
        Database(path, write=False)
    one = kept(path)
    assert (one.spent_tokens("hospital"), one.spent_tokens("clinic")) == (1500, 70)  # what was served counts
    one.request_served(served("aa02", tokens=1, work="decode"))
    one.close()
    with Database(path, write=False) as database:
        sums = {(each.party, each.day): each.sums for each in usage(database, last="2026-11-30")}
        assert sums["hospital", "2026-11-02"]["tokens_forward"] == 1000
        assert sums["hospital", "2026-11-02"]["tokens_decode"] == 0
        assert len(parties(database, "2026-11-04")) == 2
    rows = sessions_in(path)
    assert (rows["bb01"]["why"], rows["bb01"]["ended"]) == ("lost", 1793750490.0)
    assert (rows["aa01"]["why"], rows["aa01"]["tokens_forward"]) == ("closed", 1000)
    assert rows["aa02"]["tokens_decode"] == 1


def test_old_tables_become_the_same_as_new_ones(place):
    """Migrations and the tables as they stand in the code name the same columns."""
    with Database(place) as database, database.engine.begin() as db:
        for table in METADATA.tables.values():
            columns = inspect(db).get_columns(table.name)
            assert {column["name"] for column in columns} == set(table.columns.keys()), table.name


def test_a_migration_that_fails_leaves_the_old_version(tmp_path):
    path = old_state(tmp_path)
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE writers (name VARCHAR)")  # in the way of the last step
    db.close()
    with pytest.raises(ResourceError):
        Database(path)
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT value FROM splitfl_state").fetchone() == ("1",)
        assert db.execute("SELECT SUM(tokens) FROM usage").fetchone() == (1570,)
    db.close()


def test_a_state_of_a_newer_splitfl_is_refused(place):
    Database(place).close()
    with Database(place) as database, database.engine.begin() as db:
        db.execute(META.update().values(value=str(SCHEMA + 1)))
    for write_too in (True, False):
        with pytest.raises(DataError) as refused:
            Database(place, write=write_too)
        assert f"schema {SCHEMA + 1}" in refused.value.problem
        assert refused.value.expected == f"at most schema {SCHEMA}"


def test_places_that_hold_something_else_are_refused(tmp_path):
    (tmp_path / "text").write_text("no database\n" * 200, encoding="utf-8")
    with pytest.raises(DataError, match="damaged, or no database"):
        Database(tmp_path / "text")
    with sqlite3.connect(tmp_path / "other") as db:
        db.execute("CREATE TABLE usage (x INTEGER)")
    db.close()
    with pytest.raises(DataError, match="no state of an owner"):
        Database(tmp_path / "other")
    with pytest.raises(ResourceError, match="There is no state"):
        Database(tmp_path / "missing", write=False)
    with pytest.raises(ResourceError, match="cannot be made"):
        Database(tmp_path / "text" / "below")


def test_one_owner_at_a_time_in_a_file(tmp_path):
    with Database(tmp_path / "s", server="owner"), pytest.raises(ResourceError, match="in use by another owner"):
        Database(tmp_path / "s", server="owner")
    Database(tmp_path / "s", server="owner").close()
    assert (tmp_path / "s").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        ("postgresql://me:secret@host/name", "holds a password"),
        ("postgresql://host/name?user=me&password=secret", "holds a password"),
        ("mysql://host/name", "another kind"),
        ("oracle+what://host/name", "kind"),
        ("://host", "no URL"),
    ],
)
def test_urls_that_cannot_be_used(place, problem):
    with pytest.raises(UsageError) as refused:
        Database(place)
    assert problem in refused.value.problem
    assert "secret" not in str(refused.value)


def test_a_server_that_is_not_there(tmp_path):
    pytest.importorskip("psycopg")
    with pytest.raises(ResourceError) as refused:
        Database(f"postgresql+psycopg://nobody@/none?host={tmp_path}&connect_timeout=2")
    assert "cannot be read or written" in refused.value.problem


def test_without_sqlalchemy_the_extra_is_named():
    code = "import sys; sys.modules['sqlalchemy'] = None\nimport model_owner.state"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "pip install 'splitfl[owner]'" in done.stderr


def test_days():
    assert day_of(NOON) == "2026-11-01"
    assert day_of(0) == "1970-01-01"
