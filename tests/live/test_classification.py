"""A classifier tuned from a table: columns by other names, classes by name, and labels that stay where they are."""

from __future__ import annotations

import csv
import json
from contextlib import closing

import pytest
import torch
from peft import PeftModel
from transformers import Trainer, TrainingArguments

from party.model import open_model
from splitfl.adapters import add_lora, lora_config
from splitfl.data import load_rows, tokenise
from splitfl.kit import open_kit
from tests.live.child import splitfl
from tests.live.models import make_kit, save_tiny, sentences, whole_model
from tests.live.owner import serve
from tests.live.pairs import collator_of
from tests.live.recording import Recording
from tests.live.runs import events
from tests.live.search import found_in

pytestmark = pytest.mark.slow
COLUMNS = {"text": "remark", "label": "mood"}


@pytest.fixture(scope="module")
def encoder_owner(tmp_path_factory):
    """An owner of a tiny BERT with two classes."""
    folder = tmp_path_factory.mktemp("bert")
    model_dir = save_tiny("bert", folder / "model")
    with serve(model_dir, make_kit(model_dir, folder / "kit", task="sequence-classification"), folder) as running:
        yield running


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Two CSV files whose columns have names of their own."""
    folder, made = tmp_path_factory.mktemp("tables"), sentences()
    for name, part in (("train", made[:40]), ("held", made[40:])):
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["number", "remark", "mood"])
            writer.writerows([index, text, label] for index, (text, label) in enumerate(part))
    return folder


def examples_in(kit, path):
    rows = load_rows(path, columns=COLUMNS, task="sequence-classification", label2id=kit.config.label2id)
    return tokenise(rows, kit.tokenizer(), max_length=128)


def test_a_table_of_classes_is_learnt(encoder_owner, tables, tmp_path):
    words = ["--train", tables / "train.csv", "--eval", tables / "held.csv"]
    for ours, theirs in COLUMNS.items():
        words += ["--columns", f"{ours}={theirs}"]
    options = ["--max-steps", "40", "--learning-rate", "1e-2", "--save-steps", "40", "--target-modules", "all-linear"]
    party = splitfl(
        "tune", *encoder_owner.link(), *words, *options, "--out", "run", "--json", "tune.json", folder=tmp_path
    )
    assert "macro F1" in party.stderr.text
    run, kit = tmp_path / "run", open_kit(encoder_owner.kit_dir)
    before, after = events(run, "eval")
    assert before["accuracy"] < 0.8
    assert after["accuracy"] == after["macro_f1"] == 1.0
    found = {r["metric"]: r for r in json.loads((tmp_path / "tune.json").read_text(encoding="utf-8"))["results"]}
    assert found["held-out accuracy"]["reference"] == before["accuracy"]
    # The head is drawn anew here, as the checkpoint has none; the one that was tuned comes with the adapter.
    whole = whole_model(encoder_owner.model_dir, "sequence-classification", num_labels=2)
    tuned = PeftModel.from_pretrained(whole, run / "adapter").eval()
    losses = []
    for example in examples_in(kit, tables / "held.csv"):
        with torch.no_grad():
            logits = tuned(input_ids=torch.tensor([example["input_ids"]])).logits
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor([example["labels"]])).item())
    assert sum(losses) / len(losses) == pytest.approx(after["loss"], abs=1e-5)


class Watching(Trainer):
    """Notes the labels of every batch."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.labels = [*getattr(self, "labels", []), tuple(inputs["labels"].tolist())]
        return super().training_step(model, inputs, *args, **kwargs)


def test_labels_do_not_cross(encoder_owner, tables, tmp_path):
    kit, recording = open_kit(encoder_owner.kit_dir), Recording()
    with closing(encoder_owner.session(tap=recording.tap)) as session:
        base = open_model(kit, session)
        trainer = Watching(
            model=add_lora(base, lora_config(base, kit.plan)),
            args=TrainingArguments(
                str(tmp_path), max_steps=6, per_device_train_batch_size=10, report_to="none", save_strategy="no",
                use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, label_names=["labels"],
            ),
            train_dataset=examples_in(kit, tables / "train.csv"),
            data_collator=collator_of(kit),
        )  # fmt: skip
        trainer.train()
    assert len(trainer.labels) == 6
    needles = {batch for batch in trainer.labels if 3 <= sum(batch) <= 7}
    assert len(needles) >= 4
    assert found_in(recording.raw, needles) == set()
    batch = next(iter(needles))
    for kind in (torch.int32, torch.int64):
        planted = recording.raw[:997] + torch.tensor(batch, dtype=kind).numpy().tobytes()
        assert found_in(planted, needles) == {batch}
