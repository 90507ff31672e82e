"""The default hook: does a Java file parse? `python -m examples.code_migration.syntax FILE`; exit code 0 if it does."""

from __future__ import annotations

import sys
from pathlib import Path

from splitfl.errors import UsageError

CLASS = "class Proposal {{\n{}\n}}\n"
"""What a method is put into, since rows hold methods alone."""


def unit(method: str) -> str:
    """A method as a file that could be compiled, were its names known."""
    return CLASS.format(method)


def mistakes(code: str) -> list[int]:
    """Lines, from 1, where the parser found an error or put in what is missing.

    Raises:
        UsageError: the extra `recipes` is not installed.
    """
    try:
        import tree_sitter_java
        from tree_sitter import Language, Parser
    except ImportError as error:
        raise UsageError(
            f"the syntax check needs {error.name}, which is not installed", hint="pip install 'splitfl[recipes]'"
        ) from error
    parser, found = Parser(), list[int]()
    parser.language = Language(tree_sitter_java.language())
    nodes = [parser.parse(code.encode()).root_node]
    while nodes:
        node = nodes.pop()
        if node.is_error or node.is_missing:
            found.append(node.start_point[0] + 1)
        elif node.has_error:
            nodes += node.children
    return sorted(found)


def main() -> None:
    """The command."""
    try:
        found = mistakes(Path(sys.argv[1]).read_text(encoding="utf-8"))
    except UsageError as error:
        sys.exit(str(error))
    if found:
        sys.exit(f"does not parse: line {', '.join(map(str, found))}")


if __name__ == "__main__":
    main()
