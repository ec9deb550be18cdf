# SPDX-License-Identifier: Apache-2.0
"""Engines side by side, judged in other processes: the outcomes of one engine, in the same order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from queue import Empty
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest

from refmoe.engines.conform import Suite, Watch, conform
from refmoe.engines.conform import _go as run_on
from refmoe.engines.harness import Harness, HarnessUnusable
from refmoe.engines.judge import Judge, Question, Seat, recent_parameters
from refmoe.engines.results import Outcome, Results, read_results
from refmoe.spec.model import Parameters
from refmoe.verifier.findings import CANNOT_JUDGE, CONFORMANT
from tests.clusters import cluster
from tests.command_line import Refmoe
from tests.engines.running import HONEST, LIMIT, case_named, hostile, says
from tests.engines.test_ends import alive, judged, linux, wait_for

ROOT = Path(__file__).parents[2]
CASES = ("one-pair", "top-1", "window-1")


def ran(
    command: list[str], executor: str | None, judge: Judge | None = None, cases: tuple[str, ...] = CASES
) -> tuple[Results, list[tuple[str, str]]]:
    """The results, and the outcomes in the order in which they came."""
    seen: list[tuple[str, str]] = []

    def log(outcome: Outcome, _said: str) -> None:
        seen.append((outcome.case, outcome.dtype))

    suite = Suite([case_named(name) for name in cases], [case_named("window-1")], judge=judge or Judge())
    return conform(Harness(command, LIMIT), {}, suite, Watch(log), executor), seen


class Counting(Harness):
    """A harness that counts its answers."""

    answered = 0

    def run(self, *arguments: Any) -> None:
        super().run(*arguments)
        self.answered += 1


class Slow(Judge):
    """A judge who waits, with the first verdict, until the engine has answered so often in all."""

    harness: Counting
    awaited: int
    reached: bool | None = None

    def judge(self, question: Question, parameters: Parameters) -> Outcome:
        if self.reached is None:
            wait_for(lambda: self.harness.answered >= self.awaited)
            self.reached = True
        return super().judge(question, parameters)


def test_the_engine_goes_on_while_answers_wait_for_their_verdict() -> None:
    judge = Slow()
    judge.harness = harness = Counting(HONEST, LIMIT)
    smoke = 2
    judge.awaited = smoke + Seat.ahead + 1  # the one that no longer fits waits in its thread
    seen: list[tuple[str, str]] = []
    suite = Suite([case_named(name) for name in CASES], [case_named("window-1")], judge=judge)
    results = conform(harness, {}, suite, Watch(lambda outcome, _: seen.append((outcome.case, outcome.dtype))))
    assert judge.reached
    assert seen == [(each.case, each.dtype) for each in results.outcomes]
    assert len(seen) >= Seat.ahead + 1


def test_a_large_answer_lets_no_other_one_wait_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refmoe.engines.conform.HELD", 0)
    judge = Slow()
    judge.harness = harness = Counting(HONEST, LIMIT)
    smoke, answered = 2, []
    judge.awaited = smoke + 2  # one is judged, and the next one has been given
    right = Judge.judge

    def after_a_while(self: Judge, question: Question, parameters: Parameters) -> Outcome:
        if not answered:
            time.sleep(0.5)
            answered.append(harness.answered)
        return right(self, question, parameters)

    monkeypatch.setattr(Judge, "judge", after_a_while)
    suite = Suite([case_named(name) for name in CASES], [case_named("window-1")], judge=judge)
    conform(harness, {}, suite)
    assert answered == [judge.awaited]


@pytest.fixture(scope="module")
def two() -> Iterator[str]:
    with cluster(2) as (address, _):
        yield f"dask:{address}"


@pytest.mark.parametrize("way", ["", "rounds_to_bfloat16", "exits"])
def test_the_results_are_those_of_one_engine(way: str) -> None:
    """Also where the engine is wrong, dies or breaks its answer in one case."""
    command = hostile(way, "top-1") if way else HONEST
    alone, _ = ran(command, None)
    both, seen = ran(command, "processes:2")
    assert both == alone
    assert sorted(seen) == sorted((each.case, each.dtype) for each in alone.outcomes)
    verdicts = {each.verdict for each in alone.outcomes}
    assert verdicts == {CONFORMANT} if not way else len(verdicts) == 2


@pytest.mark.parametrize(("count", "first"), [(1, "one-pair"), (2, "mini-8x7b")])
def test_several_engines_begin_with_the_longest_case(count: int, first: str) -> None:
    """None is left alone with it at the end."""

    class Lane:
        def go(self, cases: Any, _finish: Any) -> None:
            with suppress(Empty):
                while True:
                    begun.append(cases.get_nowait().name)

    begun: list[str] = []
    chosen = [case_named(name) for name in ("one-pair", "mini-8x7b", "top-1")]
    lanes: Any = [Lane() for _ in range(count)]
    run_on(lanes, chosen, SimpleNamespace(given_up=Event()))
    assert begun[0] == first
    assert sorted(begun) == sorted(each.name for each in chosen)


def test_the_weights_of_a_case_are_made_once_for_its_dtypes() -> None:
    first, second, third = (case_named(name) for name in CASES)
    made = [recent_parameters(case) for case in (first, case_named(CASES[0]), second, first, third, first)]
    assert made[0] is made[1] is made[3]
    assert len({*map(id, made)}) == 4  # those of the first case are made again after two others
    assert made[0].embedding.read() is made[0].embedding.read()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["", "rounds_to_bfloat16"])
def test_a_cluster_gives_the_results_of_this_process(way: str, two: str) -> None:
    command = hostile(way, "top-1") if way else HONEST
    assert ran(command, two)[0] == ran(command, None)[0]


class Deadly(Judge):
    """Ends the process that judges one case."""

    def judge(self, question: Question, parameters: Parameters) -> Outcome:
        if question.case.name == "top-1" and multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().judge(question, parameters)


def test_a_process_that_dies_costs_one_verdict() -> None:
    """The engine is not accused of it, and the next answers have a new process."""
    alone, (found, _) = ran(HONEST, None)[0], ran(HONEST, "processes:2", Deadly())
    for right, outcome in zip(alone.outcomes, found.outcomes, strict=True):
        if outcome.case == "top-1":
            assert outcome.verdict == CANNOT_JUDGE
        else:
            assert outcome == right


def test_an_engine_that_describes_itself_otherwise_is_refused(tmp_path: Path) -> None:
    """The second process has another version."""
    place = tmp_path / "started"
    script = (
        f"import sys, os; sys.path.insert(0, {str(ROOT)!r}); from tests.engines.harnesses import honest\n"
        f"try:\n    os.close(os.open({str(place)!r}, os.O_CREAT | os.O_EXCL)); version = '1'\n"
        "except FileExistsError:\n    version = '2'\n"
        "def answer(request):\n    found = honest.answer(request)\n"
        "    return {**found, 'version': version} if request['command'] == 'start' else found\n"
        "honest.converse(answer)"
    )
    with pytest.raises(Exception, match="describes itself in another way"):
        ran([sys.executable, "-c", script], "processes:2")


HANGS = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from tests.engines.harnesses import honest

def answer(request):
    if request["command"] == "load":
        if not loads and not hung:  # only the engine of the smoke test loads before the other one
            hung.append(os.path.exists(sys.argv[2]))
            open(sys.argv[2], "w").close()
        if hung[0]:
            open(sys.argv[1], "w").write("here")
            time.sleep(600)
        while len(loads) == 2 and not os.path.exists(sys.argv[1]):  # after the smoke test
            time.sleep(0.01)
        loads.append(request)
    return honest.answer(request)

loads, hung = [], []
honest.converse(answer)
"""

