"""kill -9 at the owner's state at random points: nothing that was acknowledged is lost, nothing is there twice."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import threading
import time

import pytest
from sqlalchemy import select

from model_owner.refusals import Refusal
from model_owner.state import Database, Keeper
from model_owner.state.schema import CHARGES
from model_owner.state.spending import RESERVE_SHARE
from tests.live.child import child
from tests.model_owner.state.dies import TOKENS
from tests.model_owner.state.places import missing_postgres, own_server

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs fork and SIGKILL")


def killed(place, rounds, seed, folder):
    with child(["-m", "tests.model_owner.state.dies", place, str(rounds), str(seed)], folder) as running:
        assert running.wait(600) == 0, running.stderr.text
    return json.loads(running.stdout.text.splitlines()[-1])


def test_twenty_kills(tmp_path):
    found = killed(tmp_path / "state.sqlite", 20, 7, tmp_path)
    assert found["rounds"] == 20
    assert found["acknowledged"] > 50
    assert found["tokens acknowledged"] > 0


@pytest.mark.long
def test_twenty_kills_with_a_server(server, tmp_path):
    """The same with PostgreSQL: the owner is killed, the server is not."""
    from sqlalchemy import create_engine

    from model_owner.state.schema import METADATA

    engine = create_engine(server)
    METADATA.drop_all(engine)
    engine.dispose()
    found = killed(server, 20, 8, tmp_path)
    assert found["acknowledged"] > 50


@pytest.mark.long
@pytest.mark.timeout(900)
def test_five_hundred_kills(tmp_path):
    found = killed(tmp_path / "state.sqlite", 500, int(os.environ.get("SPLITFL_KILL_SEED", "1")), tmp_path)
    assert found["rounds"] == 500
    assert found["killed while it opened"] > 10
    begun = found["tokens counted in all"] - found["tokens acknowledged"]
    assert 0 < begun <= 500 * TOKENS + found["tokens acknowledged"] // RESERVE_SHARE  # one request a kill, and reserves
    assert found["of them reserves that a kill left"] > 0
    print(found)


@pytest.mark.long
def test_a_server_that_crashes_again_and_again():
    """The owner goes on, waits for it, and what it writes then is there once."""
    if shutil.which("initdb") is None or missing_postgres():
        pytest.skip(missing_postgres() or "initdb is not on the PATH")
    answered, refused, ending = 0, 0, threading.Event()
    with own_server() as server:
        keeper = Keeper(Database(server.url, server="owner"))

        async def answer():
            nonlocal answered, refused
            while not ending.is_set():
                keeper.charge("hospital", 10)
                try:
                    await keeper.secured("hospital")
                    answered += 10
                except Refusal:
                    refused += 10

        thread = threading.Thread(target=lambda: asyncio.run(answer()))
        thread.start()
        chance = random.Random(4)
        try:
            for _ in range(6):
                time.sleep(chance.uniform(0.05, 0.4))  # the point at which it crashes, not a wait for anything
                server.stop()
                server.start()
        finally:
            ending.set()
            thread.join(120)
        keeper.close()
        with Database(server.url, write=False) as database, database.engine.begin() as db:
            (row,) = db.execute(select(CHARGES)).all()
    assert answered > 0
    assert row.tokens == answered + refused
