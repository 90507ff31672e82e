"""Published mistakes, planted: the audit has to notice each of them.

`tests.privacy.test_published_mistakes` shows that our mechanisms do not make them. Missing there were those about
attacks and audits: 12, 15, and the attack's half of 10 and 13. They are here, and with them the mistakes in mechanisms
that an audit can see from outside: 1, 5, 7, 14, 16 and 18, each in a mechanism that claims to be ours. (8, 9 and the
rest of 14 are in `tests.audit.test_dp_audit`.)
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from splitfl.audit.attacks import grad_decode, map_decode
from splitfl.audit.attacks.dp_audit import audit_gauss
from splitfl.audit.attacks.mia import Shadows, half_at_random, offline_lira
from splitfl.audit.controls import POSITIVE, SAME, distance, make_twins
from splitfl.audit.view import Knowledge
from splitfl.privacy.mechanisms import Gauss
from tests.audit.made import make

CLIP, SIGMA = 2.0, 4.0
RELEASES = 100_000


# ---- attacks


@pytest.fixture(scope="module")
def defended(tmp_path_factory):
    """Traffic whose activations carry much noise, and whose gradients carry none."""
    gauss = Gauss(clip=20.0, sigma=20.0)
    return make(tmp_path_factory.mktemp("defended"), rows=4, hidden=gauss, max_length=24), gauss


@pytest.fixture(scope="module")
def open_traffic(tmp_path_factory):
    return make(tmp_path_factory.mktemp("open"), rows=4, max_length=24)


def test_mistake_10_an_attack_that_is_handed_what_was_sent_without_its_noise(defended):
    """The distance from the undefended twin says which of both an attack was given."""
    made, _ = defended
    twins = make_twins(made.kit, made.sent, {row.number: row for row in made.truth}, made.adapter)
    assert distance(made.sent, twins) > 0.5, "what the attacks read is what crossed"
    assert distance(twins, twins) <= SAME, "planted: noise set to zero before the attack"
    seen = made.view().sent
    assert all(one.hidden is other.hidden for one, other in zip(seen, made.sent, strict=True))


@pytest.mark.slow
def test_mistake_12_an_attack_whose_numbers_became_integers(open_traffic):
    """The positive control fails for it: exhaustive decoding of undefended traffic must find nearly everything."""
    view = open_traffic.view(Knowledge.EXACT, effort="quick")
    assert open_traffic.share(map_decode.run(view)) >= POSITIVE
    cut = [dataclasses.replace(each, hidden=each.hidden.to(torch.int64).float()) for each in view.sent]
    assert open_traffic.share(map_decode.run(dataclasses.replace(view, sent=tuple(cut)))) < POSITIVE


def test_mistake_12_attackers_know_the_noise_that_there_is(defended):
    """Noise experts of scales that have nothing to do with the defence: ours are told the mechanism's own."""
    made, gauss = defended
    noise = made.view().noise
    assert (noise.name, noise.sigma, noise.clip) == ("gauss", gauss.sigma, gauss.clip)


@pytest.mark.slow
def test_mistake_13_a_defence_of_the_activations_alone(tmp_path):
    """The channel that was left out gives the answers away, whatever noise the other one has."""
    made = make(tmp_path, rows=2, top=0, hidden=Gauss(clip=20.0, sigma=20.0), max_length=40)
    (attack,) = (each for each in grad_decode.ATTACKS if each.name == "grad-decode")
    found = attack.run(made.view(Knowledge.EXACT)).answers
    right = counted = 0
    for row in made.truth:
        counts = row.labels != -100
        counts[0] = False  # no position predicts the first
        said = found.get(row.number, torch.full_like(row.ids, -100))
        right += int((said == row.labels)[counts].sum())
        counted += int(counts.sum())
    assert counted > 10
    assert right / counted > 0.9


def test_mistake_15_a_deviation_from_the_models_that_have_the_row():
    """Memorised rows are all alike to models that have them: that deviation is tiny, and every stranger stands out."""
    generator = np.random.default_rng(1)
    inside = np.stack([half_at_random(500, seed=number) for number in range(8)])
    inside = np.concatenate([inside, ~inside])
    said = np.where(inside, 6 + 0.05 * generator.normal(size=inside.shape), generator.normal(size=inside.shape))
    strangers = generator.normal(size=500)  # of a target that has none of the rows
    ours = offline_lira(strangers, Shadows(confidences=said, inside=inside))
    outside = np.where(inside, np.nan, said)
    planted = (strangers - np.nanmean(outside, axis=0)) / np.nanstd(np.where(inside, said, np.nan))
    above = 2.33  # one in a hundred of a normal law
    assert float((ours > above).mean()) < 0.03
    assert float((planted > above).mean()) > 0.3


# ---- mechanisms that claim to be ours


class _Claims:
    """Says that it clips to `CLIP` and adds discrete Gaussian noise of `SIGMA`."""

    clip, sigma = CLIP, SIGMA
    real = Gauss(clip=CLIP, sigma=SIGMA)

    def clipped(self, x):
        return self.real.on_grid(x, None).float() * self.real.step

    def noise(self, x):
        return self.real.protect(torch.zeros_like(x), None).decode()

    def protect(self, x, mask):
        return self.clipped(x) + self.noise(x)


class _Laplace(_Claims):
    """1: Laplace noise with a scale that no clip norm enters."""

    def protect(self, x, mask):
        return self.clipped(x) + torch.distributions.Laplace(0.0, 2 / 5.0).sample(x.shape)


class _NoClip(_Claims):
    """5: no clipping."""

    def clipped(self, x):
        return x


class _MultipliedBack(_Claims):
    """7: what was clipped and noised is multiplied by the norm that it had."""

    def protect(self, x, mask):
        norms = x.flatten(1).norm(dim=1)[:, None, None] / self.clip
        return super().protect(x, mask) * norms


class _ThreeEpochs(_Claims):
    """14: every epoch's release, accounted for as one."""

    def protect(self, x, mask):
        return torch.stack([super(_ThreeEpochs, self).protect(x, mask) for _ in range(3)]).mean(0)


class _Seeded(_Claims):
    """16: noise from the experiment's seed, which the attacker draws again and takes away."""

    def noise(self, x):
        return self.sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(42))

    def protect(self, x, mask):
        return super().protect(x, mask) - self.noise(x)


class _OffInEvaluation(_Claims):
    """18, and 10: no noise where no gradient is asked for."""

    def noise(self, x):
        return super().noise(x) if torch.is_grad_enabled() else torch.zeros_like(x)


def test_the_honest_twin_of_the_planted_ones_passes():
    assert not audit_gauss(_Claims(), releases=RELEASES, significance=1e-6).violated


@pytest.mark.parametrize(
    "planted", [_Laplace, _NoClip, _MultipliedBack, _ThreeEpochs, _Seeded, _OffInEvaluation],
    ids=["01-laplace", "05-no-clip", "07-multiplied-back", "14-three-epochs", "16-seeded", "18-off-in-evaluation"],
)  # fmt: skip
def test_the_audit_of_the_mechanism_notices(planted):
    with torch.no_grad():
        found = audit_gauss(planted(), releases=RELEASES, significance=1e-6)
    assert found.violated, found
