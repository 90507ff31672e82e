"""Step 1 of the journey, third of four: checked rows -> text, and where in it the answers stand.

    form                      with a chat template            without one
    messages                  as the template says            a line a turn, ``role: content``; eos ends an answer
    prompt and completion     a user and an assistant turn    prompt + completion + eos, joined as they are
    instruction               the same; input or context      the same, with a blank line between the parts
                              after a blank line
    text                      never templated: the text as it is

An answer begins where the prompt, rendered alone with its invitation to answer, ends, and reaches to the end of the
turn, so that the model learns to stop. Where a template renders a turn differently once others follow it (some drop
earlier reasoning), the answer is looked for by its content.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from splitfl.errors import DataError, printable
from splitfl.rows import FormName, Row, Rows, Turn


@dataclass(frozen=True, slots=True, repr=False)
class Rendered:
    """The text of one row, with the character ranges `[begin, end)` of its answers."""

    text: str
    answers: tuple[tuple[int, int], ...]


def has_template(tokenizer: Any, form: FormName) -> bool:
    """Whether rows of this form are rendered by the tokenizer's chat template."""
    return bool(tokenizer.chat_template) and form in ("messages", "prompt-completion", "instruction")


def render(rows: Rows, chunk: Sequence[Row], tokenizer: Any, *, eos: str, answer_only: bool) -> list[Rendered]:
    """Render some rows of `rows`.

    Args:
        rows: the whole file, for its form and for places in errors.
        chunk: the rows to render.
        tokenizer: its chat template is used where it has one.
        eos: text that ends the answers inside a row where no chat template does. The end of a row is not marked:
            there the token itself is put.
        answer_only: whether to look for the answers; without, the whole text of a row is one answer.

    Raises:
        DataError: the chat template refuses a row, or does not show an answer as one stretch of text.
    """
    if rows.form == "text":
        return [Rendered(str(row.text), ((0, len(str(row.text))),)) for row in chunk]
    if has_template(tokenizer, rows.form):
        rendered = _templated(rows, chunk, tokenizer, answer_only=answer_only)
    else:
        rendered = [_joined(row, rows.form, eos) for row in chunk]
    return rendered if answer_only else [Rendered(each.text, ((0, len(each.text)),)) for each in rendered]


def render_prompt(tokenizer: Any, prompt: str | Sequence[Turn], form: FormName, *, eos: str = "") -> str:
    """The text that a model tuned on rows of this form is to continue; `prompt` is a string, or the turns so far."""
    if isinstance(prompt, str) and (form == "text" or (form != "messages" and not has_template(tokenizer, form))):
        return prompt + _gap(form)
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if has_template(tokenizer, form):
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    return _turns_joined([*turns, {"role": "assistant", "content": ""}], eos)[0].removesuffix(" ")


def shared_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many elements (or characters) two sequences share at their beginning."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


# ---- without a template


def _gap(form: FormName) -> str:
    return "\n\n" if form == "instruction" else ""


def _joined(row: Row, form: FormName, eos: str) -> Rendered:
    if not row.messages:
        return _parts_joined(row, form)
    text, answers = _turns_joined(row.messages, eos)
    return Rendered(text, tuple(span for number, span in answers.items() if number >= row.answers_from))


def _parts_joined(row: Row, form: FormName) -> Rendered:
    prompt = f"{row.prompt}{_gap(form)}"
    return Rendered(prompt + str(row.completion), ((len(prompt), len(prompt) + len(str(row.completion))),))


def _turns_joined(turns: Sequence[Turn], eos: str) -> tuple[str, dict[int, tuple[int, int]]]:
    """The text of the turns, and the range of each assistant turn by its number. The last turn is not ended."""
    text, answers = "", {}
    for number, turn in enumerate(turns):
        text += f"{turn['role']}:"
        begin = len(text)
        text += f" {turn['content']}"
        last = number + 1 == len(turns)
        if turn["role"] == "assistant":
            text += "" if last or turn["content"].endswith(eos) else eos
            answers[number] = (begin, len(text))
        text += "" if last else "\n"
    return text, answers


# ---- with a template


def _turns(row: Row) -> list[Turn]:
    if row.messages:
        return list(row.messages)
    return [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.completion}]


