# SPDX-License-Identifier: Apache-2.0
"""The known bugs that a pack shows, and the choice of cases and taps for each size.

    python -m bench.pack --measure --case NAME --dtype float32    # per bug and case, the steps with a wrong value
    python -m bench.pack --choose                                 # refmoe/suite/pack/sizes.json, from that
    python -m bench.pack --rest smoke                             # then standard and full, and --choose once more
    python -m bench.pack --record                                 # the bytes, and the digests in changes.json

Each bug is planted into the specification, which then runs as an engine would. Its values are held against the
intervals of the pack. Cases are chosen among those that were measured whole in float32. `--rest` plants each bug into
cases of a size until one shows it. All is kept in `bench/results/pack.json`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refmoe.bugs.catalogue import MUTANTS
from refmoe.bugs.run_engine import run
from refmoe.profiles.load import policy
from refmoe.spec.taps import LAYER_TAPS, MODEL_TAPS, step_of
from refmoe.suite import Case, find_cases, read_case
from refmoe.suite.matrix.file import read_matrix
from refmoe.suite.matrix.outcomes import SPECIFICATION, runnable
from refmoe.suite.matrix.power import traces
from refmoe.suite.pack.codes import decode
from refmoe.suite.pack.contents import Judged, case_files, taps_of
from refmoe.suite.pack.legal import DTYPES, MAY, MUST, SLOTTED
from refmoe.suite.pack.sizes import FORMAT_VERSION, FULL, MOST_BYTES, SIZES, table
from refmoe.suite.pack.writing import CASES, Part, digest_of, pack_files, versions

ROOT = Path(__file__).parents[1]
GOLDEN, RESULTS = ROOT / "golden", ROOT / "bench" / "results" / "pack.json"
TABLE = ROOT / "refmoe" / "suite" / "pack" / "sizes.json"
VERSIONS = TABLE.with_name("changes.json")
QUANTISED = frozenset(name for name, each in MUTANTS.items() if "QUANT" in each.needs)
"""Bugs of quantised weights. No case of a pack has any."""
STEPS = ("embedding", *LAYER_TAPS, *(step for step in MODEL_TAPS if step != "embedding"))
"""All steps, in order of computation."""

Shown = dict[str, dict[str, list[str]]]
"""Per bug and case, the steps with a value outside its interval, or with a wrong choice."""


# ---- judge a trace as the readers do


def outside(taps: Iterable[Judged], trace: Any, dtype: str) -> dict[tuple[str, str], int]:
    """Per run and tap of a trace the number of wrong values, or of tokens with a wrong choice; not those without."""
    found = {}
    for each in taps:
        wrong = wrong_values(each, trace, dtype)
        if wrong:
            found[each.run.run, each.tap] = wrong
    return found


def wrong_values(tap: Judged, trace: Any, dtype: str) -> int:
    """The number of wrong values, or of tokens with a wrong choice, of one tap."""
    place, size, run = DTYPES.index(dtype), int(np.prod(tap.shape)), tap.run.run
    values = np.asarray(trace.get(run, tap.tap))
    if not tap.bases:
        states = np.frombuffer(tap.data, np.uint8)[size * place :][:size].reshape(tap.shape)
        return wrong_choices(states, values.astype(np.int64))
    if step_of(tap.tap) in SLOTTED:
        ids = np.asarray(trace.get(run, f"{tap.tap.rpartition('.' + step_of(tap.tap))[0]}.router.experts"))
        order = np.argsort(ids, axis=-1, kind="stable")
        values = np.take_along_axis(values, order.reshape(*order.shape, *[1] * (values.ndim - 2)), axis=1)
    centre = np.frombuffer(tap.data, "<f4", size).astype(np.float64)
    radius = decode(tap.bases[place], np.frombuffer(tap.data, np.uint8)[size * (4 + place) :][:size])
    wide = values.astype(np.float64).reshape(-1)
    right = np.isnan(radius) | ((wide >= centre - radius) & (wide <= centre + radius))
    return int((~right).sum())


def wrong_choices(states: Any, ids: Any) -> int:
    """The number of tokens whose choice is not legal.   states: [T, E]   ids: [T, k]"""
    wrong = 0
    for state, chosen in zip(states, ids.tolist(), strict=True):
        valid = len({*chosen}) == len(chosen) and all(0 <= e < len(state) and state[e] >= MAY for e in chosen)
        wrong += not (valid and {*np.flatnonzero(state == MUST).tolist()} <= {*chosen})
    return wrong


# ---- measure


@dataclass(frozen=True)
class Work:
    """A case, and the dtypes in which all bugs are planted."""

    folder: Path
    dtypes: tuple[str, ...]
    known: Mapping[str, frozenset[str]]
    """Per dtype the bugs that are not asked about."""


def measure(work: Work) -> dict[str, Any]:
    """What each bug shows in a case, per dtype; the sizes of its parts; and the specification, which shows nothing."""
    case = read_case(work.folder)
    parameters, taps, matrix = case.checkpoint().parameters, taps_of(case), read_matrix(GOLDEN / "matrix.json")
    found: dict[str, Any] = {"shown": {}, **sizes_of(case, taps)}
    for dtype in work.dtypes:
        rules, shown = policy(dtype), {}
        right = run(None, case.config, parameters, case.runs(), rules)
        if outside(taps, right, dtype):
            shown[SPECIFICATION] = steps_in(outside(taps, right, dtype))
        left_out = QUANTISED | work.known.get(dtype, frozenset())
        for name in runnable():
            if name not in left_out and case.name in matrix.killers(name, dtype):  # others show nothing at all
                judged = policy(dtype + MUTANTS[name].judged_by)
                wrong = [outside(taps, trace, dtype) for trace in traces(name, case, judged, parameters)]
                steps = steps_in({key for each in wrong for key in each})
                if steps:
                    shown[name] = steps
        found["shown"][dtype] = shown
    return found


def steps_in(keys: Collection[tuple[str, str]]) -> list[str]:
    """The steps of taps, in order of computation."""
    there = {step_of(tap) for _, tap in keys}
    return [step for step in STEPS if step in there]


def sizes_of(case: Case, taps: list[Judged]) -> dict[str, Any]:
    """The bytes of a case without any tap, and those of each step; the values, and those with an interval."""

    def total(left_out: Collection[str]) -> int:
        return sum(map(len, case_files(case, taps, left_out).values()))

    bare = total(STEPS)
    real = [each for each in taps if each.bases]
    return {
        "bytes": bare,
        "steps": {step: total({*STEPS} - {step}) - bare for step in STEPS},
        "values": {step: sum(int(np.prod(each.shape)) for each in real if step_of(each.tap) == step) for step in STEPS},
        "judged": {
            step: [sum(each.judged[i] for each in real if step_of(each.tap) == step) for i in range(len(DTYPES))]
            for step in STEPS
        },
    }


def read_results() -> dict[str, Any]:
    """What was measured so far, per case."""
    if not RESULTS.exists():
        return {"cases": {}}
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return found


def keep(folder: Path, again: dict[str, Any]) -> None:
    """Write what was measured of a case, beside what is known of it."""
    found = read_results()
    before = found["cases"].get(folder.name, {})
    for field in ("shown", "whole"):
        again[field] = {**before.get(field, {}), **again[field]}
    found["cases"][folder.name] = again
    found["cases"] = {name: found["cases"][name] for name in sorted(found["cases"])}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(folder.name, {dtype: len(shown) for dtype, shown in again["shown"].items()}, flush=True)


def measure_whole(cases: Sequence[Path], dtypes: tuple[str, ...]) -> None:
    """Plant every bug in every case."""
    for folder in cases:
        again = measure(Work(folder, dtypes, {}))
        keep(folder, again | {"whole": dict.fromkeys(dtypes, True)})


def measure_rest(size: str, dtypes: tuple[str, ...]) -> None:
    """Plant, in each case of a size, the bugs that its other cases have not shown so far."""
    chosen = chosen_by(size)
    for name in chosen:
        known = {}
        cases = read_results()["cases"]
        for dtype in dtypes:
            if not cases.get(name, {}).get("whole", {}).get(dtype):
                known[dtype] = frozenset(
                    bug for c, steps in chosen.items() if c in cases for bug in shown_by(cases[c], steps, dtype)
                )
        again = measure(Work(GOLDEN / name, tuple(known), known))
        before = cases.get(name, {}).get("shown", {})
        again["shown"] = {dtype: before.get(dtype, {}) | shown for dtype, shown in again["shown"].items()}
        keep(GOLDEN / name, again | {"whole": {}})


def chosen_by(size: str) -> Chosen:
    """The cases of a size and the steps that are kept, as sizes.json has them; of the largest, all of all cases."""
    if size == FULL:
        return {folder.name: {*STEPS} for folder in find_cases(GOLDEN)}
    return {name: {*STEPS} - {*left_out} for name, left_out in table()[size].cases.items()}


# ---- choose

Chosen = dict[str, set[str]]
"""Per case the steps whose taps are kept."""


@dataclass(frozen=True)
class Offer:
    """Steps of a case that may be added, the bugs that they show beyond those seen, and what they cost."""

    case: str
    steps: frozenset[str]
    bugs: frozenset[str]
    cost: int

    @property
    def worth(self) -> tuple[float, str]:
        return len(self.bugs) / self.cost, self.case


def offers(cases: Mapping[str, Any], chosen: Chosen, seen: Collection[str]) -> Iterable[Offer]:
    """For each case its steps, added one by one, the most new bugs for a byte first; an offer after each."""
    for name, case in cases.items():
        shown = {bug: {*steps} for bug, steps in case["shown"]["float32"].items() if bug not in seen}
        cost = 0 if name in chosen else case["bytes"] + PER_CASE
        have = set(chosen.get(name, ()))
        bugs: set[str] = set()
        added: set[str] = set()
        while left := {bug: steps for bug, steps in shown.items() if bug not in bugs}:
            step = max(
                {step for steps in left.values() for step in steps} - have - added,
                key=lambda step: (sum(step in steps for steps in left.values()) / case["steps"][step], step),
            )
            added.add(step)
            cost += case["steps"][step]
            bugs |= {bug for bug, steps in left.items() if step in steps}
            yield Offer(name, frozenset(added), frozenset(bugs), cost)


PER_CASE = 500
"""The bytes of a case in the list of a pack, at most."""
PAGE = 14_000
"""The bytes of the page and the list of a pack without cases, at most."""


def choose(cases: Mapping[str, Any], most: int) -> Chosen:
    """Cases and steps within so many bytes, greedily: those with the most new bugs for a byte come first.

    In the end other steps are added, the cheapest first. With more steps, a verdict is nearer to the fault.
    """
    chosen: Chosen = {}
    spent = PAGE
    while True:
        seen = {bug for name, steps in chosen.items() for bug in shown_by(cases[name], steps)}
        fitting = [each for each in offers(cases, chosen, seen) if spent + each.cost <= most]
        if not fitting:
            break
        best = max(fitting, key=lambda each: each.worth)
        chosen.setdefault(best.case, set()).update(best.steps)
        spent += best.cost
    wanted = sorted(
        (cases[name]["steps"][step], STEPS.index(step), name)
        for name in chosen
        for step in STEPS
        if step not in chosen[name]
    )
    for cost, place, name in wanted:
        if spent + cost <= most:
            chosen[name].add(STEPS[place])
            spent += cost
    return chosen


def shown_by(case: Mapping[str, Any], steps: Collection[str], dtype: str = "float32") -> set[str]:
    """The bugs that some of these steps of a case show."""
    shown = case["shown"].get(dtype, {})
    return {bug for bug, wrong in shown.items() if {*wrong} & {*steps} and bug != SPECIFICATION}


def table_of(cases: Mapping[str, Any], chosen: Chosen) -> dict[str, Any]:
    """A size as sizes.json has it. The bytes are estimated: places in an index have more digits the more it holds."""
    matrix = read_matrix(GOLDEN / "matrix.json")
    order = sorted(chosen, key=lambda name: (cases[name]["bytes"] + sum(cases[name]["steps"].values()), name))
    seen = {
        dtype: [name for name in runnable() if any(name in shown_by(cases[c], chosen[c], dtype) for c in order)]
        for dtype in DTYPES
    }
    known = {dtype: [name for name in runnable() if matrix.killers(name, dtype)] for dtype in DTYPES}
    return {
        "cases": {name: [step for step in STEPS if step not in chosen[name]] for name in order},
        "bytes": sum(cases[c]["bytes"] + sum(cases[c]["steps"][step] for step in chosen[c]) for c in order),
        "values": {dtype: sum(cases[c]["values"][step] for c in order for step in chosen[c]) for dtype in DTYPES},
        "judged": {
            dtype: sum(cases[c]["judged"][step][i] for c in order for step in chosen[c])
            for i, dtype in enumerate(DTYPES)
        },
        "seen": {dtype: len(bugs) for dtype, bugs in seen.items()},
        "unseen": {dtype: [name for name in known[dtype] if name not in seen[dtype]] for dtype in DTYPES},
    }


def sizes() -> dict[str, Any]:
    """The content of sizes.json."""
    cases = read_results()["cases"]
    whole = {name: case for name, case in cases.items() if case["whole"].get("float32")}
    chosen = {size: choose(whole, most) for size, most in MOST_BYTES.items()}
    chosen[FULL] = {name: {*STEPS} for name in cases}
    return {"format_version": FORMAT_VERSION, "sizes": {size: table_of(cases, chosen[size]) for size in SIZES}}


def write_table() -> None:
    """Choose, and write sizes.json."""
    document = sizes()
    TABLE.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for size, each in document["sizes"].items():
        counts = {dtype: (each["seen"][dtype], len(each["unseen"][dtype])) for dtype in DTYPES}
        print(size, len(each["cases"]), each["bytes"], counts)


def record() -> None:
    """Write the digests of the newest version, and the bytes of each size. A released version keeps its own."""
    found, document = versions(), json.loads(TABLE.read_text(encoding="utf-8"))
    for size in SIZES:
        parts = [Part(GOLDEN / name, left_out) for name, left_out in table()[size].cases.items()]
        files = pack_files(size, parts, "processes:1")
        found[0]["digests"][size] = digest_of(files)
        document["sizes"][size]["bytes"] = sum(len(data) for name, data in files.items() if name.startswith(CASES))
    TABLE.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    VERSIONS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--choose", action="store_true")
    parser.add_argument("--case", action="append", help="only these cases; repeatable")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="only these dtypes; repeatable")
    parser.add_argument("--rest", choices=SIZES, help="the cases of a size, until one shows each bug")
    parser.add_argument("--record", action="store_true")
    given = parser.parse_args()
    cases = [folder for folder in find_cases(GOLDEN) if not given.case or folder.name in given.case]
    if given.measure:
        measure_whole(cases, tuple(given.dtype or DTYPES))
    if given.rest:
        measure_rest(given.rest, tuple(given.dtype or DTYPES))
    if given.choose:
        write_table()
    if given.record:
        record()


if __name__ == "__main__":
    main()
