"""Rendering: where the answers of a row stand, under real chat templates and under awkward ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from splitfl.errors import DataError
from splitfl.rendering import render, render_prompt, shared_length
from splitfl.rows import load_rows
from tests.small_tokenizers import CHATML, DATA, TERSE, THINKING, bpe

SECRET = "Zacharias4711"


def written(path: Path, *chats: list[tuple[str, str]]) -> Path:
    rows = [{"messages": [{"role": role, "content": content} for role, content in chat]} for chat in chats]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def answers(path: Path, tokenizer: Any, eos: str = "</s>") -> list[list[str]]:
    rows = load_rows(path, task="causal-lm")
    found = render(rows, list(rows), tokenizer, eos=eos, answer_only=True)
    return [[each.text[begin:end] for begin, end in each.answers] for each in found]


@pytest.mark.parametrize(
    ("template", "ends", "opens"),
    [(None, "", " "), (CHATML, "<|im_end|>\n", ""), (TERSE, "</s>", " "), (THINKING, "", "")],
    ids=["none", "chatml", "terse", "thinking"],
)
def test_every_assistant_turn_is_an_answer_up_to_its_end(
    tmp_path: Path, template: str | None, ends: str, opens: str
) -> None:
    inside = "" if template else "</s>"  # without a template the last eos is put as a token, later
    chats = [
        [("user", "Say yes."), ("assistant", "yes"), ("user", "Say yes again."), ("assistant", "yes\nand yes")],
        [("user", "yes?"), ("assistant", "no")],
    ]
    assert answers(written(tmp_path / "rows.jsonl", *chats), bpe(template)) == [
        [f"{opens}yes{ends or inside}", f"{opens}yes\nand yes{ends}"],
        [f"{opens}no{ends}"],
    ]


def test_turns_of_the_prompt_are_no_answers() -> None:
    assert answers(DATA / "prompt_completion_turns.jsonl", bpe(CHATML))[1] == [
        "Two miles east of the mill.<|im_end|>\n"
    ]
    assert answers(DATA / "prompt_completion_turns.jsonl", bpe())[1] == [" Two miles east of the mill."]


def test_rows_without_a_template_are_joined_as_they_are() -> None:
    rows = load_rows(DATA / "alpaca.jsonl", task="causal-lm")
    first = render(rows, rows[:1], bpe(), eos="</s>", answer_only=True)[0]
    assert first.text == "Put the words in order.\n\nmill old the\n\nthe old mill"
    rows = load_rows(DATA / "prompt_completion.jsonl", task="causal-lm")
    first = render(rows, rows[:1], bpe(), eos="</s>", answer_only=True)[0]
    assert first.text == "Where does the river end? In the salt marsh, two miles east of the mill."


def test_an_answer_that_ends_itself_is_not_ended_twice(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", [("user", "a"), ("assistant", "b</s>"), ("user", "c")])
    assert answers(path, bpe()) == [[" b</s>"]]


def test_an_answer_without_a_turn_before_it(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", [("assistant", "Welcome."), ("user", "Hm."), ("assistant", "Welcome.")])
    assert answers(path, bpe(CHATML)) == [["Welcome.<|im_end|>\n", "Welcome.<|im_end|>\n"]]


def test_reasoning_that_a_template_drops_later(tmp_path: Path) -> None:
    chat = [("user", "a"), ("assistant", "<think>x\ny</think>first\nline"), ("user", "line"), ("assistant", "end")]
    keeps_last = (
        "{% for m in messages %}<{{ m['role'] }}>"
        "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}<done>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    path = written(tmp_path / "rows.jsonl", chat)
    assert answers(path, bpe(keeps_last)) == [["first\nline<done>\n", "end<done>\n"]]


def test_a_template_that_marks_the_end_of_the_whole_row(tmp_path: Path) -> None:
    marks = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}[end]\n{% endfor %}{{ eos_token }}"
    chat = [("user", "Say yes."), ("assistant", "yes\nyes"), ("user", "yes?"), ("assistant", "yes")]
    path = written(tmp_path / "rows.jsonl", chat)
    assert answers(path, bpe(marks)) == [["yes\nyes[end]\n", "yes[end]\n</s>"]]


def test_a_template_that_renders_whole_exchanges_only(tmp_path: Path) -> None:
    even = (
        "{% if messages | length % 2 %}{{ raise_exception('in pairs') }}{% endif %}"
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    )
    path = written(tmp_path / "rows.jsonl", [("user", "Say yes."), ("assistant", "yes")] * 2)
    assert answers(path, bpe(even)) == [["yes", "yes"]]
    rows = load_rows(path, task="causal-lm")
    [found] = render(rows, list(rows), bpe(even), eos="", answer_only=True)
    assert [found.text[:begin].endswith("[assistant]") for begin, _ in found.answers] == [True, True]


REAL = sorted((Path(str(pytest.importorskip("trl").__file__)).parent / "chat_templates").glob("*.jinja"))
# For pictures: these read content as a list of parts and show nothing of a string, or stop at it.
NEEDS_PARTS = ("idefics3", "smolvlm", "llava_next")


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_templates_of_published_models(tmp_path: Path, path: Path) -> None:
    turns = [
        ("user", "Say quince."),
        ("assistant", "quince one\nquince two"),
        ("user", "And medlar?"),
        ("assistant", "medlar three"),
    ]
    rows = written(tmp_path / "rows.jsonl", turns)
    tokenizer = bpe(path.read_text(encoding="utf-8"))
    if path.stem.removesuffix("_training") in NEEDS_PARTS:
        with pytest.raises(DataError, match=r"rows\.jsonl:1: the chat template (refuses|does not show)"):
            answers(rows, tokenizer)
        return
    first, second = answers(rows, tokenizer)[0]
    assert "quince one\nquince two" in first
    assert "medlar three" in second
    for answer in (first, second):
        assert not any(word in answer for word in ("Say", "And medlar?"))
    prompt = render_prompt(tokenizer, [{"role": role, "content": content} for role, content in turns[:3]], "messages")
    whole = str(tokenizer.apply_chat_template(load_rows(rows, task="causal-lm")[0].messages, tokenize=False))
    if whole.startswith(prompt):  # then what is learnt is what follows the prompt, to the last character
        assert prompt + second == whole


def test_a_refusal_names_the_row_and_the_reason(tmp_path: Path) -> None:
    good = [("user", "a"), ("assistant", "b")]
    path = written(tmp_path / "rows.jsonl", *[good] * 700, [("system", SECRET), *good], *[good] * 700)
    with pytest.raises(DataError) as caught:
        answers(path, bpe(TERSE))
    said = str(caught.value)
    assert said.startswith(f"{path}:701: the chat template refuses the row: Only user and assistant.")
    assert "system, user, assistant" in said
    assert SECRET not in said
    assert caught.value.__context__ is None


@pytest.mark.parametrize("reason", ["'No: ' + messages[0]['content']", "messages[0]['content']"])
def test_a_refusal_that_quotes_the_row_is_not_repeated(tmp_path: Path, reason: str) -> None:
    path = written(tmp_path / "rows.jsonl", [("user", SECRET), (SECRET, "x"), ("assistant", "y")])
    with pytest.raises(DataError, match="TemplateError") as caught:
        answers(path, bpe("{{ raise_exception(" + reason + ") }}"))
    assert SECRET not in str(caught.value)
    assert "another role" in str(caught.value)


def test_an_answer_that_a_template_hides_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", [("user", "a"), ("assistant", SECRET)])
    with pytest.raises(DataError, match="turn 2 as one stretch") as caught:
        answers(path, bpe("{% for m in messages %}<{{ m['role'] }}>{% endfor %}!"))
    assert SECRET not in str(caught.value)
    rows = load_rows(path, task="causal-lm")
    whole = render(rows, list(rows), bpe("{% for m in messages %}x{% endfor %}"), eos="", answer_only=False)[0]
    assert (whole.text, whole.answers) == ("xx", ((0, 2),))


@pytest.mark.parametrize(
    ("form", "template", "prompt", "text"),
    [
        ("text", CHATML, "Once", "Once"),
        ("prompt-completion", None, "Where?", "Where?"),
        ("instruction", None, "Where?", "Where?\n\n"),
        ("messages", None, "Where?", "user: Where?\nassistant:"),
        ("instruction", CHATML, "Where?", "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n"),
        ("messages", None, [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
         "system: s\nuser: u\nassistant:"),
    ],
)  # fmt: skip
def test_prompts_are_rendered_as_the_rows_were(form: Any, template: str | None, prompt: Any, text: str) -> None:
    assert render_prompt(bpe(template), prompt, form) == text


def test_shared_length() -> None:
    assert [shared_length("abc", "abd"), shared_length("ab", "abc"), shared_length([], [1])] == [2, 2, 0]
