"""Open a session with the owner: keys, socket, hello. The one place where a party's commands reach out."""

from __future__ import annotations

from pathlib import Path

from party.session import LARGEST_BATCH_TOKENS, Memory, Session, Tap
from protocols import protocol_named
from splitfl.cut import Plan
from splitfl.wire.channel import PartySocket
from splitfl.wire.keys import load_keys, load_public
from splitfl.wire.messages import MAX_PIECE, CodingName, DtypeName


def open_session(
    plan: Plan, address: str, *, owner_key: Path | None, key: Path | None, insecure_loopback: bool = False,
    protocol: str = "split", wire_dtype: DtypeName = "float32", memory: Memory = "keep",
    hidden_coding: CodingName = "raw", gradient_coding: CodingName = "raw", timeout_s: float = 120.0,
    tap: Tap | None = None,
) -> Session:  # fmt: skip
    """Reach the owner at `address` and open a session; close it when done.

    Raises:
        KeyFileError: a key file that cannot be used, or an owner that does not hold the named key.
        UnreachableError, RefusedError: as their names say.
    """
    chosen = protocol_named(protocol)
    socket = PartySocket(
        address,
        keys=load_keys(key) if key is not None else None,
        owner_public=load_public(owner_key) if owner_key is not None else None,
        max_message_bytes=max(LARGEST_BATCH_TOKENS * plan.width * 4, MAX_PIECE),
        insecure_loopback=insecure_loopback,
    )
    session = Session(
        socket,
        plan,
        disclosure=chosen.disclosure,
        protocol=chosen.name,
        wire_dtype=wire_dtype,
        memory=memory,
        hidden_coding=hidden_coding,
        gradient_coding=gradient_coding,
        timeout_s=timeout_s,
        tap=tap,
    )
    try:
        session.open()
    except BaseException:
        socket.close()
        raise
    return session
