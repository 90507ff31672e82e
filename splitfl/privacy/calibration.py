"""How much noise a bound takes, how little a bound may say, and what is printed before a run.

Sensitivities are L2 and for *replace one*: a vector clipped to norm C has sensitivity 2 C, because the row is visibly
there and can only be another one. Sensitivity and sigma are in the same unit, whichever it is (values, or grid steps).

    continuous Gaussian   Balle and Wang, "Improving the Gaussian Mechanism for Differential Privacy", 2018, Theorem 8;
                          n releases are one with mu = sqrt(n) sensitivity / sigma, exactly
    discrete Gaussian     Canonne, Kamath and Steinke, "The Discrete Gaussian for Differential Privacy", 2020, Theorem 4
                          (Theorem 14 for vectors): rho-zCDP with rho = sensitivity^2 / (2 sigma^2), added up over
                          releases; to epsilon by their Proposition 12, as in the `dp-accounting` package
    metric                Chatzikokolakis and others, "Broadening the Scope of Differential Privacy Using Metrics", 2013
    token recovery        nearest neighbour among V near-orthogonal embeddings of norm r, over z:
                          integral of phi(z) Phi(z + r/sigma)^(V-1)
    labels                Warner 1965, for K classes: the label is kept with probability e^epsilon / (e^epsilon + K - 1)

No sampling rate appears here: whoever receives a row receives that row, so nothing is amplified (for the released
adapter it is another ledger). Every epoch, retry and evaluation pass that sends a row is one more release.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import ROUND_UP, Context, Decimal
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from splitfl.errors import UsageError

if TYPE_CHECKING:
    import torch

Unit = Literal["record", "token", "label"]

MEANINGLESS_EPSILON = MappingProxyType({"record": 20.0, "token": 20.0, "label": 5.0})
"""Above these a bound for the whole run says almost nothing: a token among 32,000 may be named with probability 0.84 at
12 already, and one of two labels with probability 0.993 at 5."""
_EXACT_DIAMETER = 4096


def _need(allowed: bool, what: str, value: object, expected: str) -> None:
    if not allowed:
        raise UsageError(f"{what} {value} cannot be used.", expected=expected)


def _check(**values: float) -> None:
    """Each named value in its range; NaN is in none."""
    for name, value in values.items():
        if name == "delta":
            _need(0 < value < 1, name, value, "above 0 and below 1, far below 1 / number of records")
        elif name == "epsilon":
            _need(0 <= value < math.inf, name, value, "a finite number, 0 or more")
        elif name == "releases":
            _need(value >= 1 and value % 1 == 0, name, value, "how often the same unit is sent: 1, 2, ...")
        else:
            _need(0 < value < math.inf, name, value, "a finite number above 0")


def _largest(holds: Callable[[float], bool], start: float) -> float:
    """The largest x > 0 for which `holds`, which does so up to some x and not beyond; never above it."""
    low = high = start
    while not holds(low):
        low /= 2
    while holds(high):
        high *= 2
    while low < (middle := (low + high) / 2) < high:  # until they are neighbouring numbers
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _log_upper(x: float) -> float:
    """log P[N(0, 1) > x], x < 30."""
    return math.log(math.erfc(x / math.sqrt(2)) / 2)


def _log_density(x: float) -> float:
    return -x * x / 2 - math.log(2 * math.pi) / 2


def _tail_fraction(x: float) -> float:
    """1 / (x + 2 / (x + 3 / (x + ...))): Laplace's continued fraction, from its second level; x >= 5."""
    fraction = x
    for level in range(60, 1, -1):
        fraction = x + level / fraction
    return 1 / fraction


def _mills(x: float) -> float:
    """P[N(0, 1) > x] / density(x), x > -30."""
    if x >= 5:
        return 1 / (x + _tail_fraction(x))
    return math.exp(x * x / 2) * math.erfc(x / math.sqrt(2)) * math.sqrt(math.pi / 2)


