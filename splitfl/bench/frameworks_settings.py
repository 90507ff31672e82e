"""The options of `splitfl bench frameworks`; it shares rounds and steps with `splitfl bench rules`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from splitfl.config_common import NOT_EMPTY
from splitfl.options import Panel, Settings

FRAMEWORKS_PANEL = Panel("splitfl bench frameworks")


@dataclass(frozen=True, kw_only=True)
class FrameworksSettings(Settings):
    """Which federated designs are compared."""

    frameworks: Annotated[
        tuple[str, ...], "Protocol to run: fed-params, fed-kd or fed-split. May be repeated. Default: all three.",
        NOT_EMPTY, FRAMEWORKS_PANEL,
    ] = ()  # fmt: skip
