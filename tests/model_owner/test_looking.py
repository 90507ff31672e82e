"""`splitfl status`, `splitfl usage` and reading a command's file again, without a running owner."""

from __future__ import annotations

import csv
import io
import json
import logging
import signal
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
from rich.console import Console

from model_owner.logs import JsonLines, logging_to
from model_owner.metrics import Look, Metrics, MetricsServer
from model_owner.observer import Served, SessionFacts
from model_owner.reload import CHANGEABLE, Reload
from model_owner.state import Database, Keeper
from model_owner.status import WHOLE, Figures, from_metrics, screen
from model_owner.usage import UNITS
from splitfl.config import ServeSettings
from splitfl.errors import UsageError
from splitfl.options import Origin, fields_of, origin_of_settings, read_again
from tests.live.child import child, splitfl_here
from tests.toy import Toy, refusal, settings_of

DAY = 86_400.0
FIRST = 1_793_534_400.0  # 2026-11-01 12:00 UTC


def facts(name, party):
    return SessionFacts(name=name, party=party, fingerprint=f"SHA256:{party}", protocol="split", wire_dtype="float32")


@pytest.fixture
def state(tmp_path):
    """Two parties, two days."""
    now = [FIRST]
    keeper = Keeper(Database(tmp_path / "state"), clock=lambda: now[0])
    for day, party, tokens in ((0, "hospital", 100), (1, "hospital", 50), (1, "clinic", 7)):
        now[0] = FIRST + day * DAY
        one = facts(f"{party}{day}", party)
        keeper.session_opened(one)
        keeper.request_served(
            Served(session=one.name, party=party, work="backward", tokens=tokens, bytes_in=1000, bytes_out=1100,
                   seconds=0.1)
        )  # fmt: skip
        keeper.charge(party, tokens)
        now[0] += 30
        keeper.session_ended(one, "closed", 30.0)
    keeper.close()
    return tmp_path / "state"


def read_csv(path):
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def test_usage_by_party_and_by_day(state, tmp_path, capsys):
    splitfl_here("usage", "--state", state, "--csv", tmp_path / "u.csv")
    clinic, hospital = read_csv(tmp_path / "u.csv")
    assert hospital == {
        "party": "hospital", "sessions": "2", "session_seconds": "60.000", "tokens_forward": "0",
        "tokens_backward": "150", "tokens_decode": "0", "bytes_in": "2000", "bytes_out": "2200", "requests": "2",
        "steps": "2",
    }  # fmt: skip
    assert (clinic["party"], clinic["tokens_backward"]) == ("clinic", "7")
    words = ["--state", state, "--from", "2026-11-02", "--to", "2026-11-02", "--by", "day"]
    splitfl_here("usage", *words, "--csv", tmp_path / "u.csv", "--json", tmp_path / "u.json")
    assert [(row["party"], row["day"], row["tokens_backward"]) for row in read_csv(tmp_path / "u.csv")] == [
        ("clinic", "2026-11-02", "7"), ("hospital", "2026-11-02", "50"),
    ]  # fmt: skip
    results = json.loads((tmp_path / "u.json").read_text(encoding="utf-8"))["results"]
    found = {(each["case"], each["metric"]): (each["value"], each["unit"]) for each in results}
    assert found["hospital 2026-11-02", "tokens_backward"] == (50, "tokens")
    assert len(found) == 2 * len(UNITS)
    capsys.readouterr()
    splitfl_here("usage", "--state", state)
    said = capsys.readouterr().out
    assert "hospital" in said
    assert "150" in said
    splitfl_here("usage", "--state", tmp_path / "missing", code=6)


def test_usage_of_an_empty_state_is_an_empty_table(tmp_path):
    Database(tmp_path / "s").close()
    splitfl_here("usage", "--state", tmp_path / "s", "--csv", tmp_path / "u.csv")
    assert read_csv(tmp_path / "u.csv") == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("usage --state s --from 2026-13-01", "Expected: a day such as 2026-11-30"),
        ("usage --state s --from 2026-11-02 --to 2026-11-01", "is after --to"),
        ("status", "Expected: exactly one of them"),
        ("status 9100 --state s", "Expected: exactly one of them"),
        ("status 9100 --json f", "add --once"),
        ("status nowhere", "PORT or HOST:PORT"),
        ("serve --model m --kit k --insecure-loopback --metrics-bind 1.2.3.4", "PORT or HOST:PORT"),
        ("serve --model m --kit k --insecure-loopback --server-name east", "no effect without --state"),
        ("serve --model m --kit k --insecure-loopback --log-format xml", "'xml' is not one of 'text', 'json'"),
    ],
)
def test_options_that_cannot_be_meant(capsys, words, said):
    assert said in " ".join(refusal(Toy(), capsys, words).split())


