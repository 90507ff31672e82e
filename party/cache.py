"""One pass over the trunk: each row is sent once, and the trunk's replies are kept on disk for all epochs.

`fill` sends what is missing; it can be killed anywhere and goes on. `CachedTrunk` then stands where the remote trunk
stood, and neither owner nor bottom is needed any more.

    cache.json                what the replies belong to: plan, rows, what was done to them, order of the batches
    outbox-000012.safetensors what is about to be sent; written and synced before it is booked and sent
    000012.safetensors        the trunk's reply, one tensor a row, without padding

The outbox is why a killed pass releases nothing twice: a batch that was booked is sent again with the very same bytes
(fresh noise would be a second release, and averaging the two would undo some of it). Each outbox has a random number of
its own, which its release is booked under. So where an outbox or a reply is lost and its batch is drawn anew, that is
booked as the second release that it is.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from party.protect import BatchRows, Guard
from party.remote import RemoteTrunk
from splitfl.cut import PassThrough, Plan, module_at
from splitfl.data import Collator
from splitfl.errors import DataError, UsageError
from splitfl.files import replace_text
from splitfl.link import TrunkRequest
from splitfl.wire.coding import Coded

_INDEX = "cache.json"
_SENT_AGAIN = "remove this one file and resume: its rows will be sent, and booked, once more"


class _ReplyKept(Exception):
    """Leaves the model's forward pass once the trunk's reply is on disk: nothing above it is needed."""


@dataclass(frozen=True, kw_only=True)
class CacheKey:
    """What replies belong to; a cache of another key is not used."""

    plan: str
    """Digest of the plan."""
    dataset: str
    """Fingerprint of the rows."""
    tokens: str
    """Digest of the rows' token ids: truncation and length limits change them."""
    protection: str
    """What was done to the activations, in words, with every number."""
    compute: str
    """Dtype in which the bottom computes."""
    dtype: str
    """Wire dtype of the replies."""
    padding_side: str
    batch_size: int
    examples: int


