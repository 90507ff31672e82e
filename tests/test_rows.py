"""Rows: every form and file kind is read; every bad input is named by file and line, and never quoted."""

from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from splitfl.data import Rows, fingerprint, load_rows
from splitfl.errors import DataError, UsageError

DATA = Path(__file__).parent / "data"
UNHURRIED = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
SECRET = "Zacharias4711"  # stands for content: must not show in any error
CAUSAL, CLASSES = "causal-lm", "sequence-classification"


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The usual one is named after the test's parameters, which hold SECRET here."""
    return tmp_path_factory.mktemp("rows")


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def refusal(path: Path, place: str, *said: str, task: Any = CAUSAL, **options: Any) -> DataError:
    """The error of loading `path`; checks its place and that neither it nor its causes quote the file."""
    with pytest.raises(DataError) as caught:
        load_rows(path, task=task, **options)
    error = caught.value
    assert str(error).startswith(place), str(error)
    for each in said:
        assert each in str(error)
    assert error.expected or error.hint
    chain: BaseException | None = error
    while chain is not None:
        assert SECRET not in str(chain)
        assert not isinstance(chain, (UnicodeError, json.JSONDecodeError))  # they hold what they failed on
        chain = chain.__context__
    return error


# ---- what is read


@pytest.mark.parametrize(
    ("name", "task", "form", "first"),
    [
        ("prompt_completion.jsonl", CAUSAL, "prompt-completion", {"prompt": "Where does the river end?"}),
        ("alpaca.jsonl", CAUSAL, "instruction", {"prompt": "Put the words in order.\n\nmill old the"}),
        ("dolly.jsonl", CAUSAL, "instruction", {"completion": "Agnes owns it."}),
        ("text.jsonl", CAUSAL, "text", {"text": "The fog came in from the marsh before the boats were out."}),
        ("prompt_completion_turns.jsonl", CAUSAL, "prompt-completion", {"answers_from": 1, "prompt": None}),
        ("messages.jsonl", CAUSAL, "messages", {"answers_from": 0, "text": None}),
        ("labelled.jsonl", CLASSES, "labelled text", {"text": "The crates came on time and dry.", "label": "praise"}),
        ("labelled_pairs.jsonl", CLASSES, "labelled pair", {"text_pair": "A boat left early.", "label": 1}),
        ("labels.tsv", CLASSES, "labelled text", {"text": "The rope is strong.", "label": 1}),
    ],
)
def test_forms(name: str, task: Any, form: str, first: dict[str, Any]) -> None:
    rows = load_rows(DATA / name, task=task)
    assert rows.form == form
    assert {key: getattr(rows[0], key) for key in first} == first
    assert rows[0].line == (2 if name.endswith(".tsv") else 1)
    assert len(rows) == len((DATA / name).read_text(encoding="utf-8").splitlines()) - name.endswith(".tsv")


def test_optional_parts_of_an_instruction_may_be_empty_null_or_missing() -> None:
    prompts = [row.prompt for row in load_rows(DATA / "alpaca.jsonl", task=CAUSAL)]
    assert prompts[1:] == ["Name a bird that wades.", "Name a tree that likes wet ground."]
    assert load_rows(DATA / "dolly.jsonl", task=CAUSAL)[1].prompt == "What is a weir?"


def test_table_with_quotes_line_ends_and_a_column_map() -> None:
    rows = load_rows(DATA / "questions.csv", task=CAUSAL, columns={"prompt": "question", "completion": "answer"})
    assert [row.line for row in rows] == [2, 3, 6]
    assert rows[1].completion == '"Keep out",\nand nothing else.'


