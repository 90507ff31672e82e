"""The config file of a command: read with every key checked, written as resolved.

Relative paths mean the current directory, as on the command line, and not the directory of the file.
"""

from __future__ import annotations

import tomllib
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import tomli_w

from splitfl.errors import UsageError, nearest, printable
from splitfl.files import replace_text
from splitfl.options.records import WORDS, Field, Settings, check_value, fields_of, shown


def read_config(
    path: Path,
    settings_class: type[Settings],
    words: tuple[str, ...] = (),
    beside: tuple[frozenset[str], ...] = (),
) -> dict[str, Any]:
    """The values that a config file gives to one command.

    Keys stand at the top of the file or in a table named after the command (`[tune]`, `[keys.new]`), where the table
    wins; tables of other commands are left alone, so that one file can serve several. Dashes count as underscores.

    Args:
        path: a `.toml`, `.yaml` or `.yml` file.
        settings_class: the settings of the command.
        words: the command's name, one word for each level.
        beside: at each level, the names of all commands there.

    Raises:
        UsageError: the file cannot be read, or holds a key that is unknown, given twice or of the wrong type.
    """
    table: Any = load_table(path)
    known = {name: field for field in fields_of(settings_class) for name in field.names}
    values: dict[str, Any] = {}
    for level in range(len(words) + 1):
        if not isinstance(table, dict):
            raise UsageError(f"{path}: {words[level - 1]!r} holds {shown(table)}.", expected="a table of options")
        others = beside[level] if level < len(beside) else frozenset()
        values |= _values(path, table, known, others)
        table = table.get(words[level], {}) if level < len(words) else {}
    return values


def _values(path: Path, table: Mapping[Any, Any], known: Mapping[str, Field], others: frozenset[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key in others and isinstance(value, dict):
            continue
        word = str(key).replace("-", "_")
        if word not in known:
            kind = "table" if isinstance(value, dict) else "key"
            hint = nearest(word, [*known, *others] if kind == "table" else known)
            raise UsageError(f"{path}: there is no {kind} {printable(str(key))!r} for this command.", hint=hint)
        field = known[word]
        if field.name in values:
            raise UsageError(f"{path}: {field.name!r} stands there twice, under two spellings.")
        if value is not None:
            values[field.name] = _typed(path, field, value)
        elif not field.optional:
            raise UsageError(f"{path}: {field.name!r} is empty.", expected=field.expected)
    return values


def _typed(path: Path, field: Field, value: Any) -> Any:
    items = value if field.many and isinstance(value, list) else [value]
    typed = [_one(field.kind, item) for item in items]
    if None in typed:
        problem = f"{path}: {field.name!r} is {shown(value)} ({_kind_of(value)})."
        raise UsageError(problem, expected=field.expected)
    result = typed if field.many else typed[0]
    check_value(field, result, f"{path}: {field.name!r}")
    return result


def _one(kind: Any, value: Any) -> Any:
    """`value` as `kind`, or None where it is of another type."""
    if typing.get_origin(kind) is Literal:
        return value if value in typing.get_args(kind) else None
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-3, with no point, as text
        try:
            return float(value)
        except ValueError:
            return None
    if kind is float and type(value) is int:
        return float(value)
    if kind is Path and type(value) is str and value:
        return Path(value).expanduser() if value.startswith("~/") else Path(value)
    return value if type(value) is kind else None


def _kind_of(value: Any) -> str:
    return "a list" if isinstance(value, list) else WORDS.get(type(value), f"a {type(value).__name__}")


def read_part(path: Path, table: Mapping[Any, Any], settings_class: type[Settings]) -> dict[str, Any]:
    """The values in one table of a file that `load_table` read; as for `read_config`, and errors likewise."""
    known = {name: field for field in fields_of(settings_class) for name in field.names}
    return _values(path, table, known, frozenset())


def load_table(path: Path) -> dict[str, Any]:
    """A TOML or YAML file as it is, nothing checked.

    Raises:
        UsageError: it cannot be read, or has another suffix.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"The config file {path} cannot be read: {reason}.") from error
    if path.suffix == ".toml":
        try:
            return tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise UsageError(f"{path} is not TOML: {error}.", expected="lines such as learning_rate = 1e-3") from error
    if path.suffix in (".yaml", ".yml"):
        return _load_yaml(path, text)
    raise UsageError(f"{path} has a suffix that no config file has.", expected="a name ending in .toml, .yaml or .yml")


def _load_yaml(path: Path, text: str) -> dict[str, Any]:
    import yaml  # type: ignore[import-untyped]

    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        raise UsageError(f"{path} is not YAML{where}.", expected="lines such as learning_rate: 1.0e-3") from error
    if not isinstance(data, dict | None):
        raise UsageError(f"{path} holds {_kind_of(data)}.", expected="a table of options")
    return data or {}


def plain_settings(settings: Settings) -> dict[str, Any]:
    """The settings as TOML and JSON can hold them: paths as text, tuples as lists, None left out."""
    return dict(_plain_items(settings))


def _plain_items(settings: Settings) -> Iterator[tuple[str, Any]]:
    for field in fields_of(type(settings)):
        value = getattr(settings, field.name)
        if field.many:
            yield field.name, [_plain(one) for one in value]
        elif value is not None:
            yield field.name, _plain(value)


def _plain(value: Any) -> Any:
    if not isinstance(value, Path):
        return value
    text = str(value)
    return f"./{text}" if text.startswith("~") else text  # a directory really called ~


def to_toml(settings: Settings, path: Path, lines: Iterable[str] = ()) -> None:
    """Write the resolved settings; `--config` on the file gives the same settings again.

    Args:
        settings: what to write.
        path: the file, replaced as a whole.
        lines: remarks for the head of the file.
    """
    head = "".join(f"# {line}\n" for line in (*lines, "Use these settings again with --config."))
    replace_text(path, head + tomli_w.dumps(plain_settings(settings)))
