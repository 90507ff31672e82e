"""`splitfl audit` after real runs: figures, page, controls, going on where it ended, forgetting."""

from __future__ import annotations

import json

import pytest

from party.audit_choice import MOMENTS, choose
from party.recorded import AdapterState, Recorded
from party.rundir import RunDirectory
from splitfl.audit.truth import TrueRow
from splitfl.config_audit import AuditSettings
from splitfl.demo import assets
from splitfl.errors import UsageError
from splitfl.kit import write_kit
from tests.live.child import splitfl_here
from tests.live.owner import serve

COMMON = ("--per-device-train-batch-size", 2, "--max-length", 64, "--truncation", "right", "--max-steps", 2,
          "--learning-rate", "5e-3", "--threads", 1, "--seed", 3, "--record")  # fmt: skip
WORDS = ("--quick", "--records", 4, "--threads", 1, "--attack", "map_decode")
GAUSS = ("--protocol", "guarded-gradfree", "--noise", "gauss", "--clip", 30, "--sigma", 3)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audited")
    write_kit(assets() / "model", folder / "kit", bottom=2, top=2, dtype="float32")
    lines = (assets() / "data" / "hospital.train.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "train.jsonl").write_text("\n".join(sorted(lines, key=len)[:4]) + "\n", encoding="utf-8")
    with serve(assets() / "model", folder / "kit", folder) as owner:
        for name, more in (("open", ()), ("defended", GAUSS)):
            splitfl_here("tune", *owner.link(), "--train", folder / "train.jsonl", *COMMON, "--out", folder / name,
                         "--ledger", folder / "ledger", *more)  # fmt: skip
    return folder


def figures_of(path):
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["command"] == "audit"
    return {(each["case"], each["metric"]): each for each in found["results"]}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_open_run_is_read_and_the_controls_say_that_this_means_something(place, capfd):
    splitfl_here("audit", place / "open", *WORDS, "--json", place / "open.json")
    figures = figures_of(place / "open.json")
    for case in ("map_decode K1, as it crossed", "map_decode K3, as it crossed"):
        assert figures[case, "token recovery"]["value"] >= 0.99
        assert figures[case, "token recovery"]["reference"] is None
    works = {case: each["value"] for (case, metric), each in figures.items() if metric == "works"}
    assert {case.split(":")[0].removeprefix("control, ") for case in works} == {"positive", "negative", "sensitivity"}
    assert set(works.values()) == {1}
    page = (place / "open" / "audit" / "audit.html").read_text(encoding="utf-8")
    assert "few rows: 4" in page
    first = json.loads((place / "train.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first["prompt"][:40] in page
    # The same command again: everything is there, nothing is attacked twice.
    capfd.readouterr()
    splitfl_here("audit", place / "open", *WORDS, "--no-texts")
    assert "from an earlier command" not in capfd.readouterr().err, "without texts it is another audit"
    splitfl_here("audit", place / "open", *WORDS, "--no-texts")
    assert capfd.readouterr().err.count("from an earlier command") == 2
    assert first["prompt"][:40] not in (place / "open" / "audit" / "audit.html").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_defended_score_has_its_undefended_reference(place):
    splitfl_here("audit", place / "defended", *WORDS, "--knowledge", "K3", "--json", place / "defended.json")
    figures = figures_of(place / "defended.json")
    beside = figures["map_decode K3, as it crossed", "token recovery"]
    open_ = figures["map_decode K3, undefended", "token recovery"]["value"]
    assert beside["reference"] == open_ >= 0.99
    assert beside["value"] < 0.7
    assert "away from its undefended twin" in (place / "defended" / "audit" / "audit.html").read_text(encoding="utf-8")
    # Rows that are gone: no twin, no score.
    splitfl_here("audit", place / "defended", "--forget")
    assert not RunDirectory(place / "defended").recording.exists()


# ---- which rows are attacked


def recorded(epochs, rows, *, known):
    truth, states = {}, {}
    for number in range(epochs * rows):
        truth[number] = TrueRow(number=number, dataset="train", row=number % rows, ids=None, labels=0, special=None)
        states[number] = AdapterState(weights=number // rows, known=number // rows in known)
    return Recorded(run=None, truth=truth, states=states)


def test_the_last_send_is_attacked_or_several_under_noise():
    made = recorded(3, 5, known={0, 2})
    assert choose(made, 9, several=False, seed=0).whole == (10, 11, 12, 13, 14)
    assert len(choose(made, 9, several=True, seed=0).whole) == 15
    assert len(choose(made, 2, several=True, seed=0).whole) == 6


def test_the_very_bottom_is_known_at_moments_only():
    made = recorded(4, 6, known={0, 3})
    chosen = choose(made, 4, several=False, seed=0)
    numbers = [number for _, part in chosen.moments for number in part]
    assert len(chosen.moments) <= MOMENTS
    assert {number // 6 for number in numbers} <= {0, 3}
    assert choose(recorded(2, 3, known=set()), 4, several=False, seed=0).moments == ()


def test_the_same_seed_draws_the_same_rows():
    made = recorded(1, 50, known={0})
    draws = [choose(made, 10, several=False, seed=seed).whole for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


# ---- settings


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"domain": "same"}, "needs text of the rows' domain"),
        ({"domain": "none", "auxiliary": "x"}, "contradict"),
        ({"owner_key": "x"}, "--traffic"),
        ({"forget": True, "attack": ("sip",)}, "--forget attacks nothing"),
        ({"attack": ("sip", "sip")}, "twice"),
        ({"knowledge": ("K4",)}, "K4"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path, given, words):
    paths = {name: tmp_path if value == "x" else value for name, value in given.items()}
    with pytest.raises(UsageError, match=words):
        AuditSettings(run=tmp_path, **paths)
