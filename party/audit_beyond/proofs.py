"""Whether what is claimed can be contradicted: the epsilon of DP-SGD, and that of the noise on activations.

Of a run with DP-SGD the same loop is run once more with planted gradients among its rows (`party.dp_audit`): as many
steps, the same noise, clip and sampling rate. Of a run with Gaussian noise two records are told apart from many
releases of its own mechanism. A lower bound above the claim proves a mistake; one below it proves nothing.
"""

from __future__ import annotations

import time

import torch

from party.audit_beyond import Examination, Progress, Site
from party.tune import read_data
from splitfl.adapters import add_lora, lora_config
from splitfl.audit.examined import Examined, Fact
from splitfl.audit.results import Cost
from splitfl.config import TuneSettings
from splitfl.errors import UsageError
from splitfl.metrics import peak_rss_bytes

NAME = "dp-audit"
_CANARIES = {"quick": 1000, "default": 4000}
_RELEASES = {"quick": 40_000, "default": 400_000}
_ROWS = 16
_DELTA = 1e-5


def _why_not(site: Site) -> str | None:
    if site.run.settings().dp_sgd or _has_gauss(site):
        return None
    return "nothing is claimed: neither DP-SGD nor Gaussian noise on activations"


def _has_gauss(site: Site) -> bool:
    noise = site.ground.recorded.noise
    return "gauss" in noise.name and noise.sigma > 0


def _examine(site: Site, progress: Progress) -> Examined | str:
    started = time.monotonic()
    facts: list[Fact] = []
    said: list[str] = []
    alarming, records = False, 0
    if _has_gauss(site):
        found, sentence, violated, count = _activations(site)
        facts, said, alarming, records = [*facts, *found], [*said, sentence], alarming or violated, records + count
        progress(0.3)
    settings = site.run.settings()
    if settings.dp_sgd:
        try:
            found, sentence, violated, count = _training(site, settings)
        except (ImportError, UsageError) as error:
            if not facts:
                return getattr(error, "problem", "") or "the extra dp is not installed: pip install 'splitfl[dp]'"
        else:
            facts, said, alarming, records = [*facts, *found], [*said, sentence], alarming or violated, records + count
    return Examined(
        name=NAME,
        title="whether what is proven on paper can be contradicted by an experiment",
        source="Steinke, Nasr and Jagielski 2023; Mahloujifar, Melis and Chaudhuri 2024",
        adversary="as strong as the claim allows: it chooses the records and sees every release",
        found=" ".join(said),
        alarming=alarming,
        weak_point="a bound of 0 proves nothing; more canaries and releases come closer to the claim",
        facts=tuple(facts),
        records=records,
        cost=Cost(seconds=time.monotonic() - started, peak_rss_bytes=peak_rss_bytes()),
    )


Found = tuple[list[Fact], str, bool, int]


def _activations(site: Site) -> Found:
    from splitfl.audit.attacks.dp_audit import audit_gauss
    from splitfl.privacy.mechanisms import Gauss

    noise = site.ground.recorded.noise
    audited = audit_gauss(
        Gauss(clip=noise.clip, sigma=noise.sigma, unit=noise.unit), releases=_RELEASES[site.ground.effort], delta=_DELTA
    )
    facts = [
        Fact(name=f"epsilon of one release contradicted below (delta {_DELTA:g}, one {noise.unit} replaced)",
             value=audited.epsilon, unit="epsilon", reference=audited.epsilon_claimed, beside="claimed at most"),
        Fact(name="mu of one release contradicted below", value=audited.mu, unit="mu", reference=audited.mu_claimed,
             beside="claimed at most"),
    ]  # fmt: skip
    verdict = "is contradicted: there is a mistake" if audited.violated else "is not contradicted"
    sentence = f"The claim on activations {verdict} by {audited.releases:,} releases."
    return facts, sentence, audited.violated, audited.releases


def _training(site: Site, settings: TuneSettings) -> Found:
    from party.dp_audit import audit_dp_sgd
    from party.offline import plan_bound
    from party.private_plan import plan_private

    kit = site.ground.kit
    data = read_data(settings, kit)
    claimed = plan_bound(settings, data.train_set)
    rows = list(data.train)[:_ROWS]
    model = kit.load(torch.float32).requires_grad_(False)
    asked = {**settings.lora_kwargs(), "target_modules": list(settings.target_modules) or None}
    adapted = add_lora(model, lora_config(model, kit.plan, **asked), seed=settings.seed)
    values = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    canaries = min(_CANARIES[site.ground.effort], values)
    count = len(rows) + canaries
    plan = plan_private(
        units=[str(number) for number in range(count)], unit="row", batch=max(1, round(claimed.sample_rate * count)),
        max_steps=claimed.steps, epochs=1.0, clip=claimed.clip, delta=min(claimed.delta, 0.1 / count),
        noise_multiplier=claimed.noise_multiplier, epsilon=None, freeze_a=claimed.freeze_a,
    )  # fmt: skip
    audited = audit_dp_sgd(adapted, kit.plan, rows, data.collator, plan, canaries=canaries, seed=site.ground.seed)
    facts = [
        Fact(name=f"epsilon of DP-SGD contradicted below, one run (delta {plan.delta:g}, one unit added or removed)",
             value=audited.epsilon, unit="epsilon", reference=audited.claimed.epsilon, beside="claimed at most"),
        Fact(name="the same from error rates, if canaries are independent", value=audited.epsilon_pair, unit="epsilon",
             reference=audited.claimed.epsilon, beside="claimed at most"),
        Fact(name="mu contradicted below", value=audited.mu, unit="mu"),
        Fact(name="guesses that were right", value=audited.right / max(audited.guesses, 1), unit="share",
             reference=0.5, beside="a coin"),
    ]  # fmt: skip
    verdict = "is contradicted: there is a mistake" if audited.violated else (
        "is in doubt: look closer, with more canaries" if audited.suspected else "is not contradicted"
    )  # fmt: skip
    sentence = (
        f"The claim on the adapter {verdict} by {audited.canaries:,} canaries in {plan.steps} steps of the "
        "run's own loop."
    )
    return facts, sentence, audited.violated or audited.suspected, audited.canaries


EXAMINATION = Examination(name=NAME, knowledge="any", default=True, needs_traffic=False, why_not=_why_not, run=_examine)
