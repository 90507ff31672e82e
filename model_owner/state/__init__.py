"""What an owner remembers over restarts: parties, sessions, usage for billing, and tokens spent of a query budget.

`schema` has the tables and their migrations, `database` opens a SQLite file or a PostgreSQL database, `keeper` writes,
`reading` reads. Rounds of a federation have a file of their own (`model_owner.rounds.store`).

This package needs SQLAlchemy, from the extra `owner`: an owner without `--state` does without it.
"""

from __future__ import annotations

from model_owner.state.database import Database
from model_owner.state.keeper import FLUSH_S, Keeper

__all__ = ["FLUSH_S", "Database", "Keeper"]
