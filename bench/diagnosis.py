# SPDX-License-Identifier: Apache-2.0
"""How often does the diagnosis name the right bug of another engine? The engine is transformers, patched, at bfloat16.

It runs every bug of the catalogue that is a variation of a forward pass, on a golden case that shows it. It also runs
the faults of the verifier's own tests, of which many are not in the catalogue. For those, and for transformers without
a patch, no bug may be named. A bug whose effect the policy allows is invisible: it is counted, and is no failure.

    python -m bench.diagnosis --json bench/results/diagnosis.json
    python -m bench.diagnosis --everywhere     each bug also on every golden case that is aimed at it
    python -m bench.diagnosis --only rope-     only bugs whose name begins so
    python -m bench.diagnosis --leave-one-out --json bench/results/leave-one-out.json
                                               each bug of the catalogue, diagnosed by a catalogue without it;
                                               a stopped run leaves the results that it has
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refmoe.parallel import results
from tests.bugs.left_out import DTYPES, TAPS, LeftOut, bugs, leave_out
from tests.bugs.patched import Patched
from tests.bugs.patched_naming import (
    ATTENTION,
    HEALTHY,
    LEFT_OUT,
    Naming,
    elsewhere,
    everything,
    healthy,
    name_it,
)


@dataclass(frozen=True)
class Work:
    """One engine to diagnose, by the names of bug and model, because a patch cannot be sent to another process."""

    bug: str
    model: str
    attention: str = "eager"


def judge(work: Work) -> Naming:
    """The diagnosis of one engine."""
    bug = healthy(work.model) if work.bug == "healthy" else found(work.bug, work.model)
    return name_it(bug, attention=work.attention)


def found(name: str, model: str) -> Patched:
    """The patch of a bug for a model, by their names."""
    bugs = everything()
    return next(bug for bug in (*bugs, *elsewhere(bugs)) if (bug.name, bug.model) == (name, model))


def all_work(everywhere: bool, only: str) -> list[Work]:
    """All engines: patched ones first, unpatched ones last."""
    bugs = [bug for bug in everything() if bug.name.startswith(only)]
    bugs += elsewhere(bugs) if everywhere else []
    patched = [Work(bug.name, bug.model) for bug in bugs]
    return patched + [Work("healthy", name, attention) for name in HEALTHY * (not only) for attention in ATTENTION]


def measure(work: Sequence[Work], jobs: int | None) -> list[Naming]:
    """The diagnoses of all engines, in order. On a terminal a line shows the progress."""
    told, namings = sys.stderr.isatty(), dict[Work, Naming]()
    with results(judge, work, jobs) as judged:
        for item, naming in judged:
            namings[item] = naming
            if told:
                print(f"\r{len(namings)} of {len(work)}: {item.bug} on {item.model}\033[K", end="", file=sys.stderr)
    if told:
        print("\r\033[K", end="", file=sys.stderr)
    return [namings[item] for item in work]


def summary(namings: Sequence[Naming]) -> dict[str, Any]:
    """The counts of right, wrong and missing names."""
    engines = [each for each in namings if each.bug != "healthy"]
    seen = [each for each in engines if each.visible]
    known, other = [each for each in seen if each.called], [each for each in seen if not each.called]
    mutants = {name for each in known for name in each.called}
    lost = {name for each in known if not each.right for name in each.called}
    well = [each for each in namings if each.bug == "healthy"]
    return {
        "engines_with_a_known_bug": len(known), "named_first": sum(each.right for each in known),
        "share_named_first": sum(each.right for each in known) / max(len(known), 1),
        "mutants": len(mutants), "mutants_named_first_wherever_patched": len(mutants - lost),
        "engines_with_another_bug": len(other), "given_a_wrong_name": sum(not each.right for each in other),
        "of_these_with_kin_in_the_catalogue": sum(bool(each.kin) for each in other),
        "given_the_name_of_their_kin": sum(each.named == each.kin != "" for each in other),
        "explained_by_a_structure": sum(each.explains and each.kind == "structure" for each in other),
        "legal_under_other_arithmetic": sum(each.explains and each.kind == "other arithmetic" for each in other),
        "invisible": [f"{each.bug} on {each.model}" for each in engines if not each.visible],
        "healthy": len(well), "healthy_given_a_name": sum(each.visible or each.explains for each in well),
    }  # fmt: skip


def line(each: Naming) -> str:
    """A row of the table."""
    right = each.called[0] if each.called else f"({each.kin})" if each.kin else "-"
    says = "invisible" if not each.visible else "explains" if each.explains else "no"
    verdict = "" if each.right or not each.visible else "WRONG"
    rank = "" if each.rank is None else str(each.rank)
    first = each.first[:38]
    return f"{each.bug:36} {each.model:26} {right:34} {first:38} {says:10} {rank:>4} {each.seconds:5.1f} s {verdict}"


# ---- leave one out


@dataclass(frozen=True)
class Missing:
    """A bug to diagnose by a catalogue without it, at a dtype and with some taps."""

    bug: str
    dtype: str
    taps: str


def judge_without(work: Missing) -> LeftOut | None:
    """The diagnosis of one bug by a catalogue without it."""
    return leave_out(work.bug, work.dtype, work.taps)


def leave_each_out(
    only: str, dtypes: Sequence[str], taps: Sequence[str], jobs: int | None, path: Path | None
) -> list[LeftOut]:
    """The diagnoses of all bugs, in order. A bug that no case shows at a dtype is left out.

    path: a file that has the results so far, after each of them
    """
    names = [each.id for each in bugs() if each.id.startswith(only)]
    work = [Missing(name, dtype, choice) for choice in taps for dtype in dtypes for name in names]
    known: dict[Missing, LeftOut] = {}
    found: list[LeftOut] = []
    with results(judge_without, work, jobs) as judged:
        for item, each in judged:
            if each is None:
                continue
            known[item] = each
            found = [known[item] for item in work if item in known]
            print(left_out_line(each), flush=True)
            write_left_out(found, path)
    return found


def left_out_line(each: LeftOut) -> str:
    """A line about one bug."""
    named = each.named or "-" if each.visible else "invisible"
    verdict = "  WRONG" if each.wrong else ""
    return f"{each.bug:36} {each.case:26} {each.dtype:9} {each.taps:20} {each.seconds:6.2f} s  {named}{verdict}"


def left_out_table(found: Sequence[LeftOut]) -> list[dict[str, Any]]:
    """Per dtype and taps: the bugs that are seen, given a wrong name, a structure, or no name, and seconds."""
    rows = []
    for dtype, taps in dict.fromkeys((each.dtype, each.taps) for each in found):
        here = [each for each in found if (each.dtype, each.taps) == (dtype, taps) and each.visible]
        seconds = sorted(each.seconds for each in here)
        rows.append({
            "dtype": dtype, "taps": taps, "seen": len(here), "wrong": sum(each.wrong for each in here),
            "structures": sum(each.kind == "structure" for each in here),
            "unnamed": sum(not each.named for each in here),
            "median_seconds": round(seconds[len(seconds) // 2], 2) if seconds else None,
            "most_seconds": round(seconds[-1], 2) if seconds else None,
        })  # fmt: skip
    return rows


def write_left_out(found: Sequence[LeftOut], path: Path | None) -> None:
    """Write the table and the result of each bug to a file, if one is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        table = {"table": left_out_table(found), "bugs": [each.as_json() for each in found]}
        path.write_text(json.dumps(table, indent=1) + "\n")


