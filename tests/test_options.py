"""The machinery of commands: the config file, the way back into it, and how a command ends."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import typing
from pathlib import Path

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st

from splitfl import config, config_keys
from splitfl.errors import RefusedError, SplitflError, UsageError
from splitfl.options import Settings, command, fields_of, plain_settings, run_app, to_toml
from tests.toy import COMMANDS, TUNE, Toy, refusal, settings_of


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPLITFL_DEBUG", raising=False)
    return Toy()


def test_a_file_fills_what_the_command_line_leaves_out(toy, tmp_path):
    (tmp_path / "both.toml").write_text(
        textwrap.dedent(
            """
            kit = "kit"
            threads = 2
            [serve]
            model = "MODEL"
            insecure-loopback = true
            [tune]
            owner = "tcp://127.0.0.1:5555"
            insecure_loopback = true
            train = "rows.jsonl"
            out = "run"
            learning-rate = 1
            lora_r = 4
            threads = 3
            columns = ["prompt=q"]
            target_modules = "all-linear"
            [keys.new]
            name = "hospital"
            """
        ),
        encoding="utf-8",
    )
    tune = settings_of(toy, "tune --config both.toml --seed 7 --out elsewhere")
    assert tune == config.TuneSettings(
        kit=Path("kit"),
        owner="tcp://127.0.0.1:5555",
        insecure_loopback=True,
        train=Path("rows.jsonl"),
        out=Path("elsewhere"),
        learning_rate=1.0,
        r=4,
        threads=3,
        columns=("prompt=q",),
        target_modules=("all-linear",),
        seed=7,
    )
    assert settings_of(toy, "serve --config both.toml").threads == 2
    assert settings_of(toy, "serve --config both.toml --threads 5").threads == 5


def test_tables_of_commands_of_two_words_and_positional_settings(toy, tmp_path):
    (tmp_path / "k.toml").write_text(
        '[keys]\nout = "a"\n[keys.new]\nname = "hospital"\n[keys.show]\npaths = ["b", "c"]\n'
    )
    assert settings_of(toy, "keys new --config k.toml") == config_keys.KeysNew(name="hospital", out=Path("a"))
    assert settings_of(toy, "keys new law --config k.toml").name == "law"
    (tmp_path / "k.toml").write_text('[keys.show]\npaths = ["b", "c"]\n')
    assert settings_of(toy, "keys show --config k.toml").paths == (Path("b"), Path("c"))


def test_a_command_that_stands_alone_reads_its_table_too(tmp_path):
    got: list[Settings] = []
    app = typer.Typer()
    command(app, config.DemoSettings, "demo", got.append)
    (tmp_path / "d.toml").write_text("[demo]\nmax_steps = 3\n")
    with pytest.raises(SystemExit) as stop:
        run_app(app, ["--config", str(tmp_path / "d.toml")])
    assert stop.value.code == 0
    assert got == [config.DemoSettings(max_steps=3)]


def test_yaml_says_the_same(toy, tmp_path):
    (tmp_path / "t.yaml").write_text("demo:\n  max-steps: 3\n  keep: no\n  json: null\nseed: 4\n", encoding="utf-8")
    assert settings_of(toy, "demo --config t.yaml") == config.DemoSettings(max_steps=3, keep=False, seed=4)
    # YAML 1.1 reads 1e-3 as text, since it has no point.
    (tmp_path / "lr.yml").write_text("learning_rate: 1e-3\n", encoding="utf-8")
    assert settings_of(toy, f"{TUNE} --config lr.yml").learning_rate == 1e-3
    (tmp_path / "empty.yaml").write_text("", encoding="utf-8")
    assert settings_of(toy, "demo --config empty.yaml") == config.DemoSettings()


def test_a_path_may_start_at_home(toy, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    (tmp_path / "d.toml").write_text('out = "~/demo"\n')
    assert settings_of(toy, "demo --config d.toml").out == tmp_path / "me/demo"


BAD_FILES = [
    ("d.toml", "max_stps = 3", ["d.toml", "'max_stps'", "did you mean 'max_steps'?"]),
    ("d.toml", "[tuen]\nseed = 3", ["d.toml", "table 'tuen'", "did you mean 'tune'?"]),
    ("d.toml", "[demo]\nlearning_rate = 3", ["d.toml", "'learning_rate'", "Next:"]),
    ("d.toml", "max_steps = 'three'", ["d.toml", "'max_steps'", "'three' (text)", "Expected: a whole number"]),
    ("d.toml", "max_steps = 3.0", ["d.toml", "3.0 (a number)", "Expected: a whole number"]),
    ("d.toml", "max_steps = true", ["d.toml", "(true or false)", "Expected: a whole number"]),
    ("d.toml", "keep = 1", ["d.toml", "'keep'", "1 (a whole number)", "Expected: true or false"]),
    ("d.toml", "out = 1", ["d.toml", "Expected: a path"]),
    ("d.toml", "out = 2020-01-01", ["d.toml", "a date", "Expected: a path"]),
    ("d.toml", "max_steps = [3]", ["d.toml", "[3] (a list)", "Expected: a whole number"]),
    ("d.toml", "max_steps = 0", ["d.toml", "'max_steps'", "0", "Expected: 1 or more"]),
    ("d.toml", "max_steps = 3\nmax-steps = 4", ["d.toml", "'max_steps'", "twice"]),
    ("d.toml", "demo = 3", ["d.toml", "'demo'"]),
    ("d.toml", "max_steps = ", ["d.toml", "not TOML", "line 1"]),
    ("d.yaml", "max_steps: [", ["d.yaml", "not YAML", "line 2"]),
    ("d.yaml", "- max_steps", ["d.yaml", "a list", "Expected: a table"]),
    ("d.yaml", "max_steps: null", ["d.yaml", "'max_steps' is empty", "Expected: a whole number"]),
    ("d.yaml", "max_steps: 1e3x", ["d.yaml", "'1e3x' (text)", "Expected: a whole number"]),
    ("d.json", "{}", ["d.json", "Expected: a name ending in .toml"]),
    ("d.toml", b"\xff", ["d.toml", "UTF-8"]),
]


@pytest.mark.parametrize(("name", "text", "said"), BAD_FILES)
def test_a_file_that_cannot_be_meant_is_refused(toy, capsys, tmp_path, name, text, said):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode() + b"\n")
    message = refusal(toy, capsys, f"demo --config {name}")
    for part in said:
        assert part in message


def test_lists_and_choices_in_a_file_are_checked_one_by_one(toy, capsys, tmp_path):
    (tmp_path / "b.toml").write_text('shapes = ["8x128", "big"]\n')
    assert "Expected: ROWSxLENGTH" in refusal(toy, capsys, "bench x --config b.toml")
    (tmp_path / "b.toml").write_text('shapes = ["8x128", 4]\n')
    assert "Expected: a list, each text" in refusal(toy, capsys, "bench x --config b.toml")
    (tmp_path / "b.toml").write_text('dtype = "float8"\n')
    assert "Expected: one of float32, bfloat16, float16" in refusal(toy, capsys, "bench x --config b.toml")


def test_a_missing_file_and_a_missing_option(toy, capsys):
    assert "nowhere.toml cannot be read: No such file" in refusal(toy, capsys, "demo --config nowhere.toml")
    message = refusal(toy, capsys, "kit out/")
    assert "Missing option '--model'" in message
    assert "see splitfl kit --help" in message
    assert "--config" in message


# Any text that a file can hold; the control characters try the escapes of TOML.
_TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12)
_PATHS = _TEXT.filter(lambda text: "\0" not in text).map(Path) | st.just(Path("~/x"))
_VALUES = {
    str: _TEXT,
    int: st.integers(-1, 2**40),
    float: st.floats(allow_nan=False, allow_infinity=False),
    bool: st.booleans(),
    Path: _PATHS,
}
_SPECIAL = {
    "owner": st.sampled_from(["tcp://127.0.0.1:1", "tcp://[::1]:65535", "tcp://owner.example:5555"]),
    "bind": st.sampled_from(["tcp://127.0.0.1:0", "tcp://*:5555"]),
    "metrics_bind": st.sampled_from(["9100", "127.0.0.1:0", "[::1]:9100"]) | st.none(),
    "address": st.sampled_from(["9100", "localhost:9100"]),
    "server_name": st.just("owner"),
    **dict.fromkeys(("from_day", "to_day"), st.just("2026-11-30")),
    **dict.fromkeys(("in_flight_bytes", "max_bytes"), st.sampled_from(["4GB", "512 MiB"])),
    "record_limit": st.just("2GB"),
    "micro_batches": st.sampled_from(["1", "2", "auto"]),
    "label_noise": st.just("none"),
    **{name: st.none() for name in ("draft", "draft_tokens", "draft_model")},
    "tensor_parallel": st.just(False),
    "memory_budget": st.sampled_from(["4GB", "512 MiB", "1000000"]),
    "device": st.sampled_from(["cpu", "cuda", "cuda:3"]),
    "columns": st.sampled_from([(), ("prompt=a",), ("prompt=a", "completion=b=c")]),
    "shapes": st.lists(st.sampled_from(["8x128", "1x1"])).map(tuple),
    "insecure_loopback": st.just(False),
    "training_args": st.just(()),
    "label_names": st.just(()),
    "num_labels": st.none(),
    **dict.fromkeys(("key", "owner_key", "parties"), _PATHS),
    **{name: st.none() for name in ("temperature", "top_k", "top_p", "prompt_file", "adapter", "max_norm")},
    "prompt": _TEXT,
    # Mechanisms that do not go together are refused; here are some that do.
    **{name: st.none() for name in ("epsilon", "delta", "unit", "eta", "keep_largest", "gradient_clip")},
    **{name: st.none() for name in ("gradient_sigma", "decorrelate", "label_epsilon", "emulator")},
    **{name: st.none() for name in ("dp_epsilon", "dp_noise_multiplier", "dp_delta", "dp_clip")},
    "dp_freeze_a": st.just(False),
    "noise": st.just("gauss"),
    "clip": st.floats(0.1, 1e6),
    "sigma": st.floats(0.1, 1e6),
    "quantise": st.sampled_from(["none"]) | st.none(),
    "snap": st.just(False),
    "hide_lengths": st.just(False),
}


def _values(field):
    if field.name in _SPECIAL:
        return _SPECIAL[field.name]
    choices = typing.get_args(field.kind)
    one = st.sampled_from(choices) if choices else _VALUES[field.kind]
    one = one.filter(lambda value: all(check.test(value) for check in field.checks))
    if field.many:
        return st.lists(one, max_size=3).map(tuple)
    return st.none() | one if field.optional else one


@st.composite
def _any_settings(draw):
    # Those left out refuse most combinations of values; their own tests write and read them.
    left_out = {"status", "audit", "bench", "emulator", "plugin", "margin", "federate", "fedmod"}
    name = draw(st.sampled_from(sorted(set(COMMANDS) - left_out)))
    values = {field.name: draw(_values(field)) for field in fields_of(COMMANDS[name])}
    if values.get("max_steps") == 0:
        values["max_steps"] = -1 if name == "tune" else 1
    return name, COMMANDS[name](**values)


@settings(max_examples=60, deadline=None)
@given(_any_settings())
def test_settings_that_were_written_come_back(drawn):
    name, written = drawn
    toy = Toy()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "config.toml"
        to_toml(written, path, ["a remark"])
        assert os.listdir(directory) == ["config.toml"]
        assert settings_of(toy, [name, "--config", str(path)]) == written


def test_an_empty_list_is_not_the_default(toy, tmp_path):
    (tmp_path / "b.toml").write_text('name = "x"\nmodels = []\n')
    assert settings_of(toy, "bench --config b.toml").models == ()


def test_plain_settings_hold_only_what_toml_can():
    plain = plain_settings(config.DemoSettings(out=Path("a/b")))
    assert plain == {"out": "a/b", "max_steps": 60, "seed": 0, "keep": True}


def test_a_settings_class_that_files_could_not_hold_is_a_programming_mistake():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Odd(Settings):
        limit: typing.Annotated[int | None, "help"] = 3

    Odd.__annotations__["limit"] = typing.Annotated[int | None, "help"]
    with pytest.raises(TypeError, match="None must be its default"):
        fields_of(Odd)


ENDINGS = [
    (UsageError("Problem.", expected="this", hint="do that"), 2, "error: Problem.\nExpected: this\nNext: do that\n"),
    (RefusedError("The owner said no.", code="busy"), 8, "error: The owner said no.\n"),
    (OSError(errno.ENOSPC, "No space left on device", "run/x"), 6, "error: The disk is full while writing run/x.\n"),
    (PermissionError(errno.EACCES, "Permission denied", "rows"), 6, "error: rows: Permission denied.\n"),
    (MemoryError(), 6, "error: There is not enough memory"),
    (KeyboardInterrupt(), 130, "Interrupted.\n"),
    (typer.Exit(3), 3, ""),
    (typer.Exit(), 0, ""),
]


@pytest.mark.parametrize(("error", "code", "said"), ENDINGS, ids=lambda value: type(value).__name__)
def test_every_ending_has_its_code_and_its_words(toy, capsys, error, code, said):
    toy.error = error
    assert toy("demo") == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(said)
    assert "Traceback" not in printed.err
    assert "\x1b" not in printed.err, "colours belong on a terminal"


def test_a_full_disk_is_seen_behind_another_error(toy, capsys):
    toy.error = RuntimeError("writing failed")
    toy.error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert toy("demo") == 6
    assert "disk is full" in capsys.readouterr().err


def test_a_bug_says_where_but_not_what_unless_asked(toy, capsys, monkeypatch):
    toy.error = ValueError("row: the patient has measles")
    assert toy("demo") == 70
    said = capsys.readouterr().err
    assert "ValueError in tests/toy.py, line" in said
    assert "--debug" in said
    assert "measles" not in said
    assert "Traceback" not in said
    for words, variable in (("demo --debug", ""), ("--debug demo", "0"), ("demo", "1")):
        monkeypatch.setenv("SPLITFL_DEBUG", variable)
        assert toy(words) == 70
        said = capsys.readouterr().err
        assert "Traceback" in said
        assert "measles" in said


def test_the_number_a_handler_returns_is_the_exit_code(toy):
    toy.code = 4
    assert toy("demo") == 4


def test_colours_on_a_terminal_only(toy, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    toy.error = SplitflError("Problem with [red]brackets[/red].")
    assert toy("demo") == 70
    said = capsys.readouterr().err
    assert "\x1b[" in said
    assert "[red]brackets[/red]" in said, "text is not markup"


def test_ctrl_c_in_a_real_process(tmp_path):
    script = tmp_path / "wait.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys, threading
            import typer
            from splitfl.config import DemoSettings
            from splitfl.options import command, run_app

            def wait(settings):
                print("ready", flush=True)
                threading.Event().wait(60)

            app = typer.Typer()
            command(app, DemoSettings, "demo", wait)
            run_app(app)
            """
        ),
        encoding="utf-8",
    )
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 130
    assert said == "Interrupted.\n"
