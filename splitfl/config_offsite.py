"""Settings of the commands of offsite-tuning: an emulator, the adapter that comes back, and how long the margin lasts.

Nothing heavy is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from splitfl.config_common import (
    LINK,
    NOT_EMPTY,
    REMOTE,
    ROWS,
    Columns,
    Device,
    Dtype,
    EvalBatch,
    JsonFile,
    MaxLength,
    Threads,
    Timeout,
    Truncation,
    check_link,
)
from splitfl.errors import UsageError
from splitfl.options import Check, Panel, Settings, above, at_least, parse_pairs

CUT = Panel("The cut, where there is no kit yet")
SMALLER = Panel("Smaller weights")
DISTIL = Panel("Distillation")
COPY = Panel("What the holder does")
LARGEST_CHANGE = 2.0  # of a weight, as a multiple of its norm: tuning changes it by a fraction
_SHARE = Check(test=lambda share: 0 <= share < 1, expected="0 to below 1")


@dataclass(frozen=True, kw_only=True)
class EmulatorSettings(Settings):
    """Make an emulator: some layers of the trunk, perhaps distilled and compressed, for a data holder to tune on."""

    out: Annotated[Path, typer.Argument(help="Directory to write the emulator to.")]
    model: Annotated[str, "Model directory.", NOT_EMPTY]
    keep: Annotated[int, "Layers of the trunk that the emulator keeps.", at_least(1)]
    kit: Annotated[Path | None, "The kit that the data holder has or will have; else give --bottom and --top."] = None
    choose: Annotated[
        Literal["uniform", "sensitivity"],
        "Which layers: at even distances, or those whose absence harms the loss on --text most.",
    ] = "uniform"
    resume: Annotated[bool, "Continue a distillation that was interrupted."] = False
    json: JsonFile = None

    bottom: Annotated[int | None, "Layers that the party holds below the cut.", at_least(0), CUT] = None
    top: Annotated[int | None, "Layers that the party holds above the cut.", at_least(0), CUT] = None
    task: Annotated[Literal["causal-lm", "sequence-classification"] | None, "As for `splitfl kit`.", CUT] = None
    dtype: Annotated[Dtype, "As for `splitfl kit`: type of the weights; auto is the checkpoint's.", CUT] = "auto"

    prune: Annotated[float, "Share of each weight matrix that is set to zero, the smallest first.", _SHARE, SMALLER] = (
        0.0
    )
    rank: Annotated[int | None, "Rank that weight matrices are reduced to.", at_least(1), SMALLER] = None
    bits: Annotated[Literal["8", "4"] | None, "Bits that a weight is stored in. Needs the extra quantise.", SMALLER] = (
        None
    )

    text: Annotated[Path | None, "Public text, to distil on and to measure with. Never a party's rows.", ROWS] = None
    eval: Annotated[Path | None, "Held-out public text. Default: every tenth example of --text.", ROWS] = None
    max_length: MaxLength = None

    distil_steps: Annotated[int, "Steps of distillation; 0 leaves the layers as they are.", at_least(0), DISTIL] = 0
    learning_rate: Annotated[float, "Peak learning rate.", above(0), DISTIL] = 1e-4
    batch_size: Annotated[int, "Examples in one batch.", at_least(1), DISTIL] = 8
    eval_steps: Annotated[int, "Steps between two measurements on held-out text.", at_least(1), DISTIL] = 50
    save_steps: Annotated[int, "Steps between two checkpoints.", at_least(1), DISTIL] = 50
    logging_steps: Annotated[int, "Steps between two records of the loss.", at_least(1), DISTIL] = 10
    seed: Annotated[int, "Seed of the order of the text.", at_least(0), DISTIL] = 0
    device: Device = "cpu"
    threads: Threads = None

    def check(self) -> None:
        """Refuse two cuts or none, and options that need a text without one."""
        own = (self.bottom, self.top)
        if self.kit is None and None in own:
            raise UsageError("Neither a kit nor a cut was given.", expected="--kit, or both --bottom and --top")
        if self.kit is not None and (*own, self.task) != (None, None, None):
            raise UsageError("--kit says where the model is cut and for what.", hint="leave the options of the cut out")
        if self.kit is not None and self.dtype != "auto":
            raise UsageError("--kit says which type the weights have.", hint="leave --dtype out")
        for option, asked in (
            ("--distil-steps", self.distil_steps > 0),
            ("--choose sensitivity", self.choose == "sensitivity"),
            ("--eval", self.eval is not None),
        ):
            if asked and self.text is None:
                raise UsageError(f"{option} needs a public text.", hint="name a file with --text")
        if self.resume and not self.distil_steps:
            raise UsageError("--resume continues a distillation, and none was asked for.", expected="--distil-steps")
        if self.choose == "sensitivity" and self.keep < 2:
            raise UsageError(
                "--choose sensitivity always keeps the first and the last layer of the trunk, and --keep is 1.",
                expected="--keep 2 or more",
                hint="with --choose uniform one layer is kept from the middle",
            )


@dataclass(frozen=True, kw_only=True)
class FetchSettings(Settings):
    """Fetch the emulator that an owner hands out; broken off, the same command goes on where it ended."""

    out: Annotated[Path, typer.Argument(help="Directory to write the emulator to.")]
    kit: Annotated[Path, "Kit directory, as received from the owner."]
    owner: Annotated[str, "Address of the owner, tcp://HOST:PORT.", REMOTE, LINK]
    owner_key: Annotated[Path | None, "The owner's public key (NAME.key).", LINK] = None
    key: Annotated[Path | None, "Your own secret key (NAME.key_secret).", LINK] = None
    insecure_loopback: Annotated[bool, "No encryption and no keys; on a loopback address only.", LINK] = False
    timeout: Timeout = 120.0
    json: JsonFile = None

    def check(self) -> None:
        """Refuse an open channel beyond loopback, and an encrypted one without keys."""
        check_link(self.insecure_loopback, self.owner, {"--owner-key": self.owner_key, "--key": self.key})


@dataclass(frozen=True, kw_only=True)
class PluginSettings(Settings):
    """Check adapters that came back from data holders, plug them into the full model and measure it."""

    model: Annotated[str, "Model directory.", NOT_EMPTY]
    kit: Annotated[Path, "The kit that the adapters were tuned with."]
    adapter: Annotated[
        tuple[Path, ...],
        "Adapter directory. Repeated, the mean of their changes is plugged in, exactly: their ranks add up.",
    ]
    weights: Annotated[
        tuple[float, ...],
        "Weight of each adapter, in their order; they are divided by their sum. Default: all alike.",
        above(0),
    ] = ()
    max_norm: Annotated[
        float,
        "Largest change of a weight as a multiple of its norm, of all together half of that; for biases, a new head "
        "and LoRA's factors, largest root mean square.",
        above(0),
    ] = LARGEST_CHANGE
    out: Annotated[Path | None, "Write what was plugged in to this PEFT directory."] = None
    json: JsonFile = None

    eval: Annotated[Path | None, "Rows to measure on, without the adapter and with it.", ROWS] = None
    columns: Columns = ()
    answer_only: Annotated[bool, "Measure on the answers only, not the prompts.", ROWS] = True
    max_length: MaxLength = None
    truncation: Annotated[Truncation, "Rows that are too long: refuse them, cut the right end, drop them.", ROWS] = (
        "error"
    )
    per_device_eval_batch_size: EvalBatch = 8
    device: Device = "cpu"
    threads: Threads = None

    def check(self) -> None:
        """Refuse weights that are not one for each adapter, and the same adapter twice."""
        self.column_map()
        if self.weights and len(self.weights) != len(self.adapter):
            raise UsageError(
                f"--weights was given {len(self.weights)} times, --adapter {len(self.adapter)} times.",
                expected="one weight for each adapter, or none",
            )
        if len({path.resolve() for path in self.adapter}) < len(self.adapter):
            raise UsageError("--adapter names the same directory twice.", hint="say how much it counts with --weights")

    def column_map(self) -> dict[str, str]:
        """Our name of a field to the file's name of its column."""
        return parse_pairs(self.columns, "--columns")


