"""Reading from left to right: what was sent in the clear is read whole, with noise less; noise is weighed rightly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from splitfl.audit.attacks import attacks
from splitfl.audit.attacks.map_decode import run
from splitfl.audit.bottom import open_bottom
from splitfl.audit.stepping import Stepper, cached_steps_hold
from splitfl.audit.view import Knowledge
from splitfl.privacy.mechanisms import Chain, DChi, Gauss, Mechanism, Quantise, TopK
from tests.audit.made import EMBEDDED, Made, make

NOISE = Gauss(clip=0.7, sigma=0.16, unit="token")  # at the embedding cut; r / sigma is about 4


def test_the_attack_is_listed():
    assert attacks()["map_decode"].run is run


# ---- undefended


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    return make(tmp_path_factory.mktemp("tuned"), rows=4, steps=20, training=False)


@pytest.mark.slow
def test_an_undefended_cut_is_read_whole_by_whoever_knows_the_bottom(tuned):
    guesses = run(tuned.view(Knowledge.EXACT))
    assert tuned.share(guesses) >= 0.99
    assert tuned.shuffled(guesses) < 0.2  # rows of one form share words like "Question"


@pytest.mark.slow
def test_base_weights_are_enough_after_tuning(tuned):
    clean = open_bottom(tuned.view(Knowledge.BASE))(tuned.truth[0].ids[None])[0]
    assert (clean - tuned.sent[0].hidden).norm() > 0.02 * clean.norm()  # tuning did move what crosses
    assert tuned.share(run(tuned.view(Knowledge.BASE))) >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["gpt2", "opt", "bloom", "mistral, sliding window", "gemma3", "qwen2, mixed attention", "falcon, alibi"]
)
def test_random_models_of_every_kind_are_read_whole(family, tmp_path):
    """Random ids, so that nothing but the states can tell them; sliding windows and ALiBi take the plain way."""
    made = make(tmp_path, model=family, bottom=3)
    guesses = run(made.view())
    assert made.share(guesses) >= 0.99
    assert made.shuffled(guesses) < 0.1


def test_a_bottom_with_other_weights_reads_nothing(tmp_path):
    """The instrument's zero: what is found comes from the bottom that was used, not from elsewhere."""
    made = make(tmp_path / "a", model="gpt2", bottom=3)
    other = make(tmp_path / "b", model="llama", bottom=3)
    view = other.view(Knowledge.EXACT, sent=made.sent)
    assert made.share(run(view)) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", [Quantise(bits=8), Quantise(bits=4), TopK(kept=16)])
def test_fewer_bits_hide_nothing(mechanism: Mechanism, tmp_path):
    made = make(tmp_path, model="llama", hidden=mechanism)
    assert made.share(run(made.view())) >= 0.95


# ---- what the candidates are compared with


@pytest.mark.parametrize(("family", "cached"), [("llama", True), ("gpt2", True), ("gemma3", False), ("bloom", False)])
def test_steps_with_a_cache_are_used_where_they_are_right(family, cached, tmp_path):
    bottom = open_bottom(make(tmp_path, model=family, rows=1, bottom=3).view())
    assert cached_steps_hold(bottom, 12) is cached


def test_candidates_behind_several_prefixes_equal_plain_rows(tmp_path):
    bottom = open_bottom(make(tmp_path, model="llama", rows=1, bottom=3).view())
    quick, plain = (Stepper(bottom, 2, cached=cached) for cached in (True, False))
    with torch.no_grad():
        for parents, tokens in (([0, 1], [5, 9]), ([1, 0, 1], [7, 8, 6]), ([2, 0], [11, 12])):
            for stepper in (quick, plain):
                stepper.grow(torch.tensor(parents), torch.tensor(tokens))
            assert torch.equal(quick.ids, plain.ids)
            tokens = torch.arange(10).view(1, 10).repeat(len(parents), 1)
            torch.testing.assert_close(quick.states(tokens), plain.states(tokens), rtol=1e-4, atol=1e-4)
        one = quick.only(torch.tensor([1]))
        torch.testing.assert_close(one.states(tokens[:1]), plain.states(tokens)[1:], rtol=1e-4, atol=1e-4)


# ---- with noise


def read(made: Made, **more) -> float:
    return made.share(run(made.view(**more)))


def test_noise_is_in_what_is_attacked(tmp_path):
    """Published attack scripts overwrote the noise before they measured: here it is in what is handed over."""
    clean = make(tmp_path / "clean", bottom=0, rows=2)
    noisy = make(tmp_path / "noisy", bottom=0, rows=2, hidden=NOISE)
    for one, other in zip(clean.sent, noisy.sent, strict=True):
        assert float((one.hidden - other.hidden).std()) == pytest.approx(NOISE.sigma, rel=0.1)
    assert noisy.noise.sigma == NOISE.sigma


@pytest.mark.slow
def test_noise_costs_and_a_language_model_or_another_epoch_gives_back(tmp_path):
    once = make(tmp_path / "once", bottom=0, rows=3, hidden=NOISE)
    alone = read(once, effort="quick")
    assert 0.2 < alone < 0.9
    assert read(once, effort="quick", model=EMBEDDED) > alone + 0.03
    thrice = make(tmp_path / "thrice", bottom=0, rows=3, hidden=NOISE, epochs=3)
    assert read(thrice, effort="quick") > alone + 0.2


@pytest.mark.slow
def test_a_beam_reads_at_least_as_well_behind_layers(tmp_path):
    made = make(tmp_path, model="llama", rows=12, hidden=Gauss(clip=500.0, sigma=6.0))
    clean = make(tmp_path / "clean", model="llama", rows=12)
    found = read(made)
    assert found < read(clean)
    assert found > read(made, noise=type(made.noise)(name="none"))  # taken for clean: no beam, no weighing


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["record", "token"])
def test_clipping_by_itself_hides_nothing(unit, tmp_path):
    """Rows scaled to a third of their norm and hardly any noise: the factor is found, or applied to candidates too."""
    plain = make(tmp_path / "plain", model="llama", rows=8)
    norms = [each.hidden.norm() if unit == "record" else each.hidden.norm(dim=1).mean() for each in plain.sent]
    clip = float(torch.stack(norms).mean()) / 3
    made = make(tmp_path / "clipped", model="llama", rows=8, hidden=Gauss(clip=clip, sigma=clip / 1000, unit=unit))
    assert made.sent[0].hidden.norm() < 0.6 * plain.sent[0].hidden.norm()
    assert read(made) >= 0.95


@pytest.mark.slow
def test_metric_noise_is_weighed_by_what_is_seen(tmp_path):
    """Its size is no part of the view: the distances show it."""
    shares = []
    for eta in (20.0, 1.0):
        made = make(tmp_path / str(eta), model="llama", rows=6, hidden=Chain((DChi(eta=eta),)))
        shares.append(read(made))
    assert shares[0] > shares[1] + 0.2


def test_the_same_view_gives_the_same_guesses(tmp_path: Path):
    made = make(tmp_path, model="llama", rows=3, hidden=Gauss(clip=100.0, sigma=0.5))
    one, other = run(made.view()).tokens, run(made.view()).tokens
    assert one.keys() == other.keys()
    assert all(torch.equal(one[number], other[number]) for number in one)
