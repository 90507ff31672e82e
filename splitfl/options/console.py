"""The outermost frame of every command: runs the application and turns what goes wrong into a message and an exit code.

A person who made a mistake sees three lines, never a traceback. An error of ours shows where it happened but not its
own text, which might quote a row; `--debug` (or SPLITFL_DEBUG=1) shows all of it.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from splitfl.errors import INTERRUPTED_EXIT_CODE, InternalError, ResourceError, SplitflError, UsageError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_FILE_TROUBLE = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EMFILE)
_HERE = Path(__file__).resolve().parents[2]
_FRAME = Path(__file__).resolve().parent  # every command runs inside it: no news as the place of an error


def run_app(app: typer.Typer, args: Sequence[str] | None = None, *, name: str = "splitfl") -> NoReturn:
    """Run a Typer application and leave the process with the exit code that belongs to the outcome.

    Args:
        app: the application.
        args: the words of the command line; None for those of this process.
        name: what the program is called in help and messages.

    Raises:
        SystemExit: always; 0, the code of a `SplitflError`, or 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in words or os.environ.get("SPLITFL_DEBUG", "") not in ("", "0")
    if words[:1] == ["--debug"]:  # every command has the option; before the command it means the same
        del words[0]
    try:
        code = typer.main.get_command(app).main(words, prog_name=name, standalone_mode=False)
    except (Exception, KeyboardInterrupt) as error:
        code = _report(error, debug=debug)
    else:
        if code == INTERRUPTED_EXIT_CODE:  # Typer turns Ctrl-C into an exit of its own
            _interrupted()
    sys.exit(code if isinstance(code, int) else 0)


def explain(error: BaseException) -> SplitflError:
    """What to tell a person about any exception, as one of our errors."""
    if isinstance(error, SplitflError):
        return error
    chain = list(_causes(error))
    if any(isinstance(e, OSError) and e.errno in _DISK_FULL for e in chain) or "No space left on device" in str(error):
        where = next((f" while writing {e.filename}" for e in chain if isinstance(e, OSError) and e.filename), "")
        return ResourceError(f"The disk is full{where}.", hint="free some space, or choose another place with --out")
    if any(isinstance(e, MemoryError) or type(e).__name__ == "OutOfMemoryError" for e in chain):
        hint = (
            "use smaller batches or shorter rows (--per-device-train-batch-size, --max-length), or --memory recompute"
        )
        return ResourceError("There is not enough memory on this machine or its device.", hint=hint)
    if isinstance(error, OSError) and error.errno in _FILE_TROUBLE and error.filename is not None:
        return ResourceError(f"{error.filename}: {error.strerror}.", hint="check that the path exists and may be used")
    if _is_command_line_error(error):
        return _command_line(error)
    return InternalError(
        f"splitfl met an error of its own: {type(error).__name__} {_place(error)}.",
        hint="run the command again with --debug to see all of it, and please report it",
    )


def _report(error: BaseException, *, debug: bool) -> int:
    """Print what went wrong on stderr; the exit code."""
    if debug and not _is_command_line_error(error):
        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, KeyboardInterrupt):
        _interrupted()
        return INTERRUPTED_EXIT_CODE
    if isinstance(error, typer.Abort):
        _stderr().print("Stopped: no answer was given.")
        return 1
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()  # type: ignore[attr-defined]
        return int(error.exit_code)  # type: ignore[attr-defined]
    plain = explain(error)
    console = _stderr()
    console.print(Text.assemble(("error: ", "bold red"), (plain.problem, "red")))
    if plain.expected:
        console.print(Text.assemble(("Expected: ", "bold"), plain.expected))
    if plain.hint:
        console.print(Text.assemble(("Next: ", "bold"), plain.hint))
    return plain.exit_code


def _stderr() -> Console:
    return Console(stderr=True, soft_wrap=True, highlight=False, markup=False)


def _interrupted() -> None:
    _stderr().print("Interrupted.")


def _is_command_line_error(error: BaseException) -> bool:
    # Typer carries Click inside it since 0.26 and stood on the package before; both kinds of error have this method.
    return callable(getattr(error, "format_message", None))


def _command_line(error: Any) -> UsageError:
    problem = " ".join(error.format_message().split()).replace("Value error, ", "")  # pydantic's word for it
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "splitfl"
    hint = f"see {path} --help"
    if type(error).__name__ == "MissingParameter":
        hint += "; it may also stand in a file given with --config"
    return UsageError(problem, hint=hint)


def _causes(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)


def _place(error: BaseException) -> str:
    """`in splitfl/data.py, line 12 (read_rows)`: the innermost frame that is ours, else the innermost."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if _is_ours(Path(f.filename))]
    for frame in reversed(ours or frames):
        path = Path(frame.filename)
        shown = path.relative_to(_HERE) if _HERE in path.parents else Path(path.name)
        return f"in {shown}, line {frame.lineno} ({frame.name})"
    return "outside any function"


def _is_ours(path: Path) -> bool:
    packages = (_HERE / name for name in ("splitfl", "party", "model_owner", "protocols"))
    return any(package in path.parents for package in packages) and _FRAME not in path.parents
