# SPDX-License-Identifier: Apache-2.0
"""Harnesses that misbehave: the case gets a verdict, and the run goes on."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from refmoe.engines.harness import HarnessUnusable
from refmoe.engines.process import GRACE, KEPT, HarnessError, Process
from refmoe.engines.results import Results
from refmoe.errors import InputError
from refmoe.verifier.findings import CONFORMANT
from tests.engines.harnesses.hostile import BROKEN, CRASHED, ENDS, HOSTILE, TIMED_OUT
from tests.engines.running import LIMIT, hostile, ran, says

SHORT = 8.0
"""Seconds for tests that wait for the limit."""


def outcome(results: Results, case: str) -> tuple[str, str]:
    (found,) = [each for each in results.outcomes if each.case == case]
    return found.verdict, found.reason


@pytest.mark.parametrize("name", HOSTILE)
def test_each_is_a_verdict_for_its_case_and_the_next_case_is_judged(name: str) -> None:
    limit = SHORT if HOSTILE[name].verdict == TIMED_OUT else LIMIT
    results, logs = ran(hostile(name, "top-1"), "top-1", "window-1", limit=limit)
    verdict, reason = outcome(results, "top-1")
    assert verdict == HOSTILE[name].verdict, reason
    assert HOSTILE[name].words in reason
    assert "/tmp" not in reason, "the reason would be another one next time"
    assert outcome(results, "window-1")[0] == CONFORMANT
    assert all(len(log.encode()) <= KEPT for log in logs.values())


def test_a_harness_that_hangs_is_killed_with_all_it_started(tmp_path: Path) -> None:
    """A child that ignores signals and holds the pipes dies with it, without delay."""
    pid = tmp_path / "pid"
    rest = f"""
import signal
sys.stdin.readline()
child = os.fork()
if not child:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    open({str(pid)!r}, "w").write(str(os.getpid()))
    time.sleep(600)
while not os.path.exists({str(pid)!r}) or not open({str(pid)!r}).read():
    time.sleep(0.01)
os._exit(7)
"""
    process, before = Process(says(rest=rest)), time.monotonic()
    with pytest.raises(HarnessError, match="ended with status 7") as raised:
        process.ask({"command": "start"}, LIMIT)
    process.kill()
    assert raised.value.kind == CRASHED
    assert time.monotonic() - before < LIMIT / 2
    assert ended(int(pid.read_text()))


def ended(pid: int) -> bool:
    """Whether a process is gone, or is a zombie that only waits for its parent."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("name", ENDS)
def test_an_odd_end_is_a_note(name: str) -> None:
    results, _ = ran(hostile(name, "*"), "window-1")
    assert outcome(results, "window-1")[0] == CONFORMANT
    assert len(results.notes) == 1
    assert ENDS[name] in results.notes[0]


def test_what_a_crash_leaves_on_standard_error_is_kept() -> None:
    process = Process(says(rest="sys.stderr.write('x' * 100_000 + 'the last words'); sys.exit(2)"))
    with pytest.raises(HarnessError):
        process.ask({"command": "start"}, LIMIT)
    process.kill()
    assert process.errors.endswith("xxx" + "the last words")
    assert len(process.errors) == KEPT


def test_a_harness_that_does_not_read_does_not_block_us() -> None:
    """The request is longer than a pipe's buffer."""
    process = Process(says(rest="time.sleep(600)"))
    with pytest.raises(HarnessError, match=r"no answer to run within 0\.5 seconds") as raised:
        process.ask({"command": "run", "runs": ["x" * 1_000_000]}, 0.5)
    assert raised.value.kind == TIMED_OUT
    process.kill()


def test_a_line_before_it_is_asked_is_no_answer() -> None:
    process = Process(says(rest="print('{}', flush=True); print('now', file=sys.stderr, flush=True); time.sleep(600)"))
    deadline = time.monotonic() + LIMIT
    while "now" not in process.errors and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(HarnessError, match="before it was asked to load") as raised:
        process.ask({"command": "load"}, LIMIT)
    assert raised.value.kind == BROKEN
    process.kill()


