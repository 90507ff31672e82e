"""`python -m party` is `splitfl tune`."""

import sys

from splitfl.cli import main

main(["tune", *sys.argv[1:]])
