"""Print so many free ports of this machine: `python -m examples.ports COUNT`. For servers that must know each other."""

from __future__ import annotations

import socket
import sys
from contextlib import ExitStack


def free(count: int) -> list[int]:
    """Ports that nobody has right now; all different."""
    with ExitStack() as stack:
        taken = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in taken:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in taken]


if __name__ == "__main__":
    print(*free(int(sys.argv[1])))
