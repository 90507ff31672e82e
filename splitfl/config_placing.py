"""Where the owner's trunk lies: options of `splitfl serve`. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from splitfl.config_common import MACHINE
from splitfl.errors import UsageError
from splitfl.options import Settings


@dataclass(frozen=True, kw_only=True)
class Placing(Settings):
    """One device, whole layers on several, or a share of each layer on several."""

    device_map: Annotated[
        Literal["auto"] | None, "Spread whole layers over all devices of this machine, in place of --device.", MACHINE
    ] = None
    tensor_parallel: Annotated[
        bool, "Share every layer among the processes that torchrun has started (docs/performance.md).", MACHINE
    ] = False

    def check_placing(self, *, workers: int) -> None:
        """Refuse two ways at once, and several workers where all processes do one thing at a time.

        Raises:
            UsageError: with the reason.
        """
        if not self.tensor_parallel:
            return
        if self.device_map is not None:
            raise UsageError(
                "--device-map with --tensor-parallel: layers are put on devices whole, or shared out, not both.",
                hint="leave one of them out",
            )
        if workers > 1:
            raise UsageError(
                f"--workers {workers} with --tensor-parallel: all processes do one piece of work at a time.",
                expected="--workers 1",
            )
