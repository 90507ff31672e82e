"""The protocols: who holds and trains what, and what may cross. One file a protocol; one lookup."""

from protocols.dp_lora import DP_LORA
from protocols.fed_kd import FED_KD
from protocols.fed_params import FED_PARAMS
from protocols.fed_split import FED_SPLIT
from protocols.fedmod import FEDMOD
from protocols.guarded_gradfree import GUARDED_GRADFREE
from protocols.guarded_offline import GUARDED_OFFLINE
from protocols.guarded_online import GUARDED_ONLINE
from protocols.record import Protocol
from protocols.split import SPLIT
from splitfl.errors import UsageError, nearest

PROTOCOLS: dict[str, Protocol] = {
    p.name: p
    for p in (SPLIT, GUARDED_ONLINE, GUARDED_GRADFREE, GUARDED_OFFLINE, FED_PARAMS, FED_KD, FED_SPLIT, DP_LORA)
}

PEER_PROTOCOLS: dict[str, Protocol] = {p.name: p for p in (FEDMOD,)}
"""Those without an owner: no session serves them."""

__all__ = ["PEER_PROTOCOLS", "PROTOCOLS", "Protocol", "protocol_named"]


def protocol_named(name: str) -> Protocol:
    """The protocol called `name`.

    Raises:
        UsageError: no such protocol; names the closest.
    """
    if name in PEER_PROTOCOLS:
        raise UsageError(f"Protocol {name!r} has no owner to train with.", hint=f"run `splitfl {name}`")
    if name not in PROTOCOLS:
        raise UsageError(f"There is no protocol {name!r}.", hint=nearest(name, PROTOCOLS))
    return PROTOCOLS[name]
