"""Protocol `fedmod`: FedMod, moderation models averaged between similar servers (Bin Zia et al., arXiv 2501.05871).

    server i                                         server j, one of its peers
    once: hello, tags                -- hello -->
                                   <-- welcome --    or refused: another model, layout or policy
          ask for its sketch       -- ask_sketch -->
                                    <-- sketch --    noisy sum over its rows, the same bytes for everybody
    each round:
      K steps on LoRA and own head
      choose M similar peers
      ask for their LoRA              -- want -->
                                     <-- have --     LoRA as it is after the latest round, or not_yet
      cap, average, check on own validation rows
    at the end                      -- finished -->

There is no server between them: everybody asks and everybody answers. The head, which holds what a server's own
classes are, stays home. The paper gives neither its sketch ("hashsim") nor the number of peers; ours are in
`splitfl.sketch` and `party.fedmod_peers`, and docs/fedmod.md says what is ours.
"""

from __future__ import annotations

from protocols.record import Protocol
from splitfl.privacy.disclosure import Crossing, Disclosure


def _one(message: str, content: str, how_often: str, tensor: str | None = None, bound: str = "none") -> Crossing:
    return Crossing(
        message=message, tensor=tensor, direction="peer to peer", content=content, how_often=how_often, bound=bound
    )


_GREETING = "fingerprint of the model, digest of the adapter's layout, wire version, policy tags"

FEDMOD = Protocol(
    name="fedmod",
    source="FedMod (Bin Zia, Raman, Castro and Tyson, 2025, arXiv 2501.05871)",
    party_trains="LoRA and a classification head on the whole model, which every server has",
    owner_trains="nothing; there is no owner",
    disclosure=Disclosure(
        crossings=(
            _one(
                "sketch",
                "what the rows are about: a noisy sum over them, the same bytes for everybody; how many there are",
                "once a run, to every peer that asks",
                "sketch",
                "as the run states: epsilon, delta, one row replaced, one release; the number of rows is told as it is",
            ),
            _one(
                "have",
                "LoRA factors, partly trained, and the number of rows",
                "each round, to peers that ask",
                "adapter",
            ),
            _one("hello", _GREETING, "once a link"),
            _one("welcome", _GREETING, "once a link"),
            _one("ask_sketch", "that a sketch is wanted", "once a peer"),
            _one("no_sketch", "that there is none", "where sketches are switched off"),
            _one("want", "which round and which factors are wanted: how far training is", "each round, to neighbours"),
            _one("not_yet", "how far training is", "while an adapter is waited for"),
            _one("finished", "that the last round is over", "once"),
            _one("noted", "that this was heard", "once"),
            _one("refused", "a refusal with its code and reason", "when a request is not allowed"),
        ),
        never=("rows, text or token ids", "labels, the loss or a score", "the head", "optimiser state or gradients"),
        in_plain_words=(
            "The sketch carries a formal bound for each row. The adapters carry none: weights that were tuned on rows "
            "tell about them, and every neighbour sees them change from round to round. A peer may pass on what it "
            "gets. "
            "Which neighbours are asked tells them that they are similar. Averaging is not secure aggregation: each "
            "neighbour's adapter is read in the clear."
        ),
    ),
)
