# SPDX-License-Identifier: Apache-2.0
"""The conformance run: first a smoke test of the harness, then every case at every dtype, and a verdict on each."""

from __future__ import annotations

import platform
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Lock
from time import monotonic
from typing import TypeVar

from refmoe import __version__
from refmoe.engines.harness import Description, Harness, HarnessUnusable, Refused, end
from refmoe.engines.judge import Judge, Question, Seat, about_its_file, in_words, not_judged, seats
from refmoe.engines.observations import golden_bits_notes, is_wider
from refmoe.engines.process import CRASHED, HarnessError
from refmoe.engines.quantised import Quantised
from refmoe.engines.results import SKIPPED, Engine, Outcome, Results
from refmoe.engines.run_case import Labels, Materialised, Places, kept_file, lacks, places, run_case
from refmoe.errors import InputError
from refmoe.files.scratch import Scratch
from refmoe.files.sentences import shown
from refmoe.parallel import in_background
from refmoe.profiles.load import policy as named_policy
from refmoe.profiles.policy import Policy
from refmoe.suite import Case
from refmoe.suite.fresh import label
from refmoe.suite.work import work
from refmoe.verifier.intake import take_in

LAST_VERDICT = 2.0
"""Seconds in which the last answer may still be judged when a signal ends the run."""
HELD = 1 << 26
"""The most bytes of values that may wait for their verdict. One answer more may always wait."""
TRIED = 3
"""The smoke test tries this many cases, the smallest for which the harness has the abilities."""

Returned = TypeVar("Returned")
Log = Callable[[Outcome, str], None]
"""Called with each outcome and, where the harness has failed, the end of its standard error."""


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
    quantised: Quantised | None = None
    """How the weights of all cases are quantised; None: they are as the cases have them."""
    before: Results | None = None
    """The results of a run of the same suite, or of a part of it: its outcomes are kept."""

    def labels(self, case: Case, policy: Policy) -> Labels:
        """The names in the header of a trace. Quantised weights make it a trace of no golden case."""
        name = label(case.name, self.fresh)
        return Labels(name if self.quantised is None else f"{name} as {self.quantised.form}", policy.name)


@dataclass(frozen=True)
class Watch:
    """The functions that are called while a run goes on."""

    log: Log = lambda *_: None
    """After each outcome."""
    save: Callable[[Results], None] = lambda _: None
    """After each outcome, in another thread, with the results so far: one call for outcomes that come during a call."""


UNFINISHED = "the run has not come to its end: only the outcomes so far are here"
"""The note of results that are written meanwhile."""


def conform(
    harness: Harness,
    options: Mapping[str, str],
    suite: Suite,
    watch: Watch = Watch(),
    executor: str | None = None,
) -> Results:
    """Run a suite on a harness that has been started, then end the harness.

    options: further identification of the engine, such as the options of its adapter.   watch: called meanwhile
    executor: judges cases, as `parse_executor` reads it, and gives the number of engines that run side by side, as in
        `seats`; None: one engine, and this process
    Whatever the engine does in a case is an outcome of that case.
    Raises HarnessUnusable where the smoke test finds the harness itself broken, InputError where it lacks a dtype.
    """
    described = harness.description
    with ended([harness]):
        policies = chosen_policies(described, suite)
        with (
            places() as folders,
            seats(suite.judge, executor, len(suite.cases)) as judges,
            ended([harness]),
            more(harness, len(judges) - 1) as others,
        ):
            smoke = smoke_test(harness, suite, next(iter(policies)), folders)
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
                quantised="" if suite.quantised is None else suite.quantised.form,
                wider=tuple(dtype for dtype, policy in policies.items() if is_wider(policy, dtype)),
            )
            done = {} if suite.before is None else outcomes_so_far(suite.before, results, policies)
            order = [(case.name, dtype) for case in suite.cases for dtype in policies]
            lanes = [
                _Lane(arriving, partial(_Run, suite=suite, policies=policies, folders=folders, seat=seat))
                for arriving, seat in zip([_over(harness), *others], judges, strict=True)
            ]
            finish = _Finish(watch, results, order, done)
            try:
                _go(lanes, suite.cases, finish)
            finally:
                wait([finish.saved], LAST_VERDICT)
            finish.saved.result()
            results = replace(results, outcomes=tuple(done[place] for place in order))
            notes = dict.fromkeys(note for each in lanes if (note := each.stop()) is not None)
    return replace(results, notes=(*notes, *golden_bits_notes(results)))


@contextmanager
def more(harness: Harness, count: int) -> Iterator[list[Future[Harness]]]:
    """More processes of a harness, which start in the background. They are ended, even where they start later."""
    started = [in_background(harness.another) for _ in range(count)]
    try:
        yield started
    finally:
        for each in started:
            each.add_done_callback(end)