def test_column_map_on_json_and_for_classes(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", {"sentence1": "a b", "sentence2": "c", "label": 0, "text": "not this"})
    rows = load_rows(path, task=CLASSES, columns={"text": "sentence1", "text_pair": "sentence2"})
    assert (rows.form, rows[0].text, rows[0].text_pair) == ("labelled pair", "a b", "c")


def test_column_map_decides_between_forms(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", {"instruction": "i", "output": "o", "text": "whole"})
    assert load_rows(path, task=CAUSAL).form == "instruction"
    assert load_rows(path, task=CAUSAL, columns={"text": "text"})[0].text == "whole"


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_paragraphs_of_plain_text(tmp_path: Path, line_end: bytes) -> None:
    path = tmp_path / "rows.txt"
    path.write_bytes((DATA / "harbour.txt").read_bytes().replace(b"\r", b"").replace(b"\n", line_end))
    rows = load_rows(path, task=CAUSAL)
    assert rows.paragraphs
    assert [row.line for row in rows] == [1, 5, 9, 13]  # a line of blanks separates too
    assert str(rows[0].text).endswith("from\nthe window of his mill.")


@pytest.mark.parametrize("wrap", ["bom", "crlf", "blank lines", "no last line end", "gzip", "bom inside"])
def test_the_same_rows_in_another_dress(tmp_path: Path, wrap: str) -> None:
    plain = (DATA / "messages.jsonl").read_bytes().replace(b"\r\n", b"\n")
    dressed = {
        "bom": b"\xef\xbb\xbf" + plain,
        "crlf": plain.replace(b"\n", b"\r\n"),
        "blank lines": b"\n  \n" + plain.replace(b"\n", b"\n\n"),
        "no last line end": plain.rstrip(b"\n"),
        "gzip": gzip.compress(plain),
        "bom inside": plain.replace(b"\n", b"\n\xef\xbb\xbf", 1),
    }[wrap]
    path = tmp_path / ("rows.jsonl.gz" if wrap == "gzip" else "rows.jsonl")
    path.write_bytes(dressed)
    read, expected = load_rows(path, task=CAUSAL), load_rows(DATA / "messages.jsonl", task=CAUSAL)
    assert [row.messages for row in read] == [row.messages for row in expected]


def test_unusual_line_ends_inside_a_string_do_not_split_a_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one\u2028two\u0085three"}\n', encoding="utf-8")
    assert load_rows(path, task=CAUSAL)[0].text == "one\u2028two\u0085three"


def test_saved_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    records = [json.loads(line) for line in (DATA / "messages.jsonl").read_text(encoding="utf-8").splitlines()]
    one = datasets.Dataset.from_list(records)
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": one, "validation": one.select([1])}).save_to_disk(str(tmp_path / "many"))
    written = fingerprint(load_rows(DATA / "messages.jsonl", task=CAUSAL))
    assert fingerprint(load_rows(tmp_path / "one", task=CAUSAL)) == written
    assert fingerprint(load_rows(tmp_path / "many", task=CAUSAL)) == written
    assert [row.line for row in load_rows(tmp_path / "many:validation", task=CAUSAL)] == [1]
    refusal(tmp_path / "many:test", str(tmp_path), "no split 'test'", "train, validation")
    refusal(tmp_path / "one:train", str(tmp_path), "without splits")


def test_saved_dataset_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="pip install 'splitfl\\[data\\]'"):
        load_rows(tmp_path, task=CAUSAL)


# ---- labels


def labelled(path: Path, *labels: Any) -> Path:
    return lines(path, *({"text": f"{SECRET} text", "label": label} for label in labels))


def test_words_are_numbered_in_sorted_order() -> None:
    rows = load_rows(DATA / "labelled.jsonl", task=CLASSES)
    assert rows.label2id == {"complaint": 0, "praise": 1, "question": 2}
    assert [rows.class_number(row) for row in rows] == [1, 0, 2, 1]


def test_the_models_classes_come_first(tmp_path: Path) -> None:
    path = labelled(tmp_path / "rows.jsonl", "spam", "ham")
    rows = load_rows(path, task=CLASSES, label2id={"spam": 0, "ham": 1})
    assert [rows.class_number(row) for row in rows] == [0, 1]
    defaults = load_rows(path, task=CLASSES, label2id={"LABEL_0": 0, "LABEL_1": 1})
    assert defaults.label2id == {"ham": 0, "spam": 1}
    assert [load_rows(path, task=CLASSES, label2id=defaults.label2id).class_number(row) for row in defaults] == [1, 0]


def test_numbers_in_a_table_and_booleans(tmp_path: Path) -> None:
    assert [row.label for row in load_rows(DATA / "labels.tsv", task=CLASSES)] == [1, 0, 1]
    known = load_rows(DATA / "labels.tsv", task=CLASSES, label2id={"1": 0, "0": 1})
    assert [known.class_number(row) for row in known] == [0, 1, 0]
    rows = load_rows(labelled(tmp_path / "rows.jsonl", True, False), task=CLASSES)
    assert [rows.class_number(row) for row in rows] == [1, 0]


@pytest.mark.parametrize(
    ("labels", "label2id", "line", "said"),
    [
        (["spam", SECRET], {"spam": 0, "ham": 1}, 2, "ham, spam"),
        ([0, 1, 2], {"a": 0, "b": 1}, 3, "0, 1"),
        (["a", "b", SECRET], {"LABEL_0": 0, "LABEL_1": 1}, 2, "at most 2"),
        ([0, 4711], None, 2, "begin with 0"),
        ([0, -1], None, 2, "begin with 0"),
        ([0, SECRET], None, 2, "all whole numbers, or all words"),
        ([SECRET, 0], None, 2, "all whole numbers, or all words"),
        ([0, 0.5], None, 2, "whole number or a word"),
        ([0, None], None, 2, "label (null)"),
        ([0, [SECRET]], None, 2, "type list"),
        (["a", " "], None, 2, "blank label"),
    ],
)
def test_bad_labels(tmp_path: Path, labels: list[Any], label2id: Any, line: int, said: str) -> None:
    path = labelled(tmp_path / "rows.jsonl", *labels)
    error = refusal(path, f"{path}:{line}: ", said, task=CLASSES, label2id=label2id)
    assert "4711" not in str(error)


# ---- what is refused

GOOD = {"prompt": "p", "completion": "c"}
USER, ASSISTANT = {"role": "user", "content": SECRET}, {"role": "assistant", "content": SECRET}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": SECRET, "answer": 3}, ["prompt (string), answer (number)", "prompt and completion"]),
        ({"prompt": SECRET, "completion": None}, ["completion (null)"]),
        ({"prompt": SECRET, "completion": ""}, ["blank completion"]),
        ({"prompt": " \n", "completion": SECRET}, ["blank prompt"]),
        ({"prompt": SECRET, "completion": 7}, ["completion of type number"]),
        ({"prompt": [USER], "completion": SECRET}, ["completion of type string"]),
        ({"prompt": [USER], "completion": [ASSISTANT]}, ["turns and text", "line 1"]),
        ({"prompt": SECRET, "completion": "\ud800 " + SECRET}, ["surrogate", "UTF-8"]),
        ({"text": SECRET}, ["text (string)", "prompt and completion", "rows before it"]),
        ({"messages": [USER, ASSISTANT], **GOOD}, ["messages (list)", "rows before it"]),
        ({SECRET + " said": 1, "name of " + SECRET: 2}, ["2 keys that are not named here"]),
        ({}, ["no keys"]),
        ([SECRET], ["JSON list"]),
        (SECRET, ["JSON string"]),
        (None, ["JSON null"]),
    ],
)
def test_bad_row_after_a_good_one(tmp_path: Path, row: Any, said: list[str]) -> None:
    path = lines(tmp_path / "rows.jsonl", GOOD, row, GOOD)
    refusal(path, f"{path}:2: ", *said)


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ([], "without a turn"),
        (SECRET, "type string"),
        ([SECRET], "turn 1 in messages of type string"),
        ([{"role": "user"}, ASSISTANT], "content of turn 1"),
        ([USER, {"role": "assistant", "content": ""}], "blank content of turn 2"),
        ([USER, {"role": "assistant", "content": [{"type": "text", "text": SECRET}]}], "content of turn 2"),
        ([USER, {"role": "assistant", "content": None, "tool_calls": []}], "of type null"),
        ([{"content": SECRET}, ASSISTANT], "role of turn 1"),
        ([USER], "no turn to learn from"),
        ([{"from": "human", "value": SECRET}, {"from": "gpt", "value": SECRET}], "role of turn 1"),
    ],
)
def test_bad_turns(tmp_path: Path, turns: Any, said: str) -> None:
    path = lines(tmp_path / "rows.jsonl", {"messages": turns})
    refusal(path, f"{path}:1: ", said)


