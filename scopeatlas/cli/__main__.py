"""`python -m scopeatlas.cli`."""

from scopeatlas.cli import main

main()
