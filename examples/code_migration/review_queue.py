"""The review queue: a file of proposals, each with its checks and what a person decided. JSON Lines, written whole."""

from __future__ import annotations

import dataclasses
import difflib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from splitfl.errors import DataError, UsageError
from splitfl.files import replace_text

Status = Literal["pending", "accepted", "rejected"]


@dataclass(frozen=True, kw_only=True, repr=False)
class Proposal:
    """One edit that the model proposes."""

    id: str
    rule: str
    method: str
    """The whole method as it is."""
    start: int
    end: int
    proposed: str
    """What would stand in place of ``method[start:end]``."""
    expected: str | None = None
    """The right answer, where it is known."""
    verdict: str
    """Of the hook: passed, failed or timeout."""
    said: str = ""
    status: Status = "pending"
    reviewer: str = ""
    reason: str = ""
    decided: str = ""
    """When, UTC."""

    @property
    def before(self) -> str:
        """What is to change."""
        return self.method[self.start : self.end]

    @property
    def after(self) -> str:
        """The whole method with the proposal in it."""
        return self.method[: self.start] + self.proposed + self.method[self.end :]


class Queue:
    """Proposals in a file, in their order.

    Args:
        path: JSON Lines; need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.proposals: list[Proposal] = []
        if path.exists():
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                self.proposals.append(_proposal(line, f"{path}:{number}"))

    def write(self) -> None:
        """Write the file, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = (json.dumps(dataclasses.asdict(one), ensure_ascii=False) + "\n" for one in self.proposals)
        replace_text(self.path, "".join(text))

    def decide(self, names: Sequence[str], status: Status, *, reviewer: str, reason: str = "") -> list[Proposal]:
        """Accept or reject pending proposals; all of them or none.

        Raises:
            UsageError: a name that there is not, or of a proposal that is decided already; no reviewer; a proposal to
                accept whose hook did not pass.
        """
        if not reviewer.strip():
            raise UsageError("nobody is named who reviewed", hint="give --reviewer")
        places = {one.id: index for index, one in enumerate(self.proposals)}
        for name in names:
            if name not in places:
                raise UsageError(f"there is no proposal {name!r}", hint="`list` shows them")
            one = self.proposals[places[name]]
            if one.status != "pending":
                raise UsageError(f"proposal {name!r} is {one.status} already, by {one.reviewer}")
            if status == "accepted" and one.verdict != "passed":
                raise UsageError(
                    f"the hook did not pass proposal {name!r}: {one.verdict}", hint="mend it by hand, or reject it"
                )
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        for name in dict.fromkeys(names):
            self.proposals[places[name]] = dataclasses.replace(
                self.proposals[places[name]], status=status, reviewer=reviewer, reason=reason, decided=now
            )
        return [self.proposals[places[name]] for name in dict.fromkeys(names)]


def _proposal(line: str, place: str) -> Proposal:
    try:
        found = Proposal(**json.loads(line))
    except (TypeError, ValueError) as error:
        raise DataError(f"{place} is no proposal", expected="a file that propose.py wrote") from error
    if found.status not in get_args(Status):
        raise DataError(f"{place} has a status that there is not", expected=", ".join(get_args(Status)))
    return found


def acceptance(proposals: Sequence[Proposal]) -> dict[str, float]:
    """What came of them: the metrics that matter to whoever lands the changes.

    Returns:
        Shares from 0 to 1: ``hook passed``; ``exact`` (the expected edit, character by character); ``similarity``
        (`difflib.SequenceMatcher.ratio` of proposed and expected edit); ``unchanged`` (proposes the code as it is);
        ``accepted`` of the reviewed ones, if there are any.
    """
    total = max(len(proposals), 1)
    known = [one for one in proposals if one.expected is not None]
    reviewed = [one for one in proposals if one.status != "pending"]
    found = {
        "hook passed": sum(one.verdict == "passed" for one in proposals) / total,
        "exact": sum(one.proposed == one.expected for one in known) / max(len(known), 1),
        "similarity": sum(similarity(one.proposed, one.expected or "") for one in known) / max(len(known), 1),
        "unchanged": sum(one.proposed == one.before for one in proposals) / total,
    }
    if reviewed:
        found["accepted"] = sum(one.status == "accepted" for one in reviewed) / len(reviewed)
    return found


def similarity(one: str, other: str) -> float:
    """2 M / T of the longest matching blocks: 1 for equal texts, 0 for texts that share nothing."""
    return difflib.SequenceMatcher(None, one, other, autojunk=False).ratio()