# ---- status


def shown(figures, before=None):
    console = Console(width=140, file=io.StringIO())
    console.print(screen(figures, before))
    return console.file.getvalue()


def test_rates_come_from_two_looks_and_not_from_a_restart():
    metrics = Metrics(lambda: Look(sessions=2, waiting=1, memory_used=1 << 20, memory_limit=1 << 30, draining=True))
    first = from_metrics(metrics.page().decode())
    assert first.whole["sessions open"] == (2, "sessions")
    metrics.request_served(
        Served(session="s", party="hospital", work="forward", tokens=500, bytes_in=1, bytes_out=1, seconds=0.1)
    )
    text = metrics.page().decode()
    second = from_metrics(text)
    two = Figures(moment=first.moment + 2.0, whole=second.whole, parties=second.parties)
    said = shown(two, first)
    assert "draining" in said
    assert "250/s" in said
    assert "hospital" in said
    again = Figures(moment=two.moment + 2.0, whole=first.whole, parties={})
    assert "/s" not in shown(again, two).replace("tokens/s", "").replace("0/s", "")


def test_every_sample_that_status_wants_is_shown_by_an_owner():
    metrics = Metrics()
    metrics.refused("busy", None)
    metrics.work_done(0.1, 0.1)
    metrics.request_served(
        Served(session="s", party="p", work="forward", tokens=1, bytes_in=1, bytes_out=1, seconds=0.1)
    )
    assert set(from_metrics(metrics.page().decode()).whole) == {name for name, _ in WHOLE.values()}


def _greet(listener):
    listener.settimeout(60)
    link, _ = listener.accept()
    with link:
        link.recv(4096)
        link.sendall(b"\xff\0\0\0\0\0\0\0\1\x7f\3\1CURVE" + bytes(48) + b"\n")


def test_status_of_something_else_and_of_nobody(capsys, monkeypatch):
    class Other(Metrics):
        def page(self):
            return b"<html>\n"

    server = MetricsServer(Other(), "127.0.0.1", 0)
    address = server.address.removeprefix("http://")
    try:
        splitfl_here("status", address, "--once", code=9)
    finally:
        server.close()
    splitfl_here("status", address, "--once", code=7)
    with socket.create_server(("127.0.0.1", 0)) as party_port:  # greets as ZeroMQ does
        greeter = threading.Thread(target=_greet, args=(party_port,))
        greeter.start()
        splitfl_here("status", f"127.0.0.1:{party_port.getsockname()[1]}", "--once", code=9)
        greeter.join(60)
    assert "not that of --bind" in capsys.readouterr().err
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    server = MetricsServer(Metrics(), "127.0.0.1", 0)
    try:
        splitfl_here("status", server.address.removeprefix("http://"), "--once")
    finally:
        server.close()


def test_status_from_the_state(state, tmp_path):
    splitfl_here("status", "--state", state, "--once", "--json", tmp_path / "s.json")
    results = json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))["results"]
    found = {(each["case"], each["metric"]): each["value"] for each in results}
    assert found["owner", "parties"] == 2
    assert found["party hospital", "budget spent"] == 150
    assert found["party hospital", "last seen"] == FIRST + DAY + 30


# ---- the log


def record(**extra):
    return logging.makeLogRecord({"msg": "text %s", "args": ("here",), "levelname": "INFO", "created": 0.25} | extra)


def test_lines_of_json():
    line = json.loads(JsonLines().format(record(session="ab12", msecs=250)))
    assert line == {"time": "1970-01-01T00:00:00.250Z", "level": "info", "message": "text here", "session": "ab12"}
    assert "session" not in json.loads(JsonLines().format(record()))


def test_a_log_file_that_is_moved_away_is_begun_again(tmp_path):
    file, log = tmp_path / "logs" / "owner.log", logging.getLogger("splitfl.owner")
    with logging_to(file, form="json"):
        log.info("before")
        file.rename(tmp_path / "old")
        log.info("after", extra={"session": "ab12"})
        log.debug("never")
    assert "before" in (tmp_path / "old").read_text(encoding="utf-8")
    (line,) = file.read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["session"] == "ab12"
    with logging_to(file):
        log.info("in words", extra={"session": "ab12"})
    assert file.read_text(encoding="utf-8").endswith("INFO [ab12] in words\n")


