"""Protocol `guarded-online`: the online design of GuardedTuning (Shi, Ouyang and Wang, WWW 2025 Companion).

    party                                            owner
    hidden = bottom(rows)
    sent = noise(quantise(hidden))   -- forward -->
                                                     out = trunk(sent)
                                   <-- forward_done --
    loss = top(out, labels) + weight * dCor(embeddings(rows), hidden)
    d_out = d loss / d out           -- backward -->   (quantised, or clipped and noised)
                                                     d_hidden = d_out * d out / d sent
                                   <-- backward_done --
    step LoRA of top and bottom

The U-shape of `split`, with three things done before a tensor leaves: the bottom is trained to keep what it sends
uncorrelated with the embeddings (`splitfl.privacy.decorrelation`), what is sent is quantised, and noise may be added.
The paper gives neither the weight nor the number of bits; ours are 0.01 and 8. A larger weight decorrelates more and
learns less: with 1, a sentiment task was not learnt at all; docs/protocols.md has what the defaults cost.
"""

from __future__ import annotations

from protocols import crossings
from protocols.record import Protocol
from splitfl.privacy.disclosure import Disclosure

GUARDED_ONLINE = Protocol(
    name="guarded-online",
    source="GuardedTuning, online design (Shi et al., WWW 2025 Companion, arXiv 2501.04323)",
    party_trains="LoRA on bottom and top, with a decorrelation loss",
    owner_trains="nothing; the trunk is frozen",
    quantise="int8",
    decorrelate=0.01,
    disclosure=Disclosure(
        crossings=(
            *crossings.forward(crossings.EVERY_BATCH),
            *crossings.backward(crossings.EVERY_STEP),
            *crossings.CONVERSATION,
        ),
        never=crossings.NEVER,
        in_plain_words=(
            "Decorrelation and quantisation may make what is sent harder to read for some attacks; they bound nobody. "
            "Each row is sent anew in every epoch, and the gradients tell about the answers. "
            "Whoever knows the base weights may still recover text."
        ),
    ),
)
