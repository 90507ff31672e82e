"""Several parties on one owner: each gets what it would get alone."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

from tests.live.child import child, splitfl_here
from tests.live.models import Rows, answer_rows, write_jsonl
from tests.live.relay import relay
from tests.live.runs import SETTINGS, adapter_in, events, write_config

pytestmark = pytest.mark.slow


@pytest.fixture
def other_config(tmp_path):
    """Rows and settings of another party: other lengths, another batch."""
    made = answer_rows()[::-1]
    rows = Rows(
        train=write_jsonl(tmp_path / "train.jsonl", made[:30]), held_out=write_jsonl(tmp_path / "held.jsonl", made[30:])
    )
    return write_config(tmp_path / "other.toml", rows, **{**SETTINGS, "seed": 9, "per_device_train_batch_size": 7})


def test_two_parties_at_once_train_as_if_alone(owner, tune_config, other_config, finished, tmp_path):
    alone = {"hospital": finished, "clinic": tmp_path / "alone"}
    configs = {"hospital": tune_config, "clinic": other_config}
    splitfl_here("tune", *owner.link("clinic"), "--config", other_config, "--out", alone["clinic"])
    with ExitStack() as stack:
        parties = {}
        for name, config in configs.items():
            # Both are held in the middle of training and set free together, so that they are on the owner at once.
            total = events(alone[name], "end")[0]["bytes_sent"]
            line = stack.enter_context(relay(owner.address, hold_at=total // 2))
            words = ["tune", *owner.link(name, address=line.address), "--config", config, "--out", tmp_path / name]
            parties[name] = (line, stack.enter_context(child(["-m", "splitfl", *words], tmp_path)))
        for line, _ in parties.values():
            line.wait_until_holding()
        for line, _ in parties.values():
            line.release()
        for _, party in parties.values():
            assert party.wait() == 0, party.stderr.text
    for name, run in alone.items():
        came, expected = adapter_in(tmp_path / name), adapter_in(run)
        assert [key for key in expected if not torch.equal(came[key], expected[key])] == []
        losses = [[record["loss"] for record in events(folder, "train")] for folder in (tmp_path / name, run)]
        assert losses[0] == losses[1]
    assert adapter_in(tmp_path / "clinic")["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].any()
    told = owner.running.stderr.text
    assert "session open: party hospital" in told
    assert "session open: party clinic" in told
