"""Keys for all who take part on this machine: `python -m examples.keys NAME...`, in the current directory.

What `splitfl keys new NAME --out keys` does for each, and `splitfl keys allow keys/NAME.key --parties parties` for
those that are neither coordinator nor owner, in one process.
"""

from __future__ import annotations

import sys
from pathlib import Path

from splitfl.wire.keys import AllowList, new_keys

SERVERS = ("coordinator", "owner")


def make(names: list[str], folder: Path) -> None:
    """Pairs under ``keys``, public halves of the parties under ``parties``; what is there already stays."""
    for name in names:
        if not (folder / "keys" / f"{name}.key").exists():
            new_keys(name, folder / "keys")
        if name not in SERVERS and not (folder / "parties" / f"{name}.key").exists():
            AllowList(folder / "parties").add(folder / "keys" / f"{name}.key")


if __name__ == "__main__":
    make(sys.argv[1:], Path())
