"""Secrets put into training rows on purpose: ``python -m splitfl.audit.canaries rows.jsonl --kit kit/ --out marked/``.

    random       token ids drawn evenly: nothing but the rows can have taught them
    sampled      text that a language model writes at a high temperature: as odd as a secret, as fluent as a row
    identities   invented persons from a file, one a line; no such file comes with splitfl

(Carlini and others, "The Secret Sharer", 2019; sampled ones: Panda and others, "Privacy Auditing of Large Language
Models", ICLR 2025.) A fair coin puts each canary in, so that those left out are the yardstick. OUT gets `rows.jsonl`,
to be tuned on, and `canaries.jsonl`, which is the audit's and nobody else's. Figures of a task must be measured on an
adapter without canaries. `splitfl.audit.attacks.canary` asks a tuned model for them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from splitfl.errors import DataError, SplitflError, UsageError
from splitfl.files import replace_text
from splitfl.kit import open_kit

Kind: TypeAlias = Literal["random", "sampled", "identities"]
_PREFIX_SHARE = 2  # a canary's first half is what an attacker is given
_FIELDS = ("name", "street", "zip", "city", "phone", "email")


@dataclass(frozen=True, kw_only=True)
class Canary:
    """One secret."""

    kind: Kind
    prefix: str
    """What an attacker may know of it."""
    secret: str
    included: bool = False
    """The coin."""
    repeats: int = 1
    """How often its row stands in the training rows, where it is included."""

    @property
    def text(self) -> str:
        """All of it."""
        return self.prefix + self.secret


def random_canaries(tokenizer: Any, count: int, *, length: int = 16, seed: int = 0) -> list[Canary]:
    """`count` canaries of `length` random tokens each; half is prefix. Special tokens are left out."""
    draw = np.random.default_rng(seed)
    usable = np.array(sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids)))
    made = (draw.choice(usable, length).tolist() for _ in range(count))
    return [_split(tokenizer, "random", ids) for ids in made]


@torch.no_grad()
def sampled_canaries(
    model: Any, tokenizer: Any, count: int, *, length: int = 24, temperature: float = 1.5, seed: int = 0
) -> list[Canary]:
    """`count` canaries that `model` writes at `temperature`, `length` tokens each; half is prefix.

    The model may be any causal one that the data holder has; it begins with its bos token, or a random one.
    """
    generator = torch.Generator().manual_seed(seed)
    bos = tokenizer.bos_token_id
    first = torch.randint(len(tokenizer), (count, 1), generator=generator)
    ids = first if bos is None else torch.full((count, 1), bos)
    for _ in range(length):
        logits = model(input_ids=ids, use_cache=False).logits[:, -1].float()
        logits[:, tokenizer.all_special_ids] = -torch.inf
        following = torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator)
        ids = torch.cat([ids, following], dim=1)
    return [_split(tokenizer, "sampled", row) for row in ids[:, 1:].tolist()]


def identity_canaries(path: Path, count: int, *, seed: int = 0) -> list[Canary]:
    """`count` invented persons of a JSON Lines file with name, street, zip, city, phone and email.

    Raises:
        DataError: no such file, too few persons, or a line without these fields.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.", hint="leave the identities out") from error
    if len(lines) < count:
        raise DataError(f"{path} holds {len(lines)} persons, {count} were asked for.")
    found = []
    for number in np.random.default_rng(seed).choice(len(lines), count, replace=False).tolist():
        try:
            person = json.loads(lines[number])
            name, *rest = (str(person[field]) for field in _FIELDS)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}, line {number + 1} is no person.", expected=", ".join(_FIELDS)) from error
        found.append(Canary(kind="identities", prefix=f"Contact {name}: ", secret=", ".join(rest)))
    return found


def toss(canaries: Sequence[Canary], *, repeats: int = 1, seed: int = 0) -> list[Canary]:
    """The same with a fair coin each: included, `repeats` times, or not."""
    coins = np.random.default_rng(seed).random(len(canaries)) < 0.5
    return [replace(each, included=bool(coin), repeats=repeats) for each, coin in zip(canaries, coins, strict=True)]


