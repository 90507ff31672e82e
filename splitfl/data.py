"""Step 1 of the journey, last of four: rendered rows -> token ids with masked labels -> batch.

A label is the token id where the loss counts and -100 where it does not. The model itself shifts labels by one place,
so the label at position 0 never counts. With `answer_only` the loss counts on answers alone; `splitfl.rendering` says
how rows become text and where answers begin and end.

Legend: B rows, T tokens of the longest row in the batch.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Any, Literal, TypeAlias, get_args

import msgspec
import torch
from torch import Tensor

from splitfl.errors import DataError, UsageError, nearest
from splitfl.rendering import Rendered, has_template, render, render_prompt, shared_length
from splitfl.rows import FormName, Row, Rows, Turn, load_rows

__all__ = ["Collator", "Counts", "Examples", "Row", "Rows", "encode_prompt", "fingerprint", "load_rows", "tokenise"]

Example: TypeAlias = dict[str, Any]
"""`input_ids`, `attention_mask`, `labels`: lists of T ints; for classification `labels` is one int."""
Truncation: TypeAlias = Literal["error", "right", "drop"]
Side: TypeAlias = Literal["right", "left"]
IGNORED = -100
_PARTS = ("messages", "prompt-completion", "instruction")
_CHUNK = 1000  # rows handed to the tokenizer at once, which spreads them over its threads
_PADDING = {"attention_mask": 0, "token_type_ids": 0, "labels": IGNORED}


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What became of the rows."""

    rows: int
    """Rows read."""
    examples: int
    """Examples kept: rows, or blocks of a running text."""
    tokens: int
    answer_tokens: int
    """Tokens whose prediction the loss counts; for classification, labels."""
    truncated: int
    dropped: int
    rendering: Literal["chat template", "joined", "as it is"]
    """How rows became text."""

    def __str__(self) -> str:
        line = f"{self.rows:,} rows ({self.rendering}), {self.tokens:,} tokens, {self.answer_tokens:,} of them answers"
        line += f", {self.truncated:,} rows truncated" if self.truncated else ""
        return line + (f", {self.dropped:,} rows dropped" if self.dropped else "")


class Examples(list[Example]):
    """The examples in the order of the rows: a list, as `transformers.Trainer` takes it, with what was counted."""

    counts: Counts

    def __repr__(self) -> str:
        return f"Examples({len(self)} of them)"


def tokenise(
    rows: Rows,
    tokenizer: Any,
    *,
    max_length: int,
    answer_only: bool = True,
    truncation: Truncation = "error",
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
) -> Examples:
    """Turn rows into token ids and labels.

    Args:
        rows: from `load_rows`; their task decides what the labels are.
        tokenizer: a Hugging Face tokenizer; its chat template is used where it has one.
        max_length: the most tokens an example may have. Paragraphs of plain text are cut into blocks of that length;
            a block begins with the bos token if its paragraph does, else with the last token of the block before, so
            that every token but the first is predicted once.
        answer_only: whether the loss counts on answers alone; rows of the form `text` count whole either way.
        truncation: what happens to a longer row: ``error``, cut on the ``right``, or ``drop``. A row that the cut
            would leave without an answer is dropped (and counted as dropped).
        bos_token_id: put before rows that no chat template rendered and that do not begin with it: for models that
            expect one while their tokenizer adds none.
        eos_token_id: ends answers that no chat template rendered; the tokenizer's own unless given.

    Raises:
        DataError: a row that is too long, that the chat template refuses or that has no token to learn from, by file
            and line; or all rows are dropped.
        UsageError: an option out of range.
    """
    if max_length < 2:
        raise UsageError(f"max_length is {max_length}", expected="at least 2: one token to predict another from")
    if truncation not in get_args(Truncation):
        raise UsageError(f"there is no truncation {truncation!r}", hint=nearest(truncation, get_args(Truncation)))
    if rows.task == "sequence-classification":
        pairs = _classified(rows, tokenizer, bos_token_id)
    else:
        pairs = _answered(rows, tokenizer, answer_only, bos_token_id, eos_token_id)
    kept, long, truncated, barren = Examples(), [], 0, 0
    for row, example in pairs:
        ids = example["input_ids"]
        if not _targets(example):
            barren += 1
            if not rows.paragraphs or len(rows) == barren:  # a running text may hold a line of one token
                problem = f"{rows.place(row)}: the row gives {len(ids)} tokens and none to learn from"
                raise DataError(problem, expected="an answer, or a text of two tokens or more")
        elif len(ids) <= max_length:
            kept.append(example)
        elif rows.paragraphs:
            kept.extend(_blocks(ids, max_length, tokenizer.bos_token_id if bos_token_id is None else bos_token_id))
        elif truncation == "right" and _targets(cut := _cut(row, example, tokenizer, max_length, bos_token_id)):
            kept.append(cut)
            truncated += 1
        else:
            long.append((row, len(ids)))
    if long and (truncation == "error" or not kept):
        raise _too_long(rows, long, max_length, truncation)
    templated = has_template(tokenizer, rows.form)
    kept.counts = Counts(
        rows=len(rows),
        examples=len(kept),
        tokens=sum(len(example["input_ids"]) for example in kept),
        answer_tokens=sum(map(_targets, kept)),
        truncated=truncated,
        dropped=len(long) + barren,
        rendering="chat template" if templated else "joined" if rows.form in _PARTS else "as it is",
    )
    return kept


