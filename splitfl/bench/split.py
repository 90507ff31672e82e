"""``splitfl bench split``: plain PEFT in one process against the split over loopback TCP with CURVE, in turns.

Three processes stand ready for a case: the monolith, a party and an owner (`splitfl serve`, with keys). They take turns
step by step, and who goes first changes each time, so a machine that slows down or warms up slows both. Nothing here
computes: this process asks, waits and compares.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np

from splitfl.bench.agreement import SameText, compare_losses, compare_texts
from splitfl.bench.cases import BUSY, BYTES, PARTY_MEMORY, PROMPT, RATE, STEP, WARM_UP, Case
from splitfl.bench.children import Child, Owner, run_to_end
from splitfl.bench.figures import Elsewhere, Figures, loopback_bytes
from splitfl.bench.orders import Generate, Generated, Held, MonolithStart, PartyStart, Peak, Ready, Step, Stepped
from splitfl.bench.sizes import BOTTOM, TOP, Size
from splitfl.errors import InternalError
from splitfl.metrics import Result
from splitfl.wire.keys import AllowList, new_keys
from splitfl.wire.messages import CodingName

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Sides:
    """The processes of one case."""

    owner: Owner
    party: Child
    monolith: Child

    def cpu_seconds(self) -> float:
        """Processor time of all three."""
        return sum(child.cpu_seconds() for child in (self.owner, self.party, self.monolith))


@dataclass(frozen=True, kw_only=True)
class Files:
    """Where the checkpoint and the kit of a size are."""

    model: Path
    kit: Path


def prepare(size: Size, dtype: str, cache: Path, work: Path) -> Files:
    """Write the checkpoint of a size and cut a kit from it, unless that has been done.

    Args:
        size: the model.
        dtype: of its weights.
        cache: for the checkpoint, which may be there from an earlier run.
        work: for the kit, always one of this run, and for what the two commands say.
    """
    files = Files(model=cache / f"{size.name}-{dtype}", kit=work / f"{size.name}-{dtype}-kit")
    log = work / f"prepare-{size.name}.log"
    if not files.model.is_dir():
        run_to_end(["splitfl.bench.checkpoint", size.name, dtype, str(files.model)], log=log)
    if not files.kit.is_dir():
        # What `--verify` would check, every case checks again: losses and tokens against the unsplit model.
        cut = ["--bottom", str(BOTTOM), "--top", str(TOP), "--dtype", dtype, "--no-verify"]
        run_to_end(["splitfl", "kit", str(files.kit), "--model", str(files.model), *cut], log=log)
    return files


def prepare_keys(folder: Path) -> None:
    """A pair for the owner and one for the party, and the owner's allow-list."""
    new_keys("owner", folder)
    public, _ = new_keys("party", folder)
    AllowList(folder / "parties").add(public)


@contextmanager
def open_owner(case: Case, files: Files, keys: Path, logs: Path) -> Iterator[Owner]:
    """Start the owner of a case."""
    serve = ["--model", str(files.model), "--kit", str(files.kit), "--bind", "tcp://127.0.0.1:0"]
    serve += ["--key", str(keys / "owner.key_secret"), "--parties", str(keys / "parties"), "--dtype", case.dtype]
    with Owner(serve, threads=case.threads, log=logs / f"{case.stem}-owner.log") as owner:
        yield owner


@contextmanager
def open_party(
    case: Case, files: Files, keys: Path, logs: Path, address: str, coding: CodingName = "raw"
) -> Iterator[Child]:
    """Start a party of a case, which reaches its owner at `address`."""
    start = PartyStart(
        kit=str(files.kit),
        owner=address,
        owner_key=str(keys / "owner.key"),
        key=str(keys / "party.key_secret"),
        dtype=case.dtype,
        threads=case.threads,
        coding=coding,
    )
    with _side("party", start, case.threads, logs / f"{case.stem}-party.log") as party:
        yield party


@contextmanager
def open_sides(case: Case, files: Files, keys: Path, logs: Path) -> Iterator[Sides]:
    """Start the three processes, with the model loaded in each; end them afterwards."""
    with ExitStack() as stack:
        owner = stack.enter_context(open_owner(case, files, keys, logs))
        whole = MonolithStart(checkpoint=str(files.model), kit=str(files.kit), dtype=case.dtype, threads=case.threads)
        monolith = stack.enter_context(_side("monolith", whole, case.threads, logs / f"{case.stem}-monolith.log"))
        party = stack.enter_context(open_party(case, files, keys, logs, owner.address()))
        ours, theirs = party.ready(Ready).trainable, monolith.ready(Ready).trainable
        if ours != theirs:
            raise InternalError(f"The party trains {ours} parameters, the monolith {theirs}: not the same work.")
        yield Sides(owner=owner, party=party, monolith=monolith)


