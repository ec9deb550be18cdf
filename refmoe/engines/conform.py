# SPDX-License-Identifier: Apache-2.0
"""The conformance run: first a smoke test of the harness, then every case at every dtype, and a verdict on each."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

from refmoe import __version__
from refmoe.checkpoints.size import total_parameters
from refmoe.engines.harness import Description, Harness, HarnessUnusable, Refused
from refmoe.engines.observations import golden_bits_notes, has_golden_bits, is_wider
from refmoe.engines.process import BROKEN, CRASHED, HarnessError
from refmoe.engines.protocol import EVERY_TAP
from refmoe.engines.results import NOT_JUDGED, SKIPPED, Cause, Engine, Outcome, Results
from refmoe.engines.run_case import (
    Labels,
    Materialised,
    Places,
    kept_file,
    lacks,
    places,
    run_case,
    without_folders,
)
from refmoe.errors import InputError
from refmoe.files.scratch import Scratch
from refmoe.files.sentences import one_line, shown
from refmoe.parallel import in_background
from refmoe.profiles.load import policy as named_policy
from refmoe.profiles.policy import Policy
from refmoe.spec.model import Parameters
from refmoe.suite import Case
from refmoe.suite.overflow import explains_open, overflow
from refmoe.suite.power import with_power
from refmoe.traces.trace import Trace
from refmoe.verifier.findings import CANNOT_JUDGE, FAIL, NOT_CONFORMANT, Report
from refmoe.verifier.intake import INTEGERS, take_in
from refmoe.verifier.passes import Pass
from refmoe.verifier.segments import SIGNIFICANCE, Settings
from refmoe.verifier.verify import verify

if TYPE_CHECKING:
    from refmoe.verifier.diagnosis.observed import Recording

LAST_VERDICT = 2.0
"""Seconds in which the last answer may still be judged when a signal ends the run."""
TRIED = 3
"""The smoke test tries this many cases, the smallest for which the harness has the abilities."""

Log = Callable[[Outcome, str], None]
"""Called with each outcome and, where the harness has failed, the end of its standard error."""


@dataclass(frozen=True)
class Judge:
    """The settings by which traces are judged."""

    significance: float = SIGNIFICANCE
    diagnosing: bool = True
    """Whether failures are explained."""
    named: set[str] = field(default_factory=set, compare=False)
    """The names given so far. The next diagnosis tries them first, because the failures of an engine are alike."""

    def judge(self, case: Case, parameters: Parameters, dtype: str, trace: Trace, policy: Policy) -> Outcome:
        """The outcome of a case at a dtype. A trace that cannot come from this model is a broken answer.

        An explanation that fails leaves the verdict as it is.
        """
        name, config, runs = f"case {case.name}", case.config, case.runs()
        from refmoe.verifier.diagnosis import Keeper

        keeper = Keeper()
        settings = Settings(self.significance, passes=keeper if self.diagnosing else Pass)
        outcome = Outcome(case=case.name, dtype=dtype, policy=policy.name, verdict=BROKEN, reason="")
        try:
            report = verify(trace, name, config, parameters, runs, policy, settings)
            report = with_power(report, trace, config, policy)
        except InputError as error:
            return replace(outcome, reason=_about_its_file(error, trace))
        if report.verdict == CANNOT_JUDGE:
            first = overflow(case, parameters, policy)
            if first is not None and explains_open(report, case, first):
                reason = f"the case overflows under {policy.name}: the specification itself is not finite at {first}"
                return replace(outcome, verdict=NOT_JUDGED, reason=reason, worst_errors=worst_errors(report))
        unexplained = ""
        if self.diagnosing and report.verdict == NOT_CONFORMANT:
            try:
                report = self._diagnosed(report, case, parameters, trace, policy, keeper.first)
            except Exception as error:  # of whatever kind: the values are a stranger's
                unexplained = f"; refmoe could not explain it: {in_words(error)}"
        return replace(
            outcome,
            verdict=report.verdict,
            reason=reason_of(report) + unexplained,
            first_wrong=report.first_wrong,
            worst_errors=worst_errors(report),
            explanations=tuple(
                Cause(name=each.name, kind=each.kind, about=each.about, fix=each.fix, sources=each.sources)
                for each in report.explanations or ()
            ),
        )

    def _diagnosed(
        self, report: Report, case: Case, parameters: Parameters, trace: Trace, policy: Policy, kept: Recording | None
    ) -> Report:
        from refmoe.bugs.catalogue import MUTANTS
        from refmoe.verifier.diagnosis import explained, gather, search

        evidence = gather(trace, case.config, parameters, case.runs(), policy, report, kept)
        found = search(evidence, MUTANTS.values(), before=self.named)
        self.named.update(each.name for each in found if each.explains)
        return explained(report, found)


def _about_its_file(error: InputError, trace: Trace) -> str:
    return f"its file: {str(error).removeprefix(f'{trace.path}: ')}"


def reason_of(report: Report) -> str:
    """The reason of the first wrong step; without one, the headline after its verdict."""
    check = report.check(*report.first_wrong) if report.first_wrong is not None else None
    return report.headline.partition(": ")[2] if check is None else check.reason


def worst_errors(report: Report) -> dict[str, float]:
    """Per step, in order of computation, the largest error over the allowed one. NaN counts as the largest.

    A check that did not fail counts as at most 1. It may have passed by a second reading of its input, and its own
    error belongs to the first.
    """
    worst: dict[str, float] = {}
    for check in report.checks:
        if check.step in INTEGERS:
            continue  # a choice has no size of error
        before, now = worst.get(check.step, 0.0), check.worst_error
        if check.verdict != FAIL:
            now = min(now, 1.0)
        worst[check.step] = math.nan if math.isnan(before) or math.isnan(now) else max(before, now)
    return {step: worst[step] for step in EVERY_TAP if step in worst}


@dataclass(frozen=True)
class Suite:
    """The cases and dtypes that an engine is held against."""

    cases: Sequence[Case]
    """The cases to run."""
    smoke: Sequence[Case]
    """The cases among which the smoke test chooses."""
    dtypes: Sequence[str] = ()
    """The dtypes to run; empty: all that the harness has."""
    policies: Mapping[str, Policy] = field(default_factory=dict)
    """Per dtype a policy in place of the one that the harness declares."""
    judge: Judge = field(default_factory=Judge)
    keep: Path | None = None
    """A folder for the traces that come back."""
    fresh: int | None = None
    """The seed by which the cases got other weights and tokens; None: they are the suite's own."""
    before: Results | None = None
    """The results of a run of the same suite that was ended: its outcomes are kept."""

    def labels(self, case: Case, policy: Policy) -> Labels:
        """The names in the header of a trace. Weights of another seed make it a trace of no golden case."""
        return Labels(case.name if self.fresh is None else f"{case.name} fresh {self.fresh}", policy.name)


