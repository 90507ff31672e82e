"""`splitfl fedmod`: one server of a neighbourhood that has no server. Read from top to bottom.

rows, model, adapter -> sketch, booked -> listen -> meet peers
each round: K steps -> publish, booked -> ask neighbours -> mix, guarded -> checkpoint
last round: K steps -> publish -> tell everybody -> serve those that are not finished -> figures
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from party.evaluate import Score
from party.fedmod_mix import Mixed, Update, Verdict, guarded_mix, mix
from party.fedmod_model import plan_whole
from party.fedmod_peers import Exchange
from party.fedmod_run import FedmodRun
from party.fedmod_server import Server, adapter_release, listed_peers, open_rows, open_server
from party.fedmod_tell import in_words, tell_end
from party.fedmod_train import LocalTrainer, choose_offsets, logits_of, resting
from party.opening import say as tell
from splitfl.adapters import save_adapter
from splitfl.config_mesh import FedmodSettings
from splitfl.errors import INTERRUPTED_EXIT_CODE
from splitfl.metrics import peak_rss_bytes
from splitfl.wire import mesh_messages as say
from splitfl.wire.keys import fingerprint, load_keys, load_public

_TELL_S = 5.0


def fedmod(settings: FedmodSettings) -> int:
    """Run one server; returns the exit code."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    run = FedmodRun(settings.out)
    run.check(resume=settings.resume)
    keys, listed = load_keys(settings.key), listed_peers(settings)
    plan = plan_whole(Path(settings.model))
    given, collator, base = open_rows(settings, plan)
    with open_server(settings, run, plan, given, collator, base, keys, listed) as server, server.stop.watching():
        return _live(server)


# ---- one life


def _live(server: Server) -> int:
    settings, trainer = server.settings, server.trainer
    started = time.monotonic()
    progress = server.run.restore(trainer, server.facts) if settings.resume else None
    print(f"ready {server.listening.address} {fingerprint(load_public(settings.key))}", flush=True)
    server.log.write("start", **_start_facts(server), resumed_from=progress and progress.step)
    before = _eval(server, "before", 0) if progress is None or progress.step == 0 else None
    if settings.neighbours:
        _meet(server)
    mixed = progress.mixed if progress else 0
    while not server.stopped():
        round_number = mixed
        _train(server, (round_number + 1) * settings.local_steps)
        if server.stopped():
            break
        _publish(server, round_number + 1)
        if round_number + 1 >= settings.rounds:
            break
        _exchange(server, round_number + 1)
        mixed += 1
        server.run.save(trainer, mixed, server.facts)
    server.run.save(trainer, mixed, server.facts)
    if trainer.step < trainer.total:
        tell(f"Stopped at step {trainer.step} of {trainer.total}. The checkpoint is kept; continue with --resume.")
        return INTERRUPTED_EXIT_CODE
    return _finish(server, before, started)


def _start_facts(server: Server) -> dict[str, Any]:
    settings, rows = server.settings, server.given.rows
    return {
        "role": "peer",
        "protocol": "fedmod",
        "architecture": server.peer.model.config.model_type,
        "task": "sequence-classification",
        "dtype": "float32",
        "mechanism": "discrete Gaussian noise on the sketch; none on adapters" if settings.sketch else "none",
        "train_rows": len(rows.train),
        "validation_rows": len(rows.validation),
        "eval_rows": len(rows.held_out),
        "classes": rows.classes,
        "fingerprint": server.peer.fingerprint,
        "exchanged_parameters": server.peer.layout.size,
        "trainable_parameters": sum(p.numel() for p in server.trainer.parameters.values()),
    }


def _meet(server: Server) -> None:
    """Wait for peers, and say who is there."""
    reasons = server.peers.gather(server.settings.gather)
    for name, reason in sorted(reasons.items()):
        tell(f"peer {name}: not met: {reason}")
    for peer in server.peers.peers.values():
        if peer.met:
            alike = "no sketch" if peer.similarity is None else f"similarity {peer.similarity:+.2f}"
            tell(f"peer {peer.name}: {alike}{', tags ' + ', '.join(peer.tags) if peer.tags else ''}")
    known = {p.name: p.similarity for p in server.peers.peers.values() if p.met}
    server.log.write("peers", similarity=known, missing=reasons)


def _train(server: Server, until: int) -> None:
    trainer, began = server.trainer, time.monotonic()
    first, loss = trainer.step, server.trainer.run(until, server.stopped)
    seconds = time.monotonic() - began
    server.seconds["training"] += seconds
    if loss is not None:
        tell(f"step {trainer.step}/{trainer.total}  loss {loss:.3f}")
        server.log.write("train", step=trainer.step, loss=loss, steps=trainer.step - first, seconds=seconds)


def _publish(server: Server, done: int) -> None:
    """Book this adapter as a release of every row, then give it to whoever asks.

    Raises:
        BudgetError: it would go beyond the budget of a row.
    """
    if not server.settings.neighbours:
        return  # who asks nobody gives nothing
    server.ledger.charge(adapter_release(server.name, server.given.fingerprint, done))
    server.answers.publish(done, server.peer.vector())


