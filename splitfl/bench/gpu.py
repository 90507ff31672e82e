"""``splitfl bench gpu``: the trunk on one device, with the shapes of models of 1, 3 and 8 billion parameters.

For whoever has a card: nothing is downloaded, weights are random and made where they are used. Four things are measured
in one process for each shape, in turns:

- the *ceiling*: what the device makes of one large matrix product of the same type;
- the *bare loop*: forward and input gradient of the trunk's layers, called one after the other;
- the *owner*: the same through `model_owner.trunk`, as a server calls it;
- a LoRA step and a generation of the whole model, and of party and owner with the bytes of the wire between them.

What it leaves out: sockets and encryption (`splitfl bench split` and `pipeline` have them). ``--size toy`` runs on any
processor, and says nothing about a card.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from splitfl.bench.cases import BARE, BUSY, REACHES
from splitfl.bench.children import Child
from splitfl.bench.figures import Elsewhere
from splitfl.bench.gpu_orders import GpuMeasure, GpuMeasured, GpuStart
from splitfl.bench.orders import Ready
from splitfl.bench.table import print_table
from splitfl.bench.utility_course import UtilityCourse
from splitfl.config import BenchSettings
from splitfl.errors import UsageError, printable
from splitfl.metrics import Result, write_results


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama, but for its vocabulary, which is small: head and embeddings are the party's."""

    layers: int
    width: int
    inner: int
    heads: int
    key_heads: int
    rows: int
    """Of a training batch."""
    length: int
    matrix: int
    """Side of the matrices whose product is the ceiling."""


SHAPES = {
    "toy": Shape(layers=6, width=64, inner=128, heads=4, key_heads=2, rows=2, length=16, matrix=256),
    "1B": Shape(layers=16, width=2048, inner=8192, heads=32, key_heads=8, rows=8, length=512, matrix=8192),
    "3B": Shape(layers=28, width=3072, inner=8192, heads=24, key_heads=8, rows=8, length=512, matrix=8192),
    "8B": Shape(layers=32, width=4096, inner=14336, heads=32, key_heads=8, rows=8, length=512, matrix=8192),
}


def bench_gpu(settings: BenchSettings) -> None:
    """Measure, print the table, and write the figures.

    Raises:
        UsageError: no such shape.
        ResourceError, UnreachableError: the measured process ended, or hangs.
    """
    for name in settings.size:
        if name not in SHAPES:
            raise UsageError(f"There is no shape {printable(name, 40)!r}.", expected=", ".join(SHAPES))
    results: list[Result] = []
    with (
        tempfile.TemporaryDirectory(prefix="splitfl-gpu-") as temporary,
        UtilityCourse(len(settings.size), "bench gpu") as course,
    ):
        course.begin()
        for name in dict.fromkeys(settings.size):
            found = measure(settings, name, Path(temporary) / f"{name}.log")
            results += found
            if settings.json is not None:
                write_results(settings.json, "bench", settings, results)
            course.done(name, in_words(found))
    print_table(results)


def measure(settings: BenchSettings, name: str, log: Path) -> list[Result]:
    """The figures of one shape."""
    shape, threads = SHAPES[name], settings.threads[0] if settings.threads else 1
    start = GpuStart(
        layers=shape.layers, width=shape.width, inner=shape.inner, heads=shape.heads, key_heads=shape.key_heads,
        dtype=settings.dtype, device=settings.device, threads=threads,
        party_device="cpu" if settings.party_device == "cpu" else settings.device,
    )  # fmt: skip
    order = GpuMeasure(
        rows=shape.rows, length=shape.length, steps=settings.steps, new_tokens=settings.new_tokens, matrix=shape.matrix
    )
    words = ["splitfl.bench.gpu_side", msgspec.json.encode(start).decode()]
    with Child("measured process", words, threads=threads, log=log) as side:
        side.ready(Ready)
        elsewhere = Elsewhere(side.cpu_seconds)
        measured = side.ask(order, GpuMeasured)
        busy = elsewhere.cores()
    case = f"gpu, {name} on {settings.device}, {settings.dtype}, {shape.rows}x{shape.length}"
    return [*_figures(case, measured, shape), Result(case=case, metric=BUSY, value=busy, unit="cores")]


def _figures(case: str, m: GpuMeasured, shape: Shape) -> Iterator[Result]:
    tokens = shape.rows * shape.length
    aimed = None if shape is SHAPES["toy"] else REACHES[BARE].bound  # a toy's layers take less than Python does

    def figure(
        metric: str, value: float, unit: str, reference: float | None = None, reach: float | None = None
    ) -> Result:
        ratio = None if not reference else value / reference
        return Result(case=case, metric=metric, value=value, unit=unit, reference=reference, ratio=ratio, reach=reach)

    yield figure("parameters of the trunk", m.parameters, "")
    yield figure("matrix product", m.ceiling / 1e9, "GFLOP/s")
    yield figure("owner's arithmetic", m.flops / m.owner_s / 1e9, "GFLOP/s", m.ceiling / 1e9)
    yield figure(BARE, tokens / m.owner_s, "tokens/s", tokens / m.bare_s, aimed)
    yield figure("training step", tokens / m.split_step_s, "tokens/s", tokens / m.whole_step_s)
    yield figure("bytes of a step", m.step_bytes, "bytes")
    yield figure("generation", m.new_tokens / m.split_text_s, "tokens/s", m.new_tokens / m.whole_text_s)
    yield figure("loss difference, relative", m.loss_difference, "")
    yield figure("equal tokens", m.equal_tokens, "tokens", m.new_tokens)


def in_words(results: list[Result]) -> str:
    """The main figures, in one line."""
    shown = ("owner's arithmetic", BARE, "training step", "generation")
    return ", ".join(f"{r.metric} {r.ratio:.3f}" for r in results if r.metric in shown and r.ratio)