@dataclass(frozen=True)
class Watch:
    """The functions that are called while a run goes on."""

    log: Log = lambda *_: None
    """After each outcome."""
    save: Callable[[Results], None] = lambda _: None
    """After each outcome, with the results so far."""


UNFINISHED = "the run has not come to its end: only the outcomes so far are here"
"""The note of results that are written meanwhile."""


def conform(harness: Harness, options: Mapping[str, str], suite: Suite, watch: Watch = Watch()) -> Results:
    """Run a suite on a harness that has been started, then end the harness.

    options: further identification of the engine, such as the options of its adapter.   watch: called meanwhile
    Whatever the engine does in a case is an outcome of that case.
    Raises HarnessUnusable where the smoke test finds the harness itself broken, InputError where it lacks a dtype.
    """
    described = harness.description
    with ended(harness):
        policies = chosen_policies(described, suite)
        with places() as folders, ended(harness):
            smoke = smoke_test(harness, suite.smoke, next(iter(policies)), folders)
            results = Results(
                engine=Engine(described.name, described.version, options),
                platform={"system": platform.system(), "machine": platform.machine()},
                refmoe=__version__,
                significance=suite.judge.significance,
                cases={case.name: case.digest for case in suite.cases},
                smoke=smoke,
                outcomes=(),
                notes=(UNFINISHED,),
                fresh=suite.fresh,
                wider=tuple(dtype for dtype, policy in policies.items() if is_wider(policy, dtype)),
            )
            done = {} if suite.before is None else outcomes_so_far(suite.before, results, policies)
            order = [(case.name, dtype) for case in suite.cases for dtype in policies]

            def finish(answer: Answer) -> None:
                outcome = answer.judged()
                place = outcome.case, outcome.dtype
                if given_up.is_set():
                    return
                if place not in done:
                    done[place] = outcome
                    so_far = tuple(done[each] for each in order if each in done)
                    watch.save(replace(results, outcomes=so_far))
                watch.log(outcome, answer.said if outcome.failed else "")

            # the engine runs the next case while this one is judged
            last: Future[None] | None = None
            given_up = Event()
            try:
                for answer in _Run(harness, suite, policies, folders).answers(done):
                    if last is not None:
                        last.result()
                    last = in_background(partial(finish, answer))
                if last is not None:
                    last.result()
            finally:
                if last is not None:
                    wait([last], LAST_VERDICT)
                given_up.set()
            results = replace(results, outcomes=tuple(done[place] for place in order))
            note = harness.stop()
    return replace(results, notes=(*([] if note is None else [note]), *golden_bits_notes(results)))


