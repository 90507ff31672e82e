"""One run of `splitfl bench chaos`: the road from a party to an owner, what befalls it, and what came of it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from splitfl.bench.chaos_cases import NEW_TOKENS, SAVE_STEPS, STEPS, Case, Event, schedule
from splitfl.bench.faults import Proxy
from splitfl.bench.message_faults import Middle, Rates, altered
from splitfl.bench.served import Home, Served, assets
from splitfl.errors import ResourceError
from splitfl.privacy.ledger import Ledger
from splitfl.wire.keys import AllowList, load_keys, load_public

PARTY = "hospital"
_SILENCE_S, _LIMIT_S, _POLL_S = "1.0", 300.0, 0.05
_MOST_STARTS = 12


@dataclass
class Outcome:
    """What one run came to."""

    code: int = 0
    """Exit code of the last process."""
    up: int = 0
    """Bytes upwards, encryption included."""
    adapter: str = ""
    """Hash of the tensors' file."""
    losses: tuple[tuple[int, float], ...] = ()
    text: str = ""
    seconds: float = 0.0
    starts: int = 0
    altered: int = 0
    """Requests that were said again in other bytes."""
    repeated: int = 0
    """Requests that were said more than once."""
    forms: int = 0
    """Different hidden states that left."""
    booked: int = 0
    """Releases of activations in the ledger."""
    happened: Counter[str] = field(default_factory=Counter)
    said: str = ""
    """Last line on standard error."""


class Road:
    """From where a party connects: a TCP proxy, behind it a relay of messages, behind it the owner. A context.

    Args:
        home: keys and kit; the relay's own pair is ``relay``.
        owner: running.
        rates: what is done to messages.
        seed: of the draw.
    """

    def __init__(self, home: Home, owner: Served, rates: Rates, seed: int) -> None:
        pair = load_keys(home.keys / f"{PARTY}.key_secret")
        self._stack = ExitStack()
        self.middle = Middle(
            owner.address,
            owner_public=load_public(home.keys / "owner.key"),
            own=load_keys(home.keys / "relay.key_secret"),
            parties={pair.public.decode(): pair},
            allow=AllowList(home.keys / "parties"),
            rates=rates,
            seed=seed,
        )
        self.proxy: Proxy | None = None
        self._home = home

    def __enter__(self) -> Self:
        self._stack.enter_context(self.middle)
        self.proxy = self._stack.enter_context(Proxy(self.middle.address))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def words(self) -> list[str]:
        """Options by which a command of the party takes this road."""
        assert self.proxy is not None  # noqa: S101
        return ["--owner", self.proxy.address, "--owner-key", str(self._home.keys / "relay.key"),
                "--key", str(self._home.keys / f"{PARTY}.key_secret")]  # fmt: skip


class Party:
    """Runs a command of a party until it ends by itself; killed, it is started again with ``--resume``."""

    def __init__(self, folder: Path, words: Sequence[str]) -> None:
        self._folder, self._words = folder, list(words)
        self._process: subprocess.Popen[bytes] | None = None
        self.starts, self.kills = 0, 0

    def kill(self) -> None:
        """SIGKILL to what runs now."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self.kills += 1

    def run(self) -> int:
        """To its end; the exit code.

        Raises:
            ResourceError: it took too long.
        """
        deadline = time.monotonic() + _LIMIT_S
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "SPLITFL_LEDGER": str(self._folder / "ledger.sqlite")}
        while True:
            words = ["splitfl.bench.chaos_side", _SILENCE_S, *self._words, *(["--resume"] if self.starts else [])]
            self.starts += 1
            with (self._folder / "party.log").open("ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", *words], env=environment, stdout=log, stderr=log,
                    stdin=subprocess.DEVNULL, start_new_session=True,
                )  # fmt: skip
            code = self._wait(deadline)
            if code != -signal.SIGKILL or self.starts > _MOST_STARTS:
                return code

    def _wait(self, deadline: float) -> int:
        assert self._process is not None  # noqa: S101
        while (code := self._process.poll()) is None:
            if time.monotonic() > deadline:
                self._process.kill()
                self._process.wait()
                raise ResourceError(f"A run of the chaos was not over within {_LIMIT_S:.0f} s; see {self._folder}.")
            time.sleep(_POLL_S)
        return code


def tune_words(home: Home, case: Case, out: Path) -> list[str]:
    """The command of a tuning run of a case."""
    return [
        "tune", "--kit", str(home.kit), "--train", str(assets() / "data" / "hospital.train.jsonl"), "--out", str(out),
        "--max-steps", str(STEPS), "--save-steps", str(SAVE_STEPS), "--max-length", "40", "--truncation", "right",
        "--per-device-train-batch-size", "2", "--logging-steps", "1", "--seed", "5", "--learning-rate", "2e-3",
        "--timeout", "90", "--probe-every", "0", *case.options,
    ]  # fmt: skip


def undisturbed(home: Home, owner: Served, case: Case, folder: Path) -> Outcome:
    """A case's run without any fault, over the same road."""
    return _run(home, owner, case, folder, tune_words(home, case, folder / "run"), [], Rates(), 0, up=0)


