"""`python -m tests.pages`: write the generated parts of the pages in docs/ again.

A generated part stands between ``<!-- begin: NAME -->`` and ``<!-- end: NAME -->``. `PARTS` says what belongs there;
`tests/test_docs.py` compares, so that no table on a page can differ from the code.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from model_owner import admission, memory, serve, sessions
from party import session as party_session
from splitfl import errors
from splitfl.config import ServeSettings, TuneSettings
from splitfl.options import fields_of
from splitfl.wire import channel, frames, messages, steps
from splitfl.wire.session import TABLE, State
from tests.journey import Figures, measure

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    titles = list(head)
    lines = [titles, ["---"] * len(titles), *map(list, rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


# ---- docs/journey.md


@functools.cache
def journey() -> Figures:
    """The figures of the journey, measured; a minute or so."""
    with tempfile.TemporaryDirectory() as folder:
        return measure(Path(folder))


def header(figures: Figures) -> str:
    """The header of a forward, as JSON."""
    return f"```json\n{figures['header of the forward']}\n```"


def retry(figures: Figures) -> str:
    """What crossed in a retry; arrows as the party sees them."""
    return "\n".join(["```", *figures["messages of the retry"], "```"])


# ---- docs/wire.md


def states() -> str:
    """The table of `splitfl.wire.session`: what each message makes of each state."""
    words = list(dict.fromkeys(word for legal in TABLE.values() for word in legal))
    ours = {"hello", "forward", "backward", "release", "bye"}
    ordered = [*(w for w in words if w in ours), *(w for w in words if w not in ours)]
    rows = ((f"`{word}`", *(_next(state, word) for state in State)) for word in ordered)
    return table(("message", *(f"in {state.value}" for state in State)), rows)


def _next(state: State, word: str) -> str:
    after = TABLE[state].get(word)
    return "" if after is None else "stays" if after is state else after.value


def message_fields() -> str:
    """Every message with its fields, types, defaults and tensors, from the source of `splitfl.wire.messages`."""
    tree = ast.parse(Path(messages.__file__ or "").read_text(encoding="utf-8"))
    parts = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and any(isinstance(b, ast.Name) and b.id == "Message" for b in node.bases):
            parts.append("\n".join(_message(node)))
    return "\n\n".join(parts)


def _message(node: ast.ClassDef) -> Iterator[str]:
    tag = next(ast.literal_eval(k.value) for k in node.keywords if k.arg == "tag")
    sender = "party" if node.name in {member.__name__ for member in messages.FromParty.__args__} else "owner"
    yield f"#### `{tag}`, from the {sender}\n"
    yield f"{_unwrapped(ast.get_docstring(node))}\n"
    required, optional = frames.TENSORS_OF.get(tag, (frozenset(), frozenset()))
    names = [*(f"`{n}`" for n in sorted(required)), *(f"`{n}` (may be left out)" for n in sorted(optional))]
    yield f"Tensor frames: {', '.join(names) or 'none'}."
    fields = list(_fields(node))
    if fields:
        yield "\n" + table(("field", "type", "default", "meaning"), fields)


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, ...]]:
    for statement, after in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign):
            continue
        said = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
        default = f"`{ast.unparse(statement.value)}`" if statement.value is not None else "must be given"
        kind = ast.unparse(statement.annotation).replace("|", "\\|")
        yield f"`{ast.unparse(statement.target)}`", f"`{kind}`", default, _unwrapped(str(said))


def _unwrapped(text: str | None) -> str:
    return re.sub(r"\s+", " ", text or "").replace("``", "`").replace("|", "\\|").strip()


def limits() -> str:
    """Numbers that bound what a peer may send, hold or make the other side wait for."""
    hosting = {f.name: f.default for f in fields_of(ServeSettings)}
    tune = {f.name: f.default for f in fields_of(TuneSettings)}
    rows = [
        ("frames of one message", f"1 to {1 + frames.MAX_TENSORS}", "both sides"),
        ("header", f"{frames.MAX_HEADER_BYTES:,} bytes", "both sides"),
        ("one text in a header", f"{frames.MAX_TEXT_BYTES:,} bytes", "both sides"),
        ("one integer in a header", f"0 to {frames.MAX_INTEGER:,}", "both sides"),
        ("requests without an answer in one session", f"{steps.MAX_OPEN}", "both sides"),
        ("fetches without an answer in one session", f"{steps.MAX_FETCHES}", "both sides"),
        ("bytes of a file in one message", f"{messages.MAX_PIECE:,}", "both sides"),
        ("steps that await their backward in one session", f"{steps.MAX_OPEN}", "both sides"),
        ("answered requests remembered, to know a repeated answer", f"{steps.MAX_ANSWERED:,}", "both sides"),
        ("messages queued in one direction of one link", f"{channel.QUEUE}", "both sides"),
        ("rows x positions of one request", f"{hosting['max_tokens']:,} (`--max-tokens`)", "owner, in its welcome"),
        ("the same, whatever the welcome says", f"{party_session.LARGEST_BATCH_TOKENS:,}", "party"),
        ("sessions at one time", f"{hosting['max_sessions']} (`--max-sessions`)", "owner"),
        ("sessions of one party", f"{serve._SESSIONS_PER_PARTY}, and fewer than all of them", "owner"),
        ("silence after which a party's next session may replace one", f"{admission._FORGOTTEN_S:g} s", "owner"),
        ("kept steps and caches of all parties", f"{hosting['memory_budget']} (`--memory-budget`)", "owner"),
        ("kept steps and caches of one party", f"{memory.GREED} times what it leaves free of that", "owner"),
        ("requests that wait for a worker", "as many bytes as `--memory-budget`", "owner"),
        ("replies remembered in one session", f"{sessions._REPLIES_REMEMBERED}", "owner"),
        ("silence after which a session and what it holds end", f"{hosting['lease']:g} s (`--lease`)", "owner"),
        ("wait for one answer", f"{tune['timeout']:g} s (`--timeout`)", "party"),
        ("silence after which a request is sent again", f"{party_session.Session.resend_after_s:g} s", "party"),
        ("CURVE handshake", f"{channel._HANDSHAKE_MS / 1000:g} s", "both sides"),
        ("heartbeat", f"every {channel._HEARTBEAT_MS / 1000:g} s", "both sides"),
    ]
    return table(("what", "limit", "who checks"), rows)


def refusals() -> str:
    """`messages.REFUSAL_CODES`."""
    return table(("code", "meaning"), ((f"`{code}`", text) for code, text in messages.REFUSAL_CODES.items()))


# ---- docs/reliability.md


def exit_codes() -> str:
    """Exit codes, from the classes in `splitfl.errors`."""
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.SplitflError)]
    own = sorted((c for c in classes if "exit_code" in vars(c) and c.__mro__[1] is not Exception), key=_code)
    rows = [("0", "", "done"), ("1", "", "`splitfl doctor`: a check found something that is not well")]
    rows += [(str(c.exit_code), f"`{c.__name__}`", _first_line(c)) for c in own]
    rows.append((str(errors.INTERRUPTED_EXIT_CODE), "", "stopped by Ctrl-C or SIGTERM"))
    return table(("exit code", "class", "what it means"), rows)


def _code(cls: type[errors.SplitflError]) -> int:
    return cls.exit_code


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").partition("\n")[0].rstrip(".").replace("``", "`")


# ---- in place

PARTS: dict[str, dict[str, Callable[[], str]]] = {
    "journey.md": {"header": lambda: header(journey()), "retry": lambda: retry(journey())},
    "wire.md": {"states": states, "messages": message_fields, "limits": limits, "refusals": refusals},
    "reliability.md": {"exit codes": exit_codes},
}


def part_of(text: str, name: str) -> str:
    """What stands between the marks of part `name`."""
    found = re.search(_marks(name), text, re.DOTALL)
    assert found is not None, f"there are no marks of {name!r}"
    return found[2].strip()


def with_part(text: str, name: str, content: str) -> str:
    """`text` with another content between those marks."""
    return re.sub(_marks(name), lambda found: f"{found[1]}\n{content}\n{found[3]}", text, flags=re.DOTALL)


def _marks(name: str) -> str:
    return rf"(<!-- begin: {re.escape(name)} -->)(.*?)(<!-- end: {re.escape(name)} -->)"


def rewrite(page: Path, parts: dict[str, Callable[[], str]]) -> None:
    """Write all parts of one page again."""
    text = page.read_text(encoding="utf-8")
    for name, make in parts.items():
        part_of(text, name)
        text = with_part(text, name, make())
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    for page_name, page_parts in PARTS.items():
        rewrite(DOCS / page_name, page_parts)
        print(f"docs/{page_name}: {', '.join(page_parts)}", file=sys.stderr)
