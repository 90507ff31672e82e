"""Settings of `splitfl federate`, and of `splitfl tune` where it takes part. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from splitfl.config_common import ADDRESS, LINK, NOT_EMPTY, PAIR, REMOTE, SIZE, JsonFile
from splitfl.config_distillation import KD_PROTOCOL, DistillationOptions
from splitfl.config_noise import SumNoise
from splitfl.errors import UsageError
from splitfl.options import Panel, above, at_least
from splitfl.options.values import parse_pairs

ROUNDS = Panel("Rounds")
TIME = Panel("Time limits, in seconds")
VALIDATION = Panel("Validation")
LIMITS = Panel("Limits of what a party may send")
FEDERATION = Panel("Federation with other parties")
_FEWEST_BEHIND_A_SUM = 3

SumName: TypeAlias = Literal["plain", "mask", "mask+hidden", "bfv", "ckks"]
HIDDEN_SUMS: tuple[SumName, ...] = ("mask+hidden", "bfv", "ckks")
"""Sums that the coordinator cannot open."""
WHOLE_PROTOCOL = "fed-params"
DP_PROTOCOL = "dp-lora"
WHOLE_PROTOCOLS = (WHOLE_PROTOCOL, DP_PROTOCOL, KD_PROTOCOL)
"""Those in which a party holds the whole model."""
FEDERATED_PROTOCOLS = (*WHOLE_PROTOCOLS, "fed-split")


@dataclass(frozen=True, kw_only=True)
class FederateSettings(SumNoise):
    """Run rounds between parties. Prints `ready ADDRESS FINGERPRINT` on stdout when parties can connect."""

    key: Annotated[Path, "The coordinator's secret key (NAME.key_secret).", LINK]
    parties: Annotated[Path, "Directory of the parties' public keys: the allow-list.", LINK]
    state: Annotated[Path, "Directory that keeps the federation, so that it can go on after a stop or a crash."]
    bind: Annotated[str, "Address to listen on; port 0 takes a free one.", ADDRESS, LINK] = "tcp://127.0.0.1:5556"
    resume: Annotated[bool, "Go on with the federation in --state; begin one if there is none."] = False
    json: JsonFile = None
    log_level: Annotated[Literal["debug", "info", "warning", "error"], "How much to log."] = "info"

    rounds: Annotated[int, "Rounds to run.", at_least(1), ROUNDS] = 10
    rule: Annotated[str, "How updates become the next state; every party must say the same.", NOT_EMPTY, ROUNDS] = (
        "rolora"
    )
    sum: Annotated[
        Literal["plain", "mask", "mask+hidden", "bfv", "ckks"],
        "How updates are summed; with plain the coordinator reads each of them.",
        ROUNDS,
    ] = "mask"
    min_parties: Annotated[
        int | None, "Fewest parties of a round. Default: 3, and 2 with --sum plain.", at_least(1), ROUNDS
    ] = None
    attempts: Annotated[int, "How often a round is begun before it is dropped.", at_least(1), ROUNDS] = 5
    layout: Annotated[str | None, "Digest of the adapter's layout. Default: that of the first party.", ROUNDS] = None
    base: Annotated[str | None, "Digest of what is tuned. Default: that of the first party.", ROUNDS] = None

    deadline: Annotated[float, "For training, and for evaluation at the end of a round.", above(0), TIME] = 600.0
    stage_deadline: Annotated[float, "For each stage of the sum.", above(0), TIME] = 60.0
    wait: Annotated[float, "For further parties, once there are enough.", at_least(0), TIME] = 30.0

    judge: Annotated[
        Literal["common", "personal"], "Score that says which round is best: of the shared or own models.", VALIDATION
    ] = "common"
    collapse: Annotated[float, "A fall below the best score by this part of it is a strike.", above(0), VALIDATION] = (
        0.5
    )
    patience: Annotated[int, "So many strikes in a row are a collapse.", at_least(1), VALIDATION] = 2
    on_collapse: Annotated[
        Literal["rollback", "stop"], "Go on from the best round's state, or stop there.", VALIDATION
    ] = "rollback"

    clip: Annotated[float, "Largest magnitude of one value; what is beyond is cut.", above(0), LIMITS] = 1.0
    max_weight: Annotated[float, "Largest weight of one party.", above(0), LIMITS] = 10_000.0
    max_update: Annotated[str, "Largest update.", SIZE, LIMITS] = "1GB"
    max_state: Annotated[str, "Largest state, as a party hands it over.", SIZE, LIMITS] = "1GB"

    def check(self) -> None:
        """Refuse a protected sum between too few parties, and noise that has no place."""
        self.check_sum_noise(self.sum)
        if self.sum != "plain" and self.fewest < _FEWEST_BEHIND_A_SUM and self.sum_noise is None:
            raise UsageError(
                f"--sum {self.sum} protects nothing between {self.fewest} parties: "
                "the sum less one's own is the other's.",
                expected=f"--min-parties {_FEWEST_BEHIND_A_SUM} or more",
            )

    @property
    def fewest(self) -> int:
        """Parties that a round needs."""
        default = 2 if self.sum == "plain" else _FEWEST_BEHIND_A_SUM
        return default if self.min_parties is None else self.min_parties


@dataclass(frozen=True, kw_only=True)
class FederatedTuning(SumNoise, DistillationOptions):
    """Options of `splitfl tune` with `--federate`."""

    federate: Annotated[
        str | None, "Address of a coordinator: combine adapters with other parties, round by round.", REMOTE, FEDERATION
    ] = None
    coordinator_key: Annotated[Path | None, "The coordinator's public key (NAME.key).", FEDERATION] = None
    peers: Annotated[
        Path | None,
        "Directory of the public keys of all parties, for sums that the coordinator cannot read.",
        FEDERATION,
    ] = None
    model: Annotated[Path | None, "Directory of the whole model, for fed-params and fed-kd.", FEDERATION] = None
    rule: Annotated[str, "How updates become the next state; as the coordinator says.", NOT_EMPTY, FEDERATION] = (
        "rolora"
    )
    rule_option: Annotated[tuple[str, ...], "NAME=VALUE: option of the rule. May be repeated.", PAIR, FEDERATION] = ()
    sum: Annotated[SumName, "How updates are summed; as the coordinator says.", FEDERATION] = "mask"
    local_steps: Annotated[
        int | None, "Steps that are trained in a round. Default: one pass over the rows.", at_least(1), FEDERATION
    ] = None
    federation_r: Annotated[
        int | None, "Rank of the federation's adapter, where --r is lower. Default: --r.", at_least(1), FEDERATION
    ] = None
    federation_seed: Annotated[int, "Seed of the common start; the same at all parties.", at_least(0), FEDERATION] = 0
    keep_optimizer: Annotated[bool, "Keep the optimiser's averages from round to round.", FEDERATION] = False
    dp_rounds: Annotated[
        int | None, "Rounds that a bound is worked out for; this party takes part in no more.", at_least(1), FEDERATION
    ] = None
    preset: Annotated[
        Literal["paper", "paper-clip-only", "paper-no-dp"] | None,
        "With dp-lora: as published, with both, the first or neither of clip and noise. Proves no epsilon.",
        FEDERATION,
    ] = None

    def check_federation(self, protocol: str, key: Path | None, rank: int) -> None:
        """Refuse what does not belong together, before anything is read.

        Args:
            protocol: of the run.
            key: this party's secret key file.
            rank: of its own adapter.
        """
        self.check_distillation(protocol, self.rule)
        if protocol in FEDERATED_PROTOCOLS and self.federate is None:
            raise UsageError(
                f"Protocol {protocol!r} combines what several parties have learnt.",
                expected="--federate tcp://HOST:PORT, as `splitfl federate` printed it",
            )
        if (protocol in WHOLE_PROTOCOLS) != (self.model is not None):
            missing = self.model is None
            raise UsageError(
                f"Protocol {protocol!r} trains the whole model here, and --model is missing."
                if missing
                else f"--model with protocol {protocol!r}, in which this party does not hold the whole model.",
                hint="name the model's directory with --model" if missing else f"add --protocol {WHOLE_PROTOCOL}",
            )
        if self.federate is None:
            self._check_unused()
            return
        for option, path in (("--coordinator-key", self.coordinator_key), ("--key", key)):
            if path is None:
                raise UsageError(f"Missing option {option}.", hint="a federation has no rounds without keys")
        if self.sum != "plain" and self.peers is None:
            raise UsageError(
                f"Missing option --peers: --sum {self.sum} needs the keys of the other parties from a road that the "
                "coordinator does not control.",
                expected="a directory with NAME.key of every party",
            )
        if self.federation_r is not None and self.federation_r < rank:
            raise UsageError(f"--federation-r {self.federation_r} is below --r {rank}.", expected="--r or more")

    def _check_unused(self) -> None:
        given = [
            option
            for option, asked in (
                ("--coordinator-key", self.coordinator_key),
                ("--peers", self.peers),
                ("--rule-option", self.rule_option),
                ("--local-steps", self.local_steps),
                ("--federation-r", self.federation_r),
                ("--keep-optimizer", self.keep_optimizer),
                ("--sum-noise", self.sum_noise),
                ("--dp-rounds", self.dp_rounds),
                ("--preset", self.preset),
            )
            if asked
        ]
        if given:
            raise UsageError(f"{given[0]} has no effect without --federate.", hint="add --federate, or leave it out")

    def check_bounds(self, protocol: str, dp_sgd: str | None, freeze_a: bool) -> None:
        """Refuse bounds on updates that have a part too few or too many.

        Args:
            protocol: of the run.
            dp_sgd: the first of its options that asks for DP-SGD or says something about it.
            freeze_a: whether the first factor shall be kept as drawn.
        """
        self.check_sum_noise(self.sum)
        if self.preset is not None and protocol != DP_PROTOCOL:
            raise UsageError(f"--preset with protocol {protocol!r}.", hint=f"add --protocol {DP_PROTOCOL}")
        if self.preset is not None and (dp_sgd or self.sum_noise is not None):
            raise UsageError(
                f"{dp_sgd or '--sum-noise'} with --preset: the preset has the published clip and noise, and no bound.",
                hint="leave one of the two out",
            )
        if protocol == DP_PROTOCOL and dp_sgd is None and self.preset is None:
            raise UsageError(
                f"Protocol {DP_PROTOCOL!r} without a word about noise.",
                expected="--dp-epsilon or --dp-noise-multiplier, with --dp-delta, --dp-clip and --dp-rounds",
                hint="--preset paper is the method as published, for which no epsilon is known",
            )
        if self.federate is None:
            return
        if dp_sgd and self.sum_noise is not None:
            raise UsageError(
                f"{dp_sgd} and --sum-noise were both given: the first bounds what every update tells, the second what "
                "the sums tell of a party.",
                expected="one of them",
            )
        if dp_sgd and freeze_a:
            raise UsageError("--dp-freeze-a with --federate: the rule says what is frozen.", hint="use --rule ffa")
        if (dp_sgd is not None or self.sum_noise is not None) != (self.dp_rounds is not None):
            missing = self.dp_rounds is None
            raise UsageError(
                "Missing option --dp-rounds: a bound is for so many rounds, which the coordinator shall not choose."
                if missing
                else "--dp-rounds has no effect without DP-SGD or --sum-noise.",
                hint="as many as the coordinator's --rounds" if missing else "leave it out",
            )

    def rule_options(self) -> dict[str, float | int | str]:
        """Options of the rule by name, numbers as numbers."""
        return {name: _as_number(value) for name, value in parse_pairs(self.rule_option, "--rule-option").items()}


def _as_number(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
