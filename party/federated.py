"""`splitfl tune --federate`: round after round load the common state, train, hand the update over, and score.

    state   what all parties share when a round starts      update   this party's adapter after its own training

Every party computes the next state from the same result, so the coordinator needs none of this. What a party cannot
make again after it was killed lies in RUN/federation: the update that goes out, and the adapter it trained.
"""

from __future__ import annotations

import hashlib
import json
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from party.bookkeeping import Book
from party.evaluate import Score
from party.federated_bound_of import bound_of, resting
from party.federated_end import disclosed, results_of, write_adapter
from party.federated_model import SharedModel
from party.federated_scores import Scores
from party.federated_state import PlainStates, SealedStates
from party.federated_sums import FOLDER, take_part
from party.local_training import LocalTraining, StoppedEarly
from party.offline import ADVERSARY
from party.opening import Preparation, say
from party.rounds import Outcome, RoundClient, RoundTask
from party.rundir import RunDirectory
from party.workplace import Workplace
from splitfl.aggregation.error import aggregation_error
from splitfl.aggregation.factors import Pair, Update
from splitfl.aggregation.peft_format import final_adapter
from splitfl.aggregation.rule import Step, check_combination
from splitfl.aggregation.rules import rule_named
from splitfl.aggregation.rules.dynamical import FeDLRT
from splitfl.aggregation.state import State
from splitfl.aggregation.sums import Vector
from splitfl.config import TuneSettings
from splitfl.config_federation import HIDDEN_SUMS
from splitfl.errors import INTERRUPTED_EXIT_CODE, RefusedError, UsageError, WireError
from splitfl.files import replace_text
from splitfl.kit import Kit
from splitfl.metrics import peak_rss_bytes, write_results
from splitfl.privacy.ledger import Release
from splitfl.report import as_size, write_report
from splitfl.rounds.schedule import place_of
from splitfl.wire.round_frames import unpack_parts
from splitfl.wire.round_messages import Facts

if TYPE_CHECKING:
    from party.tune import Data

_OWN = "own.safetensors"
_WEIGHT = struct.Struct("<d")


@dataclass(frozen=True, kw_only=True)
class Course:
    """Where a round stands."""

    number: int
    """Of the sum."""
    round: int
    """Of the rule."""
    step: int
    """Sum of the rule's round."""
    what: Step
    is_last: bool
    """Whether the rule's round ends with it."""


def tune_in_rounds(
    settings: TuneSettings, kit: Kit, run: RunDirectory, data: Data, preparation: Preparation, place: Workplace,
    book: Book,
) -> int:  # fmt: skip
    """Take part in a federation until it is finished; the exit code."""
    party = Participant(settings, kit, run, data, preparation, place, book)
    return party.run_rounds()


