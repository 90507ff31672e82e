"""The owner honesty check: is the gradient that came back the gradient of the function that is served?

`HonestyProbe` stands around any `splitfl.link.TrunkLink` and passes everything through. Once in `every` backwards it
asks three forwards more and compares numbers. It sends what was already sent, plus random numbers of its own, rounded
as the wire rounds: post-processing, so no new release of a row.

*Gradient probe* (our own; the attack is feature-space hijacking: Pasquini, Ateniese and Bernaschi, CCS 2021). With h
the hidden state and v the gradient as sent, g the gradient received, f the trunk and a step u, an honest owner has

    measured = <f(h+u) - f(h-u), v>   close to   expected = <g, 2u>,      u = S (z + lambda * w S g / |w S g|)

where S scales each token to `reach` times its own root mean square, z is standard normal, w switches half of the
tokens off at random, and lambda is sqrt(BTD)/8, at least 8. The part along g lifts the honest value far above rounding;
z and w are drawn after the gradient came, so nothing can have been fitted to them. For 2u stands the difference of the
two points as sent, whatever rounding or coding did to them. An owner is doubted beyond

    |measured - expected| > K sigma + KAPPA chi^2 max(|measured|, |expected|)
    sigma^2 = 2 eps^2 sum v^2 (f^2 + rms_token(f)^2)            rounding: each number of f by about eps of its size
    chi     = |f(h+u) + f(h-u) - 2 f(h)| / |f(h+u) - f(h-u)|    curvature; the central difference errs by its square

with eps the unit roundoff of the coarsest format on the way. K and KAPPA are measured, not derived: see below.
The reach is chosen so that K sigma is a twentieth of `expected`, and cut back where the trunk is too curved for that. A
probe that allows more than half of `expected` and finds nothing is inconclusive: counted, but neither a failure nor the
end of a row of them. After a doubtful probe each backward is probed, until one is consistent or `failures` in a row
were not; then the run stops.

*Repeat probe*: one input of standard normal numbers, made at the start, must give the same output each time. This sees
changed weights. Outputs may differ by rounding (another device, another order of sums); beyond that, two more asks must
differ too before the run stops. How often an output was not bitwise the first one is counted; a tolerance of 0 stops
on it. (In bfloat16 the default lets pass what 1 % of noise on one matrix does, in float32 what 0.001 % does.)

Does not catch: an owner that recognises probes and answers them with what it wants to be believed (they are easy to
recognise: the repeated input is always the same, and a pair of probes lies around a batch it has just seen); one that
serves another function from the start, faithfully; a false gradient closer to the true one than what is allowed;
cheating on fewer batches than are probed; and one that is honest with gradients and reads the activations, which needs
no cheating at all.
"""

from __future__ import annotations

import math
import secrets
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias

import torch

from splitfl.errors import UsageError, WireError
from splitfl.link import TrunkLink, TrunkRequest, decoded
from splitfl.wire.coding import Coded

Verdict: TypeAlias = Literal["consistent", "inconsistent", "inconclusive"]
Encode: TypeAlias = Callable[[torch.Tensor], "torch.Tensor | Coded"]
Record: TypeAlias = Callable[[dict[str, Any]], None]

# K, in sigmas. Kernels of the short formats add up in float32 and round once, so a result errs by few eps; in float32
# the sum itself rounds, and the error grows with its length. The tests hold honest owners to it for 10,000 probes.
_ROUNDINGS = {torch.float32: 64.0, torch.bfloat16: 12.0, torch.float16: 12.0}
# Largest |error| / chi^2 in 10,000 probes: 7.8 in float32, with random weights that curve a trunk more than training
# does; the reach is so short there that room costs nothing. In the short formats much of chi^2 is rounding already.
_KAPPAS = {torch.float32: 32.0, torch.bfloat16: 5.0, torch.float16: 5.0}
_SHARE = 0.05  # of `expected` that K sigma shall be
# Below these, rounding looks like curvature, and two points are mostly apart by what coding did to them.
_LEAST_REACHES = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}
_CODED_REACH, _MOST_REACH = 0.05, 0.25
_GOOD, _LEAST_STRETCH = 0.25, 0.1  # allowance at which no better reach is looked for; how far from the first guess
_CONCLUSIVE = 0.5  # largest allowance by which a consistent probe says something
_LEAST_LEAN = 8.0  # of lambda