@dataclass(frozen=True, kw_only=True)
class MarginSettings(Settings):
    """How long an owner's margin lasts: what a holder's copy of the emulator is worth once the holder trains it on."""

    out: Annotated[Path, typer.Argument(help="Directory for the report, and for what a measurement resumes from.")]
    model: Annotated[str, "Model directory.", NOT_EMPTY]
    kit: Annotated[Path, "The kit that the holder has."]
    emulator: Annotated[Path, "The emulator that the holder has."]
    adapter: Annotated[Path | None, "Adapter that the holder tuned; both sides of the margin then have it."] = None
    max_norm: Annotated[float, "As for `splitfl plugin`.", above(0)] = LARGEST_CHANGE
    resume: Annotated[bool, "Continue a measurement that was interrupted, or add --queries to one."] = False
    json: JsonFile = None

    rows: Annotated[Path, "Rows like the holder's own: what the copy is trained on.", ROWS]
    eval: Annotated[Path | None, "Held-out rows for the margin. Default: every fifth row of --rows.", ROWS] = None
    text: Annotated[
        Path | None, "More text that the holder would put to the trunk, when its rows are used up.", ROWS
    ] = None
    columns: Columns = ()
    answer_only: Annotated[bool, "Learn and measure the answers only, not the prompts.", ROWS] = True
    max_length: MaxLength = None
    truncation: Annotated[Truncation, "Rows that are too long: refuse them, cut the right end, drop them.", ROWS] = (
        "error"
    )

    queries: Annotated[
        tuple[int, ...],
        "Tokens that the holder puts to the trunk. May be repeated; a copy without any is always measured.",
        at_least(1),
        COPY,
    ] = (4096, 16384, 65536, 262144)
    gone_at: Annotated[float, "The margin counts as gone at this share of what it was.", _SHARE, COPY] = 0.1
    grow: Annotated[bool, "Fill the places of the layers left out with copies of their neighbours first.", COPY] = False
    steps: Annotated[int, "Steps that each copy is trained.", at_least(1), COPY] = 500
    learning_rate: Annotated[float, "Peak learning rate.", above(0), COPY] = 1e-4
    batch_size: Annotated[int, "Rows in one batch.", at_least(1), COPY] = 8
    eval_steps: Annotated[int, "Steps between two looks at rows kept back.", at_least(1), COPY] = 50
    save_steps: Annotated[int, "Steps between two checkpoints.", at_least(1), COPY] = 50
    logging_steps: Annotated[int, "Steps between two records of the loss.", at_least(1), COPY] = 10
    seed: Annotated[int, "Seed of the order of rows and queries, and of the intervals.", at_least(0), COPY] = 0
    device: Device = "cpu"
    threads: Threads = None

    def check(self) -> None:
        """Refuse a column that is mapped twice, and the same number of queries twice."""
        self.column_map()
        if len(set(self.queries)) < len(self.queries):
            raise UsageError("--queries names the same number of tokens twice.", hint="leave one of them out")

    def column_map(self) -> dict[str, str]:
        """Our name of a field to the file's name of its column."""
        return parse_pairs(self.columns, "--columns")
