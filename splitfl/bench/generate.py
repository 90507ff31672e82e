"""``splitfl bench generate``: tokens a second with guesses that the trunk looks at together, and without.

The embedded model; an owner that is `splitfl serve`; a party behind the plain loopback, and behind a relay that delays
(`splitfl.bench.slow_link`). The emulator that guesses is made by `splitfl emulator` on the embedded training questions,
the prompts are questions that were held out. Ways take turns, and every way must write what the plain one writes.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from splitfl.bench.cases import BUSY, DRAFTED, REACHES, SLOW_LINK_MS
from splitfl.bench.children import Child, run_to_end
from splitfl.bench.figures import Elsewhere
from splitfl.bench.generate_orders import TextWritten, WriterStart, WriteText
from splitfl.bench.link import Setting, checked
from splitfl.bench.orders import Ready
from splitfl.bench.served import BOTTOM, TOP, Home, Served, assets, furnish
from splitfl.bench.slow_link import LinkStart, slow_link
from splitfl.bench.table import print_table
from splitfl.bench.utility_course import UtilityCourse
from splitfl.config import BenchSettings
from splitfl.errors import InternalError
from splitfl.metrics import Result, write_results

PROMPTS, REPETITIONS, MBIT = 3, 3, 1000.0
KEEP, DISTIL_STEPS, LONGEST = 4, 400, 96
_EMULATOR_LIMIT_S = 3600.0
_PARTY = "hospital"


@dataclass(frozen=True, kw_only=True)
class Way:
    """How tokens are written."""

    draft: str | None = None
    guesses: int = 0

    @property
    def name(self) -> str:
        """How results call it."""
        return "one token a pass" if self.draft is None else f"{self.draft}, {self.guesses} guesses"


def bench_generate(settings: BenchSettings) -> None:
    """Measure, print the table, and write the figures.

    Raises:
        InternalError: a way wrote something else than the plain one.
        ResourceError, UnreachableError: a side ended, hangs, or the relay is off.
    """
    ways = [Way(), *(Way(draft=draft, guesses=n) for draft in ("emulator", "ends") for n in settings.guesses)]
    links: list[Setting | None] = [None, *(Setting(rtt_ms=rtt, mbit=MBIT) for rtt in settings.rtt)]
    if settings.quick:
        ways, links = ways[:2], links[:1]
    results: list[Result] = []
    with (
        tempfile.TemporaryDirectory(prefix="splitfl-generate-") as temporary,
        UtilityCourse(len(links), "bench generate") as course,
    ):
        home = with_float32(furnish(Path(temporary), [_PARTY]))
        emulator = prepare_emulator(settings, home)
        with Served(home, "owner") as owner:
            course.begin()
            for link in links:
                found = measure(settings, home, emulator, owner, link, ways)
                results += found
                if settings.json is not None:
                    write_results(settings.json, "bench", settings, results)
                course.done(found[0].case, in_words(found))
    print_table(results)


def with_float32(home: Home) -> Home:
    """The same with a kit in float32: in bfloat16 two tokens are often equally likely, and ways could not be compared.

    Raises:
        ResourceError: the kit could not be written.
    """
    kit = home.logs / "kit-float32"
    cut = ["--bottom", str(BOTTOM), "--top", str(TOP), "--dtype", "float32", "--no-verify"]
    run_to_end(["splitfl", "kit", str(kit), "--model", str(home.model), *cut], log=home.logs / "kit.log")
    return replace(home, kit=kit)


def prepare_emulator(settings: BenchSettings, home: Home) -> Path:
    """The emulator: made now, or kept in ``--cache`` from an earlier time.

    Raises:
        ResourceError: it could not be made.
    """
    steps = (0 if settings.quick else DISTIL_STEPS) if settings.distil_steps is None else settings.distil_steps
    keep = settings.keep or KEEP
    path = (settings.cache or home.logs).resolve() / f"emulator-{keep}-{steps}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        words = [
            "splitfl",
            "emulator",
            str(path),
            "--model",
            str(home.model),
            "--kit",
            str(home.kit),
            "--keep",
            str(keep),
        ]
        if steps:
            words += ["--text", str(assets() / "data" / "clinic.train.jsonl"), "--max-length", str(LONGEST)]
            words += ["--distil-steps", str(steps), "--learning-rate", "1e-3", "--batch-size", "4"]
        run_to_end(words, log=home.logs / "emulator.log", limit_s=_EMULATOR_LIMIT_S)
    return path


def measure(
    settings: BenchSettings, home: Home, emulator: Path, owner: Served, link: Setting | None, ways: Sequence[Way]
) -> list[Result]:
    """The figures of every way over one link.

    Raises:
        InternalError: a way wrote something else than the plain one.
    """
    prompts, tokens = (1, 8) if settings.quick else (PROMPTS, settings.new_tokens)
    repetitions = 1 if settings.quick else REPETITIONS
    with _writer(home, emulator, owner, link) as writer:
        for way in ways:  # once for warmth
            writer.ask(_order(way, 1, min(tokens, 8)), TextWritten)
        elsewhere = Elsewhere(lambda: writer.cpu_seconds() + owner.cpu_seconds())
        turns = []
        for turn in range(repetitions):
            order = ways if turn % 2 == 0 else ways[::-1]
            turns.append({way: writer.ask(_order(way, prompts, tokens), TextWritten) for way in order})
        busy = elsewhere.cores()
    name = "generate, loopback" if link is None else f"generate, {link.name}"
    results = [result for way in ways for result in _figures(name, way, [(t[ways[0]], t[way]) for t in turns], link)]
    results.append(Result(case=name, metric=BUSY, value=busy, unit="cores"))
    return results


def _figures(
    name: str, way: Way, pairs: Sequence[tuple[TextWritten, TextWritten]], link: Setting | None
) -> Iterator[Result]:
    case = f"{name}, {way.name}"
    for plain, other in pairs:
        if other.tokens != plain.tokens:
            raise InternalError(
                f"{case}: another text was written than one token at a time.",
                hint="two tokens may have been equally likely within rounding; please report it if it happens again",
            )
    written = [sum(map(len, other.tokens)) for _, other in pairs]
    rate = statistics.median(count / other.seconds for count, (_, other) in zip(written, pairs, strict=True))
    last, new = pairs[-1][1], written[-1]
    if way.draft is None:
        yield Result(case=case, metric="rate", value=rate, unit="tokens/s")
    else:
        before = statistics.median(new / plain.seconds for plain, _ in pairs)
        gain = statistics.median(plain.seconds / other.seconds for plain, other in pairs)
        aimed = way.draft == "emulator" and link is not None and link.rtt_ms >= SLOW_LINK_MS
        reach = REACHES[DRAFTED].bound if aimed else None
        yield Result(case=case, metric=DRAFTED, value=rate, unit="tokens/s", reference=before, ratio=gain, reach=reach)
        yield Result(case=case, metric="guesses kept", value=last.kept / max(last.guessed, 1), unit="share")
    yield Result(case=case, metric="round trips a token", value=last.passes / new, unit="")
    yield Result(case=case, metric="bytes a token", value=(last.sent + last.received) / new, unit="bytes")


def _order(way: Way, prompts: int, tokens: int) -> WriteText:
    return WriteText(prompts=prompts, new_tokens=tokens, draft=way.draft, guesses=way.guesses)


@contextmanager
def _writer(home: Home, emulator: Path, owner: Served, link: Setting | None) -> Iterator[Child]:
    if link is None:
        with _open(home, emulator, owner.address) as writer:
            yield writer
        return
    checked(link, home.logs / "relay.log")
    start = LinkStart(target=owner.address, rtt_ms=link.rtt_ms, mbit=link.mbit)
    with slow_link(start, home.logs / "relay.log") as address, _open(home, emulator, address) as writer:
        yield writer


@contextmanager
def _open(home: Home, emulator: Path, address: str) -> Iterator[Child]:
    start = WriterStart(
        kit=str(home.kit),
        emulator=str(emulator),
        owner=address,
        owner_key=str(home.keys / "owner.key"),
        key=str(home.keys / f"{_PARTY}.key_secret"),
        prompts=str(assets() / "data" / "clinic.held.jsonl"),
        threads=1,
    )
    words = ["splitfl.bench.generate_side", msgspec.json.encode(start).decode()]
    with Child("party", words, threads=1, log=home.logs / "party.log") as writer:
        writer.ready(Ready)
        yield writer


def in_words(results: Sequence[Result]) -> str:
    """The main figures of a link, in one line."""
    shown = [r for r in results if r.metric == DRAFTED and r.ratio]
    return ", ".join(f"{r.case.split(', ', 2)[2]} {r.ratio:.2f}x" for r in shown)
