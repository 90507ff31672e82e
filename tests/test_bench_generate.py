"""`splitfl bench generate`: what is measured is what it says, and a way that writes another text has no speed."""

from __future__ import annotations

import json

import pytest

from splitfl.bench.cases import DRAFTED
from splitfl.bench.generate import Way, _figures, bench_generate
from splitfl.bench.generate_orders import TextWritten
from splitfl.bench.link import Setting
from splitfl.config import BenchSettings
from splitfl.errors import InternalError

GUESSING = Way(draft="emulator", guesses=4)
SLOW = Setting(rtt_ms=80.0, mbit=1000.0)


def written(seconds, passes, *, tokens=((1, 2, 3, 4), (5, 6, 7, 8)), guessed=0, kept=0):
    return TextWritten(
        seconds=seconds, tokens=[list(text) for text in tokens], passes=passes, guessed=guessed, kept=kept, sent=600,
        received=200,
    )  # fmt: skip


def figures_of(way, pairs, link):
    return {result.metric: result for result in _figures("generate", way, pairs, link)}


def test_gain_and_share_are_worked_out_from_both_ways():
    plain, other = written(8.0, 8), written(2.0, 3, guessed=10, kept=5)
    found = figures_of(GUESSING, [(plain, other), (plain, written(4.0, 3, guessed=10, kept=5)), (plain, other)], SLOW)
    assert (found[DRAFTED].value, found[DRAFTED].reference, found[DRAFTED].ratio) == (4.0, 1.0, 4.0)
    assert found[DRAFTED].reach == 2.5
    assert found["guesses kept"].value == 0.5
    assert found["round trips a token"].value == 3 / 8
    assert found["bytes a token"].value == 100


@pytest.mark.parametrize(("way", "link"), [(GUESSING, None), (Way(draft="ends", guesses=4), SLOW)])
def test_the_reach_is_that_of_an_emulator_over_a_slow_link(way, link):
    plain = written(8.0, 8)
    assert figures_of(way, [(plain, plain)], link)[DRAFTED].reach is None


def test_another_text_has_no_speed():
    with pytest.raises(InternalError, match="another text"):
        figures_of(GUESSING, [(written(8.0, 8), written(2.0, 3, tokens=((1, 2, 3, 9),)))], SLOW)


@pytest.mark.long
def test_a_quick_run_measures_both_ways(tmp_path, capsys):
    bench_generate(BenchSettings(name="generate", quick=True, json=tmp_path / "figures.json"))
    record = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    found = {(result["case"], result["metric"]): result for result in record["results"]}
    plain = found["generate, loopback, one token a pass", "round trips a token"]["value"]
    guessing = found["generate, loopback, emulator, 4 guesses", "round trips a token"]["value"]
    assert plain == 1.0 > guessing >= 1 / 5
    assert found["generate, loopback, emulator, 4 guesses", DRAFTED]["ratio"] > 0
    assert "one token a pass" in capsys.readouterr().out
