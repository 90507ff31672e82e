"""The settings of every command, with their defaults and limits: the one place where an option is named.

Names of training options are those of `transformers.TrainingArguments`, names of adapter options those of
`peft.LoraConfig`. Nothing heavy is imported here, so that `--help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from splitfl.bench.offsite_settings import OffsiteSettings
from splitfl.config_common import (
    ADAPTER,
    ADDRESS,
    LINK,
    MACHINE,
    MICRO_BATCHES,
    NOT_EMPTY,
    PAIR,
    REMOTE,
    ROWS,
    SHAPE,
    SIZE,
    TRAINING,
    Columns,
    Device,
    Dtype,
    EvalBatch,
    JsonFile,
    MaxLength,
    Memory,
    Threads,
    Timeout,
    Truncation,
    check_link,
)
from splitfl.config_drafting import Drafting
from splitfl.config_federation import WHOLE_PROTOCOLS, FederatedTuning
from splitfl.config_owner import Keeping
from splitfl.config_placing import Placing
from splitfl.config_privacy import OFFLINE_PROTOCOL, ProtectionSettings
from splitfl.config_recording import ServeRecording, TuneRecording
from splitfl.config_sharing import Sharing
from splitfl.errors import UsageError
from splitfl.options import Panel, Settings, above, at_least, between, fields_of
from splitfl.options.values import (
    parse_pairs,
    training_arguments,
)


@dataclass(frozen=True, kw_only=True)
class KitSettings(Settings):
    """Write the kit that a data holder receives: config, tokenizer, bottom and top weights, plan. No trunk tensor."""

    out: Annotated[Path, typer.Argument(help="Directory to write the kit to.")]
    model: Annotated[str, "Model directory.", NOT_EMPTY]
    bottom: Annotated[int, "Layers that the party holds below the cut.", at_least(0)] = 2
    top: Annotated[int, "Layers that the party holds above the cut.", at_least(0)] = 2
    dtype: Annotated[Dtype, "Type of the weights; auto is the checkpoint's."] = "auto"
    task: Annotated[Literal["causal-lm", "sequence-classification"], "What the model is tuned for."] = "causal-lm"
    num_labels: Annotated[int | None, "Number of classes.", at_least(1)] = None
    label_names: Annotated[tuple[str, ...], "Name of a class, in order. May be repeated.", NOT_EMPTY] = ()
    seed: Annotated[int, "Seed of weights that are made afresh, such as a new classification head.", at_least(0)] = 0
    verify: Annotated[bool, "Open the kit again and compare it with the model."] = True
    overwrite: Annotated[bool, "Replace a kit that is already there."] = False
    json: JsonFile = None

    def check(self) -> None:
        """Refuse classes without a classification task, and two different numbers of them."""
        if self.task == "causal-lm" and (self.num_labels is not None or self.label_names):
            raise UsageError(
                "--num-labels and --label-names name classes, but the task is causal-lm.",
                hint="add --task sequence-classification",
            )
        if self.label_names and self.num_labels not in (None, len(self.label_names)):
            raise UsageError(f"--num-labels is {self.num_labels}, but there are {len(self.label_names)} --label-names.")
        if len(set(self.label_names)) < len(self.label_names):
            raise UsageError("--label-names holds a name twice.")


@dataclass(frozen=True, kw_only=True)
class ServeSettings(ServeRecording, Keeping, Sharing, Placing):
    """Host the trunk. Prints `ready ADDRESS FINGERPRINT` on stdout when parties can connect."""

    model: Annotated[str, "Model directory.", NOT_EMPTY]
    kit: Annotated[Path, "The kit that the parties hold."]
    bind: Annotated[str, "Address to listen on; port 0 takes a free one.", ADDRESS, LINK] = "tcp://127.0.0.1:5555"
    key: Annotated[Path | None, "The owner's secret key (NAME.key_secret).", LINK] = None
    parties: Annotated[Path | None, "Directory of the parties' public keys: the allow-list.", LINK] = None
    insecure_loopback: Annotated[bool, "No encryption and no keys; on a loopback address only.", LINK] = False
    emulator: Annotated[Path | None, "Emulator directory to hand out, for guarded-offline. Default: none."] = None
    device: Device = "cpu"
    dtype: Annotated[Dtype, "Type of the trunk's weights; auto is the plan's.", MACHINE] = "auto"
    threads: Threads = None
    workers: Annotated[int, "Workers that compute at the same time.", at_least(1), MACHINE] = 1
    memory: Annotated[
        Memory, "Between forward and backward keep the graph, or only the input and compute again.", MACHINE
    ] = "keep"
    memory_budget: Annotated[str, "Room for kept graphs and caches, such as 4GB.", SIZE, MACHINE] = "4GB"
    max_tokens: Annotated[int, "Largest batch: rows times length.", at_least(1)] = 32768
    max_sessions: Annotated[int, "Sessions open at the same time.", at_least(1)] = 16
    lease: Annotated[float, "Seconds for which an idle session keeps its caches and steps.", above(0)] = 600.0
    json: JsonFile = None

    def check(self) -> None:
        """Refuse an open channel beyond loopback, and an encrypted one without keys."""
        check_link(self.insecure_loopback, self.bind, {"--key": self.key, "--parties": self.parties})
        self.check_keeping()
        self.check_placing(workers=self.workers)
        self.check_recording()


@dataclass(frozen=True, kw_only=True)
class TuneSettings(ProtectionSettings, FederatedTuning, TuneRecording):
    """Train adapters on your own rows, with the owner's trunk in the middle. Writes a run directory."""

    kit: Annotated[Path, "Kit directory, as received from the owner."]
    out: Annotated[Path, "Run directory to write."]
    resume: Annotated[bool, "Continue from the last checkpoint in the run directory."] = False
    protocol: Annotated[str, "Which design to run: what crosses, under which mechanism."] = "split"
    emulator: Annotated[Path | None, "Emulator directory, for guarded-offline. Default: --owner's, fetched."] = None
    json: JsonFile = None

    owner: Annotated[str | None, "Address of the owner, tcp://HOST:PORT.", REMOTE, LINK] = None
    owner_key: Annotated[Path | None, "The owner's public key (NAME.key).", LINK] = None
    key: Annotated[Path | None, "Your own secret key (NAME.key_secret).", LINK] = None
    insecure_loopback: Annotated[bool, "No encryption and no keys; on a loopback address only.", LINK] = False
    timeout: Timeout = 120.0
    wire_dtype: Annotated[Dtype, "Type of tensors on the wire; auto is the type of the computation.", LINK] = "auto"
    memory: Annotated[
        Memory, "What the owner holds between forward and backward: the graph, or only the input.", LINK
    ] = "keep"
    micro_batches: Annotated[
        str, "Parts of a batch that overlap: one computes while others are on their way.", MICRO_BATCHES, LINK
    ] = "1"
    in_flight_bytes: Annotated[str, "With --micro-batches: most activations on their way at a time.", SIZE, LINK] = (
        "256MB"
    )

    train: Annotated[Path, "Rows to train on: JSONL, CSV, text, or a saved dataset.", ROWS]
    eval: Annotated[Path | None, "Held-out rows, measured before, during and after.", ROWS] = None
    columns: Columns = ()
    answer_only: Annotated[bool, "Learn the answers only, not the prompts.", ROWS] = True
    max_length: MaxLength = None
    truncation: Annotated[Truncation, "Rows that are too long: refuse them, cut the right end, drop them.", ROWS] = (
        "error"
    )
    padding_side: Annotated[Literal["right", "left"], "Where short rows are filled up.", ROWS] = "right"

    device: Device = "cpu"
    dtype: Annotated[Dtype, "Type of the computation; auto is the kit's.", MACHINE] = "auto"
    threads: Threads = None

    per_device_train_batch_size: Annotated[int, "Rows in one batch.", at_least(1), TRAINING] = 8
    per_device_eval_batch_size: Annotated[int, "Rows in one evaluation batch.", at_least(1), TRAINING] = 8
    gradient_accumulation_steps: Annotated[int, "Batches that make one step.", at_least(1), TRAINING] = 1
    learning_rate: Annotated[float, "Peak learning rate.", above(0), TRAINING] = 2e-4
    weight_decay: Annotated[float, "Weight decay.", at_least(0), TRAINING] = 0.0
    max_grad_norm: Annotated[float, "Gradients are clipped to this norm; 0 does not clip.", at_least(0), TRAINING] = 1.0
    num_train_epochs: Annotated[float, "Passes over the rows.", above(0), TRAINING] = 3.0
    max_steps: Annotated[int, "Steps to train; more than 0 overrides the epochs.", at_least(-1), TRAINING] = -1
    lr_scheduler_type: Annotated[str, "Schedule of the learning rate.", NOT_EMPTY, TRAINING] = "linear"
    warmup_steps: Annotated[float, "Warm-up: steps, or below 1 a share of them.", at_least(0), TRAINING] = 0.0
    optim: Annotated[str, "Optimiser.", NOT_EMPTY, TRAINING] = "adamw_torch"
    logging_steps: Annotated[int, "Steps between two records.", at_least(1), TRAINING] = 10
    eval_steps: Annotated[int | None, "Steps between two evaluations.", at_least(1), TRAINING] = None
    save_steps: Annotated[int, "Steps between two checkpoints.", at_least(1), TRAINING] = 100
    save_total_limit: Annotated[int, "Checkpoints to keep.", at_least(1), TRAINING] = 2
    seed: Annotated[int, "Seed of order, dropout and new weights.", at_least(0), TRAINING] = 0
    report_to: Annotated[str, "Trackers. Curves of private data are data: none by default.", TRAINING] = "none"
    training_args: Annotated[
        tuple[str, ...], "NAME=VALUE: any other field of TrainingArguments. May be repeated.", PAIR, TRAINING
    ] = ()

    r: Annotated[int, typer.Option("--r", "--lora-r", help="Rank of the adapter."), at_least(1), ADAPTER] = 8
    lora_alpha: Annotated[int, "Scale of the adapter, divided by the rank.", at_least(1), ADAPTER] = 16
    lora_dropout: Annotated[float, "Dropout before the adapter.", between(0, 1), ADAPTER] = 0.0
    target_modules: Annotated[
        tuple[str, ...],
        "Module to adapt, or all-linear. May be repeated. Default: PEFT's choice for the family, else all-linear.",
        NOT_EMPTY,
        ADAPTER,
    ] = ()
    bias: Annotated[Literal["none", "all", "lora_only"], "Which biases are trained as well.", ADAPTER] = "none"
    use_rslora: Annotated[bool, "Divide by the square root of the rank.", ADAPTER] = False
    use_dora: Annotated[bool, "Train the weights' magnitudes as well (DoRA).", ADAPTER] = False

    def check(self) -> None:
        """Refuse an open channel beyond loopback, zero steps, and unknown training arguments."""
        self.check_route(self.protocol, self.emulator, self.owner)
        self.check_federation(self.protocol, self.key, self.r)
        self.check_bounds(self.protocol, self.first_of_dp_sgd, self.dp_freeze_a)
        self.check_unbounded(self.protocol, self.first_of_dp_sgd, self.sum_noise)
        self.check_recording(self.protocol, self.federate, self.sum)
        whole = self.protocol in WHOLE_PROTOCOLS
        needs_owner = not whole and (self.protocol != OFFLINE_PROTOCOL or self.emulator is None)
        if needs_owner:
            check_link(self.insecure_loopback, self.owner, {"--owner-key": self.owner_key, "--key": self.key})
        self.column_map()
        self.check_protection()
        if self.hide_lengths and (self.padding_side != "right" or self.max_length is None):
            raise UsageError(
                "--hide-lengths pads every row to one length, on the right.",
                expected="--padding-side right and a --max-length",
            )
        if self.micro_batches != "1" and self.label_noise != "none":
            raise UsageError(
                "--label-noise is worked out from a whole batch, and --micro-batches sends it in parts.",
                expected="one of the two",
            )
        if self.max_steps == 0:
            raise UsageError(
                "--max-steps is 0: nothing would be trained.", expected="1 or more, or -1 for whole epochs"
            )
        if self.training_args:
            training_arguments(self.training_args, taken=self._own_training_names())

    def column_map(self) -> dict[str, str]:
        """Our name of a field to the file's name of its column."""
        return parse_pairs(self.columns, "--columns")

    @staticmethod
    def _own_training_names() -> dict[str, str]:
        options = {name: "--" + name.replace("_", "-") for name in TRAINING_NAMES}
        return options | {"output_dir": "--out", "resume_from_checkpoint": "--resume", "use_cpu": "--device"}

    def training_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for `transformers.TrainingArguments`, all but the output directory.

        Raises:
            UsageError: a name or a value that `TrainingArguments` does not know.
        """
        named = {name: getattr(self, name) for name in TRAINING_NAMES}
        if self.warmup_steps >= 1:
            named["warmup_steps"] = int(self.warmup_steps)
        pairs = [f"{name}={named[name]}" for name in ("lr_scheduler_type", "optim")]
        extra = training_arguments(self.training_args, taken=self._own_training_names())
        given = {name: value for name, value in named.items() if value is not None}
        return given | training_arguments(pairs) | extra

    def lora_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for `peft.LoraConfig`; `target_modules` only where some were named."""
        named: dict[str, Any] = {name: getattr(self, name) for name in ADAPTER_NAMES}
        modules = named.pop("target_modules")
        if modules:
            named["target_modules"] = "all-linear" if modules == ("all-linear",) else list(modules)
        return named


