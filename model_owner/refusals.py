"""Refusals that come up in more than one place of the server."""

from __future__ import annotations

from splitfl.wire.frames import Violation


class Refusal(Violation):
    """The owner cannot do what was asked, though it was well formed.

    Args:
        retry_after_s: when it is worth asking again; None where nothing is known about that.
    """

    def __init__(
        self, problem: str, *, code: str, expected: str | None = None, hint: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(problem, code=code, expected=expected, hint=hint)
        self.retry_after_s = retry_after_s


def revoked() -> Refusal:
    """The sender's key is not admitted (any more)."""
    return Refusal(
        "This key is not on the owner's allow-list.", code="revoked", hint="ask the owner to run `splitfl keys allow`"
    )


def draining() -> Refusal:
    """The owner stops."""
    return Refusal(
        "The owner is shutting down.", code="draining", hint="start again with --resume once the owner is back"
    )


def internal() -> Refusal:
    """A bug here, or a fault of the machine."""
    return Refusal("The owner met an error of its own.", code="internal", hint="ask the owner to look at its log")


def too_much_waits() -> Refusal:
    """The queue of requests is full."""
    return Refusal("Too many requests wait for the owner.", code="busy", hint="wait for answers before asking again")


def nothing_to_fetch() -> Refusal:
    """This owner has no emulator to hand out."""
    return Refusal(
        "No emulator is handed out here.",
        code="unknown_piece",
        hint="ask the owner to serve with --emulator, or to give the directory by hand, for your --emulator",
    )


def ended() -> Refusal:
    """The session was closed while its request waited."""
    return Refusal("The session has ended.", code="unknown_session", hint="say hello again")


def given_up() -> Refusal:
    """Work that was dropped before it was computed: its session has ended, or its party has stopped asking for it."""
    return Refusal(
        "The request waited for longer than a party does.", code="busy", hint="ask again; the owner has too much to do"
    )
