"""`python -m model_owner` is `splitfl serve`."""

import sys

from splitfl.cli import main

main(["serve", *sys.argv[1:]])
