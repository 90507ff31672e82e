"""Where the settings of the command that runs came from, so that a long-running one can read its file again."""

from __future__ import annotations

import dataclasses
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from splitfl.errors import UsageError
from splitfl.options.file import read_config
from splitfl.options.records import Settings, fields_of

S = TypeVar("S", bound=Settings)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What stood on the command line, and which file filled the rest."""

    config: Path | None
    typed: frozenset[str]
    """Names of the settings that the command line (or the environment) gave: no file changes them."""
    words: tuple[str, ...] = ()
    beside: tuple[frozenset[str], ...] = ()
    """As for `read_config`."""


_origin: ContextVar[Origin | None] = ContextVar("origin", default=None)


def note_origin(origin: Origin) -> None:
    """Say where the settings came from; for `splitfl.options.command`."""
    _origin.set(origin)


def origin_of_settings() -> Origin | None:
    """Where the settings of the command that runs came from; None where none was started from a command line."""
    return _origin.get()


def read_again(settings: S, origin: Origin | None) -> S:
    """`settings` as they would be if the command were started now, with the same words.

    Raises:
        UsageError: it was started without a file, or the file cannot be read or used.
    """
    if origin is None or origin.config is None:
        raise UsageError("There is no file to read again.", expected="a command that was started with --config FILE")
    table = read_config(origin.config, type(settings), origin.words, origin.beside)
    values = {}
    for field in fields_of(type(settings)):
        if field.name in origin.typed:
            values[field.name] = getattr(settings, field.name)
        elif field.name in table:
            values[field.name] = tuple(table[field.name]) if field.many else table[field.name]
        elif field.default is dataclasses.MISSING:
            raise UsageError(f"{origin.config}: {field.name!r} is missing.", expected=field.expected)
        else:
            values[field.name] = field.default
    return type(settings)(**values)
