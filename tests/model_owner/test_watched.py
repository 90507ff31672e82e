"""An owner that keeps, shows and logs, as a process: what `status` and `usage` say of it, and its file read again."""

from __future__ import annotations

import csv
import json
import re
import signal
import sqlite3
import time
import urllib.error
import urllib.request
from contextlib import closing
from pathlib import Path

import pytest
import torch

from model_owner.state import Database, Keeper
from party.connect import open_session
from splitfl.errors import RefusedError
from splitfl.link import TrunkRequest
from splitfl.wire.keys import load_keys, load_public
from tests.hostile.attacker import attacker
from tests.live.child import child, splitfl_here
from tests.live.owner import PARTIES, serve

pytestmark = pytest.mark.slow


@pytest.fixture
def options(tmp_path):
    """An owner that keeps and shows all it can, with a file of its own."""
    (tmp_path / "serve.toml").write_text("max_sessions = 5\nlease = 300.0\n", encoding="utf-8")
    return [
        "--config", tmp_path / "serve.toml", "--state", tmp_path / "state.sqlite", "--metrics-bind", "0",
        "--log-format", "json", "--log-file", tmp_path / "logs" / "owner.log",
    ]  # fmt: skip


def metrics_of(owner):
    return re.search(r"(http://127\.0\.0\.1:\d+)/metrics", owner.running.stderr.wait_for("metrics "))[1]


def get(url):
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def figures(path):
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    return {(each["case"], each["metric"]): each["value"] for each in results}


def log_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def wait_for(path, words, count=1):
    """Until so many lines of the log hold `words`; the last of them."""
    deadline = time.monotonic() + 60
    while True:
        found = [line for line in log_of(path) if words in line["message"]] if path.exists() else []
        if len(found) >= count:
            return found[-1]
        assert time.monotonic() < deadline, path.read_text(encoding="utf-8")
        time.sleep(0.02)


def test_a_watched_owner(tiny_llama, trunk, tmp_path, options, capsys):
    log = tmp_path / "logs" / "owner.log"
    hidden = torch.randn(2, 6, trunk.plan.width, generator=torch.Generator().manual_seed(8))
    with serve(*tiny_llama, tmp_path, options=options) as owner:
        address = metrics_of(owner)
        with closing(owner.session()) as session:
            output, step = session.forward(TrunkRequest(hidden=hidden, keep=True))
            session.backward(step, torch.ones_like(output))
            with pytest.raises(RefusedError):
                session.forward(TrunkRequest(hidden=torch.full_like(hidden, torch.nan)))
            _look_at_metrics(address, tmp_path)
            _read_the_file_again(owner, tmp_path / "serve.toml", log)
        wait_for(log, "session closed")
        _drain(owner, address, trunk)
    splitfl_here("usage", "--state", tmp_path / "state.sqlite", "--csv", tmp_path / "usage.csv")
    lines = csv.DictReader((tmp_path / "usage.csv").read_text(encoding="utf-8").splitlines())
    row = {line["party"]: line for line in lines}[PARTIES[0]]
    assert (row["tokens_backward"], row["steps"], row["sessions"]) == ("12", "1", "2")
    assert int(row["tokens_forward"]) >= 12 + 64 * 128
    splitfl_here("usage", "--state", tmp_path / "state.sqlite", "--by", "day", "--json", tmp_path / "usage.json")
    today = time.strftime("%Y-%m-%d", time.gmtime())
    assert {case for case, _ in figures(tmp_path / "usage.json")} == {f"{name} {today}" for name in PARTIES}
    capsys.readouterr()
    splitfl_here("status", "--state", tmp_path / "state.sqlite", "--once")
    said = capsys.readouterr().out
    assert "from its state" in said
    assert PARTIES[0] in said
    _scan(log, owner.keys, hidden, output.detach())


def _look_at_metrics(address, folder):
    assert get(f"{address}/healthz") == (200, "serving\n")
    splitfl_here("status", address.removeprefix("http://"), "--once", "--json", folder / "status.json")
    found = figures(folder / "status.json")
    assert found["owner", "sessions open"] == 1
    assert found["owner", "tokens"] == 24
    assert found["owner", "refusals"] == 1
    assert found[f"party {PARTIES[0]}", "tokens"] == 24
    assert found["owner", "resident"] > 10**7
    assert 'splitfl_refusals_total{code="not_finite"} 1.0' in get(f"{address}/metrics")[1]


