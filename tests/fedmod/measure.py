"""`python -m tests.fedmod.measure --model DIR --data DIR`: the table of docs/fedmod.md, on real rows, in one process.

Six servers in three topics (k-means of the public encoder's features), two a topic, each with its own share of labels.
What `splitfl fedmod` does each round is done here one server after the other, with the same functions and without the
network, so the figures do not depend on who was slow. Prints Markdown; every seed is printed as soon as it is there.

Not a test: it takes an hour of a processor.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from party.fedmod_data import Given, read_rows
from party.fedmod_mix import Update, guarded_mix, mix
from party.fedmod_model import PeerModel, features_of, open_base, plan_whole, public_centre, with_adapter
from party.fedmod_train import LocalTrainer, choose_offsets, logits_of, score
from splitfl.config_mesh import FedmodSettings
from splitfl.data import Collator, load_rows, tokenise
from splitfl.kit import load_tokenizer
from splitfl.rows import Row
from splitfl.sketch import Sketch, plan_sketch, release, row_codes, similarities
from tests.fedmod.servers import write

SERVERS, TOPICS, DRAWN, HELD = 6, 3, 6000, 200
# How much likelier each class (hate, offensive, neither) is drawn by the servers of a topic.
LEANING = ((3.0, 1.0, 1.0), (1.0, 0.6, 4.0), (6.0, 0.5, 0.5))
STRANGE = 0.12  # weight of a row of another topic
ARMS = ("local", "fedmod", "pooled")


@dataclasses.dataclass
class Server:
    """One server of the simulation."""

    settings: FedmodSettings
    given: Given
    collator: Collator
    peer: PeerModel
    trainer: LocalTrainer

    def figures(
        self, vector: torch.Tensor | None = None, which: str = "validation"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and labels of its rows, with another adapter if one is given."""
        kept = self.peer.vector()
        if vector is not None:
            self.peer.put(vector)
        made = logits_of(self.peer.model, getattr(self.given.rows, which), self.collator, 32)
        self.peer.put(kept)
        return made

    def held(self, rows: Sequence[Any] | None = None) -> tuple[float, float]:
        """Macro F1 on held-out rows, as it is and with thresholds from its validation rows."""
        offsets = choose_offsets(*self.figures())
        held = self.given.rows.held_out if rows is None else rows
        made = logits_of(self.peer.model, held, self.collator, 32)
        return score(*made).macro_f1 or 0.0, score(*made, offsets).macro_f1 or 0.0


def parted(features: np.ndarray, rows: Sequence[Row], seed: int, count: int) -> list[np.ndarray]:
    """Row numbers of each server: `count` to train on and `HELD` held out, no row twice."""
    draw = np.random.default_rng(1)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    centres = unit[draw.choice(len(unit), TOPICS, replace=False)]
    for _ in range(30):
        topic = (unit @ centres.T).argmax(1)
        centres = np.stack([unit[topic == one].mean(0) for one in range(TOPICS)])
        centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    labels, free = np.array([int(row.label or 0) for row in rows]), np.ones(len(rows), dtype=bool)
    draw, found = np.random.default_rng(100 + seed), []
    for server in range(SERVERS):
        own = server * TOPICS // SERVERS
        weight = np.array(LEANING[own])[labels] * np.where(topic == own, 1.0, STRANGE) * free
        chosen = draw.choice(len(rows), count + HELD, replace=False, p=weight / weight.sum())
        free[chosen] = False
        draw.shuffle(chosen)
        found.append(chosen)
    return found


def opened(folder: Path, name: str, arguments: argparse.Namespace, seed: int, rounds: int) -> Server:
    """A server with fresh adapter and head."""
    settings = FedmodSettings(
        model=str(arguments.model), out=folder, key=folder, peers=folder, train=folder / f"{name}.jsonl",
        eval=folder / f"{name}.held.jsonl", rounds=rounds, local_steps=arguments.steps, max_length=32, seed=seed,
        neighbours=2,
    )  # fmt: skip
    plan = plan_whole(arguments.model)
    given = read_rows(settings, plan)
    base = open_base(arguments.model, plan, given.label2id, seed)
    collator = Collator(given.tokenizer, pad_token_id=base.config.pad_token_id)
    peer = with_adapter(base, plan, settings, "")
    return Server(settings, given, collator, peer, LocalTrainer(peer, given.rows.train, settings, collator))


def neighbours_of(servers: Sequence[Server], sketches: Sequence[Sketch]) -> list[dict[int, float]]:
    """For each server the numbers and similarities of its neighbours."""
    found = []
    for me, server in enumerate(servers):
        near = similarities(sketches[me], {str(n): s for n, s in enumerate(sketches) if n != me})
        ranked = sorted(((value, int(name)) for name, value in near.items() if value >= 0), reverse=True)
        found.append({number: value for value, number in ranked[: server.settings.neighbours]})
    return found


