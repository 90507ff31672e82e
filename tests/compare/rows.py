"""Grids and results for tests of `splitfl compare`."""

from __future__ import annotations

from splitfl.compare.grid import read_grid
from splitfl.compare.result import (
    BEFORE,
    HANDED,
    OWNER_FLOP,
    OWNER_MEMORY,
    OWNER_S,
    PARTIES,
    PARTY_FLOP,
    PARTY_MEMORY,
    PARTY_S,
    RECEIVED,
    SCORE,
    SENT,
    TRIPS,
    WALL_S,
    Attacked,
    Outcome,
)

DATA = """
[data.films]
title = "films"
model = "minilm"
train = "shipped:sentiment.train.csv"
held_out = "shipped:sentiment.test.csv"
fields = ["text", "label"]
classes = 2
rows = [24, 20]
quick_rows = [12, 8]
public_rows = 6
cuts = ["1+2", "2+2"]
keep = 1
max_length = 24
steps = 4
quick_steps = 2
learning_rate = 1e-3
metric = "accuracy"
"""
REST = """
[mechanism.loud]
noise = "gauss"
ratio = 4.0

[mechanism.int8]
quantise = "int8"

[protocol.split]
mechanisms = ["none", "int8"]

[protocol.guarded-gradfree]
mechanisms = ["loud"]

[protocol.fed-params]
rounds = 2
"""


def grid_of(tmp_path, text=DATA + REST, name="grid.toml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return read_grid(path)


def attacked(value=0.5, low=0.4, high=0.6, baseline=0.1, **given):
    beyond = {"beyond": value - baseline, "beyond_low": low - baseline, "beyond_high": high - baseline}
    fixed = {"name": "nearest", "knowledge": "K1", "metric": "token recovery"}
    return Attacked(**{**fixed, "value": value, "low": low, "high": high, "baseline": baseline, **beyond, **given})


def outcome(design="split", score=0.8, *, seed=0, attacks=(), sends=("hidden", "gradient"), hands="kit", **given):
    protocol, _, mechanism = design.partition(", ")
    figures = {
        SCORE: score, SENT: 1e6, RECEIVED: 1e6, HANDED: 5e6, PARTY_S: 10.0, OWNER_S: 20.0, PARTY_FLOP: 1e9,
        OWNER_FLOP: 1e9, PARTY_MEMORY: 1e9, OWNER_MEMORY: 1e9, TRIPS: 100.0, PARTIES: 1.0, WALL_S: 60.0,
        **given.pop("figures", {}),
    }  # fmt: skip
    return Outcome(
        data="films", cut="1+2", protocol=protocol, mechanism=mechanism or "none", design=design, seed=seed,
        metric="accuracy", figures=figures, attacks=tuple(attacks), sends=sends, hands=hands, **given,
    )  # fmt: skip


def reference(score=0.9, before=0.5, seed=0):
    return outcome("full-lora", score, seed=seed, sends=(), hands="model", figures={BEFORE: before})