def encode_prompt(
    tokenizer: Any,
    prompt: str | Sequence[Turn],
    *,
    form: FormName = "prompt-completion",
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
) -> list[int]:
    """Token ids that a model tuned on rows of this form is to continue: rendered as the training rows were.

    Args:
        tokenizer: the one the rows were tokenised with.
        prompt: the user's words, or the turns so far.
        form: `Rows.form` of the training rows.
        bos_token_id: as given to `tokenise`.
        eos_token_id: as given to `tokenise`.
    """
    templated = has_template(tokenizer, form)
    eos = tokenizer.eos_token_id if eos_token_id is None else eos_token_id
    text = render_prompt(tokenizer, prompt, form, eos=_written(tokenizer, eos))
    ids = list(_call(tokenizer, [text], special=not templated)["input_ids"][0])
    if templated:
        return ids
    # Some tokenizers end every text, which a prompt must not be.
    return _with_bos(ids[:-1] if eos is not None and ids[-1:] == [eos] else ids, bos_token_id)


class Collator:
    """Examples -> one padded batch; a `data_collator` for `transformers.Trainer`.

    Args:
        tokenizer: gives the padding id: its `pad_token_id`, else its `eos_token_id`, else 0. Padding is masked and
            never labelled, so the choice only matters to classifiers that look for it to find the end of a row: it
            must be the `pad_token_id` of such a model's configuration.
        padding_side: where the padding goes.
        pad_to_multiple_of: T is rounded up to a multiple of this.
        pad_token_id: overrides the tokenizer's.

    Raises:
        UsageError: an option out of range.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        padding_side: Side = "right",
        pad_to_multiple_of: int | None = None,
        pad_token_id: int | None = None,
    ) -> None:
        if padding_side not in get_args(Side):
            raise UsageError(f"there is no padding side {padding_side!r}", hint=nearest(padding_side, get_args(Side)))
        if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
            raise UsageError(f"pad_to_multiple_of is {pad_to_multiple_of}", expected="1 or more, or none")
        ids = (pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_token_id = next(int(each) for each in ids if each is not None)
        self.padding_side, self.multiple = padding_side, pad_to_multiple_of or 1

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """A batch.

        Returns:
            `input_ids` and `attention_mask` `[B, T]`, and `labels` `[B, T]`, or `[B]` for classification; all int64.
            Padding is masked with 0 and labelled -100.
        """
        longest = max(len(example["input_ids"]) for example in examples)
        width = -(-longest // self.multiple) * self.multiple
        batch = {}
        for name in examples[0]:
            values = [torch.as_tensor(example[name], dtype=torch.int64) for example in examples]
            batch[name] = torch.stack(values) if values[0].ndim == 0 else self._padded(name, values, width)
        return batch

    def _padded(self, name: str, values: list[Tensor], width: int) -> Tensor:
        padded_BT = torch.full((len(values), width), _PADDING.get(name, self.pad_token_id), dtype=torch.int64)
        for row_T, value in zip(padded_BT, values, strict=True):
            (row_T[: len(value)] if self.padding_side == "right" else row_T[width - len(value) :]).copy_(value)
        return padded_BT


def fingerprint(rows: Iterable[Row]) -> str:
    """Hash of what the rows hold: 64 hex digits, the same in any order and file format, other when a row is repeated.

    It is not salted: whoever can guess the rows can confirm the guess, so it stays on the data holder's machine.
    """
    whole = hashlib.blake2b(digest_size=32, person=b"splitfl rows")
    for digest in sorted(_digest(row) for row in rows):
        whole.update(digest)
    return whole.hexdigest()


def _digest(row: Row) -> bytes:
    turns = [{key: value for key, value in turn.items() if value is not None} for turn in row.messages]
    label = None if row.label is None else str(row.label)
    content = (row.text, row.text_pair, row.prompt, row.completion, turns, row.answers_from, label)
    packed = msgspec.msgpack.encode(content, order="deterministic")
    return hashlib.blake2b(packed, digest_size=32, person=b"splitfl row").digest()


# ---- rows -> examples of any length


def _chunks(rows: Rows) -> Iterator[list[Row]]:
    left = iter(rows)
    while chunk := list(islice(left, _CHUNK)):
        yield chunk


def _call(tokenizer: Any, texts: list[str], *, special: bool = True, offsets: bool = False) -> Any:
    return tokenizer(
        texts,
        add_special_tokens=special,
        return_offsets_mapping=offsets,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # our own limit is checked below, with a place in the error
    )


def _written(tokenizer: Any, eos: int | None) -> str:
    return "" if eos is None else str(tokenizer.convert_ids_to_tokens(eos))


def _with_bos(ids: list[int], bos: int | None) -> list[int]:
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def _classified(rows: Rows, tokenizer: Any, bos: int | None) -> Iterator[tuple[Row, Example]]:
    for chunk in _chunks(rows):
        for row, example in zip(chunk, _encode(chunk, tokenizer, bos), strict=True):
            yield row, example | {"labels": rows.class_number(row)}


def _encode(chunk: list[Row], tokenizer: Any, bos: int | None, limit: int | None = None) -> Iterator[Example]:
    """Examples without labels, cut to `limit` tokens before bos is added."""
    pairs = None if chunk[0].text_pair is None else [row.text_pair for row in chunk]
    texts = [row.text for row in chunk]
    out = tokenizer(texts, pairs, truncation=limit is not None, max_length=limit, verbose=False)
    for index, encoded in enumerate(out["input_ids"]):
        ids = _with_bos(list(encoded), bos)
        example = {"input_ids": ids, "attention_mask": [1] * len(ids)}
        if "token_type_ids" in out:
            example["token_type_ids"] = [0] * (len(ids) - len(encoded)) + list(out["token_type_ids"][index])
        yield example


def _answered(
    rows: Rows, tokenizer: Any, answer_only: bool, bos: int | None, eos: int | None
) -> Iterator[tuple[Row, Example]]:
    joined = rows.form != "text" and not has_template(tokenizer, rows.form)
    eos = tokenizer.eos_token_id if eos is None else eos
    special = joined or rows.form == "text"  # a chat template writes its own special tokens
    for chunk in _chunks(rows):
        rendered = render(rows, chunk, tokenizer, eos=_written(tokenizer, eos), answer_only=answer_only)
        offsets = tokenizer.is_fast and any(each.answers[0][0] > 0 for each in rendered)
        out = _call(tokenizer, [each.text for each in rendered], special=special, offsets=offsets)
        for index, (row, text) in enumerate(zip(chunk, rendered, strict=True)):
            ids = list(out["input_ids"][index])
            locate = _by_offsets(out["offset_mapping"][index]) if offsets else _by_prefix(tokenizer, text.text, ids)
            labels = _labels(ids, text, locate)
            if joined and eos is not None and text.answers[-1][1] == len(text.text) and ids[-1:] != [eos]:
                ids, labels = [*ids, eos], [*labels, eos]
            if special and len(with_bos := _with_bos(ids, bos)) > len(ids):
                ids, labels = with_bos, [IGNORED, *labels]
            yield row, {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def _labels(ids: list[int], text: Rendered, locate: Callable[[int], int]) -> list[int]:
    labels = [IGNORED] * len(ids)
    for begin, end in text.answers:
        first = locate(begin) if begin else 0
        last = locate(end) if end < len(text.text) else len(ids)
        labels[first:last] = ids[first:last]
    return labels


def _by_offsets(offsets: Sequence[tuple[int, int]]) -> Callable[[int], int]:
    """Character -> the first token that reaches beyond it: a token across the border belongs to what follows.

    Only ends are looked at. Some tokenizers trim a token of white space to an empty range at its end; special tokens
    that the tokenizer adds have the range (0, 0), also at the end of the text, hence the running maximum.
    """
    ends = list(accumulate((end for _, end in offsets), max))
    return lambda character: bisect_right(ends, character)


def _by_prefix(tokenizer: Any, text: str, ids: list[int]) -> Callable[[int], int]:
    """The same for tokenizers that do not tell offsets: the text up to there is tokenised, and compared with `ids`."""

    def locate(character: int) -> int:
        body, before = _call(tokenizer, [text, text[:character]], special=False)["input_ids"]
        lead = next((at for at in range(len(ids)) if ids[at : at + len(body)] == body), 0)
        return lead + shared_length(body, before)

    return locate


# ---- examples that fit


def _targets(example: Example) -> int:
    """How many predictions the loss counts: the label at position 0 has no token before it."""
    labels = example["labels"]
    if isinstance(labels, int):
        return int(bool(example["input_ids"]))
    return len(labels[1:]) - labels[1:].count(IGNORED)


def _cut(row: Row, example: Example, tokenizer: Any, max_length: int, bos: int | None) -> Example:
    if not isinstance(example["labels"], int):
        return {name: values[:max_length] for name, values in example.items()}
    # Cut by the tokenizer, which keeps the special tokens at the end; one place less where bos comes on top.
    tries = [next(_encode([row], tokenizer, bos, limit)) for limit in (max_length, max_length - 1)]
    return next(each for each in tries if len(each["input_ids"]) <= max_length) | {"labels": example["labels"]}


def _blocks(ids: list[int], max_length: int, bos: int | None) -> Iterator[Example]:
    for start in range(1, len(ids), max_length - 1):
        context = bos if ids[0] == bos else ids[start - 1]
        block = [context, *ids[start : start + max_length - 1]]
        yield {"input_ids": block, "attention_mask": [1] * len(block), "labels": list(block)}


def _too_long(rows: Rows, long: list[tuple[Row, int]], max_length: int, truncation: Truncation) -> DataError:
    row, length = long[0]
    problem = f"{rows.place(row)}: the row is {length} tokens long, and max_length is {max_length}"
    if len(long) > 1:
        problem += f" ({len(long)} of {len(rows)} rows are longer; the longest has {max(n for _, n in long)})"
    if truncation == "error":
        hint = "raise max_length, or choose truncation 'right' (cut the end off) or 'drop' (leave long rows out)"
    else:
        hint = f"raise max_length: with truncation {truncation!r} no row is left"
    return DataError(problem, expected=f"rows of {max_length} tokens or fewer", hint=hint)
