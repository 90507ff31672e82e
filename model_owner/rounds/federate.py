"""`splitfl federate`: bind, admit, run rounds until they are done or somebody stops it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from functools import partial

from model_owner.rounds.coordinator import Coordinator
from model_owner.rounds.engine import Engine, SummerFactory
from model_owner.rounds.logit_sum import round_rule
from model_owner.rounds.outcome import print_outcome, results_of
from model_owner.rounds.room import Patience
from model_owner.rounds.store import Charter, RoundStore, check_course
from model_owner.rounds.sums import stages_of, summer_factory
from model_owner.rounds.vault import Vault
from splitfl.aggregation.rule import Rule, check_combination
from splitfl.config_federation import HIDDEN_SUMS, FederateSettings
from splitfl.errors import INTERRUPTED_EXIT_CODE
from splitfl.metrics import write_results
from splitfl.options.values import parse_size
from splitfl.report import as_size
from splitfl.rounds.machine import missing
from splitfl.rounds.records import Course, Standing
from splitfl.rounds.schedule import sums_in
from splitfl.wire.channel import OwnerSocket
from splitfl.wire.keys import AllowList, fingerprint, load_keys
from splitfl.wire.round_frames import PIECE_BYTES

log = logging.getLogger("splitfl.federation")


def federate(settings: FederateSettings, *, factory: SummerFactory | None = None) -> int:
    """Coordinate a federation until its rounds are done.

    Args:
        settings: of the command.
        factory: makes the coordinator's side of a sum; by default the one that `--sum` and `--rule` name.

    Returns:
        The exit code: 0, or 130 if it was stopped before it was done. What was acknowledged is kept either way.

    Raises:
        UsageError, KeyFileError, ResourceError, DataError: as their names say.
    """
    rule = round_rule(settings.rule, settings.sum)
    check_combination(rule, settings.sum, parties=settings.fewest, dp=settings.sum_noise is not None)
    noise = partial(settings.sum_plan, sums=sums_in(rule, settings.rounds), sum_name=settings.sum)
    factory = factory or summer_factory(settings.sum, rule, settings.parties, noise)
    with _logging(settings.log_level):
        return asyncio.run(_federate(settings, rule, factory))


async def _federate(settings: FederateSettings, rule: Rule, factory: SummerFactory) -> int:
    keys, allow = load_keys(settings.key), AllowList(settings.parties)
    course = _course(settings, rule)
    charter = Charter(
        sum=settings.sum, rule=rule.name, stages=course.stages, clip=settings.clip, max_weight=settings.max_weight
    )
    socket = OwnerSocket(settings.bind, keys=keys, allow=allow, max_message_bytes=PIECE_BYTES)
    with contextlib.ExitStack() as stack:
        store = RoundStore(settings.state / "rounds.sqlite", charter, resume=settings.resume)
        stack.callback(store.close)
        store.commit(check_course(course, store.standing()))
        engine = Engine(
            course, store, Vault(settings.state / "blobs"), factory, clip=settings.clip,
            max_weight=settings.max_weight, max_state=parse_size(settings.max_state),
            traffic=lambda: (socket.bytes_received, socket.bytes_sent),
        )  # fmt: skip
        stack.callback(engine.close)
        await socket.start()
        try:
            await _run(settings, rule, engine, socket, allow)
        finally:
            await socket.close()
        return _conclude(settings, engine)


def _course(settings: FederateSettings, rule: Rule) -> Course:
    return Course(
        rounds=sums_in(rule, settings.rounds),
        min_parties=settings.fewest,
        stages=stages_of(settings.sum),
        attempts=settings.attempts,
        judge=settings.judge,
        collapse=settings.collapse,
        patience=settings.patience,
        on_collapse=settings.on_collapse,
        proposed=not rule.same_bits or settings.sum in HIDDEN_SUMS,
    ).check()


async def _run(settings: FederateSettings, rule: Rule, engine: Engine, socket: OwnerSocket, allow: AllowList) -> None:
    """Until the federation is finished, or a signal comes."""
    course = engine.course
    pinned: Mapping[str, object] = {
        "rule": rule.name, "sum": settings.sum, "stages": course.stages, "layout": settings.layout,
        "base": settings.base,
    }  # fmt: skip
    patience = Patience(deadline=settings.deadline, stage_deadline=settings.stage_deadline, wait=settings.wait)
    coordinator = Coordinator(
        socket, engine, allow, pinned=pinned, patience=patience, max_update=parse_size(settings.max_update)
    )
    engine.listeners.append(Progress(engine, allow, socket))
    running = asyncio.ensure_future(coordinator.run())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, running.cancel)
    _announce(settings, engine, socket, allow)
    with contextlib.suppress(asyncio.CancelledError):
        await running


def _announce(settings: FederateSettings, engine: Engine, socket: OwnerSocket, allow: AllowList) -> None:
    """What is coordinated, for the person who started it; then one line on stdout for scripts."""
    course, standing = engine.course, engine.standing
    mine = fingerprint(load_keys(settings.key).public)
    for label, text in (
        ("federation", standing.federation),
        ("rule", f"{settings.rule}, summed as {settings.sum}: {', '.join(course.stages)}"),
        ("rounds", f"{course.rounds}, now at {standing.round}; at least {course.min_parties} parties each"),
        ("address", socket.address),
        ("key", mine),
        ("parties", ", ".join(allow.names()) or "none yet; admit some with `splitfl keys allow`"),
        ("state", str(settings.state)),
    ):
        print(f"{label:10} {text}", file=sys.stderr)
    sys.stderr.flush()
    print(f"ready {socket.address} {mine}", flush=True)


def _conclude(settings: FederateSettings, engine: Engine) -> int:
    """The table, the figures, and how to go on."""
    names = AllowList(settings.parties)
    rounds = engine.store.rounds()
    print_outcome(rounds, engine.standing, lambda key: names.allowed(key.encode()) or key[:8], sys.stderr)
    if settings.json is not None:
        write_results(settings.json, "federate", settings, results_of(rounds, engine.standing))
    if engine.standing.phase == "finished":
        return 0
    print(f"stopped in round {engine.standing.round}; go on with the same command and --resume", file=sys.stderr)
    return INTERRUPTED_EXIT_CODE


class Progress:
    """One line in the log for each thing that a person who watches wants to know."""

    def __init__(self, engine: Engine, allow: AllowList, socket: OwnerSocket) -> None:
        self._engine, self._allow, self._socket = engine, allow, socket
        self._since, self._bytes = time.monotonic(), 0

    def __call__(self, before: Standing, after: Standing) -> None:
        """Compare two standings, and say what has happened."""
        for party in sorted(after.present.keys() - before.present.keys()):
            log.info("%s has entered (%d rows)", self._name(party), after.present[party].rows)
        for party in sorted(before.present.keys() - after.present.keys()):
            log.info("%s has left", self._name(party))
        for party, member in after.members.items():
            if member.out and party in before.members and not before.members[party].out:
                log.info("%s is out of round %d: %s", self._name(party), after.round, member.out)
        if after.last is not before.last and after.last is not None:
            self._tell_end(after)
        elif after.attempt > before.attempt and after.round == before.round:
            log.warning("round %d begins again, attempt %d: %s", after.round, after.attempt, after.failures[-1])
        if (before.round, before.attempt, before.phase) != (after.round, after.attempt, after.phase):
            self._tell_phase(after)

    def _tell_phase(self, standing: Standing) -> None:
        now, total = time.monotonic(), self._socket.bytes_received + self._socket.bytes_sent
        rate = (total - self._bytes) / max(now - self._since, 1e-3)
        self._since, self._bytes = now, total
        log.info(
            "round %d, attempt %d: %s, %d of %d parties present are in it, waiting for %d; %s so far, %s/s",
            standing.round, standing.attempt, standing.phase, len(standing.inside()), len(standing.present),
            len(missing(standing)), as_size(total), as_size(round(rate)),
        )  # fmt: skip

    def _tell_end(self, standing: Standing) -> None:
        ended = standing.last
        assert ended is not None  # noqa: S101
        if not ended.kept:
            log.warning("round %d is dropped: %s", ended.round, ended.reason)
            return
        scores = f"score {_score(ended.common)} shared, {_score(ended.personal)} own"
        log.info("round %d is kept: %d updates, %s", ended.round, len(ended.summed), scores)
        if ended.rolled_back:
            log.warning("round %d: %s", ended.round, ended.reason)

    def _name(self, party: str) -> str:
        return self._allow.allowed(party.encode()) or party[:8]


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


@contextlib.contextmanager
def _logging(level: str) -> Iterator[None]:
    """The coordinator's log on stderr; afterwards all is as it was, for whoever called."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger("splitfl")
    before = root.level, root.propagate
    root.addHandler(handler)
    root.setLevel(level.upper())
    root.propagate = False
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(before[0])
        root.propagate = before[1]
