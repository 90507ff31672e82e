"""Protection that makes no sense: refused before anything is sent, with the nearest right setting, and no run left."""

from __future__ import annotations

import functools
import sqlite3

import pytest

import party.opening
from party.opening import prepare
from party.rundir import RunDirectory
from splitfl.kit import open_kit
from splitfl.privacy.ledger import Ledger
from tests.live.child import splitfl_here
from tests.live.models import make_kit, save_tiny
from tests.live.recording import recorded_commands

pytestmark = pytest.mark.slow

GRADFREE = ("--protocol", "guarded-gradfree")
ONLINE = ("--protocol", "guarded-online")
GAUSS = ("--noise", "gauss", "--clip", "10", "--sigma", "1")
NO_SIGMA = ("--noise", "gauss", "--clip", "10")
CLAIM = ("--epsilon", "8", "--delta", "1e-6", "--unit", "record")

REFUSED = {
    "noise without a clip": (("--noise", "gauss", "--sigma", "1"), ["without --clip", "add --clip"]),
    "noise without a size": (NO_SIGMA, ["Of --sigma and --epsilon, neither"]),
    "both sizes": ((*GAUSS, *CLAIM), ["Of --sigma and --epsilon, both"]),
    "dchi without a size": (("--noise", "dchi"), ["add --eta"]),
    "clip without noise": (("--clip", "1"), ["--clip has no effect", "--noise gauss"]),
    "epsilon alone": ((*NO_SIGMA, "--epsilon", "8"), ["without --delta and --unit", "--delta 1e-6 --unit record"]),
    "epsilon without unit": ((*NO_SIGMA, "--epsilon", "8", "--delta", "1e-6"), ["without --unit"]),
    "epsilon without delta": ((*NO_SIGMA, "--epsilon", "8", "--unit", "record"), ["without --delta"]),
    "delta without epsilon": ((*GAUSS, "--delta", "1e-6"), ["--delta was given without --epsilon"]),
    "token at a deep cut": ((*GAUSS, "--unit", "token", *GRADFREE), ["cut above layer 2", "--bottom 0"]),
    "epsilon with split": ((*NO_SIGMA, *CLAIM), ["cannot be promised", "'split'", "guarded-gradfree"]),
    "epsilon with guarded-online": ((*NO_SIGMA, *CLAIM, *ONLINE), ["cannot be promised", "guarded-gradfree"]),
    "epsilon with gradients": ((*NO_SIGMA, *CLAIM, "--freeze-bottom"), ["lets gradients cross", "guarded-gradfree"]),
    "dchi as DP": (("--noise", "dchi", "--eta", "9", "--epsilon", "8"), ["no differential privacy", "--eta alone"]),
    "gradient noise without gradients": (
        ("--gradient-clip", "1", "--gradient-sigma", "1", *GRADFREE),
        ["--gradient-clip", "sends no gradient", "leave --gradient-clip out"],
    ),
    "half a gradient mechanism": (("--gradient-clip", "1"), ["Of --gradient-clip and --gradient-sigma, only one"]),
    "label noise without gradients": (("--label-noise", "max-norm", *GRADFREE), ["sends no gradient"]),
    "label epsilon without gradients": (("--label-epsilon", "1", *GRADFREE), ["--label-epsilon", "nothing of a label"]),
    "decorrelate, frozen": (("--decorrelate", "1", "--freeze-bottom"), ["trains the bottom", "one of them"]),
    "decorrelate, gradfree": (("--decorrelate", "1", *GRADFREE), ["trains the bottom", "guarded-online"]),
    "quantise with noise": ((*GAUSS, "--quantise", "int8"), ["integer grid", "leave --quantise out"]),
    "largest with noise": ((*GAUSS, "--keep-largest", "4"), ["leave one of the two out"]),
    "two codings": (("--quantise", "int4", "--keep-largest", "4"), ["one of them"]),
    "hidden lengths without noise": (
        ("--hide-lengths", "--max-length", "64", *GRADFREE), ["told from text by its activations", "--noise gauss"],
    ),
    "hidden lengths, left": (
        ("--hide-lengths", "--max-length", "64", "--padding-side", "left", *GAUSS, *GRADFREE), ["--padding-side right"],
    ),
    "hidden lengths of no length": (("--hide-lengths", *GAUSS, *GRADFREE), ["a --max-length"]),
    "hidden lengths, plain gradients": (
        ("--hide-lengths", "--max-length", "64", *GAUSS), ["noise on gradients", "--gradient-sigma"],
    ),
    "label noise on text": (("--label-noise", "marvell"), ["the labels are the text", "guarded-gradfree"]),
    "label epsilon on text": (("--label-epsilon", "1"), ["the labels are the text"]),
    "snap at a deep cut": (("--noise", "dchi", "--eta", "9", "--snap"), ["cut above the embeddings", "--bottom 0"]),
    "snap alone": (("--snap",), ["--noise dchi"]),
    "sigma too small": (
        ("--noise", "gauss", "--clip", "1000", "--sigma", "0.001", *GRADFREE),
        ["too small beside clip", "nearest sigma"],
    ),
    "a protocol that is none": (("--protocol", "guarded-gradfre"), ["'guarded-gradfree'"]),
}  # fmt: skip


