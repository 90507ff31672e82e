"""Protocol `guarded-gradfree`: the gradient-free design of GuardedTuning (Shi, Ouyang and Wang, WWW 2025 Companion).

    party                                            owner
    for each row, once:
      sent = noise(bottom(row))      -- forward -->
                                                     out = trunk(sent)
      keep out on disk             <-- forward_done --
    -- from here on, no network --
    for each epoch:
      loss = top(out, labels); step LoRA of the top

Only the top is trained, so what would be sent of a row never changes: it is sent once, and the trunk's reply serves all
epochs (our reading; the paper leaves it open). No gradient crosses in either direction, and the session refuses one.
That takes away gradient decoding, averaging over epochs and the lever of a hostile gradient, and it is the only design
here whose noise carries a formal bound: what is sent of a row depends on that row and on weights that everybody knows.
"""

from __future__ import annotations

from protocols import crossings
from protocols.record import Protocol
from splitfl.privacy.disclosure import Disclosure

GUARDED_GRADFREE = Protocol(
    name="guarded-gradfree",
    source="GuardedTuning, gradient-free design (Shi et al., WWW 2025 Companion, arXiv 2501.04323)",
    party_trains="LoRA on the top alone, from the trunk's outputs kept on disk",
    owner_trains="nothing; the trunk is frozen",
    trains_bottom=False,
    sends_once=True,
    disclosure=Disclosure(
        crossings=(
            *crossings.forward("once a row, whatever the number of epochs; and for each prompt later"),
            *crossings.CONVERSATION,
        ),
        never=(*crossings.NEVER, "a gradient, in either direction"),
        in_plain_words=(
            "Each row is sent once, and nothing that depends on its label is sent at all. Without noise, whoever knows "
            "the base weights can still recover most of the text from what was sent that one time."
        ),
    ),
)