def _read_the_file_again(owner, file, log):
    """One bad name, then one that cannot change, then values that can; the process goes on through all of it."""

    def reload(text, words):
        file.write_text(text, encoding="utf-8")
        owner.running.process.send_signal(signal.SIGHUP)
        return wait_for(log, words)["message"]

    assert "'max_sesions'" in reload("max_sesions = 1\n", "there is no key")
    assert reload("max_sessions = 1\nworkers = 2\nlease = 9.0\n", "workers cannot change").endswith(
        "while the owner runs"
    )
    with closing(owner.session(PARTIES[1])):  # there is still room for more than one
        pass
    assert "max_tokens above the 32768" in reload("max_tokens = 40000\n", "max_tokens")
    said = reload("max_sessions = 1\nlease = 300.0\n", "read again: max_sessions")
    assert said == "the configuration was read again: max_sessions is 1"
    with pytest.raises(RefusedError) as refused:
        owner.session(PARTIES[1])
    assert refused.value.code == "busy"
    reload("max_sessions = 5\nlease = 300.0\n", "max_sessions is 5")
    owner.running.process.send_signal(signal.SIGHUP)
    wait_for(log, "nothing has changed")


def _drain(owner, address, trunk):
    """Health says 503 from SIGTERM until the end."""
    with attacker(owner, PARTIES[0]) as busy:
        busy.opened()
        for step in range(8):
            busy.forward(step, torch.zeros(64, 128, trunk.plan.width))
        busy.result()
        owner.running.process.terminate()
        seen = set()
        while owner.running.process.poll() is None:
            try:
                seen.add(get(f"{address}/healthz"))
            except OSError:  # it has gone
                break
        busy.greeted.clear()
        assert owner.running.wait(60) == 0
    assert (503, "draining\n") in seen


def _scan(log, keys, *tensors):
    """No key, no number of a tensor, in any spelling that the log could have given it."""
    text = log.read_text(encoding="utf-8")
    lines = log_of(log)
    assert {"time", "level", "message"} <= set.intersection(*map(set, lines))
    sessions = {line["session"] for line in lines if line.get("session")}
    assert len(sessions) == 3
    assert all(re.fullmatch(r"[0-9a-f]{12}", each) for each in sessions)
    for name in ("owner", *PARTIES):
        assert load_public(keys / f"{name}.key").decode() not in text
        assert load_keys(keys / f"{name}.key_secret").secret.decode() not in text
    for tensor in tensors:
        for value in tensor.flatten().tolist()[:500]:
            assert f"{abs(value):.4f}" not in text
            assert repr(abs(value))[:8] not in text


def test_what_a_killed_owner_remembers(tiny_llama, trunk, tmp_path, capsys):
    hidden = torch.randn(2, 6, trunk.plan.width, generator=torch.Generator().manual_seed(8))
    state = tmp_path / "state.sqlite"
    model_dir, kit_dir = tiny_llama
    words = ["serve", "--model", model_dir, "--kit", kit_dir, "--insecure-loopback"]
    words += ["--bind", "tcp://127.0.0.1:0", "--state", state]
    with child(["-m", "splitfl", *words], tmp_path) as first:
        address = first.stdout.wait_for("ready ").split()[1]
        link = {"owner_key": None, "key": None, "insecure_loopback": True, "timeout_s": 60.0}
        with closing(open_session(trunk.plan, address, **link)) as session:
            session.forward(TrunkRequest(hidden=hidden))
            deadline = time.monotonic() + 30
            while not _rows(state, "SELECT requests FROM sessions WHERE requests = 1"):
                assert time.monotonic() < deadline
            splitfl_here(*words, code=6)
            assert "in use by another owner" in capsys.readouterr().err
            first.process.kill()
            assert first.wait() == -signal.SIGKILL
    Keeper(Database(state, server="owner")).close()  # as the next owner does first of all
    assert _rows(state, "SELECT why, tokens_forward FROM sessions") == [("lost", 12)]


def _rows(path: Path, question: str):
    if not path.exists():
        return []
    with closing(sqlite3.connect(path)) as db:
        try:
            return db.execute(question).fetchall()
        except sqlite3.OperationalError:  # the tables are being made
            return []
