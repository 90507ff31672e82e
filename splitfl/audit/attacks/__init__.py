"""Attacks, one file each: `View` in, `Guesses` out; `attacks()` lists them in the order of the report."""

from __future__ import annotations

import importlib
from functools import cache

from splitfl.audit.attack import Attack

_FILES: tuple[str, ...] = (
    "map_decode",
    "nearest",
    "opt_invert",
    "sip",
    "bisr",
    "grad_decode",
    "attribute",
    "update_invert",
)
"""Modules of this folder with an `ATTACK` or several `ATTACKS`; imported when they are asked for."""


@cache
def attacks() -> dict[str, Attack]:
    """Every attack by its name."""
    found: dict[str, Attack] = {}
    for name in _FILES:
        module = importlib.import_module(f"{__name__}.{name}")
        for attack in getattr(module, "ATTACKS", None) or (module.ATTACK,):
            found[attack.name] = attack
    return found
