"""An owner that can be killed, rows, undisturbed runs, and roads to the owner on which things happen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from party.conversation import Conversation
from splitfl.bench.faults import Proxy
from splitfl.bench.message_faults import Middle, Rates
from splitfl.bench.served import Home, Served
from splitfl.wire.keys import AllowList, load_keys, load_public, new_keys
from tests.live.child import splitfl_here
from tests.live.models import Rows, answer_rows, make_kit, save_tiny, write_jsonl
from tests.live.runs import write_config

PARTY = "hospital"
ROUGH = Rates(drop=0.05, duplicate=0.15, delay=0.12, reorder=0.1)
QUIET = Rates()


@dataclass(frozen=True, kw_only=True)
class Road:
    """From a party through a TCP proxy and a relay of messages to the owner."""

    proxy: Proxy
    middle: Middle
    link: list[str | Path]
    """Options by which a command takes it."""


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is lost is said again after half a second, not after a minute."""
    monkeypatch.setattr(Conversation, "resend_after_s", 0.5)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A tiny Llama, its kit, and everybody's keys."""
    folder = tmp_path_factory.mktemp("chaos")
    model = save_tiny("llama", folder / "model")
    for name in ("owner", "relay", PARTY):
        new_keys(name, folder / "keys")
    AllowList(folder / "keys" / "parties").add(folder / "keys" / f"{PARTY}.key")
    return Home(model=model, kit=make_kit(model, folder / "kit"), keys=folder / "keys", logs=folder)


@pytest.fixture(scope="session")
def owner(home: Home) -> Iterator[Served]:
    """A real `splitfl serve`."""
    with Served(home, "owner") as served:
        yield served


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """Rows to train on, and others to measure on."""
    folder, made = tmp_path_factory.mktemp("rows"), answer_rows()
    return Rows(
        train=write_jsonl(folder / "train.jsonl", made[:24]), held_out=write_jsonl(folder / "held.jsonl", made[40:44])
    )


@pytest.fixture(scope="session")
def config(rows: Rows, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Few steps; checks of the owner draw at random, and are left out so that what leaves can be counted."""
    shorter = {"max_steps": 8, "eval_steps": 8, "probe_every": 0, "timeout": 60}
    return write_config(tmp_path_factory.mktemp("config") / "tune.toml", rows, **shorter)


@pytest.fixture
def road(home: Home, owner: Served):
    """Makes roads; each is for one run."""
    with ExitStack() as stack:
        yield lambda rates, seed=0: stack.enter_context(open_road(home, owner, rates, seed))


@contextmanager
def open_road(home: Home, owner: Served, rates: Rates, seed: int = 0) -> Iterator[Road]:
    """A road on which messages meet with `rates`."""
    pair = load_keys(home.keys / f"{PARTY}.key_secret")
    middle = Middle(
        owner.address,
        owner_public=load_public(home.keys / "owner.key"),
        own=load_keys(home.keys / "relay.key_secret"),
        parties={pair.public.decode(): pair},
        allow=AllowList(home.keys / "parties"),
        rates=rates,
        seed=seed,
    )
    with middle, Proxy(middle.address) as proxy:
        link: list[str | Path] = ["--kit", home.kit, "--owner", proxy.address, "--owner-key", home.keys / "relay.key"]
        yield Road(proxy=proxy, middle=middle, link=[*link, "--key", home.keys / f"{PARTY}.key_secret"])
        assert not middle.problems


def tune(road: Road, config: Path, out: Path, *more: str | Path) -> Path:
    """A run over `road`, in this process, with a ledger of its own beside it; its directory."""
    ledger = ("--ledger", out.with_suffix(".ledger"))
    splitfl_here("tune", *road.link, "--config", config, "--out", out, *ledger, *more)
    return out


@pytest.fixture(scope="session")
def undisturbed(home: Home, owner: Served, config: Path, tmp_path_factory: pytest.TempPathFactory):
    """By options: the run that nothing befell, and the road that it took."""
    made: dict[tuple[str, ...], tuple[Path, Road]] = {}

    def make(*options: str) -> tuple[Path, Road]:
        if options not in made:
            with open_road(home, owner, QUIET) as road:
                made[options] = tune(road, config, tmp_path_factory.mktemp("whole") / "run", *options), road
        return made[options]

    return make
