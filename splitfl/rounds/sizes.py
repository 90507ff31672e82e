"""How many bytes each item of a round may have: known before the first of them comes, and never taken from a peer."""

from __future__ import annotations

from splitfl.wire.round_messages import PutItem, SumName

_BYTES_A_VALUE: dict[SumName, float] = {"plain": 4, "mask": 4.1, "mask+hidden": 4.1, "bfv": 17, "ckks": 40}
"""Of one update. Homomorphic ciphertexts come in blocks, so a short vector needs the spare room below."""
_SPARE: dict[SumName, int] = {
    "plain": 1 << 12,
    "mask": 1 << 16,
    "mask+hidden": 1 << 16,
    "bfv": 1 << 20,
    "ckks": 2 << 20,
}
_ADVERT: dict[SumName, int] = {
    "plain": 1 << 12,
    "mask": 1 << 13,
    "mask+hidden": 1 << 13,
    "bfv": 1 << 20,
    "ckks": 2 << 20,
}
"""An advert, and what one party seals for one other: keys, and with a homomorphic sum its public material."""
_NAME = 64  # bytes of one party's key in a package, with what msgpack adds


def update_bytes(sum_name: SumName, length: int) -> int:
    """Largest update of `length` values."""
    return int(_BYTES_A_VALUE[sum_name] * length) + _SPARE[sum_name]


def part_bytes(sum_name: SumName) -> int:
    """Largest advert, and largest share for one other party."""
    return _ADVERT[sum_name]


def item_bytes(sum_name: SumName, item: PutItem, *, length: int, parties: int, max_state: int) -> int:
    """Largest blob that a party may hand over.

    Args:
        sum_name: the way of summing.
        item: what it is.
        length: values in one update of this round.
        parties: of this attempt.
        max_state: what the operator allows for a state.
    """
    match item:
        case "advertise":
            return part_bytes(sum_name)
        case "share":
            return parties * (part_bytes(sum_name) + _NAME)
        case "submit":
            return update_bytes(sum_name, length)
        case "agree":
            return 1 << 12
        case "reveal":
            return (1 << 16) + parties * 1024
        case "state":
            return max_state
