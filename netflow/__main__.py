"""``python -m netflow`` is ``netflow``."""

from netflow.cli import main

main()
