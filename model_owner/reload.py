"""SIGHUP at a running owner: the allow-list is read again, and the file given with `--config`.

A file changes what it may, or nothing at all: if it names one thing that cannot change while the owner runs, or cannot
be used, all old values stay, and the log names the reason. What stood on the command line stays as it was.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

from model_owner.admission import ServerLimits
from model_owner.logs import set_level
from model_owner.server import Server
from splitfl.config import ServeSettings
from splitfl.errors import SplitflError
from splitfl.options import Origin, read_again
from splitfl.options.values import parse_size

log = logging.getLogger("splitfl.owner")

CHANGEABLE = frozenset(
    {"max_tokens", "max_sessions", "lease", "cache_lease", "deadline", "memory", "memory_budget", "log_level"}
)
"""Settings of `splitfl serve` that may change; sessions that are open keep what they were told in their welcome."""


class Reload:
    """What SIGHUP calls.

    Args:
        settings: those in force.
        origin: where they came from; None if from no command line.
        limits: works out a session's limits from new settings.
    """

    def __init__(
        self, settings: ServeSettings, origin: Origin | None, limits: Callable[[ServeSettings], ServerLimits]
    ) -> None:
        self.settings, self._origin, self._limits = settings, origin, limits
        self._most_tokens = settings.max_tokens  # the socket takes no larger frame than it was opened for

    def __call__(self, server: Server) -> None:
        """Read both again; in the thread that owns the sockets. Never raises."""
        try:
            server.reload_admission()
            if self._origin is not None and self._origin.config is not None:
                self._apply(server, read_again(self.settings, self._origin))
        except SplitflError as error:
            log.error("the configuration was not read again, old values stay: %s", error.problem)
        except Exception:
            log.exception("the configuration was not read again, old values stay")

    def _apply(self, server: Server, new: ServeSettings) -> None:
        changed = {
            field.name
            for field in dataclasses.fields(new)
            if getattr(new, field.name) != getattr(self.settings, field.name)
        }
        fixed = sorted(changed - CHANGEABLE)
        if new.max_tokens > self._most_tokens:
            fixed.append(f"max_tokens above the {self._most_tokens} of the start")
        if fixed:
            log.error("the configuration was not read again, old values stay: %s cannot change while the owner runs",
                      ", ".join(fixed))  # fmt: skip
            return
        server.limits = self._limits(new)
        server.table.lease_s = new.lease
        server.answerer.budget.limit = parse_size(new.memory_budget)
        set_level(new.log_level)
        self.settings = new
        told = ", ".join(f"{name} is {getattr(new, name)}" for name in sorted(changed))
        log.info("the configuration was read again: %s", told or "nothing has changed")
