"""Federations with a bound: DP-SGD on every step of every round, noise on the sums, and DP-LoRA as published."""

from __future__ import annotations

import json
import math
import re
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from party.federated_bounds import RECORD
from party.private_plan import adapter_rho, epsilon_of
from splitfl.privacy.ledger import Ledger
from tests.federation.federation import PARTIES, coordinate, make_keys
from tests.live.models import Rows, answer_rows, write_jsonl
from tests.live.runs import events

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]

DP = {"dp-noise-multiplier": 1.2, "dp-delta": "1e-3", "dp-clip": 0.5, "dp-rounds": 2}
PATIENCE_S = 400.0
"""A whole federation on a machine with much else to do."""
SUM_NOISE = {"sum-noise": 0.8, "sum-norm": 0.5, "sum-delta": "1e-5", "sum-dropouts": 1}


def words(tiny_llama: tuple[Path, Path], rows: Rows, **more: Any) -> list[str]:
    model_dir, kit_dir = tiny_llama
    given = {
        "protocol": "fed-params", "model": model_dir, "kit": kit_dir, "train": rows.train, "local-steps": 2,
        "per-device-train-batch-size": 4, "learning-rate": 5e-3, "target-modules": "all-linear", "logging-steps": 1,
        "threads": 1, "timeout": 60, **more,
    }  # fmt: skip
    return [str(word) for name, value in given.items() if value is not None for word in (f"--{name}", value)]


def rows_of(folder: Path) -> dict[str, Rows]:
    made = answer_rows()
    held = write_jsonl(folder / "held.jsonl", made[42:])
    return {
        name: Rows(train=write_jsonl(folder / f"{name}.jsonl", made[14 * n : 14 * n + 14]), held_out=held)
        for n, name in enumerate(PARTIES)
    }


def finished(tiny_llama, folder: Path, coordinator: list[object], count: int = 1, **more: Any) -> dict[str, str]:
    """So many parties to the end; what each said."""
    make_keys(folder)
    with coordinate(folder, "--rounds", 2, "--min-parties", count, *coordinator) as there, ExitStack() as stack:
        parties = {
            name: there.start(
                stack, name, folder / f"run-{name}",
                *words(tiny_llama, rows, ledger=folder / f"{name}.sqlite", json=folder / f"{name}.json", **more),
            )
            for name, rows in list(rows_of(folder).items())[:count]
        }  # fmt: skip
        for party in parties.values():
            assert party.wait(PATIENCE_S) == 0, party.stderr.text + there.running.stderr.text
        assert there.running.wait(PATIENCE_S) == 0
        return {name: party.stderr.text for name, party in parties.items()}


def booked(path: Path) -> list[dict[str, Any]]:
    with Ledger(path, create=False) as ledger:
        ledger.verify()
        return list(ledger.export(units=True)["entries"])


def disclosed(run: Path) -> dict[str, str]:
    return dict(json.loads((run / "disclosure.json").read_text())["federation"])


# ---- DP-SGD


def test_every_step_of_every_round_is_in_one_bound(tiny_llama, tmp_path):
    said = finished(tiny_llama, tmp_path, ["--sum", "plain"], sum="plain", **DP)["hospital"]
    epsilon = epsilon_of(1.2, 4 / 14, 2 * 2, 1e-3)
    told = float(re.search(r"epsilon ([0-9.]+)", said).group(1))
    assert epsilon <= told < epsilon * 1.01 + 0.01
    for words_ in ("unit: one row", "in 2 sums", "after 4 steps", "whoever sees this party's updates", "delta 0.001"):
        assert words_ in said
    assert "signal to noise" in said
    assert said.index("signal to noise") < said.index("federation "), "the preview comes before anybody is reached"
    [entry] = booked(tmp_path / "hospital.sqlite")
    assert entry["rho"] == pytest.approx(adapter_rho(1.2, 4 / 14, 4), rel=1e-6)
    assert "4 steps in 2 sums" in entry["mechanism"]
    assert disclosed(tmp_path / "run-hospital")["bound"].startswith("DP-SGD on the updates: epsilon")
    kept = msgspec.json.decode((tmp_path / "run-hospital" / RECORD).read_bytes())
    assert kept["last"] == 1
    adapter = load_file(tmp_path / "run-hospital" / "last" / "adapter_model.safetensors")
    assert max(float(tensor.abs().max()) for name, tensor in adapter.items() if "lora_B" in name) > 0
    assert events(tmp_path / "run-hospital", "round")[-1]["kept"]


def test_three_parties_under_masks_each_have_a_bound_of_their_own(tiny_llama, tmp_path):
    said = finished(tiny_llama, tmp_path, ["--sum", "mask"], 3, protocol="dp-lora", sum="mask", rule=None, **DP)
    rows = {name: each.train for name, each in rows_of(tmp_path).items()}
    for name in PARTIES:
        count = len(rows[name].read_text().splitlines())
        told = float(re.search(r"epsilon ([0-9.]+)", said[name]).group(1))
        assert told == pytest.approx(epsilon_of(1.2, 4 / count, 2 * 2, 1e-3), abs=0.05)
        assert "2 sums" in said[name]
        # one entry, over every row of this party and of nobody else's data
        [entry] = booked(tmp_path / f"{name}.sqlite")
        assert entry["rho"] == pytest.approx(adapter_rho(1.2, 4 / count, 4), rel=1e-6)
        assert "4 steps in 2 sums" in entry["mechanism"]
        bounded = msgspec.json.decode((tmp_path / f"run-{name}" / RECORD).read_bytes())
        assert (bounded["last"], bounded["federation"]) == (1, bounded["federation"])
        assert disclosed(tmp_path / f"run-{name}")["bound"].startswith("DP-SGD on the updates: epsilon")
        assert all(record["kept"] for record in events(tmp_path / f"run-{name}", "round"))
    datasets = {booked(tmp_path / f"{name}.sqlite")[0]["dataset"] for name in PARTIES}
    assert len(datasets) == 3
    adapters = [load_file(tmp_path / f"run-{name}" / "last" / "adapter_model.safetensors") for name in PARTIES]
    assert all(torch.equal(adapters[0][name], other[name]) for other in adapters[1:] for name in other)
    own = [load_file(tmp_path / f"run-{name}" / "personal" / "adapter_model.safetensors") for name in PARTIES]
    moved = [name for name in own[0] if not torch.equal(own[0][name], own[1][name])]
    assert moved, "each party trained on its own rows, with noise of its own"