def refused(words, out, capsys, *, code=2):
    """What `splitfl tune` says; nothing was sent, and nothing is left."""
    with recorded_commands() as recording:
        splitfl_here("tune", *words, "--out", out, code=code)
    assert recording.messages == []
    assert not out.exists()
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("case", REFUSED)
def test_settings_without_sense_are_refused(owner, tune_config, tmp_path, capsys, case):
    more, found = REFUSED[case]
    ledger = tmp_path / "ledger.sqlite"
    told = refused([*owner.link(), "--config", tune_config, "--ledger", ledger, *more], tmp_path / "run", capsys)
    assert [words for words in found if words not in told] == [], told
    assert not ledger.exists()


def test_the_same_settings_without_the_mistake_are_planned(owner, tune_config, tmp_path):
    """The table above refuses no setting for a reason that all settings have."""
    splitfl_here("tune", *owner.link(), "--config", tune_config, "--out", tmp_path / "run", "--max-steps", "1",
                 "--ledger", tmp_path / "ledger.sqlite", *GRADFREE, *NO_SIGMA, *CLAIM)  # fmt: skip
    plan = prepare(RunDirectory(tmp_path / "run").settings(), open_kit(owner.kit_dir), 32)
    assert plan.claim.formal
    assert plan.claim.epsilon_all == pytest.approx(8, rel=1e-3)


def test_hidden_lengths_with_an_encoder(owner, tune_config, tmp_path, capsys):
    kit = make_kit(save_tiny("bert", tmp_path / "model"), tmp_path / "kit", task="sequence-classification")
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\nfine,praise\nbad,complaint\n", encoding="utf-8")
    hidden = ("--max-length", "64", "--hide-lengths", *GAUSS, *GRADFREE)
    words = [*owner.link()[2:], "--kit", kit, "--train", rows, *hidden]
    assert "blind to what comes after a row" in refused(words, tmp_path / "run", capsys)


def test_a_kit_without_a_top_has_nothing_to_train(owner, tune_config, tmp_path, capsys):
    kit = tmp_path / "kit"
    splitfl_here("kit", kit, "--model", owner.model_dir, "--bottom", "2", "--top", "0", "--no-verify")
    capsys.readouterr()
    words = [*owner.link()[2:], "--kit", kit, "--config", tune_config, *GRADFREE]
    assert "--top 1 or more" in refused(words, tmp_path / "run", capsys)


def test_an_owner_that_is_not_there_leaves_no_run(owner, tune_config, tmp_path, capsys):
    link = ["--owner", "tcp://127.0.0.1:1", *owner.link()[:2], *owner.link()[4:]]
    words = [*link, "--config", tune_config, *GRADFREE, "--timeout", "1"]
    assert "127.0.0.1:1" in refused(words, tmp_path / "run", capsys, code=7)


def test_a_module_that_is_not_there_is_found_before_the_pass(owner, tune_config, tmp_path, capsys):
    words = [*owner.link(), "--config", tune_config, *GRADFREE, "--target-modules", "q_prj"]
    assert "'q_proj'" in refused(words, tmp_path / "run", capsys)


# ---- the ledger


@pytest.mark.parametrize("protocol", ["split", "guarded-gradfree"])
def test_a_damaged_ledger(owner, tune_config, tmp_path, capsys, protocol):
    ledger = tmp_path / "ledger.sqlite"
    with Ledger(ledger):
        pass
    ledger.write_bytes(b"not a ledger, and longer than a header of one hundred bytes would be" * 40)
    words = [*owner.link(), "--config", tune_config, "--ledger", ledger, "--protocol", protocol]
    assert str(ledger) in refused(words, tmp_path / "run", capsys, code=3)


def test_a_locked_ledger(owner, tune_config, tmp_path, capsys, monkeypatch):
    ledger = tmp_path / "ledger.sqlite"
    with Ledger(ledger):
        pass
    monkeypatch.setattr(party.opening, "Ledger", functools.partial(Ledger, timeout_s=0.3))
    other = sqlite3.connect(ledger, isolation_level=None)
    try:
        other.execute("BEGIN EXCLUSIVE")
        words = [*owner.link(), "--config", tune_config, "--ledger", ledger]
        assert str(ledger) in refused(words, tmp_path / "run", capsys, code=6)
    finally:
        other.close()


def test_the_ledger_of_other_rows(owner, tune_config, rows, tmp_path, capsys):
    ledger, run = tmp_path / "ledger.sqlite", tmp_path / "run"
    words = [*owner.link(), "--config", tune_config, "--ledger", ledger, "--out", run, "--max-steps", "1"]
    splitfl_here("tune", *words)
    with recorded_commands() as recording:
        splitfl_here("tune", *words, "--resume", "--max-steps", "2", "--train", rows.held_out, code=2)
    told = " ".join(capsys.readouterr().err.split())
    assert "train.jsonl (" in told
    assert "held.jsonl (" in told
    assert not recording.of("forward")
