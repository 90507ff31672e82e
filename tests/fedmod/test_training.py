"""Local training, thresholds, and what a poisoned neighbour does with and without a guard, on a real model and rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from party.fedmod_data import part, read_rows
from party.fedmod_mix import Update, guarded_mix, mix
from party.fedmod_model import fingerprint_model, open_base, plan_whole, with_adapter
from party.fedmod_run import FedmodRun
from party.fedmod_train import LocalTrainer, choose_offsets, logits_of, macro_f1, score
from splitfl.data import Collator
from splitfl.demo import assets
from splitfl.errors import DataError, ModelError
from tests.fedmod.servers import films, health, make_places, settings_for, write
from tests.live.models import save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny("bert", tmp_path_factory.mktemp("fedmod") / "model")


@pytest.fixture(scope="module")
def mixed_rows():
    """Is it about films or about health? A question that a tiny model can learn in seconds."""
    pairs = zip(films(), health(), strict=False)
    return [{**row, "label": label} for pair in pairs for label, row in enumerate(pair)]


class Bench:
    """One server's rows, model and trainer, without a network."""

    def __init__(self, place, folder, model, **options):
        self.settings = settings_for(place, folder, model, **options)
        plan = plan_whole(model)
        self.given = read_rows(self.settings, plan)
        base = open_base(model, plan, self.given.label2id, self.settings.seed)
        self.collator = Collator(self.given.tokenizer, pad_token_id=base.config.pad_token_id)
        self.peer = with_adapter(base, plan, self.settings, "tiny")
        self.trainer = LocalTrainer(self.peer, self.given.rows.train, self.settings, self.collator)

    def held(self) -> float:
        return score(*logits_of(self.peer.model, self.given.rows.held_out, self.collator, 32)).macro_f1 or 0.0

    def loss_with(self, vector: torch.Tensor) -> float:
        kept = self.peer.vector()
        self.peer.put(vector)
        found = score(*logits_of(self.peer.model, self.given.rows.validation, self.collator, 32)).loss
        self.peer.put(kept)
        return found


def test_every_peer_starts_from_the_same_adapter_and_a_head_of_its_own(model, mixed_rows, tmp_path):
    places = make_places(tmp_path, {"a": mixed_rows[:100], "b": mixed_rows[100:200]})
    one = Bench(places["a"], tmp_path, model, seed=1)
    other = Bench(places["b"], tmp_path, model, seed=2)
    assert torch.equal(one.peer.start, other.peer.start)
    assert one.peer.digest(one.settings, 2) == other.peer.digest(other.settings, 2)
    heads = [b.trainer.parameters[n] for b in (one, other) for n in b.trainer.parameters if n.endswith("default.weight")
             and "classifier" in n]  # fmt: skip
    assert not torch.equal(*heads)
    for change in ({"r": 4}, {"lora_alpha": 8}, {"rule": "rolora"}, {"start_seed": 1}, {"sketch_labels": True}):
        different = Bench(places["a"], tmp_path, model, **change)
        assert different.peer.digest(different.settings, 2) != one.peer.digest(one.settings, 2), change
    assert all("lora_" in name for name in one.peer.layout.places), "no head in what crosses"
    vector = torch.arange(one.peer.layout.size, dtype=torch.float32)
    one.peer.put(vector)
    assert torch.equal(one.peer.vector(), vector)
    assert fingerprint_model(model) == fingerprint_model(model)


@pytest.mark.parametrize("rule", ["fedit", "rolora"])
def test_going_on_from_a_checkpoint_is_as_if_nothing_had_happened(model, mixed_rows, tmp_path, rule):
    places = make_places(tmp_path, {"a": mixed_rows[:120]})
    options = {"rule": rule, "lora_dropout": 0.1, "rounds": 2, "local_steps": 3}
    whole = Bench(places["a"], tmp_path, model, **options)
    whole.trainer.run(6)
    broken = Bench(places["a"], tmp_path, model, **options)
    broken.trainer.run(4)
    run = FedmodRun(tmp_path / "run")
    run.path.mkdir()
    run.save(broken.trainer, 1, {"seed": 0})
    fresh = Bench(places["a"], tmp_path, model, **options)
    progress = run.restore(fresh.trainer, {"seed": 0})
    assert (progress.step, progress.mixed) == (4, 1)
    fresh.trainer.run(6)
    for name, parameter in whole.trainer.parameters.items():
        assert torch.equal(parameter, fresh.trainer.parameters[name]), name
    with pytest.raises(ModelError, match="another seed"):
        run.restore(fresh.trainer, {"seed": 1})


