"""``python -m refmoe``: the same as the command ``refmoe``."""

from refmoe.cli import main

main()