class Participant:
    """One party of a federation, and everything it needs for its rounds."""

    def __init__(
        self, settings: TuneSettings, kit: Kit, run: RunDirectory, data: Data, preparation: Preparation,
        place: Workplace, book: Book,
    ) -> None:  # fmt: skip
        self.settings, self.kit, self.run, self.data, self.place, self.book = settings, kit, run, data, place, book
        self.rule = rule_named(settings.rule, settings.rule_options())
        check_combination(self.rule, settings.sum, dp=settings.dp_sgd or settings.sum_noise is not None)
        self.shared = SharedModel(place.model)
        self.first = self.rule.first(self.shared.template(settings.federation_r), settings.federation_seed)
        self.settings, self.keeper = bound_of(
            settings, self.rule, self.first, run, data.train_set, preparation, book.run
        )
        """Holds this party to the bound on its updates; None where there is no bound."""
        self.rank = settings.r if settings.federation_r not in (None, settings.r) else None
        self.scores = Scores(self.settings, kit, data, place, self.rule, self.shared, self.rank)
        self.protocol = preparation.protocol.name
        self.states = PlainStates(self.rule, self.first)
        self.own, self.merged = self._kept_own()
        """What this party trained last, and the changes that were merged below it."""
        self._gradient_sent: tuple[State, Vector] | None = None

    # ---- the federation

    def run_rounds(self) -> int:
        """Every round, then what is left of it."""
        started, rows = time.monotonic(), len(self.data.train)
        if self.keeper is not None:
            rows = self.keeper.promise.units or 0
        self.book.ledger.check(self._release("planned"))
        self._describe()
        with take_part(self.settings, self.kit, self.run, self.rule, self.first, rows) as client:
            assert client.entered is not None  # noqa: S101  inside the with block
            if self.keeper is not None:
                self.keeper.enter(client)
            rounds = client.entered.rounds
            self.states = self._box(client.entered.federation)
            self.place.log.write("start", **self._start_facts(client))
            say(f"federation {client.entered.federation[:8]}: {rounds} sums, rule {self.rule.name}, sum "
                f"{self.settings.sum}, at least {client.entered.min_parties} parties")  # fmt: skip
            training = LocalTraining(self.settings, self.kit, self.run, self.data, self.place, self._trainings(rounds))
            before = self.scores.of_state(-1, 0, self.first, None, "before")
            try:
                for task in client:
                    self._round(client, task, training)
            except StoppedEarly:
                say("Stopped in the middle of a round. Continue with --resume while the federation goes on.")
                return INTERRUPTED_EXIT_CODE
            traffic = client.link.socket.bytes_sent, client.link.socket.bytes_received
        return self._conclude(client.outcome, before, traffic, time.monotonic() - started)

    def _box(self, federation: str) -> PlainStates:
        """How the common state is kept at the coordinator."""
        settings = self.settings
        if settings.sum not in HIDDEN_SUMS:
            return PlainStates(self.rule, self.first)
        assert settings.key is not None  # noqa: S101  the settings saw to it
        assert settings.peers is not None  # noqa: S101
        return SealedStates(self.rule, self.first, key=settings.key, peers=settings.peers, federation=federation)

    def _trainings(self, sums: int) -> int:
        """How many of the first `sums` sums come after a training."""
        return sum(self._course(number).what.does == "train" for number in range(sums))

    def _course(self, number: int) -> Course:
        round_, step = place_of(self.rule, number)
        steps = self.rule.steps(round_)
        return Course(number=number, round=round_, step=step, what=steps[step], is_last=step == len(steps) - 1)

    # ---- one round

    def _round(self, client: RoundClient, task: RoundTask, training: LocalTraining) -> None:
        began = time.monotonic()
        course = self._course(task.round)
        state = self._state(task)
        if self.place.recorder is not None:
            self.place.recorder.round_begins(client.link, course.number, course.round, course.step, state)
        if not task.kept and task.reason:
            say(f"the round before was dropped: {task.reason}")
        if task.saved is None:
            if self.keeper is not None:
                self.keeper.admit(task.round)
            vector = self._made(state, course, training)
            self.book.ledger.charge(self._release(hashlib.blake2b(vector.tobytes(), digest_size=16).hexdigest()))
        else:
            if self.keeper is not None:
                self.keeper.note(task.round)  # it may have been killed between the two
            say(f"round {task.round}: the update made before goes out again")
            vector = np.zeros(client.facts.lengths[task.round % len(client.facts.lengths)], dtype=np.float32)
        trained = time.monotonic()
        moved = client.link.socket.bytes_sent, client.link.socket.bytes_received
        after, error = self._combined(client, task, state, course, self._padded(client.facts, vector, task.round))
        if after is None:
            say(f"round {task.round}: it goes on without this party")
            return
        summed = time.monotonic()
        personal, common = None, None
        if course.is_last:
            personal, common = self.scores.of_round(course.number, course.round, state, after, self.own)
        kept = task.finish(
            self.states.wrap(after),
            personal=personal,
            common=common,
            rows=self.scores.rows,
            agrees=lambda blob: self.states.is_as_good(blob, after),
        )
        self.place.log.write(
            "round", number=task.round, round=course.round, step=course.what.name, kept=kept, personal=personal,
            common=common, aggregation_error=error, values=int(vector.size), seconds_training=trained - began,
            seconds_sum=summed - trained, bytes_sent=client.link.socket.bytes_sent - moved[0],
            bytes_received=client.link.socket.bytes_received - moved[1],
        )  # fmt: skip
        told = (
            ""
            if common is None and personal is None
            else f"; score {_or_dash(common)} shared, {_or_dash(personal)} own"
        )
        say(f"round {task.round} {'kept' if kept else 'dropped'}: {trained - began:.1f} s training, "
            f"{summed - trained:.1f} s sum{told}")  # fmt: skip

    def _state(self, task: RoundTask) -> State:
        blob = task.state
        return self.first if blob is None else self.states.unwrap(blob)

    def _made(self, state: State, course: Course, training: LocalTraining) -> Vector:
        """Train or take a gradient, and keep what was trained; what is sent of it."""
        start = self.rule.start(state, course.round, course.step, own=self.own, rank=self.rank)
        self.shared.load(start, state.merged)
        number = self._trainings(course.number)
        if course.what.does == "gradient":
            found = training.gradient(self.shared, start, number)
            vector = self.rule.vector(state, found, course.round, course.step)
            self._gradient_sent = state, vector
            return vector
        trained = training.train(self.shared, start, course.what, number, self._correction(state))
        self._keep_own(trained, state.merged)
        return self.rule.vector(state, trained, course.round, course.step)

    def _correction(self, state: State) -> dict[str, torch.Tensor] | None:
        """What a rule adds to the gradients of cores, where it does and this process has sent its own gradient."""
        if not state.gradient or self._gradient_sent is None:
            return None
        assert isinstance(self.rule, FeDLRT)  # noqa: S101  no other rule keeps a gradient in its state
        return self.rule.correction(state, self.rule.own_gradient(*self._gradient_sent))

    def _combined(
        self, client: RoundClient, task: RoundTask, state: State, course: Course, vector: Vector
    ) -> tuple[State | None, float | None]:
        """The next state, and how far it is from the mean of the products where that can be known."""
        assert client.entered is not None  # noqa: S101
        largest = client.entered.max_weight
        weight = min(float(len(self.data.train)), largest) if self.keeper is None else self.keeper.weight(largest)
        if self.rule.by_mean(course.round):
            still = resting(self.settings, self.rule, state, course.round, course.step, vector.size)
            sent = vector if still is None else vector - still
            self._warn_of_clip(sent, client.entered.clip)
            opened = task.submit(sent, weight)
            if opened is None:
                return None, None
            mean = opened.mean if still is None else opened.mean + still
            mean = mean[: self.rule.length(state, course.round, course.step)]
            return self.rule.from_mean(state, mean, course.round, course.step), None
        result = task.exchange(_WEIGHT.pack(weight) + vector.tobytes(), weight)
        if result is None:
            return None, None
        updates, weights = self._parts(client, state, course, result)
        after = self.rule.from_all(state, updates, weights, course.round, course.step)
        return after, aggregation_error(self.rule, state, after, updates, weights)

    def _parts(
        self, client: RoundClient, state: State, course: Course, result: bytes
    ) -> tuple[list[Update], list[float]]:
        """Every party's update and weight, in the order of their keys."""
        assert client.entered is not None  # noqa: S101
        length = self.rule.length(state, course.round, course.step)
        parts = unpack_parts(result, largest=_WEIGHT.size + 4 * length)
        updates, weights = [], []
        for party in sorted(parts):
            blob = parts[party]
            if len(blob) != _WEIGHT.size + 4 * length:
                raise WireError("An update of another length came.", expected=f"{length} values")
            (weight,) = _WEIGHT.unpack_from(blob)
            if not 0 < weight <= client.entered.max_weight:
                raise WireError("An update with a weight out of range came.")
            vector = np.frombuffer(blob, dtype="<f4", offset=_WEIGHT.size).astype(np.float32)
            updates.append(self.rule.update(state, vector, course.round, course.step))
            weights.append(weight)
        return updates, weights

    def _padded(self, facts: Facts, vector: Vector, number: int) -> Vector:
        """Filled up to what a sum of this federation takes in."""
        missing = facts.lengths[number % len(facts.lengths)] - vector.size
        if missing < 0:
            raise UsageError(
                f"An update of {vector.size} values is more than this federation has room for.",
                hint="a rule whose ranks grow needs --rule-option max_rank=... of that size, at every party",
            )
        return np.pad(vector, (0, missing)) if missing and self.rule.by_mean(self._course(number).round) else vector

    def _warn_of_clip(self, vector: Vector, clip: float) -> None:
        beyond = int((np.abs(vector) > clip).sum())
        if beyond:
            say(f"{beyond:,} of {vector.size:,} values are beyond the federation's clip and will be cut to it")

    def _personal(self, state: State) -> State:
        """The same with what this party keeps for itself."""
        update = self.rule.start(state, 0, own=self.own, rank=self.rank)
        return State(adapter=update, merged=state.merged, seed=state.seed)

    # ---- what this party keeps and books

    def _kept_own(self) -> tuple[Update | None, Mapping[str, Pair]]:
        """What this party had trained before it was started again."""
        path = self.run.path / FOLDER / _OWN
        if not self.settings.resume or not path.is_file():
            return None, {}
        kept = State.from_bytes(path.read_bytes())
        return kept.adapter, kept.merged

    def _keep_own(self, trained: Update, merged: Mapping[str, Pair]) -> None:
        self.own, self.merged = trained, merged
        path = self.run.path / FOLDER / _OWN
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial_file = path.with_suffix(".new")
        partial_file.write_bytes(State(adapter=trained, merged=merged).to_bytes())
        partial_file.replace(path)

    def _release(self, name: str) -> Release:
        """One update that leaves; the same bytes are the same release, however often they are sent.

        With a bound on all of them there is one release for all.
        """
        if self.keeper is not None:
            return self.keeper.promise.release
        return Release(
            release_id=f"update:{self.book.run}:{name}",
            dataset=self.data.train_set.fingerprint,
            unit=self.data.train_set.unit,
            units=None,
            channel="adapter",
            mechanism="none" if self.settings.preset is None else f"dp-lora, {self.settings.preset}",
            sensitivity=None,
            sigma=None,
            rho=None,
            adversary=ADVERSARY,
            run=self.book.run,
        )

    def _describe(self) -> None:
        """What the federation lets leave, in the run's disclosure."""
        path = self.run.path / "disclosure.json"
        told = json.loads(path.read_text(encoding="utf-8"))
        claim = None if self.keeper is None else self.keeper.promise.claim
        told["federation"] = disclosed(self.rule, self.settings.sum, claim)
        replace_text(path, json.dumps(told, indent=2) + "\n")

    def _start_facts(self, client: RoundClient) -> dict[str, Any]:
        assert client.entered is not None  # noqa: S101
        counts = self.data.train.counts
        return {
            "role": "data holder", "protocol": self.protocol, "architecture": self.kit.plan.model_type,
            "task": self.kit.plan.task, "rule": self.rule.name, "sum": self.settings.sum, "form": self.data.form,
            "federation": client.entered.federation, "sums": client.entered.rounds, "train_rows": counts.rows,
            "train_tokens": counts.tokens, "layers": self.kit.plan.layers, "bottom": self.kit.plan.bottom,
            "top": self.kit.plan.top, "fingerprint": self.kit.plan.trunk, "cpu_seconds": time.process_time(),
        }  # fmt: skip

    # ---- the end

    def _conclude(self, outcome: Outcome | None, before: Score | None, traffic: tuple[int, int], seconds: float) -> int:
        if outcome is None or outcome.state is None:
            raise RefusedError(
                "The federation ended without a round that was kept; there is no adapter.",
                code="rejected",
                hint="the coordinator's log says why rounds were dropped",
            )
        blob = outcome.best_state if outcome.best_state is not None else outcome.state
        best, last = (self.states.unwrap(b) for b in (blob, outcome.state))
        config, name = self.shared.config, str(self.kit.config.name_or_path or self.kit.plan.model_type)
        for state, folder in ((best, self.run.adapter), (last, self.run.path / "last")):
            whole = self._personal(state) if self.rule.no_global else state
            write_adapter(*final_adapter(whole, config), folder, base_name=name)
        if self.own is not None:
            own = State(adapter=self.own, merged=self.merged)
            write_adapter(*final_adapter(own, config), self.run.path / "personal", base_name=name)
        after = self.scores.of_state(outcome.rounds, 0, best, self.own, "after")
        chosen = (
            "the last round's"
            if outcome.best_round is None
            else f"that of round {outcome.best_round}, the best by validation"
        )
        say(f"{outcome.reason or 'finished'}; the adapter is {chosen}")
        sent, received = traffic[0] + self.place.traffic.bytes_sent, traffic[1] + self.place.traffic.bytes_received
        self.place.log.write("end", seconds=seconds, rounds=outcome.rounds, best_round=outcome.best_round,
                             peak_rss_bytes=peak_rss_bytes(), cpu_seconds=time.process_time(), bytes_sent=sent,
                             bytes_received=received)  # fmt: skip
        say(f"{outcome.rounds} sums in {seconds:.0f} s; {as_size(sent)} sent, {as_size(received)} received")
        if self.settings.json is not None:
            results = results_of(self.protocol, outcome, before, after, sent, received, seconds)
            write_results(self.settings.json, "tune", self.settings, results)
        try:
            say(f"report: {write_report(self.run.path)}")
        except UsageError as error:  # the extra is not installed; the run is complete without a page
            say(str(error))
        say(f"adapter: {self.run.adapter}")
        return 0


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
