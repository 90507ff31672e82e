"""The options of `splitfl tune` that say what is done to a tensor before it leaves, and those of `splitfl ledger`.

None of them does anything by itself: `party.protect` puts mechanisms together from them, and refuses what makes no
sense for the model, the cut or the protocol at hand. What makes no sense whatever the model is refused here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from splitfl.config_common import DELTA, NOT_EMPTY, ROWS, Columns, JsonFile, LedgerFile
from splitfl.config_federation import WHOLE_PROTOCOLS
from splitfl.errors import UsageError
from splitfl.options import Panel, Settings, above, at_least
from splitfl.options.values import parse_pairs

PROTECTION = Panel("What is done before a tensor leaves (see docs/protocols.md)")
DP_SGD = Panel(
    "Bound on what the adapter, or every update, reveals: DP-SGD, with guarded-offline, fed-params or dp-lora "
    "(needs the extra dp)"
)
LEDGER = Panel("Ledger and checks")
OFFLINE_PROTOCOL = "guarded-offline"


@dataclass(frozen=True, kw_only=True)
class ProtectionSettings(Settings):
    """Mechanisms on activations and gradients, their size, and where releases are booked."""

    noise: Annotated[
        Literal["none", "gauss", "dchi"], "Noise on activations: discrete Gaussian, or metric (dchi).", PROTECTION
    ] = "none"
    clip: Annotated[float | None, "Largest norm of a row's activations (of a token's, with --unit token).",
                    above(0), PROTECTION] = None  # fmt: skip
    sigma: Annotated[float | None, "Standard deviation of the Gaussian noise.", above(0), PROTECTION] = None
    epsilon: Annotated[float | None, "Instead of --sigma: epsilon for all releases of a row together.",
                       above(0), PROTECTION] = None  # fmt: skip
    delta: Annotated[float | None, "Delta that goes with --epsilon.", DELTA, PROTECTION] = None
    unit: Annotated[Literal["record", "token"] | None, "What epsilon protects; token only at the embedding output.",
                    PROTECTION] = None  # fmt: skip
    releases: Annotated[int | None, "How often a row will be sent. Default: worked out from the run.",
                        at_least(1), PROTECTION] = None  # fmt: skip
    eta: Annotated[float | None, "Size of the dchi noise: epsilon a unit of distance.", above(0), PROTECTION] = None
    snap: Annotated[bool, "With dchi: send the nearest token's embedding instead.", PROTECTION] = False
    quantise: Annotated[
        Literal["none", "int8", "int4"] | None, "Fewer bits a number. Default: as the protocol says.", PROTECTION
    ] = None
    keep_largest: Annotated[int | None, "Send so many numbers of each token, the largest.", at_least(1), PROTECTION] = (
        None
    )
    decorrelate: Annotated[float | None, "Weight of the distance correlation between embeddings and what is sent. "
                           "Default: as the protocol says.", at_least(0), PROTECTION] = None  # fmt: skip
    gradient_clip: Annotated[float | None, "Largest norm of a token's gradient.", above(0), PROTECTION] = None
    gradient_sigma: Annotated[float | None, "Standard deviation of the noise on gradients, masked rows included.",
                              above(0), PROTECTION] = None  # fmt: skip
    label_noise: Annotated[
        Literal["none", "max-norm", "marvell"], "Classification: noise on gradients that hides labels.", PROTECTION
    ] = "none"
    label_power: Annotated[
        float,
        "With marvell: noise power, in squared distances between the classes' mean gradients.",
        above(0),
        PROTECTION,
    ] = 4.0
    label_epsilon: Annotated[float | None, "Classification: randomised response on the labels, once a run.",
                             above(0), PROTECTION] = None  # fmt: skip
    freeze_bottom: Annotated[bool, "Train the top alone: what is sent of a row never changes.", PROTECTION] = False
    hide_lengths: Annotated[bool, "Pad every row to --max-length and send no mask (causal models).", PROTECTION] = False

    dp_epsilon: Annotated[float | None, "Epsilon of the adapter: how much noise is worked out from it.",
                          above(0), DP_SGD] = None  # fmt: skip
    dp_noise_multiplier: Annotated[float | None, "Instead of --dp-epsilon: noise, in units of --dp-clip.",
                                   above(0), DP_SGD] = None  # fmt: skip
    dp_delta: Annotated[float | None, "Delta of the adapter, far below one in the number of rows.",
                        DELTA, DP_SGD] = None  # fmt: skip
    dp_clip: Annotated[float | None, "Largest norm of a row's (or a person's) gradient; --max-grad-norm is not used.",
                       above(0), DP_SGD] = None  # fmt: skip
    dp_freeze_a: Annotated[bool, "Train the second matrix of each LoRA pair alone.", DP_SGD] = False

    ledger: Annotated[Path | None, "Ledger file. Default: $SPLITFL_LEDGER, or in the user's data folder.", LEDGER] = (
        None
    )
    person_column: Annotated[str | None, "Column that names the person a row belongs to.", LEDGER] = None
    probe_every: Annotated[int, "Steps between two checks that the owner answers honestly; 0: none.",
                           at_least(0), LEDGER] = 50  # fmt: skip

    def check_protection(self) -> None:
        """Refuse noise without a bound, epsilon without what belongs to it, and settings that nothing would read."""
        if self.noise == "gauss":
            self._check_gauss()
        else:
            for name in ("clip", "sigma", "epsilon", "delta", "unit"):
                self._refuse_alone(name, "--noise gauss")
        if self.noise == "dchi":
            if self.eta is None:
                raise UsageError("--noise dchi was asked for without its size.", hint="add --eta, for instance 100")
        else:
            self._refuse_alone("eta", "--noise dchi")
            if self.snap:
                raise UsageError("--snap has no effect without --noise dchi.")
        self._check_channels()

    @property
    def dp_sgd(self) -> bool:
        """Whether the adapter is trained with DP-SGD."""
        return self.dp_epsilon is not None or self.dp_noise_multiplier is not None

    @property
    def first_of_dp_sgd(self) -> str | None:
        """The first option of DP-SGD that was given, as it is spelled."""
        given = [name for name in _OF_DP_SGD if getattr(self, name)]
        return _flag(given[0]) if given else None

    def check_route(self, protocol: str, emulator: Path | None, owner: str | None) -> None:
        """Refuse what belongs to training over the network without it, and the other way round."""
        given = [name for name in _OF_DP_SGD if getattr(self, name)]
        if protocol in WHOLE_PROTOCOLS and emulator is None:
            self._check_nothing_is_sent(protocol)
            if given:
                self._check_dp_sgd(given[0])
            return
        if protocol != OFFLINE_PROTOCOL:
            if emulator is not None:
                raise UsageError(
                    f"--emulator with protocol {protocol!r}: it has the owner's trunk in the middle.",
                    hint=f"add --protocol {OFFLINE_PROTOCOL}, or leave --emulator out",
                )
            if given:
                raise UsageError(
                    f"{_flag(given[0])} with protocol {protocol!r}: it bounds what the adapter reveals, and says "
                    "nothing of what is sent of each row while it is trained.",
                    hint=f"use protocol {OFFLINE_PROTOCOL}, or fed-params in a federation; for what is sent there is "
                    "--noise",
                )
            return
        if emulator is None and owner is None:
            raise UsageError(
                "Missing option --emulator, or --owner to fetch one from.",
                expected="an emulator directory, or the address of an owner that serves with --emulator",
                hint="the owner makes one with `splitfl emulator OUT`",
            )
        self._check_nothing_is_sent(protocol)
        if given:
            self._check_dp_sgd(given[0])

    def _check_nothing_is_sent(self, protocol: str) -> None:
        """No mechanism has a place where there is nothing that it could be put on."""
        for name in _ON_WHAT_IS_SENT:
            value = getattr(self, name)
            if value not in (None, False, "none"):
                raise UsageError(
                    f"{_flag(name)} with protocol {protocol!r}: no activation, gradient or label is sent that "
                    "it could protect. What leaves is the adapter.",
                    hint=f"leave {_flag(name)} out; for the adapter there is DP-SGD, such as --dp-epsilon 8 "
                    "--dp-delta 1e-6 --dp-clip 1",
                )

    def _check_dp_sgd(self, first: str) -> None:
        if not self.dp_sgd:
            raise UsageError(
                f"{_flag(first)} has no effect without --dp-epsilon or --dp-noise-multiplier.", hint="add one of them"
            )
        if self.dp_epsilon is not None and self.dp_noise_multiplier is not None:
            raise UsageError("Of --dp-epsilon and --dp-noise-multiplier, both were given.", expected="one of them")
        if self.dp_delta is None:
            raise UsageError(
                "DP-SGD was asked for without --dp-delta: an epsilon says nothing without it.",
                hint="for instance --dp-delta 1e-6",
            )
        if self.dp_clip is None:
            raise UsageError(
                "DP-SGD was asked for without --dp-clip: noise hides nothing of a gradient whose size has no bound.",
                hint="for instance --dp-clip 1",
            )

    def _check_gauss(self) -> None:
        if self.clip is None:
            raise UsageError(
                "--noise gauss was asked for without --clip: noise hides nothing of a row whose size has no bound.",
                hint="add --clip; a preview of a run with any clip prints the norms of your rows",
            )
        if self.epsilon is None and self.delta is not None:
            raise UsageError("--delta was given without --epsilon.", hint="give both, or --sigma")
        if (self.sigma is None) == (self.epsilon is None):
            came = "neither" if self.sigma is None else "both"
            raise UsageError(f"Of --sigma and --epsilon, {came} was given.", expected="exactly one of them")
        if self.epsilon is not None and (self.delta is None or self.unit is None):
            missing = " and ".join(
                flag for flag, value in (("--delta", self.delta), ("--unit", self.unit)) if value is None
            )
            raise UsageError(
                f"--epsilon {self.epsilon:g} says nothing without {missing}.",
                hint="for instance --epsilon 8 --delta 1e-6 --unit record",
            )
        if self.quantise in ("int8", "int4"):
            raise UsageError(
                f"--quantise {self.quantise} with --noise gauss: the noise already goes out on an integer grid.",
                hint="leave --quantise out",
            )
        if self.keep_largest is not None:
            raise UsageError(
                "--keep-largest with --noise gauss: which numbers are largest would be told without any noise.",
                hint="leave one of the two out",
            )

    def _check_channels(self) -> None:
        if (self.gradient_clip is None) != (self.gradient_sigma is None):
            raise UsageError(
                "Of --gradient-clip and --gradient-sigma, only one was given.", expected="both, or neither"
            )
        if self.keep_largest is not None and self.quantise in ("int8", "int4"):
            raise UsageError("--keep-largest and --quantise both code the tensor.", expected="one of them")
        if self.freeze_bottom and self.decorrelate:
            raise UsageError(
                "--decorrelate trains the bottom, and --freeze-bottom keeps it as it is.", expected="one of them"
            )

    def _refuse_alone(self, name: str, needs: str) -> None:
        if getattr(self, name) is not None:
            flag = "--" + name.replace("_", "-")
            hint = f"add {needs}, or leave {flag} out"
            if self.noise == "dchi" and name in ("epsilon", "delta"):
                raise UsageError(
                    f"{flag} with --noise dchi: its bound grows with the distance between two texts and is no "
                    "differential privacy.",
                    hint="use --eta alone, or --noise gauss",
                )
            raise UsageError(f"{flag} has no effect without {needs}.", hint=hint)


_ON_WHAT_IS_SENT = (
    *("noise", "clip", "sigma", "epsilon", "delta", "unit", "releases", "eta", "snap", "quantise", "keep_largest"),
    *("decorrelate", "gradient_clip", "gradient_sigma", "label_noise", "label_epsilon", "hide_lengths"),
)
_OF_DP_SGD = ("dp_epsilon", "dp_noise_multiplier", "dp_delta", "dp_clip", "dp_freeze_a")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


@dataclass(frozen=True, kw_only=True)
class LedgerShow(Settings):
    """Show what each data set has released so far, to whom, and what is left of its budget."""

    dataset: Annotated[str | None, "Only this data set: its fingerprint, or the beginning of it.", NOT_EMPTY] = None
    ledger: LedgerFile = None
    json: JsonFile = None


@dataclass(frozen=True, kw_only=True)
class LedgerBudget(Settings):
    """Set the most that a data set may release of any one unit; replaces the budget it has."""

    dataset: Annotated[str, typer.Argument(help="Rows file, fingerprint, or the beginning of one."), NOT_EMPTY]
    unit: Annotated[Literal["row", "person", "token", "data set"], "What the limit is for."] = "row"
    adversary: Annotated[str, "Who sees the releases, as the runs spell it.", NOT_EMPTY] = "owner"
    channels: Annotated[
        Literal["cut", "adapter", "sketch"], "What crosses the cut, the adapter that is given away, or a sketch."
    ] = "cut"
    epsilon: Annotated[float | None, "Limit on epsilon, for all releases together.", above(0)] = None
    delta: Annotated[float | None, "Delta that goes with --epsilon.", DELTA] = None
    releases: Annotated[int | None, "Limit on the number of releases.", at_least(0)] = None
    task: Annotated[Literal["causal-lm", "sequence-classification"], "How the rows are read.", ROWS] = "causal-lm"
    columns: Columns = ()
    ledger: LedgerFile = None

    def check(self) -> None:
        """Refuse an epsilon without its delta, a delta alone, and a budget without a limit."""
        self.column_map()
        if self.epsilon is not None and self.delta is None:
            raise UsageError(f"--epsilon {self.epsilon:g} says nothing without --delta.", hint="for instance 1e-6")
        if self.delta is not None and self.epsilon is None:
            raise UsageError("--delta was given without --epsilon.", expected="both, or neither")
        if self.epsilon is None and self.releases is None:
            raise UsageError("A budget was given without a limit.", expected="--epsilon and --delta, or --releases")

    def column_map(self) -> dict[str, str]:
        """Our name of a field to the file's name of its column."""
        return parse_pairs(self.columns, "--columns")


@dataclass(frozen=True, kw_only=True)
class LedgerExport(Settings):
    """Write the whole ledger as JSON: every release, without rows and without names of units."""

    ledger: LedgerFile = None
    units: Annotated[bool, "With a keyed hash of each unit, which tells releases of one unit from others."] = False
    json: Annotated[Path | None, "File to write. Default: standard output."] = None