MEETS = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from tests.engines.harnesses import honest

open(os.path.join(sys.argv[1], str(os.getpid())), "w").close()
while len(os.listdir(sys.argv[1])) < 2:
    time.sleep(0.01)
honest.converse(honest.answer)
"""
"""A harness that starts only beside another one."""


@linux
def test_more_engines_start_at_the_same_time(tmp_path: Path) -> None:
    script, place, marker = tmp_path / "meets.py", tmp_path / "started", f"REFMOE_MEETS_{os.getpid()}"
    script.write_text(MEETS)
    place.mkdir()
    harness = Harness([sys.executable, str(script), str(place)], LIMIT, {marker: "1"}, more=1)
    try:
        other = harness.another()
        assert len([*place.iterdir()]) == 2
        third = harness.another()
        assert len([*place.iterdir()]) == 3
        for each in (other, third):
            assert each.stop() is None
    finally:
        harness.kill()
    wait_for(lambda: not alive(marker))


@linux
@pytest.mark.parametrize("usable", [True, False])
def test_engines_that_are_not_asked_for_are_ended(usable: bool) -> None:
    marker = f"REFMOE_SPARE_{os.getpid()}_{usable}"
    if usable:
        Harness(HONEST, LIMIT, {marker: "1"}, more=2).kill()
    else:
        with pytest.raises(HarnessUnusable):
            Harness(says("nonsense", rest="time.sleep(600)"), LIMIT, {marker: "1"}, more=2)
    wait_for(lambda: not alive(marker))


@linux
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_ends_all_engines_and_judges(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "hangs.py").write_text(HANGS)
    (tmp_path / "tmp").mkdir()
    hung, out, marker = tmp_path / "hung", tmp_path / "out.json", f"REFMOE_SIDE_{os.getpid()}_{number}"
    command = [sys.executable, "-m", "refmoe", "conform", "--case", "top-1", "--case", "window-1", "--dtype", "float32"]
    command += ["--executor", "processes:2", "--out", str(out), "--"]
    command += [sys.executable, str(tmp_path / "hangs.py"), str(hung), str(tmp_path / "first")]
    variables = {**os.environ, "TMPDIR": str(tmp_path / "tmp"), marker: "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=variables, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(lambda: hung.exists() and bool(hung.read_text()) and judged(out) == 1)
    assert len(alive(marker)) >= 6, "the command, two guards, two harnesses and a judge"
    process.send_signal(number)
    _, err = process.communicate(timeout=LIMIT)
    wait_for(lambda: not alive(marker))
    assert b"Traceback" not in err
    if number == signal.SIGTERM:
        assert process.returncode == 128 + number
    if number != signal.SIGKILL:
        assert not [*(tmp_path / "tmp").iterdir()]
    assert [each.verdict for each in read_results(out).outcomes] == [CONFORMANT]


def test_the_command_takes_an_executor(refmoe: Refmoe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = ("conform", "--case", "window-1", "--case", "top-1", "--dtype", "float32", "--executor")
    status, said, _ = refmoe(*words, "processes:2", "--", *HONEST)
    assert status == 0
    assert "2 outcomes: 2 conformant" in said
    status, said, err = refmoe(*words, "threads", "--", *HONEST)
    assert (status, said) == (2, "")
    assert "threads" in err