# Largest relative change (root mean square) that another order of sums explains.
_REPEAT_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
_REPEAT_LENGTH, _REPEAT_ASKS = 16, 3


class CheatingOwnerError(WireError):
    """The owner's answers contradict each other.

    Args:
        evidence: figures for `run.jsonl`; no tensor, and nothing that one could be worked out from.
    """

    def __init__(self, problem: str, *, expected: str, evidence: dict[str, Any]) -> None:
        hint = (
            "send this owner nothing more and ask it why; if it computes in a coarser format than agreed, say which one"
        )
        super().__init__(problem, expected=expected, hint=f"{hint}. The evidence is in run.jsonl")
        self.evidence = evidence


@dataclass(kw_only=True)
class Tally:
    """What was probed so far, and how it came out."""

    consistent: int = 0
    inconsistent: int = 0
    inconclusive: int = 0
    inconsistent_in_a_row: int = 0
    largest_deviation: float = 0.0
    """Largest |measured - expected| of a consistent or inconclusive probe, as a share of what was allowed."""
    repeats: int = 0
    repeats_not_bitwise: int = 0
    first_change_at: int | None = None
    """Step at which a repeated input first gave other bits."""
    largest_change: float = 0.0
    """Of the output of the repeated input: root mean square of the difference over that of the first output."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One gradient probe in numbers without units; shares are of the larger of |expected| and |measured|."""

    verdict: Verdict
    ratio: float | None = None
    """measured / expected, 1 for an honest owner; None where nothing was expected."""
    deviation: float = 0.0
    allowed: float = 0.0
    reach: float
    """Size of the random part of the step, as a share of each token's root mean square."""
    rounding: float = 0.0
    curvature: float = 0.0
    """The two parts of `allowed`: K sigma, and KAPPA chi^2."""


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """A request with its answer: a kept step whose gradient is to come, or the repeated input at the start."""

    request: TrunkRequest
    output: torch.Tensor


