"""What parties have spent, kept so that no crash can forget it and few answers wait for the disk.

The durable figure runs ahead of what was spent by a reserve. An answer may leave at once as long as its tokens are
within the figure on the disk; when half of the reserve is used up, more is asked for meanwhile. At an orderly end the
rest of the reserve is given back. After a kill it is not: a party then counts as having spent up to `1 / RESERVE_SHARE`
(and no more than `MOST_RESERVE`) beyond what it got in that run of the owner, and never less than it got. The reserve
goes by the run, not by all that was ever spent, so that many kills together add no more than that share either.
"""

from __future__ import annotations

from dataclasses import dataclass

RESERVE_SHARE = 64
MOST_RESERVE = 65_536


@dataclass
class Spent:
    """One party's tokens.

    `elsewhere` were spent before this run, or at other owners; `here` in this run. Of those of this run, `asked` is
    what the database was told or is being told, `written` what it has confirmed. Always ``here <= asked``.
    """

    elsewhere: int = 0
    here: int = 0
    asked: int = 0
    written: int = 0

    @property
    def total(self) -> int:
        """What a budget is compared with."""
        return self.elsewhere + self.here

    def charge(self, tokens: int) -> int:
        """Spend; what the database has to be told because of it, 0 if it has been told enough."""
        self.here += tokens
        reserve = min(self.here // RESERVE_SHARE, MOST_RESERVE)
        if self.here + reserve // 2 < self.asked:
            return 0
        more = max(self.here + reserve - self.asked, 0)
        self.asked += more
        return more

    def rest(self) -> int:
        """What was asked for and not spent, as something to be told: 0 or less."""
        less = self.here - self.asked
        self.asked = self.here
        return less

    def confirm(self, tokens: int, total: int) -> None:
        """So many are written, and the database has `total` by now."""
        self.written += tokens
        self.elsewhere = total - self.written
