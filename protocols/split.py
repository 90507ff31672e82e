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

from protocols.record import Protocol
from splitfl.privacy.disclosure import Crossing, Direction, Disclosure

_EVERY_BATCH = "every batch, at every training step and every evaluation pass"
_EVERY_STEP = "every training step"

_UP: Direction = "party to owner"
_DOWN: Direction = "owner to party"

DISCLOSURE = Disclosure(
    crossings=(
        Crossing(
            message="hello",
            tensor=None,
            direction=_UP,
            content="fingerprints of kit and trunk, protocol name, wire dtype, wire version",
            how_often="once a session, and again after a lost link",
            bound="none",
        ),
        Crossing(
            message="forward",
            tensor="hidden",
            direction=_UP,
            content="activations of the rows at the lower cut",
            how_often=_EVERY_BATCH,
            bound="none",
        ),
        Crossing(
            message="forward",
            tensor="mask",
            direction=_UP,
            content="which positions are padding: the length of every row",
            how_often=_EVERY_BATCH,
            bound="none",
        ),
        Crossing(
            message="forward",
            tensor="positions",
            direction=_UP,
            content="position numbers, where the batch does not count them from 0",
            how_often=_EVERY_BATCH,
            bound="none",
        ),
        Crossing(
            message="forward_done",
            tensor="hidden",
            direction=_DOWN,
            content="the trunk's output for those activations",
            how_often=_EVERY_BATCH,
            bound="none",
        ),
        Crossing(
            message="backward",
            tensor="gradient",
            direction=_UP,
            content="gradient of the loss at the upper cut, which depends on labels",
            how_often=_EVERY_STEP,
            bound="none",
        ),
        Crossing(
            message="backward_done",
            tensor="gradient",
            direction=_DOWN,
            content="that gradient carried through the trunk to the lower cut",
            how_often=_EVERY_STEP,
            bound="none",
        ),
        Crossing(
            message="release",
            tensor=None,
            direction=_UP,
            content="numbers of caches and steps that are not needed any more",
            how_often="now and then",
            bound="none",
        ),
        Crossing(
            message="bye", tensor=None, direction=_UP, content="end of the session", how_often="once", bound="none"
        ),
        Crossing(
            message="welcome",
            tensor=None,
            direction=_DOWN,
            content="limits of the session",
            how_often="once a session, and again after a lost link",
            bound="none",
        ),
        Crossing(
            message="refused",
            tensor=None,
            direction=_DOWN,
            content="a refusal with its code and reason",
            how_often="when a request is not allowed",
            bound="none",
        ),
        Crossing(
            message="closed", tensor=None, direction=_DOWN, content="end of the session", how_often="once", bound="none"
        ),
    ),
    never=("rows, text or token ids", "labels or the loss", "adapter weights", "any tensor of the trunk"),
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
