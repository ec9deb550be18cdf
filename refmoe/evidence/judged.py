# SPDX-License-Identifier: Apache-2.0
"""The verdict on a trace that was kept, and the bounds on the distances of its values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refmoe.arithmetic.enclosure.array import OWN, Enclosure
from refmoe.arithmetic.formats import OF_DTYPE, Format, nearest, ulp
from refmoe.engines.judge import Judge, Question
from refmoe.engines.results import Outcome
from refmoe.errors import InputError
from refmoe.evidence.given import Given
from refmoe.profiles.policy import Policy
from refmoe.spec.model import Parameters
from refmoe.spec.taps import step_of
from refmoe.suite import Case, compute, read_manifest, trace_path
from refmoe.suite.fresh import label
from refmoe.suite.power import held_steps
from refmoe.traces.held import held_trace
from refmoe.traces.trace import Header, Trace, read_trace
from refmoe.verifier.distances import compare_traces
from refmoe.verifier.intake import take_in
from refmoe.verifier.passes import Key, Pass
from refmoe.verifier.subject import Subject
from refmoe.verifier.tally import Limits

END = ("logits", "router.experts")
"""The taps that the bound from the tokens on reads: the end of the model, and the choices of experts."""


@dataclass(frozen=True)
class Width:
    """The largest distances of values of a tap from the midpoints of their enclosures."""

    allowed: float = 0.0
    """Of a legal value."""
    accepted: float = 0.0
    """Of a value that passes: it is legal, and not more standard deviations away than the limit."""

    def worst(self, other: Width) -> Width:
        """The larger of each."""
        return Width(max(self.allowed, other.allowed), max(self.accepted, other.accepted))


Widths = dict[Key, Width]
"""By run and tap."""


@dataclass(frozen=True)
class Bounds:
    """Bounds on the values of one step, over all layers and runs of a trace. Infinity: nothing bounds them."""

    allowed: float = 0.0
    """|legal value - exact result on the engine's own inputs|, as the policy gives it."""
    accepted: float = 0.0
    """|value that passes - exact result on the engine's own inputs|, as the policy and the significance give it."""
    reached: float = 0.0
    """|the engine's value - golden|, as found."""
    proven: float = 0.0
    """|golden - real number|, as the certificate proves it."""
    total: float = 0.0
    """|the engine's value - real number|: per tap the sum of the two before."""
    relative: float = 0.0
    """The largest total of a tap over the root mean square of its golden."""

    def worst(self, other: Bounds) -> Bounds:
        """The larger of each bound."""
        return Bounds(**{name: max(value, getattr(other, name)) for name, value in vars(self).items()})


@dataclass(frozen=True)
class Judged:
    """A trace, judged again."""

    outcome: Outcome
    steps: frozenset[str]
    """The steps whose taps the trace holds throughout."""
    bounds: Mapping[str, Bounds]
    """Per step, in order of computation. Choices of experts have none."""
    from_tokens: Width | None
    """The largest distances of the logits from the exact result of the tokens, with the choices of experts that the
    trace made; None for a trace without logits."""


class WidthPass(Pass):
    """A pass that also keeps the width of each tap's legal intervals."""

    def __init__(self, widths: Widths, trace: Trace, *arguments: Any, **named: Any) -> None:
        super().__init__(trace, *arguments, **named)
        self._widths = widths

    def _test(self, name: str, step: str, x: Enclosure, dumped: Any) -> int:
        shape = np.broadcast_shapes(x.shape, np.shape(dumped))
        read = self._visible()[None] if step == "attention.scores" else np.ones((), bool)
        key, formats = (self._run.run, name), [self.policy.at(step), OF_DTYPE[dumped.dtype]]
        found = width(x, formats, np.broadcast_to(read, shape), self.spreads)
        self._widths[key] = self._widths.get(key, Width()).worst(found)
        return super()._test(name, step, x, dumped)


def width(x: Enclosure, formats: Sequence[Format], read: Any, limit: float) -> Width:
    """The width of a tap, rounded up; infinite where nothing bounds a value.

    x: the enclosure before the last rounding   formats: of the policy, and of the trace
    read: booleans of the tap's shape, false for values that no step reads   limit: in standard deviations
    """
    stored = formats[0]
    before = x if x.biased or (x.owed and stored == x.accumulation) else x.settle()
    parts = (before.mid, before.r, before.v, x.bias if x.biased else 0.0)
    found = Width()
    with np.errstate(all="ignore"):
        mid, radius, variance, bias = (np.broadcast_to(part, read.shape)[read] for part in parts)
        # a variance of zero beside a positive radius has underflowed, and such a value passes wherever it is legal
        usable = (variance > 0) | (radius == 0)
        likely = np.where(usable, limit * np.sqrt(variance + (OWN * mid) ** 2) + bias, np.inf)
        # a value may be stored more precisely than the policy says, and is then rounded to the dtype of the trace
        for format in dict.fromkeys(each for each in formats if each == stored or each.precision > stored.precision):
            ends = [nearest(mid - radius, format), nearest(mid + radius, format)]
            allowed = np.maximum(np.maximum(ends[1] - mid, mid - ends[0]), radius)
            # the limit holds for the cell of a value, which is at most this much wider than the value
            accepted = likely + ulp(np.abs(mid) + 2 * likely, format)
            allowed, accepted = (np.where(np.isnan(each), np.inf, each) for each in (allowed, accepted))
            found = found.worst(Width(_largest(allowed), _largest(np.minimum(allowed, accepted))))
    return found


