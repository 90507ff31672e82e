"""Other people's trainers on the party's model, unchanged: they must do exactly what they do on the unsplit model."""

from __future__ import annotations

from collections import Counter
from contextlib import closing

import pytest
import torch
from peft import LoraConfig
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from party.model import open_model
from splitfl.kit import open_kit
from splitfl.wire.steps import MAX_OPEN
from tests.live.models import read_jsonl
from tests.live.pairs import adapter_of, collator_of, examples_of, twins

pytestmark = pytest.mark.slow

SETTINGS = {
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "learning_rate": 5e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "seed": 3,
}


def arguments(folder, **more):
    ours = {"output_dir": str(folder), "label_names": ["labels"], "remove_unused_columns": False}
    return TrainingArguments(**(SETTINGS | ours | more))


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train(model, kit, rows, folder, **more):
    """Losses of the library's own Trainer, and the adapter it leaves."""
    train_rows, held_out = examples_of(kit, rows)
    set_seed(3)
    trainer = Trainer(
        model=model,
        args=arguments(folder, **more),
        train_dataset=train_rows,
        eval_dataset=held_out,
        data_collator=collator_of(kit),
    )
    trainer.train()
    return losses_of(trainer), adapter_of(model), trainer


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def assert_same_training(pair, rows, folder, **more):
    whole_losses, whole_adapter, whole = train(pair.whole, pair.kit, rows, folder / "whole", **more)
    split_losses, split_adapter, split = train(pair.split, pair.kit, rows, folder / "split", **more)
    assert len(split_losses) == 6
    assert split_losses == whole_losses
    assert_equal(split_adapter, whole_adapter)
    return whole, split


def test_the_librarys_trainer_trains_the_same_adapter(owner, rows, tmp_path):
    with twins(owner) as pair:
        fresh = adapter_of(pair.split)
        whole, split = assert_same_training(pair, rows, tmp_path)
        assert [name for name, tensor in adapter_of(pair.split).items() if torch.equal(tensor, fresh[name])] == []
        before = pair.session.bytes_sent
        assert split.evaluate()["eval_loss"] == whole.evaluate()["eval_loss"]
        assert pair.session.bytes_sent > before


class Diary(TrainerCallback):
    """Notes which events happened."""

    def __init__(self):
        self.events = []

    def __getattribute__(self, name):
        if name.startswith("on_"):
            self.events.append(name)
        return super().__getattribute__(name)


@pytest.mark.parametrize(
    "more",
    [
        {"gradient_accumulation_steps": 3},
        {"num_train_epochs": 1, "lr_scheduler_type": "cosine", "warmup_steps": 2, "weight_decay": 0.1},
    ],
    ids=["accumulation", "schedule"],
)
def test_options_of_the_trainer_do_the_same(owner, rows, tmp_path, more):
    with twins(owner) as pair:
        assert_same_training(pair, rows, tmp_path, **more)


@pytest.mark.parametrize(
    "lora", [{"use_dora": True}, {"use_rslora": True, "r": 4}, {"lora_dropout": 0.2}, {"bias": "lora_only"}], ids=str
)
def test_options_of_the_adapter_do_the_same(owner, rows, tmp_path, lora):
    with twins(owner, **lora) as pair:
        assert_same_training(pair, rows, tmp_path)


def test_a_callback_sees_the_same_events(owner, rows, tmp_path):
    with twins(owner) as pair:
        diaries = []
        for model in (pair.whole, pair.split):
            diary = Diary()
            train_rows, held_out = examples_of(pair.kit, rows)
            Trainer(
                model=model,
                args=arguments(tmp_path, eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=3),
                train_dataset=train_rows,
                eval_dataset=held_out,
                data_collator=collator_of(pair.kit),
                callbacks=[diary],
            ).train()
            diaries.append(diary.events)
    assert {"on_step_end", "on_evaluate", "on_save", "on_log"} <= set(diaries[0])
    assert diaries[1] == diaries[0]


def test_checkpointing_runs_the_bottom_twice_and_the_trunk_once(owner, rows, tmp_path):
    with twins(owner) as pair:
        layers = pair.split.base_model.model.model.layers
        trunk, last = pair.kit.plan.bottom, pair.kit.plan.layers - 1
        # Inside a layer, for what is recomputed begins there.
        watched = {"bottom": layers[0].self_attn, "trunk": layers[trunk], "top": layers[last].self_attn}
        calls = Counter()
        for name, module in watched.items():
            module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
        assert_same_training(
            pair,
            rows,
            tmp_path,
            activation_checkpointing=True,
            activation_checkpointing_kwargs={"use_reentrant": False},
        )
    assert calls == {"bottom": 12, "trunk": 6, "top": 12}


# TRL sets by default what the library has renamed.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_trls_trainer_trains_the_same_adapter(owner, rows, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(read_jsonl(rows.train))
    outcomes = []
    with twins(owner) as pair:
        for model in (pair.whole, pair.split):
            trainer = trl.SFTTrainer(
                model=model,
                args=trl.SFTConfig(**(SETTINGS | {"output_dir": str(tmp_path), "max_length": 128, "bf16": False})),
                train_dataset=table,
                processing_class=pair.kit.tokenizer(),
            )
            trainer.train()
            outcomes.append((losses_of(trainer), adapter_of(model)))
    (whole_losses, whole_adapter), (split_losses, split_adapter) = outcomes
    assert len(split_losses) == 6
    assert split_losses == whole_losses
    assert_equal(split_adapter, whole_adapter)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_trls_trainer_puts_its_own_adapter_on_the_partys_layers_alone(owner, rows, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    kit = open_kit(owner.kit_dir)
    with closing(owner.session()) as session:
        trainer = trl.SFTTrainer(
            model=open_model(kit, session),
            args=trl.SFTConfig(**(SETTINGS | {"output_dir": str(tmp_path), "max_length": 128, "bf16": False})),
            train_dataset=datasets.Dataset.from_list(read_jsonl(rows.train)),
            processing_class=kit.tokenizer(),
            peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        trainer.train()
        layers = {int(name.split(".layers.")[1].split(".")[0]) for name in adapter_of(trainer.model)}
    losses = losses_of(trainer)
    assert losses[-1] < losses[0]
    assert sorted(layers) == kit.plan.party_layers


def test_several_forwards_before_one_backward(owner, rows):
    with twins(owner) as pair:
        train_rows, _ = examples_of(pair.kit, rows)
        batches = [collator_of(pair.kit)(train_rows[at : at + 4]) for at in (0, 4, 8)]
        gradients = []
        for model in (pair.whole, pair.split):
            sum(model.train()(**batch).loss for batch in batches).backward()
            gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        assert_equal(*gradients)


def test_forwards_without_a_backward_do_not_pile_up(owner, rows):
    """Each was kept at the owner for a backward that does not come; more of them than a session may have open."""
    with twins(owner) as pair:
        train_rows, _ = examples_of(pair.kit, rows)
        batch = collator_of(pair.kit)(train_rows[:1])
        for _ in range(MAX_OPEN + 10):
            loss = pair.split.train()(**batch).loss
        assert len(pair.session.talk.kept_steps()) <= 2
        loss.backward()