def undisturbed_text(home: Home, owner: Served, case: Case, folder: Path, words: list[str]) -> Outcome:
    """A generation without any fault, over the same road."""
    return _run(home, owner, case, folder, words, [], Rates(), 0, up=0)


def disturbed(home: Home, owner: Served, case: Case, seed: int, folder: Path, whole: Outcome, run: Path) -> Outcome:
    """The same with what the seed has drawn for it.

    Args:
        whole: the undisturbed run's, or for a generation the undisturbed generation's.
        run: for a generation, the undisturbed run.
    """
    words = tune_words(home, case, folder / "run")
    if case.work == "generate":
        words = generate_words(home, run, folder)
    return _run(home, owner, case, folder, words, schedule(case, seed), case.rates, seed, up=whole.up)


def generate_words(home: Home, run: Path, folder: Path) -> list[str]:
    """The command of a generation."""
    return [
        "generate", "--run", str(run), "--kit", str(home.kit), "--prompt", "What are the symptoms of asthma?",
        "--max-new-tokens", str(NEW_TOKENS), "--no-stream", "--json", str(folder / "text.json"), "--timeout", "90",
    ]  # fmt: skip


def _run(
    home: Home, owner: Served, case: Case, folder: Path, words: list[str], events: Sequence[Event], rates: Rates,
    seed: int, *, up: int,
) -> Outcome:  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    found = Outcome()
    began = time.monotonic()
    with Road(home, owner, rates, seed) as road:
        party = Party(folder, [*words, *road.words()])
        restarts = _plan(road, owner, party, events, up, found)
        found.code = party.run()
        for restart in restarts:
            restart.join(_LIMIT_S)
        assert road.proxy is not None  # noqa: S101
        found.up, found.starts = road.proxy.passed.up, party.starts
        found.happened.update(road.middle.done)
    found.happened["party killed"] = party.kills
    found.seconds = time.monotonic() - began
    _read_messages(road.middle, found)
    _read_files(folder, found)
    return found


def _plan(
    road: Road, owner: Served, party: Party, events: Sequence[Event], up: int, found: Outcome
) -> list[threading.Thread]:
    restarts: list[threading.Thread] = []
    proxy = road.proxy
    assert proxy is not None  # noqa: S101

    def act(event: Event) -> None:
        found.happened["owner killed" if event.what == "owner" else str(event.fault or "")] += event.what != "party"
        match event.what:
            case "owner":
                owner.kill()
                restarts.append(threading.Thread(target=owner.start, daemon=True))
                restarts[-1].start()
            case "party":
                party.kill()
            case _ if event.fault is not None:
                proxy.apply(event.fault)

    for event in events:
        proxy.after(round(event.share * up), lambda event=event: act(event))  # type: ignore[misc]
    return restarts


def _read_messages(middle: Middle, found: Outcome) -> None:
    requests = middle.requests()
    found.altered = len(altered(requests))
    found.repeated = sum(len(said) > 1 for said in requests.values())
    found.forms = len({said[0][1] for (_, kind, _), said in requests.items() if kind == "forward"})


def _read_files(folder: Path, found: Outcome) -> None:
    run, text, ledger = folder / "run", folder / "text.json", folder / "ledger.sqlite"
    if (run / "adapter").is_dir():
        tensors = (run / "adapter" / "adapter_model.safetensors").read_bytes()
        found.adapter = hashlib.blake2b(tensors, digest_size=16).hexdigest()
    if (run / "run.jsonl").is_file():
        records = [json.loads(line) for line in (run / "run.jsonl").read_text(encoding="utf-8").splitlines()]
        found.losses = tuple(sorted({r["step"]: r["loss"] for r in records if r["event"] == "train"}.items()))
    if text.is_file():
        said = msgspec.json.decode(text.read_bytes())
        found.text = json.dumps([r for r in said["results"] if r["metric"] in ("text", "continuation")])
    if ledger.is_file():
        with Ledger(ledger, create=False) as book:
            book.verify()
            found.booked = sum(entry["channel"] == "activations" for entry in book.export()["entries"])
    log = folder / "party.log"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
    found.said = " | ".join(lines[-3:])