def _names_under(panel: Panel) -> tuple[str, ...]:
    fields = fields_of(TuneSettings)
    return tuple(f.name for f in fields if f.info.rich_help_panel == panel.name and f.name != "training_args")


TRAINING_NAMES = _names_under(TRAINING)
ADAPTER_NAMES = _names_under(ADAPTER)


@dataclass(frozen=True, kw_only=True)
class WithRun(Settings):
    """What every command has that uses a tuned model."""

    run: Annotated[Path, "Run directory; it remembers kit, owner and keys."]
    json: JsonFile = None
    kit: Annotated[Path | None, "Kit directory. Default: as in the run."] = None
    emulator: Annotated[Path | None, "Emulator of an offline run. Default: as in the run."] = None
    adapter: Annotated[Path | None, "Another adapter, such as `splitfl plugin` wrote. Default: the run's."] = None
    max_norm: Annotated[float | None, "Largest change by --adapter, as for `splitfl plugin`.", above(0)] = None
    owner: Annotated[str | None, "Address of the owner. Default: as in the run.", REMOTE, LINK] = None
    owner_key: Annotated[Path | None, "The owner's public key. Default: as in the run.", LINK] = None
    key: Annotated[Path | None, "Your own secret key. Default: as in the run.", LINK] = None
    timeout: Timeout = 120.0
    device: Device = "cpu"
    threads: Threads = None

    def check(self) -> None:
        """Refuse a limit for an adapter that was not named."""
        if self.max_norm is not None and self.adapter is None:
            raise UsageError("--max-norm has no effect without --adapter.", hint="name an adapter, or leave it out")


