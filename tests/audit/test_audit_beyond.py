"""`splitfl audit` beside the traffic: adapter, planted secrets, updates, trunk, claims, a lying owner. Real runs."""

from __future__ import annotations

import json

import pytest
import torch

from party.audit_beyond import examinations
from party.audit_beyond.learnt import _shared
from party.audit_beyond.updates import _by_chance
from splitfl.audit import canaries
from splitfl.audit.examined import Examined, Fact, examined_results, find_examined
from splitfl.audit.intervals import Estimate
from splitfl.audit.results import Cost, find_outcome, keep
from splitfl.errors import DataError
from tests.federation.federation import coordinate, make_keys
from tests.live.child import splitfl_here
from tests.live.models import answer_rows, make_kit, save_tiny, write_jsonl
from tests.live.owner import serve

TUNE = ("--max-length", 48, "--truncation", "right", "--target-modules", "all-linear", "--threads", 1, "--seed", 3,
        "--record")  # fmt: skip
HOW = ("--quick", "--threads", 1)


def figures_of(path):
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    return {(each["case"], each["metric"]): each for each in results}


def metric(figures, case, start):
    """The one figure of a case whose name begins so."""
    (found,) = [each for (c, m), each in figures.items() if c == case and m.startswith(start) and "," not in m[-6:]]
    return found


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny model, its kit, and rows of which some hold canaries."""
    folder = tmp_path_factory.mktemp("beyond")
    model = save_tiny("llama", folder / "model")
    kit = make_kit(model, folder / "kit", dtype="float32")
    rows = answer_rows()
    write_jsonl(folder / "rows.jsonl", rows[:24])
    write_jsonl(folder / "held.jsonl", rows[24:])
    words = ["rows.jsonl", "--kit", "kit", "--out", "marked", "--random", "10", "--repeats", "6"]
    whole = [str(folder / word) if word in ("rows.jsonl", "kit", "marked") else word for word in words]
    assert canaries.main(whole) == 0
    return folder, model, kit


@pytest.fixture(scope="module")
def online(tiny):
    folder, model, kit = tiny
    with serve(model, kit, folder) as owner:
        splitfl_here("tune", *owner.link(), "--train", folder / "rows.jsonl", "--eval", folder / "held.jsonl", *TUNE,
                     "--out", folder / "online", "--ledger", folder / "ledger", "--max-steps", 12,
                     "--per-device-train-batch-size", 4, "--learning-rate", "1e-2")  # fmt: skip
    return folder / "online"


@pytest.fixture(scope="module")
def federated(tiny):
    """One party alone, tuned hard on marked rows, with an update in the clear after each round."""
    folder, model, kit = tiny
    home = folder / "federation"
    make_keys(home, ["hospital"])
    with coordinate(home, "--rounds", 2, "--sum", "plain", "--rule", "fedit", "--min-parties", 1) as federation:
        more = ("--protocol", "fed-params", "--model", model, "--kit", kit, "--sum", "plain", "--rule", "fedit",
                "--train", folder / "marked" / "rows.jsonl", "--eval", folder / "held.jsonl", *TUNE, "--ledger",
                folder / "ledger", "--local-steps", 60, "--learning-rate", "2e-2", "--r", 16,
                "--per-device-train-batch-size", 8)  # fmt: skip
        splitfl_here(*federation.words("hospital", folder / "federated", *more)[2:])
    return folder / "federated"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_online_run_tells_of_members_of_the_trunk_and_of_lies(tiny, online, capfd):
    folder, model, _ = tiny
    wanted = [word for name in ("membership", "lira", "extract", "hijack", "dp-audit") for word in ("--attack", name)]
    splitfl_here("audit", online, *HOW, "--model", model, *wanted, "--json", folder / "online.json")
    figures = figures_of(folder / "online.json")
    assert figures["membership K3, as it crossed", "AUC"]["value"] > 0.5
    assert 0 <= metric(figures, "lira", "AUC, against shadow models")["value"] <= 1
    loss = figures["extract", "held-out loss with the student"]
    assert loss["value"] > loss["reference"], "a student of a few rows is no trunk"
    assert figures["hijack", "the same, false gradients"]["value"] > 0
    assert figures["hijack", "backward at which the honesty check stops the run"]["value"] <= 12
    page = (online / "audit" / "audit.html").read_text(encoding="utf-8")
    for words in ("Beside the traffic", "shadow models", "lying owner", "nothing is claimed: neither DP-SGD"):
        assert words in page
    # Again: from the files.
    capfd.readouterr()
    splitfl_here("audit", online, *HOW, "--model", model, *wanted)
    assert capfd.readouterr().err.count("from an earlier command") == 4


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_updates_in_the_clear_and_planted_secrets(tiny, federated):
    folder, model, _ = tiny
    splitfl_here("audit", federated, *HOW, "--model", model, "--canaries", folder / "marked" / "canaries.jsonl",
                 "--json", folder / "federated.json")  # fmt: skip
    figures = figures_of(folder / "federated.json")
    exposed = figures["canary", "exposure of canaries in the rows"]
    assert exposed["value"] > exposed["reference"] + 1, "a hundred passes over a secret are learnt"
    assert figures["canary", "alarming"]["value"] == 1
    assert figures["membership K3, as it crossed", "AUC"]["value"] > 0.8
    assert figures["update-invert K1, as it crossed", "records"]["value"] == 2, "both updates were looked at"
    page = (federated / "audit" / "audit.html").read_text(encoding="utf-8")
    assert "no hidden crossed" in page
    assert "nothing is claimed" in page


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_that_was_not_recorded_is_asked_what_its_adapter_says(tiny, online, capsys, tmp_path):
    _, model, _ = tiny
    splitfl_here("audit", online, "--forget")
    member = ("--attack", "membership", "--model", model, *HOW)
    splitfl_here("audit", online, *member, "--out", tmp_path / "a", "--reference", online)
    page = (tmp_path / "a" / "audit.html").read_text(encoding="utf-8")
    assert "Share of the gain kept" in page
    assert "100&nbsp;%" in page, "beside itself it keeps everything"
    capsys.readouterr()
    splitfl_here("audit", online, "--attack", "map_decode", *HOW, "--out", tmp_path / "b", code=2)
    assert "record" in capsys.readouterr().err
    splitfl_here("audit", online, "--attack", "membership", *HOW, "--out", tmp_path / "c", code=2)
    assert "--model" in capsys.readouterr().err


# ---- the parts


def test_every_examination_is_listed_once():
    found = examinations()
    assert list(found) == ["membership", "lira", "canary", "update-invert", "extract", "dp-audit", "hijack"]
    assert {name for name, each in found.items() if not each.default} == {"lira", "hijack"}


def made():
    facts = (
        Fact.of("share", Estimate(value=0.25, low=0.1, high=0.5, records=9), "share", 0.1, "others"),
        Fact(name="bits", value=3.14159, unit="bits"),
    )
    return Examined(
        name="canary", title="t", source="s", adversary="a", found="f.", alarming=True, weak_point="w", facts=facts,
        records=9, cost=Cost(seconds=1.0, peak_rss_bytes=1),
    )  # fmt: skip


def test_an_examination_is_kept_and_found_under_its_key_alone(tmp_path):
    path = tmp_path / "canary.json"
    keep(path, "key", made())
    assert path.stat().st_mode & 0o777 == 0o600
    assert find_examined(path, "key") == made()
    assert find_examined(path, "other") is None
    assert find_outcome(path, "key") is None, "it is no attack on traffic"
    path.write_text(path.read_text(encoding="utf-8").replace('"facts": [', '"facts": [3,'), encoding="utf-8")
    with pytest.raises(DataError, match="no result"):
        find_examined(path, "key")


def test_figures_say_their_unit_interval_and_reference():
    share, bits = made().facts
    assert share.shown == "25.0 % (10.0 to 50.0)"
    assert share.compared == "others: 10.0 %"
    assert bits.shown == "3.142 bits"
    assert bits.compared == ""
    found = {each.metric: each for each in examined_results([made()])}
    assert found["share"].reference == 0.1
    assert found["share, high"].value == 0.5
    assert found["alarming"].value == 1


def test_what_rows_share_is_their_prefix_and_one_token_is_left():
    assert _shared([[1, 2, 3], [1, 2, 4, 5]]) == 2
    assert _shared([[1, 2], [1, 2, 9]]) == 1
    assert _shared([[7], [7]]) == 0


def test_the_bound_of_the_negative_control_is_what_blind_draws_hit():
    draw = torch.Generator().manual_seed(0)
    wanted = set(torch.randperm(1000, generator=draw)[:100].tolist())
    bags = [torch.randperm(1000, generator=draw)[:200].tolist() for _ in range(200)]
    found = sum(2 * len(wanted & set(bag)) / 300 for bag in bags) / len(bags)
    assert _by_chance([200], 100, 1000) == pytest.approx(found, rel=0.05)
    assert _by_chance([], 100, 1000) == 0
