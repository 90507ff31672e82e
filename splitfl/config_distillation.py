"""Options of `splitfl tune` for protocol `fed-kd`. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from splitfl.errors import UsageError
from splitfl.options import Panel, Settings, above, at_least, between

KD_PROTOCOL = "fed-kd"
KD_RULE = "kd"
DISTILLATION = Panel("Distillation between parties (fed-kd)")
_DEFAULT_RULE = "rolora"


@dataclass(frozen=True, kw_only=True)
class DistillationOptions(Settings):
    """What parties tell each other about public rows, and how they learn from it."""

    public: Annotated[
        Path | None, "Rows that every party has, the same file everywhere; what models say about them is shared.",
        DISTILLATION,
    ] = None  # fmt: skip
    kd_top_k: Annotated[
        int | None, "Likeliest tokens or classes sent of each position; 0 sends all. Default: 32, all of a classifier.",
        at_least(0), DISTILLATION,
    ] = None  # fmt: skip
    kd_temperature: Annotated[float, "Temperature of what is sent and learnt.", above(0), DISTILLATION] = 2.0
    kd_weight: Annotated[
        float, "Weight of what the others say; the rest goes on this party's own rows.", above(0), between(0, 1),
        DISTILLATION,
    ] = 1.0  # fmt: skip
    kd_steps: Annotated[
        int | None, "Steps of distillation in a round. Default: one pass over --public.", at_least(1), DISTILLATION
    ] = None

    def check_distillation(self, protocol: str, rule: str) -> None:
        """Refuse options without the protocol that looks at them, and the protocol without public rows."""
        if protocol != KD_PROTOCOL:
            for name in ("public", "kd_top_k", "kd_steps"):
                if getattr(self, name) is not None:
                    flag = "--" + name.replace("_", "-")
                    raise UsageError(
                        f"{flag} has no effect with protocol {protocol!r}.", hint=f"add --protocol {KD_PROTOCOL}"
                    )
            if rule == KD_RULE:
                raise UsageError(
                    f"--rule {KD_RULE} combines no adapters: it belongs to protocol {KD_PROTOCOL!r}.",
                    hint=f"add --protocol {KD_PROTOCOL}, or choose another rule",
                )
            return
        if self.public is None:
            raise UsageError(
                f"Protocol {protocol!r} shares what models say about public rows, and --public is missing.",
                expected="a file of rows that every party has",
            )
        if rule not in (KD_RULE, _DEFAULT_RULE):
            raise UsageError(
                f"--rule {rule} combines adapters, and protocol {protocol!r} sends none.", expected=f"--rule {KD_RULE}"
            )

    @staticmethod
    def check_unbounded(protocol: str, dp_sgd: str | None, sum_noise: float | None) -> None:
        """Refuse bounds that nobody has worked out for logits.

        Args:
            protocol: of the run.
            dp_sgd: the first of its options that asks for DP-SGD.
            sum_noise: of the sum.
        """
        if protocol == KD_PROTOCOL and (dp_sgd or sum_noise is not None):
            raise UsageError(
                f"{dp_sgd or '--sum-noise'} with protocol {protocol!r}: no bound is worked out for what it sends.",
                hint="use fed-params, or leave it out",
            )
