"""A party's way into a federation: the socket, its side of the sum, and what has to be the same at every party."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache, partial
from importlib import import_module
from typing import Any

from party.federated_bounds import SumNoiser
from party.rounds import RoundClient
from party.rundir import RunDirectory
from splitfl.aggregation.rule import Rule
from splitfl.aggregation.state import State
from splitfl.aggregation.sums import RoundTerms, Sealer, Stage
from splitfl.config import TuneSettings
from splitfl.errors import UsageError
from splitfl.kit import Kit
from splitfl.rounds.schedule import place_of
from splitfl.wire.channel import PartySocket
from splitfl.wire.keys import load_keys, load_public
from splitfl.wire.round_frames import PIECE_BYTES
from splitfl.wire.round_messages import Facts

SUM_OPTIONS = ("sum_noise", "sum_norm", "sum_delta", "sum_colluders", "sum_dropouts")
FOLDER = "federation"
"""In the run directory: what a party must not lose between two processes."""
_LISTED = 512  # sums whose lengths are listed; a federation of more must repeat itself


@contextlib.contextmanager
def take_part(
    settings: TuneSettings, kit: Kit, run: RunDirectory, rule: Rule, first: State, rows: int
) -> Iterator[RoundClient]:
    """The federation, entered; errors as for `enter`."""
    with enter(settings, run, rows, lambda stages: _facts(settings, kit, rule, first, stages)) as client:
        yield client


@contextlib.contextmanager
def enter(
    settings: TuneSettings, run: RunDirectory, rows: int, facts: Callable[[tuple[Stage, ...]], Facts]
) -> Iterator[RoundClient]:
    """The federation that the settings name.

    Args:
        settings: of the run.
        run: where what must not be lost is kept.
        rows: training rows, for the coordinator's display.
        facts: what must be the same at every party, from the stages of the sum.

    Raises:
        UnreachableError, RefusedError, KeyFileError, UsageError: as their names say.
    """
    assert settings.federate is not None  # noqa: S101  the settings saw to it
    assert settings.key is not None  # noqa: S101
    assert settings.coordinator_key is not None  # noqa: S101
    with contextlib.ExitStack() as stack:
        entered: list[RoundClient] = []
        noiser = partial(_noiser, settings, run, entered) if settings.sum_noise is not None else None
        stages, factory = _sealers(settings, stack, noiser)
        socket = PartySocket(
            settings.federate,
            keys=load_keys(settings.key),
            owner_public=load_public(settings.coordinator_key),
            max_message_bytes=PIECE_BYTES,
        )
        client = RoundClient(
            socket,
            facts(stages),
            run.path / FOLDER,
            sealer_factory=factory,
            rows=rows,
            timeout_s=settings.timeout,
        )
        entered.append(client)
        yield stack.enter_context(client)


def _noiser(settings: TuneSettings, run: RunDirectory, entered: list[RoundClient]) -> SumNoiser:
    """What noises this party's updates; how many sums there are is known once the federation is entered."""
    (client,) = entered
    assert client.entered is not None  # noqa: S101  there are no terms before
    return SumNoiser(settings, run.path / FOLDER / "noise", client.entered.rounds)


def _sealers(
    settings: TuneSettings, stack: contextlib.ExitStack, noiser: Callable[[], SumNoiser] | None
) -> tuple[tuple[Stage, ...], Callable[[RoundTerms], Sealer]]:
    """The stages of the sum, and what makes this party's side of one attempt."""
    if settings.sum == "plain":
        from splitfl.aggregation.plain import PlainSealer

        return PlainSealer.stages, PlainSealer
    from splitfl.aggregation.identity import load_identities

    assert settings.key is not None  # noqa: S101
    assert settings.peers is not None  # noqa: S101
    keys, identities = load_keys(settings.key), load_identities(settings.peers)
    options: dict[str, Any] = {}
    if settings.sum in ("bfv", "ckks"):
        options["worker"] = stack.enter_context(_module("splitfl.aggregation.he_worker").Worker())
    module, name = {
        "mask": ("masks", "MaskSealer"),
        "mask+hidden": ("hidden", "HiddenSealer"),
        "bfv": ("bfv", "BfvSealer"),
        "ckks": ("ckks", "CkksSealer"),
    }[settings.sum]
    sealer = getattr(_module(f"splitfl.aggregation.{module}"), name)
    if noiser is not None:
        noised = cache(noiser)  # one for all rounds
        return sealer.stages, lambda terms: noised().sealed(sealer, terms, keys, identities, **options)
    return sealer.stages, lambda terms: sealer(terms, keys, identities, **options)


def _module(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "tenseal":
            raise
        raise UsageError(
            "An encrypted sum needs tenseal, which is not installed.", hint="pip install 'splitfl[he]'"
        ) from error


def _facts(settings: TuneSettings, kit: Kit, rule: Rule, first: State, stages: tuple[Stage, ...]) -> Facts:
    """What must be the same at every party."""
    common: dict[str, Any] = {
        "whole": settings.model is not None,
        "plan": kit.plan.digest,
        "trunk": kit.plan.trunk,
        "rule": asdict(rule),
        "start": first.digest,
    }
    if settings.sum_noise is not None:
        common["noise"] = [getattr(settings, name) for name in SUM_OPTIONS]
    return Facts(
        layout=first.layout.digest,
        base=hashlib.blake2b(json.dumps(common, sort_keys=True).encode(), digest_size=32).hexdigest(),
        rule=rule.name,
        sum=settings.sum,
        stages=stages,
        lengths=lengths_of(rule, first),
    )


def lengths_of(rule: Rule, first: State) -> tuple[int, ...]:
    """Values in one update, sum by sum, for as many as differ; after the last one it begins again.

    A rule whose ranks grow sends as many as it can ever need, filled up with zeros: what a sum takes in is fixed
    before the first of them.
    """
    largest = _largest(rule, first)
    lengths = [rule.length(largest, *place_of(rule, number)) for number in range(_LISTED)]
    for period in range(1, _LISTED // 2 + 1):
        if lengths[period:] == lengths[:-period]:
            return tuple(lengths[:period])
    return tuple(lengths)


def _largest(rule: Rule, first: State) -> State:
    """A state of the highest rank that the rule allows itself, of the same modules."""
    most = getattr(rule, "max_rank", None)
    if most is None:
        return first
    import torch

    from splitfl.aggregation.factors import Pair

    def widest(_: str, pair: Pair) -> Pair:
        # After the first sum of a round the bases are twice as wide.
        rank = min(2 * most, *pair.widths)
        return Pair(torch.zeros(rank, pair.widths[0]), torch.zeros(pair.widths[1], rank), pair.scale,
                    torch.zeros(rank, rank))  # fmt: skip

    return State(adapter=first.adapter.map(widest), seed=first.seed)
