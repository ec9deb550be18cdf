# SPDX-License-Identifier: Apache-2.0
"""``python -m refmoe``: the same as the command ``refmoe``."""

from refmoe.cli import main

main()