class _Finish:
    """Keeps outcomes as they come, whichever thread has judged them."""

    def __init__(
        self,
        watch: Watch,
        results: Results,
        order: Sequence[tuple[str, str]],
        done: dict[tuple[str, str], Outcome],
    ) -> None:
        """results: of the run, without outcomes   order: all places, case and dtype   done: gets the outcomes"""
        self._watch, self._results, self._order, self._done = watch, results, order, done
        self.known = dict(done)
        """The outcomes that there were at the start."""
        self.given_up = Event()
        """Set when the run ends: later outcomes are dropped."""
        self._one = Lock()
        self._newest = results
        self.saved: Future[None] = _over(None)
        """Ends when all outcomes so far are saved. The next answer is judged meanwhile: a disk may be slow."""

    def __call__(self, answer: Answer) -> None:
        """Judge an answer, and keep the outcome."""
        outcome = answer.judged()
        place = outcome.case, outcome.dtype
        with self._one:
            if self.given_up.is_set():
                return
            if place not in self._done:
                self._done[place] = outcome
                so_far = tuple(self._done[each] for each in self._order if each in self._done)
                self._newest = replace(self._results, outcomes=so_far)
                if self.saved.done():
                    self.saved.result()  # raises what ended it, such as a full disk
                self.saved = in_background(partial(self._save, self.saved, self._newest))
            self._watch.log(outcome, answer.said if outcome.failed else "")

    def _save(self, before: Future[None], results: Results) -> None:
        """Save results when those before are saved, unless there are newer ones by then."""
        before.result()
        if results is self._newest:
            self._watch.save(results)


def _over(result: Returned) -> Future[Returned]:
    """A call that has ended, as those in the background are given."""
    future: Future[Returned] = Future()
    future.set_result(result)
    return future


@dataclass(frozen=True)
class _Lane:
    """An engine with its judge. It takes cases as soon as the engine has started."""

    arriving: Future[Harness]
    begin: Callable[[Harness], _Run]

    def go(self, cases: SimpleQueue[Case], finish: _Finish) -> None:
        """Run cases. Raises what the engine raises where it does not start."""
        _go_one(self.begin(self.arriving.result()), cases, finish)

    @property
    def engine(self) -> Harness | None:
        """The engine if it has started."""
        return self.arriving.result() if self.arriving.done() and self.arriving.exception() is None else None

    def kill(self) -> None:
        """End the engine if it has started."""
        if self.engine is not None:
            self.engine.kill()

    def stop(self) -> str | None:
        """Ask the engine to end if it has started.   returns: a sentence about an irregular end, or None"""
        return None if self.engine is None else self.engine.stop()


def _go(lanes: Sequence[_Lane], chosen: Sequence[Case], finish: _Finish) -> None:
    """Run the cases on all engines. Each takes the next case as soon as it is free."""
    cases: SimpleQueue[Case] = SimpleQueue()
    # the longest first, so that no engine is left alone with one at the end
    for case in chosen if len(lanes) == 1 else sorted(chosen, key=work, reverse=True):
        cases.put(case)
    if len(lanes) == 1:
        try:
            lanes[0].go(cases, finish)
        finally:
            finish.given_up.set()
        return
    going = [in_background(partial(each.go, cases, finish)) for each in lanes]
    try:
        for each in as_completed(going):
            each.result()
    finally:
        finish.given_up.set()
        last = monotonic() + LAST_VERDICT
        while wait(going, 0).not_done and monotonic() < last:
            for lane in lanes:  # one may have started its engine again before it saw the end of the run
                lane.kill()
            wait(going, 0.1)


def _go_one(run: _Run, cases: SimpleQueue[Case], finish: _Finish) -> None:
    """Run cases on one engine. It goes on while answers are judged, one after the other; a few may wait."""
    judging: deque[tuple[Future[None], int]] = deque()
    try:
        for answer in run.answers(cases, finish):
            while judging and (len(judging) >= run.seat.ahead or sum(nbytes for _, nbytes in judging) > HELD):
                judging.popleft()[0].result()
            run.seat.ready()
            before = judging[-1][0] if judging else None
            judging.append((in_background(partial(_in_turn, before, finish, answer)), answer.nbytes))
        for each, _ in judging:
            each.result()
    finally:
        wait([each for each, _ in judging], LAST_VERDICT)


def _in_turn(before: Future[None] | None, finish: _Finish, answer: Answer) -> None:
    """Judge an answer as soon as the one before it has been judged."""
    if before is not None:
        wait([before])
    if not finish.given_up.is_set():
        finish(answer)


