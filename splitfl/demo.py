"""`splitfl demo`: the whole system on this machine, through the same commands that people use.

One owner process serves the trunk of the embedded model; a hospital and a clinic tune on their own questions and
answers at the same time, over TCP with CURVE. Afterwards the adapters are put onto the *unsplit* model, which only
somebody who holds both sides can do: the held-out loss must come out the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from splitfl.config import DemoSettings
from splitfl.errors import InternalError, ResourceError, UsageError
from splitfl.metrics import Result, write_results
from splitfl.report import as_size, write_demo_report

PARTIES = ("hospital", "clinic")
PROMPT = "What are the symptoms of asthma?"
_BOTTOM, _TOP = 2, 2
_READY_S, _STEP_S = 120.0, 60.0
_LOGGED = 5  # steps between two records
_MARK = "this-is-a-splitfl-demo"
_TUNING = {
    "--learning-rate": "2e-3",
    "--per-device-train-batch-size": "8",
    "--max-length": "192",
    "--truncation": "right",
    "--target-modules": "all-linear",
    "--r": "16",
    "--lora-alpha": "32",
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one party's run came to."""

    party: str
    before: float
    after: float
    unsplit: float
    """Held-out loss of the same adapter on the unsplit model."""
    tokens_per_s: float
    bytes_sent: int
    bytes_received: int
    answer: str


def assets() -> Path:
    """The directory of the embedded model and data."""
    return Path(str(resources.files("splitfl") / "assets"))


def demo(settings: DemoSettings) -> None:
    """Run the demonstration and write its report."""
    out = _fresh(settings.out)
    console = Console(stderr=True, soft_wrap=True)
    started = time.monotonic()

    def say(text: str) -> None:
        console.print(f"[bold]{time.monotonic() - started:5.1f} s[/]  {text}", highlight=False)

    say("keys for one owner and two parties")
    for name in ("owner", *PARTIES):
        _run(["keys", "new", name, "--out", str(out / "keys")], out)
    for party in PARTIES:
        _run(["keys", "allow", str(out / "keys" / f"{party}.key"), "--parties", str(out / "parties")], out)
    say(f"kit: {_BOTTOM} layers below, {_TOP} above; the trunk stays with the owner")
    model = assets() / "model"
    _run(
        ["kit", str(out / "kit"), "--model", str(model), "--bottom", str(_BOTTOM), "--top", str(_TOP), "--dtype",
         "float32"],
        out,
    )  # fmt: skip
    with _owner(out, model) as ready:
        say(f"owner ready at {ready[0]}, key {ready[1]}")
        say(f"{' and '.join(PARTIES)} tune for {settings.max_steps} steps, at the same time")
        _tune_all(settings, out, ready[0], say)
        for party in PARTIES:
            _run(
                ["generate", "--run", str(out / party), "--prompt", PROMPT, "--chat", "--max-new-tokens", "40",
                 "--repetition-penalty", "1.2", "--json", str(out / f"{party}-answer.json")],
                out,
            )  # fmt: skip
    say("the same adapters on the unsplit model, to compare")
    outcomes = [_outcome(party, out, model) for party in PARTIES]
    report = write_demo_report(out, _owner_facts(out), {party: out / party for party in PARTIES})
    _print(outcomes)
    if settings.json is not None:
        write_results(settings.json, "demo", settings, _results(outcomes, time.monotonic() - started))
    if not settings.keep:
        for name in ("keys", "parties", "kit", *(f"{party}/checkpoints" for party in PARTIES)):
            shutil.rmtree(out / name, ignore_errors=True)
    say(f"report: {report}")


