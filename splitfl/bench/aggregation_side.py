"""The process that `splitfl bench aggregation` measures in: ``python -m splitfl.bench.aggregation_side``."""

from __future__ import annotations

import sys

import msgspec

from splitfl.bench.aggregation_factors import stack_factors
from splitfl.bench.aggregation_nvflare import NVFlare
from splitfl.bench.aggregation_orders import OpenSums, StackFactors, SumFigures, SumOrder, SumReady, Turn
from splitfl.bench.aggregation_sums import Ground, measure_encrypted, measure_mask
from splitfl.bench.lines import own_output, say
from splitfl.bench.orders import Line


class Side:
    """Holds what was opened."""

    def __init__(self) -> None:
        self._ground: Ground | None = None
        self._encrypted = False
        self._nvflare: NVFlare | None = None

    def answer(self, order: SumOrder) -> Line:
        """Do what was asked."""
        match order:
            case OpenSums():
                self._ground, self._encrypted = Ground(order.parties, order.values), order.encrypted
                self._nvflare = NVFlare(self._ground) if order.nvflare else None
                return SumReady()
            case Turn():
                return SumFigures(figures=self._turn())
            case StackFactors():
                return SumFigures(figures=stack_factors(order))

    def _turn(self) -> dict[str, float]:
        assert self._ground is not None  # noqa: S101  opened first
        figures = measure_mask(self._ground)
        if self._encrypted:
            from splitfl.aggregation.he_worker import Worker

            with Worker() as worker:
                for form in ("public", "seeded"):
                    figures |= measure_encrypted(self._ground, form, worker)
        if self._nvflare is not None:
            figures |= self._nvflare.measure()
        return figures


def main() -> None:
    """Run until standard input ends, which it also does when the measuring process is gone."""
    answers = own_output()
    say(answers, SumReady())
    decoder = msgspec.json.Decoder(SumOrder)
    side = Side()
    for line in sys.stdin:
        say(answers, side.answer(decoder.decode(line)))


if __name__ == "__main__":
    main()
