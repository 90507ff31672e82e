"""Train the small Llama that splitfl carries: tokenizer, windows, training with checkpoints.

    python examples/pretrain/pretrain.py --data ../shared/data --out runs/pretrain
    python examples/pretrain/publish.py  --data ../shared/data --runs runs/pretrain --out splitfl/assets/model

A killed run goes on from its last whole checkpoint when the same command is given again. See README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
import tomllib
from pathlib import Path
from typing import Any

import torch
from corpus import Source, Tokens, Windows, encode, held_out_windows, load_split, plan_windows, read_sources
from gpt2 import TaughtTrainer, build_gpt2
from torch.nn.functional import dropout
from transformers import (
    EarlyStoppingCallback,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging
from vocabulary import load_tokenizer, save_whole, train_tokenizer

Settings = dict[str, Any]


def read_settings(path: Path, trial: str) -> Settings:
    """The TOML file with one trial's overrides in its `training` table.

    Raises:
        SystemExit: the trial, or one of its keys, does not exist.
    """
    settings = tomllib.loads(path.read_text(encoding="utf-8"))
    if trial not in settings["trial"]:
        raise SystemExit(f"no trial {trial!r} in {path}. Expected one of: {', '.join(settings['trial'])}")
    known = {"weights": {}, **settings["training"]}
    unknown = set(settings["trial"][trial]) - set(known)
    if unknown:
        raise SystemExit(f"unknown keys in [trial.{trial}]: {sorted(unknown)}. Expected some of: {sorted(known)}")
    settings["training"] = {**known, **settings["trial"][trial]}
    return settings


def prepare_tokenizer(folder: Path, data: Path, settings: Settings) -> PreTrainedTokenizerBase:
    """The run's tokenizer: the one that the settings name, or trained on the training splits if not there yet."""
    if "path" in settings["tokenizer"]:
        return load_tokenizer(Path(settings["tokenizer"]["path"]))
    if not (folder / "tokenizer.json").is_file():
        sources = read_sources(settings["sources"], {})
        texts = (
            document.text or "\n".join(message["content"] for message in document.messages)
            for source in sources
            for document in load_split(data, source, "train")
        )
        length = window_of(settings)
        save_whole(train_tokenizer(texts, settings["tokenizer"]["vocab_size"], length), folder)
    return load_tokenizer(folder)


def window_of(settings: Settings) -> int:
    """Tokens of a window: as many as the model has positions."""
    shape = settings["model"]
    return int(shape.get("n_positions") or shape["max_position_embeddings"])


def load_teacher(training: Settings) -> LlamaForCausalLM | None:
    """The model that the settings name as one, in float32."""
    if "teacher" not in training:
        return None
    return LlamaForCausalLM.from_pretrained(training["teacher"], dtype=torch.float32, local_files_only=True)


