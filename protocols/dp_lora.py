"""Protocol `dp-lora`: LoRA of the whole model, combined with other parties', under noise on every gradient.

Liu, Zhu, Zha, Gao, Zhong, White and Qiu, "Differentially Private Low-Rank Adaptation of Large Language Model Using
Federated Learning", 2023.

    party k                                                            coordinator
    for each round:
      load the common adapter                                          <-- state --
      for each local step:
        sample     each row (or person) with probability q
        g_i      = gradient of row i, clipped to norm C
        g        = (sum of g_i + N(0, (z C)^2)) / (q N)
        step LoRA of every layer along g
      update = the adapter         -- put, masked unless asked otherwise -->   sum over k
                                                                       <-- mean --
      next state, by the rule

This is the method done so that a bound can be proven: rows are clipped one by one, batches are Poisson samples, all
local steps of all rounds are accounted for together, and a rule such as `rolora` or `ffa` trains one factor a round.
With `--preset paper` it is the method as published instead (`party/dp_lora.py`), for which no epsilon is known: it
clips the mean gradient of a batch, noises both factors and averages them.
"""

from __future__ import annotations

from protocols import crossings
from protocols.record import Protocol
from splitfl.config_federation import DP_PROTOCOL
from splitfl.privacy.disclosure import Disclosure

DP_LORA = Protocol(
    name=DP_PROTOCOL,
    source="DP-LoRA (Liu et al., arXiv 2312.17493); DP-SGD (Abadi et al., 2016)",
    party_trains="LoRA on every layer under DP-SGD, combined with other parties' each round",
    owner_trains="nothing: every party holds the whole model",
    whole=True,
    federated=True,
    disclosure=Disclosure(
        crossings=crossings.rounds(),
        never=("rows, text or token ids", "labels or the loss of a row", "activations or gradients of a row"),
        in_plain_words=(
            "No tensor of a row leaves. What all updates of all rounds tell about one row (or one person) has a bound "
            "that the run prints with all its parts, against everybody who sees them. Scores on held-out rows are not "
            "in it. With --preset paper there is no bound: the method as published does not have one."
        ),
    ),
)
