"""`python -m splitfl`."""

from splitfl.cli import main

main()
