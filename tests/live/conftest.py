"""One owner of a tiny Llama for all tests that do not need an owner of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.live.child import splitfl
from tests.live.models import Rows, answer_rows, make_kit, save_tiny, write_jsonl
from tests.live.owner import Owner, serve
from tests.live.runs import write_config


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Model directory and kit."""
    folder = tmp_path_factory.mktemp("llama")
    model_dir = save_tiny("llama", folder / "model")
    return model_dir, make_kit(model_dir, folder / "kit")


@pytest.fixture(scope="session")
def owner(tiny_llama: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Owner]:
    """A running owner of the tiny Llama, with CURVE."""
    with serve(*tiny_llama, tmp_path_factory.mktemp("owner")) as running:
        yield running


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """Rows to train on, and others to measure on."""
    folder, made = tmp_path_factory.mktemp("rows"), answer_rows()
    return Rows(
        train=write_jsonl(folder / "train.jsonl", made[:40]), held_out=write_jsonl(folder / "held.jsonl", made[40:])
    )


@pytest.fixture(scope="session")
def tune_config(rows: Rows, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings for `splitfl tune` that several tests share, as a file."""
    return write_config(tmp_path_factory.mktemp("config") / "tune.toml", rows)


@pytest.fixture(scope="session")
def finished(owner: Owner, tune_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that nothing disturbed; beside it stands ``tune.json``."""
    folder = tmp_path_factory.mktemp("finished")
    # Relative paths, as people write them; later commands run elsewhere and find everything all the same.
    link = [os.path.relpath(word, folder) if isinstance(word, Path) else word for word in owner.link()]
    splitfl("tune", *link, "--config", tune_config, "--out", "run", "--json", "tune.json", folder=folder)
    return folder / "run"
