"""Which peers a `fedmod` server talks to, and what each of them says: meeting, ranking, asking round by round.

A peer is asked if its key is in the folder, an address is known and nobody denied it; where there are more than
`candidates`, so many are drawn. It is *met* once hello and sketch have crossed. Neighbours of a round are the most
similar ones among those met, ties broken by a seeded draw. A peer that does not answer is left out of the round, and
asked again after one round, then two, up to `_LONGEST_REST`; meanwhile the next in rank takes its place.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic

import torch

from party.fedmod_mix import Update
from party.mesh import Askers, PeerLink
from splitfl.config_mesh import FedmodSettings
from splitfl.errors import RefusedError, SplitflError, WireError, printable
from splitfl.sketch import Sketch, similarities
from splitfl.wire import mesh_messages as say

_LONGEST_REST = 4
_POLL_S = 0.2
_HELLO_S = 5.0


@dataclass(kw_only=True)
class Peer:
    """One peer, as it is known so far."""

    link: PeerLink
    tie: float
    """Drawn once; decides between peers that are as similar."""
    met: bool = False
    tags: tuple[str, ...] = ()
    sketch: Sketch | None = None
    similarity: float | None = None
    misses: int = 0
    """Rounds in a row in which it could not be used."""
    rest_until: int = 0
    """First round in which it is asked again."""
    refused: str | None = None
    """Why it is never asked again."""

    @property
    def name(self) -> str:
        """Its name."""
        return self.link.name


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """What one round of asking brought."""

    updates: list[Update]
    missing: dict[str, str] = field(default_factory=dict)
    """Name of a peer that gave nothing, to the reason."""
    seconds: float = 0.0


class Neighbourhood:
    """The peers of one server.

    Args:
        settings: of the run.
        links: to every peer that may be asked.
        hello: what is said first.
        own: one's own released sketch, if there is one.
        stopped: whether somebody asked to stop; looked at between waits.
    """

    def __init__(
        self, settings: FedmodSettings, links: Sequence[PeerLink], hello: say.Hello, own: Sketch | None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        draw = random.Random(settings.seed)  # noqa: S311  which peers are looked at is no secret
        ordered = sorted(links, key=lambda link: link.name)
        chosen = draw.sample(ordered, min(settings.candidates, len(ordered)))
        self.peers = {link.name: Peer(link=link, tie=draw.random()) for link in sorted(chosen, key=lambda k: k.name)}
        self._settings, self._hello, self._own, self._stopped = settings, hello, own, stopped
        self._askers = Askers(max(1, min(16, len(self.peers))))

    def close(self) -> None:
        """Hang up everywhere."""
        self._askers.close()
        for peer in self.peers.values():
            peer.link.close()

    # ---- meeting

    def gather(self, timeout_s: float) -> dict[str, str]:
        """Meet everybody, waiting for those that are not there yet.

        Returns:
            Name of each peer that was not met, to the reason.
        """
        deadline, reasons = monotonic() + timeout_s, {}
        while True:
            reasons = self.meet(min(_HELLO_S, max(deadline - monotonic(), 0.5)))
            waiting = [name for name in reasons if self.peers[name].refused is None]
            if not waiting or monotonic() >= deadline or self._stopped():
                return reasons
            time.sleep(_POLL_S)

    def meet(self, timeout_s: float) -> dict[str, str]:
        """Say hello to those not met yet, and get their sketches; as `gather`, without waiting for anybody."""
        strangers = [p.link for p in self.peers.values() if not p.met and p.refused is None]
        came = self._askers.each(strangers, lambda link: self._introduce(link, timeout_s))
        reasons = {}
        for name, result in came.items():
            peer = self.peers[name]
            if isinstance(result, SplitflError):
                reasons[name] = result.problem
                peer.refused = _for_good(result)
            else:
                peer.tags, peer.sketch = result
                peer.refused = self._unfit(peer)
                peer.met = peer.refused is None
                if peer.refused is not None:
                    reasons[name] = peer.refused
        if any(peer.met for peer in self.peers.values()):
            self._rank()
        return reasons

    def _introduce(self, link: PeerLink, timeout_s: float) -> tuple[tuple[str, ...], Sketch | None]:
        welcome = link.greet(self._hello, timeout_s)
        if (welcome.version, welcome.model, welcome.layout) != (
            self._hello.version, self._hello.model, self._hello.layout,
        ):  # fmt: skip
            raise WireError(f"{link.name} welcomes us with another model or layout than it was told.")
        if self._own is None:
            return welcome.tags, None
        reply, frame = link.ask(say.AskSketch(number=0), timeout_s)
        if isinstance(reply, say.SketchIs) and frame is not None:
            return welcome.tags, Sketch(values=say.integers_of(frame), rows=reply.rows, grid=reply.grid)
        if isinstance(reply, say.NoSketch):
            return welcome.tags, None
        raise WireError(f"{link.name} answers a question for its sketch with {say.kind(reply)!r}.")

    def _unfit(self, peer: Peer) -> str | None:
        return policy_problem(peer.tags, self._settings)

    def _rank(self) -> None:
        if self._own is None:
            return
        known = {name: peer.sketch for name, peer in self.peers.items() if peer.met and peer.sketch is not None}
        for name, value in similarities(self._own, known).items():
            self.peers[name].similarity = value

    # ---- asking

    def ranked(self) -> list[Peer]:
        """Those that may become neighbours, the most similar first; of those without a sketch the draw decides."""
        met = [peer for peer in self.peers.values() if peer.met and peer.refused is None]
        if self._own is not None:
            met = [p for p in met if p.similarity is not None and p.similarity >= self._settings.min_similarity]
        return sorted(met, key=lambda peer: (-(peer.similarity or 0.0), peer.tie))

    def exchange(self, round_number: int, part: say.Part, own: torch.Tensor, chosen: torch.Tensor) -> Exchange:
        """Ask this round's neighbours for their adapters.

        Args:
            round_number: rounds of training behind us.
            part: which factors.
            own: one's own adapter [P]: stands where a neighbour sends nothing.
            chosen: bool [P], the values of `part`.
        """
        began = monotonic()
        if any(
            not peer.met and peer.refused is None and peer.rest_until <= round_number for peer in self.peers.values()
        ):
            for name in self.meet(min(_HELLO_S, self._settings.timeout)):
                self._missed(self.peers[name], round_number)
        ready = [peer for peer in self.ranked() if peer.rest_until <= round_number][: self._settings.neighbours]
        deadline = began + self._settings.timeout
        came = self._askers.each(
            [peer.link for peer in ready], lambda link: self._fetch(link, round_number, part, deadline)
        )
        updates, missing = [], {}
        for peer in ready:
            result = came[peer.name]
            if isinstance(result, SplitflError):
                missing[peer.name] = result.problem
                peer.refused = _for_good(result)
                self._missed(peer, round_number)
                continue
            peer.misses = 0
            have, values = result
            vector = own.clone()
            vector[chosen] = values
            weight = 1.0 if peer.similarity is None else peer.similarity
            updates.append(Update(name=peer.name, vector=vector, rows=have.rows, similarity=weight, round=have.round))
        return Exchange(updates=updates, missing=missing, seconds=monotonic() - began)

    def _missed(self, peer: Peer, round_number: int) -> None:
        peer.misses += 1
        peer.rest_until = round_number + min(peer.misses, _LONGEST_REST)

    def _fetch(
        self, link: PeerLink, round_number: int, part: say.Part, deadline: float
    ) -> tuple[say.Have, torch.Tensor]:
        """Wait for the peer to come as far as we are; when time is nearly over, take what it has if not too old."""
        least, behind = round_number, 0
        late = deadline - min(2.0, self._settings.timeout / 4)
        while True:
            left = deadline - monotonic()
            if left <= 0 or self._stopped():
                raise WireError(f"{link.name} is at round {behind}; {least} was waited for.")
            if not link.is_greeted:
                link.greet(self._hello, left)
            if monotonic() >= late:
                least = max(1, round_number - self._settings.max_lag)
            reply, frame = link.ask(say.Want(number=0, round=least, part=part), left)
            if isinstance(reply, say.Have) and frame is not None:
                if reply.part != part or reply.round < least:
                    raise WireError(f"{link.name} gives another adapter than was asked for.")
                return reply, say.floats_of(frame)
            if not isinstance(reply, say.NotYet):
                raise WireError(f"{link.name} answers a question for its adapter with {say.kind(reply)!r}.")
            behind = reply.round
            time.sleep(min(_POLL_S, max(left, 0)))

    def finished(self, timeout_s: float) -> None:
        """Tell everybody met that we ask for nothing more; who cannot be told is not waited for."""
        met = [peer.link for peer in self.peers.values() if peer.met and peer.misses == 0 and peer.refused is None]

        def tell(link: PeerLink) -> bool:
            if not link.is_greeted:
                link.greet(self._hello, timeout_s)
            link.ask(say.Finished(number=0), timeout_s)
            return True

        self._askers.each(met, tell)


def policy_problem(tags: tuple[str, ...], settings: FedmodSettings) -> str | None:
    """Why a peer with these policy tags is not spoken with; None if it is."""
    lacking = [tag for tag in settings.require_tag if tag not in tags]
    if lacking:
        return f"it does not have the policy tag {printable(lacking[0], 64)!r}"
    common = len(set(tags) & set(settings.tag_list()))
    if common < settings.shared_tags:
        return f"it shares {common} policy tags; {settings.shared_tags} are required"
    return None


def _for_good(error: SplitflError) -> str | None:
    """Why a peer is never asked again in this run; None if the next round may bring another answer."""
    never = isinstance(error, RefusedError) and error.code in ("version", "model", "layout", "policy", "denied")
    return error.problem if never else None