class HonestyProbe:
    """A `splitfl.link.TrunkLink` that passes everything through and now and then checks the owner.

    Stands between mechanism and session: what it is given has been clipped, noised and coded already. A probe costs
    two forwards (`keep` off, no cache) of the batch's size and one of a short row. As safe to call from several threads
    as `link`.

    Args:
        link: the road to the owner.
        every: probe after each so many backward passes; without gradients, after so many forwards.
        dtype: the coarsest format on the way, of the wire or of the owner's computation (the owner's word for that; a
            coarser one widens what is allowed).
        encode: float32 [B, T, D] -> what `link` takes as `hidden`, for sessions that take codes only. The points that
            come of it when decoded are compared. Coarse codes cost certainty: int4 and top-k leave most probes
            inconclusive.
        gradients: False for protocols without a gradient channel: only the repeat probe runs.
        failures: doubtful gradient probes in a row after which the run stops.
        repeat_tolerance: relative change allowed to a repeated output; None for what `dtype` explains, 0 for bitwise.
        on_probe: is given a record of figures of every probe.
        on_failure: is given the evidence before the error is raised.

    Raises:
        UsageError: a setting out of range.
    """

    def __init__(
        self, link: TrunkLink, *, every: int = 50, dtype: torch.dtype = torch.float32, encode: Encode | None = None,
        gradients: bool = True, failures: int = 3, repeat_tolerance: float | None = None,
        on_probe: Record | None = None, on_failure: Record | None = None,
    ) -> None:  # fmt: skip
        if every < 1 or failures < 2:
            raise UsageError(
                f"A probe every {every} steps, failing after {failures} in a row, is not possible.",
                expected="every at least 1, failures at least 2",
                hint="to probe nothing, leave the check out",
            )
        if dtype not in _ROUNDINGS:
            raise UsageError(f"The rounding of {dtype} is not known.", expected=", ".join(map(str, _ROUNDINGS)))
        self.link, self.every, self.dtype, self.failures = link, every, dtype, failures
        self.gradients, self.encode = gradients, encode or (lambda values: values)
        self.on_probe, self.on_failure = on_probe or (lambda _: None), on_failure or (lambda _: None)
        self.repeat_tolerance = _REPEAT_TOLERANCES[dtype] if repeat_tolerance is None else repeat_tolerance
        self.tally = Tally()
        self._counted, self._stretch, self._change, self._allowed_before = 0, 1.0, 0.7, math.inf
        self._held: dict[int, _Asked] = {}
        self._repeat: _Asked | None = None
        self._failed: CheatingOwnerError | None = None
        self._lock = threading.RLock()  # garbage collection may call `release` in the middle of anything

    # ---- the link

    def forward(self, request: TrunkRequest) -> tuple[torch.Tensor, int]:
        """See `splitfl.link.TrunkLink`. Raises `CheatingOwnerError` as `backward` does."""
        self._stop_if_failed()
        probed = request.cache is None and (request.keep or not self.gradients)
        if probed:
            with self._lock:
                self._repeat = self._repeat or self._first_repeat(request)
        output, step = self.link.forward(request)
        if probed and self.gradients:
            with self._lock:
                self._held[step] = _Asked(request=request, output=output.detach())
        elif probed and self._is_due():
            self._ask_again(step)
        return output, step

    def backward(self, step: int, gradient: torch.Tensor | Coded) -> torch.Tensor:
        """See `splitfl.link.TrunkLink`.

        Raises:
            CheatingOwnerError: the check failed, now or before.
        """
        self._stop_if_failed()
        result = self.link.backward(step, gradient)
        with self._lock:
            held = self._held.pop(step, None)
        if held is not None and self._is_due():
            self._check_gradient(step, held, gradient, result)
            self._ask_again(step)
        return result

    def release(self, *, caches: tuple[int, ...] = (), steps: tuple[int, ...] = ()) -> None:
        """See `splitfl.link.TrunkLink`."""
        with self._lock:
            for step in steps:
                self._held.pop(step, None)
        self.link.release(caches=caches, steps=steps)

    def evidence(self) -> dict[str, Any]:
        """What was found so far, for `run.jsonl`: settings and counts, no tensor."""
        return {
            "every": self.every,
            "dtype": str(self.dtype).removeprefix("torch."),
            "failures": self.failures,
            "repeat_tolerance": self.repeat_tolerance,
            **asdict(self.tally),
        }

    def _is_due(self) -> bool:
        with self._lock:
            self._counted += 1
            return self._counted % self.every == 0 or self.tally.inconsistent_in_a_row > 0

    # ---- the gradient

    def _check_gradient(self, step: int, held: _Asked, gradient: torch.Tensor | Coded, result: torch.Tensor) -> None:
        """Probe the gradient `result` of a step; stop the run if it is one doubtful probe too many."""
        found = self._measure(held, _wide(gradient, self.dtype), _wide(result))
        with self._lock:
            tally = self.tally
            setattr(tally, found.verdict, getattr(tally, found.verdict) + 1)
            if found.verdict == "inconsistent":
                tally.inconsistent_in_a_row += 1
            elif found.allowed:
                tally.largest_deviation = max(tally.largest_deviation, found.deviation / found.allowed)
            if found.verdict == "consistent":
                tally.inconsistent_in_a_row = 0
            self._adapt(found)
            in_a_row = tally.inconsistent_in_a_row
        self.on_probe({"check": "gradient", "step": step, **asdict(found)})
        if in_a_row < self.failures:
            return
        came = "none was expected" if found.ratio is None else f"measured / expected is {found.ratio:.3g}"
        self._fail(
            f"The owner's gradients are not those of the trunk it serves. At step {step}, in the last of {in_a_row} "
            f"doubtful probes in a row, {came}; the two differ by {found.deviation:.3g} of the larger.",
            f"at most {found.allowed:.3g}, by rounding and curvature",
            {"check": "gradient", "step": step, "in_a_row": in_a_row, "last": asdict(found)},
        )

    def _measure(self, held: _Asked, v: torch.Tensor, g: torch.Tensor) -> Measurement:
        """Ask the owner on both sides of `held`'s hidden state; `v` and `g` float64 [B, T, D], as sent and received."""
        if not v.any() or not g.isfinite().all():  # no labels in this batch, or no numbers to compare
            return Measurement(verdict="inconclusive", reach=0.0)
        h, f = _wide(held.request.hidden, self.dtype), _wide(held.output)
        rounding = _ROUNDINGS[self.dtype] * _sigma(v, f, self.dtype)
        shape = _direction(h, g)
        # What a reach of 1 would give; if all of `g` is zeros, what a gradient as large as `v` would.
        signal = 2 * (float((g * shape).sum()) or float((v * shape).norm()))
        wanted = self._stretch * rounding / (_SHARE * signal) if signal else math.inf
        least = _CODED_REACH if isinstance(held.request.hidden, Coded) else _LEAST_REACHES[self.dtype]
        reach = min(max(wanted, least), _MOST_REACH)
        above, f_above = self._ask(held.request, h + reach * shape)
        below, f_below = self._ask(held.request, h - reach * shape)
        change = f_above - f_below
        second, first = float((f_above + f_below - 2 * f).norm()), float(change.norm())
        bend = _KAPPAS[self.dtype] * (second / first) ** 2 if first else (math.inf if second else 0.0)
        return _judge(float((g * (above - below)).sum()), float((change * v).sum()), rounding, bend, reach)

    def _ask(self, request: TrunkRequest, point: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The trunk at `point`: the point as sent, and the output there; both float64 [B, T, D]."""
        payload = self.encode(point.to(self.dtype).to(torch.float32))
        output, _ = self.link.forward(replace(request, hidden=payload, keep=False, overlap=False))
        return _wide(payload, self.dtype), _wide(output)

    def _adapt(self, found: Measurement) -> None:
        """Find the reach that allows least: rounding asks for a longer one, curvature for a shorter one."""
        if found.allowed > _GOOD:
            if found.allowed > self._allowed_before:
                self._change = 1 / self._change
            self._stretch = min(max(self._stretch * self._change, _LEAST_STRETCH), 1 / _LEAST_STRETCH)
        self._allowed_before = found.allowed

    # ---- the repeated input

    def _first_repeat(self, request: TrunkRequest) -> _Asked:
        """Make the input from width and length of the first request, and see what the owner gives for it."""
        _, length, width = tuple(request.hidden.shape)
        values = torch.randn(1, min(length, _REPEAT_LENGTH), width, generator=_fresh_generator()).to(self.dtype)
        sent = TrunkRequest(hidden=self.encode(values.to(torch.float32)))  # coded once: the same bytes each time
        output, _ = self.link.forward(sent)
        return _Asked(request=sent, output=output.detach().clone())

    def _ask_again(self, step: int) -> None:
        """Send the repeated input; stop the run if its output is another one, however often it is asked for."""
        assert self._repeat is not None  # noqa: S101  made before the first step that can be probed
        changes = []
        for _ in range(_REPEAT_ASKS):
            output, _ = self.link.forward(self._repeat.request)
            changes.append(self._compare(step, self._repeat.output, output))
            self.on_probe({"check": "repeat", "step": step, "change": changes[-1], "allowed": self.repeat_tolerance})
            if changes[-1] <= self.repeat_tolerance:
                return
        self._fail(
            f"The owner serves another trunk than at the start. At step {step} a repeated input gave an output that "
            f"differs by at least {min(changes):.3g} of its size, each of {_REPEAT_ASKS} times.",
            f"at most {self.repeat_tolerance:.3g}, by rounding",
            {"check": "repeat", "step": step, "in_a_row": _REPEAT_ASKS, "last": {"change": min(changes)}},
        )

    def _compare(self, step: int, first: torch.Tensor, output: torch.Tensor) -> float:
        """Relative change of the repeated output."""
        same = torch.equal(first, output)
        change = 0.0 if same else float((_wide(output) - _wide(first)).norm() / _wide(first).norm())
        change = change if math.isfinite(change) else 1e300  # JSON knows no infinity
        with self._lock:
            self.tally.repeats += 1
            self.tally.largest_change = max(self.tally.largest_change, change)
            if not same:
                self.tally.repeats_not_bitwise += 1
                self.tally.first_change_at = self.tally.first_change_at or step
        return change

    # ---- stopping

    def _fail(self, problem: str, expected: str, facts: dict[str, Any]) -> None:
        evidence = {**facts, **self.evidence()}
        self._failed = CheatingOwnerError(problem, expected=expected, evidence=evidence)
        self.on_failure(evidence)
        raise self._failed

    def _stop_if_failed(self) -> None:
        if self._failed is not None:
            raise self._failed


def _judge(expected: float, measured: float, rounding: float, bend: float, reach: float) -> Measurement:
    """The verdict over one probe; `rounding` is K sigma and `bend` KAPPA chi^2."""
    size = max(abs(expected), abs(measured))
    if not size or not all(map(math.isfinite, (size, rounding, bend))):
        return Measurement(verdict="inconclusive", reach=reach)
    deviation, share = abs(measured - expected) / size, rounding / size
    allowed = share + bend
    quiet: Verdict = "consistent" if allowed <= _CONCLUSIVE else "inconclusive"
    return Measurement(
        verdict=quiet if deviation <= allowed else "inconsistent",
        ratio=measured / expected if expected else None,
        deviation=deviation,
        allowed=allowed,
        reach=reach,
        rounding=share,
        curvature=bend,
    )


def _sigma(v: torch.Tensor, f: torch.Tensor, dtype: torch.dtype) -> float:
    """Rounding of <f(h+u) - f(h-u), v>, as the module docstring models it."""
    sizes = f.square() + f.square().mean(-1, keepdim=True)
    return math.sqrt(2) * torch.finfo(dtype).eps / 2 * float((v.square() * sizes).sum().sqrt())


def _direction(h: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """u for a reach of 1, float64 [B, T, D]; without a part along `g` if that is all zeros."""
    generator, scale = _fresh_generator(), h.square().mean(-1, keepdim=True).sqrt()
    z = torch.randn(h.shape, generator=generator, dtype=torch.float64)
    chosen = (torch.rand(h.shape[:2], generator=generator) < 0.5)[..., None]
    whole, part = scale * g, scale * g * chosen
    along = part if bool(part.any()) else whole
    size = float(along.norm())
    if not 0 < size < math.inf:
        return scale * z
    if float((whole * z).sum()) < 0:
        z = -z  # as likely; so that both parts add up
    lean = max(_LEAST_LEAN, math.sqrt(h.numel()) / 8)
    return scale * (z + lean * along / size)


def _fresh_generator() -> torch.Generator:
    """Not the process's one, which training shall find untouched; and no state from which a later draw follows."""
    return torch.Generator().manual_seed(secrets.randbits(63))


def _wide(tensor: torch.Tensor | Coded, sent_as: torch.dtype | None = None) -> torch.Tensor:
    """The numbers as float64 on the CPU; of a plain tensor, as they are after having been sent in `sent_as`."""
    plain = decoded(tensor).detach()
    return (plain if sent_as is None or isinstance(tensor, Coded) else plain.to(sent_as)).to("cpu", torch.float64)
