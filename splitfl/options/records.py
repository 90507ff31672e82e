"""Settings as records: what a field may say, and the check of its value.

A settings class is a keyword-only dataclass derived from `Settings`. Each field is `Annotated[type, ...]` and carries,
in any order, a help text (or a whole `typer.Option` or `typer.Argument`), `Check`s, and at most one `Panel`:

    rank: Annotated[int, "Rank of the LoRA matrices.", at_least(1), LORA] = 8

Types: str, int, float, bool, Path, a Literal of texts, any of these `| None` with default None, and `tuple[X, ...]` for
an option that may be repeated.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.models import ArgumentInfo, OptionInfo

from splitfl.errors import UsageError, printable

WORDS: dict[Any, str] = {str: "text", int: "a whole number", float: "a number", bool: "true or false", Path: "a path"}


@dataclass(frozen=True, kw_only=True)
class Check:
    """What a value must satisfy; a tuple is checked value by value, None is not checked."""

    test: Callable[[Any], bool]
    expected: str


@dataclass(frozen=True)
class Panel:
    """The heading under which `--help` lists an option."""

    name: str


def at_least(low: float) -> Check:
    """The value is `low` or more."""
    return Check(test=lambda value: low <= value < math.inf, expected=f"{low} or more")


def above(low: float) -> Check:
    """The value is more than `low`."""
    return Check(test=lambda value: low < value < math.inf, expected=f"more than {low}")


def between(low: float, high: float) -> Check:
    """The value lies in the closed interval from `low` to `high`."""
    return Check(test=lambda value: low <= value <= high, expected=f"from {low} to {high}")


@dataclass(frozen=True, kw_only=True)
class Field:
    """One setting, as read from a field of a settings class."""

    name: str
    kind: Any
    """The type of one value: str, int, float, bool, Path or a Literal."""
    many: bool
    optional: bool
    default: Any
    """`dataclasses.MISSING` where the setting is required."""
    info: OptionInfo | ArgumentInfo
    checks: tuple[Check, ...]

    @property
    def flag(self) -> str:
        """How the setting is written on the command line."""
        if isinstance(self.info, ArgumentInfo):
            return self.name.upper()
        return "--" + self.name.replace("_", "-")

    @property
    def names(self) -> tuple[str, ...]:
        """What a config file may call it: its name, and every long option."""
        first = self.info.default if isinstance(self.info.default, str) else ""
        options = [word.partition("/")[0] for word in (first, *(self.info.param_decls or ()))]
        return (self.name, *(word[2:].replace("-", "_") for word in options if word.startswith("--")))

    @property
    def expected(self) -> str:
        """The allowed type, in words."""
        if typing.get_origin(self.kind) is Literal:
            one = "one of " + ", ".join(map(str, typing.get_args(self.kind)))
        else:
            one = WORDS[self.kind]
        return f"a list, each {one}" if self.many else one


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of the settings of every command: values are checked when the record is made.

    Raises:
        UsageError: a value, or a combination of values, that is not allowed.
    """

    def __post_init__(self) -> None:
        for field in fields_of(type(self)):
            check_value(field, getattr(self, field.name), field.flag)
        self.check()

    def check(self) -> None:
        """Refuse combinations that make no sense; for subclasses."""


def fields_of(settings_class: type[Settings]) -> tuple[Field, ...]:
    """The settings of a class, in the order in which they are written there.

    Raises:
        TypeError: a field is written in a way that this module does not know; a programming mistake.
    """
    hints = typing.get_type_hints(settings_class, include_extras=True)
    return tuple(_field(f, hints[f.name]) for f in dataclasses.fields(settings_class))


def _field(source: dataclasses.Field[Any], hint: Any) -> Field:
    if typing.get_origin(hint) is not Annotated:
        raise TypeError(f"setting {source.name!r} has no help: write Annotated[type, 'help']")
    annotation, *notes = typing.get_args(hint)
    kind, many, optional = _take_apart(annotation)
    if typing.get_origin(kind) is not Literal and kind not in WORDS:
        raise TypeError(f"setting {source.name!r} has a type that options cannot carry: {kind!r}")
    if optional and source.default is not None:
        raise TypeError(f"setting {source.name!r} allows None, so None must be its default: no file can say None")
    panel = next((note.name for note in notes if isinstance(note, Panel)), None)
    info = next((note for note in notes if isinstance(note, OptionInfo | ArgumentInfo)), None)
    if info is None:
        info = typer.Option(help=next(note for note in notes if isinstance(note, str)))
    info = copy.copy(info)  # one option may stand in several classes, under other headings
    info.rich_help_panel = panel or info.rich_help_panel
    if many and isinstance(info, OptionInfo) and info.metavar is None:
        info.metavar = f"<{getattr(kind, '__name__', 'text')}>..."
    checks = tuple(note for note in notes if isinstance(note, Check))
    return Field(
        name=source.name, kind=kind, many=many, optional=optional, default=source.default, info=info, checks=checks
    )


def _take_apart(annotation: Any) -> tuple[Any, bool, bool]:
    """`(type of one value, repeatable, may be None)` of a field's annotation."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return arguments[0], True, False
    if origin in (types.UnionType, typing.Union) and len(arguments) == 2 and arguments[1] is type(None):
        return arguments[0], False, True
    return annotation, False, False


def check_value(field: Field, value: Any, name: str) -> None:
    """Refuse a value that fails one of its field's checks; `name` is how the person knows the setting.

    Raises:
        UsageError: with the value and what is allowed.
    """
    for one in value if field.many else (value,):
        for check in field.checks:
            if one is not None and not check.test(one):
                raise UsageError(f"{name} was given as {shown(one)}.", expected=check.expected)


def shown(value: Any) -> str:
    """A setting's value as an error shows it."""
    return printable(str(value) if isinstance(value, Path) else repr(value), limit=80)
