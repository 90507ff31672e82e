"""Protocol `guarded-offline`: the offline design of GuardedTuning, which is offsite-tuning with a guarded return.

    party                                            owner
    fetch(file, offset)            --> request -->
                                   <-- emulator --   some of the trunk's layers, compressed
    -- from here on, no network --
    for each epoch:
      loss = top(emulator(bottom(rows)), labels)
      step LoRA of bottom and top, with DP-SGD if asked for
                                    -- adapter -->
                                                     full model with the adapter plugged in

(Xiao, Lin and Han, "Offsite-Tuning: Transfer Learning without Full Model", 2023; Shi, Ouyang and Wang, WWW 2025
Companion.) Nothing of a row crosses while training runs: whoever gets the adapter sees what it reveals, and nothing
else. What the holder measures, it measures with the emulator; the plug-in is for the owner to judge. The emulator
comes over a session of its own before training, in pieces of a file, or by hand, as a directory. The adapter travels by
hand, so no message of a session is listed for it.
"""

from __future__ import annotations

from protocols import crossings
from protocols.record import Protocol
from splitfl.config_privacy import OFFLINE_PROTOCOL
from splitfl.privacy.disclosure import Disclosure

GUARDED_OFFLINE = Protocol(
    name=OFFLINE_PROTOCOL,
    source=(
        "GuardedTuning, offline design (Shi et al., WWW 2025 Companion, arXiv 2501.04323), after offsite-tuning "
        "(Xiao et al., 2023, arXiv 2302.04870)"
    ),
    party_trains="LoRA on bottom and top, on its own machine, with a frozen emulator in the trunk's place",
    owner_trains="nothing; the emulator was made beforehand, from public text",
    offline=True,
    disclosure=Disclosure(
        crossings=(*(c for c in crossings.CONVERSATION if c.message != "release"), *crossings.handout()),
        never=(
            "rows, text or token ids",
            "labels or the loss",
            "activations of a row, or a gradient, in either direction",
            "any tensor of the trunk that is not in the emulator",
        ),
        in_plain_words=(
            "While training runs, nothing is sent at all. Before it the emulator comes to the party (where it is "
            "fetched, the owner learns who fetched it, and when), and after it the adapter goes to the owner, once, by "
            "hand. Weights that were tuned on rows tell about them: without "
            "DP-SGD nothing bounds what whoever gets the adapter can work out, and rows that it learnt by heart may "
            "be read back. The figures of such a run were measured with the emulator, not with the owner's model."
        ),
    ),
)
