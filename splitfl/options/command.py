"""A Typer command made from a settings class.

A value comes from the command line, else from the file named by `--config`, else from the default.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from splitfl.options.file import read_config
from splitfl.options.origin import Origin, note_origin
from splitfl.options.records import Field, Settings, fields_of

S = TypeVar("S", bound=Settings)


def command(app: typer.Typer, settings_class: type[S], name: str, handler: Callable[[S], object]) -> None:
    """Add a command to `app` whose options are the fields of `settings_class`.

    The help text is the docstring of `settings_class`. An int that `handler` returns, other than 0, is the exit code.

    Args:
        app: the Typer application, or a sub-application such as `keys`.
        settings_class: a frozen dataclass derived from `Settings`.
        name: the command's name.
        handler: called with the resolved settings.
    """
    fields = fields_of(settings_class)
    contexts: list[typer.Context] = []

    def run(**given: Any) -> None:
        note_origin(_origin(contexts.pop(), name, given["config"]))
        values = {f.name: tuple(given[f.name] or ()) if f.many else given[f.name] for f in fields}
        code = handler(settings_class(**values))
        if isinstance(code, int) and code:
            raise typer.Exit(int(code))

    def read(context: typer.Context, value: Path | None) -> Path | None:
        contexts[:] = [context]  # called for each command line, with a file or without
        if value is not None:
            context.default_map = read_config(value, settings_class, *_place(context, name))
        return value

    config = typer.Option("--config", callback=read, is_eager=True, help="TOML or YAML file with any of these options.")
    debug = typer.Option("--debug", help="Show the whole traceback of an error.")
    parameters = [_parameter(field) for field in fields]
    parameters.append(_keyword("config", Annotated[Path | None, config], None))
    parameters.append(_keyword("debug", Annotated[bool, debug], False))  # looked for by `run_app`
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    app.command(name, help=inspect.cleandoc(settings_class.__doc__ or ""))(run)


def _parameter(field: Field) -> inspect.Parameter:
    kind: Any = list[field.kind] if field.many else field.kind  # type: ignore[name-defined]
    required = field.default is dataclasses.MISSING
    default = inspect.Parameter.empty if required else field.default
    if field.many and not required:
        default = list(field.default) or None
    if default is None:
        kind = kind | None
    return _keyword(field.name, Annotated[kind, field.info], default)


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _origin(context: typer.Context, name: str, config: Path | None) -> Origin:
    sources = {word: context.get_parameter_source(word) for word in context.params}
    typed = {word for word, source in sources.items() if source and source.name in ("COMMANDLINE", "ENVIRONMENT")}
    words, beside = _place(context, name)
    return Origin(config=config, typed=frozenset(typed), words=words, beside=beside)


def _place(context: typer.Context, name: str) -> tuple[tuple[str, ...], tuple[frozenset[str], ...]]:
    """The words that lead to this command (`keys`, `new`), and the names that stand beside each of them."""
    words: list[str] = []
    beside: list[frozenset[str]] = []
    inner: Any = context
    while inner.parent is not None:
        words.insert(0, str(inner.info_name))
        inner = inner.parent
        beside.insert(0, frozenset(inner.command.commands))
    return (tuple(words), tuple(beside)) if words else ((name,), (frozenset({name}),))
