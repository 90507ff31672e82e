"""Settings of `splitfl fedmod`: peers that average partly trained adapters, without a server between them.

Nothing heavy is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from splitfl.config_common import (
    ADAPTER,
    ADDRESS,
    DELTA,
    NOT_EMPTY,
    PAIR,
    PLAIN_NAME,
    ROWS,
    TRAINING,
    Columns,
    EvalBatch,
    JsonFile,
    LedgerFile,
    MaxLength,
    Threads,
    Truncation,
)
from splitfl.errors import UsageError
from splitfl.options import Panel, Settings, above, at_least, between, parse_pairs
from splitfl.options.values import parse_address

MESH = Panel("Peers and keys")
CHOICE = Panel("Which peers")
MIXING = Panel("What is made of their adapters")
SKETCH = Panel("The similarity sketch")


@dataclass(frozen=True, kw_only=True)
class FedmodSettings(Settings):
    """Train a classifier on your own labelled rows, and average partly trained adapters with similar peers."""

    model: Annotated[str, "Directory of the full model that every peer has.", NOT_EMPTY]
    out: Annotated[Path, "Run directory to write."]
    resume: Annotated[bool, "Continue from the last checkpoint in the run directory."] = False
    json: JsonFile = None
    ledger: LedgerFile = None

    key: Annotated[Path, "Your own secret key (NAME.key_secret).", MESH]
    peers: Annotated[Path, "Directory of the peers' public keys: who may ask, and who is asked.", MESH]
    peer: Annotated[
        tuple[str, ...], "NAME=tcp://HOST:PORT of a peer whose key is NAME.key. May be repeated.", PAIR, MESH
    ] = ()
    bind: Annotated[str, "Address to listen on; port 0 takes a free one.", ADDRESS, MESH] = "tcp://127.0.0.1:5556"
    timeout: Annotated[float, "Longest wait for a peer in one round, in seconds.", above(0), MESH] = 30.0
    gather: Annotated[float, "Longest wait for peers to appear before training, in seconds.", at_least(0), MESH] = 30.0
    linger: Annotated[float, "Longest time to serve peers that are not finished, in seconds.", at_least(0), MESH] = 60.0

    neighbours: Annotated[int, "Peers to average with in a round; 0 trains alone.", at_least(0), CHOICE] = 3
    deny: Annotated[
        tuple[str, ...], "Peer that is neither asked nor answered. May be repeated.", PLAIN_NAME, CHOICE
    ] = ()
    tags: Annotated[tuple[str, ...], "Tags of the policy that your labels follow, with commas.", NOT_EMPTY, CHOICE] = ()
    require_tag: Annotated[tuple[str, ...], "Tag that a peer must have. May be repeated.", NOT_EMPTY, CHOICE] = ()
    shared_tags: Annotated[int, "Tags that a peer must have in common with you.", at_least(0), CHOICE] = 0
    min_similarity: Annotated[float, "Least similarity of a neighbour, -1 to 1.", between(-1, 1), CHOICE] = 0.0
    candidates: Annotated[int, "Peers to look at, drawn at random where there are more.", at_least(1), CHOICE] = 32

    sketch: Annotated[bool, "Choose neighbours by sketches of the rows; without, at random.", SKETCH] = True
    sketch_epsilon: Annotated[float, "Epsilon of the one release of your sketch.", above(0), SKETCH] = 1.0
    sketch_delta: Annotated[float, "Its delta.", DELTA, SKETCH] = 1e-6
    sketch_labels: Annotated[bool, "Sketch each class by itself; all peers must number classes alike.", SKETCH] = False

    rule: Annotated[
        Literal["fedit", "rolora"], "Average both factors, or B and A in turn (half the bytes).", MIXING
    ] = "fedit"
    max_lag: Annotated[int, "Rounds that a peer's adapter may be behind yours.", at_least(0), MIXING] = 1
    row_cap: Annotated[float, "Most weight of a peer's rows, as a multiple of your own.", above(0), MIXING] = 2.0
    norm_cap: Annotated[
        float, "Longest update of a peer, as a multiple of your own; 0 for any.", at_least(0), MIXING
    ] = 2.0
    robust: Annotated[Literal["none", "trimmed", "median"], "Mean of the updates, value by value.", MIXING] = "none"
    guard: Annotated[
        float,
        "Keep your own where the loss on your validation rows would rise by this share; 0 for never.",
        at_least(0),
        MIXING,
    ] = 0.1

    train: Annotated[Path, "Labelled rows to train on: JSONL, CSV, or a saved dataset.", ROWS]
    eval: Annotated[Path | None, "Held-out rows; looked at before and after, and for nothing else.", ROWS] = None
    validation_share: Annotated[
        float, "Share of the training rows that is kept for the guard and for thresholds.", between(0.02, 0.5), ROWS
    ] = 0.15
    columns: Columns = ()
    max_length: MaxLength = None
    truncation: Annotated[Truncation, "Rows that are too long: refuse them, cut the right end, drop them.", ROWS] = (
        "right"
    )

    rounds: Annotated[
        int, "Rounds: local training, then an exchange; the last ends with training.", at_least(1), TRAINING
    ]
    local_steps: Annotated[int, "Steps of local training in a round.", at_least(1), TRAINING]
    compare_local: Annotated[bool, "Afterwards, train without peers as well, to compare.", TRAINING] = True
    per_device_train_batch_size: Annotated[int, "Rows in one batch.", at_least(1), TRAINING] = 16
    per_device_eval_batch_size: EvalBatch = 32
    learning_rate: Annotated[float, "Peak learning rate; it falls to 0 in a line.", above(0), TRAINING] = 2e-3
    weight_decay: Annotated[float, "Weight decay.", at_least(0), TRAINING] = 0.0
    max_grad_norm: Annotated[float, "Gradients are clipped to this norm; 0 does not clip.", at_least(0), TRAINING] = 1.0
    seed: Annotated[int, "Seed of order, dropout, head and choice of peers; your own.", at_least(0), TRAINING] = 0
    threads: Threads = None

    r: Annotated[int, "Rank of the adapter; the same at all peers.", at_least(1), ADAPTER] = 8
    lora_alpha: Annotated[
        int, "Scale of the adapter, divided by the rank; the same at all peers.", at_least(1), ADAPTER
    ] = 16
    lora_dropout: Annotated[float, "Dropout before the adapter.", between(0, 1), ADAPTER] = 0.0
    target_modules: Annotated[
        tuple[str, ...], "Module to adapt, or all-linear. May be repeated. Default: PEFT's choice.", NOT_EMPTY, ADAPTER
    ] = ()
    start_seed: Annotated[
        int, "Seed of the adapter's start and of the sketch; the same at all peers.", at_least(0), ADAPTER
    ] = 0

    def check(self) -> None:
        """Refuse addresses that are none, names that say two things, and tags that are none."""
        for name, address in self.addresses().items():
            self._check_address(name, address)
        both = sorted(set(self.deny) & set(self.addresses()))
        if both:
            raise UsageError(f"{both[0]!r} is both a --peer and a --deny.", hint="leave one of the two out")
        for tag in (*self.tag_list(), *self.require_tag):
            if not tag.replace("-", "").replace("_", "").replace(".", "").isalnum() or len(tag) > 64:
                raise UsageError(f"{tag!r} cannot be a tag.", expected="letters, digits, dots, dashes, underscores")
        if len(self.tag_list()) > 16:
            raise UsageError("There are too many --tags.", expected="at most 16")
        if self.shared_tags > len(self.tag_list()):
            raise UsageError(f"--shared-tags is {self.shared_tags}, and you have {len(self.tag_list())} --tags.")
        self.column_map()

    @staticmethod
    def _check_address(name: str, address: str) -> None:
        host, port = parse_address(address)
        if port == 0 or host == "*":
            raise UsageError(f"--peer {name}={address} cannot be reached.", expected="tcp://HOST:PORT of that peer")

    def addresses(self) -> dict[str, str]:
        """Name of each peer that is asked, to its address."""
        return parse_pairs(self.peer, "--peer")

    def tag_list(self) -> tuple[str, ...]:
        """The tags, each once, in order."""
        words = [word.strip() for text in self.tags for word in text.split(",")]
        return tuple(dict.fromkeys(word for word in words if word))

    def column_map(self) -> dict[str, str]:
        """Our name of a field to the file's name of its column."""
        return parse_pairs(self.columns, "--columns")
