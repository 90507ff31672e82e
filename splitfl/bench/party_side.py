"""The data holder's process under measurement: its own code from the socket up. ``python -m`` this, with a start.

Only ever a process of its own: it is what `splitfl.bench` starts, never what it imports, since it uses `party`.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import cast

import msgspec
import torch

from party.connect import open_session
from party.model import open_model
from splitfl.adapters import add_lora, lora_config
from splitfl.bench.orders import PartyStart
from splitfl.bench.side import Side, answer_orders, own_output
from splitfl.kit import open_kit
from splitfl.quiet import silence_library_warnings
from splitfl.wire.messages import DtypeName


def main() -> None:
    """Open the session and the model, and run until standard input ends."""
    silence_library_warnings()
    answers = own_output()
    start = msgspec.json.decode(sys.argv[1], type=PartyStart)
    torch.set_num_threads(start.threads)
    kit = open_kit(Path(start.kit))
    session = open_session(
        kit.plan,
        start.owner,
        owner_key=Path(start.owner_key),
        key=Path(start.key),
        wire_dtype=cast("DtypeName", start.dtype),
        timeout_s=600,
    )
    with contextlib.closing(session):
        model = open_model(kit, session, dtype=start.dtype)
        side = Side(add_lora(model, lora_config(model, kit.plan)), lambda: (session.bytes_sent, session.bytes_received))
        answer_orders(side, answers)


if __name__ == "__main__":
    main()