class TrunkCache:
    """Replies of the trunk for one file of rows. Writes nothing before `start`.

    Args:
        folder: where they are kept.
        key: what they belong to.
        lengths: tokens of each example.

    Raises:
        UsageError: the folder holds replies of another key.
        DataError: its index is damaged.
    """

    def __init__(self, folder: Path, key: CacheKey, lengths: Sequence[int]) -> None:
        self.folder, self.key = folder, key
        order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
        self.batches = [order[start : start + key.batch_size] for start in range(0, len(order), key.batch_size)]
        self._rows: dict[int, torch.Tensor] = {}
        self._check()

    def _check(self) -> None:
        index = self.folder / _INDEX
        if not index.is_file() and not any(self.folder.glob("*.safetensors")):
            return
        try:
            held = json.loads(index.read_text(encoding="utf-8"))
            wrong = [name for name, value in vars(self.key).items() if held.get(name) != value]
        except (OSError, ValueError, AttributeError) as error:
            raise DataError(
                f"{index} cannot be read.",
                hint="put it back, or choose another --out: every row will be sent, and booked, once more",
            ) from error
        if wrong:
            facts = "; ".join(f"{name}: held {held.get(name)}, wanted {getattr(self.key, name)}" for name in wrong)
            raise UsageError(
                f"{self.folder} holds the trunk's replies to something else ({facts}).",
                expected="the settings that the run was started with",
                hint="give those, or choose another --out: every row will be sent, and booked, once more",
            )

    def start(self) -> None:
        """Make the folder, and say in it what the replies belong to."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / _INDEX).is_file():
            replace_text(self.folder / _INDEX, json.dumps(vars(self.key), indent=1) + "\n")

    def _reply(self, batch: int) -> Path:
        return self.folder / f"{batch:06d}.safetensors"

    def outbox(self, batch: int) -> Path:
        """Where the bytes of a batch wait that is about to be sent."""
        return self.folder / f"outbox-{batch:06d}.safetensors"

    @property
    def missing(self) -> list[int]:
        """Numbers of the batches whose reply is not here yet."""
        return [batch for batch in range(len(self.batches)) if not self._reply(batch).is_file()]

    def keep(self, batch: int, output: torch.Tensor, mask: torch.Tensor) -> None:
        """Store the trunk's reply [B, T, D]; `mask` [B, T] is 1 where there is a token."""
        found = {
            f"row-{row}": output[index][mask[index].bool()].contiguous()
            for index, row in enumerate(self.batches[batch])
        }
        _save(found, self._reply(batch))
        self.outbox(batch).unlink(missing_ok=True)

    def load(self) -> None:
        """Map every reply into memory.

        Raises:
            DataError: a file that is damaged.
        """
        for batch, rows in enumerate(self.batches):
            held = _load(self._reply(batch))
            for row in rows:
                if f"row-{row}" not in held:
                    raise DataError(f"{self._reply(batch)} lacks a reply that belongs there.", hint=_SENT_AGAIN)
                self._rows[row] = held[f"row-{row}"]

    def padded(self, rows: Sequence[int], width: int, side: str) -> torch.Tensor:
        """The replies for these rows as one batch, [B, T, D] of T = `width`, zeros where the padding is."""
        first = self._rows[rows[0]]
        out = first.new_zeros(len(rows), width, first.shape[-1])
        for index, row in enumerate(rows):
            held = self._rows[row]
            out[index, slice(None, len(held)) if side == "right" else slice(width - len(held), None)] = held
        return out


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Whole on disk, or not at all."""
    staging = path.with_suffix(".part")
    save_file(tensors, staging)
    with staging.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(staging, path)


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read.", hint=_SENT_AGAIN) from error


# ---- the pass


class _Sender:
    """The link of the pass: each batch goes through the outbox, the book and the session, in this order."""

    def __init__(self, guard: Guard, cache: TrunkCache, dtype: torch.dtype) -> None:
        self.guard, self.cache, self.dtype = guard, cache, dtype
        self.batch = 0
        self.rows: BatchRows | None = None
        self.mask = torch.empty(0)

    def forward(self, request: TrunkRequest) -> tuple[torch.Tensor, int]:
        assert isinstance(request.hidden, torch.Tensor)  # noqa: S101
        outbox = self.cache.outbox(self.batch)
        if not outbox.is_file():
            made = self.guard.protect_hidden(request.hidden, request.mask)
            save_sent(made if isinstance(made, Coded) else made.to("cpu", self.dtype), outbox)
        sent, number = taken_out(outbox, request.hidden)
        protection, book, booked = self.guard.protection, self.guard.book, list[str]()
        if book is not None:
            booked = book.charge(
                "activations", protection.hidden, self.rows, formal=protection.formal, release_id=f"pass:{number}"
            )
        leaving = self.guard.outgoing(replace(request, keep=False, cache=None), sent)
        output, _ = self.guard.link.forward(leaving)
        self.cache.keep(self.batch, output.to("cpu", self.dtype), self.mask)
        if book is not None:
            book.confirm(booked)
        raise _ReplyKept

    def backward(self, step: int, gradient: torch.Tensor | Coded) -> torch.Tensor:
        raise AssertionError("a pass has no gradient")

    def release(self, *, caches: tuple[int, ...] = (), steps: tuple[int, ...] = ()) -> None:
        self.guard.link.release(caches=caches, steps=steps)


def save_sent(sent: torch.Tensor | Coded, outbox: Path) -> None:
    """Write what is about to be sent, with a number of its own to book it under; on disk when this returns."""
    _save(_put_in(sent), outbox)


def _put_in(sent: torch.Tensor | Coded) -> dict[str, torch.Tensor]:
    number = torch.frombuffer(bytearray(secrets.token_bytes(16)), dtype=torch.uint8)
    if not isinstance(sent, Coded):
        return {"number": number, "plain": sent.contiguous()}
    facts = {"coding": sent.coding, "shape": sent.shape, "step": sent.step, "kept": sent.kept}
    about = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)
    return {"number": number, "payload": sent.payload, "about": about}


def taken_out(outbox: Path, hidden: torch.Tensor) -> tuple[torch.Tensor | Coded, str]:
    """What is to be sent, and the number that it is booked under.

    Raises:
        DataError: the file is damaged, or of another shape than `hidden`.
    """
    held = _load(outbox)
    try:
        number = bytes(held["number"].tolist()).hex()
        if "plain" in held:
            sent: torch.Tensor | Coded = held["plain"]
        else:
            facts = json.loads(bytes(held["about"].tolist()))
            sent = Coded(payload=held["payload"], **{**facts, "shape": tuple(facts["shape"])})
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{outbox} is no outbox.", hint=_SENT_AGAIN) from error
    if tuple(sent.shape) != tuple(hidden.shape):
        raise DataError(f"{outbox} belongs to other rows.", hint=_SENT_AGAIN)
    return sent, number


def fill(
    cache: TrunkCache, model: PreTrainedModel, remote: RemoteTrunk, guard: Guard, *, examples: Sequence[dict[str, Any]],
    collator: Collator, dtype: torch.dtype, device: str = "cpu", told: Callable[[int, int, float], None] | None = None,
) -> None:  # fmt: skip
    """Send every batch whose reply is missing, once.

    Args:
        cache: where replies go.
        model: the party's model, its remote trunk in place; any adapter is left out of it.
        remote: that trunk; its link is exchanged for the time of the pass.
        guard: protects and books.
        examples: the rows, in the order of the cache's lengths.
        collator: pads them.
        dtype: of the replies on disk.
        device: where the bottom computes.
        told: called after each batch with batches done, batches in all, and seconds so far.
    """
    sender = _Sender(guard, cache, dtype)
    before, remote.link = remote.link, sender
    started = time.monotonic()
    missing = cache.missing
    try:
        for done, batch in enumerate(missing, start=1):
            rows = cache.batches[batch]
            inputs = collator([examples[row] for row in rows])
            inputs.pop("labels", None)
            inputs.pop("row", None)
            sender.batch, sender.mask = batch, inputs["attention_mask"]
            sender.rows = guard.batch = BatchRows(dataset=cache.key.dataset, rows=tuple(rows))
            try:
                with torch.no_grad():
                    model(**{name: tensor.to(device) for name, tensor in inputs.items()})
            except _ReplyKept:
                pass
            if told is not None:
                told(done, len(missing), time.monotonic() - started)
    finally:
        remote.link = before


def cache_bytes(lengths: Sequence[int], width: int, dtype: torch.dtype) -> int:
    """Bytes that the replies to rows of these lengths take on disk, headers aside."""
    return sum(lengths) * width * dtype.itemsize


# ---- afterwards


class CachedTrunk(PassThrough):
    """Stands where the remote trunk stood: gives the kept reply for the rows under way.

    Args:
        replaced: the module that stood there.
        plan: the plan.
        padding_side: of the batches that will come.
    """

    def __init__(self, replaced: nn.Module, plan: Plan, padding_side: str) -> None:
        super().__init__(replaced, plan.bottom, plan.returns_tuple)
        self.padding_side = padding_side
        self.caches: dict[str, TrunkCache] = {}
        """By fingerprint of the rows."""
        self.batch: BatchRows | None = None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the trunk replied for these rows, [B, T, D]."""
        if self.batch is None:
            raise UsageError(
                "The trunk's replies are kept by row, and this batch does not say which rows it holds.",
                hint="train with splitfl's own trainer, or use protocol split",
            )
        cache = self.caches[self.batch.dataset]
        output = cache.padded(self.batch.rows, hidden_states.shape[1], self.padding_side)
        return self.form(output.to(hidden_states.device, hidden_states.dtype))


def put_cached_trunk(model: PreTrainedModel, plan: Plan, padding_side: str) -> CachedTrunk:
    """Exchange the remote trunk for kept replies, in place, and take away the bottom, which nothing needs any more."""
    layers = module_at(model.base_model, plan.stack)
    cached = CachedTrunk(layers[plan.bottom], plan, padding_side)
    for index in range(plan.bottom):
        layers[index] = PassThrough(layers[index], index, plan.returns_tuple)
    layers[plan.bottom] = cached
    return cached
