# SPDX-License-Identifier: Apache-2.0
"""The known bugs that a running server shows by what it gives: tokens, the largest entries, or whole distributions.

    python -m bench.server_power                       # all bugs at all dtypes; some minutes on one core
    python -m bench.server_power --mutant rope-sign-flipped

Writes ``bench/results/server_power.json``, per bug and dtype the levels that show it, and the table that the package
holds, ``refmoe/engines/server/power.json``. With ``--mutant`` the other bugs keep what was measured before.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from refmoe.bugs.catalogue import MUTANTS
from refmoe.engines.server.measure import SPECIFICATION, Work, as_table, seen_at
from refmoe.engines.server.power import TABLE
from refmoe.files.atomic import replacing
from refmoe.suite.matrix.outcomes import POLICIES, runnable

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "server_power.json"
PACKED = ROOT / "refmoe" / "engines" / "server" / TABLE


def write(path: Path, values: dict[str, Any]) -> None:
    """Write an object, each of its fields on a line or below one another."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Measure, and write both files after each bug anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--mutant", metavar="NAME", action="append", choices=[SPECIFICATION, *MUTANTS], default=[],
        help="only this bug; repeatable",
    )  # fmt: skip
    arguments = parser.parse_args()
    before = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for name in arguments.mutant or [SPECIFICATION, *runnable()]:
        found = {name: {dtype: seen_at(Work(name, dtype)) for dtype in POLICIES}}
        before |= found
        print(name, {dtype: len(levels) for dtype, levels in found[name].items()}, flush=True)
        write(RESULTS, before)
    order = {name: before[name] for name in (SPECIFICATION, *runnable()) if name in before}
    write(RESULTS, order)
    write(PACKED, as_table(order))


if __name__ == "__main__":
    main()
