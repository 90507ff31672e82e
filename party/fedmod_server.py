"""What a `fedmod` run holds, opened in order and closed in the reverse one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from party.bookkeeping import keep_name, run_name
from party.evaluate import Score
from party.fedmod_answers import Answers
from party.fedmod_data import Given, read_rows
from party.fedmod_model import PeerModel, features_of, fingerprint_model, open_base, public_centre, with_adapter
from party.fedmod_peers import Neighbourhood
from party.fedmod_run import FedmodRun
from party.fedmod_train import LocalTrainer, logits_of, score
from party.mesh import MeshServer, PeerLink, PeerList
from party.opening import say as tell
from protocols import PEER_PROTOCOLS
from splitfl.config_mesh import FedmodSettings
from splitfl.cut import Plan
from splitfl.data import Collator
from splitfl.errors import KeyFileError
from splitfl.interrupts import StopRequest
from splitfl.metrics import RunLog
from splitfl.privacy.ledger import Ledger, Release
from splitfl.sketch import DIRECTIONS, Sketch, plan_sketch, row_codes
from splitfl.wire import mesh_messages as say
from splitfl.wire.keys import KeyPair, load_public

ADVERSARY = "peers"
_DISCLOSURE = PEER_PROTOCOLS["fedmod"].disclosure
_SPARE_BYTES = 64 * 1024
_PARTS: tuple[say.Part, ...] = ("all", "A", "B")


@dataclass(kw_only=True)
class Server:
    """All that one run holds."""

    settings: FedmodSettings
    run: FedmodRun
    given: Given
    peer: PeerModel
    collator: Collator
    trainer: LocalTrainer
    head: dict[str, torch.Tensor]
    """LoRA and head before training, by name."""
    facts: dict[str, Any]
    """What a run that goes on has to agree with."""
    ledger: Ledger
    name: str
    stop: StopRequest
    log: RunLog
    answers: Answers
    listening: MeshServer
    peers: Neighbourhood
    seconds: dict[str, float] = field(default_factory=lambda: {"training": 0.0, "exchange": 0.0})

    def stopped(self) -> bool:
        """Whether somebody asked to stop."""
        return self.stop.asked

    def loss_with(self, vector: torch.Tensor) -> float:
        """Validation loss with an adapter [P] and one's own head; the adapter stays as it was."""
        before = self.peer.vector()
        self.peer.put(vector)
        try:
            return self.figures("validation").loss
        finally:
            self.peer.put(before)

    def figures(self, which: str, offsets: torch.Tensor | None = None) -> Score:
        """Figures over the validation or the held-out rows."""
        rows = getattr(self.given.rows, which)
        size = self.settings.per_device_eval_batch_size
        return score(*logits_of(self.peer.model, rows, self.collator, size), offsets)


def listed_peers(settings: FedmodSettings) -> dict[str, tuple[str, bytes]]:
    """Name of each peer to ask, to its address and key.

    Raises:
        KeyFileError: a peer's key is not in the folder.
    """
    found = {}
    for name, address in settings.addresses().items():
        file = settings.peers / f"{name}.key"
        if not file.is_file():
            raise KeyFileError(
                f"--peer {name}: there is no key {file}.", hint=f"put that peer's public key there as {name}.key"
            )
        found[name] = address, load_public(file)
    return found


def open_rows(settings: FedmodSettings, plan: Plan) -> tuple[Given, Collator, Any]:
    """Rows, what makes batches of them, and the public model with a new head."""
    given = read_rows(settings, plan)
    base = open_base(Path(settings.model), plan, given.label2id, settings.seed)
    collator = Collator(given.tokenizer, pad_token_id=base.config.pad_token_id)
    tell(f"rows: {len(given.rows.train)} to train on, {len(given.rows.validation)} to check on, "
         f"{len(given.rows.held_out)} held out, {given.rows.classes} classes")  # fmt: skip
    return given, collator, base


