"""What `splitfl bench split` measures: one case each, what it should cost in bytes, and what is aimed at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from splitfl.bench.sizes import BOTTOM, TOP, VOCABULARY, Size, size_named
from splitfl.config import BenchSettings
from splitfl.errors import UsageError
from splitfl.metrics import Result
from splitfl.options.values import parse_shape
from splitfl.wire.messages import BYTES_PER_ELEMENT

WARM_UP = 2  # steps and generations before the clock counts
CUT_TENSORS_A_STEP = 4  # hidden up and down, gradient up and down
BATCHES = (1, 4)  # rows that generate together
PROMPT = 32  # tokens
START_S = 20.0  # of the processes of a case; like the next three, a guess for the time left
_FLOPS, _WEIGHT_BYTES_A_SECOND, _TOKEN_OVERHEAD_S = 1e11, 1e10, 5e-3

# dtype -> bytes that autograd keeps of a layer for each unit of its width, copies of the float32 logits at the peak.
KEPT: dict[str, tuple[float, int]] = {"float32": (61.0, 6), "bfloat16": (41.0, 5), "float16": (41.0, 5)}

Work: TypeAlias = Literal["train", "generate"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison: these processes, with this many threads, on this shape."""

    work: Work
    size: Size
    rows: int
    length: int
    """Of a training row; for generation, prompt and new tokens together."""
    threads: int
    """A side: the monolith, the party and the owner each have this many."""
    dtype: str
    """Of the computation and on the wire."""

    @property
    def name(self) -> str:
        """How results and tables call it."""
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        shape = f"{self.rows}x{self.length}" if self.work == "train" else f"batch {self.rows}"
        return f"{self.work} {self.size.name} {shape} {self.dtype} {threads}"

    @property
    def stem(self) -> str:
        """The name as part of a file's."""
        return self.name.replace(" ", "-")

    @property
    def new_tokens(self) -> int:
        """Tokens that one generation writes for each row."""
        return self.length - PROMPT

    def seconds(self) -> float:
        """Rough time of one repetition of both sides, only for the time that is left: the proportions count."""
        threads = min(self.threads, 2)
        if self.work == "train":  # forward, and backward to the inputs
            return 2 * 4 * self.size.parameters * self.rows * self.length / (_FLOPS * threads)
        token = BYTES_PER_ELEMENT[self.dtype] * self.size.parameters / (_WEIGHT_BYTES_A_SECOND * threads)
        return 2 * self.new_tokens * (token + _TOKEN_OVERHEAD_S)

    def bytes_a_step(self) -> int:
        """Cut tensors of one training step, at the wire's dtype: ``4 x rows x length x width x bytes an element``."""
        element = BYTES_PER_ELEMENT[self.dtype]
        return CUT_TENSORS_A_STEP * self.rows * self.length * self.size.width * element

    def step_memory(self) -> int:
        """Bytes that a step takes at the party, beyond the loaded model: ``rows x length x (4 x kept x width + copies
        x 4 x vocabulary)``; see docs/performance.md for `kept` (bytes a unit of width and layer, Llama-like) and
        `copies` of the logits.
        """
        kept, copies = KEPT[self.dtype]
        layers = BOTTOM + TOP
        return round(self.rows * self.length * (layers * kept * self.size.width + copies * 4 * VOCABULARY))

    def bytes_a_generation(self) -> int:
        """Hidden states of one generation, up and down; the last new token is never sent."""
        return 2 * self.rows * (self.length - 1) * self.size.width * BYTES_PER_ELEMENT[self.dtype]


def plan_cases(settings: BenchSettings, cores: int) -> list[Case]:
    """Every case that the settings ask for, small ones first.

    Args:
        settings: of the command.
        cores: of this machine; where `--threads` names none, 1 is measured, and 2 if there are as many cores.

    Raises:
        UsageError: a model or a shape that cannot be measured.
    """
    threads = settings.threads or ((1, 2) if cores >= 2 else (1,))
    cases = []
    for size in map(size_named, dict.fromkeys(settings.models)):
        for count in dict.fromkeys(threads):
            for work, rows, length in _shapes(settings):
                if length > size.longest:
                    raise UsageError(
                        f"A row of {length} tokens is too long for the models of this benchmark.",
                        expected=f"at most {size.longest}",
                    )
                case = Case(work=work, size=size, rows=rows, length=length, threads=count, dtype=settings.dtype)
                cases.append(case)
    return cases


def _shapes(settings: BenchSettings) -> list[tuple[Work, int, int]]:
    wanted: list[tuple[Work, int, int]] = []
    if settings.work != "generate":
        wanted += [("train", *parse_shape(shape)) for shape in dict.fromkeys(settings.shapes)]
    if settings.work != "train":
        wanted += [("generate", rows, PROMPT + settings.new_tokens) for rows in BATCHES]
    return wanted


# ---- what is aimed at


@dataclass(frozen=True, kw_only=True)
class Reach:
    """A bound on the ratio of a figure to its reference."""

    bound: float
    at_least: bool = False
    sizes: tuple[str, ...] = ("S", "M", "L")

    def met(self, ratio: float) -> bool:
        """Whether `ratio` is within the bound."""
        return ratio >= self.bound if self.at_least else ratio <= self.bound


STEP, BYTES, PARTY_MEMORY, RATE = "step time", "bytes a step", "peak memory of the party", "generation rate"
PIPELINED, OWN = "pipelined step time", "pipelined step, beside the slower side's own work"
OPTIMUM, BESIDE_PLAIN, GRADFREE = "rate beside the optimum", "rate beside the plain step", "rate with kept replies"
DRAFTED = "rate beside one token a pass"
BARE = "owner beside a bare loop"
SLOW_LINK_MS = 80.0  # round trips for which a gain over the plain step is aimed at
STEP_MEMORY = "memory of a step, party"
BUSY = "cores busy elsewhere"

REACHES: dict[str, Reach] = {
    STEP: Reach(bound=1.05, sizes=("M", "L")),
    BYTES: Reach(bound=1.01),
    PARTY_MEMORY: Reach(bound=0.45, sizes=("L",)),
    RATE: Reach(bound=0.85, at_least=True),
    PIPELINED: Reach(bound=1.02, sizes=("M", "L")),  # two threads a side
    OWN: Reach(bound=1.05, sizes=("M", "L")),  # one thread a side
    OPTIMUM: Reach(bound=0.85, at_least=True),
    BESIDE_PLAIN: Reach(bound=2.0, at_least=True),  # at the slowest round trip
    GRADFREE: Reach(bound=0.95, at_least=True),
    BARE: Reach(bound=0.85, at_least=True),  # on a card
    DRAFTED: Reach(bound=2.5, at_least=True),  # guesses of an emulator, at the slowest round trip
}


def reach_of(metric: str, size: Size) -> float | None:
    """What is aimed at for a metric at a size, as a ratio to the reference; None where nothing is."""
    reach = REACHES.get(metric)
    return reach.bound if reach is not None and size.name in reach.sizes else None


def verdict(result: Result) -> str:
    """``met``, ``missed``, or nothing where nothing is aimed at."""
    if result.reach is None or result.ratio is None:
        return ""
    return "met" if REACHES[result.metric].met(result.ratio) else "missed"