def _largest(values: Any) -> float:
    return up(float(np.max(values, initial=0.0)))


def up(value: float) -> float:
    """The next float above a bound that was rounded to nearest; zero stays zero."""
    return math.nextafter(value, math.inf) if value else 0.0


def judge_trace(given: Given, outcome: Outcome) -> Judged:
    """Judge the kept trace of an outcome again. Raises InputError where there is none or it cannot be read."""
    path = given.trace(outcome)
    if path is None:
        raise InputError(f"{given.folder}: no trace of case {outcome.case} in {outcome.dtype} was kept")
    case, policy = given.cases[outcome.case], given.policies[outcome.policy]
    trace, parameters = read_trace(path), case.checkpoint().parameters
    engine = {"name": given.results.engine.name, "version": given.results.engine.version}
    name = label(case.name, given.results.fresh)
    if (trace.header.case, trace.header.policy) != (name, policy.name) or trace.header.producer != engine:
        raise InputError(f"{path}: its header is not that of case {name} under {policy.name} by {engine['name']}")
    if trace.header.runs != case.runs():
        raise InputError(f"{path}: its runs are not those of case {case.name}")
    widths: Widths = {}
    judge = Judge(given.results.significance, diagnosing=False, passes=lambda *args: WidthPass(widths, *args))
    golden = given.results.fresh is None
    question = Question(case=case, dtype=outcome.dtype, policy=policy, trace=trace, golden=golden)
    judged = judge.judge(question, parameters)
    return Judged(
        outcome=judged,
        steps=held_steps(trace, case.config),
        bounds=bounds_of(trace, case, widths, stored=golden),
        from_tokens=from_tokens(trace, case, parameters, policy, given.results.significance),
    )


def bounds_of(trace: Trace, case: Case, widths: Widths, stored: bool) -> dict[str, Bounds]:
    """The bounds of each step of a trace.   stored: whether the case is a golden one, with values and a certificate"""
    found: dict[str, Bounds] = {}
    for (_, tap), each in widths.items():
        step = step_of(tap)
        found[step] = found.get(step, Bounds()).worst(Bounds(allowed=each.allowed, accepted=each.accepted))
    golden = golden_trace(case, stored)
    if golden is None:
        nothing = Bounds(reached=math.inf, proven=math.inf, total=math.inf, relative=math.inf)
        return {step: bounds.worst(nothing) for step, bounds in found.items()}
    certificate = read_manifest(case.folder)["certificate"] if stored else None
    for distance in compare_traces(trace, golden).distances:
        key, step = f"{distance.run}/{distance.tap}", step_of(distance.tap)
        bound = None if certificate is None else certificate["bounds"].get(key)
        proven = math.inf if bound is None else float(bound)
        reached = up(distance.worst) if math.isfinite(distance.worst) else math.inf
        total = up(reached + proven)
        scale = float(np.sqrt(np.mean(np.square(golden.get(distance.run, distance.tap)))))
        relative = up(total / scale) if scale else (math.inf if total else 0.0)
        more = Bounds(reached=reached, proven=proven, total=total, relative=relative)
        found[step] = found.get(step, Bounds()).worst(more)
    return found


def golden_trace(case: Case, stored: bool = True) -> Trace | None:
    """The exact values of a case, computed where they are not stored; None for a case of full size.

    stored: whether the case is a golden one
    """
    if stored and case.store == "trace":
        return read_trace(trace_path(case.folder))
    return None if case.full_size else held_trace(Header(runs=case.runs(), case=case.name), compute(case))


def from_tokens(trace: Trace, case: Case, parameters: Parameters, policy: Policy, significance: float) -> Width | None:
    """The width of the logits where nothing of the trace is read before them but its choices of experts."""
    kept = {key: tensor for key, tensor in trace.tensors.items() if step_of(key.rpartition("/")[2]) in END}
    if not any(key.endswith("/logits") for key in kept):
        return None
    contents = take_in(replace(trace, tensors=kept), case.config, case.runs())
    subject = Subject(case.config, parameters, contents.runs)
    widths: Widths = {}
    limits = Limits(significance, contents.values, contents.tensors)
    WidthPass(widths, contents.trace, subject=subject, policy=policy, limits=limits).go()
    found = Width()
    for (_, tap), each in widths.items():
        found = found.worst(each) if tap == "logits" else found
    return found
