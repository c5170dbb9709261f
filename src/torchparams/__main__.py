"""`python -m torchparams`."""

from torchparams.cli.app import main

main()
