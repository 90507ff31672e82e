"""What a party says of an owner that refuses, closes or is silent."""

from __future__ import annotations

from splitfl.errors import RefusedError, UnreachableError, printable
from splitfl.wire.messages import Refused


def as_error(refused: Refused) -> RefusedError:
    """A refusal as the exception that the party's caller sees; the owner's words are escaped."""
    problem = f"The owner refused: {printable(refused.problem)}"
    expected = printable(refused.expected) if refused.expected else None
    hint = printable(refused.hint) if refused.hint else None
    return RefusedError(problem, code=refused.code, expected=expected, hint=hint)


def silence(address: object, word: str, timeout_s: float) -> UnreachableError:
    """The owner at `address` has not answered a message of that kind in time."""
    return UnreachableError(
        f"The owner at {address} did not answer a {word} within {timeout_s:.0f} s.",
        hint="see whether the owner still serves and the link is up, then start again with --resume; "
        "a slow owner needs a larger --timeout",
    )
