"""Options of noise on a sum, for both sides of a federation: `splitfl federate` and `splitfl tune --federate`.

Both have to say the same: what a sum is noised with goes into every key and signature of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from splitfl.config_common import DELTA
from splitfl.errors import UsageError
from splitfl.options import Panel, Settings, above, at_least

if TYPE_CHECKING:
    from splitfl.aggregation.noise import NoisePlan
    from splitfl.aggregation.sums import RoundTerms

SUM_NOISE = Panel("Bound on what a sum reveals about one party: noise that the parties add together")
_PARTS = ("sum_norm", "sum_delta")


@dataclass(frozen=True, kw_only=True)
class SumNoise(Settings):
    """Noise on the sum of a round, of which each party adds a share."""

    sum_noise: Annotated[
        float | None, "Noise on each sum, in units of what one party can move it by.", above(0), SUM_NOISE
    ] = None
    sum_norm: Annotated[float | None, "Longest change by one party; longer ones are scaled down.", above(0),
                        SUM_NOISE] = None  # fmt: skip
    sum_delta: Annotated[float | None, "Delta of the bound, for all sums together.", DELTA, SUM_NOISE] = None
    sum_colluders: Annotated[
        int,
        "Parties that may work together, with masks also with the coordinator, and take their noise off.",
        at_least(0),
        SUM_NOISE,
    ] = 0
    sum_dropouts: Annotated[int, "Parties that may be missing from a sum; with more it is not opened.",
                            at_least(0), SUM_NOISE] = 0  # fmt: skip

    def check_sum_noise(self, sum_name: str) -> None:
        """Refuse noise without its other parts, and on a sum where shares of it protect nobody.

        Raises:
            UsageError: with the reason.
        """
        if self.sum_noise is None:
            given = [name for name in (*_PARTS, "sum_colluders", "sum_dropouts") if getattr(self, name)]
            if given:
                raise UsageError(
                    f"{_flag(given[0])} has no effect without --sum-noise.", hint="add it, or leave it out"
                )
            return
        for name in _PARTS:
            if getattr(self, name) is None:
                raise UsageError(
                    f"--sum-noise was given without {_flag(name)}: it bounds nothing then.",
                    hint="for instance --sum-norm 0.5 --sum-delta 1e-5",
                )
        if sum_name == "plain":
            raise UsageError(
                "--sum-noise with --sum plain: each party adds only its share of the noise, and the coordinator reads "
                "every update with that share alone.",
                hint="use another sum, or bound each update by itself with --dp-epsilon",
            )

    def sum_plan(self, terms: RoundTerms, sums: int, sum_name: str) -> NoisePlan | None:
        """The plan for a round with these terms, of a federation of so many sums; the same at everybody.

        Args:
            terms: of the round.
            sums: how many are released.
            sum_name: how they are summed.

        Raises:
            UsageError: as `splitfl.aggregation.noise.NoisePlan`.
        """
        if self.sum_noise is None:
            return None
        from splitfl.aggregation.noise import plan_noise, space_of

        assert self.sum_norm is not None  # noqa: S101  `check_sum_noise` saw to it
        assert self.sum_delta is not None  # noqa: S101
        return plan_noise(
            terms,
            norm=self.sum_norm,
            rounds=sums,
            delta=self.sum_delta,
            multiplier=self.sum_noise,
            colluders=self.sum_colluders,
            dropouts=self.sum_dropouts,
            space=space_of(sum_name),
        )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
