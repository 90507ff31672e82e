"""`python -m tests.audit.depths [ROWS]`: the table of docs/audit-attacks.md: text read at cuts of every depth.

For each number of layers below the cut: rows of the hospital's file, sent once by a bottom that was tuned for thirty
steps, and read by an attacker that has that bottom (K3) or only its base weights (K1). Seconds are those of one core.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch

from splitfl.audit.attacks import map_decode, nearest
from splitfl.audit.view import Knowledge
from tests.audit.made import make

DEPTHS, STEPS = (1, 2, 4, 6, 8), 30


def lines(rows: int, depths: tuple[int, ...] = DEPTHS) -> None:
    """Print the table, a line a depth."""
    print("| layers below the cut | tokens | `nearest`, K3 | `map_decode`, K3 | s a row | `map_decode`, K1 | s a row |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for depth in depths:
        with tempfile.TemporaryDirectory() as folder:
            made = make(Path(folder), bottom=depth, top=2, rows=rows, steps=STEPS, training=False)
            cells = [str(sum(int((~row.special).sum()) for row in made.truth))]
            cells.append(f"{made.share(nearest.run(made.view(Knowledge.EXACT))):.4f}")
            for knowledge in (Knowledge.EXACT, Knowledge.BASE):
                start = time.process_time()
                guesses = map_decode.run(made.view(knowledge))
                spent = (time.process_time() - start) / rows
                cells += [f"{made.share(guesses):.4f}", f"{spent:.2f}"]
        print(f"| {depth} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    lines(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