def test_rolora_trains_one_factor_at_a_time(model, mixed_rows, tmp_path):
    places = make_places(tmp_path, {"a": mixed_rows[:100]})
    bench = Bench(places["a"], tmp_path, model, rule="rolora", rounds=2, local_steps=2)
    layout, before = bench.peer.layout, bench.peer.vector()
    for until, moving, still in ((2, "B", "A"), (4, "A", "B")):
        bench.trainer.run(until)
        after = bench.peer.vector()
        assert torch.equal(after[layout.chosen(still)], before[layout.chosen(still)])
        assert not torch.equal(after[layout.chosen(moving)], before[layout.chosen(moving)])
        before = after


@pytest.mark.slow
def test_a_poisoned_neighbour_does_harm_unless_it_is_guarded_against(mixed_rows, tmp_path):
    places = make_places(tmp_path, {"a": mixed_rows[:240], "b": mixed_rows[240:480]}, held=80)
    options = {"rounds": 1, "local_steps": 30, "learning_rate": 3e-3, "max_length": 16}
    one, other = (Bench(places[n], tmp_path, assets() / "model", **options) for n in "ab")
    for bench in (one, other):
        bench.trainer.run(30)
    own, start, alone = one.peer.vector(), one.peer.start, one.held()
    assert alone > 0.75, "there is something to lose"
    honest = Update(name="honest", vector=other.peer.vector(), rows=200)
    flipped = Update(name="poison", vector=start - 30 * (own - start), rows=200)

    def figure(updates: Sequence[Update], *, guard: float, **how) -> float:
        def blend(chosen):
            return mix(own, start, chosen, one.peer.layout, rows=200, **how)

        one.peer.put(guarded_mix(own, updates, blend, one.loss_with, guard).mixed.vector)
        found = one.held()
        one.peer.put(own)
        return found

    open_door = figure([honest, flipped], guard=0.0)
    assert open_door < alone - 0.3, "without a guard it does harm"
    assert figure([honest, flipped], guard=0.1) >= alone - 0.1
    assert figure([flipped], guard=0.1) == alone
    assert figure([honest, flipped], guard=0.0, norm_cap=2.0) > open_door + 0.2, "shorter, it does less harm"
    for robust in ("median", "trimmed"):
        assert figure([honest, flipped], guard=0.0, robust=robust, norm_cap=2.0) >= alone - 0.15


# ---- figures and thresholds


def test_macro_f1_is_the_mean_over_classes_that_occur():
    labels, guess = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 1])
    assert macro_f1(guess, labels) == pytest.approx((2 / 3 + 2 / 4 + 0) / 3)
    assert macro_f1(labels, labels) == 1.0


def test_thresholds_mend_a_head_that_leans_to_one_class():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (120,), generator=generator)
    logits = torch.nn.functional.one_hot(labels, 3) + 0.4 * torch.randn(120, 3, generator=generator)
    leaning = logits + torch.tensor([1.5, 0.0, -0.5])
    offsets = choose_offsets(leaning, labels)
    assert offsets[0] == 0
    assert macro_f1((leaning + offsets).argmax(-1), labels) > macro_f1(leaning.argmax(-1), labels) + 0.1
    sure = 10.0 * torch.nn.functional.one_hot(labels, 3)
    assert choose_offsets(sure, labels).tolist() == [0, 0, 0], "nothing to gain, nothing moved"
    plain, moved = score(leaning, labels), score(leaning, labels, offsets)
    assert plain.loss == moved.loss
    assert moved.accuracy > plain.accuracy


# ---- rows


def test_rows_to_check_on_are_taken_from_those_to_train_on():
    examples = [{"input_ids": [n], "labels": 0} for n in range(40)]
    train, validation = part(examples, 0.15, 3)
    assert (len(train), len(validation)) == (34, 6)
    assert sorted(e["input_ids"][0] for e in [*train, *validation]) == list(range(40))
    assert part(examples, 0.15, 3) == (train, validation)
    assert part(examples, 0.15, 4) != (train, validation)


def test_too_few_rows_or_one_class_alone(model, mixed_rows, tmp_path):
    place = make_places(tmp_path, {"a": mixed_rows[:60]})["a"]
    for rows in (mixed_rows[:5], [row for row in mixed_rows[:40] if row["label"] == 0]):
        bad = replace(place, train=write(tmp_path / "few.jsonl", rows))
        with pytest.raises(DataError, match="classes"):
            Bench(bad, tmp_path, model)
