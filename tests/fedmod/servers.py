"""Servers of a neighbourhood: a tiny encoder that all have, keys, and real rows of two kinds.

The kinds are films (praise or not, sentences of reviews) and health (questions about genetic conditions or about
others): the rows that come with splitfl. Servers of a kind see different rows of it.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

from splitfl.config_mesh import FedmodSettings
from splitfl.demo import assets
from splitfl.wire.keys import new_keys

DATA = assets() / "data"


def films() -> list[dict[str, object]]:
    """Sentences about films; label 1 for praise."""
    with (DATA / "sentiment.train.csv").open(encoding="utf-8", newline="") as file:
        return [{"text": row["text"], "label": int(row["label"])} for row in csv.DictReader(file)]


def health() -> list[dict[str, object]]:
    """Answers to questions about health; label 1 for genetic conditions."""
    read = {}
    for number, name in enumerate(("clinic", "hospital")):
        lines = (DATA / f"{name}.train.jsonl").read_text(encoding="utf-8").splitlines()
        read[number] = [{"text": json.loads(line)["completion"][:120], "label": number} for line in lines]
    return [row for pair in zip(read[0], read[1], strict=False) for row in pair]


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    """Rows as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one server's things are."""

    name: str
    key: Path
    train: Path
    held_out: Path


def make_places(folder: Path, kinds: dict[str, list[dict[str, object]]], *, held: int = 40) -> dict[str, Place]:
    """Keys and rows of each server; `folder`/peers is the allow-list of all of them."""
    peers = folder / "peers"
    peers.mkdir(parents=True, exist_ok=True)
    places = {}
    for name, rows in kinds.items():
        public, secret = new_keys(name, folder / "keys")
        (peers / public.name).write_bytes(public.read_bytes())
        places[name] = Place(
            name=name,
            key=secret,
            train=write(folder / f"{name}.train.jsonl", rows[held:]),
            held_out=write(folder / f"{name}.held.jsonl", rows[:held]),
        )
    return places


def settings_for(place: Place, folder: Path, model: Path, **options: object) -> FedmodSettings:
    """Settings of one server with short waits."""
    given = {
        "model": str(model),
        "out": folder / f"run-{place.name}",
        "ledger": folder / f"{place.name}.ledger.sqlite",
        "key": place.key,
        "peers": folder / "peers",
        "bind": "tcp://127.0.0.1:0",
        "train": place.train,
        "eval": place.held_out,
        "rounds": 2,
        "local_steps": 2,
        "max_length": 32,
        "gather": 20.0,
        "timeout": 20.0,
        "linger": 20.0,
        "learning_rate": 5e-3,
    }
    return FedmodSettings(**{**given, **options})  # type: ignore[arg-type]