@dataclass(frozen=True, kw_only=True)
class GenerateSettings(WithRun, Drafting):
    """Write text with the tuned model, through the split."""

    prompt: Annotated[str | None, "The prompt.", NOT_EMPTY] = None
    prompt_file: Annotated[Path | None, "A text file with the prompt."] = None
    chat: Annotated[bool, "Put the prompt into the model's chat template."] = False
    stream: Annotated[bool, "Print words as they come (not with several beams)."] = True

    max_new_tokens: Annotated[int, "Most tokens to write.", at_least(1)] = 50
    do_sample: Annotated[bool, "Draw at random instead of taking the likeliest token."] = False
    temperature: Annotated[
        float | None, "With --do-sample: below 1 keeps to likely words, above 1 is wilder.", above(0)
    ] = None
    top_k: Annotated[int | None, "With --do-sample: draw from the K likeliest; 0 from all.", at_least(0)] = None
    top_p: Annotated[float | None, "With --do-sample: draw from the likeliest share P.", above(0), between(0, 1)] = None
    num_beams: Annotated[int, "Beams of the search.", at_least(1)] = 1
    repetition_penalty: Annotated[float, "Above 1 avoids repeating.", above(0)] = 1.0
    seed: Annotated[int, "Seed of --do-sample.", at_least(0)] = 0

    def check(self) -> None:
        """Refuse no prompt or two, and sampling options without sampling."""
        super().check()
        if (self.prompt is None) == (self.prompt_file is None):
            came = "neither" if self.prompt is None else "both"
            raise UsageError(f"Of --prompt and --prompt-file, {came} was given.", expected="exactly one of them")
        self.check_drafting(num_beams=self.num_beams)
        for name in ("temperature", "top_k", "top_p"):
            if getattr(self, name) is not None and not self.do_sample:
                option = "--" + name.replace("_", "-")
                raise UsageError(
                    f"{option} has no effect without --do-sample.", hint="add --do-sample, or leave it out"
                )


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(WithRun):
    """Measure the tuned model on rows, through the split."""

    eval: Annotated[Path, "Rows to measure on.", ROWS]
    split: Annotated[Literal["tuned", "base"], "With the adapter, or the model as it came."] = "tuned"
    per_device_eval_batch_size: EvalBatch = 8
    columns: Columns = ()
    max_length: MaxLength = None
    truncation: Annotated[Truncation | None, "Rows that are too long. Default: as in the run.", ROWS] = None

    def check(self) -> None:
        """Refuse a column that is mapped twice, and an adapter for the model without one."""
        super().check()
        self.column_map()
        if self.adapter is not None and self.split == "base":
            raise UsageError("--split base measures the model without an adapter.", hint="leave --adapter out")

    def column_map(self) -> dict[str, str]:
        """Our name of a field to the file's name of its column."""
        return parse_pairs(self.columns, "--columns")


