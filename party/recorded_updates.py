"""Adapters as whoever got them in the clear has them: a federation's updates one by one, or the one adapter of a run.

Names are those of a PEFT adapter's file.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

from party.rundir import RunDirectory
from protocols import protocol_named
from splitfl.adapters import ADAPTER_FILE, add_lora, lora_config
from splitfl.aggregation.factors import Pair
from splitfl.aggregation.factors import Update as Factors
from splitfl.aggregation.rule import Rule
from splitfl.aggregation.rules import rule_named
from splitfl.aggregation.state import State
from splitfl.audit.recording import Left
from splitfl.audit.view import Update
from splitfl.config import TuneSettings
from splitfl.errors import DataError
from splitfl.kit import Kit

_PREFIX = "base_model.model."
_WEIGHT = struct.Struct("<d")


def offline_update(settings: TuneSettings, kit: Kit, run: RunDirectory) -> Update | None:
    """The one release of an offline run, its adapter; None for other runs, and for one that has not ended.

    Before it stands the adapter that the run's seed drew, which is no secret of the rows.
    """
    file = run.adapter / ADAPTER_FILE
    if not protocol_named(settings.protocol).offline or settings.federate is not None or not file.is_file():
        return None
    base = kit.load(torch.float32)
    asked = {**settings.lora_kwargs(), "target_modules": list(settings.target_modules) or None}
    config = lora_config(base, kit.plan, **asked, top_alone=settings.freeze_bottom)
    with torch.random.fork_rng(devices=[]):
        model = add_lora(base, config, seed=settings.seed)
        fresh = get_peft_model_state_dict(model, save_embedding_layers=False)
    after = {name: tensor.float() for name, tensor in load_file(file).items()}
    before = {name: tensor.detach().float().clone() for name, tensor in fresh.items()}
    return Update(number=0, round=0, before=before, after=after)


def federated_updates(settings: TuneSettings, left: Sequence[tuple[Left, tuple[bytes, ...]]]) -> tuple[Update, ...]:
    """What left for a coordinator that sums in the clear; the same values in a second attempt are one update.

    A round in which a gradient leaves stands as one step of plain gradient descent at a rate of 1.

    Raises:
        DataError: what is recorded is not an update of this federation.
    """
    if not left:
        return ()
    rule = rule_named(settings.rule, settings.rule_options())
    updates: list[Update] = []
    seen: set[tuple[int, bytes]] = set()
    for head, (state_bytes, blob) in left:
        state = State.from_bytes(state_bytes)
        values = _values(rule, state, head, blob)
        if (head.number, values.tobytes()) in seen:
            continue
        seen.add((head.number, values.tobytes()))
        sent = rule.update(state, values, head.round, head.stage)
        before, is_gradient = _named(state.adapter), rule.steps(head.round)[head.stage].does == "gradient"
        after = _named(sent)
        if is_gradient:
            after = {name: before[name] - tensor for name, tensor in after.items()}
        rate, steps = (1.0, 1) if is_gradient else (None, None)
        updates.append(
            Update(number=len(updates), round=head.number, before=before, after=after, learning_rate=rate, steps=steps)
        )
    return tuple(updates)


def _values(rule: Rule, state: State, head: Left, blob: bytes) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """The values of an update as it was handed over: `splitfl.aggregation.plain` for a mean, else weight and values."""
    length, offset = rule.length(state, head.round, head.stage), 0 if rule.by_mean(head.round) else _WEIGHT.size
    if len(blob) < offset + 4 * length:
        raise DataError("An update in the recording is too short.", expected=f"{length} values")
    return np.frombuffer(blob, dtype="<f4", count=length, offset=offset).astype(np.float32)


def _named(update: Factors) -> dict[str, torch.Tensor]:
    """The tensors of an update under the names that PEFT gives them; a core is multiplied into B."""
    named = {f"{_PREFIX}{name}": tensor for name, tensor in update.extras.items()}
    for name, pair in update.pairs.items():
        plain: Pair = pair.without_core()
        named[f"{_PREFIX}{name}.lora_A.weight"] = plain.a
        named[f"{_PREFIX}{name}.lora_B.weight"] = plain.b
    return named