@contextmanager
def open_server(
    settings: FedmodSettings, run: FedmodRun, plan: Plan, given: Given, collator: Collator, base: Any, keys: KeyPair,
    listed: Mapping[str, tuple[str, bytes]],
) -> Iterator[Server]:  # fmt: skip
    """Everything up to the first hello; closed in the reverse order. The run directory is made last.

    Raises:
        ResourceError: the address cannot be served.
        BudgetError: the sketch, or the adapters of all rounds, would go beyond the budget of a row.
    """
    codes = None if not settings.sketch else _codes(settings, given, base, collator)
    peer = with_adapter(base, plan, settings, fingerprint_model(Path(settings.model)))
    trainer = LocalTrainer(peer, given.rows.train, settings, collator)
    digest = peer.digest(settings, given.rows.classes)
    hello = say.Hello(
        number=0, version=say.MESH_VERSION, model=peer.fingerprint, layout=digest, tags=settings.tag_list()
    )
    answers = Answers(settings, hello, peer.layout, len(given.rows.train))
    facts = {"model": peer.fingerprint, "adapter": digest, "set of rows": given.fingerprint,
             **{n: getattr(settings, n) for n in ("rounds", "local_steps", "learning_rate", "seed")}}  # fmt: skip
    name, stop = run_name(run.path, resumed=settings.resume), StopRequest()
    with ExitStack() as opened:
        ledger = opened.enter_context(Ledger(settings.ledger))
        ledger.note_dataset(given.fingerprint, given.label)
        ledger.check_run(name, given.fingerprint)
        if settings.neighbours and not settings.resume:  # before the sketch is released, not after
            ledger.check(adapter_release(name, given.fingerprint, 0), settings.rounds)
        listening = MeshServer(
            settings.bind, keys=keys, peers=PeerList(settings.peers, deny=settings.deny, own=keys.public),
            answer=answers, disclosure=_DISCLOSURE, max_message_bytes=_SPARE_BYTES,
        )  # fmt: skip
        listening.start()
        opened.callback(listening.close)
        sketch = None if codes is None else _release(settings, run, given, codes, ledger, name)
        if codes is None:
            run.begin(settings, None)
        keep_name(run.path, name)
        answers.open(sketch)
        links = _links(listed, keys, peer, sketch)
        peers = Neighbourhood(settings, links, hello, sketch, lambda: stop.asked)
        opened.callback(peers.close)
        log = opened.enter_context(RunLog(run.log))
        yield Server(
            settings=settings, run=run, given=given, peer=peer, collator=collator, trainer=trainer,
            head={name: p.detach().clone() for name, p in trainer.parameters.items()}, facts=facts, ledger=ledger,
            name=name, stop=stop, log=log, answers=answers, listening=listening, peers=peers,
        )  # fmt: skip


def _links(
    listed: Mapping[str, tuple[str, bytes]], keys: KeyPair, peer: PeerModel, sketch: Sketch | None
) -> list[PeerLink]:
    """The way to each peer; oneself is left out."""
    sizes: dict[str, int] = {"sketch": 0 if sketch is None else len(sketch.values)}
    for part in _PARTS:
        sizes[part] = int(peer.layout.chosen(part).sum())
    room = 4 * max(sizes.values()) + _SPARE_BYTES
    return [
        PeerLink(name, address, public=public, keys=keys, disclosure=_DISCLOSURE, values=sizes, max_message_bytes=room)
        for name, (address, public) in listed.items()
        if public != keys.public
    ]


def adapter_release(name: str, dataset: str, number: int) -> Release:
    """The adapter after round `number` as the ledger counts it: of every row, without a bound."""
    return Release(
        release_id=f"fedmod-adapter:{name}:{number}",
        dataset=dataset,
        unit="row",
        units=None,
        channel="adapter",
        mechanism="none",
        sensitivity=None,
        sigma=None,
        rho=None,
        adversary=ADVERSARY,
        run=name,
    )


def _codes(settings: FedmodSettings, given: Given, base: Any, collator: Collator) -> Any:
    """What each row adds to the sketch: of training and validation rows alike."""
    centre = public_centre(base, collator, settings.start_seed)
    rows = given.own
    return row_codes(
        features_of(base, rows, collator), centre, settings.start_seed,
        plan_sketch(settings.sketch_epsilon, settings.sketch_delta).grid,
        labels=[int(row["labels"]) for row in rows] if settings.sketch_labels else None, classes=given.rows.classes,
    )  # fmt: skip


def _release(settings: FedmodSettings, run: FedmodRun, given: Given, codes: Any, ledger: Ledger, name: str) -> Sketch:
    """The sketch, booked before anybody can ask for it.

    Raises:
        BudgetError: it would go beyond the budget of a row.
    """
    plan = plan_sketch(settings.sketch_epsilon, settings.sketch_delta)
    booking = Release(
        release_id=f"fedmod-sketch:{name}",
        dataset=given.fingerprint,
        unit="row",
        units=None,
        channel="sketch",
        mechanism="discrete gauss",
        sensitivity=plan.sensitivity,
        sigma=plan.sigma,
        rho=plan.rho,
        adversary=ADVERSARY,
        run=name,
    )
    ledger.charge(booking)
    claim = plan.claim().sentence()
    run.begin(settings, claim)
    made = run.sketch(codes, plan)
    tell(f"sketch: {len(made.values)} numbers ({DIRECTIONS} directions) of {made.rows} rows; {claim}")
    return made
