# SPDX-License-Identifier: Apache-2.0
"""The diagnosis of transformers with a drawn fault, held against what was drawn."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refmoe.bugs.catalogue import MUTANTS
from refmoe.profiles.load import policy
from refmoe.spec.taps import layer_of, step_of, tap_names
from refmoe.traces.trace import Header, Run, read_trace, write_trace
from refmoe.verifier.diagnosis import diagnose
from refmoe.verifier.diagnosis.evidence import gather
from refmoe.verifier.diagnosis.grammar import of_grammar
from refmoe.verifier.findings import FAIL, STRUCTURE, Explanation
from refmoe.verifier.verify import verify
from tests.bugs.generated import Generated
from tests.bugs.generated_effect import Given, holds_elsewhere
from tests.bugs.generated_engine import arrays_of
from tests.verifier.engines import model_named, only

PRECISION = {"float64": 1e-3, "float32": 1e-3, "bfloat16": 0.05, "float16": 0.02}
"""The relative error of a right number in a name."""
TAPS = {
    "all": lambda step: True, "no-internals": lambda step: not step.startswith("expert."),
    "states": lambda step: step in ("residual", "logits"), "logits": lambda step: step == "logits",
}  # fmt: skip
"""The sets of taps, by name."""
RIGHT, WRONG, UNNAMED, UNSEEN = "right", "wrong", "unnamed", "unseen"


@dataclass(frozen=True)
class Outcome:
    """The verdict about one fault."""

    seed: int
    fault: str
    verdict: str
    """`RIGHT`, `WRONG` or `UNNAMED` for the first name; `UNSEEN` where the verification passes."""
    place: bool
    """Whether the first wrong tap is the first one of the trace at or after the fault."""
    named: str
    kind: str
    where: str
    limits: bool
    """Whether the calls and layers that the name says are those that were drawn."""
    seconds: float
    """Of the diagnosis."""
    equal: bool = False
    """Whether the name is not in the words of what was drawn, but holds for other tokens as well."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


Explain = Callable[..., Sequence[Explanation]]
"""The diagnosis: takes what `diagnose` takes before the mutants."""


def with_catalogue(*arguments: Any) -> Sequence[Explanation]:
    """The whole diagnosis, with every known bug."""
    return diagnose(*arguments, MUTANTS.values())


@np.errstate(all="ignore")
def by_grammar(*arguments: Any) -> Sequence[Explanation]:
    """The structures alone."""
    return of_grammar(gather(*arguments))


def judge(fault: Generated, dtype: str, taps: str = "all", explain: Explain = with_catalogue) -> Outcome:
    """Run, verify, diagnose, and compare with what was drawn."""
    model, rules = model_named(fault.case), f"hf-{dtype}"
    config, parameters, used = model.config, model.checkpoint.parameters, policy(rules)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.safetensors"
        write_trace(path, Header(model.runs, policy=rules), only(arrays_of(fault, dtype), TAPS[taps]))
        trace = read_trace(path)
        report = verify(trace, fault.case, config, parameters, model.runs, used)
        start = time.perf_counter()
        found = explain(trace, config, parameters, model.runs, used, report)
        seconds = time.perf_counter() - start
    failed = [check for check in report.checks if check.verdict == FAIL]
    if not failed or report.first_wrong is None:
        return Outcome(fault.seed, str(fault), UNSEEN, False, "", "", "", False, seconds)
    first = next((each for each in found if each.explains), None)
    verdict, name, kind, where = UNNAMED, "", "", ""
    limits = equal = False
    if first is not None:
        name, kind, where = first.name, first.kind, first.where
        # a structure with rivals says: one of these
        names = (name, *first.rivals) if kind == STRUCTURE else ()
        right = any(named_right(fault, each, where, dtype) for each in names)
        equal = not right and holds_elsewhere(
            model, Given(name, kind, where), dtype,
            lambda runs: only(arrays_of(fault, dtype, runs), TAPS[taps]), PRECISION[dtype],
        )  # fmt: skip
        verdict = RIGHT if right or equal else WRONG
        limits = limited_right(
            fault, where, {(c.run, layer_of(c.tap) or 0): c.verdict for c in report.checks if c.step == fault.step}
        )
    place = report.first_wrong[1] in expected_places(fault, config, {check.tap for check in report.checks})
    return Outcome(fault.seed, str(fault), verdict, place, name, kind, where, limits, seconds, equal)


def named_right(fault: Generated, name: str, where: str, dtype: str) -> bool:
    """Whether the name of a structure is right: its step and its words."""
    step, colon, words = name.partition(": ")
    if not colon:
        return fault.named_by(name, where, PRECISION[dtype])
    return step == fault.step and fault.named_by(words, where, PRECISION[dtype])


def expected_places(fault: Generated, config: Any, present: set[str]) -> set[str]:
    """The taps of the trace in which the fault may be seen first: in each layer, the first at or after its step."""
    order = list(tap_names(config))
    starts = [i for i, tap in enumerate(order) if step_of(tap) == fault.step]
    return {next((tap for tap in order[i:] if tap in present), "") for i in starts}


def limited_right(fault: Generated, where: str, verdicts: dict[tuple[str, int], str]) -> bool:
    """Whether the words hold only calls and layers that the fault acts in, and all of those in which it shows.

    verdicts: by the calls and layers in which the step was checked
    """
    runs = {run.run: run for run in model_named(fault.case).runs}
    order = list(runs)
    said = {(name, layer) for name, layer in verdicts if _holds(where, runs[name], layer, order)}
    acts = {(name, layer) for name, layer in verdicts if fault.acts(runs[name], layer)}
    return {each for each in acts if verdicts[each] == FAIL} <= said <= acts


CALLS = {
    "in calls with one token": lambda run: len(run.tokens) == 1,
    "in calls with several tokens": lambda run: len(run.tokens) > 1,
    "in calls on an empty cache": lambda run: run.past == 0,
    "in calls that go on from a cache": lambda run: run.past > 0,
}  # fmt: skip
"""The words that stand for a kind of call."""


def _holds(where: str, run: Run, layer: int, order: list[str]) -> bool:
    """Whether a call and layer are among those in words. Words for tokens, experts and slots limit neither."""
    return all(_part_holds(part, run, layer, order) for part in re.split(r", (?=in |from |not )", where))


def _part_holds(part: str, run: Run, layer: int, order: list[str]) -> bool:
    listed = re.split(r", | and ", re.sub(r"^in (sequences? |layers? )?| calls$", "", part))
    since = re.fullmatch(r"from (layer )?(\S+) on", part)
    if part in CALLS:
        return CALLS[part](run)
    if part.endswith(" calls"):
        return run.op in listed
    if part.startswith("in sequence"):
        return str(run.sequence) in listed
    if part.startswith("in layer"):
        return str(layer) in listed
    if since and since[1]:
        return layer >= int(since[2])
    if since and since[2] in order:
        return order.index(run.run) >= order.index(since[2])
    return run.run in listed if set(listed) <= {*order, "..."} else True