def federate(servers: Sequence[Server], near: Sequence[dict[int, float]]) -> None:
    """All rounds of all servers; each averages what the others had at the end of the round."""
    rounds, steps = servers[0].settings.rounds, servers[0].settings.local_steps
    for number in range(1, rounds + 1):
        for server in servers:
            server.trainer.run(number * steps)
        if number == rounds:
            return
        vectors = [server.peer.vector() for server in servers]
        for me, server in enumerate(servers):
            updates = [
                Update(name=str(n), vector=vectors[n], rows=len(servers[n].given.rows.train), similarity=value)
                for n, value in near[me].items()
            ]
            server.peer.put(averaged(server, vectors[me], updates))


def averaged(server: Server, own: torch.Tensor, updates: Sequence[Update]) -> torch.Tensor:
    """What `splitfl fedmod` makes of them with its defaults."""
    rows, settings = len(server.given.rows.train), server.settings

    def blend(chosen: Sequence[Update]) -> Any:
        return mix(
            own, server.peer.start, chosen, server.peer.layout, rows=rows, row_cap=settings.row_cap,
            norm_cap=settings.norm_cap,
        )  # fmt: skip

    def loss(vector: torch.Tensor) -> float:
        return score(*server.figures(vector)).loss

    return guarded_mix(own, updates, blend, loss, settings.guard).mixed.vector


def one_seed(arguments: argparse.Namespace, seed: int, rows: Sequence[Row], features: np.ndarray) -> dict[str, Any]:
    """Macro F1 of each arm at each server, plain and with thresholds."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pool: list[dict[str, object]] = []
        for number, chosen in enumerate(parted(features, rows, seed, arguments.rows)):
            made: list[dict[str, object]] = [{"text": rows[i].text, "label": int(rows[i].label or 0)} for i in chosen]
            write(folder / f"{number}.jsonl", made[: arguments.rows])
            write(folder / f"{number}.held.jsonl", made[arguments.rows :])
            pool += made[: arguments.rows]
        write(folder / "pooled.jsonl", pool)
        write(folder / "pooled.held.jsonl", pool[:10])
        seeds = [10 * seed + number for number in range(SERVERS)]
        alone = [opened(folder, str(n), arguments, s, arguments.rounds) for n, s in enumerate(seeds)]
        sketches = [sketch_of(server) for server in alone]
        near = neighbours_of(alone, sketches)
        for server in alone:
            server.trainer.run(server.trainer.total)
        found: dict[str, Any] = {"neighbours": near, "local": [server.held() for server in alone]}
        together = [opened(folder, str(n), arguments, s, arguments.rounds) for n, s in enumerate(seeds)]
        federate(together, near)
        found["fedmod"] = [server.held() for server in together]
        pooled = opened(folder, "pooled", arguments, seeds[0], arguments.rounds * SERVERS)
        pooled.trainer.run(pooled.trainer.total)
        found["pooled"] = [pooled.held(server.given.rows.held_out) for server in alone]
    return found


def sketch_of(server: Server) -> Sketch:
    """As a run with the default epsilon releases it."""
    plan = plan_sketch(server.settings.sketch_epsilon, server.settings.sketch_delta)
    # B is zero at the start, so the adapter changes no feature.
    base = server.peer.model.get_base_model()
    features = features_of(base, server.given.own, server.collator)
    return release(row_codes(features, public_centre(base, server.collator, 0), 0, plan.grid), plan)


def main() -> None:
    """Measure, seed by seed, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="train.jsonl of hate_offensive_davidson")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=15)
    arguments = parser.parse_args()
    loaded = load_rows(arguments.data, task="sequence-classification")
    rows = [loaded[i] for i in np.random.default_rng(0).permutation(len(loaded))[:DRAWN]]
    plan, tokenizer = plan_whole(arguments.model), load_tokenizer(arguments.model)
    base = open_base(arguments.model, plan, {"0": 0, "1": 1, "2": 2}, 0)
    chosen = dataclasses.replace(loaded, rows=tuple(rows))
    examples = tokenise(chosen, tokenizer, max_length=32, truncation="right")
    features = features_of(base, examples, Collator(tokenizer, pad_token_id=base.config.pad_token_id))
    means: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for seed in arguments.seeds:
        began = time.process_time()
        found = one_seed(arguments, seed, rows, features)
        print(f"\nseed {seed}, neighbours {[sorted(n) for n in found['neighbours']]}, "
              f"{time.process_time() - began:.0f} s of processor time\n")  # fmt: skip
        print("| macro F1 (with thresholds) | " + " | ".join(map(str, range(SERVERS))) + " | mean |")
        print("|---|" + "---|" * (SERVERS + 1))
        for arm in ARMS:
            plain, moved = (statistics.mean(pair[i] for pair in found[arm]) for i in (0, 1))
            means[arm].append(moved)
            cells = [f"{a:.2f} ({b:.2f})" for a, b in found[arm]]
            print(f"| {arm} | " + " | ".join(cells) + f" | {plain:.3f} ({moved:.3f}) |", flush=True)
    print("\nwith thresholds, mean over seeds: " + ", ".join(f"{a} {statistics.mean(v):.3f}" for a, v in means.items()))


if __name__ == "__main__":
    main()