def report_left_out(found: Sequence[LeftOut]) -> None:
    """Print the table and the wrong names."""
    for row in left_out_table(found):
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    for each in found:
        if each.wrong:
            print(f"WRONG: {each.bug} on {each.case}, {each.dtype}, {each.taps}: {each.named}, {each.residual:.3g}")
    print(f"wrong names: {sum(each.wrong for each in found)} of {sum(each.visible for each in found)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--everywhere", action="store_true", help="on every golden case aimed at a bug")
    parser.add_argument("--only", default="", help="bugs whose name begins so")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--json", type=Path, help="write the table here as well")
    parser.add_argument("--leave-one-out", action="store_true", help="each bug by a catalogue without it")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="with --leave-one-out: only this dtype")
    parser.add_argument("--taps", action="append", choices=tuple(TAPS), help="with --leave-one-out: only these taps")
    options = parser.parse_args()
    if options.leave_one_out:
        dtypes, taps = options.dtype or DTYPES, options.taps or tuple(TAPS)
        report_left_out(leave_each_out(options.only, dtypes, taps, options.jobs, options.json))
        return
    namings = measure(all_work(options.everywhere, options.only), options.jobs)
    print(f"{'bug':36} {'case':26} {'right name':34} {'first':38} {'explains':10} rank")
    print("\n".join(map(line, namings)))
    own = {(bug.name, bug.model) for bug in everything()}
    counts = summary([each for each in namings if each.bug == "healthy" or (each.bug, each.model) in own])
    failures = [each for each in namings if each.visible and not each.right]
    if failures:
        print("\nfailures, with the first that were considered:")
        print("\n".join(f"{each.bug} on {each.model}: {'; '.join(each.considered)}" for each in failures))
    if options.everywhere:
        counts["on_every_case_aimed_at_a_bug"] = summary(namings)
    print(f"\n{json.dumps(counts, indent=1)}\nnamed first: {counts['share_named_first']:.1%}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        table = {**counts, "left_out": LEFT_OUT, "engines": [each.as_json() for each in namings]}
        options.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
