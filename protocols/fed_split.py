"""Protocol `fed-split`: Split-FedLLM (Yan, Su, Deng and Schober, 2025; SplitFed, Thapa et al., 2022), U-shaped.

    party k                              owner                         coordinator
    for each round:
      load the common adapter                                          <-- state --
      for each local step:
        hidden = bottom(rows)      -- forward -->
                                         out = trunk(hidden)
                                   <-- forward_done --
        d_out = d loss / d out     -- backward -->
                                   <-- backward_done --
        step LoRA of bottom and top
      update = the adapter         -- put, masked unless asked otherwise -->   sum over k
                                                                       <-- mean --
      next state, by the rule

Each step is one of `split`; between rounds the adapters of bottom and top are combined by an aggregation rule. All
parties train at the same time against one owner. Labels stay with the parties, which the published design leaves open.
"""

from __future__ import annotations

from protocols import crossings
from protocols.record import Protocol
from splitfl.privacy.disclosure import Disclosure

FED_SPLIT = Protocol(
    name="fed-split",
    source="Split-FedLLM (Yan et al., IEEE Commun. Mag. 2025, arXiv 2501.04436); SplitFed (Thapa et al., 2022)",
    party_trains="LoRA on bottom and top, combined with other parties' each round",
    owner_trains="nothing; the trunk is frozen",
    federated=True,
    disclosure=Disclosure(
        crossings=(
            *crossings.forward(crossings.EVERY_BATCH),
            *crossings.backward(crossings.EVERY_STEP),
            *crossings.CONVERSATION,
            *crossings.rounds(),
        ),
        never=("rows, text or token ids", "labels or the loss of a row", "any tensor of the trunk"),
        in_plain_words=(
            "The owner sees of each row what it sees with `split`: without noise, whoever knows the base weights can "
            "recover most of the text. A sum that hides updates from the coordinator changes nothing about that. The "
            "combined adapter goes to every party, and weights that were tuned on rows tell about them."
        ),
    ),
)