@dataclass(frozen=True, kw_only=True)
class DoctorSettings(Settings):
    """Check the installation, and whatever is named: kit, keys, the owner's address."""

    kit: Annotated[Path | None, "Kit directory to check."] = None
    owner: Annotated[str | None, "Address to reach, tcp://HOST:PORT.", REMOTE, LINK] = None
    owner_key: Annotated[Path | None, "The owner's public key.", LINK] = None
    key: Annotated[Path | None, "Your own secret key.", LINK] = None
    json: JsonFile = None


@dataclass(frozen=True, kw_only=True)
class DemoSettings(Settings):
    """Run the whole system on this machine: an owner, two parties, real text, a small model; ends with a report."""

    out: Annotated[Path, "Directory for the demo's files."] = Path("demo-out")
    max_steps: Annotated[int, "Training steps of each party.", at_least(1)] = 60
    seed: Annotated[int, "Seed of the whole demo.", at_least(0)] = 0
    keep: Annotated[bool, "Keep keys, kit and checkpoints when it is over."] = True
    json: JsonFile = None


@dataclass(frozen=True, kw_only=True)
class BenchSettings(OffsiteSettings):
    """Measure speed and size (split), what protection costs (utility), what offsite tuning is worth (offsite), the
    rules of combining adapters (rules), masked and encrypted sums (aggregation), rounds over sockets (rounds),
    the three federated designs (frameworks), attacks on cases whose outcome is known (audit), micro-batches that
    overlap (pipeline), slow links (link), guesses in generation (generate), the trunk on one card (gpu), runs that are
    broken on purpose (chaos),
    an hour of it (soak), or what attackers cost the others (hostile)."""

    name: Annotated[
        str,
        typer.Argument(
            help="Which to run: split, utility, offsite, rules, aggregation, rounds, frameworks, audit, pipeline, "
            "link, generate, gpu, serving, chaos, soak or hostile."
        ),
    ]
    models: Annotated[tuple[str, ...], "Model size to measure. May be repeated.", NOT_EMPTY] = ("S", "M", "L")
    shapes: Annotated[tuple[str, ...], "ROWSxLENGTH of a batch. May be repeated.", SHAPE] = ("8x128", "4x512")
    work: Annotated[Literal["all", "train", "generate"], "What to measure."] = "all"
    threads: Annotated[tuple[int, ...], "CPU threads of each side. Default: 1, and 2.", at_least(1), MACHINE] = ()
    steps: Annotated[int, "Steps, generations, turns or rounds to measure, after the warm-up.", at_least(1)] = 10
    new_tokens: Annotated[int, "Tokens that one generation writes.", between(2, 512)] = 64
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], "Type of computation and wire.", MACHINE] = "float32"
    cache: Annotated[
        Path | None, "Keep checkpoints, or kits and emulators, here. Default: made for this run alone."
    ] = None
    resume: Annotated[bool, "Leave out the cases whose figures are in the --json file already."] = False
    json: JsonFile = None
