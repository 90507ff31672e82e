"""A party's command as `splitfl bench chaos` runs it: seconds of silence, then the words of a ``splitfl`` command.

Only ever a process of its own, since it uses `party`. The one difference from ``splitfl`` is that an unanswered message
is said again after so many seconds, and not after a minute: what is lost without its link would cost that each time.
"""

from __future__ import annotations

import sys

from party.conversation import Conversation
from splitfl.cli import app
from splitfl.options import run_app


def main() -> None:
    """Run the command; its exit code is this process's."""
    Conversation.resend_after_s = float(sys.argv[1])
    run_app(app, sys.argv[2:])


if __name__ == "__main__":
    main()
