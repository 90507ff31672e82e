"""`python -m tests.equivalence.table` measures every family and writes docs/families.md."""

from __future__ import annotations

import importlib.metadata
import os
import re
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import torch

from tests.equivalence.measure import Difference, measure
from tests.equivalence.sweep import Verdict, families, judge
from tests.families import CAUSAL, ENCODERS, save_model

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
CUTS = ((1, 1), (2, 3))
_LIBRARIES = ("torch", "transformers", "peft")
_COLUMNS = "| cut | loss | logits | LoRA gradient | adapter after a step | greedy | beams |"

_HEAD = """# Model families

Which models can be cut, as measured. Written by `python -m tests.equivalence.table` (a few minutes on one core); do not
edit. `make test` measures the second table again and fails where this page says something else.

Measured with {versions}, on the CPU in float32, one thread.

Each model is tiny and has random weights. It is saved, cut through a real kit, and given the same random LoRA adapter
(r = 4, on the linear modules of bottom and top) as the unsplit model. Then both are compared, without padding, padded
right and padded left: the loss, the logits, the gradient of every adapter tensor, the adapter after one AdamW step; and
tokens generated greedily and by beam search with a KV cache, without padding and padded left (beams of the second table
padded left alone). The numbers are the largest absolute difference; **0 means equal to the last bit**. A cut (b, t)
gives the first b and the last t layers to the party.

- *exact*: no difference above 1e-6, all tokens equal.
- *refused*: `splitfl kit` refuses the model and says why: something other than the hidden state would have to cross.
- *not built*: no tiny model of the family was found here that runs on text, so nothing is known about it.

No family is silently wrong. One that is not on this page, or behaves otherwise at full size, meets the check that
`splitfl kit` makes on the model itself unless told `--no-verify`: logits, the gradient at the embeddings, and a few
cached steps of generation, of the halves against the whole (`party/selfcheck.py`).

What "equal" does and does not say: the halves run the same kernels on the same numbers, so on one machine nothing
differs. Weights read in place from a file may lie at another alignment in the kit than in the model, and then the same
product can round differently (up to 6e-5 was seen); these measurements copy them first. A trunk on another device, or a
wire that sends fewer bits, rounds too. The trunk runs without dropout, which the unsplit model would have in training,
and without the load-balancing loss of mixture-of-experts models: a model that asks for it is refused.
"""


def versions() -> str:
    """Versions of the libraries that decide the outcome, as the page states them."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _LIBRARIES)


def listed(page: Path = PAGE) -> dict[str, str]:
    """Verdict of each family of the sweep, as the page has it."""
    text = page.read_text(encoding="utf-8").split("\n## Every causal family", 1)[1]
    return dict(re.findall(r"^\| ([^|]+?) \|.*\| (exact|refused|not built|wrong)\b[^|]*\|$", text, re.MULTILINE))


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.0e}"


def _cells(difference: Difference | None) -> str:
    if difference is None:
        return "| | | | | | | |"
    tokens = [
        "-" if not found else "equal" if all(found) else "differ"
        for found in (
            [same for name, same in difference.tokens_equal.items() if name.startswith(method)]
            for method in ("greedy", "beams")
        )
    ]
    numbers = (difference.loss, difference.logits, difference.gradient, difference.stepped)
    return f"| {difference.cut} | " + " | ".join([*map(_number, numbers), *tokens]) + " |"


def named_table() -> list[str]:
    """Rows of the families that every release is tested on."""
    rows = [f"| family {_COLUMNS} verdict |", "|---" * 9 + "|"]
    for family in (*CAUSAL, *ENCODERS):
        task = "sequence-classification" if family in ENCODERS else "causal-lm"
        with tempfile.TemporaryDirectory() as folder:
            model = save_model(family, Path(folder) / "model")
            for cut in CUTS:
                found = measure(family, model, cut, task)
                right = found.largest <= 1e-6 and found.tokens_all_equal
                rows.append(f"| {family} {_cells(found)} {'exact' if right else 'wrong'} |")
                print(rows[-1], flush=True)
    return rows


def sweep_row(found: Verdict) -> str:
    """One line of the sweep's table."""
    reason = found.reason.replace("|", "/")
    return (
        f"| {found.family} | {', '.join(found.kinds)} {_cells(found.difference)} {found.verdict}"
        + (f": {reason}" if reason else "")
        + " |"
    )


def write_page(page: Path = PAGE) -> None:
    """Measure everything and write the page."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        named = named_table()
        found = []
        for family in families():
            found.append(judge(family))
            print(sweep_row(found[-1]), flush=True)
    counts = Counter(verdict.verdict for verdict in found)
    tally = [f"{counts[name]} {name}" for name in ("exact", "refused", "not built", "wrong") if counts[name]]
    text = [
        _HEAD.format(versions=versions()),
        "## Families that every change is tested on\n\nThe last three are encoders, cut for classification.\n",
        *named,
        "\n## Every causal family of the library\n",
        "Each at one cut, in which the trunk holds every kind of layer where six layers allow it. Names with a comma",
        f"are variants that change what the layers pass on. {', '.join(tally)}.\n",
        f"| family | kinds of layer {_COLUMNS} verdict |",
        "|---" * 10 + "|",
        *map(sweep_row, found),
    ]
    page.parent.mkdir(exist_ok=True)
    draft = page.with_name(f".{page.name}.tmp")
    draft.write_text("\n".join(text) + "\n", encoding="utf-8")
    os.replace(draft, page)


if __name__ == "__main__":
    write_page()
