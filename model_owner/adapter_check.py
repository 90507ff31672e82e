"""The check of a returned adapter, under the name that the owner's side has for it: `splitfl.adapter_check`."""

from splitfl.adapter_check import (
    CONFIG_FILE,
    LARGEST_CONFIG,
    Adapter,
    Change,
    check_adapter,
    fresh,
    measured_change,
    module_of,
    plug_in,
    stored,
)

__all__ = [
    "CONFIG_FILE",
    "LARGEST_CONFIG",
    "Adapter",
    "Change",
    "check_adapter",
    "fresh",
    "measured_change",
    "module_of",
    "plug_in",
    "stored",
]
