"""The options of `splitfl bench offsite`, and which option belongs to which benchmark of the one command."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated

from splitfl.bench.chaos_settings import ChaosSettings
from splitfl.bench.frameworks_settings import FrameworksSettings
from splitfl.bench.generate_settings import GenerateBenchSettings
from splitfl.bench.gpu_settings import GpuSettings
from splitfl.bench.pipeline_settings import PipelineSettings
from splitfl.bench.rules_settings import RulesSettings
from splitfl.bench.serving_settings import ServingSettings
from splitfl.bench.utility_settings import UtilitySettings
from splitfl.config_common import NOT_EMPTY, Device
from splitfl.errors import UsageError
from splitfl.options import Panel, at_least

OFFSITE = Panel("splitfl bench offsite")
_RUNS = ("split", "utility", "offsite", "rules")
_STEPS = ("pipeline", "link")
BENCHMARKS = (
    *_RUNS,
    "aggregation",
    "rounds",
    "frameworks",
    "audit",
    "chaos",
    "soak",
    "hostile",
    *_STEPS,
    "serving",
    "generate",
    "gpu",
)
_SHARED = {
    "name": BENCHMARKS, "json": BENCHMARKS, "resume": (*_RUNS, "chaos", "serving"),
    "cache": ("split", "offsite", *_STEPS, "generate"),
    "tasks": ("utility", "offsite", "rules"), "seeds": ("utility", "offsite", "rules", "chaos", "soak"),
    "max_steps": ("utility", "offsite"), **dict.fromkeys(("rounds", "local_steps"), ("rules", "frameworks")),
    "quick": tuple(name for name in BENCHMARKS[1:] if name not in ("soak", "gpu")),
    "steps": ("split", "aggregation", "rounds", *_STEPS, "gpu"),
    "minutes": ("soak",), "runs": ("chaos",), **dict.fromkeys(("models", "shapes"), ("split", "pipeline")),
    "threads": ("split", "pipeline", "gpu"),
    "dtype": ("split", *_STEPS, "gpu"), "micro_batches": _STEPS, "mbit": ("link",), "rtt": ("link", "generate"),
    "new_tokens": ("split", "generate", "gpu"), "device": ("offsite", "gpu"), "guesses": ("generate",),
    **dict.fromkeys(("keep", "distil_steps"), ("offsite", "generate")),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class OffsiteSettings(
    UtilitySettings,
    RulesSettings,
    FrameworksSettings,
    ChaosSettings,
    PipelineSettings,
    ServingSettings,
    GenerateBenchSettings,
    GpuSettings,
):
    """Which models and emulators the five ways are compared with."""

    model: Annotated[tuple[str, ...], "embedded, a model directory, or NAME=DIRECTORY. May be repeated. Default: "
                     "embedded.", NOT_EMPTY, OFFSITE] = ()  # fmt: skip
    keep: Annotated[int | None, "Layers of the trunk that the emulator keeps. Default: half.", at_least(1), OFFSITE] = (
        None
    )
    distil_steps: Annotated[
        int | None, "Steps of distillation of the emulator. Default: 400.", at_least(0), OFFSITE
    ] = None
    device: Device = "cpu"

    def check(self) -> None:
        """Refuse options of one benchmark with another, which would not look at them."""
        name = getattr(self, "name", "offsite")
        for field in fields(self):
            of = benchmarks_of(field.name)
            if name not in BENCHMARKS or name in of or getattr(self, field.name) == field.default:
                continue
            flag = "--" + field.name.replace("_", "-")
            raise UsageError(f"{flag} has no effect with this benchmark.", expected=f"splitfl bench {' or '.join(of)}")


def benchmarks_of(option: str) -> tuple[str, ...]:
    """The benchmarks that look at an option."""
    if option in _SHARED:
        return _SHARED[option]
    own = (
        (ChaosSettings, "hostile"),
        (ServingSettings, "serving"),
        (GpuSettings, "gpu"),
        (PipelineSettings, "link"),
        (UtilitySettings, "utility"),
        (RulesSettings, "rules"),
        (FrameworksSettings, "frameworks"),
    )
    for settings, name in own:
        if option in {field.name for field in fields(settings)}:
            return (name,)
    return ("offsite",) if option in {field.name for field in fields(OffsiteSettings)} else ("split",)