def _mills_drop(x: float, step: float) -> float:
    """mills(x) - mills(x + step), without cancellation where the step is small."""
    if step > 0.01:
        return _mills(x) - _mills(x + step)

    def slope(at: float) -> float:  # 1 - at * mills(at)
        return _tail_fraction(at) / (at + _tail_fraction(at)) if at >= 5 else 1 - at * _mills(at)

    return step / 6 * (slope(x) + 4 * slope(x + step / 2) + slope(x + step))  # Simpson: relative error below 1e-11


def _log_delta(epsilon: float, mu: float) -> float:
    """log of Phi(mu/2 - epsilon/mu) - e^epsilon Phi(-mu/2 - epsilon/mu); e^epsilon itself is never formed."""
    edge = epsilon / mu - mu / 2
    if edge >= 0 or mu <= 0.01:  # density(edge) = e^epsilon density(edge + mu)
        drop = _mills_drop(edge, mu)
        return _log_density(edge) + math.log(drop) if drop > 0 else -math.inf
    above = _log_upper(edge)
    return above + math.log1p(-math.exp(_log_density(edge) + math.log(_mills(edge + mu)) - above))


def gaussian_delta(epsilon: float, *, sensitivity: float, sigma: float, releases: int = 1) -> float:
    """The smallest delta at which Gaussian noise gives epsilon. Here as in every function: UsageError out of range."""
    _check(epsilon=epsilon, sensitivity=sensitivity, sigma=sigma, releases=releases)
    return min(1.0, math.exp(_log_delta(epsilon, math.sqrt(releases) * sensitivity / sigma)))


def gaussian_epsilon(delta: float, *, sensitivity: float, sigma: float, releases: int = 1) -> float:
    """The smallest epsilon that Gaussian noise gives at delta, rounded up in the last place."""
    _check(delta=delta, sensitivity=sensitivity, sigma=sigma, releases=releases)
    mu = math.sqrt(releases) * sensitivity / sigma
    if _log_delta(0.0, mu) <= math.log(delta):
        return 0.0
    return math.nextafter(_largest(lambda epsilon: _log_delta(epsilon, mu) > math.log(delta), mu), math.inf)


def gaussian_sigma(epsilon: float, delta: float, *, sensitivity: float, releases: int = 1) -> float:
    """The smallest sigma with which each unit may be sent `releases` times within epsilon at delta."""
    _check(epsilon=epsilon, delta=delta, sensitivity=sensitivity, releases=releases)
    mu = _largest(lambda mu: _log_delta(epsilon, mu) <= math.log(delta), 1.0)
    return math.sqrt(releases) * sensitivity / mu


def zcdp_rho(sensitivity: float, sigma: float, releases: int = 1) -> float:
    """rho of that many releases of a whole-numbered vector with discrete Gaussian noise on every coordinate."""
    _check(sensitivity=sensitivity, sigma=sigma, releases=releases)
    return releases * (sensitivity / sigma) ** 2 / 2


def zcdp_epsilon(rho: float, delta: float) -> float:
    """An epsilon that rho-zCDP gives at delta, by the RDP accountant of `dp-accounting`.

    Raises:
        UsageError: a value out of range; `dp-accounting` is missing.
    """
    _check(delta=delta)
    _need(0 <= rho < math.inf, "rho", rho, "a finite number, 0 or more")
    if rho == 0:
        return 0.0
    try:
        accounting = import_module("dp_accounting")
    except ImportError as error:
        raise UsageError("An epsilon needs dp-accounting.", hint="pip install 'splitfl[privacy]'") from error
    # Any order gives a true bound. The best is near 1 + sqrt(log(1/delta) / rho); the accountant refuses those near 1.
    middle = math.sqrt(-math.log(delta) / rho)
    orders = [max(1.0101, 1 + middle * 2 ** (step / 64)) for step in range(-192, 193)]
    accountant = accounting.rdp.RdpAccountant(orders, accounting.NeighboringRelation.REPLACE_ONE)
    return float(accountant.compose(accounting.ZCDpEvent(rho)).get_epsilon(delta))


