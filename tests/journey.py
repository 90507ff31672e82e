"""`python -m tests.journey`: the figures of docs/journey.md, measured with a real owner, real rows, the embedded model.

One training step on the first eight rows of the hospital's file, one generation of two prompts with two beams, and one
retry towards an owner that was killed and started again. Everything that crosses is taken from the party's tap, which
sees each frame as it goes to the socket and as it comes from there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import safe_open

from model_owner.memory import measure as measure_costs
from model_owner.trunk import Trunk
from party.connect import open_session
from party.model import open_model
from party.session import Session
from splitfl.adapters import adapter_to_vector, add_lora, lora_config
from splitfl.data import Collator, load_rows, tokenise
from splitfl.demo import assets
from splitfl.kit import Kit, open_kit, write_kit
from splitfl.link import TrunkRequest
from splitfl.load import load_trunk_side, tensor_names
from splitfl.wire.codecs import Frame, nbytes
from splitfl.wire.keys import AllowList, new_keys
from splitfl.wire.messages import DtypeName
from tests.live.child import Child, child
from tests.live.relay import Relay, relay

MODEL, ROWS = assets() / "model", assets() / "data" / "hospital.train.jsonl"
BATCH, MAX_LENGTH = 8, 192
PROMPTS = ("What are the symptoms of asthma?", "What causes gout?")
NEW_TOKENS = 6

Figures = dict[str, Any]


@dataclass
class Crossed:
    """One message that crossed, read from its frames alone."""

    way: str
    header: dict[str, Any]
    sizes: list[int]
    frames: list[bytes] = field(repr=False)

    @property
    def word(self) -> str:
        return str(self.header["type"])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {spec["name"]: tuple(spec["shape"]) for spec in self.header.get("tensors", ())}


class Tap:
    """Notes every message of a session."""

    def __init__(self) -> None:
        self.log: list[Crossed] = []

    def __call__(self, way: str, frames: Sequence[Frame]) -> None:
        header = msgspec.msgpack.decode(bytes(frames[0]))
        self.log.append(Crossed(way, header, [nbytes(f) for f in frames], [bytes(f) for f in frames]))

    def of(self, word: str) -> list[Crossed]:
        return [each for each in self.log if each.word == word]

    def words(self) -> list[str]:
        return [each.word for each in self.log]


def measure(folder: Path) -> Figures:
    """All figures, by name; `folder` is filled with keys, kit and logs."""
    torch.manual_seed(0)
    for name in ("owner", "hospital"):
        new_keys(name, folder / "keys")
    AllowList(folder / "parties").add(folder / "keys" / "hospital.key")
    summary = write_kit(MODEL, folder / "kit", bottom=2, top=2, dtype="float32")
    kit = open_kit(folder / "kit")
    figures: Figures = {
        "tensors in the kit": summary.given_tensors,
        "tensors of the model": summary.all_tensors,
        "parameters in the kit": summary.given_parameters,
        "bytes of the kit's weights": sum(_tensor_bytes(folder / "kit")),
    }
    figures |= _owner_costs(kit)
    with _owner(folder) as (running, address):
        tap = Tap()
        with relay(address) as road, closing(_session(folder, kit, road.address, tap)) as session:
            figures |= _training_step(kit, session, tap)
            figures |= _generation(kit, session, tap)
            figures |= _on_tcp(session, tap, road)
        rows, positions, _ = figures["first request"]["hidden"]
        held = rows * (positions + figures["requests of the generation"] - 1)
        figures["bytes of the cache at the owner"] = held * figures["bytes of a cache for one position"]
        with closing(_session(folder, kit, address, tap, wire_dtype="bfloat16")) as session:
            session.forward(TrunkRequest(hidden=torch.zeros(figures["shape at the cut"])))
            figures["bytes at the cut, bfloat16 on the wire"] = tap.of("forward")[-1].sizes[1]
        figures |= _retry(folder, kit, running, address.rpartition(":")[2])
    return figures


# ---- the two sides


@contextmanager
def _owner(folder: Path, port: str = "0") -> Iterator[tuple[Child, str]]:
    """A serving owner and its address."""
    words = ["-m", "splitfl", "serve", "--model", MODEL, "--kit", "kit", "--bind", f"tcp://127.0.0.1:{port}"]
    words += ["--key", "keys/owner.key_secret", "--parties", "parties", "--threads", "1"]
    with child([str(word) for word in words], folder) as running:
        yield running, running.stdout.wait_for("ready ").split()[1]


def _session(folder: Path, kit: Kit, address: str, tap: Tap, wire_dtype: DtypeName = "float32") -> Session:
    owner_key, key = folder / "keys" / "owner.key", folder / "keys" / "hospital.key_secret"
    return open_session(kit.plan, address, owner_key=owner_key, key=key, wire_dtype=wire_dtype, timeout_s=100, tap=tap)


def _tensor_bytes(folder: Path) -> Iterator[int]:
    for name, file in tensor_names(folder).items():
        with safe_open(file, framework="pt") as tensors:
            yield tensors.get_tensor(name).nbytes


def _owner_costs(kit: Kit) -> Figures:
    """What the owner holds for a token; measured as `splitfl serve` does at start-up, in this process."""
    trunk = Trunk(load_trunk_side(MODEL, kit.plan, dtype=torch.float32), kit.plan)
    costs = measure_costs(trunk, caches=True)
    return {
        "parameters of the trunk": sum(p.numel() for p in trunk.base.parameters()),
        "bytes of the trunk": sum(p.nbytes for p in trunk.base.parameters()),
        "bytes of a cache for one position": costs.cache,
        "bytes of the step's graph": costs.of_graph(*batch_of(kit)[0]["input_ids"].shape),
    }


# ---- training


def batch_of(kit: Kit) -> tuple[dict[str, torch.Tensor], list[int]]:
    """The first eight rows as a batch, and their lengths in tokens."""
    tokenizer = kit.tokenizer()
    examples = tokenise(load_rows(ROWS, task="causal-lm"), tokenizer, max_length=MAX_LENGTH, truncation="right")[:BATCH]
    return Collator(tokenizer)(examples), [len(example["input_ids"]) for example in examples]


def _training_step(kit: Kit, session: Session, tap: Tap) -> Figures:
    batch, lengths = batch_of(kit)
    base = open_model(kit, session)
    model = add_lora(base, lora_config(base, kit.plan), seed=0)
    entries: list[torch.Tensor] = []
    layers = base.model.layers
    handle = layers[kit.plan.bottom].register_forward_pre_hook(lambda _m, args: entries.append(args[0]))
    start = len(tap.log)
    output = model(**batch)
    output.loss.backward()
    handle.remove()
    up, down, gradient_up, gradient_down = tap.log[start:]
    assert [each.word for each in tap.log[start:]] == ["forward", "forward_done", "backward", "backward_done"]
    gradient = torch.frombuffer(bytearray(gradient_up.frames[1]), dtype=torch.float32).view(entries[0].shape)
    zero = gradient.eq(0).all(-1)
    sent, received = sum(up.sizes) + sum(gradient_up.sizes), sum(down.sizes) + sum(gradient_down.sizes)
    cut = sum(each.sizes[1] for each in (up, down, gradient_up, gradient_down))
    return {
        "lengths of the rows": lengths,
        "shape of the batch": tuple(batch["input_ids"].shape),
        "bytes of the token ids": batch["input_ids"].nbytes,
        "positions of the batch": batch["input_ids"].numel(),
        "tokens that are no padding": int(batch["attention_mask"].sum()),
        "positions that are padding": int((batch["attention_mask"] == 0).sum()),
        "labels that count": int((batch["labels"][:, 1:] != -100).sum()),
        "adapter parameters": adapter_to_vector(model).numel(),
        "bytes of the adapter": adapter_to_vector(model).nbytes,
        "shape at the cut": tuple(entries[0].shape),
        "dtype at the cut": str(entries[0].dtype).removeprefix("torch."),
        "bytes at the cut": entries[0].nbytes,
        "header of the forward": _plain(up.header),
        "header bytes, forward": up.sizes[0],
        "mask bytes": up.sizes[2],
        "message bytes, forward": sum(up.sizes),
        "header bytes, forward_done": down.sizes[0],
        "message bytes, forward_done": sum(down.sizes),
        "header bytes, backward": gradient_up.sizes[0],
        "message bytes, backward": sum(gradient_up.sizes),
        "header bytes, backward_done": gradient_down.sizes[0],
        "message bytes, backward_done": sum(gradient_down.sizes),
        "bytes sent in the step": sent,
        "bytes received in the step": received,
        "bytes of the four cut tensors": cut,
        "headers and mask, per cent": round(100 * (sent + received - cut) / cut, 3),
        "shape of the logits": tuple(output.logits.shape),
        "bytes of the logits": output.logits.nbytes,
        "loss": round(float(output.loss.detach()), 4),
        "gradient rows that are zero": int(zero.sum()),
        "gradient rows that are zero and no padding": int((zero & batch["attention_mask"].bool()).sum()),
    }


def _plain(header: dict[str, Any]) -> str:
    """A header for people, its session number left out."""
    shown = {**header, "session": "..."}
    return msgspec.json.encode(shown).decode()


# ---- generation


def _generation(kit: Kit, session: Session, tap: Tap) -> Figures:
    tokenizer = kit.tokenizer()
    model = open_model(kit, session)
    tokenizer.padding_side = "left"
    prompts = tokenizer(list(PROMPTS), return_tensors="pt", padding=True)
    start = len(tap.log)
    with torch.no_grad():
        written = model.generate(
            input_ids=prompts.input_ids, attention_mask=prompts.attention_mask, num_beams=2, do_sample=False,
            max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, pad_token_id=tokenizer.pad_token_id,
            return_dict_in_generate=True,
        )  # fmt: skip
    asked = [each for each in tap.log[start:] if each.word == "forward"]
    first, second = asked[:2]
    moved = [each.header.get("rows") for each in asked]
    slots = written.past_key_values.layers
    real, counting = slots[0], slots[kit.plan.bottom]
    return {
        "shape of the prompts": tuple(prompts.input_ids.shape),
        "requests of the generation": len(asked),
        "past of each request": [each.header.get("past", 0) for each in asked],
        "rows of each request": [None if rows is None else tuple(rows) for rows in moved],
        "first request": first.shapes,
        "second request": second.shapes,
        "bytes up, first request": sum(first.sizes),
        "bytes up, second request": sum(second.sizes),
        "bytes down, second request": sum(tap.of("forward_done")[-1].sizes),
        "hidden bytes, second request": second.sizes[1],
        "a slot of the party's own layer": (tuple(real.keys.shape), real.keys.nbytes + real.values.nbytes),
        "a slot that counts": (tuple(counting.keys.shape), counting.keys.nbytes + counting.values.nbytes),
    }


def _on_tcp(session: Session, tap: Tap, road: Relay) -> Figures:
    """What ZeroMQ and CURVE add to a forward of that size and its answer. A heartbeat may come between: take the least.

    The padding is not the rows' own, which does not change a size.
    """
    shape = tap.of("forward")[0].shapes["hidden"]
    request = TrunkRequest(hidden=torch.zeros(shape), mask=torch.ones(shape[:2], dtype=torch.uint8))
    session.forward(request)  # takes the release of what was dropped along
    more = []
    for _ in range(3):
        before, start = (len(road.up), len(road.down)), len(tap.log)
        session.forward(request)
        up, down = tap.log[start:]
        more.append((len(road.up) - before[0] - sum(up.sizes), len(road.down) - before[1] - sum(down.sizes)))
    return {"bytes that ZeroMQ and CURVE add": tuple(map(min, zip(*more, strict=True)))}


# ---- a retry


def _retry(folder: Path, kit: Kit, running: Child, port: str) -> Figures:
    """One step whose owner is killed between forward and backward, and started again at the same address."""
    tap = Tap()
    with closing(_session(folder, kit, f"tcp://127.0.0.1:{port}", tap)) as session:
        hidden = torch.randn(2, 5, kit.plan.width, requires_grad=True)
        link = _remote(kit, session)
        output = link(hidden)
        running.process.kill()
        running.wait()
        with _owner(folder, port):
            output.sum().backward()
            words = [f"{'->' if each.way == 'sent' else '<-'} {each.word}" for each in tap.log]
            session.close()
    forwards, backwards = tap.of("forward"), tap.of("backward")
    return {
        "messages of the retry": _once(words),
        "both forwards are the same bytes": forwards[0].frames == forwards[1].frames,
        "all backwards are the same bytes": all(each.frames == backwards[0].frames for each in backwards),
        "backwards": len(backwards),
    }


def _once(words: list[str]) -> list[str]:
    """`words` without a request that was repeated because the link was up again, and without what came of it."""
    once: list[str] = []
    for word in words:
        repeated = word == "<- refused" and word in once
        if not repeated and once[-1:] != [word]:
            once.append(word)
    return once


def _remote(kit: Kit, session: Session) -> Any:
    model = open_model(kit, session)
    return model.base_model.get_submodule(f"{kit.plan.stack}.{kit.plan.bottom}")


def show(figures: Figures) -> str:
    """The figures as the table that stands on the page."""
    return "\n".join(f"{name}: {value}" for name, value in figures.items())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        print(show(measure(Path(place))))
