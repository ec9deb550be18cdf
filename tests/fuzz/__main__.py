# SPDX-License-Identifier: Apache-2.0
"""A campaign of inputs of a stranger: mutated files of every kind, special files, options, outputs, locales.

    python -m tests.fuzz --seed 1 --minutes 15 --json bench/results/robustness_inputs.json
    python -m tests.fuzz --only 'case.toml' --count 500 --keep build/faults
    python -m tests.fuzz --repeat 'case.toml:17:1'

The same seed gives the same inputs. Each fault is printed with the trial that repeats it; --keep stores its inputs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy

from tests.fuzz.inputs import Trial, attempt, campaign
from tests.fuzz.inputs_kinds import base
from tests.fuzz.inputs_places import kinds


def trials(seed: int, only: str = "") -> Iterator[Trial]:
    """Trials without end: kinds by their weights, the numbers of each in order. A list that is enumerated ends."""
    chosen = {name: kind for name, kind in kinds().items() if only in name}
    dice, numbers = Random(seed), Counter[str]()
    while left := [name for name, kind in chosen.items() if kind.size is None or numbers[name] < kind.size]:
        (name,) = dice.choices(left, [chosen[each].weight for each in left])
        yield Trial(name, numbers[name], seed)
        numbers[name] += 1


def until(trials: Iterator[Trial], end: float) -> Iterator[Trial]:
    """Trials until a time."""
    for trial in trials:
        if time.monotonic() > end:
            return
        yield trial


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=2.0, help="when to stop beginning trials")
    parser.add_argument("--count", type=int, help="the most trials")
    parser.add_argument("--only", default="", help="a part of the names of kinds")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--json", type=Path, help="where to write the counts")
    parser.add_argument("--keep", type=Path, help="a folder for the inputs of faults")
    parser.add_argument("--repeat", metavar="KIND:NUMBER:SEED", help="run this trial only, and print what is wrong")
    given = parser.parse_args()
    base()
    if given.repeat:
        kind, number, seed = given.repeat.rsplit(":", 2)
        found = attempt(Trial(kind, int(number), int(seed)), kinds(), given.keep or Path("build") / "faults")
        print(found.status, *found.faults, sep="\n")
        return bool(found.faults)
    began = time.monotonic()
    chosen = until(trials(given.seed, given.only), began + 60 * given.minutes)
    if given.count is not None:
        chosen = (trial for trial, _ in zip(chosen, range(given.count), strict=False))
    tried, faulty = Counter[str](), Counter[str]()
    statuses: dict[str, Counter[str]] = {}
    seconds = Counter[str]()
    said: list[str] = []
    for judged in campaign(chosen, kinds(), given.jobs, given.keep):
        name = judged.trial.kind
        tried[name] += 1
        faulty[name] += bool(judged.faults)
        seconds[name] += judged.seconds
        statuses.setdefault(name, Counter())[str(judged.status)] += 1
        for fault in judged.faults:
            said.append(f"{judged.trial}: {ascii(fault)[1:-1][:400]}")
            print(said[-1], file=sys.stderr, flush=True)
        if tried.total() % 500 == 0:
            print(
                f"{tried.total()} inputs, {faulty.total()} faults, {time.monotonic() - began:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    facts = {
        "seed": given.seed,
        "inputs": tried.total(),
        "faulty": faulty.total(),
        "seconds": round(time.monotonic() - began),
        "jobs": given.jobs,
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "kinds": {
            name: {"tried": tried[name], "faulty": faulty[name], "statuses": dict(sorted(statuses[name].items())),
                   "processor_seconds": round(seconds[name], 1)}
            for name in kinds() if tried[name]
        },
        "faults": said,
    }  # fmt: skip
    text = json.dumps(facts, indent=1) + "\n"
    if given.json is not None:
        given.json.write_text(text)
    print(text)
    return bool(faulty.total())


if __name__ == "__main__":
    for library in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(library, "1")
    sys.exit(main())
