"""`splitfl tune --federate --protocol fed-kd`: train, say what the model makes of public rows, learn from what all say.

knowledge   what all parties together say about the public rows; the state of the federation
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from party.bookkeeping import Book
from party.distillation import (
    DistillationTrainer,
    Teacher,
    distillation_data,
    examples_digest,
    read_public,
    said,
)
from party.evaluate import Score, evaluate
from party.federated_end import results_of, write_adapter
from party.federated_model import SharedModel
from party.federated_sums import FOLDER, enter
from party.kept_rounds import KeptRounds
from party.local_training import LocalTraining, StoppedEarly
from party.offline import ADVERSARY
from party.opening import Preparation, say
from party.protect import numbered
from party.rounds import Outcome, RoundClient, RoundTask
from party.rundir import RunDirectory
from party.tune import Data, reading_options
from party.workplace import Workplace
from splitfl.aggregation.logits import (
    RULE,
    Ids,
    Knowledge,
    Steps,
    check_sum,
    pack_knowledge,
    pack_upload,
    read_knowledge,
)
from splitfl.aggregation.peft_format import final_adapter
from splitfl.aggregation.rule import Step
from splitfl.aggregation.state import State
from splitfl.aggregation.sums import Opened, Stage
from splitfl.config import TuneSettings
from splitfl.errors import INTERRUPTED_EXIT_CODE, RefusedError, UsageError
from splitfl.files import replace_text
from splitfl.kit import Kit
from splitfl.metrics import RunLog, peak_rss_bytes, write_results
from splitfl.privacy.ledger import Release
from splitfl.report import as_size, write_report
from splitfl.wire.round_frames import digest_of
from splitfl.wire.round_messages import Facts

_NOTHING: tuple[Ids, Steps] = (np.empty(0, dtype=np.int64), np.empty(0, dtype=np.uint16))


def distil_in_rounds(
    settings: TuneSettings, kit: Kit, run: RunDirectory, data: Data, preparation: Preparation, place: Workplace,
    book: Book,
) -> int:  # fmt: skip
    """Take part in a federation of `fed-kd` until it is finished; the exit code."""
    return Student(settings, kit, run, data, preparation.protocol.name, place, book).run_rounds()


@dataclass(frozen=True, kw_only=True)
class Course:
    """The two trainings of every round, over all rounds."""

    own: LocalTraining
    taught: LocalTraining
    trainer: dict[str, Any]
    """What the second one's trainer is made with; changed from round to round."""


