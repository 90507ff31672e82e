"""Every run that a grid asks for, and where each stands among the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from splitfl.compare.grid import NONE, Grid, Mechanism, Protocol, Task
from splitfl.config_compare import CompareSettings
from splitfl.errors import UsageError, nearest, printable

REFERENCE = "full-lora"
"""LoRA on every layer of the whole model, by somebody who holds everything: what utility is compared with."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run."""

    data: str
    task: Task
    cut: str
    protocol: Protocol | None
    """None for the reference."""
    mechanism: Mechanism
    seed: int
    quick: bool = False

    @property
    def name(self) -> str:
        """Of its file."""
        protocol = REFERENCE if self.protocol is None else self.protocol.name
        parts = (self.data, self.cut.replace("+", "-"), protocol, self.mechanism.name, f"seed{self.seed}")
        return "_".join(parts)

    @property
    def design(self) -> str:
        """Protocol and mechanism, for people."""
        if self.protocol is None:
            return REFERENCE
        return self.protocol.name + ("" if self.mechanism.name == NONE else f", {self.mechanism.name}")

    @property
    def bottom(self) -> int:
        """Layers below the cut."""
        return int(self.cut.partition("+")[0])

    @property
    def top(self) -> int:
        """Layers above the cut."""
        return int(self.cut.partition("+")[2])

    @property
    def steps(self) -> int:
        """Training steps."""
        return self.task.quick_steps if self.quick else self.task.steps

    @property
    def rows(self) -> tuple[int, int]:
        """At most so many training and held-out rows."""
        train, held_out = self.task.quick_rows if self.quick else self.task.rows
        return train, held_out

    def digest(self, grid: Grid) -> str:
        """Of all that its figures depend on."""
        protocol = self.protocol
        parts: tuple[object, ...] = () if protocol is None else (protocol.use, dict(protocol.options))
        mechanism = (self.mechanism.size, dict(self.mechanism.options))
        told = grid.course
        course: list[object] = [told.parties, told.distil_steps, told.quick_distil_steps]
        audit = (told.records, told.knowledge, told.attacks)
        course += (told.quick_records, told.quick_knowledge, told.quick_attacks) if self.quick else audit
        return grid.digest(self.name, self.task, self.quick, course, *parts, *mechanism)


def plan_cells(grid: Grid, settings: CompareSettings) -> list[Cell]:
    """Every run that grid and settings ask for: seed by seed, then data set by data set, the reference first.

    Raises:
        UsageError: a name that the grid does not have, or no run left.
    """
    for option, names, known in (
        ("--data", settings.data, grid.data),
        ("--protocols", settings.protocols, grid.protocols),
        ("--mechanisms", settings.mechanisms, grid.mechanisms),
    ):
        for name in names:
            if name not in known:
                raise UsageError(f"{option} names {printable(name, 40)!r}.", hint=nearest(name, known))
    seeds = settings.seeds or (grid.course.quick_seeds if settings.quick else grid.course.seeds)
    cells = [cell for seed in dict.fromkeys(seeds) for cell in _of_seed(grid, settings, seed)]
    if all(cell.protocol is None for cell in cells):
        raise UsageError("Of this grid no run is left to compare.", hint="leave out a --protocols or --mechanisms")
    return cells


def _of_seed(grid: Grid, settings: CompareSettings, seed: int) -> Iterator[Cell]:
    for data, task in grid.data.items():
        if settings.data and data not in settings.data:
            continue
        for cut in task.cuts:
            common = {"data": data, "task": task, "cut": cut, "seed": seed, "quick": settings.quick}
            if cut == task.cuts[0]:  # it has no cut
                yield Cell(**common, protocol=None, mechanism=grid.mechanisms[NONE])  # type: ignore[arg-type]
            for protocol in grid.protocols.values():
                if settings.protocols and protocol.name not in settings.protocols:
                    continue
                if protocol.use.data and data not in protocol.use.data:
                    continue
                for name in protocol.use.mechanisms:
                    if not settings.mechanisms or name in settings.mechanisms:
                        mechanism = grid.mechanisms[name]
                        yield Cell(**common, protocol=protocol, mechanism=mechanism)  # type: ignore[arg-type]
