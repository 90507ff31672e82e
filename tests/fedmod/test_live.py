"""Four servers, each a process, on real rows of two kinds: they find their kind, survive a loss, and go on again."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from peft import PeftModel

from party.fedmod_model import features_of, open_base, plan_whole, public_centre
from splitfl.data import Collator, load_rows, tokenise
from splitfl.demo import assets
from splitfl.kit import load_tokenizer
from splitfl.metrics import read_run
from splitfl.privacy.ledger import Ledger
from splitfl.rows import fingerprint
from splitfl.sketch import plan_sketch, release, row_codes, similarities
from tests.fedmod.servers import Place, films, health, make_places
from tests.live.child import Child, child

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(600)]
MODEL = assets() / "model"
OWN_KIND = {"alice": "bob", "bob": "alice", "carol": "dave", "dave": "carol"}


@pytest.fixture
def places(tmp_path) -> dict[str, Place]:
    """Alice and Bob moderate films, Carol and Dave health; each has rows of its own."""
    reviews, answers = films(), health()
    kinds = {
        "alice": reviews[:200],
        "bob": reviews[200:],
        "carol": answers[:200],
        "dave": answers[200:400],
    }
    return make_places(tmp_path, kinds, held=60)


def ports(count: int) -> list[int]:
    with ExitStack() as stack:
        taken = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in taken:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in taken]


class Town:
    """The command line of each server."""

    def __init__(self, folder: Path, places: dict[str, Place]):
        self.folder, self.places = folder, places
        self.addresses = {n: f"tcp://127.0.0.1:{p}" for n, p in zip(places, ports(len(places)), strict=True)}

    def words(self, name: str, *more: str) -> list[str]:
        place = self.places[name]
        peers = [w for n, a in self.addresses.items() if n != name for w in ("--peer", f"{n}={a}")]
        fixed = {
            "--model": MODEL, "--key": place.key, "--peers": self.folder / "peers", "--bind": self.addresses[name],
            "--train": place.train, "--eval": place.held_out, "--out": self.folder / name, "--max-length": "20",
            "--ledger": self.folder / f"{name}.sqlite", "--json": self.folder / f"{name}.json", "--threads": "1",
            # at these few rows the default epsilon of 1 errs in 1 of 20 rankings; this test is about what comes after
            "--sketch-epsilon": "4", "--neighbours": "1", "--gather": "120", "--timeout": "60", "--linger": "10",
            "--rounds": "3", "--local-steps": "4", "--learning-rate": "3e-3", "--r": "4",
        }  # fmt: skip
        flags = [w for option, value in fixed.items() for w in (option, str(value))]
        return ["-m", "splitfl", "fedmod", *flags, *peers, *more]

    @contextmanager
    def running(self, *names: str, more: tuple[str, ...] = ()) -> Iterator[dict[str, Child]]:
        with ExitStack() as stack:
            yield {n: stack.enter_context(child(self.words(n, *more), self.folder)) for n in names}

    def events(self, name: str, event: str) -> list[dict]:
        return [record for record in read_run(self.folder / name / "run.jsonl") if record["event"] == event]

    def figures(self, name: str) -> dict[str, float]:
        found = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))["results"]
        return {r["case"]: r["value"] for r in found if r["metric"] == "held-out macro F1"}


def test_four_servers_of_two_kinds_one_of_which_is_killed(tmp_path, places):
    town = Town(tmp_path, places)
    with town.running(*places) as servers:
        servers["dave"].stderr.wait_for("round 1: averaged", timeout_s=300)
        servers["dave"].process.kill()
        for name in ("alice", "bob", "carol"):
            assert servers[name].wait(300) == 0, servers[name].stderr.text
    for name in ("alice", "bob"):
        similarity = town.events(name, "peers")[0]["similarity"]
        assert max(similarity, key=similarity.get) == OWN_KIND[name]
        assert [list(e["neighbours"]) for e in town.events(name, "exchange")] == [[OWN_KIND[name]]] * 2
    first, second = town.events("carol", "exchange")
    assert list(first["neighbours"]) == ["dave"]
    assert set(second["neighbours"]) <= {"dave"}, "nobody of the other kind takes its place"
    made = {name: town.figures(name) for name in ("alice", "bob", "carol")}
    after, local, before = (sum(m[when] for m in made.values()) / 3 for when in ("after", "local", "before"))
    assert after > before
    # So few steps decide little; what can be said is that averaging does no harm beyond the grain of 60 rows.
    assert after > local - 0.15
    for name in made:
        self_contained(town, name)


def self_contained(town: Town, name: str) -> None:
    """Adapter, disclosure, report, thresholds and ledger of a finished server."""
    run = town.folder / name
    plan = plan_whole(MODEL)
    base = open_base(MODEL, plan, {"0": 0, "1": 1}, 0)
    tuned = PeftModel.from_pretrained(base, run / "adapter")
    assert any("lora_B" in n and bool(p.abs().sum() > 0) for n, p in tuned.named_parameters())
    listed = json.loads((run / "disclosure.json").read_text(encoding="utf-8"))
    bounds = {c["message"]: c["bound"] for c in listed["crossings"]}
    assert "epsilon 4" in bounds["sketch"]
    assert bounds["have"] == "none"
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "partly trained" in page
    assert "logit_offsets" in (run / "thresholds.json").read_text(encoding="utf-8")
    with Ledger(town.folder / f"{name}.sqlite", create=False) as ledger:
        accounts = {a.group: a for a in ledger.summary()}
    assert accounts["sketch"].most.releases == 1
    assert accounts["sketch"].most.rho > 0
    assert accounts["adapter"].most.releases == accounts["adapter"].most.unbounded == 3


def test_interrupted_and_gone_on_with_the_same_sketch(tmp_path, places):
    town = Town(tmp_path, {name: places[name] for name in ("alice", "bob")})
    with town.running("alice", "bob", more=("--min-similarity", "-1", "--no-compare-local")) as servers:
        servers["bob"].stderr.wait_for("round 1: averaged", timeout_s=300)
        servers["bob"].process.send_signal(signal.SIGINT)
        assert servers["bob"].wait(120) == 130, servers["bob"].stderr.text
        sketch = (tmp_path / "bob" / "sketch.json").read_bytes()
        again = ("--min-similarity", "-1", "--no-compare-local", "--resume")
        with town.running("bob", more=again) as resumed:
            assert resumed["bob"].wait(300) == 0, resumed["bob"].stderr.text
        assert servers["alice"].wait(300) == 0, servers["alice"].stderr.text
    assert (tmp_path / "bob" / "sketch.json").read_bytes() == sketch
    with Ledger(tmp_path / "bob.sqlite", create=False) as ledger:
        accounts = {a.group: a.most.releases for a in ledger.summary()}
    assert accounts == {"sketch": 1, "adapter": 3}, "nothing is booked twice"
    steps = [e["step"] for e in town.events("bob", "train")]
    assert steps[-1] == 12
    assert steps == sorted(steps)


def test_rows_of_one_kind_rank_above_those_of_another_at_the_default_noise(tmp_path):
    reviews, answers = films(), health()
    kinds = {"alice": reviews[:200], "bob": reviews[200:], "carol": answers[:300], "dave": answers[300:]}
    places = make_places(tmp_path, kinds, held=1)
    plan, noise = plan_whole(MODEL), plan_sketch(1.0, 1e-6)
    base, tokenizer = open_base(MODEL, plan, {"0": 0, "1": 1}, 0), load_tokenizer(MODEL)
    collator = Collator(tokenizer, pad_token_id=base.config.pad_token_id)
    centre = public_centre(base, collator, 0)
    codes = {}
    for name, place in places.items():
        rows = load_rows(place.train, task="sequence-classification")
        examples = tokenise(rows, tokenizer, max_length=24, truncation="right")
        codes[name] = row_codes(features_of(base, examples, collator), centre, 0, noise.grid)
    right = 0
    for _ in range(50):
        made = {name: release(each, noise) for name, each in codes.items()}
        for name, sketch in made.items():
            found = similarities(sketch, {n: s for n, s in made.items() if n != name})
            right += max(found, key=found.__getitem__) == OWN_KIND[name]
    assert right >= 160  # of 200; 191 in one measurement, and by chance it would be 67


def test_a_budget_that_has_no_room_for_adapters_refuses_before_anything_is_released(tmp_path, places):
    town = Town(tmp_path, {"alice": places["alice"]})
    rows = load_rows(places["alice"].train, task="sequence-classification")
    with Ledger(tmp_path / "alice.sqlite") as ledger:
        ledger.set_budget(fingerprint(rows), "adapter", unit="row", adversary="peers", releases=2)
    with town.running("alice") as servers:
        assert servers["alice"].wait(120) == 2
        assert "beyond its budget" in servers["alice"].stderr.text
    assert not (tmp_path / "alice").exists()
    with Ledger(tmp_path / "alice.sqlite", create=False) as ledger:
        assert [a.most.releases for a in ledger.summary()] == [0]