def _fresh(out: Path) -> Path:
    """An empty directory; one of an earlier demo is replaced, anything else is left alone."""
    if out.exists() and any(out.iterdir()):
        if not (out / _MARK).exists():
            raise UsageError(f"{out} exists and is no earlier demo.", hint="choose another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARK).touch()
    return out


# ---- processes


def _command(words: list[str]) -> list[str]:
    return [sys.executable, "-m", "splitfl", *words]


def _environment() -> dict[str, str]:
    # Three processes share this machine's cores: one thread each does more than several that wait for one another.
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def _run(words: list[str], out: Path) -> None:
    """Run one command to its end; its output goes to `out`/log."""
    with (out / "log").open("ab") as log:
        done = subprocess.run(_command(words), env=_environment(), stdout=log, stderr=log, check=False)
    if done.returncode:
        raise InternalError(f"`splitfl {words[0]}` ended with exit code {done.returncode}; see {out / 'log'}.")


@contextlib.contextmanager
def _owner(out: Path, model: Path) -> Iterator[tuple[str, str]]:
    """A serving owner; yields its address and fingerprint, and stops it in the end."""
    words = ["serve", "--model", str(model), "--kit", str(out / "kit"), "--bind", "tcp://127.0.0.1:0", "--key",
             str(out / "keys" / "owner.key_secret"), "--parties", str(out / "parties"), "--workers", "2",
             "--threads", "1", "--json", str(out / "owner.json")]  # fmt: skip
    with (out / "owner.log").open("wb") as log:
        process = subprocess.Popen(_command(words), env=_environment(), stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            yield _wait_until_ready(process, out / "owner.log")
        finally:
            _stop(process)


def _wait_until_ready(process: subprocess.Popen[str], log: Path) -> tuple[str, str]:
    lines: list[str] = []
    assert process.stdout is not None  # noqa: S101
    stdout = process.stdout
    reader = threading.Thread(target=lambda: lines.append(stdout.readline()), daemon=True)
    reader.start()
    reader.join(_READY_S)
    words = lines[0].split() if lines else []
    if len(words) != 3 or words[0] != "ready":
        raise ResourceError(f"The owner did not become ready within {_READY_S:.0f} s; see {log}.")
    return words[1], words[2]


def _stop(process: subprocess.Popen[Any]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _tune_all(settings: DemoSettings, out: Path, address: str, say: Any) -> None:
    """Both parties at once; a line whenever one of them has got further."""
    processes = {party: _start_tuning(settings, out, party, address) for party in PARTIES}
    deadline = time.monotonic() + _READY_S + settings.max_steps * _STEP_S
    shown: dict[str, int] = {}
    try:
        while any(process.poll() is None for process in processes.values()):
            if time.monotonic() > deadline:
                raise ResourceError("The parties did not finish in the time allowed.", hint="lower --max-steps")
            time.sleep(0.5)
            for party in PARTIES:
                _show_progress(out / party / "run.jsonl", party, settings.max_steps, shown, say)
    finally:
        for process in processes.values():
            _stop(process)
    for party, process in processes.items():
        if process.returncode:
            raise InternalError(f"{party} ended with exit code {process.returncode}; see {out / party}.log.")


def _start_tuning(settings: DemoSettings, out: Path, party: str, address: str) -> subprocess.Popen[bytes]:
    data = assets() / "data"
    words = ["tune", "--kit", str(out / "kit"), "--owner", address, "--owner-key", str(out / "keys" / "owner.key"),
             "--key", str(out / "keys" / f"{party}.key_secret"), "--train", str(data / f"{party}.train.jsonl"),
             "--eval", str(data / f"{party}.held.jsonl"), "--out", str(out / party), "--protocol", "split",
             "--max-steps", str(settings.max_steps), "--seed", str(settings.seed)]  # fmt: skip
    options = [word for pair in _TUNING.items() for word in pair]
    options += ["--logging-steps", str(min(_LOGGED, settings.max_steps))]  # even the shortest run has a rate
    with (out / f"{party}.log").open("wb") as log:
        return subprocess.Popen(_command(words + options), env=_environment(), stdout=log, stderr=log)


def _show_progress(log: Path, party: str, total: int, shown: dict[str, int], say: Any) -> None:
    last = next((r for r in reversed(_records(log)) if r["event"] == "train"), None)
    if last is not None and last["step"] > shown.get(party, 0):
        shown[party] = last["step"]
        left = (total - last["step"]) * last["tokens"] / max(last["tokens_per_s"] or 1, 1) / 5
        say(
            f"{party:9} step {last['step']:3}/{total}  loss {last['loss']:.3f}  {last['tokens_per_s']:,.0f} tokens/s"
            f"  about {left:.0f} s left"
        )


def _records(log: Path) -> list[dict[str, Any]]:
    if not log.exists():
        return []
    whole = log.read_text(encoding="utf-8").rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


# ---- figures


def _outcome(party: str, out: Path, model: Path) -> Outcome:
    records = _records(out / party / "run.jsonl")
    losses = {r["when"]: r["loss"] for r in records if r["event"] == "eval"}
    trained = [r for r in records if r["event"] == "train"]
    end = next(r for r in records if r["event"] == "end")
    answer = json.loads((out / f"{party}-answer.json").read_text(encoding="utf-8"))["results"][0]["value"]
    return Outcome(
        party=party,
        before=losses["before"],
        after=losses["after"],
        unsplit=_unsplit_loss(out / party / "adapter", assets() / "data" / f"{party}.held.jsonl", model),
        tokens_per_s=sum(r["tokens"] for r in trained) / sum(r["seconds"] for r in trained),
        bytes_sent=end["bytes_sent"],
        bytes_received=end["bytes_received"],
        answer=answer.strip(),
    )


def _unsplit_loss(adapter: Path, rows: Path, model: Path) -> float:
    """Held-out loss of the adapter on the whole model, computed by the libraries alone."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from splitfl.data import Collator, load_rows, tokenise
    from splitfl.load import quiet_library

    with quiet_library():
        tokenizer = AutoTokenizer.from_pretrained(model)
        whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        tuned = PeftModel.from_pretrained(whole, adapter).eval()
    examples = tokenise(load_rows(rows, task="causal-lm"), tokenizer, max_length=192, truncation="right")
    collator = Collator(tokenizer)
    total, counted = 0.0, 0
    with torch.no_grad():
        for example in examples:
            batch = collator([example])
            targets = int((batch["labels"][:, 1:] != -100).sum())
            total += tuned(**batch).loss.item() * targets
            counted += targets
    return total / counted


def _owner_facts(out: Path) -> dict[str, Any]:
    figures = json.loads((out / "owner.json").read_text(encoding="utf-8"))["results"]
    return {entry["metric"]: entry["value"] for entry in figures}


def _print(outcomes: list[Outcome]) -> None:
    table = Table(title="Tuned through the split, on rows that never left their holder's process")
    for heading in ("party", "held-out loss before", "after", "on the unsplit model", "tokens/s", "sent", "received"):
        table.add_column(heading, justify="left" if heading == "party" else "right")
    for o in outcomes:
        table.add_row(
            o.party, f"{o.before:.4f}", f"{o.after:.4f}", f"{o.unsplit:.4f}", f"{o.tokens_per_s:,.0f}",
            as_size(o.bytes_sent), as_size(o.bytes_received),
        )  # fmt: skip
    console = Console()
    console.print(table)
    for o in outcomes:
        console.print(f"[bold]{o.party}[/] answers {PROMPT!r}: {o.answer}", highlight=False)
    worst = max(abs(o.after - o.unsplit) for o in outcomes)
    console.print(f"largest difference between split and unsplit held-out loss: {worst:.1e}", highlight=False)
    console.print(
        "With protocol `split` the activations are not protected: the owner could recover text from them. "
        "See docs/protocols.md.",
        highlight=False,
    )


def _results(outcomes: list[Outcome], seconds: float) -> list[Result]:
    results = [Result(case="demo", metric="seconds", value=seconds, unit="s")]
    for o in outcomes:
        results += [
            Result(case=o.party, metric="held-out loss", value=o.after, unit="nats", reference=o.before),
            Result(case=o.party, metric="held-out loss, unsplit", value=o.unsplit, unit="nats", reference=o.after),
            Result(case=o.party, metric="rate", value=o.tokens_per_s, unit="tokens/s"),
            Result(case=o.party, metric="bytes sent", value=o.bytes_sent, unit="bytes"),
            Result(case=o.party, metric="bytes received", value=o.bytes_received, unit="bytes"),
        ]
    return results
