"""An offline run's adapter as an update: before it stands what the seed drew, which needs no emulator to know."""

from __future__ import annotations

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

from party.recorded_updates import offline_update
from party.rundir import RunDirectory
from splitfl.adapters import add_lora, lora_config, save_adapter
from splitfl.config import TuneSettings
from splitfl.emulator import open_emulator, write_emulator
from splitfl.kit import open_kit
from tests.live.models import make_kit, save_tiny, whole_model


def test_it_begins_with_the_adapter_that_the_run_began_with(tmp_path):
    model_dir = save_tiny("llama", tmp_path / "model")
    kit = open_kit(make_kit(model_dir, tmp_path / "kit"))
    write_emulator(whole_model(model_dir), kit, tmp_path / "emulator", kept=(3,), chosen_by="uniform")
    run = RunDirectory(tmp_path / "run")
    settings = TuneSettings(
        kit=tmp_path / "kit", out=run.path, train=tmp_path / "rows", protocol="guarded-offline", seed=7,
        emulator=tmp_path / "emulator", target_modules=("all-linear",),
    )  # fmt: skip
    assert offline_update(settings, kit, run) is None, "it has not ended"
    base = open_emulator(tmp_path / "emulator").load(kit)
    model = add_lora(base, lora_config(base, kit.plan, target_modules=["all-linear"]), seed=7)
    fresh = {
        name: tensor.clone() for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter))
    save_adapter(model, run.adapter, base_name="tiny")
    state = torch.random.get_rng_state()
    update = offline_update(settings, kit, run)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert update is not None
    assert update.before.keys() == update.after.keys() == fresh.keys()
    assert all(torch.equal(update.before[name], fresh[name]) for name in fresh)
    stored = load_file(run.adapter / "adapter_model.safetensors")
    assert all(torch.equal(update.after[name], stored[name]) for name in stored)