def build_model(
    settings: Settings, tokenizer: PreTrainedTokenizerBase, teacher: LlamaForCausalLM | None
) -> PreTrainedModel:
    """A model with random float32 weights: a Llama, or what `model_type` says."""
    shape = dict(settings["model"])
    if shape.pop("model_type", "llama") == "gpt2":
        return build_gpt2(shape, tokenizer, teacher, settings["training"]["seed"])
    config = LlamaConfig(
        **shape,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def add_dropout(model: PreTrainedModel, rate: float) -> None:
    """Dropout on the embeddings and on what each attention and MLP adds; Llama has none of its own.

    Hooks leave the saved model an ordinary Llama: they act in training mode only and are no part of the state.
    """

    def drop(module: torch.nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
        return dropout(output, rate, module.training)

    if rate:
        model.model.embed_tokens.register_forward_hook(drop)
        for layer in model.model.layers:
            layer.self_attn.o_proj.register_forward_hook(drop)
            layer.mlp.down_proj.register_forward_hook(drop)


class Progress(TrainerCallback):
    """One line per log: step, losses, tokens per second, time left."""

    def __init__(self, name: str, step_tokens: int) -> None:
        self.name, self.step_tokens = name, step_tokens
        self.seen_at, self.seen_step = time.monotonic(), 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.seen_at, self.seen_step = time.monotonic(), state.global_step

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Settings, **_: Any
    ) -> None:
        keys = ("loss", "eval_loss", "learning_rate")
        shown = "  ".join(f"{key} {float(logs[key]):.4g}" for key in keys if key in logs)
        now, steps = time.monotonic(), state.global_step - self.seen_step
        line = f"{self.name}: step {state.global_step}/{state.max_steps}  {shown}"
        if steps:  # an evaluation is logged at the step of the last training log
            left = int((now - self.seen_at) / steps * (state.max_steps - state.global_step))
            rate = steps * self.step_tokens / (now - self.seen_at) / 1e3
            line += f"  {rate:.1f}k tokens/s  {left // 60}:{left % 60:02d} left"
            self.seen_at, self.seen_step = now, state.global_step
        if shown:
            print(line, flush=True)


def training_arguments(training: Settings, folder: Path, max_steps: int, every: int) -> TrainingArguments:
    """The settings in the library's words."""
    cuda = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,  # the plan already holds every epoch
        max_steps=max_steps,
        per_device_train_batch_size=training["batch"],
        per_device_eval_batch_size=training["batch"],
        train_sampling_strategy="sequential",
        learning_rate=training["learning_rate"],
        lr_scheduler_type="cosine",
        warmup_steps=training["warmup"],
        weight_decay=training["weight_decay"],
        adam_beta2=training["beta2"],
        max_grad_norm=training["max_grad_norm"],
        optim="adamw_torch_fused",
        bf16=cuda or training.get("bf16", False),
        use_cpu=not cuda,
        torch_compile=cuda and training["compile"],
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=every,
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        prediction_loss_only=True,
        logging_steps=max(1, every // 5),
        disable_tqdm=True,
        report_to="none",
        dataloader_num_workers=2 if cuda else 0,
        dataloader_pin_memory=cuda,
        dataloader_drop_last=True,  # a smaller last batch would be compiled on its own
        seed=training["seed"],
    )


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint whose last file was written; removes those that a kill left unfinished."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2])):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)
        else:
            return str(checkpoint)
    return None


def write_result(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, folder: Path, settings: Settings) -> None:
    """Leave the best weights and the run's record: `best/`, then `result.json` as the sign that all is there."""
    trainer.save_model(str(folder / "best"))
    tokenizer.save_pretrained(folder / "best")
    record = {
        "eval_loss": trainer.state.best_metric,
        "best_step": trainer.state.best_global_step,
        "steps": trainer.state.global_step,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "settings": settings,
        "log": trainer.state.log_history,
    }
    written = folder / "result.json.part"
    written.write_text(json.dumps(record, indent=1), encoding="utf-8")
    os.replace(written, folder / "result.json")


def make_streams(sources: list[Source], data: Path, tokenizer: PreTrainedTokenizerBase, split: str) -> list[Tokens]:
    """One token stream for each source."""
    return [encode(load_split(data, source, split), tokenizer, seed=0) for source in sources]


def run_trial(data: Path, out: Path, settings: Settings, trial: str, max_steps: int) -> float:
    """Train one trial (or finish it) and return its best held-out loss in nats per token."""
    training, window, teacher = settings["training"], window_of(settings), load_teacher(settings["training"])
    tokenizer = prepare_tokenizer(out / "tokenizer", data, settings)
    sources = read_sources(settings["sources"], training["weights"])
    streams = {split: make_streams(sources, data, tokenizer, split) for split in ("train", "validation")}
    lengths = {split: [len(stream) for stream in streams[split]] for split in streams}
    plan = plan_windows(
        lengths["train"], [source.weight for source in sources], window, training["epochs"], training["seed"]
    )
    held_out = held_out_windows(lengths["validation"], window, training["evaluation_windows"])
    set_seed(training["seed"])
    model = build_model(settings, tokenizer, teacher)
    add_dropout(model, training["dropout"])
    every = min(training["evaluate_every"], max_steps) if max_steps > 0 else training["evaluate_every"]
    print(
        f"{trial}: {model.num_parameters():,} parameters, {sum(lengths['train']):,} training tokens "
        f"({', '.join(f'{source.name} {n:,}' for source, n in zip(sources, lengths['train'], strict=True))}), "
        f"{len(plan):,} windows",
        flush=True,
    )
    folder = out / trial
    trainer = TaughtTrainer(
        model=model,
        teacher=teacher,
        teacher_weight=training.get("teacher_weight", 0.0),
        args=training_arguments(training, folder, max_steps, every),
        train_dataset=Windows(streams["train"], plan, window),
        eval_dataset=Windows(streams["validation"], held_out, window),
        callbacks=[Progress(trial, training["batch"] * window), EarlyStoppingCallback(training["patience"])],
    )
    trainer.remove_callback(PrinterCallback)  # Progress prints instead
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(folder))
    write_result(trainer, tokenizer, folder, settings)
    return float(trainer.state.best_metric)


def main() -> None:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with one folder a source")
    parser.add_argument("--out", type=Path, default=Path("runs/pretrain"), help="tokenizer, checkpoints, results")
    parser.add_argument("--settings", type=Path, default=here / "pretrain.toml")
    parser.add_argument("--trial", default="base", help="a [trial] table of the settings")
    parser.add_argument("--epochs", type=int, help="instead of the trial's own number")
    parser.add_argument("--max-steps", type=int, default=-1, help="stop after so many steps (for a quick look)")
    parser.add_argument("--only-tokenizer", action="store_true", help="train the tokenizer and stop")
    options = parser.parse_args()
    logging.set_verbosity_error()  # whole books are longer than the context, and meant to be
    logging.disable_progress_bar()
    settings = read_settings(options.settings, options.trial)
    if options.epochs:
        settings["training"]["epochs"] = options.epochs
    if options.only_tokenizer:
        prepare_tokenizer(options.out / "tokenizer", options.data, settings)
        return
    loss = run_trial(options.data, options.out, settings, options.trial, options.max_steps)
    print(f"{options.trial}: best held-out loss {loss:.4f} nats a token", flush=True)


if __name__ == "__main__":
    main()