def zcdp_sigma(epsilon: float, delta: float, *, sensitivity: float, releases: int = 1) -> float:
    """The discrete Gaussian's sigma with which each unit may be sent `releases` times within epsilon at delta."""
    _check(epsilon=epsilon, delta=delta, sensitivity=sensitivity, releases=releases)
    _need(epsilon > 0, "epsilon", epsilon, "above 0")
    root = _largest(lambda root: zcdp_epsilon(root * root, delta) <= epsilon, math.sqrt(epsilon))
    return math.sqrt(releases / 2) * sensitivity / root * (1 + 1e-12)  # the way back to rho may round up


def delta_left(delta: float, values: int, distance: float, *, epsilon: float | None = None) -> float:
    """The delta left for the noise itself, when each of `values` values is drawn to within `distance` of its law.

    A mechanism within total variation t of an (epsilon, delta) one is (epsilon, delta + (1 + e^epsilon) t): t counts
    once for what was sent and, times e^epsilon, for what might have been. `Sampler.distance` is 0, so nothing is lost.

    Raises:
        UsageError: nothing is left; `epsilon` is missing where `distance` is not 0.
    """
    _check(delta=delta)
    _need(values >= 0 and distance >= 0, "a count and a distance of", (values, distance), "0 or more")
    if values * distance == 0:
        return delta
    if epsilon is None:
        raise UsageError("How much delta an inexact sampler costs depends on epsilon.", expected="epsilon=")
    lost = values * distance * (1 + math.exp(epsilon)) if epsilon < 700 else math.inf
    if lost >= delta:
        raise UsageError(
            f"{values} values at distance {distance:g} from their law use up delta {delta:g}: nothing is left.",
            expected="values * distance * (1 + e^epsilon) below delta",
            hint="draw from splitfl.privacy.discrete, whose distance is 0",
        )
    return delta - lost


def dchi_worst_case(eta: float, diameter: float) -> float:
    """eta * diameter: the exponent for the two tokens farthest apart; a metric bound, per token and release."""
    _check(eta=eta, diameter=diameter)
    return eta * diameter


def embedding_diameter(table: torch.Tensor) -> float:
    """The largest L2 distance between two rows of `table` [V, d]; exact up to 4096 rows, above that an upper bound.

    The bound is twice the largest distance to the mean, at most twice the diameter.
    """
    import torch

    if table.ndim != 2 or not table.numel() or not bool(torch.isfinite(table).all()):
        problem = f"A table of shape {tuple(table.shape)} has no diameter."
        raise UsageError(problem, expected="finite [V, d], V and d above 0")
    with torch.no_grad():
        if len(table) > _EXACT_DIAMETER:
            mean = table.mean(dim=0, dtype=torch.float64)
            return 2 * max(float((block.double() - mean).norm(dim=1).max()) for block in table.split(_EXACT_DIAMETER))
        exact = table.double() - table.mean(dim=0, dtype=torch.float64)  # an offset would cost digits
        return max(float(torch.cdist(block, exact).max()) for block in exact.split(512))


def recovery(signal_to_noise: float, vocabulary: int, releases: int = 1) -> float:
    """Expected share of tokens that the nearest embedding names, after averaging `releases` fresh draws.

    Args:
        signal_to_noise: norm of a token's vector over sigma, both for one release.
        vocabulary: V, all tokens as likely; a language model as the prior makes the attacker better.
    """
    _check(releases=releases)
    _need(0 <= signal_to_noise < math.inf, "signal to noise", signal_to_noise, "a finite number, 0 or more")
    _need(vocabulary >= 2, "vocabulary", vocabulary, "2 or more")
    shift, step = signal_to_noise * math.sqrt(releases), 0.01
    total = 0.0
    for place in range(-1000, 1001):  # the rule of equal weights converges as fast as any here; beyond 10: 1e-23
        at = place * step
        total += math.exp(_log_density(at) + (vocabulary - 1) * _log_upper(-at - shift))
    return min(1.0, total * step)