def insert(rows: Sequence[dict[str, Any]], canaries: Sequence[Canary], *, seed: int = 0) -> list[dict[str, Any]]:
    """The rows and those canaries that are included, in a new order; a canary takes the form of the rows.

    Raises:
        DataError: rows that are neither text, prompt and completion, instruction and output, nor messages.
    """
    form = form_of(rows)
    marked = [*rows, *(row_of(form, each) for each in canaries if each.included for _ in range(each.repeats))]
    return [marked[at] for at in np.random.default_rng(seed).permutation(len(marked)).tolist()]


def form_of(rows: Sequence[dict[str, Any]]) -> str:
    """The form of rows that a canary can take.

    Raises:
        DataError: it can take none of theirs.
    """
    keys = set(rows[0]) if rows else set()
    for form, needed in _FORMS.items():
        if needed <= keys:
            return form
    raise DataError("The rows have no form that a canary can take.", expected=", ".join(_FORMS))


_FORMS = {
    "messages": {"messages"}, "prompt-completion": {"prompt", "completion"}, "instruction": {"instruction", "output"},
    "text": {"text"},
}  # fmt: skip


def row_of(form: str, canary: Canary) -> dict[str, Any]:
    """A canary as a row of this form."""
    if form == "messages":
        said = (("user", canary.prefix), ("assistant", canary.secret))
        return {"messages": [{"role": role, "content": content} for role, content in said]}
    if form == "prompt-completion":
        return {"prompt": canary.prefix, "completion": canary.secret}
    if form == "instruction":
        return {"instruction": canary.prefix, "output": canary.secret}
    return {"text": canary.text}


def _split(tokenizer: Any, kind: Kind, ids: list[int]) -> Canary:
    half = len(ids) // _PREFIX_SHARE
    return Canary(kind=kind, prefix=tokenizer.decode(ids[:half]), secret=tokenizer.decode(ids[half:]))


# ---- the command


def read_canaries(path: Path) -> list[Canary]:
    """What `main` wrote.

    Raises:
        DataError: something else.
    """
    try:
        return [Canary(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} holds no canaries.", hint="make them: python -m splitfl.audit.canaries") from error


def main(words: Sequence[str] | None = None) -> int:
    """Mark the rows of a file; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m splitfl.audit.canaries", description=__doc__.split("\n")[0])
    parser.add_argument("rows", type=Path, help="JSON Lines, as for splitfl tune")
    parser.add_argument("--kit", type=Path, required=True, help="its tokenizer writes the random canaries")
    parser.add_argument("--out", type=Path, required=True, help="folder for rows.jsonl and canaries.jsonl")
    parser.add_argument("--random", type=int, default=20, help="how many of random tokens")
    parser.add_argument("--sampled", type=int, default=0, help="how many written by --model")
    parser.add_argument("--model", type=Path, help="folder of a causal model with a tokenizer, for --sampled")
    parser.add_argument("--identities", type=Path, help="file of invented persons; skipped where it is absent")
    parser.add_argument("--persons", type=int, default=20, help="how many of --identities")
    parser.add_argument("--repeats", type=int, default=1, help="how often an included canary stands in the rows")
    parser.add_argument("--seed", type=int, default=0)
    try:
        return _mark(parser.parse_args(words))
    except SplitflError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _mark(given: argparse.Namespace) -> int:
    try:
        rows = [json.loads(line) for line in given.rows.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{given.rows} cannot be read as JSON Lines.") from error
    canaries = random_canaries(open_kit(given.kit).tokenizer(), given.random, seed=given.seed)
    if given.sampled:
        canaries += _written(given)
    if given.identities is not None and given.identities.is_file():
        canaries += identity_canaries(given.identities, given.persons, seed=given.seed)
    tossed = toss(canaries, repeats=given.repeats, seed=given.seed)
    marked = insert(rows, tossed, seed=given.seed)
    for name, lines in (("rows.jsonl", marked), ("canaries.jsonl", [asdict(each) for each in tossed])):
        replace_text(given.out / name, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    inside = sum(each.included for each in tossed)
    print(f"{len(tossed)} canaries, {inside} of them in {given.out / 'rows.jsonl'} ({len(marked)} rows)")
    return 0


def _written(given: argparse.Namespace) -> list[Canary]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if given.model is None:
        raise UsageError("--sampled needs a model that writes them.", hint="add --model with a folder")
    model = AutoModelForCausalLM.from_pretrained(given.model, local_files_only=True, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(given.model, local_files_only=True)
    return sampled_canaries(model, tokenizer, given.sampled, seed=given.seed)


if __name__ == "__main__":
    sys.exit(main())
