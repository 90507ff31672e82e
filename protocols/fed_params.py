"""Protocol `fed-params`: FedLLM, adapters of the whole model combined (Yan, Su, Deng and Schober, 2025).

    party k                                                            coordinator
    for each round:
      load the common adapter                                          <-- state --
      for each local step:
        loss = model(rows, labels); step LoRA of every layer
      update = the adapter         -- put, masked unless asked otherwise -->   sum over k
                                                                       <-- mean --
      next state, by the rule

Every party holds the whole model, so its owner has handed it out: this is the design to compare with, or the one for a
public model. Which values are trained and sent, and how the mean becomes the next state, is the rule's business
(docs/aggregation.md).
"""

from __future__ import annotations

from protocols import crossings
from protocols.record import Protocol
from splitfl.config_federation import WHOLE_PROTOCOL
from splitfl.privacy.disclosure import Disclosure

FED_PARAMS = Protocol(
    name=WHOLE_PROTOCOL,
    source="FedLLM (Yan et al., IEEE Commun. Mag. 2025, arXiv 2501.04436); FedAvg (McMahan et al., 2017)",
    party_trains="LoRA on every layer, combined with other parties' each round",
    owner_trains="nothing: every party holds the whole model",
    whole=True,
    federated=True,
    disclosure=Disclosure(
        crossings=crossings.rounds(),
        never=("rows, text or token ids", "labels or the loss of a row", "activations or gradients of a row"),
        in_plain_words=(
            "No tensor of a row leaves. With --sum plain the coordinator reads this party's update, and from updates "
            "of small batches rows have been read back. A masked or encrypted sum shows it the sum alone, or not even "
            "that. The combined adapter goes to every party, and weights that were tuned on rows tell about them."
        ),
    ),
)
