"""The nearest token: whole without noise, and with noise as the formula says where its premises hold."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from splitfl.audit.attacks import attacks
from splitfl.audit.attacks.nearest import against_formula, expected_recovery, nearest_tokens, run
from splitfl.audit.view import Knowledge
from splitfl.privacy.calibration import recovery
from splitfl.privacy.mechanisms import DChi, Gauss
from tests.audit.made import EMBEDDED, make

RATIOS = (2, 3, 4, 5, 6)


@pytest.fixture(scope="module")
def table():
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    return model.get_input_embeddings().weight.detach()


def test_the_attack_is_listed():
    assert attacks()["nearest"].run is run


# ---- without noise


def test_embeddings_without_noise_are_read_whole(tmp_path):
    made = make(tmp_path, bottom=0, rows=6)
    guesses = run(made.view(Knowledge.BASE))
    assert made.share(guesses) == 1
    assert made.shuffled(guesses) < 0.2


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma2", "bloom"])
def test_places_and_scales_in_the_embeddings_do_not_matter(family, tmp_path):
    made = make(tmp_path, model=family, bottom=0)
    assert made.share(run(made.view(Knowledge.BASE))) == 1


def test_an_encoder_s_embeddings_are_read_whole(tmp_path):
    made = make(tmp_path, model="bert", bottom=0)
    assert made.share(run(made.view(Knowledge.BASE))) == 1


@pytest.mark.slow
def test_two_layers_are_no_defence_against_a_discriminant(tmp_path):
    made = make(tmp_path, bottom=2, rows=4)
    assert made.share(run(made.view(Knowledge.BASE))) >= 0.95


def test_close_tokens_are_told_apart():
    """A published attack rounded its scores to whole numbers before it took the largest, and ties decided."""
    table = torch.tensor([[0.10, 0.0], [0.11, 0.0], [0.12, 0.0], [0.5, 0.5]])
    assert nearest_tokens(table, table).tolist() == [0, 1, 2, 3]
    long = torch.tensor([[1.0, 0.0], [100.0, 0.0]])  # by inner product alone the second would always win
    assert nearest_tokens(torch.tensor([[1.2, 0.0]]), long).tolist() == [0]


# ---- the formula


@pytest.mark.parametrize("releases", [1, 3])
def test_an_ideal_table_is_read_as_often_as_the_formula_says(releases):
    ratios = [ratio / releases**0.5 for ratio in RATIOS]
    levels = against_formula(0.7 * torch.eye(1500), ratios, draws=2000, releases=releases)
    assert [level.ratio for level in levels] == ratios
    assert sum(level.agrees for level in levels) >= 4  # five intervals of 95 %: one may miss
    assert all(level.found == pytest.approx(level.formula, abs=0.03) for level in levels)
    assert levels[0].found < 0.2 < 0.9 < levels[-1].found


def test_the_real_table_is_read_less_often_than_the_formula_says(table):
    """Its rows are neither of one norm nor at right angles: close ones are mistaken for each other."""
    for level in against_formula(table, RATIOS[1:], draws=1500):
        assert level.high < level.formula
        assert level.found > 0.5 * level.formula


def test_tokens_drawn_by_frequency_are_another_question(table):
    weights = 1 / torch.arange(1, len(table) + 1)
    sigma = float(table.norm(dim=1).mean()) / 4
    share, low, high = expected_recovery(table, sigma, draws=1500, frequencies=weights)
    assert 0 <= low < share < high <= 1
    assert share != expected_recovery(table, sigma, draws=1500)[0]


def test_averaging_is_worth_the_root_of_the_releases(table):
    once, thrice = (expected_recovery(table, 0.2, draws=1500, releases=n)[0] for n in (1, 3))
    less_noise = expected_recovery(table, 0.2 / 3**0.5, draws=1500)[0]
    assert thrice == less_noise > once + 0.2


# ---- traffic with noise


@pytest.mark.slow
def test_the_attack_on_traffic_finds_what_was_expected_of_the_table(tmp_path, table):
    """Noise of the real mechanism, on real rows; and three epochs are read far better than one."""
    noise = Gauss(clip=2.0, sigma=0.15, unit="token")  # nothing is that long: no clipping
    made = make(tmp_path / "once", bottom=0, rows=12, hidden=noise)
    found = made.share(run(made.view(Knowledge.BASE)))
    ids = torch.cat([row.ids[~row.special] for row in made.truth])
    share, _, _ = expected_recovery(table, 0.15, draws=4000, frequencies=torch.bincount(ids, minlength=len(table)))
    assert found == pytest.approx(share, abs=0.05)
    thrice = make(tmp_path / "thrice", bottom=0, rows=12, hidden=noise, epochs=3)
    assert thrice.share(run(thrice.view(Knowledge.BASE))) > found + 0.2


@pytest.mark.parametrize("unit", ["record", "token"])
def test_clipping_by_itself_hides_nothing(unit, tmp_path):
    clip = 2.0 if unit == "record" else 0.2
    made = make(tmp_path, bottom=0, rows=6, hidden=Gauss(clip=clip, sigma=clip / 1000, unit=unit))
    assert made.share(run(made.view(Knowledge.BASE))) >= 0.98


@pytest.mark.slow
def test_metric_noise_is_read_until_it_is_large(tmp_path):
    shares = []
    for eta in (400.0, 100.0):
        made = make(tmp_path / str(eta), bottom=0, rows=6, hidden=DChi(eta=eta))
        shares.append(made.share(run(made.view(Knowledge.BASE))))
    assert shares[0] > 0.8 > shares[1]


def test_the_formula_is_the_one_that_is_printed():
    (level,) = against_formula(torch.eye(64), [3], draws=100)
    assert level.formula == recovery(3, 64)
