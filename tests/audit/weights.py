"""`python -m tests.audit.weights [dp mia canary extract]`: the figures of docs/audit-attacks.md, section Weights."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from pathlib import Path

import numpy as np

from party import private_sgd
from party.dp_audit import claimed_by
from party.private_plan import epsilon_of
from splitfl.audit.attacks.canary import chance_exposure, exposure, extract
from splitfl.audit.attacks.extract import extraction_curve
from splitfl.audit.attacks.mia import figures, half_at_random, membership, row_statistics
from tests.audit import test_canary, test_dp_audit, test_extract
from tests.audit.tuned import embedded, overfitted, private, tiny
from tests.privacy.test_private_sgd import rows_of


def dp() -> None:
    """The real loop, and three planted bugs."""
    plan = test_dp_audit.plan_of(rows_of())
    claim = claimed_by(plan)
    print("sound          ", test_dp_audit.audited(plan, claimed=claim).sentence())
    print("adapter alone  ", test_dp_audit.audited(plan, claimed=claim, sees="adapter").sentence())
    drawn = private_sgd.gaussian_noise
    private_sgd.gaussian_noise = lambda count, sigma: drawn(count, sigma / 2)
    try:
        print("half the noise ", test_dp_audit.audited(plan, claimed=claim).sentence())
    finally:
        private_sgd.gaussian_noise = drawn
    one = epsilon_of(plan.noise_multiplier, plan.sample_rate, 1, plan.delta)
    single = claimed_by(dataclasses.replace(plan, steps=1, epsilon=one))
    print("one step's     ", test_dp_audit.audited(plan, claimed=single).sentence())


def mia() -> None:
    """Members of an overfitted adapter of the embedded model, and of DP-SGD on the tiny one."""
    base, cut, collator, rows, texts = embedded(80, max_length=40)
    member = half_at_random(len(rows), seed=3)
    inside = [rows[at] for at in np.flatnonzero(member)]
    before = row_statistics(base, rows, collator)
    for epochs in (1, 6):
        model = overfitted(base, cut, collator, inside, epochs=epochs, rate=5e-3)
        for line in figures(membership(row_statistics(model, rows, collator), before, texts, member)):
            print(f"embedded, {epochs} epochs", line)
    base, cut, collator = tiny()
    rows = rows_of([20] * 80, seed=5)
    member = half_at_random(80, seed=1)
    inside, texts = [rows[at] for at in np.flatnonzero(member)], [str(row["input_ids"]) for row in rows]
    before = row_statistics(base, rows, collator)
    plain = overfitted(base, cut, collator, inside, epochs=12)
    safe, epsilon = private(base, cut, inside, noise=2.0, steps=40)
    for name, model in (("tiny, plain", plain), (f"tiny, DP-SGD epsilon {epsilon:.2f}", safe)):
        found = membership(row_statistics(model, rows, collator), before, texts, member)
        print(name, figures({"base": found["base"]}))


def canary() -> None:
    """Exposure and extraction, plain and with DP-SGD."""
    base, cut, collator = tiny()
    secrets = test_canary.drawn(test_canary.ROWS, test_canary.PREFIX + test_canary.SECRET, 7)
    others = test_canary.drawn(63, test_canary.SECRET, 8)
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids} for ids in secrets]
    plain = overfitted(base, cut, collator, rows, epochs=60, r=16)
    safe, epsilon = private(base, cut, rows, noise=2.0, steps=40)
    print(f"by chance {chance_exposure(64):.2f} of {np.log2(64):.0f} bits")
    at = test_canary.PREFIX
    for name, model in (("untouched", base), ("plain", plain), (f"DP-SGD epsilon {epsilon:.2f}", safe)):
        bits = np.mean([exposure(model, ids[:at], ids[at:], others) for ids in secrets])
        (back,) = extract(model, secrets, prefixes=(at,), length=test_canary.SECRET)
        print(f"{name}: exposure {bits:.2f} bits, whole {back.exact}, BLEU {back.bleu}")


def extraction() -> None:
    """A student of the tiny model's trunk by tokens of traffic."""
    with tempfile.TemporaryDirectory() as place:
        kit = test_extract.kit_in(Path(place))
        traffic = test_extract.traffic_of(kit)
        for point in extraction_curve(kit, traffic[:160], traffic[160:], [160, 640, 2560], test_extract.QUICK):
            print(point, f"recovered {point.recovered:.2f}")


if __name__ == "__main__":
    parts = {"dp": dp, "mia": mia, "canary": canary, "extract": extraction}
    for word in sys.argv[1:] or parts:
        parts[word]()
