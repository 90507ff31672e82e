"""A place for a state, of either kind."""

from __future__ import annotations

import pytest
from sqlalchemy import create_engine

from model_owner.state.schema import METADATA
from tests.model_owner.state.places import missing_postgres, postgres


@pytest.fixture(scope="session")
def server():
    problem = missing_postgres()
    if problem:
        pytest.skip(problem)
    with postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request, tmp_path):
    """A path or URL where there is no state yet."""
    if request.param == "sqlite":
        yield str(tmp_path / "owner.sqlite")
        return
    url = request.getfixturevalue("server")
    engine = create_engine(url)
    METADATA.drop_all(engine)
    engine.dispose()
    yield url
