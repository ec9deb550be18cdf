# SPDX-License-Identifier: Apache-2.0
"""``python -m refmoe.suite.conditions``: check the declared conditions, and print the table or write it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from refmoe.errors import InputError
from refmoe.files.atomic import replacing
from refmoe.suite.case import FAMILIES, find_cases, read_case
from refmoe.suite.conditions.table import mistakes, render
from refmoe.suite.golden_folder import golden_folder


def main() -> None:
    """Check the declared conditions, and print the table or write it."""
    parser = argparse.ArgumentParser(prog="python -m refmoe.suite.conditions", description=main.__doc__)
    parser.add_argument("--golden", type=Path, help="the folder of cases; the package's own if not given")
    parser.add_argument("--write", action="store_true", help="write CASES.md there instead of printing it")
    options = parser.parse_args()
    if options.write and options.golden is None:
        parser.error("--write needs --golden DIR, the folder to write into")
    try:
        cases = [read_case(folder) for folder in find_cases(golden_folder(options.golden), FAMILIES)]
        found = [f"{case.folder}: {what}" for case in cases for what in mistakes(case)]
    except InputError as error:
        sys.exit(f"refmoe: {error}")
    if found:
        sys.exit("\n".join(found))
    if options.write:
        with replacing(options.golden / "CASES.md") as temporary:
            temporary.write_text(render(cases), encoding="utf-8")
    else:
        print(render(cases), end="")


if __name__ == "__main__":
    main()
