"""The chain of BiSR (arXiv 2409.00960): a learned inverter, then the gradient, then the hidden state.

`splitfl.audit.attacks.sip` gives logits of the tokens. The *backward* stage begins with them, as softmax(logits / 1.2),
and moves a soft label matrix until the gradient that it causes at the upper cut is the one that crossed: beta 0.85,
AdamW 0.09, 18 steps. The *forward* stage begins with what that says, and moves embeddings until the hidden state is the
one that crossed (`splitfl.audit.attacks.opt_invert.refine`). Without gradients the middle is left out.
"""

from __future__ import annotations

import torch

from splitfl.audit.attack import Attack
from splitfl.audit.attacks.opt_invert import STEPS, refine
from splitfl.audit.attacks.sip import teach
from splitfl.audit.bottom import open_bottom
from splitfl.audit.top import Top, match_labels, open_top
from splitfl.audit.view import Guesses, Knowledge, Sent, View

HEAT, BACKWARD_STEPS = 1.2, 18


def backward_stage(top: Top, sent: Sent, logits: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] of the tokens of a row, after the gradient had its say; `logits` [T, V] are the first guess.

    The label of position t is the token at t + 1: the first token has no gradient, the last position no label.
    """
    if sent.output is None or sent.gradient is None or len(logits) < 2:
        return logits
    start = torch.cat([logits[1:], logits[-1:]]) / HEAT
    soft = match_labels(top, sent.output, sent.gradient, start, steps=BACKWARD_STEPS)
    told = sent.gradient.norm(dim=-1)[:-1, None] > 0
    return torch.cat([logits[:1], torch.where(told, soft[:-1], logits[1:])])


def _run(view: View) -> Guesses:
    bottom = open_bottom(view)
    taught = teach(view, bottom)
    first = [taught.logits(sent.hidden) for sent in view.sent]
    top = open_top(view) if any(sent.gradient is not None for sent in view.sent) else None
    second = [
        logits if top is None else backward_stage(top, sent, logits)
        for sent, logits in zip(view.sent, first, strict=True)
    ]
    view.progress(0.7)
    begin = [logits.argmax(-1) for logits in second]
    found = refine(bottom, [sent.hidden for sent in view.sent], begin, STEPS[view.effort])
    changed = [float((a.argmax(-1) != b).float().mean()) for a, b in zip(first, begin, strict=True)]
    view.progress(1.0)
    notes = taught.figures | {"changed by the gradient": sum(changed) / max(len(changed), 1)}
    return Guesses(tokens={sent.number: ids for sent, ids in zip(view.sent, found, strict=True)}, notes=notes)


ATTACK = Attack(
    name="bisr",
    title="learned inversion, then gradient matching, then hidden-state matching",
    source="BiSR, arXiv 2409.00960",
    needs=frozenset({"hidden", "language model"}),
    finds="tokens",
    least=Knowledge.BASE,
    run=_run,
    weak_point="each stage starts from the one before; where the inverter knows nothing, few steps find little",
    default=False,
    taught=True,
)
