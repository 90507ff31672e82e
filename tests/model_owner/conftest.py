"""A tiny Llama, its kit, and its trunk in this process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model_owner.trunk import LocalLink, Trunk
from splitfl.kit import Kit, open_kit
from splitfl.load import load_trunk_side
from tests.live.models import make_kit, save_tiny
from tests.model_owner.training import Trained, train


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Model directory and kit."""
    folder = tmp_path_factory.mktemp("llama")
    model_dir = save_tiny("llama", folder / "model")
    return model_dir, make_kit(model_dir, folder / "kit")


@pytest.fixture(scope="session")
def kit(tiny_llama: tuple[Path, Path]) -> Kit:
    return open_kit(tiny_llama[1])


@pytest.fixture(scope="session")
def trunk(tiny_llama: tuple[Path, Path], kit: Kit) -> Trunk:
    return Trunk(load_trunk_side(tiny_llama[0], kit.plan, dtype=torch.float32), kit.plan)


@pytest.fixture(scope="session")
def undisturbed(kit: Kit, trunk: Trunk) -> Trained:
    """The training through a link that crosses no wire."""
    return train(kit, LocalLink(trunk))
