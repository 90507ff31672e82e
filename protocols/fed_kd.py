"""Protocol `fed-kd`: KD-FedLLM, what models say about public rows is combined (Yan, Su, Deng and Schober, 2025).

    party k (a model of its own)                                       coordinator
    for each round:
      for each local step:
        loss = model(rows, labels); step LoRA of every layer
      for each position of the public rows:
        l = log softmax(model(public rows) / temperature)
        the k likeliest entries of l, 16 bits each   -- put -->        m(v) = weighted mean of l(v)
                                                                         over those that sent v
                                                     <-- piece --
      for each step of distillation:
        q = softmax(m) over what anybody sent
        loss = temperature^2 KL(q | model(public rows))

No weights leave, and models may differ in architecture as long as tokenizer and classes are the same. Where parties
send every class, the mean is one of vectors, and a mask can hide each party's own.
"""

from __future__ import annotations

from protocols import crossings
from protocols.record import Protocol
from splitfl.config_distillation import KD_PROTOCOL
from splitfl.privacy.disclosure import Disclosure

FED_KD = Protocol(
    name=KD_PROTOCOL,
    source="KD-FedLLM (Yan et al., IEEE Commun. Mag. 2025, arXiv 2501.04436); top-k without padding: arXiv 2509.01750",
    party_trains="LoRA on every layer of a model of its own, then again on what all models say about public rows",
    owner_trains="nothing: every party holds a whole model",
    whole=True,
    federated=True,
    distils=True,
    disclosure=Disclosure(
        crossings=crossings.distillation(),
        never=("private rows, text or token ids", "labels or the loss of a private row", "weights, of adapters too"),
        in_plain_words=(
            "What is sent is what this party's tuned model says about rows that everybody has; no weight and no tensor "
            "of a private row leaves. That model was tuned on private rows, and its answers tell about them: from how "
            "sure it is, one can guess which texts it was tuned on, and a public row that resembles a private one "
            "brings out what was learnt from that. With --sum plain the coordinator reads each party's answers. The "
            "other parties read the mean, in which an entry that one party alone sent stands as it was sent. Nothing "
            "here bounds what it tells."
        ),
    ),
)
