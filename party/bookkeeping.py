"""The book of a run: every send of private rows as a release in the ledger, booked before the bytes leave.

Which rows a tensor comes from is known here (`party.protect.BatchRows`); what the ledger stores of them is a keyed hash
of a row's number, or of its person. One `Book` serves one run against one owner.
"""

from __future__ import annotations

import itertools
import math
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from splitfl.errors import printable
from splitfl.files import replace_text
from splitfl.privacy.ledger import Ledger, Release
from splitfl.privacy.mechanisms import Gauss, GradientGauss, Mechanism

if TYPE_CHECKING:
    from party.protect import BatchRows

ADVERSARY = "owner"


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """What the book must know of one file of rows."""

    fingerprint: str
    label: str
    """Name of the file, for people."""
    units: Sequence[str]
    """For each example, whose it is: the number of its row, or its person."""
    unit: Literal["row", "person"] = "row"


@dataclass(kw_only=True)
class Book:
    """Books releases of one run.

    Args:
        ledger: where.
        run: name of the run, for people.
        datasets: by fingerprint.
    """

    ledger: Ledger
    run: str
    datasets: dict[str, DataSet]
    _start: str = field(default_factory=lambda: secrets.token_hex(16))
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def __enter__(self) -> Book:
        return self

    def __exit__(self, *_: object) -> None:
        self.ledger.close()

    def charge(
        self, channel: str, mechanism: Mechanism | None, batch: BatchRows | None, *, formal: bool,
        release_id: str | None = None, pieces: int = 1, before: str | None = None,
    ) -> list[str]:  # fmt: skip
        """Book one release; on disk when this returns.

        Args:
            channel: ``activations``, ``gradients`` or ``labels``.
            mechanism: what was done to the tensor.
            batch: the rows it comes from; None if unknown, which counts for every row of every data set of the run.
            formal: whether the mechanism's noise bounds what the tensor tells about a row.
            release_id: the same for the same bytes; a fresh one where nothing is ever sent again.
            pieces: sends of the same rows that are booked as one.
            before: name of what was done to the tensor before the mechanism.

        Returns:
            What `confirm` takes once an answer has come.

        Raises:
            BudgetError: it would go beyond a budget; nothing was booked.
        """
        booked = []
        chosen = [self.datasets[batch.dataset]] if batch is not None else list(self.datasets.values())
        for data in chosen:
            name = f"{release_id or f'{self._start}:{next(self._numbers)}'}:{data.fingerprint[:16]}"
            rows = None if batch is None else batch.rows
            release = self._release(name, data, channel, mechanism, rows, formal=formal, pieces=pieces, before=before)
            self.ledger.charge(release)
            booked.append(name)
        return booked

    def charge_labels(self, dataset: str, epsilon: float) -> None:
        """Book randomised response on the labels of a data set: once a run, however often it is resumed.

        Pure epsilon is zCDP with rho = epsilon^2 / 2 (Bun and Steinke 2016, proposition 1.4).

        Raises:
            BudgetError: it would go beyond a budget; nothing was booked.
        """
        data = self.datasets[dataset]
        self.ledger.charge(
            Release(
                release_id=f"labels:{self.run}:{data.fingerprint[:16]}",
                dataset=data.fingerprint,
                unit=data.unit,
                units=None,
                channel="labels",
                mechanism=f"randomised response, epsilon {epsilon:g}",
                sensitivity=None,
                sigma=None,
                rho=epsilon**2 / 2 * max(Counter(data.units).values()),
                adversary=ADVERSARY,
                run=self.run,
            )
        )

    def confirm(self, booked: Sequence[str]) -> None:
        """Note that an answer came."""
        for name in booked:
            self.ledger.confirm(name)

    def check(self, channel: str, mechanism: Mechanism | None, dataset: str, times: int, *, formal: bool) -> None:
        """Whether a whole run fits that sends each row of a data set `times` times; books nothing.

        Raises:
            BudgetError: it does not; says what would.
        """
        data = self.datasets[dataset]
        release = self._release("planned", data, channel, mechanism, range(len(data.units)), formal=formal)
        self.ledger.check(release, times)

    def _release(
        self, name: str, data: DataSet, channel: str, mechanism: Mechanism | None, rows: Sequence[int] | None, *,
        formal: bool, pieces: int = 1, before: str | None = None,
    ) -> Release:  # fmt: skip
        units = None if rows is None else sorted({data.units[row] for row in rows})
        sensitivity, sigma = _size_of(mechanism)
        unit: Literal["row", "person", "token"] = data.unit
        if isinstance(mechanism, Gauss) and mechanism.unit == "token":
            unit = "token"
        if sensitivity is not None:
            if unit != "token":
                # k examples of one person (or of one text, cut into blocks) in one release: k differences in
                # coordinates of their own, so sqrt(k) in L2. Of rows that are not known there may be all.
                of_rows = data.units if rows is None else [data.units[row] for row in rows]
                sensitivity *= math.sqrt(max(Counter(of_rows).values()))
            sensitivity *= math.sqrt(pieces)  # rho adds up over the sends
        rho = None
        if formal and sensitivity is not None and sigma is not None:
            rho = sensitivity**2 / (2 * sigma**2)
        return Release(
            release_id=name,
            dataset=data.fingerprint,
            unit=unit,
            units=units,
            channel=channel,
            mechanism=describe(mechanism, before),
            sensitivity=sensitivity,
            sigma=sigma,
            rho=rho,
            adversary=ADVERSARY,
            run=self.run,
        )


def _size_of(mechanism: Mechanism | None) -> tuple[float | None, float | None]:
    if isinstance(mechanism, Gauss):
        return mechanism.sensitivity, mechanism.sigma
    if isinstance(mechanism, GradientGauss):
        return None, mechanism.sigma  # its clip bounds one position, and a row has many
    return None, None


def describe(mechanism: Mechanism | None, before: str | None = None) -> str:
    """A mechanism, and what came before it, in a word for the ledger."""
    names = [name for name in (before, mechanism and mechanism.name) if name]
    return "+".join(names) or "none"


_NAME = "ledger-run.txt"


def run_name(folder: Path, *, resumed: bool) -> str:
    """What the ledger calls the run in this directory: its name and a number of its own, which `keep_name` keeps."""
    kept = folder / _NAME
    if resumed and kept.is_file():
        return kept.read_text(encoding="utf-8").strip()
    return f"{printable(folder.absolute().name, 60)} {secrets.token_hex(4)}"


def keep_name(folder: Path, name: str) -> None:
    """Write it down, once there is a run."""
    replace_text(folder / _NAME, name + "\n")