def test_kill_may_be_called_twice() -> None:
    process = Process(says())
    process.kill()
    process.kill()
    assert not process.lives


# ---- start


START = {
    "crashes": (
        says(rest="sys.stdin.readline(); sys.exit('no GPU')"),
        "ended with status 1 before it answered to start",
    ),
    "rubbish": (says("hello"), "is not a line of JSON"),
    "another protocol": (says('{"protocol": "2"}'), "'name' is missing"),
    "its own error": (says('{"error": "no GPU"}'), "its own error at start: no GPU"),
    "two lines": (says("{}\n{}"), "more than one line"),
    "nothing": (says(rest="pass"), "ended with status 0"),
}


@pytest.mark.parametrize("name", START)
def test_a_harness_that_does_not_start_is_one_sentence(name: str) -> None:
    command, words = START[name]
    with pytest.raises(HarnessUnusable, match="harness cannot be used: ") as raised:
        ran(command, "window-1")
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_its_last_words_are_kept_when_it_does_not_start() -> None:
    with pytest.raises(HarnessUnusable) as raised:
        ran(START["crashes"][0], "window-1")
    assert raised.value.log == "no GPU"


def test_a_hang_at_start_ends() -> None:
    with pytest.raises(HarnessUnusable, match=r"no answer to start within 0\.5 seconds"):
        ran(says(rest="time.sleep(600)"), "window-1", limit=0.5)


@pytest.mark.parametrize("command", ["/no/such/program", "/etc/hostname", "/tmp", "a\0b", ""])
def test_a_program_that_is_none_is_one_sentence(command: str) -> None:
    with pytest.raises(InputError, match="cannot be started: "):
        ran([command], "window-1")


# ---- the smoke test


@pytest.mark.parametrize(
    "name",
    [
        "prints_progress",
        "forgets_the_logits",
        "transposes",
        "lies",
        "answers_twice",
        "adds_a_tensor",
        "counts_its_logits",
    ],
)
def test_the_smoke_test_tells_a_broken_harness(name: str) -> None:
    with pytest.raises(HarnessUnusable) as raised:
        ran(hostile(name, "*"), "top-1", smoke="window-1")
    assert str(raised.value).startswith("the harness is broken: case window-1 in float32: ")
    assert HOSTILE[name].words.replace("prefill/", "") in str(raised.value).replace("prefill/", "")


def test_the_smoke_test_takes_a_hang_for_a_broken_harness() -> None:
    """It hangs on the smallest model; every later case would take as long."""
    with pytest.raises(HarnessUnusable, match=r"the harness is broken: .* no answer to run within"):
        ran(hostile("hangs", "*"), "top-1", smoke="window-1", limit=SHORT)


@pytest.mark.parametrize("name", ["gives_zero", "exits", "reports_an_error", "skips"])
def test_the_smoke_test_leaves_the_engine_to_the_suite(name: str) -> None:
    results, _ = ran(hostile(name, "*"), "top-1", smoke="window-1")
    assert outcome(results, "top-1")[0] == HOSTILE[name].verdict
    assert results.smoke.startswith("case window-1" if name == "gives_zero" else "nothing: case window-1 in float32 ")


def test_started_again_it_must_be_the_same(tmp_path: Path) -> None:
    """After a crash, a harness that describes itself differently is not the engine under test."""
    script = tmp_path / "changing.py"
    script.write_text(f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.engines.harnesses import honest
again = os.path.exists({str(tmp_path / "once")!r})
open({str(tmp_path / "once")!r}, "w")
honest.DESCRIPTION["version"] = "2" if again else "1"
honest.converse(lambda request: honest.answer(request) if request["command"] == "start" else os._exit(1))
""")
    results, _ = ran([sys.executable, str(script)], "window-1", "top-1")
    assert outcome(results, "window-1")[0] == CRASHED
    assert outcome(results, "top-1") == (
        BROKEN, "started again, it describes itself in another way than the first time"
    )  # fmt: skip


def test_the_grace_is_short() -> None:
    assert GRACE <= 5
    assert os.name == "posix"