def label_keep_probability(epsilon: float, classes: int) -> float:
    """Randomised response: how often a label of `classes` stays; also the best guess of one, all being as likely."""
    _check(epsilon=epsilon)
    _need(classes >= 2, "classes", classes, "2 or more")
    return 1 / (1 + (classes - 1) * math.exp(-epsilon))


def label_epsilon(keep: float, classes: int) -> float:
    """The epsilon (delta 0, one label, replace one, one release) of keeping a label with probability `keep`."""
    _need(classes >= 2, "classes", classes, "2 or more")
    _need(1 / classes <= keep < 1, "keep probability", keep, f"from 1 / {classes}, a uniform draw, to below 1")
    return max(0.0, math.log(keep * (classes - 1) / (1 - keep)))


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a setting promises. Printed, it names every part of the bound, or says that there is none.

    Raises:
        UsageError: a formal claim with a part missing, an epsilon without a formal claim, a reason missing.
    """

    mechanism: str
    channel: str
    unit: Unit
    neighbours: str = "replace one"
    adversary: str = "whoever receives what is sent"
    sensitivity: float | None = None
    sigma: float | None = None
    delta: float | None = None
    """0 for labels, whose bound is pure; None where nothing is proven."""
    releases_planned: int
    epsilon_one: float | None = None
    epsilon_all: float | None = None
    formal: bool
    because: str = ""
    """Why it is only empirical."""

    def __post_init__(self) -> None:
        _need(self.unit in MEANINGLESS_EPSILON, "A claim for the unit", self.unit, ", ".join(MEANINGLESS_EPSILON))
        _check(releases=self.releases_planned)
        words = (self.mechanism, self.channel, self.neighbours, self.adversary)
        _need(all(word.strip() for word in words), "A claim of", words, "mechanism, channel, neighbours and adversary")
        if not self.formal:
            figures = (self.epsilon_one, self.epsilon_all)
            _need(figures == (None, None), "An epsilon without a formal claim", figures, "None for both")
            _need(bool(self.because.strip()), "An empirical claim without", "because", "why nothing is proven")
            return
        _need(self.mechanism != "dchi", "A formal claim for", "dchi", "a metric bound, eta x distance: formal=False")
        _need(self.delta is not None and 0 <= self.delta < 1, "A formal claim with delta", self.delta, "0 to below 1")
        one, every = self.epsilon_one, self.epsilon_all
        known = one is not None and every is not None and 0 <= one <= every < math.inf
        _need(known, "A formal claim with epsilon", (one, every), "one release, and not less for all of them")
        noise = (self.sensitivity, self.sigma)
        _need(noise == (None, None) or None not in noise, "Sensitivity and sigma of", noise, "both, or neither")

    def bound(self, releases: int) -> str:
        """The bound for 1 release or for all that are planned, with all its parts, in one line."""
        _need(releases in (1, self.releases_planned), "releases", releases, f"1 or {self.releases_planned}")
        epsilon = self.epsilon_all if releases == self.releases_planned else self.epsilon_one
        return self._without_proof() if epsilon is None else f"epsilon {_up(epsilon)}; {self._terms(str(releases))}"

    def sentence(self) -> str:
        """The whole claim in one line."""
        if self.epsilon_one is None or self.epsilon_all is None:
            return self._without_proof()
        figures = f"epsilon {_up(self.epsilon_one)} for one release, {_up(self.epsilon_all)} for all"
        noise = "" if self.sigma is None else f"; sensitivity {self.sensitivity:.4g}, sigma {self.sigma:.4g}"
        return (
            f"{self.mechanism} on {self.channel}: {figures}; {self._terms(f'{self.releases_planned} planned')}{noise}"
        )

    __str__ = sentence

    def _terms(self, releases: str) -> str:
        return (
            f"delta {self.delta:g}; unit: one {self.unit}; neighbours: {self.neighbours}; "
            f"adversary: {self.adversary}; releases of the same {self.unit}: {releases}"
        )

    def _without_proof(self) -> str:
        return (
            f"empirical: nothing is proven for {self.mechanism} on {self.channel}, because {self.because}; "
            "only the attacks that were run say anything"
        )


def gauss_claim(
    *, channel: str, unit: Unit, depth: int, clip: float, sigma: float, delta: float, releases: int
) -> Claim:
    """The claim of clipping to `clip` and adding discrete Gaussian noise, both in grid steps or both in values.

    `depth` is the number of layers below the cut: above 0 a token changes other rows too, so it is refused as the unit.
    """
    if unit == "token" and depth > 0:
        raise UsageError(
            f"A bound per token at a cut above {depth} layers is not one: a token changes every later row.",
            expected="unit record (the whole record clipped together), or token at depth 0",
            hint="clip per record, or cut at the embedding output",
        )
    sensitivity = 2 * clip
    one, every = (zcdp_epsilon(zcdp_rho(sensitivity, sigma, n), delta) for n in (1, releases))
    return Claim(
        mechanism="gauss", channel=channel, unit=unit, sensitivity=sensitivity, sigma=sigma, delta=delta,
        releases_planned=releases, epsilon_one=one, epsilon_all=every, formal=True,
    )  # fmt: skip


def verdict(claim: Claim) -> str | None:
    """In plain words, that a claim says nothing or almost nothing; None where it says something."""
    if claim.epsilon_all is None:
        return "No bound: what protects here, if anything, is known only from the attacks that were run."
    if claim.epsilon_all <= MEANINGLESS_EPSILON[claim.unit]:
        return None
    once = "" if claim.releases_planned == 1 else " or send each row once"
    return (
        f"This bound says almost nothing: it allows a receiver to be all but certain about one {claim.unit}. "
        f"Go by what the attacks recover, or add noise{once}."
    )


def preview(
    claim: Claim, *, signal: float | None = None, vocabulary: int | None = None, eta_diameter: float | None = None
) -> list[tuple[str, str]]:
    """Label and value of the lines that are printed before a run.

    Args:
        signal: norm of one token's vector as sent, in the unit of the claim's sigma.
        vocabulary: number of tokens an attacker chooses from.
        eta_diameter: for the metric mechanism, see `dchi_worst_case`.
    """
    planned = claim.releases_planned
    spans = [(1, "one release")] + ([(planned, f"all {planned} releases")] if planned > 1 else [])
    lines: list[tuple[str, str]] = []
    if claim.sigma is not None and signal is not None:
        ratio = signal / claim.sigma
        lines.append(("signal to noise", f"r / sigma = {ratio:.3g} for one token's vector"))
        if vocabulary is not None:
            for releases, words in spans:
                share = f"{100 * recovery(ratio, vocabulary, releases):.3g} % by the nearest of {vocabulary:,}"
                lines.append((f"expected token recovery, {words}", share))
    if eta_diameter is not None:
        lines.append(("metric bound, worst case", f"eta x diameter = {eta_diameter:.4g} per token and release; not DP"))
    if claim.formal:
        lines += [(f"bound, {words}", claim.bound(releases)) for releases, words in spans]
    else:
        lines.append(("bound", claim.sentence()))
    return lines + ([("verdict", said)] if (said := verdict(claim)) else [])


def _up(epsilon: float) -> str:
    """Three digits, never rounded down."""
    return f"{float(Context(prec=3, rounding=ROUND_UP).plus(Decimal(epsilon))):g}"
