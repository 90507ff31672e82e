"""The check that a party runs on every proposal, on its own machine: a command that this party named, and nothing else.

No word of the command comes from a model, a peer or a row. The proposal is a file in an empty temporary directory,
which is the command's working directory; its name is the command's last argument. The command has no terminal, a bare
environment, a time limit for itself and all that it started, and its output is cut. It is still run with the rights of
whoever runs it: a hook that *executes* what a model wrote belongs in a container.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from splitfl.errors import UsageError, printable

DEFAULT = (sys.executable, "-m", "examples.code_migration.syntax")
"""Parses the file with tree-sitter."""
FILE = "Proposal.java"
LONGEST_OUTPUT = 2_000
"""Bytes of output that are kept, from the beginning."""
_KEPT = ("PATH", "LANG", "LC_ALL", "JAVA_HOME", "PYTHONPATH", "SYSTEMROOT")

Verdict = Literal["passed", "failed", "timeout"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a hook said."""

    verdict: Verdict
    code: int | None
    """Exit code; None after a timeout."""
    output: str
    """Its output and errors, at most `LONGEST_OUTPUT` bytes, control characters escaped."""
    seconds: float


def command(text: str | None) -> tuple[str, ...]:
    """The words of a command line; without one, the default.

    Raises:
        UsageError: no command, or quotes that do not match.
    """
    if text is None:
        return DEFAULT
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise UsageError(
            f"the hook cannot be read: {error}", expected="a command as for a shell, quotes closed"
        ) from None
    if not words:
        raise UsageError("the hook is empty", hint="leave --hook out to have the syntax checked")
    return words


def run_hook(words: Sequence[str], code: str, *, limit_s: float) -> Outcome:
    """Run the command on a file that holds `code`.

    Args:
        words: of the command, as this party named it; no shell reads them.
        code: a whole compilation unit.
        limit_s: seconds until the command and whatever it started in its process group are killed.

    Raises:
        UsageError: the command cannot be started.
    """
    with tempfile.TemporaryDirectory(prefix="splitfl-hook-") as folder:
        (Path(folder) / FILE).write_text(code, encoding="utf-8")
        with tempfile.TemporaryFile() as output:
            started = time.monotonic()
            try:
                process = subprocess.Popen(
                    [*words, FILE], cwd=folder, env=_environment(folder), stdin=subprocess.DEVNULL, stdout=output,
                    stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_limit_files,
                )  # fmt: skip
            except OSError as error:
                raise UsageError(f"the hook {printable(words[0])!r} cannot be started: {error.strerror}") from None
            try:
                status: int | None = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                _kill(process)
            seconds = time.monotonic() - started
            output.seek(0)
            said = output.read(LONGEST_OUTPUT).decode("utf-8", "replace")
    verdict: Verdict = "timeout" if status is None else "passed" if status == 0 else "failed"
    return Outcome(verdict=verdict, code=status, output=printable(said, LONGEST_OUTPUT), seconds=seconds)


def _environment(folder: str) -> dict[str, str]:
    """Nothing of this process's environment but where programs lie; keys and tokens stay out."""
    return {**{name: os.environ[name] for name in _KEPT if name in os.environ}, "HOME": folder, "TMPDIR": folder}


def _limit_files() -> None:
    """In the child: no file may grow beyond 16 MiB, so that a hook that prints without end fills no disk."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 20, 16 << 20))


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End whatever is left of the command's process group: what it started may outlive it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
