"""Values that are written as one word: sizes, addresses, devices, shapes, and NAME=VALUE for training arguments."""

from __future__ import annotations

import dataclasses
import enum
import ipaddress
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from splitfl.errors import SplitflError, UsageError, nearest, printable

_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE | re.ASCII)
_ADDRESS = re.compile(r"tcp://(\*|[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):(\d{1,5})", re.ASCII)
_DEVICE = re.compile(r"cpu|cuda(:\d+)?", re.ASCII)
_SHAPE = re.compile(r"([1-9]\d*)x([1-9]\d*)", re.ASCII)


def parse_size(text: str) -> int:
    """Bytes of a size such as ``4GB`` (powers of 1000), ``512MiB`` (powers of 1024) or ``1000000``.

    Raises:
        UsageError: not a size, or one below 1 byte.
    """
    match = _SIZE.fullmatch(text.strip())
    size = 0
    if match and (match[2] or not match[3]):
        size = int(float(match[1]) * (1024 if match[3] else 1000) ** _UNITS[match[2].lower()])
    if size < 1:
        raise UsageError(f"{printable(text, 40)!r} is not a size.", expected="a size such as 4GB or 512MiB")
    return size


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of ``tcp://HOST:PORT``; a host in brackets (IPv6) comes back without them.

    Raises:
        UsageError: not such an address, or a port above 65535.
    """
    match = _ADDRESS.fullmatch(text)
    if match is None or int(match[2]) > 65535:
        raise UsageError(f"{printable(text, 80)!r} is not an address.", expected="tcp://HOST:PORT")
    return match[1].strip("[]"), int(match[2])


def on_loopback(address: str) -> bool:
    """Whether an address can be reached from this machine only."""
    host, _ = parse_address(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def parse_shape(text: str) -> tuple[int, int]:
    """Rows and length of a batch written as ``8x128``.

    Raises:
        UsageError: not such a shape.
    """
    match = _SHAPE.fullmatch(text)
    if match is None:
        raise UsageError(f"{printable(text, 40)!r} is not a shape.", expected="ROWSxLENGTH, such as 8x128")
    return int(match[1]), int(match[2])


def parse_pairs(pairs: Sequence[str], option: str) -> dict[str, str]:
    """The NAME=VALUE texts of a repeatable option as a dictionary.

    Raises:
        UsageError: one is not written so, or a name stands there twice.
    """
    values: dict[str, str] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if not name or not value:
            raise UsageError(f"{option} was given as {printable(pair, 60)!r}.", expected="NAME=VALUE")
        if name in values:
            raise UsageError(f"{option} names {printable(name, 60)!r} twice.")
        values[name] = value
    return values


def _accepts(parse: Callable[[str], object]) -> Callable[[str], bool]:
    def test(text: str) -> bool:
        try:
            parse(text)
        except SplitflError:
            return False
        return True

    return test


is_size = _accepts(parse_size)
is_address = _accepts(parse_address)
is_shape = _accepts(parse_shape)


def is_device(text: str) -> bool:
    """Whether `text` is cpu, cuda or cuda:N."""
    return _DEVICE.fullmatch(text) is not None


def training_arguments(pairs: Sequence[str], taken: Mapping[str, str] | None = None) -> dict[str, Any]:
    """NAME=VALUE pairs as keyword arguments for `transformers.TrainingArguments`, each of its field's type.

    Lists and dictionaries are written as JSON, nothing as ``none``. Imports transformers.

    Args:
        pairs: the pairs.
        taken: names that have an option of their own, with that option.

    Raises:
        UsageError: an unknown, repeated or taken name, or a value of the wrong type.
    """
    if not pairs:
        return {}
    from transformers import TrainingArguments

    kinds = {field.name: field.type for field in dataclasses.fields(TrainingArguments) if field.init}
    values: dict[str, Any] = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        name = name.strip().replace("-", "_")
        if taken and name in taken:
            raise UsageError(f"{name} cannot be given as a training argument.", hint=f"use {taken[name]}")
        if name not in kinds:
            raise UsageError(
                f"There is no training argument {printable(name, 60)!r}.",
                hint=nearest(name, set(kinds) - set(taken or ())),
            )
        if name in values:
            raise UsageError(f"The training argument {name!r} was given twice.")
        values[name] = _parsed(name, kinds[name], text.strip())
    return values


_NOTHING = object()


def _parsed(name: str, kind: Any, text: str) -> Any:
    union = typing.get_origin(kind) in (types.UnionType, typing.Union)
    kinds = typing.get_args(kind) if union else (kind,)
    enums = [k for k in kinds if isinstance(k, type) and issubclass(k, enum.Enum)]
    for enumeration in enums:
        if text in [member.value for member in enumeration]:
            return text
    if enums:
        allowed = [str(member.value) for enumeration in enums for member in enumeration]
        raise UsageError(f"{name} was given as {printable(text, 60)!r}.", hint=nearest(text, allowed))
    for reader in _READERS:
        value = reader(kinds, text)
        if value is not _NOTHING:
            return value
    words = ", ".join(getattr(k, "__name__", str(k)) for k in kinds)
    raise UsageError(f"{name} was given as {printable(text, 60)!r}.", expected=words.replace("NoneType", "none"))


def _none(kinds: Sequence[Any], text: str) -> Any:
    return None if type(None) in kinds and str not in kinds and text.lower() in ("none", "null") else _NOTHING


def _bool(kinds: Sequence[Any], text: str) -> Any:
    return {"true": True, "false": False}.get(text.lower(), _NOTHING) if bool in kinds else _NOTHING


def _number(kinds: Sequence[Any], text: str) -> Any:
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                continue
    return _NOTHING


def _json(kinds: Sequence[Any], text: str) -> Any:
    shapes = tuple({typing.get_origin(k) or k for k in kinds} & {list, dict})
    if not shapes or text[:1] not in ("[", "{"):
        return _NOTHING
    try:
        value = json.loads(text)
    except ValueError:
        return _NOTHING
    return value if isinstance(value, shapes) else _NOTHING


def _text(kinds: Sequence[Any], text: str) -> Any:
    return text if str in kinds else _NOTHING


_READERS: tuple[Callable[[Sequence[Any], str], Any], ...] = (_none, _bool, _number, _json, _text)
