"""Migrations as rewrite rules: what an engineer would ask for, and the edit that answers it.

A model is not needed for what a rule can do. The rules are here because they make rows with a known answer from real
code, so that proposals can be scored; a party would put its own landed changes in their place. Each rule is a migration
that people make: newer collections, the diamond, emptiness by name, the renamed results of a cloud client's version 2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from splitfl.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One migration."""

    name: str
    says: str
    """The instruction, as a person would give it."""
    rewrite: Callable[[str], str]
    """A piece of code -> the same piece migrated; unchanged where there is nothing to do."""


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One edit of a method: the lines from `start` to `end` (characters) become `after`."""

    rule: Rule
    method: str
    start: int
    end: int
    after: str

    @property
    def before(self) -> str:
        """The piece that is to change."""
        return self.method[self.start : self.end]

    def applied(self, after: str | None = None) -> str:
        """The whole method with the edit in it, or with another proposal in its place."""
        return self.method[: self.start] + (self.after if after is None else after) + self.method[self.end :]


_BOXES = "Integer|Long|Short|Byte|Character|Float|Double|Boolean"
_RECEIVER = r"((?:\w+\.)*\w+(?:\(\))?)"
_SINGLE = re.compile(r"^(if \((?:[^()]|\([^()]*\))*\))\s*((?:return|throw|continue|break)\b[^;]*;)$")
_DIAMOND = re.compile(r"<([\w ,.?<>\[\]]+)> (\w+) = new (\w+)<\1>\(")


def _sub(pattern: str, put: str) -> Callable[[str], str]:
    found = re.compile(pattern)
    return lambda code: found.sub(put, code)


def _vector(code: str) -> str:
    code = re.sub(r"\bVector\b", "ArrayList", code)
    for old, new in (("elementAt", "get"), ("addElement", "add"), ("removeAllElements", "clear")):
        code = re.sub(rf"\.{old}\(", f".{new}(", code)
    return code


RULES = (
    Rule(name="box", says="Replace constructors of boxes by valueOf.",
         rewrite=_sub(rf"\bnew ({_BOXES})\(", r"\1.valueOf(")),
    Rule(name="diamond", says="Leave out type arguments that can be inferred.",
         rewrite=lambda code: _DIAMOND.sub(r"<\1> \2 = new \3<>(", code)),
    Rule(name="buffer", says="Replace StringBuffer by StringBuilder.",
         rewrite=_sub(r"\bStringBuffer\b", "StringBuilder")),
    Rule(name="vector", says="Replace Vector by ArrayList.",
         rewrite=lambda code: _vector(code) if re.search(r"\bVector\b", code) else code),
    Rule(name="hashtable", says="Replace Hashtable by HashMap.", rewrite=_sub(r"\bHashtable\b(?!\.)", "HashMap")),
    Rule(name="empty", says="Ask isEmpty instead of comparing a size with zero.",
         rewrite=lambda code: _sub(rf"{_RECEIVER}\.(?:size|length)\(\) (?:!=|>) 0\b", r"!\1.isEmpty()")(
             _sub(rf"{_RECEIVER}\.(?:size|length)\(\) == 0\b", r"\1.isEmpty()")(code))),
    Rule(name="to-array", says="Give toArray an array of length zero.",
         rewrite=_sub(r"\.toArray\(new ([\w.]+)\[[\w.]+(?:\.size\(\)|\.length)\]\)", r".toArray(new \1[0])")),
    Rule(name="braces", says="Put braces around a single statement after if.",
         rewrite=lambda code: _SINGLE.sub(r"\1 {\2}", code)),
    Rule(name="response", says="Rename the result type to Response, as version 2 of the client has it.",
         rewrite=_sub(r"\b(\w+)Result (\w+)\((?=\1Request\b)", r"\1Response \2(")),
)  # fmt: skip
"""Every migration; a piece of code may fall under several, and then makes a row for each."""

_PIECE = re.compile(r"[^;{}]+[;{}]?")
_WORD = re.compile(r"\S")


def rule_named(name: str) -> Rule:
    """The rule of this name.

    Raises:
        UsageError: there is none.
    """
    for rule in RULES:
        if rule.name == name:
            return rule
    raise UsageError(f"there is no migration {name!r}", expected=", ".join(rule.name for rule in RULES))


def edits(method: str) -> Iterator[Edit]:
    """Every edit that a rule makes in a method, piece by piece: a statement, or what stands before a brace."""
    for piece in _PIECE.finditer(method):
        first = _WORD.search(piece.group())
        if first is None:
            continue
        before = piece.group()[first.start() :]
        for rule in RULES:
            after = rule.rewrite(before)
            if after != before:
                yield Edit(rule=rule, method=method, start=piece.start() + first.start(), end=piece.end(), after=after)


def instruction(rule: Rule, before: str) -> str:
    """What the model is asked."""
    return f"{rule.says}\nBefore:\n{before}\nAfter:\n"
