# SPDX-License-Identifier: Apache-2.0
"""The judgement of one answer of an engine: in this process, or in another one that gets the answer's bytes."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from numpy.typing import NDArray

from refmoe.engines.first_wrong import first_token
from refmoe.engines.observations import has_golden_bits
from refmoe.engines.process import BROKEN
from refmoe.engines.protocol import EVERY_TAP
from refmoe.engines.quantised import Quantised
from refmoe.engines.results import NOT_JUDGED, Cause, Outcome
from refmoe.engines.run_case import held_parameters, without_folders
from refmoe.errors import InputError
from refmoe.files.numbers import integer
from refmoe.files.reading import read_bytes
from refmoe.files.safetensors_file import DTYPES, RowReader, StoredTensor, View
from refmoe.files.sentences import one_line
from refmoe.parallel import WorkerLost, cluster, open_executor, parse_executor, worker_deaths
from refmoe.profiles.policy import Policy
from refmoe.spec.model import Parameters
from refmoe.suite import Case
from refmoe.suite.overflow import explains_open, overflow
from refmoe.suite.power import with_power
from refmoe.traces.trace import Trace
from refmoe.verifier.findings import CANNOT_JUDGE, FAIL, NOT_CONFORMANT, Report
from refmoe.verifier.intake import INTEGERS
from refmoe.verifier.passes import Pass
from refmoe.verifier.segments import SIGNIFICANCE, Settings
from refmoe.verifier.verify import verify

if TYPE_CHECKING:
    from refmoe.verifier.diagnosis.observed import Recording


@dataclass(frozen=True)
class Question:
    """An answer of an engine, to be judged."""

    case: Case
    dtype: str
    policy: Policy
    trace: Trace
    golden: bool
    """Whether the case has golden values, which the answer may equal."""
    quantised: Quantised | None = None
    """How the weights were quantised that the engine has loaded; None: they were not."""

    @contextmanager
    def weights(self, parameters: Callable[[], Parameters]) -> Iterator[Parameters]:
        """The weights that the engine has loaded.   parameters: gives those of the case"""
        if self.quantised is None:
            yield parameters()
            return
        with self.quantised.weights(self.case) as found:
            yield found


@dataclass(frozen=True)
class Judge:
    """The settings by which traces are judged."""

    significance: float = SIGNIFICANCE
    diagnosing: bool = True
    """Whether failures are explained."""
    named: set[str] = field(default_factory=set, compare=False)
    """The names given so far. The next diagnosis tries them first, because the failures of an engine are alike.

    No verdict depends on them. A name that is found in this way may have no second one beside it.
    """
    passes: Callable[..., Pass] = field(default=Pass, compare=False)
    """Makes the passes of a judgement without a diagnosis, which keeps what it needs of its own."""

    def judge(self, question: Question, parameters: Parameters) -> Outcome:
        """The outcome of a case at a dtype. A trace that cannot come from this model is a broken answer.

        An explanation that fails leaves the verdict as it is.
        """
        outcome = self._verified(question, parameters)
        if question.golden and outcome.verdict != BROKEN:
            outcome = replace(outcome, golden_bits=has_golden_bits(question.trace, question.case))
        return outcome

    def _verified(self, question: Question, parameters: Parameters) -> Outcome:
        from refmoe.verifier.diagnosis import Keeper

        case, dtype, policy, trace = question.case, question.dtype, question.policy, question.trace
        name, config, runs = f"case {case.name}", case.config, case.runs()
        keeper = Keeper()
        settings = Settings(self.significance, passes=keeper if self.diagnosing else self.passes)
        outcome = Outcome(case=case.name, dtype=dtype, policy=policy.name, verdict=BROKEN, reason="")
        try:
            report = verify(trace, name, config, parameters, runs, policy, settings)
            report = with_power(report, trace, config, policy)
        except InputError as error:
            return replace(outcome, reason=about_its_file(error, trace))
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
            token=first_token(report),
            taps=None if report.power is None else report.power.taps,
            worst_errors=worst_errors(report),
            explanations=tuple(
                Cause(name=each.name, kind=each.kind, about=each.about, fix=each.fix, sources=each.sources)
                for each in report.explanations or ()
            ),
        )

    def _diagnosed(
        self, report: Report, case: Case, parameters: Parameters, trace: Trace, policy: Policy, kept: Recording | None
    ) -> Report:
        from refmoe.bugs.quantised.catalogue import known_bugs
        from refmoe.verifier.diagnosis import explained, gather, search

        evidence = gather(trace, case.config, parameters, case.runs(), policy, report, kept)
        found = search(evidence, known_bugs(parameters), before=self.named)
        self.named.update(each.name for each in found if each.explains)
        return explained(report, found)


def about_its_file(error: InputError, trace: Trace) -> str:
    """An error about the file of an answer, without the file's name."""
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


def not_judged(skipped: Outcome, error: Exception) -> Outcome:
    """The outcome where refmoe itself fails."""
    return replace(skipped, verdict=CANNOT_JUDGE, reason=f"refmoe could not judge it: {in_words(error)}")


