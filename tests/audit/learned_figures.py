"""`python -m tests.audit.learned_figures [gradients] [sip]`: the figures of docs/audit-attacks.md on these attacks.

The embedded model, cut behind two layers, four rows of the hospital at K1; before tuning, and after 40 steps of AdamW
(1e-3, rank 8, every linear module). The attacker's own text is 300 rows of the clinic, or none.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch

from splitfl.audit.attacks import bisr, sip
from splitfl.audit.attacks.grad_decode import ATTACKS
from splitfl.audit.view import Effort, Guesses, Knowledge
from splitfl.privacy.mechanisms import Gauss, GradientGauss
from tests.audit.made import CLINIC, Made, make, rows_of

SETTINGS = {"rows": 4, "batch": 4, "max_length": 96}


def named(made: Made, guesses: Guesses) -> str:
    """Labels that were named, and positions of which it was told rightly whether they have one."""
    right = labels = told = positions = 0
    for row in made.truth:
        wanted = row.labels.clone()
        wanted[0] = -100
        real, found = wanted != -100, guesses.answers[row.number]
        right, labels = right + int((found == wanted)[real].sum()), labels + int(real.sum())
        told, positions = told + int(((found != -100) == real).sum()), positions + len(wanted)
    return f"{right} of {labels} labels, {told} of {positions} places"


def gradients(folder: Path) -> None:
    """Labels by the depth of the top, before and after tuning, and under noise."""
    decode = ATTACKS[0]
    for top in (0, 1, 2):
        for steps in (0, 40):
            made = make(folder / f"{top} {steps}", top=top, steps=steps, **SETTINGS)
            _say(f"top {top}, {steps} steps", lambda made=made: named(made, decode.run(made.view(Knowledge.BASE))))
    norms = torch.cat([sent.gradient.norm(dim=-1) for sent in made.sent if sent.gradient is not None])
    usual = float(norms[norms > 0].median())
    for share in (0.5, 2.0):
        noise = GradientGauss(clip=usual, sigma=share * usual)
        made = make(folder / f"noise {share}", top=0, gradient=noise, **SETTINGS)
        _say(
            f"top 0, noise of {share} of the usual norm on each number",
            lambda made=made: named(made, decode.run(made.view(Knowledge.BASE))),
        )


def learned(folder: Path, effort: Effort = "quick") -> None:
    """Tokens that inverters read, with the clinic's text and without, and under noise."""
    plain = make(folder / "plain", **SETTINGS)
    tuned = make(folder / "tuned", steps=40, **SETTINGS)
    text = tuple(tuple(row["input_ids"]) for row in rows_of(plain.kit, CLINIC, 300))
    size = float(torch.cat([sent.hidden for sent in plain.sent]).norm(dim=-1).median())
    noisy = {
        share: make(folder / f"noisy {share}", hidden=Gauss(clip=60 * size, sigma=share * size), **SETTINGS)
        for share in (0.05, 0.2)
    }

    def read(made: Made, attack: object, auxiliary: tuple[tuple[int, ...], ...]) -> str:
        view = made.view(Knowledge.BASE, auxiliary=auxiliary, effort=effort)
        return f"{made.share(attack.run(view)):.3f}"  # type: ignore[attr-defined]

    _say("sip, clinic's text", lambda: read(plain, sip.ATTACKS[0], text))
    _say("sip, random text", lambda: read(plain, sip.ATTACKS[0], ()))
    _say("sip, after tuning", lambda: read(tuned, sip.ATTACKS[0], text))
    for share, made in noisy.items():
        _say(f"sip, noise of {share} of the usual norm", lambda made=made: read(made, sip.ATTACKS[0], text))
    _say("sip-namoe, the last", lambda: read(made, sip.ATTACKS[1], text))
    _say("bisr, after tuning", lambda: read(tuned, bisr.ATTACK, text))


def _say(what: str, measure: object) -> None:
    start = time.monotonic()
    found = measure()  # type: ignore[operator]
    print(f"{what}: {found} ({time.monotonic() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        asked = sys.argv[1:] or ["gradients", "sip"]
        if "gradients" in asked:
            gradients(Path(place) / "gradients")
        if "sip" in asked:
            learned(Path(place) / "learned")
