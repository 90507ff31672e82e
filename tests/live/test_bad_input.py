"""What a mistake gets: a sentence that names the thing, what was expected and what to do; an exit code by class."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from splitfl.wire.keys import AllowList, new_keys
from tests.live.child import splitfl_here
from tests.live.models import make_kit, save_tiny
from tests.live.owner import Owner, serve

pytestmark = pytest.mark.slow


def tune_words(owner: Owner, config: Path, out: Path, *more: str | Path) -> list[str | Path]:
    return ["tune", *owner.link(), "--config", config, "--out", out, *more]


def replaced(words: list[str | Path], option: str, value: str | Path) -> list[str | Path]:
    """`words` with another value behind `option`."""
    place = words.index(option)
    return [*words[: place + 1], value, *words[place + 2 :]]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('{"prompt": "a secret word", "completion": 3}', "completion of type number"),
        ('{"prompt": "a secret word"', "not JSON"),
        ('{"question": "a secret word"}', "question"),
    ],
    ids=["number", "torn", "unknown field"],
)
def test_the_first_bad_row_is_named_and_not_shown(owner, tune_config, tmp_path, capsys, line, found):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "fine", "completion": "fine"}\n' + line + "\n", encoding="utf-8")
    splitfl_here(*tune_words(owner, tune_config, tmp_path / "run", "--train", rows), code=3)
    told = capsys.readouterr().err
    assert f"{rows}:2" in told
    assert found.lower() in told.lower()
    assert "secret" not in told
    assert not (tmp_path / "run").exists()


def test_an_empty_and_a_missing_file(owner, tune_config, tmp_path, capsys):
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    splitfl_here(*tune_words(owner, tune_config, tmp_path / "run", "--train", empty), code=3)
    assert "holds no rows" in capsys.readouterr().err
    splitfl_here(*tune_words(owner, tune_config, tmp_path / "run", "--train", tmp_path / "none.jsonl"), code=3)
    assert "none.jsonl" in capsys.readouterr().err


def test_a_row_beyond_the_length_and_a_length_beyond_the_model(owner, tune_config, tmp_path, capsys):
    splitfl_here(*tune_words(owner, tune_config, tmp_path / "run", "--max-length", "4"), code=3)
    told = capsys.readouterr().err
    assert "train.jsonl:1" in told
    assert "4" in told
    splitfl_here(*tune_words(owner, tune_config, tmp_path / "run", "--max-length", "4096"), code=2)
    assert "positions end at 128" in capsys.readouterr().err


def test_a_batch_beyond_what_the_owner_allows(tiny_llama, tune_config, tmp_path, capsys):
    with serve(*tiny_llama, tmp_path, options=["--max-tokens", "64"]) as small:
        splitfl_here(*tune_words(small, tune_config, tmp_path / "run"), code=6)
    told = capsys.readouterr().err
    assert "beyond what the owner allows" in told
    assert "--max-tokens" in told


def test_keys_that_are_unknown_revoked_open_or_of_another_owner(owner, tune_config, tmp_path, capsys):
    words = tune_words(owner, tune_config, tmp_path / "run")
    public, secret = new_keys("stranger", tmp_path / "stranger")
    splitfl_here(*replaced(words, "--key", secret), code=8)
    assert "does not admit this key" in capsys.readouterr().err
    splitfl_here(*replaced(words, "--owner-key", public), code=5)
    assert "does not hold the key that is pinned here" in capsys.readouterr().err
    assert owner.keys is not None
    AllowList(owner.keys / "parties").add(public)
    AllowList(owner.keys / "parties").revoke("stranger")
    splitfl_here(*replaced(words, "--key", secret), code=8)
    assert "splitfl keys allow" in capsys.readouterr().err
    secret.chmod(0o644)
    splitfl_here(*replaced(words, "--key", secret), code=5)
    assert "chmod 600" in capsys.readouterr().err
    splitfl_here(*replaced(words, "--key", tmp_path / "none.key_secret"), code=5)
    assert "none.key_secret" in capsys.readouterr().err


def test_an_owner_that_is_not_there(owner, tune_config, tmp_path, capsys):
    words = replaced(tune_words(owner, tune_config, tmp_path / "run"), "--owner", "tcp://127.0.0.1:1")
    splitfl_here(*words, "--timeout", "1", code=7)
    told = capsys.readouterr().err
    assert "127.0.0.1:1" in told
    assert "refused" in told


def test_a_kit_of_another_cut_shows_both_fingerprints(owner, tune_config, tmp_path, capsys):
    other = tmp_path / "kit"
    splitfl_here("kit", other, "--model", owner.model_dir, "--bottom", "1", "--top", "2", "--no-verify")
    capsys.readouterr()
    splitfl_here(*replaced(tune_words(owner, tune_config, tmp_path / "run"), "--kit", other), code=8)
    told = capsys.readouterr().err
    assert told.count("trunk") >= 2
    assert told.count("plan") >= 2


def test_an_owner_refuses_a_kit_of_another_model_and_a_port_in_use(owner, tmp_path, capsys):
    assert owner.keys is not None
    other = shutil.copytree(owner.model_dir, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    security = ["--key", owner.keys / "owner.key_secret", "--parties", owner.keys / "parties"]
    splitfl_here("serve", "--model", other, "--kit", owner.kit_dir, "--bind", "tcp://127.0.0.1:0", *security, code=4)
    assert "was cut from trunk" in capsys.readouterr().err
    splitfl_here(
        "serve", "--model", owner.model_dir, "--kit", owner.kit_dir, "--bind", owner.address, *security, code=6
    )
    assert "in use" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none(owner, tune_config, tmp_path, capsys):
    splitfl_here(*tune_words(owner, tune_config, tmp_path / "run", "--device", "cuda"), code=6)
    assert "no CUDA device" in capsys.readouterr().err


def test_options_that_do_not_exist(owner, tune_config, tmp_path, capsys):
    for more, hint in (
        (("--protocol", "splt"), "'split'"),
        (("--target-modules", "q_prj"), "'q_proj'"),
        (("--training-args", "warmup_ste=3"), "warmup_ste"),
    ):
        splitfl_here(*tune_words(owner, tune_config, tmp_path / "run", *more), code=2)
        assert hint in capsys.readouterr().err


def test_a_checkpoint_of_another_plan_is_not_resumed(owner, tune_config, finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run / "adapter")
    other_model = save_tiny("llama", tmp_path / "model")
    other = make_kit(other_model, tmp_path / "kit", dtype="bfloat16")
    with serve(other_model, other, tmp_path) as second:
        splitfl_here(*tune_words(second, tune_config, run, "--resume"), code=4)
    told = capsys.readouterr().err
    assert "belongs to plan" in told
    assert "Expected: plan" in told


def test_a_full_disk_leaves_no_half_checkpoint(owner, tune_config, tmp_path):
    """The kernel refuses to let any file grow beyond a limit, as it refuses on a disk without room."""
    more = ("--r", "64", "--save-steps", "1", "--ledger", tmp_path / "ledger.sqlite")  # a small file of its own
    words = [str(word) for word in tune_words(owner, tune_config, tmp_path / "run", *more)]
    program = f"import sys; from splitfl.cli import main; main({words!r})"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000)),
    )
    assert done.returncode == 6, done.stderr
    assert "no room to write" in done.stderr
    assert "--resume" in done.stderr
    assert not list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    assert not (tmp_path / "run" / "adapter").exists()
