"""Step 1 of the journey, last of four: rendered rows -> token ids with masked labels -> batch.

A label is the token id where the loss counts and -100 where it does not. The model itself shifts labels by one place,
so the label at position 0 never counts. With `answer_only` the loss counts on answers alone; `splitfl.rendering` says
how rows become text and where answers begin and end.

Legend: B rows, T tokens of the longest row in the batch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from splitfl.errors import DataError, UsageError, nearest
from splitfl.rendering import Rendered, has_template, render, render_prompt, shared_length
from splitfl.rows import FormName, Row, Rows, Turn, fingerprint, load_rows

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
    sources: list[int]
    """For each example, the number of the row it was made from, from 0."""

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
    eos = tokenizer.eos_token_id if eos_token_id is None else eos_token_id
    how = _How(tokenizer, rows, max_length, truncation, answer_only, bos_token_id, eos)
    kept, left = Examples(), _Left()
    kept.sources = []
    made = _classified(how) if rows.task == "sequence-classification" else _answered(how)
    for number, (row, example) in enumerate(made):
        kept.extend(_fitting(how, row, example, left))
        kept.sources.extend([number] * (len(kept) - len(kept.sources)))
    if left.long and (truncation == "error" or not kept):
        raise _too_long(how, left.long)
    if not kept:
        raise _barren(rows, rows[0])
    kept.counts = Counts(
        rows=len(rows),
        examples=len(kept),
        tokens=sum(len(example["input_ids"]) for example in kept),
        answer_tokens=sum(map(_targets, kept)),
        truncated=left.truncated,
        dropped=len(left.long) + left.barren,
        rendering="chat template" if how.templated else "joined" if rows.form in _PARTS else "as it is",
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


# ---- rows -> examples of any length


@dataclass(frozen=True, slots=True, repr=False)
class _How:
    """The arguments of `tokenise`."""

    tokenizer: Any
    rows: Rows
    max_length: int
    truncation: Truncation
    answer_only: bool
    bos: int | None
    eos: int | None

    @property
    def templated(self) -> bool:
        return has_template(self.tokenizer, self.rows.form)

    def chunks(self) -> Iterator[list[Row]]:
        rest = iter(self.rows)
        while chunk := list(islice(rest, _CHUNK)):
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


def _classified(how: _How) -> Iterator[tuple[Row, Example]]:
    for chunk in how.chunks():
        for row, example in zip(chunk, _encode(how, chunk), strict=True):
            yield row, example | {"labels": how.rows.class_number(row)}


def _encode(how: _How, chunk: list[Row], limit: int | None = None) -> Iterator[Example]:
    """Examples without labels, cut to `limit` tokens before bos is added."""
    pairs = None if chunk[0].text_pair is None else [row.text_pair for row in chunk]
    texts = [row.text for row in chunk]
    out = how.tokenizer(texts, pairs, truncation=limit is not None, max_length=limit, verbose=False)
    for index, encoded in enumerate(out["input_ids"]):
        ids = _with_bos(list(encoded), how.bos)
        example = {"input_ids": ids, "attention_mask": [1] * len(ids)}
        if "token_type_ids" in out:
            example["token_type_ids"] = [0] * (len(ids) - len(encoded)) + list(out["token_type_ids"][index])
        yield example


def _answered(how: _How) -> Iterator[tuple[Row, Example]]:
    ending = how.eos if how.rows.form in _PARTS and not how.templated else None
    for chunk in how.chunks():
        eos = _written(how.tokenizer, how.eos)
        rendered = render(how.rows, chunk, how.tokenizer, eos=eos, answer_only=how.answer_only)
        offsets = how.tokenizer.is_fast and any(text.answers[0][0] > 0 for text in rendered)
        # A chat template writes the special tokens itself.
        out = _call(how.tokenizer, [text.text for text in rendered], special=not how.templated, offsets=offsets)
        for index, (row, text) in enumerate(zip(chunk, rendered, strict=True)):
            ids = list(out["input_ids"][index])
            locate = _by_offsets(out["offset_mapping"][index]) if offsets else _by_prefix(how.tokenizer, text.text, ids)
            labels = _labels(ids, text, locate)
            if ending is not None and text.answers[-1][1] == len(text.text) and ids[-1:] != [ending]:
                ids, labels = [*ids, ending], [*labels, ending]
            if not how.templated and len(with_bos := _with_bos(ids, how.bos)) > len(ids):
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

    Only the ends of ranges are looked at: some tokenizers trim a token of white space to an empty range at its end.
    """
    count = len(offsets)
    while count and offsets[count - 1][1] == 0:  # special tokens added at the end have the range (0, 0)
        count -= 1
    return lambda character: bisect_right(offsets, character, hi=count, key=lambda each: each[1])


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


@dataclass(slots=True, repr=False)
class _Left:
    """Rows that did not become examples as they are."""

    truncated: int = 0
    barren: int = 0
    long: list[tuple[Row, int]] = field(default_factory=list)


def _fitting(how: _How, row: Row, example: Example, left: _Left) -> Iterable[Example]:
    ids = example["input_ids"]
    if not _targets(example):
        if not how.rows.paragraphs:
            raise _barren(how.rows, row)
        left.barren += 1  # a running text may hold a line of one token
        return ()
    if len(ids) <= how.max_length:
        return (example,)
    if how.rows.paragraphs:
        return _blocks(ids, how.max_length, how.tokenizer.bos_token_id if how.bos is None else how.bos)
    if how.truncation == "right" and _targets(cut := _cut(how, row, example)):
        left.truncated += 1
        return (cut,)
    left.long.append((row, len(ids)))
    return ()


def _cut(how: _How, row: Row, example: Example) -> Example:
    if not isinstance(example["labels"], int):
        return {name: values[: how.max_length] for name, values in example.items()}
    # Cut by the tokenizer, which keeps the special tokens at the end; one place less where bos comes on top.
    tries = [next(_encode(how, [row], limit)) for limit in (how.max_length, how.max_length - 1)]
    return next(each for each in tries if len(each["input_ids"]) <= how.max_length) | {"labels": example["labels"]}


def _blocks(ids: list[int], max_length: int, bos: int | None) -> Iterator[Example]:
    for start in range(1, len(ids), max_length - 1):
        context = bos if ids[0] == bos else ids[start - 1]
        block = [context, *ids[start : start + max_length - 1]]
        yield {"input_ids": block, "attention_mask": [1] * len(block), "labels": list(block)}


def _barren(rows: Rows, row: Row) -> DataError:
    problem = f"{rows.place(row)}: the tokenizer leaves nothing to learn from in this row"
    return DataError(problem, expected="an answer of at least one token, or a text of at least two")


def _too_long(how: _How, long: list[tuple[Row, int]]) -> DataError:
    row, length = long[0]
    problem = f"{how.rows.place(row)}: the row is {length} tokens long, and max_length is {how.max_length}"
    if len(long) > 1:
        problem += f" ({len(long)} of {len(how.rows)} rows are longer; the longest has {max(n for _, n in long)})"
    if how.truncation == "error":
        hint = "raise max_length, or choose truncation 'right' (cut the end off) or 'drop' (leave long rows out)"
    else:
        hint = f"raise max_length: with truncation {how.truncation!r} no row is left"
    return DataError(problem, expected=f"rows of {how.max_length} tokens or fewer", hint=hint)