def outcomes_so_far(before: Results, now: Results, policies: Mapping[str, Policy]) -> dict[tuple[str, str], Outcome]:
    """The outcomes of a run that was ended, or that had some of the cases, by case and dtype.

    Those of a case that has changed since are left out, so that it is run again.
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
        "quantised weights": (before.quantised, now.quantised),
        "cases": ({*before.cases} - {*now.cases}, set()),
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
    same = {name for name, digest in before.cases.items() if now.cases[name] == digest}
    return {(each.case, each.dtype): each for each in before.outcomes if each.case in same}


@contextmanager
def ended(harnesses: Sequence[Harness]) -> Iterator[None]:
    """End harnesses before the folders are removed to which they may be writing."""
    try:
        yield
    finally:
        for each in harnesses:
            each.kill()


def chosen_policies(described: Description, suite: Suite) -> dict[str, Policy]:
    """The policy of each dtype to be run. Raises InputError for a dtype that the harness lacks."""
    for dtype in (*suite.dtypes, *suite.policies):
        if dtype not in described.dtypes:
            raise InputError(
                f"dtype {dtype}: {described.name} {described.version} does not have it, but one of "
                f"{', '.join(described.dtypes)} was expected"
            )

    def declared(dtype: str) -> Policy:
        name = described.policies.get(dtype, dtype)
        return named_policy(name) if suite.quantised is None else suite.quantised.policy(name, dtype)

    return {dtype: suite.policies.get(dtype) or declared(dtype) for dtype in suite.dtypes or described.dtypes}


@dataclass(frozen=True)
class Answer:
    """The answer of an engine to one case at a dtype."""

    judged: Callable[[], Outcome]
    """Judges it. Raises no Exception, whatever the engine has done."""
    said: str = ""
    """The end of the engine's standard error."""
    nbytes: int = 0
    """The bytes of the values in the engine's file."""


@dataclass(frozen=True)
class _Run:
    """The part that one engine has in a run of a suite."""

    harness: Harness
    suite: Suite
    policies: Mapping[str, Policy]
    folders: Places
    seat: Seat

    def answers(self, cases: SimpleQueue[Case], finish: _Finish) -> Iterator[Answer]:
        """The answers to cases as long as there are any.   finish: knows which outcomes are kept"""
        while not finish.given_up.is_set():
            try:
                case = cases.get_nowait()
            except Empty:
                return
            kept = finish.known
            yield from (_known(kept[case.name, dtype]) for dtype in self.policies if (case.name, dtype) in kept)
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
        layout, quantised = self.harness.description.layout, self.suite.quantised
        with Materialised(case, self.folders.engine, layout, quantised) as model:
            unwritten = "" if quantised is None else _unwritten(model)
            if unwritten:
                yield from (_known(replace(each, reason=unwritten)) for each in skipped.values())
                return
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
            return _known(not_judged(skipped, error), self.harness.log)

        def judged() -> Outcome:
            try:
                with files:
                    golden = self.suite.fresh is None and self.suite.quantised is None
                    asked = Question(
                        case=model.case, dtype=dtype, policy=policy, trace=received.trace, golden=golden,
                        quantised=self.suite.quantised,
                    )  # fmt: skip
                    outcome = self.seat.outcome(asked, lambda: model.parameters)
                return replace(outcome, reason=outcome.reason + received.unkept)
            except Exception as error:  # of whatever kind: no verdict about one case ends the run
                return not_judged(skipped, error)

        nbytes = sum(tensor.nbytes for tensor in received.trace.tensors.values())
        return Answer(judged, self.harness.log, nbytes)


def _known(outcome: Outcome, said: str = "") -> Answer:
    """An answer whose outcome needs no judgement."""
    return Answer(lambda: outcome, said)


def _unwritten(model: Materialised) -> str:
    """Why no quantised checkpoint holds the case, or nothing."""
    try:
        model.path()
    except InputError as error:
        return f"it has no checkpoint in this format: {error}"
    return ""


# ---- the smoke test


def smoke_test(harness: Harness, suite: Suite, dtype: str, folders: Places) -> str:
    """Find faults of the harness itself, before anything is said about its engine.

    The smallest case is run twice. Both files must have every promised tap, in shapes that fit the model, and the same
    dtypes. Values are not looked at. An engine that refuses the case, reports an error or dies proves nothing about
    its harness. Then the next larger case is tried, up to `TRIED`; the suite finds out the rest.

    returns: in words, what was run.   Raises HarnessUnusable with the fault of the harness.
    """
    able = [case for case in suite.smoke if lacks(case.runs(), harness.description.abilities) is None]
    said = "nothing: no case needs only the abilities of the harness"
    tried = 0
    for case in sorted(able, key=lambda each: (work(each), each.name)):
        if tried == TRIED:
            break
        what = f"case {case.name} in {dtype}"
        tried += 1
        try:
            with Materialised(case, folders.engine, harness.description.layout, suite.quantised) as model:
                if suite.quantised is not None and _unwritten(model):
                    tried -= 1
                    continue
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
                f"the harness is broken: case {case.name} in {dtype}: {about_its_file(error, trace)}", harness.log
            ) from None
        return {key: tensor.dtype for key, tensor in trace.tensors.items()}
