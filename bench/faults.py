# SPDX-License-Identifier: Apache-2.0
"""How often does the diagnosis say in words the structure of a fault that was drawn at random?

The engine is transformers with one fault, on a small golden case. Seeds below 1000 were seen while the grammar of
faults was written. Others are fresh. A name is judged by what was drawn.

    python -m bench.faults --seed 5000 --count 60 --dtype float32 --taps all
    python -m bench.faults --count 60 --json bench/results/faults.json     developer's seeds, added to the file
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from refmoe.parallel import results
from tests.bugs.generated_judging import RIGHT, TAPS, UNNAMED, UNSEEN, WRONG, Outcome, judge
from tests.bugs.generated_wider import draw

DEVELOPED = 1000
"""Seeds below this number were seen in development."""


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The counts of one table."""
    seen = [each for each in outcomes if each.verdict != UNSEEN]
    count = {verdict: sum(each.verdict == verdict for each in seen) for verdict in (RIGHT, WRONG, UNNAMED)}
    named = [each for each in seen if each.verdict == RIGHT]
    seconds = sorted(each.seconds for each in seen) or [0.0]
    return {
        "drawn": len(outcomes), "detected": len(seen), "place_right": sum(each.place for each in seen),
        **{f"name_{verdict}": number for verdict, number in count.items()},
        "share_right": round(count[RIGHT] / max(len(seen), 1), 4),
        "right_in_other_words": sum(each.equal for each in named),
        "calls_and_layers_exact": sum(each.limits for each in named),
        "median_seconds": round(statistics.median(seconds), 2), "longest_seconds": round(seconds[-1], 2),
    }  # fmt: skip


def line(each: Outcome) -> str:
    """A row of the table."""
    place = "" if each.place or each.verdict == UNSEEN else "PLACE "
    where = f" [{each.where}]" if each.where else ""
    verdict = each.verdict.upper() if each.verdict == WRONG else "equal" if each.equal else each.verdict
    return f"{verdict:8} {each.seconds:5.1f} s  {place}{each.fault}  ->  {each.named}{where}"


def judge_drawn(work: tuple[int, str, str]) -> Outcome:
    """The diagnosis of a fault, by its seed, dtype and taps."""
    seed, dtype, taps = work
    return judge(draw(seed), dtype, taps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=60, help="the number of faults")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--taps", default="all", choices=sorted(TAPS))
    parser.add_argument("--json", type=Path, help="add the table to this file")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    options = parser.parse_args()
    work = [(seed, options.dtype, options.taps) for seed in range(options.seed, options.seed + options.count)]
    judged: dict[Any, Outcome] = {}
    with results(judge_drawn, work, options.jobs) as found:
        for item, outcome in found:
            judged[item] = outcome
            print(line(outcome), flush=True)
    outcomes = [judged[item] for item in work]
    counts = summary(outcomes)
    print(json.dumps(counts, indent=1))
    if options.json:
        kind = "developer's seeds" if options.seed + options.count <= DEVELOPED else "fresh seeds"
        tables = json.loads(options.json.read_text()) if options.json.exists() else {}
        last = options.seed + options.count - 1
        tables[f"{options.dtype}, {options.taps}, {kind} {options.seed} to {last}"] = {
            **counts, "not_right": [each.as_json() for each in outcomes if each.verdict in (WRONG, UNNAMED)],
        }  # fmt: skip
        options.json.write_text(json.dumps(tables, indent=1) + "\n")
        print(f"added to {options.json}", file=sys.stderr)


if __name__ == "__main__":
    main()