def test_more_rounds_than_planned_are_refused_before_anything_leaves(tiny_llama, tmp_path):
    make_keys(tmp_path)
    rows = rows_of(tmp_path)["clinic"]
    options = words(tiny_llama, rows, sum="plain", ledger=tmp_path / "l.sqlite", **DP)
    with (
        coordinate(tmp_path, "--rounds", 3, "--min-parties", 1, "--sum", "plain") as there,
        ExitStack() as stack,
    ):
        party = there.start(stack, "clinic", tmp_path / "run", *options)
        assert party.wait(PATIENCE_S) == 2
        assert "3 sums, and the bound is for 2" in party.stderr.text
    assert booked(tmp_path / "l.sqlite") == []
    assert not (tmp_path / "run" / "federation" / "update.bin").exists()


def test_a_killed_party_goes_on_and_spends_once(tiny_llama, tmp_path):
    make_keys(tmp_path)
    rows, run = rows_of(tmp_path)["clinic"], tmp_path / "run"
    given = {"sum": "plain", "ledger": tmp_path / "ledger.sqlite", **DP}
    options = words(tiny_llama, rows, **given)
    with (
        coordinate(tmp_path, "--rounds", 2, "--min-parties", 1, "--sum", "plain") as there,
        ExitStack() as stack,
    ):
        first = there.start(stack, "clinic", run, *options)
        first.stderr.wait_for("round 0 kept", timeout_s=PATIENCE_S)
        first.process.send_signal(signal.SIGKILL)
        first.process.wait(30)
        less = words(tiny_llama, rows, **{**given, "dp-noise-multiplier": 0.9})
        refused = there.start(stack, "clinic", run, *less, "--resume")
        assert refused.wait(PATIENCE_S) == 2
        assert "bounded otherwise: other are noise_multiplier" in refused.stderr.text
        again = there.start(stack, "clinic", run, *options, "--resume")
        assert again.wait(PATIENCE_S) == 0, again.stderr.text
    assert len(booked(tmp_path / "ledger.sqlite")) == 1


# ---- noise on the sum


@pytest.mark.parametrize("sum_name", ["mask+hidden", "bfv"])
def test_the_parties_noise_a_sum_together(tiny_llama, tmp_path, sum_name):
    noise = [word for name, value in SUM_NOISE.items() for word in (f"--{name}", value)]
    said = finished(
        tiny_llama, tmp_path, ["--sum", sum_name, "--rule", "ffa", *noise], 3, sum=sum_name, rule="ffa",
        **SUM_NOISE, **{"dp-rounds": 2},
    )["clinic"]  # fmt: skip
    assert "unit: one party" in said
    assert "up to 1 dropouts" in said
    assert "with 10 parties or fewer such a mean is noise" in said
    assert "bound on the sums with 3 parties: epsilon" in said
    assert ("not the coordinator" in said) == (sum_name == "bfv")
    [entry] = booked(tmp_path / "clinic.sqlite")
    assert entry["rho"] == pytest.approx(2 / (2 * 0.8**2))
    adapters = [load_file(tmp_path / f"run-{name}" / "last" / "adapter_model.safetensors") for name in PARTIES]
    assert all(torch.equal(adapters[0][name], other[name]) for other in adapters[1:] for name in other)
    # What three updates of at most 0.5 can move the mean by is far below the noise of two sums, which is known.
    b = torch.cat([tensor.reshape(-1).double() for name, tensor in adapters[0].items() if "lora_B" in name])
    a_value = 0.8 * 2 * 0.5 * math.sqrt(3 / 2) / 3 * math.sqrt(2)
    assert float(b.std()) == pytest.approx(a_value, rel=0.1)
    rounds = events(tmp_path / "run-clinic", "round")
    assert [record["personal"] for record in rounds] == [None, None]


# ---- as published


def test_the_published_method_runs_and_proves_nothing(tiny_llama, tmp_path):
    preset = {"protocol": "dp-lora", "preset": "paper", "rule": None, "sum": "plain"}
    made = {"local-steps": None, "per-device-train-batch-size": None, "learning-rate": None}
    said = finished(tiny_llama, tmp_path, ["--sum", "plain", "--rule", "fedit"], **preset, **made)["hospital"]
    assert "epsilon: none" in said
    assert not re.search(r"epsilon [0-9]", said.replace("is an epsilon of 0.1", "").replace("epsilon of 2", ""))
    [entry, _] = booked(tmp_path / "hospital.sqlite")
    assert entry["rho"] is None
    assert entry["mechanism"] == "dp-lora, paper"
    lengths = events(tmp_path / "run-hospital", "diagnostic, not private")
    assert [record["group"] for record in lengths] == ["A", "B"] * 2
    for record in lengths:
        assert record["clipped"] <= 10 * (1 + 1e-5)
        assert record["noise"] == pytest.approx(20 * math.sqrt(record["values"]), rel=0.02)
        assert record["noise"] > 10 * record["raw"]
