# SPDX-License-Identifier: Apache-2.0
"""How long does a diagnosis take, beside the verification before it?

It is measured on failed traces of three kinds. Each known bug of a forward pass, on the cheapest golden case that shows
it. Faults of the generator, patched into transformers. Some of both again with fewer taps. Other programs on the
machine lengthen the wall time, but hardly the processor's time. First names are kept, because speed may change none.

    python -m bench.diagnosis_time --json bench/results/diagnosis_time.json
    python -m bench.diagnosis_time --only rope- --count 0      known bugs whose name begins so, and no faults
    python -m bench.diagnosis_time --seed 7000 --count 20      other faults
    python -m bench.diagnosis_time --same-names-as FILE        exit status 1 if a name differs from that in the file
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from refmoe.bugs.catalogue import MUTANTS
from refmoe.parallel import results
from refmoe.profiles.load import policy
from refmoe.profiles.policy import Policy
from refmoe.spec.config import Config
from refmoe.spec.model import Parameters
from refmoe.traces.held import held_trace
from refmoe.traces.trace import Header, Run, Trace
from refmoe.verifier.diagnosis import Explanation, Keeper, gather, search
from refmoe.verifier.findings import NOT_CONFORMANT, Report
from refmoe.verifier.segments import Settings
from refmoe.verifier.verify import verify
from tests.bugs.generated_engine import arrays_of
from tests.bugs.generated_wider import draw
from tests.bugs.judging import case_named, policy_for, reference, traced_under
from tests.bugs.left_out import bugs, case_for, keeping
from tests.verifier.engines import model_named

Result = TypeVar("Result")

DTYPES = ("float32", "bfloat16")
KNOWN, DRAWN = "known bug", "drawn fault"
FEW_TAPS = ("hidden states", "logits")
EVERY = 6
"""One known bug of so many is diagnosed with few taps too."""
FEW_FAULTS = 2
"""One fault of so many is diagnosed with few taps too."""


@dataclass(frozen=True)
class Work:
    """One failed trace, by names, because a patch cannot be sent to another process."""

    kind: str
    name: str
    """Of the known bug, or the seed of the fault."""
    dtype: str
    taps: str = "all"

    @property
    def group(self) -> str:
        """The row of the table that it belongs to."""
        return f"{self.kind}, {self.dtype}, {self.taps}"


@dataclass(frozen=True)
class Failed:
    """A trace, and all that it is held against."""

    trace: Trace
    case: str
    config: Config
    parameters: Parameters
    runs: tuple[Run, ...]
    policy: Policy


@dataclass(frozen=True)
class Timed:
    """The time of one diagnosis, and the name that it gives."""

    work: Work
    case: str
    verification: float
    """Seconds of the processor for the verification before it."""
    wall: float
    processor: float
    named: str
    """The first name, with its place; empty if none is given."""

    def as_json(self) -> dict[str, Any]:
        rounded = {key: round(value, 2) for key, value in asdict(self).items() if isinstance(value, float)}
        return {**asdict(self.work), "case": self.case, **rounded, "named": self.named}


def failed(work: Work) -> Failed | None:
    """The trace to diagnose. None if no golden case shows the bug."""
    if work.kind == DRAWN:
        fault, rules = draw(int(work.name)), f"hf-{work.dtype}"
        model = model_named(fault.case)
        whole = held_trace(Header(model.runs, policy=rules), dict(arrays_of(fault, work.dtype)))
        case, config, parameters = fault.case, model.config, model.checkpoint.parameters
        runs, used = model.runs, policy(rules)
    else:
        case = case_for(work.name, work.dtype)
        if not case:
            return None
        used, parameters = policy_for(work.name, work.dtype), reference(work.name, case)
        config, runs = case_named(case).config, case_named(case).runs()
        whole = traced_under(work.name, case, parameters, used)
    trace = keeping(whole, work.taps)
    return Failed(trace=trace, case=case, config=config, parameters=parameters, runs=runs, policy=used)


def measure(work: Work) -> Timed | None:
    """The time of the verification and of the diagnosis of one trace. None if the verification does not fail."""
    made = failed(work)
    if made is None:
        return None

    keeper = Keeper()

    def verified() -> Report:
        settings = Settings(passes=keeper)
        return verify(made.trace, made.case, made.config, made.parameters, made.runs, made.policy, settings)

    def diagnosed() -> Sequence[Explanation]:
        kept = keeper.first
        evidence = gather(made.trace, made.config, made.parameters, made.runs, made.policy, report, kept)
        return search(evidence, MUTANTS.values())

    report, _, verification = timed(verified)
    if report.verdict != NOT_CONFORMANT:
        return None
    found, wall, processor = timed(diagnosed)
    named = (f"{each.name} [{each.where}]" if each.where else each.name for each in found if each.explains)
    return Timed(
        work=work,
        case=made.case,
        verification=verification,
        wall=wall,
        processor=processor,
        named=next(named, ""),
    )


def timed(call: Callable[[], Result]) -> tuple[Result, float, float]:
    """The result of a call, its wall time and its processor's time, in seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    found = call()
    return found, time.perf_counter() - wall, time.process_time() - processor


