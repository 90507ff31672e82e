"""What goes through the pipes between `he_worker` and `he_child`; see the latter for what it means."""

from __future__ import annotations

import struct
from typing import IO

from splitfl.aggregation.lattice import SCHEMES, Form, Scheme

REQUEST = struct.Struct("<ccc32sQQQ")
ANSWER = struct.Struct("<cQ")
OPS = {"encrypt": b"E", "open": b"O", "check": b"K"}
FORMS: dict[Form, bytes] = {"seeded": b"s", "public": b"p"}
_SCHEME_CODES = {name: name[:1].encode() for name in SCHEMES}


def request(op: str, scheme: Scheme, form: Form, secret: bytes, values: int, updates: int, length: int) -> bytes:
    """The head of a request; a body of `length` bytes follows."""
    return REQUEST.pack(OPS[op], _SCHEME_CODES[scheme.name], FORMS[form], secret, values, updates, length)


def scheme_and_form(scheme: bytes, form: bytes) -> tuple[Scheme, Form]:
    """What the two codes in a head stand for.

    Raises:
        KeyError: nothing.
    """
    found = {code: SCHEMES[name] for name, code in _SCHEME_CODES.items()}[scheme]
    return found, {code: name for name, code in FORMS.items()}[form]


def fill(source: IO[bytes], size: int) -> bytearray:
    """Exactly `size` bytes.

    Raises:
        EOFError: the other side ended before.
    """
    body = bytearray(size)
    view, at = memoryview(body), 0
    while at < size:
        got = source.readinto(view[at:])  # type: ignore[attr-defined]
        if not got:
            raise EOFError("the other side of the pipe ended in the middle of a message")
        at += got
    return body