# ---- the file, again


SERVE = "serve --model m --kit k --insecure-loopback"


def started(tmp_path, monkeypatch, words, text):
    """Settings and origin of a `serve` that was started with this file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.toml").write_text(text, encoding="utf-8")
    toy, origins = Toy(), []
    handle = toy.handle
    toy.handle = lambda given: (origins.append(origin_of_settings()), handle(given))[1]
    from splitfl.options import command

    command(toy.app, ServeSettings, "serve", toy.handle)
    return settings_of(toy, f"{SERVE} --config c.toml {words}"), origins[-1]


def test_what_was_typed_stays_and_the_rest_follows_the_file(tmp_path, monkeypatch):
    settings, origin = started(tmp_path, monkeypatch, "--lease 5", "[serve]\nlease = 9.0\nmax_sessions = 3\n")
    assert (settings.lease, settings.max_sessions) == (5.0, 3)
    assert {"lease", "model", "kit", "insecure_loopback"} <= origin.typed
    assert "max_sessions" not in origin.typed
    (tmp_path / "c.toml").write_text("[serve]\nlease = 7.0\n[tune]\nseed = 3\n", encoding="utf-8")
    new = read_again(settings, origin)
    assert (new.lease, new.max_sessions, new.model) == (5.0, 16, "m")
    (tmp_path / "c.toml").write_text("[serve]\nlaese = 7.0\n", encoding="utf-8")
    with pytest.raises(UsageError, match="laese"):
        read_again(settings, origin)
    with pytest.raises(UsageError, match="no file"):
        read_again(settings, Origin(config=None, typed=frozenset()))


def test_a_required_setting_that_has_gone_from_the_file(tmp_path):
    (tmp_path / "c.toml").write_text("max_sessions = 3\n", encoding="utf-8")
    settings = ServeSettings(model="m", kit=tmp_path, insecure_loopback=True)
    origin = Origin(config=tmp_path / "c.toml", typed=frozenset({"insecure_loopback"}))
    with pytest.raises(UsageError, match="'model' is missing"):
        read_again(settings, origin)


def test_names_that_may_change_are_settings():
    assert {field.name for field in fields_of(ServeSettings)} >= CHANGEABLE


def test_a_reload_that_fails_changes_nothing_and_does_not_end_the_owner(tmp_path, caplog):
    (tmp_path / "c.toml").write_text('max_sessions = 3\nmemory_budget = "1MB"\nbind = "tcp://*:1"\n', encoding="utf-8")
    settings = ServeSettings(model="m", kit=tmp_path, insecure_loopback=True)
    origin = Origin(config=tmp_path / "c.toml", typed=frozenset({"model", "kit"}))
    read = threading.Event()
    server = SimpleNamespace(limits="old", reload_admission=read.set)
    reload = Reload(settings, origin, lambda new: None)
    with caplog.at_level(logging.ERROR, logger="splitfl.owner"):
        reload(server)
    assert read.is_set(), "the allow-list was not read"
    assert server.limits == "old"
    assert reload.settings is settings
    assert "old values stay" in caplog.text


def test_looking_loads_no_torch():
    """Or a look would take seconds, and hundreds of megabytes beside the owner's."""
    code = "import sys, model_owner.status, model_owner.usage; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is sent as SIGINT")
def test_a_live_view_goes_on_through_a_restart_until_ctrl_c(tmp_path):
    looks = threading.Semaphore(0)

    def look():
        looks.release()
        return Look(sessions=3)

    metrics = Metrics(look)
    server = MetricsServer(metrics, "127.0.0.1", 0)
    host, _, port = server.address.removeprefix("http://").partition(":")
    words = ["-m", "splitfl", "status", f"{host}:{port}", "--interval", "0.05"]
    try:
        with child(words, tmp_path) as running:
            for _ in range(60):  # several scrapes: each asks a dozen times
                assert looks.acquire(timeout=60)
            server.close()
            with socket.create_server((host, int(port))) as nobody:  # hangs up when it is asked
                nobody.settimeout(60)
                nobody.accept()[0].close()
            server = MetricsServer(metrics, host, int(port))
            while looks.acquire(blocking=False):
                pass
            assert looks.acquire(timeout=60), "it did not look again"
            running.process.send_signal(signal.SIGINT)
            assert running.wait(60) in (0, 130)
    finally:
        server.close()
    assert "sessions open" in running.stdout.text
    assert "Traceback" not in running.stderr.text