def in_words(error: Exception) -> str:
    """An error in words that another run gives again: without the names of temporary folders."""
    if isinstance(error, WorkerLost):
        return "the process died that worked on it"
    if isinstance(error, InputError):
        return without_folders(one_line(error), {})
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return without_folders(f"{type(error).__name__}: {one_line(error)}", {})


# ---- in another process


@dataclass(frozen=True)
class SentTensor(StoredTensor):
    """A tensor of a file that is in memory. All tensors of a trace share the bytes."""

    file: bytes = b""

    def map(self) -> NDArray[Any]:
        there = self.dtype in DTYPES and 0 not in self.shape
        return super().get(self.file) if there else super().map()

    def get(self, _file: bytes | None = None) -> NDArray[Any]:
        return self.map()

    def rows_of(self, view: View) -> RowReader:
        return lambda start, stop: view(self.map())[start:stop].copy()


def sent(trace: Trace) -> Trace:
    """The trace with the bytes of its file, for a process that may not see the file. Raises InputError."""
    file = read_bytes(trace.path, "a safetensors file")
    tensors: dict[str, StoredTensor] = {
        key: SentTensor(
            path=each.path, name=each.name, dtype=each.dtype, shape=each.shape, offset=each.offset, file=file
        )
        for key, each in trace.tensors.items()
    }
    return replace(trace, tensors=tensors)


def judge_sent(judge: Judge, question: Question) -> tuple[Outcome, set[str]]:
    """The outcome, and all names given so far. Any process can call it."""
    with question.weights(lambda: recent_parameters(question.case)) as parameters:
        return judge.judge(question, parameters), judge.named


RECENT = 2
"""Cases whose weights a judge in another process keeps: an engine runs the dtypes of a case one after the other."""
_recent: list[tuple[Case, Parameters]] = []


def recent_parameters(case: Case) -> Parameters:
    """The weights of a case, kept for its next dtype."""
    for known, parameters in [*_recent]:
        if known == case:
            return parameters
    made = held_parameters(case)
    _recent[:] = [(case, made), *_recent[: RECENT - 1]]
    return made


class Seat:
    """This process, as the place where answers of an engine are judged. Use it as a context manager."""

    ahead = 4
    """The most answers that are judged, or wait for it, while the engine goes on."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge

    def __enter__(self) -> Seat:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass

    def ready(self) -> None:
        """Make the seat ready for the next answer, in a thread that lasts until it is judged."""

    def outcome(self, question: Question, parameters: Callable[[], Parameters]) -> Outcome:
        """The outcome of an answer.   parameters: gives the weights of the case"""
        with question.weights(parameters) as found:
            return self.judge.judge(question, found)


class SeatElsewhere(Seat):
    """A seat in another process, which is started anew where it dies."""

    ahead = 1  # no answer waits for a process that has died

    def __init__(self, judge: Judge, executor: str | Executor) -> None:
        """executor: one to be opened for this seat, as `parse_executor` reads it, or an open one"""
        super().__init__(judge)
        self._spec = executor if isinstance(executor, str) else ""
        self._open = None if isinstance(executor, str) else executor
        self._stack = ExitStack()

    def __enter__(self) -> SeatElsewhere:
        self.ready()  # it starts during the smoke test
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, at)

    def ready(self) -> None:
        """Start the process, if there is none. Linux ends it with the thread that has started it."""
        if self._open is None:
            self._open = self._stack.enter_context(open_executor(self._spec))
            self._open.submit(int)

    def outcome(self, question: Question, _parameters: Callable[[], Parameters]) -> Outcome:
        """The outcome of an answer. Raises WorkerLost where the process dies that judges it."""
        assert self._open is not None
        work = replace(self.judge, named={*self.judge.named}), replace(question, trace=sent(question.trace))
        try:
            with worker_deaths():
                outcome, named = self._open.submit(judge_sent, *work).result()
        except WorkerLost:
            if self._spec:
                self._open = None
                self._stack.close()
            raise
        self.judge.named.update(named)
        return outcome


def engines(executor: str | None, most: int) -> int:
    """How many engines run side by side: one per worker of the executor, on a cluster at most one per core.

    executor: as `parse_executor` reads it; None: one engine.   most: the most that are of use
    Raises InputError where a cluster does not answer.
    """
    if executor is None:
        return 1
    kind, rest = parse_executor(executor)
    workers = cores = os.cpu_count() or 1
    if kind == "dask":
        with cluster(rest) as client:
            workers = min(len(client.nthreads()), cores)
    elif rest:
        workers = integer(rest) or cores
    return max(1, min(workers, most))


@contextmanager
def seats(judge: Judge, executor: str | None, most: int) -> Iterator[list[Seat]]:
    """A seat for each of the `engines`.

    executor: as `parse_executor` reads it; None: one seat, in this process.   most: the most seats that are of use
    Raises InputError where a cluster does not answer.
    """
    if executor is None:
        yield [Seat(judge)]
        return
    count, where = engines(executor, most), cast("str | Executor", "processes:1")
    kind, rest = parse_executor(executor)
    with ExitStack() as stack:
        if kind == "dask":
            where = stack.enter_context(cluster(rest)).get_executor(pure=False)
        yield [stack.enter_context(SeatElsewhere(judge, where)) for _ in range(count)]
