"""``python -m party.compare_side ORDER``: was this row among those that the adapter was tuned on?

The attack of whoever gets the adapter (or the sum of updates, which is the next adapter) and has the base model. Two
scores, the higher the likelier a member: minus the tuned model's loss on the row (Yeom et al., CSF 2018), and how much
tuning has lowered it, the base's loss less the tuned model's (Carlini et al., USENIX Security 2021, section 5.2).
Shadow models are not trained: a stronger attacker would.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch
from torch import nn

from party.rundir import RunDirectory
from party.tune import reading_options
from party.whole import whole_model
from splitfl.adapters import open_adapter
from splitfl.audit.intervals import curve
from splitfl.bench.side import own_output
from splitfl.compare.orders import Membership, MembershipTold, Told
from splitfl.data import IGNORED, Collator, Example, load_rows, tokenise
from splitfl.errors import SplitflError, printable
from splitfl.kit import Kit, open_kit
from splitfl.quiet import silence_library_warnings

_BATCH = 16


def attack(order: Membership) -> MembershipTold:
    """Both scores.

    Raises:
        SplitflError: a run, kit, adapter or file of rows that cannot be used.
    """
    torch.set_num_threads(1)
    run = RunDirectory(Path(order.run))
    settings = run.settings()
    kit = open_kit(settings.kit)
    collator = Collator(kit.tokenizer(), pad_token_id=kit.config.pad_token_id)
    sets = [
        _rows(Path(path), kit, reading_options(settings, kit), order.rows) for path in (order.members, order.others)
    ]
    model = whole_model(settings, kit, Path(order.model)).eval()
    before = [row_losses(model, rows, collator) for rows in sets]
    tuned = open_adapter(model, run.adapter).eval()
    after = [row_losses(tuned, rows, collator) for rows in sets]
    member = [True] * len(after[0]) + [False] * len(after[1])
    losses, base = torch.cat(after).double(), torch.cat(before).double()
    found = []
    for name, score in (("loss", -losses), ("loss before less loss", base - losses)):
        drawn = curve(score.tolist(), member, range(len(member)))
        if drawn is not None:
            auc = drawn.auc
            found.append(Told(score=name, value=auc.value, low=auc.low, high=auc.high))
    return MembershipTold(scores=tuple(found))


def _rows(path: Path, kit: Kit, options: dict[str, object], most: int) -> list[Example]:
    classifies = kit.plan.task == "sequence-classification"
    label2id = dict(kit.config.label2id or {}) if classifies else None
    rows = load_rows(path, task=kit.plan.task, label2id=label2id)
    return list(tokenise(rows, kit.tokenizer(), **options))[:most]  # type: ignore[arg-type]


@torch.no_grad()
def row_losses(model: nn.Module, rows: Sequence[Example], collator: Collator) -> torch.Tensor:
    """Mean loss of each row in nats, over what counts of it: [N] float32."""
    found = []
    for start in range(0, len(rows), _BATCH):
        batch = collator(rows[start : start + _BATCH])
        labels = batch.pop("labels")
        logits = model(**batch).logits.float()
        if labels.ndim == 1:
            found.append(nn.functional.cross_entropy(logits, labels, reduction="none"))
            continue
        wanted = labels[:, 1:]
        each = nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none"
        )
        found.append(each.sum(1) / (wanted != IGNORED).sum(1).clamp(min=1))
    return torch.cat(found)


def main() -> None:
    """Do what the argument says, and answer in one line."""
    silence_library_warnings()
    answers = own_output()
    try:
        told = attack(msgspec.json.decode(sys.argv[1], type=Membership))
    except SplitflError as error:
        told = MembershipTold(scores=(), failed=printable(" ".join(str(error).split()), 300))
    answers.write(msgspec.json.encode(told).decode() + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