def _exchange(server: Server, done: int) -> None:
    """Ask, mix, look, and keep what is good."""
    settings, layout = server.settings, server.peer.layout
    if not settings.neighbours:
        return
    rests = resting(settings, done - 1)
    part: say.Part = "all" if rests is None else ("B" if rests == "A" else "A")
    own, chosen = server.peer.vector(), layout.chosen(part)
    exchange = server.peers.exchange(done, part, own, chosen)
    server.seconds["exchange"] += exchange.seconds

    def blend(updates: Sequence[Update]) -> Mixed:
        return mix(
            own, server.peer.start, updates, layout, rows=len(server.given.rows.train), row_cap=settings.row_cap,
            norm_cap=settings.norm_cap, robust=settings.robust, chosen=chosen,
        )  # fmt: skip

    verdict = guarded_mix(own, exchange.updates, blend, server.loss_with, settings.guard)
    server.peer.put(verdict.mixed.vector)
    _tell_exchange(server, done, exchange, verdict)


def _tell_exchange(server: Server, done: int, exchange: Exchange, verdict: Verdict) -> None:
    words = ", ".join(f"{update.name} (round {update.round})" for update in exchange.updates) or "nobody"
    tell(f"round {done}: averaged with {words}; validation loss {verdict.before:.3f} -> {verdict.after:.3f}")
    for name in verdict.left_out:
        tell(f"round {done}: {name} left out: with its adapter the loss on validation rows rises too much")
    for name, reason in exchange.missing.items():
        tell(f"round {done}: {name} gave nothing: {reason}")
    server.log.write(
        "exchange", round=done, neighbours={u.name: u.round for u in exchange.updates}, missing=exchange.missing,
        weights=verdict.mixed.weights, capped=verdict.mixed.capped, left_out=verdict.left_out, before=verdict.before,
        after=verdict.after, aggregation_error=verdict.mixed.error, seconds=exchange.seconds,
    )  # fmt: skip


# ---- the end


def _eval(server: Server, when: str, step: int, offsets: torch.Tensor | None = None) -> Score | None:
    """Figures over the held-out rows, noted; None where there are none."""
    if not server.given.rows.held_out:
        return None
    found = server.figures("held_out", offsets)
    server.log.write("eval", step=step, when=when, rows=found.counted, **found.facts())
    tell(f"held out, {when}: {in_words(found)}")
    return found


def _finish(server: Server, before: Score | None, started: float) -> int:
    settings, rows = server.settings, server.given.rows
    if settings.neighbours:
        server.peers.finished(_TELL_S)
    offsets = _thresholds(server)
    after = _eval(server, "after", server.trainer.step)
    tuned = _eval(server, "after, own thresholds", server.trainer.step, offsets)
    server.run.keep_thresholds(offsets, server.given.label2id)
    save_adapter(server.peer.model, server.run.adapter, base_name=settings.model)
    local = _local_alone(server) if settings.compare_local and rows.held_out else (None, None)
    _linger(server)
    moved = {
        "bytes_sent": server.listening.bytes_sent + sum(p.link.bytes_sent for p in server.peers.peers.values()),
        "bytes_received": server.listening.bytes_received
        + sum(p.link.bytes_received for p in server.peers.peers.values()),
    }
    seconds = time.monotonic() - started
    server.log.write(
        "end", seconds=seconds, steps=server.trainer.step, peak_rss_bytes=peak_rss_bytes(), given=server.answers.given,
        **{f"{name}_seconds": value for name, value in server.seconds.items()}, **moved,
    )  # fmt: skip
    if server.stopped():
        return INTERRUPTED_EXIT_CODE
    scores = {"before": before, "local": local[0], "after": after, "local, own thresholds": local[1],
              "after, own thresholds": tuned}  # fmt: skip
    tell_end(settings, server.run, scores, {"seconds": seconds, **moved})
    return 0


def _thresholds(server: Server) -> torch.Tensor:
    size = server.settings.per_device_eval_batch_size
    return choose_offsets(*logits_of(server.peer.model, server.given.rows.validation, server.collator, size))


def _local_alone(server: Server) -> tuple[Score | None, Score | None]:
    """The figures of the same start, the same steps and the same batches, with nobody else's adapter mixed in."""
    trainer = LocalTrainer(server.peer, server.given.rows.train, server.settings, server.collator)
    kept = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    try:
        _load(trainer.parameters, server.head)
        trainer.run(trainer.total, server.stopped)
        if server.stopped():
            return None, None
        offsets = _thresholds(server)
        plain = _eval(server, "local", trainer.step)
        return plain, _eval(server, "local, own thresholds", trainer.step, offsets)
    finally:
        _load(trainer.parameters, kept)


def _load(parameters: Mapping[str, torch.nn.Parameter], values: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


def _linger(server: Server) -> None:
    """Serve those that have taken an adapter and are not finished, for a while."""
    deadline = time.monotonic() + server.settings.linger
    told = False
    while server.answers.waiting and time.monotonic() < deadline and not server.stopped():
        if not told:
            tell(f"finished; still serving {', '.join(sorted(server.answers.waiting))}")
            told = True
        time.sleep(0.1)