def test_an_answer_in_the_prompt_is_none_to_learn_from(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", {"prompt": [USER, ASSISTANT], "completion": [USER]})
    refusal(path, f"{path}:1: ", "no turn to learn from")


def test_a_blank_system_turn_is_no_fault(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", {"messages": [{"role": "system", "content": ""}, USER, ASSISTANT]})
    assert len(load_rows(path, task=CAUSAL)) == 1


@pytest.mark.parametrize(
    ("content", "line", "said"),
    [
        (b'{"text": "' + SECRET.encode() + b'"\n', 1, "not JSON; the fault is at column"),
        (b'{"text": "a"}\n{"text": "' + SECRET.encode() + b'" oops}\n', 2, "column 26"),
        (b'[{"text": "' + SECRET.encode() + b'"},\n{"text": "b"}]\n', 1, "jq"),
        (b'{"text": "a"}\n{"text": "' + SECRET.encode() + b' caf\xe9"}\n', 2, "not UTF-8"),
        ('{"text": "x"}\n'.encode("utf-16"), 1, "UTF-16"),
        (b"[" * 100_000 + b"\n", 1, "not JSON"),
        (b'{"text": ' + b"1" * 5000 + b"}\n", 1, "not JSON"),
    ],
)
def test_bad_json_and_encodings(tmp_path: Path, content: bytes, line: int, said: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    refusal(path, f"{path}:{line}: ", said)


@pytest.mark.parametrize(
    ("content", "line", "said"),
    [
        (f"prompt,completion\na,b\nc,{SECRET},d\n", 3, "3 cells, the header has 2"),
        (f"prompt,prompt\na,{SECRET}\n", 1, "same name"),
        (f'prompt,completion\n"{SECRET}"x,b\n', 2, "not well-formed"),
        (f'prompt,completion\na,"{SECRET}\nnever closed\n', 2, "not well-formed"),
        (f"{SECRET},{SECRET}2\na,b\n", 2, "2 keys that are not named here"),
        (f"prompt,{SECRET}\na,b\n", 2, "prompt (string), 1 key that is not named here"),
        (f"prompt,completion\n,{SECRET}\n", 2, "blank prompt"),
    ],
)
def test_bad_tables(tmp_path: Path, content: str, line: int, said: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(content, encoding="utf-8")
    refusal(path, f"{path}:{line}: ", said)


@pytest.mark.parametrize("name", ["empty.jsonl", "blank.jsonl", "header.csv", "blank.txt"])
def test_no_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text({"empty": "", "blank": "\n \n", "header": "prompt,completion\n"}[path.stem], encoding="utf-8")
    refusal(path, str(path), "holds no rows")


def test_files_that_are_none(tmp_path: Path) -> None:
    refusal(tmp_path / "missing.jsonl", "there is no file", str(tmp_path / "missing.jsonl"))
    refusal(tmp_path / "missing.jsonl:train", "there is no file")
    (tmp_path / "rows.parquet").write_bytes(SECRET.encode())
    refusal(tmp_path / "rows.parquet", str(tmp_path), ".jsonl")
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-12])
    refusal(tmp_path / "rows.jsonl.gz", str(tmp_path), "gzip")
    (tmp_path / "plain.jsonl.gz").write_bytes(b'{"text": "a"}\n')
    refusal(tmp_path / "plain.jsonl.gz", str(tmp_path), "gzip")
    pytest.importorskip("datasets")
    refusal(tmp_path, str(tmp_path), "save_to_disk")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs a user whom file modes bind")
def test_unreadable_file(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", GOOD)
    path.chmod(0)
    refusal(path, str(path), "cannot be read")


def test_bad_column_maps(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", {"question": SECRET, "answer": SECRET})
    with pytest.raises(UsageError, match="did you mean 'prompt'"):
        load_rows(path, task=CAUSAL, columns={"promt": "question"})
    with pytest.raises(UsageError, match="no form of row has all of prompt, output"):
        load_rows(path, task=CAUSAL, columns={"prompt": "question", "output": "answer"})
    with pytest.raises(UsageError, match="no columns"):
        load_rows(DATA / "harbour.txt", task=CAUSAL, columns={"text": "text"})
    with pytest.raises(UsageError, match="sequence-classification"):
        load_rows(path, task="classification")  # type: ignore[arg-type]
    columns = {"prompt": "question", "completion": "reply"}
    refusal(path, f"{path}:1: ", "question (string), answer (string)", "completion from 'reply'", columns=columns)


JUNK = st.recursive(
    st.none() | st.booleans() | st.floats() | st.just(SECRET),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", SECRET + " x"]), inner)
    ),
    max_leaves=6,
)


@UNHURRIED
@given(st.dictionaries(st.sampled_from(["messages", "prompt", "completion", "text", "label", "output"]), JUNK))
def test_no_junk_is_quoted_or_crashes(tmp_path_factory: pytest.TempPathFactory, row: dict[str, Any]) -> None:
    path = lines(tmp_path_factory.getbasetemp() / "junk.jsonl", {**row, "other": SECRET})
    for task in (CAUSAL, CLASSES):
        try:
            rows = load_rows(path, task=task)
            said = f"{path}:1: {rows!r} {list(rows)!r}"
        except DataError as error:
            said = str(error)
        assert said.startswith(f"{path}:1: ")
        assert SECRET not in said


# ---- fingerprint


def test_fingerprint_is_of_content_not_of_order_or_format(tmp_path: Path) -> None:
    records = [{"text": "a", "label": "0"}, {"text": "b", "label": "1"}, {"text": "a b", "label": "0"}]
    a = load_rows(lines(tmp_path / "a.jsonl", *records), task=CLASSES)
    table = "".join(f"{row['label']},{row['text']}\n" for row in reversed(records))
    (tmp_path / "b.csv").write_text("label,text\n" + table, encoding="utf-8")
    assert fingerprint(a) == fingerprint(load_rows(tmp_path / "b.csv", task=CLASSES)) == fingerprint(reversed(a))
    assert len(fingerprint(a)) == 64


def test_fingerprint_tells_repeats_and_fields_apart(tmp_path: Path) -> None:
    def of(*records: Any) -> str:
        return fingerprint(load_rows(lines(tmp_path / "rows.jsonl", *records), task=CAUSAL))

    seen = {
        of({"prompt": "a", "completion": "b"}),
        of({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b"}),
        of({"prompt": "b", "completion": "a"}),
        of({"prompt": "ab", "completion": "b"}),
        of({"text": "a"}),
        of({"text": "b"}),
    }
    assert len(seen) == 6


def test_rows_are_a_sequence() -> None:
    rows: Rows = load_rows(DATA / "text.jsonl", task=CAUSAL)
    assert rows.place(rows[1]).endswith("text.jsonl:2")
    assert repr(rows[0]) == "Row(line=1)"
