"""`splitfl kit`: write the kit, say what it gives away, and check the cut against the unsplit model."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from splitfl.config import KitSettings
from splitfl.kit import KitSummary, open_kit, write_kit
from splitfl.metrics import Result, write_results
from splitfl.report import as_size


def make_kit(settings: KitSettings) -> None:
    """Write the kit that the settings describe and print what it holds."""
    names = list(settings.label_names) or [f"LABEL_{i}" for i in range(settings.num_labels or 0)]
    summary = write_kit(
        Path(settings.model),
        settings.out,
        bottom=settings.bottom,
        top=settings.top,
        task=settings.task,
        dtype=settings.dtype,
        label_names=names or None,
        seed=settings.seed,
        overwrite=settings.overwrite,
    )
    _print(settings.out, summary)
    if settings.verify:
        try:
            _verify(settings)
        except BaseException:
            shutil.rmtree(settings.out)  # nobody shall receive a kit that computes something else
            raise
    if settings.json is not None:
        write_results(settings.json, "kit", settings, _results(summary))


def _print(out: Path, summary: KitSummary) -> None:
    plan = summary.plan
    print(f"kit      {out}  ({as_size(summary.bytes)})")
    print(f"model    {plan.model_type}, {plan.layers} layers, {plan.task}, {plan.dtype}")
    print(
        f"gives    embeddings, layers {plan.party_layers}, final norm and head: {summary.given_tensors} of "
        f"{summary.all_tensors} tensors, {summary.given_parameters:,} parameters"
    )
    print(f"keeps    layers {plan.trunk_layers.start} to {plan.trunk_layers.stop - 1}: none of their tensors is in it")
    if plan.tied and plan.task == "causal-lm":  # a classifier has no output head over the vocabulary
        print("tied     input embedding and output head are one tensor, which is in the kit")
    if summary.new_head:
        print(f"new      the checkpoint has no {', '.join(summary.new_head)}: drawn afresh, to be tuned by the party")
    print(f"trunk    {plan.trunk}")
    print(f"plan     {plan.digest}")


def _verify(settings: KitSettings) -> None:
    """Run the unsplit model against the cut one; raises if they differ."""
    from model_owner.trunk import Trunk
    from party.selfcheck import check_cut
    from splitfl.kit import DTYPES
    from splitfl.load import load_trunk_side

    kit = open_kit(settings.out)
    with torch.random.fork_rng():
        trunk = Trunk(load_trunk_side(Path(settings.model), kit.plan, dtype=DTYPES[kit.plan.dtype]), kit.plan)
        outcome = check_cut(Path(settings.model), kit, trunk)
    print(f"checked  {outcome}")


def _results(summary: KitSummary) -> list[Result]:
    figures = {
        "tensors given": (summary.given_tensors, "tensors", summary.all_tensors),
        "parameters given": (summary.given_parameters, "parameters", None),
        "size": (summary.bytes, "bytes", None),
    }
    return [
        Result(case="kit", metric=name, value=value, unit=unit, reference=reference)
        for name, (value, unit, reference) in figures.items()
    ]