class Student:
    """One party of such a federation."""

    def __init__(
        self, settings: TuneSettings, kit: Kit, run: RunDirectory, data: Data, protocol: str, place: Workplace,
        book: Book,
    ) -> None:  # fmt: skip
        self.settings, self.kit, self.run, self.data, self.place, self.book = settings, kit, run, data, place, book
        self.protocol = protocol
        private = examples_digest(data.train)
        self.public = read_public(settings, kit, reading_options(settings, kit), private)
        self.layout = self.public.layout(settings)
        check_sum(settings.sum, dense=self.layout.dense)
        self.shared = SharedModel(place.model)
        self.kept = KeptRounds(run.path / FOLDER, self.shared, resume=settings.resume)

    # ---- the federation

    def run_rounds(self) -> int:
        """Every round, then what is left of it."""
        started = time.monotonic()
        self.book.ledger.check(self._release("planned"))
        self._describe()
        say(f"public: {self.public.examples.counts}; {self.layout.keep} of {self.layout.classes:,} entries of each of "
            f"{self.layout.positions:,} positions are sent, {as_size(self.layout.upload_bytes)} a round")  # fmt: skip
        with enter(self.settings, self.run, len(self.data.train), self._facts) as client:
            assert client.entered is not None  # noqa: S101  inside the with block
            self.place.log.write("start", **self._start_facts(client))
            say(f"federation {client.entered.federation[:8]}: {client.entered.rounds} rounds, sum {self.settings.sum}, "
                f"at least {client.entered.min_parties} parties")  # fmt: skip
            course = self._course(client.entered.rounds)
            before = self._score("before", 0)
            try:
                for task in client:
                    self._round(client, task, course)
            except StoppedEarly:
                say("Stopped in the middle of a round. Continue with --resume while the federation goes on.")
                return INTERRUPTED_EXIT_CODE
            traffic = client.link.socket.bytes_sent, client.link.socket.bytes_received
        return self._conclude(client.outcome, before, traffic, time.monotonic() - started)

    def _course(self, rounds: int) -> Course:
        """What trains on private rows, and what on public ones; the schedule of both runs over all rounds."""
        settings, trainer = self.settings, dict[str, Any]()
        own = LocalTraining(settings, self.kit, self.run, self.data, self.place, rounds)
        taught = LocalTraining(
            replace(settings, local_steps=settings.kd_steps),
            self.kit,
            self.run,
            distillation_data(self.data, self.public),
            replace(
                self.place,
                trainer=lambda **given: DistillationTrainer(**trainer, **given),
                log=_Renamed(self.place.log),
            ),
            rounds,
        )
        return Course(own=own, taught=taught, trainer=trainer)

    # ---- one round

    def _round(self, client: RoundClient, task: RoundTask, course: Course) -> None:
        if not task.kept and task.reason:
            say(f"the round before was dropped: {task.reason}")
        self._take_up(task, course)
        began = time.monotonic()
        self._train(task.round, course)
        trained = time.monotonic()
        moved = client.link.socket.bytes_sent, client.link.socket.bytes_received
        knowledge = self._exchanged(client, task)
        if knowledge is None:
            say(f"round {task.round}: it goes on without this party")
            return
        summed = time.monotonic()
        alone = None if self.kept.at.phase == "taught" else self._score("own", task.round + 1)
        blob = pack_knowledge(self.layout, knowledge)
        if self.kept.at.phase != "taught":
            self._learn(blob, task.round, course)
            self.kept.keep("taught", round=task.round)
        taught = time.monotonic()
        score = self._score("personal", task.round + 1)
        kept = task.finish(
            blob, personal=_higher_is_better(score),
            rows=0 if self.data.held_out is None else len(self.data.held_out),
        )  # fmt: skip
        self.kept.close(task.round, digest_of(blob) if kept else task.task.state, kept=kept)
        self.place.log.write(
            "round", number=task.round, round=task.round, step="logits", kept=kept, personal=_higher_is_better(score),
            alone=_higher_is_better(alone), common=None, aggregation_error=None,
            values=self.layout.positions * self.layout.keep, seconds_training=trained - began,
            seconds_sum=summed - trained, seconds_distillation=taught - summed,
            bytes_sent=client.link.socket.bytes_sent - moved[0],
            bytes_received=client.link.socket.bytes_received - moved[1],
        )  # fmt: skip
        told = "" if score is None else f"; score {_told(alone)} before the others' word, {_told(score)} after it"
        say(f"round {task.round} {'kept' if kept else 'dropped'}: {trained - began:.1f} s training, "
            f"{summed - trained:.1f} s sum, {taught - summed:.1f} s distillation{told}")  # fmt: skip

    def _take_up(self, task: RoundTask, course: Course) -> None:
        """Begin where the federation begins: at an earlier adapter after a rollback, or with what was missed."""
        state = task.task.state
        if state == self.kept.at.state or (self.kept.at.round == task.round and self.kept.at.phase != "done"):
            return
        if state in self.kept.at.after:
            say("the federation went back to an earlier round; so does this party")
            self.kept.go_back(state)
        elif task.state is not None:
            say("learning first from the round that this party was not in")
            self._learn(task.state, max(0, task.round - 1), course)
            self.kept.keep("done", state=state)

    def _train(self, number: int, course: Course) -> None:
        """The training of this round, unless it was done before this process."""
        if self.kept.at.round == number and self.kept.at.phase in ("trained", "taught"):
            return
        course.own.train(self.shared, self.shared.read(), Step(), number)
        self.kept.keep("trained", round=number)

    def _exchanged(self, client: RoundClient, task: RoundTask) -> Knowledge | None:
        """What all say, after this party has said what its model makes of the public rows."""
        assert client.entered is not None  # noqa: S101
        weight = min(float(len(self.data.train)), client.entered.max_weight)
        said_before = task.saved is not None
        if said_before:
            say(f"round {task.round}: what was said before goes out again")
        ids, steps = _NOTHING if said_before else self._said()
        if self.settings.sum == "plain":
            result = task.exchange(b"" if said_before else pack_upload(self.layout, ids, steps, weight), weight)
            return None if result is None else read_knowledge(result, self.layout)
        clip, length = client.entered.clip, self.layout.positions * self.layout.classes
        vector = np.zeros(length, dtype=np.float32) if said_before else self.layout.to_vector(steps, clip)
        opened = task.submit(vector, weight)
        return None if opened is None else self._from_mean(opened, clip)

    def _said(self) -> tuple[Ids, Steps]:
        """This party's answers, booked before anybody gets them."""
        ids, steps = said(
            self.shared.model,
            self.public,
            self.layout,
            self.data.collator,
            batch_size=self.settings.per_device_eval_batch_size,
            device=self.settings.device,
        )
        name = hashlib.blake2b(pack_upload(self.layout, ids, steps, 1.0), digest_size=16).hexdigest()
        self.book.ledger.charge(self._release(name))
        return ids, steps

    def _from_mean(self, opened: Opened, clip: float) -> Knowledge:
        positions, classes = self.layout.positions, self.layout.classes
        return Knowledge(
            counts=np.full(positions, classes, dtype=np.int64),
            ids=np.tile(np.arange(classes, dtype=np.int64), positions),
            log_probabilities=self.layout.from_vector(opened.mean, clip),
            parties=opened.parties,
            weight=opened.weight,
        )

    def _learn(self, blob: bytes, number: int, course: Course) -> None:
        """Some steps towards what all say."""
        knowledge = read_knowledge(blob, self.layout)
        course.trainer.update(
            teacher=Teacher(self.public, knowledge, self.layout.temperature),
            weight=self.settings.kd_weight,
            private=self.data.train,
            draw=self.settings.seed + number,
        )
        course.taught.train(self.shared, self.shared.read(), Step(), number)

    # ---- scores, book and disclosure

    def _score(self, when: str, step: int) -> Score | None:
        if self.data.held_out is None:
            return None
        score = evaluate(
            self.shared.model,
            numbered(self.data.held_out),
            self.data.collator,
            task=self.kit.plan.task,
            batch_size=self.settings.per_device_eval_batch_size,
            device=self.settings.device,
            on_batch=self.place.tracker.scoring,
        )
        self.place.log.write("eval", step=step, when=when, tokens=score.counted, **score.facts())
        return score

    def _facts(self, stages: tuple[Stage, ...]) -> Facts:
        plain = self.settings.sum == "plain"
        return Facts(
            layout=self.layout.digest,
            base=self.public.digest,
            rule=RULE,
            sum=self.settings.sum,
            stages=stages,
            lengths=(self.layout.words if plain else self.layout.positions * self.layout.classes,),
        )

    def _release(self, name: str) -> Release:
        """One set of answers; the same bytes are the same release, however often they are sent."""
        return Release(
            release_id=f"logits:{self.book.run}:{name}",
            dataset=self.data.train_set.fingerprint,
            unit=self.data.train_set.unit,
            units=None,
            channel="adapter",  # they tell of the tuned weights, and so of the same rows, as an adapter does
            mechanism="none",
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
        plain = self.settings.sum == "plain"
        told["federation"] = {
            "content": f"{self.layout.keep} of {self.layout.classes} log-probabilities at each of "
            f"{self.layout.positions} positions of the public rows, as the tuned model has them; scores on held-out "
            "rows",
            "how_often": "once a round; the same bytes again if a round begins anew",
            "coordinator_sees": "what this party's model says, and the mean" if plain else "the mean of what all say",
            "other_parties_see": "the mean; an entry that one party alone sent stands in it as it was sent"
            if not self.layout.dense
            else "the mean",
            "bound": "none",
        }
        replace_text(path, json.dumps(told, indent=2) + "\n")

    def _start_facts(self, client: RoundClient) -> dict[str, Any]:
        assert client.entered is not None  # noqa: S101
        counts, plan = self.data.train.counts, self.kit.plan
        return {
            "role": "data holder", "protocol": self.protocol, "architecture": plan.model_type, "task": plan.task,
            "rule": RULE, "sum": self.settings.sum, "form": self.data.form, "federation": client.entered.federation,
            "sums": client.entered.rounds, "train_rows": counts.rows, "train_tokens": counts.tokens,
            "layers": plan.layers, "bottom": plan.bottom, "top": plan.top, "fingerprint": plan.trunk,
            "cpu_seconds": time.process_time(), "public_rows": len(self.public.examples),
            "positions": self.layout.positions, "kept": self.layout.keep,
        }  # fmt: skip

    # ---- the end

    def _conclude(self, outcome: Outcome | None, before: Score | None, traffic: tuple[int, int], seconds: float) -> int:
        if outcome is None or outcome.state is None:
            raise RefusedError(
                "The federation ended without a round that was kept.",
                code="rejected",
                hint="the coordinator's log says why rounds were dropped",
            )
        self._write(self.run.path / "last")
        best = None if outcome.best_round is None else self.kept.at.rounds.get(str(outcome.best_round))
        if best is not None:
            self.kept.load(best)
        self._write(self.run.adapter)
        after = self._score("after", outcome.rounds)
        chosen = "its last one" if best is None else f"that of round {outcome.best_round}, the best by validation"
        say(f"{outcome.reason or 'finished'}; this party's adapter is {chosen}")
        sent, received = traffic
        self.place.log.write("end", seconds=seconds, rounds=outcome.rounds, best_round=outcome.best_round,
                             peak_rss_bytes=peak_rss_bytes(), cpu_seconds=time.process_time(), bytes_sent=sent,
                             bytes_received=received)  # fmt: skip
        say(f"{outcome.rounds} rounds in {seconds:.0f} s; {as_size(sent)} sent, {as_size(received)} received")
        if self.settings.json is not None:
            results = results_of(self.protocol, outcome, before, after, sent, received, seconds)
            write_results(self.settings.json, "tune", self.settings, results)
        try:
            say(f"report: {write_report(self.run.path)}")
        except UsageError as error:  # the extra is not installed; the run is complete without a page
            say(str(error))
        say(f"adapter: {self.run.adapter}")
        return 0

    def _write(self, folder: Path) -> None:
        """The adapter as it is now, as a PEFT directory."""
        name = str(self.kit.config.name_or_path or self.kit.plan.model_type)
        tensors, config = final_adapter(State(adapter=self.shared.read()), self.shared.config)
        write_adapter(tensors, config, folder, base_name=name)


class _Renamed(RunLog):
    """The run's log, in which training on public rows is another event than training on private ones."""

    def __init__(self, log: RunLog) -> None:
        self._to = log

    def write(self, event: str, **facts: Any) -> None:
        """Append one record."""
        self._to.write("distil" if event == "train" else event, **facts)

    def close(self) -> None:
        """Whoever opened it closes it."""


def _higher_is_better(score: Score | None) -> float | None:
    """Macro F1 of a classifier, else minus the loss: what rounds are judged by."""
    if score is None:
        return None
    return score.macro_f1 if score.macro_f1 is not None else -score.loss


def _told(score: Score | None) -> str:
    value = _higher_is_better(score)
    return "-" if value is None else f"{value:.4f}"
