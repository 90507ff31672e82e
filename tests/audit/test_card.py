"""The report card: what it has to say, what it must not say, and that it holds rows only where it may."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import splitfl
from splitfl.audit.card import PAGE, Card, write_card
from splitfl.audit.controls import Control
from splitfl.audit.intervals import Estimate
from splitfl.audit.results import Cost, Outcome, Shown, Skipped
from splitfl.demo import assets
from splitfl.kit import Kit, load_tokenizer
from splitfl.metrics import RunLog

BANNED = re.compile(r"\b(?:private|privately|anonymi[sz]ed|anonymous|irreversible|GDPR)\b", re.IGNORECASE)
SECRET = "The patient Wilhelmina paid 120 in Leipzig."


def estimate(value):
    return Estimate(value=value, low=max(0.0, value - 0.05), high=min(1.0, value + 0.05), records=20)


def shown(tokenizer):
    ids = tokenizer(SECRET)["input_ids"]
    return Shown(
        dataset="train", row=3, share=0.75, original=tuple(ids), guess=(*ids[:-2], -1, 17),
        special=tuple(each in tokenizer.all_special_ids for each in ids),
    )  # fmt: skip


def outcome(value, *, attack="map_decode", knowledge="K1", traffic="as it crossed", finds="tokens", **more):
    metric = {"tokens": "token recovery", "scores": "AUC", "answers": "answer recovery"}[finds]
    return Outcome(
        attack=attack, title="left to right", source="a paper, section 3", finds=finds, weak_point="it has no text",
        knowledge=knowledge, traffic=traffic, domain="none", records=20, sends=40,
        figures={metric: estimate(value), "exact sequences": estimate(value / 2), "beyond frequency": estimate(value)},
        cost=Cost(seconds=12.0, peak_rss_bytes=10**9, queries=500.0), **more,
    )  # fmt: skip


def card(run, *outcomes, **more):
    tokenizer = load_tokenizer(assets() / "model")
    given = {
        "outcomes": outcomes or (outcome(0.8, shown=(shown(tokenizer),)), outcome(0.9, knowledge="K3")),
        "skipped": (Skipped(attack="sip", knowledge="K1", why="the attacker has no text of its own"),),
        "controls": (), "distance": 0.0001, "asked": 200, "quick": False, "texts": True,
        "counts": {"rows": 40, "messages_sent": 9, "bytes_sent": 4000, "changed_retries": 0, "full": False,
                   "broken_off": 0},
        "ruled": True, "with_model": False, "finished": True,
    }  # fmt: skip
    return Card(run=run, kit=Kit(path=assets() / "model", plan=None), **{**given, **more})


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("SPLITFL_LEDGER", str(tmp_path / "none.sqlite"))
    folder = tmp_path / "a run"
    with RunLog(folder / "run.jsonl") as log:
        log.write("start", protocol="split")
        log.write("eval", step=0, when="before", loss=4.0)
        log.write("eval", step=5, when="after", loss=3.5)
        log.write("end", seconds=1.0, bytes_sent=1, bytes_received=1)
    crossing = {"message": "forward", "tensor": "hidden", "direction": "party to owner", "content": "activations",
                "how_often": "every batch", "bound": "none"}  # fmt: skip
    told = {"protocol": "split", "crossings": [crossing], "never": [], "in_plain_words": "."}
    (folder / "disclosure.json").write_text(json.dumps(told))
    (folder / "config.toml").write_text('protocol = "split"\nlora_alpha = 64\nmax_steps = -1\nout = "x"\n')
    return folder


def page_of(tmp_path, made):
    return write_card(tmp_path / "audit", made).read_text(encoding="utf-8")


def words_of(page):
    return re.sub(r"\s+", " ", re.sub(r"<style.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL))


def test_our_own_sentences_promise_nothing(tmp_path, run):
    template = Path(splitfl.__file__).parent / "templates" / "audit.html.j2"
    assert BANNED.findall(template.read_text(encoding="utf-8")) == []
    words = words_of(page_of(tmp_path, card(run, texts=False)))
    assert BANNED.findall(words) == []
    assert "Empirical: only against the attacks we ran" in words


def test_the_worst_attack_of_each_knowledge_comes_with_its_interval(tmp_path, run):
    words = words_of(page_of(tmp_path, card(run)))
    assert "Best attacker K1: map_decode 80.0 %" in words
    assert "Best attacker K3: map_decode 90.0 %" in words
    assert "95 % interval 75.0 to 85.0" in words
    assert "few rows: 20" in words
    assert "Fewer than 200 rows were attacked (20)" in words


def test_it_says_who_saw_what_and_what_was_not_tested(tmp_path, run):
    words = words_of(page_of(tmp_path, card(run)))
    assert "Activations at the lower cut the owner every batch" in words
    assert "sip K1: the attacker has no text of its own" in words
    assert "the whole model was not given" in words
    assert "lora alpha 64" in words.replace("_", " ")
    assert "max steps" not in words.replace("_", " ")
    assert "Two ledgers, which are never added" in words


def test_rows_stand_in_it_only_where_texts_are_on(tmp_path, run):
    on = page_of(tmp_path, card(run))
    assert "Wilhelmina" in on
    assert 'class="wrong"' in on
    assert "train row 4" in on
    off = page_of(tmp_path, card(run, texts=False))
    assert "Wilhelmina" not in off
    assert (tmp_path / "audit" / PAGE).stat().st_mode & 0o077 == 0


def test_what_a_row_says_is_text_and_not_markup(tmp_path, run):
    tokenizer = load_tokenizer(assets() / "model")
    ids = tokenizer("<script>alert(1)</script>")["input_ids"]
    bad = Shown(dataset="train", row=0, share=1.0, original=tuple(ids), guess=tuple(ids), special=(False,) * len(ids))
    assert "<script>" not in page_of(tmp_path, card(run, outcome(1.0, shown=(bad,))))


def test_a_defended_score_stands_beside_its_undefended_twin(tmp_path, run):
    made = card(run, outcome(0.1), outcome(0.97, traffic="undefended"), distance=0.4)
    page = page_of(tmp_path, made)
    assert re.search(r'class="twin" style="left: 97\.00%"', page)
    words = words_of(page)
    assert "What crossed is 40.00 % away from its undefended twin" in words.replace("\N{NO-BREAK SPACE}", " ").replace(
        "&nbsp;", " "
    )
    assert "it has no text" in words, "a low score says why it may mislead"


def test_a_control_that_failed_is_not_hidden_by_one_that_works(tmp_path, run):
    controls = tuple(
        Control(name="negative", attack=name, knowledge="K1", expected="nothing", found=estimate(value), works=works)
        for name, value, works in (("good", 0.6, True), ("bad", 0.3, False))
    )
    words = words_of(page_of(tmp_path, card(run, controls=controls)))
    assert "bad K1, the worst of 2" in words
    assert "instrument does not work" in words
    assert words.count("not known") == 2, "controls that were not run are no pass"


def test_an_audit_that_was_broken_off_says_so(tmp_path, run):
    assert "audit not finished" in words_of(page_of(tmp_path, card(run, finished=False)))
