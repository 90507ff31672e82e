"""For every test: one thread of computation, no hub, and nothing left behind."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator

# Before torch is loaded. Bitwise comparisons need the same number of threads on both sides, and child processes
# inherit the choice. Nothing is ever fetched.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

# Started in the background by a script, this process ignores Ctrl-C, and so would every child that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Releases of rows are booked in a ledger; those of tests do not belong into the one of whoever runs them.
os.environ["SPLITFL_LEDGER"] = os.path.join(tempfile.mkdtemp(prefix="splitfl-tests-"), "ledger.sqlite")

import pytest

from tests.leaks import belongings, leaks_since, watch_contexts

atexit.register(shutil.rmtree, os.path.dirname(os.environ["SPLITFL_LEDGER"]), ignore_errors=True)

_UNIX = os.name == "posix"


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_left_at_the_end() -> Iterator[None]:
    """Also holds for fixtures that outlive a test: set up first, torn down last."""
    if not _UNIX:
        yield
        return
    undo = watch_contexts()
    before = belongings()
    yield
    left = leaks_since(before)
    undo()
    if left:
        pytest.fail(f"The tests left behind: {'; '.join(left)}", pytrace=False)


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(_nothing_is_left_at_the_end: None) -> Iterator[None]:
    """Fail a test that leaves threads, child processes or ZeroMQ sockets behind."""
    if not _UNIX:
        yield
        return
    before = belongings()
    yield
    left = leaks_since(before)
    if left:
        pytest.fail(f"The test left behind: {'; '.join(left)}", pytrace=False)
