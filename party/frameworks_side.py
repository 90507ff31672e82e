"""``python -m party.frameworks_side``: counts what one step of a federated design costs a party, with its real owner.

One batch passes the party's model as in `splitfl tune`; what the owner computes in between is the owner's.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import msgspec
import torch
from torch.utils.flop_counter import FlopCounterMode

from party.bookkeeping import run_name
from party.distillation import position_logits, read_public
from party.opening import open_book, prepare
from party.protect import numbered
from party.rundir import RunDirectory
from party.tune import Data, read_data, reading_options
from party.utility_side import settings_in
from party.whole import plan_whole
from party.workplace import Workplace, open_workplace
from protocols import protocol_named
from splitfl.bench.frameworks_orders import Flops, Ready, decode_order
from splitfl.bench.orders import Line
from splitfl.bench.side import own_output
from splitfl.config import TuneSettings
from splitfl.errors import SplitflError, printable
from splitfl.kit import Kit, open_kit
from splitfl.quiet import silence_library_warnings


def count(settings: TuneSettings) -> Flops:
    """What one step costs."""
    torch.set_num_threads(1)
    kit, run = open_kit(settings.kit), RunDirectory(settings.out)
    data = read_data(settings, kit)
    whole = protocol_named(settings.protocol).whole
    longest = max(len(example["input_ids"]) for example in data.train)
    preparation = (
        plan_whole(settings, kit, data.train_set) if whole else prepare(settings, kit, longest, len(data.train))
    )
    with (
        open_book(settings, run_name(run.path, resumed=False), data.sets) as book,
        open_workplace(settings, kit, run, data, preparation, book) as place,
    ):
        step = _step(settings, data, place)
        return _of_public_rows(settings, kit, place, data, step) if settings.public is not None else Flops(step=step)


def _step(settings: TuneSettings, data: Data, place: Workplace) -> int:
    """Forward and backward of the first batch of training rows; lengths as they are."""
    batch = data.collator(numbered(data.train)[: settings.per_device_train_batch_size])
    place.tracker.training(batch)
    place.model.train()
    with FlopCounterMode(display=False) as counter:
        place.model(**batch).loss.backward()
    return int(counter.get_total_flops())


def _of_public_rows(settings: TuneSettings, kit: Kit, place: Workplace, data: Data, step: int) -> Flops:
    public = read_public(settings, kit, reading_options(settings, kit), "")
    size = settings.per_device_train_batch_size
    answers = 0
    place.model.eval()
    with torch.no_grad():
        for start in range(0, len(public.examples), size):
            with FlopCounterMode(display=False) as counter:
                position_logits(place.model, data.collator(public.examples[start : start + size]), public)
            answers += int(counter.get_total_flops())
    with FlopCounterMode(display=False) as counter:
        position_logits(place.model, data.collator(public.examples[:size]), public).logsumexp(1).mean().backward()
    return Flops(
        step=step, answers=answers, lesson=int(counter.get_total_flops()),
        batches=math.ceil(len(public.examples) / size),
    )  # fmt: skip


def main() -> None:
    """Answer until standard input ends."""
    silence_library_warnings()
    answers = own_output()

    def say(line: Line) -> None:
        answers.write(msgspec.json.encode(line).decode() + "\n")
        answers.flush()

    say(Ready(pid=os.getpid()))
    for line in sys.stdin:
        try:
            say(count(settings_in(Path(decode_order(line).settings))))
        except SplitflError as error:
            say(Flops(step=0, failed=printable(" ".join(str(error).split()), 300)))


if __name__ == "__main__":
    main()
