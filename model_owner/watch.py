"""What watches a running owner, as `splitfl serve` was asked for it: durable state, metrics, both or neither."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from model_owner.observer import Account, NoObserver, Observer, Observers, PassingAccount
from splitfl.config_owner import Keeping, parse_bind
from splitfl.options.values import on_loopback

if TYPE_CHECKING:
    from model_owner.metrics import Look, Metrics
    from model_owner.server import Server
    from model_owner.state import Keeper

log = logging.getLogger("splitfl.owner")


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Whom the server tells, and who remembers what parties have spent."""

    observer: Observer
    account: Account
    metrics: Metrics | None = None
    keeper: Keeper | None = None
    address: str | None = None
    """Of the metrics, ``http://HOST:PORT``."""

    def attach(self, server: Server) -> None:
        """Show the figures of `server` from now on."""
        if self.metrics is not None:
            self.metrics.look = lambda: _look(server, self.account, self.keeper)

    def announce(self) -> None:
        """What is kept and shown, for the person who started it."""
        if self.keeper is not None:
            print(f"{'state':8} {self.keeper.database.place}", file=sys.stderr)
        if self.address is not None:
            print(f"{'metrics':8} {self.address}/metrics, and /healthz", file=sys.stderr)


@contextlib.contextmanager
def watching(settings: Keeping) -> Iterator[Watch]:
    """Open what was asked for; on the way out write what is left.

    Raises:
        ResourceError, UsageError, DataError: the state or the address cannot be used, or an extra is missing.
    """
    observers: list[Observer] = []
    account: Account = PassingAccount()
    with contextlib.ExitStack() as stack:
        keeper = metrics = address = None
        if settings.state is not None:
            keeper = _keeper(settings.state, settings.server_name)
            stack.callback(keeper.close)
            observers.append(keeper)
            account = keeper
        if settings.metrics_bind is not None:
            from model_owner.metrics import Look, Metrics, MetricsServer

            metrics = Metrics(lambda: Look(starting=True))
            observers.append(metrics)
            host, port = parse_bind(settings.metrics_bind)
            server = MetricsServer(metrics, host, port)
            stack.callback(server.close)
            address = server.address
            if not on_loopback(address.replace("http://", "tcp://")):
                log.warning(
                    "the metrics at %s are open to whoever reaches that address: no key, no encryption", address
                )
        observer = Observers(observers) if observers else NoObserver()
        yield Watch(observer=observer, account=account, metrics=metrics, keeper=keeper, address=address)


def _keeper(place: str, server_name: str) -> Keeper:
    from model_owner.state import Database, Keeper

    database = Database(place, server=server_name)
    try:
        return Keeper(database, server_name)
    except BaseException:
        database.close()
        raise


def _look(server: Server, account: Account, keeper: Keeper | None) -> Look:
    from model_owner.metrics import Look

    spent = account.spent_of_all()
    budgets = {party: server.quotas.of(party).total_tokens for party in spent}
    budget = server.answerer.budget
    return Look(
        draining=server.draining,
        sessions=len(server.table),
        waiting=server.scheduler.waiting,
        waiting_bytes=server.waiting_bytes,
        memory_used=budget.used,
        memory_limit=budget.limit,
        state_failing=keeper is not None and keeper.failure is not None,
        spent=spent,
        budgets={party: total for party, total in budgets.items() if total is not None},
    )