def outcomes_so_far(before: Results, now: Results, policies: Mapping[str, Policy]) -> dict[tuple[str, str], Outcome]:
    """The outcomes of a run that was ended, by case and dtype.

    now: the results of the run that goes on, without outcomes.   policies: those of the run that goes on, per dtype.
    Outcomes of two runs do not make one result: raises InputError that names the difference.
    """
    alike = {
        "engine": (before.engine.name, now.engine.name),
        "version": (before.engine.version, now.engine.version),
        "options": (before.engine.options, now.engine.options),
        "platform": (before.platform, now.platform),
        "version of refmoe": (before.refmoe, now.refmoe),
        "significance": (before.significance, now.significance),
        "seed of fresh cases": (before.fresh, now.fresh),
        "cases": (before.cases, now.cases),
    }
    for what, (then, this) in alike.items():
        if then != this:
            differ = "" if what == "cases" else f", {shown(then)} and {shown(this)}"
            raise InputError(f"--resume: the results so far and this run differ by their {what}{differ}")
    for each in before.outcomes:
        if each.dtype not in policies:
            raise InputError(f"--resume: the results so far have outcomes in {each.dtype}, which this run leaves out")
        if each.policy != policies[each.dtype].name:
            raise InputError(
                f"--resume: the results so far judge {each.dtype} by {each.policy}, and this run by "
                f"{policies[each.dtype].name}"
            )
    return {(each.case, each.dtype): each for each in before.outcomes}


@contextmanager
def ended(harness: Harness) -> Iterator[None]:
    """End a harness before the folders are removed to which it may be writing."""
    try:
        yield
    finally:
        harness.kill()


def chosen_policies(described: Description, suite: Suite) -> dict[str, Policy]:
    """The policy of each dtype to be run. Raises InputError for a dtype that the harness lacks."""
    for dtype in (*suite.dtypes, *suite.policies):
        if dtype not in described.dtypes:
            raise InputError(
                f"dtype {dtype}: {described.name} {described.version} does not have it, but one of "
                f"{', '.join(described.dtypes)} was expected"
            )
    return {
        dtype: suite.policies.get(dtype) or named_policy(described.policies.get(dtype, dtype))
        for dtype in suite.dtypes or described.dtypes
    }


@dataclass(frozen=True)
class Answer:
    """The answer of an engine to one case at a dtype."""

    judged: Callable[[], Outcome]
    """Judges it. Raises no Exception, whatever the engine has done."""
    said: str = ""
    """The end of the engine's standard error."""


@dataclass(frozen=True)
class _Run:
    """A run of a suite: its settings."""

    harness: Harness
    suite: Suite
    policies: Mapping[str, Policy]
    folders: Places

    def answers(self, done: Mapping[tuple[str, str], Outcome]) -> Iterator[Answer]:
        """The answers to all cases, case by case.   done: outcomes that are kept, by case and dtype"""
        kept = dict(done)
        for case in self.suite.cases:
            known = [kept[case.name, dtype] for dtype in self.policies if (case.name, dtype) in kept]
            yield from map(_known, known)
            yield from self._of_case(case, [dtype for dtype in self.policies if (case.name, dtype) not in kept])

    def _of_case(self, case: Case, dtypes: Sequence[str]) -> Iterator[Answer]:
        """The answers to one case, dtype by dtype."""
        if not dtypes:
            return
        keep = self.suite.keep
        kept = {dtype: None if keep is None else kept_file(keep, case.name, dtype) for dtype in dtypes}
        skipped = {
            dtype: Outcome(case=case.name, dtype=dtype, policy=self.policies[dtype].name, verdict=SKIPPED, reason="")
            for dtype in dtypes
        }
        lacking = lacks(case.runs(), self.harness.description.abilities)
        if lacking is not None:
            yield from (_known(replace(each, reason=lacking)) for each in skipped.values())
            return
        with Materialised(case, self.folders.engine, self.harness.description.layout) as model:
            for dtype, outcome in skipped.items():
                yield self._answer(model, outcome, kept[dtype])

    def _answer(self, model: Materialised, skipped: Outcome, kept: Path | None) -> Answer:
        """The answer to a case at a dtype. Raises no Exception, whatever the engine does."""
        dtype, policy = skipped.dtype, self.policies[skipped.dtype]
        labels = self.suite.labels(model.case, policy)
        files = ExitStack()  # the engine's file is there until it has been judged
        try:
            received = files.enter_context(run_case(self.harness, model, dtype, labels, self.folders.own, kept))
        except Refused as refused:
            return _known(replace(skipped, reason=refused.reason, issue=refused.issue))
        except HarnessError as error:
            return _known(replace(skipped, verdict=error.kind, reason=error.reason), self.harness.log)
        except Exception as error:  # of whatever kind: no case ends the run
            return _known(_not_judged(skipped, error), self.harness.log)

        def judged() -> Outcome:
            try:
                with files:
                    outcome = self.suite.judge.judge(model.case, model.parameters, dtype, received.trace, policy)
                    if self.suite.fresh is None and outcome.verdict != BROKEN:
                        outcome = replace(outcome, golden_bits=has_golden_bits(received.trace, model.case))
                return replace(outcome, reason=outcome.reason + received.unkept)
            except Exception as error:  # of whatever kind: no verdict about one case ends the run
                return _not_judged(skipped, error)

        return Answer(judged, self.harness.log)