def _side(name: str, start: MonolithStart | PartyStart, threads: int, log: Path) -> Child:
    words = [f"splitfl.bench.{name}_side", msgspec.json.encode(start).decode()]
    return Child(name, words, threads=threads, log=log)


def measure(case: Case, sides: Sides, steps: int, folder: Path, done: Callable[[], None]) -> list[Result]:
    """Measure one case.

    Args:
        case: what to measure.
        sides: its processes.
        steps: repetitions that count.
        folder: for what the sides hand over in files.
        done: called after each repetition, the warm-up included.

    Raises:
        Disagreement: the two sides did not compute the same.
        ResourceError, UnreachableError: a side ended, or hangs.
    """
    if case.work == "train":
        return _measure_training(case, sides, steps, done)
    return _measure_generation(case, sides, steps, folder, done)


def in_turns(
    monolith: Callable[[], T], split: Callable[[], T], steps: int, done: Callable[[], None]
) -> list[tuple[T, T]]:
    """Pairs of one repetition of each, the warm-up included; which of the two goes first changes each time."""
    pairs = []
    for number in range(WARM_UP + steps):
        if number % 2:
            cut = split()
            pairs.append((monolith(), cut))
        else:
            pairs.append((monolith(), split()))
        done()
    return pairs


def _measure_training(case: Case, sides: Sides, steps: int, done: Callable[[], None]) -> list[Result]:
    order = Step(rows=case.rows, length=case.length)
    loopback: list[int] = []

    def split_step() -> Stepped:
        before = loopback_bytes()
        answer = sides.party.ask(order, Stepped)
        loopback.append(loopback_bytes() - before)
        return answer

    elsewhere = Elsewhere(sides.cpu_seconds)
    pairs = in_turns(lambda: sides.monolith.ask(order, Stepped), split_step, steps, done)
    busy = elsewhere.cores()
    difference = compare_losses([whole.loss for whole, _ in pairs], [cut.loss for _, cut in pairs], case.dtype)
    whole_held, party_held = (side.ask(Peak(), Held).peak_rss for side in (sides.monolith, sides.party))
    counted = pairs[WARM_UP:]
    figures = Figures(case)
    figures.add_times(STEP, "ms", [(1000 * whole.seconds, 1000 * cut.seconds) for whole, cut in counted])
    figures.add(BYTES, statistics.median(cut.sent + cut.received for _, cut in counted), "bytes", case.bytes_a_step())
    if any(loopback):
        moved = statistics.median(loopback[WARM_UP:])
        figures.add("on the loopback interface", moved, "bytes", case.bytes_a_step())
    figures.add(PARTY_MEMORY, party_held, "bytes", whole_held)
    figures.add("peak memory of the owner", sides.owner.peak_rss(), "bytes", whole_held)
    figures.add("loss difference, relative", difference, "")
    figures.add(BUSY, busy, "cores")
    return figures.results


def _measure_generation(case: Case, sides: Sides, steps: int, folder: Path, done: Callable[[], None]) -> list[Result]:
    same = _compare_generation(case, sides, folder)
    order = Generate(rows=case.rows, prompt=PROMPT, new_tokens=case.new_tokens)
    elsewhere = Elsewhere(sides.cpu_seconds)
    pairs = in_turns(
        lambda: sides.monolith.ask(order, Generated), lambda: sides.party.ask(order, Generated), steps, done
    )
    busy = elsewhere.cores()
    counted = pairs[WARM_UP:]
    tokens = case.rows * case.new_tokens
    figures = Figures(case)
    figures.add_times(RATE, "tokens/s", [(tokens / whole.seconds, tokens / cut.seconds) for whole, cut in counted])
    moved = statistics.median(cut.sent + cut.received for _, cut in counted)
    figures.add("bytes a generation", moved, "bytes", case.bytes_a_generation())
    figures.add("equal tokens", same.equal, "tokens", same.total)
    figures.add("logit difference", same.logit_difference, "std")
    figures.add(BUSY, busy, "cores")
    return figures.results


def _compare_generation(case: Case, sides: Sides, folder: Path) -> SameText:
    """One generation of each side that is not timed, with every logit."""
    tokens, logits = [], []
    for side in (sides.monolith, sides.party):
        file = folder / f"{side.name}-logits.npy"
        order = Generate(rows=case.rows, prompt=PROMPT, new_tokens=case.new_tokens, logits=str(file))
        tokens.append(side.ask(order, Generated).tokens)
        logits.append(np.load(file))
        file.unlink()
    return compare_texts(tokens[0], tokens[1], logits[0], logits[1], case.dtype)
