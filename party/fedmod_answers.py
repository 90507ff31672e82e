"""What a `fedmod` server answers, from finished bytes: nothing here waits for training or touches the model."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from party.fedmod_model import Layout
from party.fedmod_peers import policy_problem
from party.mesh import Answer
from splitfl.config_mesh import FedmodSettings
from splitfl.sketch import Sketch
from splitfl.wire import mesh_messages as say


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One's own adapter after a round of training, ready to be sent."""

    round: int
    frames: dict[say.Part, bytes]


class Answers:
    """The answers of one server; used by its thread, filled by the one that trains.

    Args:
        settings: of the run.
        hello: one's own facts.
        layout: of the adapter.
        rows: rows that one trains on, as told to peers.
    """

    def __init__(self, settings: FedmodSettings, hello: say.Hello, layout: Layout, rows: int) -> None:
        self._settings, self._hello, self._rows = settings, hello, rows
        self._open = False
        self._sketch: Sketch | None = None
        self._sketch_frame = b""
        self._parts: tuple[say.Part, ...] = ("all",) if settings.rule == "fedit" else ("A", "B")
        self._masks = {part: layout.chosen(part) for part in self._parts}
        self._lock = threading.Lock()
        self._snapshot: Snapshot | None = None
        self._greeted: set[str] = set()
        self._finished: set[str] = set()
        self._given: dict[str, int] = {}

    def open(self, sketch: Sketch | None) -> None:
        """From now on answer; before that everybody is told to come later.

        Args:
            sketch: one's own, released; None gives none.
        """
        with self._lock:
            self._open, self._sketch = True, sketch
            self._sketch_frame = b"" if sketch is None else say.frame_of_integers(sketch.values)

    def publish(self, round_number: int, vector: torch.Tensor) -> None:
        """From now on give this adapter, float32 [P], to whoever asks."""
        frames = {part: say.frame_of_floats(vector[mask]) for part, mask in self._masks.items()}
        with self._lock:
            self._snapshot = Snapshot(round=round_number, frames=frames)

    @property
    def waiting(self) -> set[str]:
        """Names of peers that have taken an adapter and have not said that they are finished."""
        with self._lock:
            return set(self._given) - self._finished

    @property
    def given(self) -> dict[str, int]:
        """How many adapters each peer has taken."""
        with self._lock:
            return dict(self._given)

    def __call__(self, name: str, ask: say.Ask) -> Answer:
        """The answer to the peer called `name`."""
        with self._lock:
            if not self._open:
                return say.Refused(number=ask.number, code="out_of_order", problem="Not ready yet."), None
            if isinstance(ask, say.Hello):
                return self._greet(name, ask), None
            if name not in self._greeted:
                return say.Refused(number=ask.number, code="out_of_order", problem="Say hello first."), None
            match ask:
                case say.AskSketch():
                    return self._give_sketch(ask)
                case say.Want():
                    return self._give_adapter(name, ask)
                case say.Finished():
                    self._finished.add(name)
                    return say.Noted(number=ask.number), None

    def _greet(self, name: str, hello: say.Hello) -> say.Reply:
        self._greeted.discard(name)
        mine = self._hello
        for code, theirs, ours, words in (
            ("version", str(hello.version), str(mine.version), "another version of the messages"),
            ("model", hello.model, mine.model, "another model"),
            ("layout", hello.layout, mine.layout, "another adapter, rule, --start-seed or kind of sketch"),
        ):
            if theirs != ours:
                return say.Refused(number=hello.number, code=code, problem=f"This server has {words}.", expected=ours)  # type: ignore[arg-type]
        problem = policy_problem(hello.tags, self._settings)
        if problem is not None:
            return say.Refused(number=hello.number, code="policy", problem=f"By this server's policy: {problem}.")
        self._greeted.add(name)
        self._finished.discard(name)
        return say.Welcome(
            number=hello.number, version=mine.version, model=mine.model, layout=mine.layout, tags=mine.tags
        )

    def _give_sketch(self, ask: say.AskSketch) -> Answer:
        if self._sketch is None:
            return say.NoSketch(number=ask.number), None
        values = len(self._sketch.values)
        reply = say.SketchIs(number=ask.number, rows=self._sketch.rows, grid=self._sketch.grid, values=values)
        return reply, self._sketch_frame

    def _give_adapter(self, name: str, ask: say.Want) -> Answer:
        if ask.part not in self._parts:
            expected = f"{' or '.join(self._parts)}, by rule {self._settings.rule}"
            problem = "These factors are not exchanged here."
            return say.Refused(number=ask.number, code="layout", problem=problem, expected=expected), None
        snapshot = self._snapshot
        if snapshot is None or snapshot.round < ask.round:
            return say.NotYet(number=ask.number, round=0 if snapshot is None else snapshot.round), None
        frame = snapshot.frames[ask.part]
        self._given[name] = self._given.get(name, 0) + 1
        reply = say.Have(
            number=ask.number, round=snapshot.round, rows=self._rows, part=ask.part, values=len(frame) // 4
        )
        return reply, frame