def _known(outcome: Outcome, said: str = "") -> Answer:
    """An answer whose outcome needs no judgement."""
    return Answer(lambda: outcome, said)


def _not_judged(skipped: Outcome, error: Exception) -> Outcome:
    return replace(skipped, verdict=CANNOT_JUDGE, reason=f"refmoe could not judge it: {in_words(error)}")


def in_words(error: Exception) -> str:
    """An error in words that another run gives again: without the names of temporary folders."""
    if isinstance(error, InputError):
        return without_folders(one_line(error), {})
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return without_folders(f"{type(error).__name__}: {one_line(error)}", {})


# ---- the smoke test


def smoke_test(harness: Harness, cases: Sequence[Case], dtype: str, folders: Places) -> str:
    """Find faults of the harness itself, before anything is said about its engine.

    The smallest case is run twice. Both files must have every promised tap, in shapes that fit the model, and the same
    dtypes. Values are not looked at. An engine that refuses the case, reports an error or dies proves nothing about
    its harness. Then the next larger case is tried, up to `TRIED`; the suite finds out the rest.

    returns: in words, what was run.   Raises HarnessUnusable with the fault of the harness.
    """
    able = [case for case in cases if lacks(case.runs(), harness.description.abilities) is None]
    said = "nothing: no case needs only the abilities of the harness"
    for case in sorted(able, key=work)[:TRIED]:
        what = f"case {case.name} in {dtype}"
        try:
            with Materialised(case, folders.engine, harness.description.layout) as model:
                if _form(harness, model, dtype, folders.own) != _form(harness, model, dtype, folders.own):
                    raise HarnessUnusable(f"the harness is broken: {what}, run twice, gave other dtypes", harness.log)
            return f"{what}, twice"
        except Refused as refused:
            said = f"nothing: {what} was skipped: {refused.reason}"
        except HarnessError as error:
            if error.kind != CRASHED:
                raise HarnessUnusable(f"the harness is broken: {what}: {error.reason}", harness.log) from None
            said = f"nothing: {what} crashed: {error.reason}"
        except HarnessUnusable:
            raise
        except Exception as error:  # of whatever kind: the suite finds out the rest
            said = f"nothing: refmoe could not look at {what}: {in_words(error)}"
    return said


def _form(harness: Harness, model: Materialised, dtype: str, own: Scratch) -> dict[str, str]:
    """Run a case; the dtype of each key of its file. Raises HarnessUnusable where a shape does not fit the model."""
    case = model.case
    with run_case(harness, model, dtype, Labels(case.name, dtype), own) as received:
        trace = received.trace
        try:
            take_in(trace, case.config, case.runs())
        except InputError as error:
            raise HarnessUnusable(
                f"the harness is broken: case {case.name} in {dtype}: {_about_its_file(error, trace)}", harness.log
            ) from None
        return {key: tensor.dtype for key, tensor in trace.tensors.items()}


def work(case: Case) -> tuple[int, str]:
    """The size of a case, parameters times tokens, and its name: a key for sorting."""
    return total_parameters(case.config) * sum(len(run.tokens) for run in case.runs()), case.name