def _templated(rows: Rows, chunk: Sequence[Row], tokenizer: Any, *, answer_only: bool) -> list[Rendered]:
    chats = [_turns(row) for row in chunk]
    texts = _apply(tokenizer, chats, invite=False)
    for row, chat, text in zip(chunk, chats, texts, strict=True):
        if text is None:
            raise _refused(rows.place(row), tokenizer, chat)
    wholes = [str(text) for text in texts]
    if not answer_only:
        return [Rendered(whole, ()) for whole in wholes]
    wanted = [
        (index, number)
        for index, (row, chat) in enumerate(zip(chunk, chats, strict=True))
        for number, turn in enumerate(chat)
        if turn["role"] == "assistant" and number >= row.answers_from
    ]
    # Rendered in two batches: what stands before each answer, and what stands up to its end when it is not the last.
    before = _batch(tokenizer, {(i, n): chats[i][:n] for i, n in wanted if n}, invite=True)
    up_to = _batch(tokenizer, {(i, n): chats[i][: n + 1] for i, n in wanted if n + 1 < len(chats[i])}, invite=False)
    answers: list[list[tuple[int, int]]] = [[] for _ in chunk]
    for i, n in wanted:
        cursor = answers[i][-1][1] if answers[i] else 0
        begin = _begin(wholes[i], chats[i], n, before.get((i, n)), cursor)
        last = n + 1 == len(chats[i])
        end = len(wholes[i]) if last else _end(wholes[i], chats[i][n], up_to.get((i, n)), begin)
        # Its last word is enough to know an answer by: templates trim answers and drop reasoning before them.
        if not cursor <= begin < end or chats[i][n]["content"].split()[-1] not in wholes[i][begin:end]:
            problem = f"{rows.place(chunk[i])}: the chat template does not show turn {n + 1} as one stretch of text"
            hint = "count the loss on every token (answer_only = false), or change the template"
            raise DataError(problem, expected="an answer that can be told from the rest of the row", hint=hint)
        answers[i].append((begin, end))
    return [Rendered(whole, tuple(found)) for whole, found in zip(wholes, answers, strict=True)]


def _batch(tokenizer: Any, chats: Mapping[tuple[int, int], list[Turn]], *, invite: bool) -> dict[Any, str | None]:
    return dict(zip(chats, _apply(tokenizer, list(chats.values()), invite=invite), strict=True))


def _apply(tokenizer: Any, chats: list[list[Turn]], *, invite: bool) -> list[str | None]:
    """Each chat rendered, or None where the template refuses it; `invite` adds the opening of an answer."""
    if not chats:
        return []
    try:
        return list(tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=invite))
    except Exception:  # a template is foreign code: it may raise anything
        if len(chats) == 1:
            return [None]
    half = len(chats) // 2
    return _apply(tokenizer, chats[:half], invite=invite) + _apply(tokenizer, chats[half:], invite=invite)


def _refused(place: str, tokenizer: Any, chat: list[Turn]) -> DataError:
    try:
        tokenizer.apply_chat_template(chat, tokenize=False)
        reason = "without a reason"
    except Exception as error:  # see above
        # The template's own words are shown only if they stand in the template: words made from the row are not.
        fixed = str(error) and str(error) in str(tokenizer.chat_template)
        reason = printable(str(error)) if fixed else type(error).__name__
    roles = ", ".join(str(turn["role"]) if turn["role"] in _KNOWN_ROLES else "another role" for turn in chat[:8])
    return DataError(
        f"{place}: the chat template refuses the row: {reason}",
        expected="turns that it allows",
        hint=f"the row's turns are {roles}{', ...' * (len(chat) > 8)}",
    )


_KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool")


def _begin(whole: str, chat: list[Turn], number: int, before: str | None, cursor: int) -> int:
    """Where an answer begins: after all that stands before it when rendered alone, invitation included."""
    if before is not None and whole.startswith(before):
        return len(before)
    if before is not None:
        cursor = max(cursor, shared_length(whole, before))
    elif number:
        previous = chat[number - 1]["content"].strip()
        at = whole.find(previous, cursor)
        cursor = cursor if at < 0 else at + len(previous)
    at = whole.find(chat[number]["content"].strip(), cursor)
    # Not found as it stands (reasoning dropped, say): the answer is what follows the part that the two share.
    return at if at >= 0 or before is None else cursor


def _end(whole: str, turn: Turn, up_to: str | None, begin: int) -> int:
    """Where an answer that is not the last turn ends; -1 where that cannot be told."""
    if up_to is not None and whole.startswith(up_to):
        return len(up_to)
    content = turn["content"].strip()
    last_line = content.rsplit("\n", 1)[-1]
    _, found, closing = (up_to or "").rpartition(last_line)
    at = whole.find(content, begin)
    if at >= 0:
        end = at + len(content)
        return end + (shared_length(closing, whole[end:]) if found else 0)
    at = whole.find(closing, begin) if found and closing.strip() else -1
    return at + len(closing) if at >= 0 else -1