def all_work(only: str, seed: int, count: int) -> Iterator[Work]:
    """All traces: known bugs, drawn faults, and some of both with few taps."""
    names = [each.id for each in bugs() if each.id.startswith(only)]
    seeds = [str(each) for each in range(seed, seed + count)]
    for kind, chosen in ((KNOWN, names), (DRAWN, seeds)):
        yield from (Work(kind, name, dtype) for dtype in DTYPES for name in chosen)
    for kind, chosen in ((KNOWN, names[::EVERY]), (DRAWN, seeds[::FEW_FAULTS])):
        yield from (Work(kind, name, "float32", taps) for taps in FEW_TAPS for name in chosen)


def summary(found: Sequence[Timed]) -> list[dict[str, Any]]:
    """Per kind, dtype and taps: the number of failed traces, and medians and worsts of seconds and of ratios."""
    rows = []
    for group in dict.fromkeys(each.work.group for each in found):
        here = [each for each in found if each.work.group == group]
        slowest = max(here, key=lambda each: each.processor)
        rows.append({
            "what": group, "traces": len(here), "named": sum(bool(each.named) for each in here),
            "median_wall": _median(each.wall for each in here), "worst_wall": max(round(e.wall, 2) for e in here),
            "median_processor": _median(each.processor for each in here),
            "worst_processor": round(slowest.processor, 2), "worst": slowest.work.name,
            "median_verification": _median(each.verification for each in here),
            "median_ratio": _median(each.processor / max(each.verification, 1e-9) for each in here),
        })  # fmt: skip
    return rows


def _median(values: Iterator[float]) -> float:
    return round(statistics.median(values), 2)


def other_names(found: Sequence[Timed], before: Path) -> list[str]:
    """The traces whose names are not those in a file of results, each in a sentence."""
    rows = json.loads(before.read_text(encoding="utf-8"))["traces"]
    old = {tuple(row[key] for key in asdict(found[0].work)): row["named"] for row in rows} if found else {}
    pairs = [(each, old.get(tuple(asdict(each.work).values()))) for each in found]
    return [
        f"{each.work.name}, {each.work.group}: {each.named or 'no name'}, but {name or 'no name'} before"
        for each, name in pairs
        if name is not None and name != each.named
    ]


def line(each: Timed) -> str:
    """A row of the table."""
    return (
        f"{each.work.name:36} {each.case:26} {each.work.group:36} verified in {each.verification:5.2f} s, "
        f"diagnosed in {each.processor:6.2f} s ({each.wall:6.2f} s of wall time)  {each.named or '-'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="known bugs whose name begins so")
    parser.add_argument("--seed", type=int, default=0, help="of the first fault")
    parser.add_argument("--count", type=int, default=16, help="the number of faults")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--json", type=Path, help="write the table here as well")
    parser.add_argument("--same-names-as", type=Path, help="a file of results whose names must be the same")
    options = parser.parse_args()
    found: list[Timed] = []
    with results(measure, list(all_work(options.only, options.seed, options.count)), options.jobs) as measured:
        for _, each in measured:
            if each is not None:
                found.append(each)
                print(line(each), flush=True)
    found.sort(key=lambda each: (each.work.kind, each.work.dtype, each.work.taps, each.work.name))
    rows = summary(found)
    print(json.dumps(rows, indent=1))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        table = {"table": rows, "traces": [each.as_json() for each in found]}
        options.json.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    changed = other_names(found, options.same_names_as) if options.same_names_as else []
    print("\n".join(changed), end="\n" if changed else "")
    sys.exit(bool(changed))


if __name__ == "__main__":
    main()
