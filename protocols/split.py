"""Protocol `split`: U-shaped split fine-tuning (SplitLoRA; U-shape after Vepakomma et al., 2018).

    party                                            owner
    hidden = bottom(rows)            -- forward -->
                                                     out = trunk(hidden)
                                   <-- forward_done --
    loss = top(out, labels)
    d_out = d loss / d out           -- backward -->
                                                     d_hidden = d_out * d out / d hidden
                                   <-- backward_done --
    step LoRA of top and bottom

Rows and labels stay with the party because it holds both ends; the owner holds the trunk, frozen. Nothing is added to
the activations: with this protocol the owner can in principle read the text (see `in_plain_words` below).
"""

from __future__ import annotations

from protocols import crossings
from protocols.record import Protocol
from splitfl.privacy.disclosure import Disclosure

DISCLOSURE = Disclosure(
    crossings=(
        *crossings.forward(crossings.EVERY_BATCH),
        *crossings.backward(crossings.EVERY_STEP),
        *crossings.CONVERSATION,
    ),
    never=crossings.NEVER,
    in_plain_words=(
        "Nothing is added to the activations. Whoever knows the base weights can in principle recover most of the text "
        "from them, and the gradients at the upper cut tell about the answers. Use this protocol where the owner is "
        "trusted not to look, or to measure what a defence buys."
    ),
)

SPLIT = Protocol(
    name="split",
    source="SplitLoRA (Lin et al., 2024); U-shaped split learning (Vepakomma et al., 2018)",
    party_trains="LoRA on bottom and top",
    owner_trains="nothing; the trunk is frozen",
    disclosure=DISCLOSURE,
)
