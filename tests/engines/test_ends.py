# SPDX-License-Identifier: Apache-2.0
"""However a run ends: no process of the harness lives on, no verdict is lost, and folders are removed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest

from refmoe.engines import judge as judge_module
from refmoe.engines import process as process_module
from refmoe.engines import run_case as run_case_module
from refmoe.engines.conform import UNFINISHED
from refmoe.engines.process import HarnessError, Process
from refmoe.engines.results import Outcome, read_results
from refmoe.errors import InputError
from refmoe.verifier.findings import CANNOT_JUDGE, CONFORMANT, NOT_CONFORMANT
from tests.command_line import Refmoe
from tests.engines.running import HONEST, LIMIT, hostile, ran, says

ROOT = Path(__file__).parents[2]
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process which others it has started")

HANGS = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from tests.engines.harnesses import honest

def answer(request):
    if request["command"] == "load" and request["checkpoint"].endswith("window-1") and "top-1" in seen:
        if os.fork() == 0:
            os.setsid()
            time.sleep(600)
        open(sys.argv[1], "w").write(f"{{os.getpid()}}")
        time.sleep(600)
    seen.add(os.path.basename(request.get("checkpoint", "")))
    return honest.answer(request)

seen = set()
honest.converse(answer)
"""


SLOW_TO_END = """
import sys, time
for _ in sys.stdin:
    print('{"ok": true}', flush=True)
    time.sleep(1)
"""


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def judged(out: Path) -> int:
    """The number of outcomes that are on disk. The last answer is judged while the engine goes on."""
    return len(read_results(out).outcomes) if out.exists() else 0


def alive(marker: str) -> list[int]:
    """The processes with a word in their environment."""
    found = []
    for each in Path("/proc").glob("[0-9]*"):
        try:
            state = (each / "stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z" and marker.encode() in (each / "environ").read_bytes():
                found.append(int(each.name))
        except OSError:
            continue
    return found


@linux
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
def test_a_signal_ends_all_and_keeps_the_outcomes_so_far(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "hangs.py").write_text(HANGS)
    (tmp_path / "tmp").mkdir()
    hung, out, marker = tmp_path / "hung", tmp_path / "out.json", f"REFMOE_TEST_{os.getpid()}_{number}"
    command = [sys.executable, "-m", "refmoe", "conform", "--case", "top-1", "--case", "window-1", "--dtype", "float32"]
    command += ["--out", str(out), "--", sys.executable, str(tmp_path / "hangs.py"), str(hung)]
    variables = {**os.environ, "TMPDIR": str(tmp_path / "tmp"), marker: "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=variables, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(lambda: hung.exists() and bool(hung.read_text()) and judged(out) == 1)
    assert len(alive(marker)) == 4, "the command, the guard, the harness and its child"
    process.send_signal(number)
    _, err = process.communicate(timeout=LIMIT)
    wait_for(lambda: not alive(marker))
    assert b"Traceback" not in err
    if number in (signal.SIGTERM, signal.SIGHUP):
        assert process.returncode == 128 + number
    if number != signal.SIGKILL:
        assert not [*(tmp_path / "tmp").iterdir()]
    results = read_results(out)
    assert [(each.case, each.verdict) for each in results.outcomes] == [("top-1", CONFORMANT)]
    assert results.notes == (UNFINISHED,)


@linux
@pytest.mark.parametrize("ends", ["time.sleep(600)", "os._exit(3)", "os.kill(os.getppid(), 9); time.sleep(600)"])
def test_a_child_in_a_session_of_its_own_ends_with_the_harness(ends: str, tmp_path: Path) -> None:
    """Its parent has ended, it ignores signals, and it holds no pipe. The harness may end the guard as well."""
    pid = tmp_path / "pid"
    rest = f"""
import signal
sys.stdin.readline()
if os.fork() == 0:
    os.setsid()
    if os.fork():
        os._exit(0)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    open({str(pid)!r}, "w").write(str(os.getpid()))
    os.closerange(0, 64)
    time.sleep(600)
while not os.path.exists({str(pid)!r}) or not open({str(pid)!r}).read():
    time.sleep(0.01)
{ends}
"""
    process = Process(says(rest=rest))
    with pytest.raises(HarnessError):
        process.ask({"command": "start"}, 5.0)
    process.kill()
    wait_for(lambda: not Path(f"/proc/{pid.read_text()}").exists())


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL, signal.SIGTERM, signal.SIGPIPE])
def test_the_guard_tells_how_the_harness_ended(number: signal.Signals) -> None:
    rest = (
        "import resource, signal; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); "
        f"number = {int(number)}; number == 9 or signal.signal(number, signal.SIG_DFL); "
        "sys.stdin.readline(); os.kill(os.getpid(), number); time.sleep(600)"
    )
    process = Process(says(rest=rest))
    with pytest.raises(HarnessError, match=f"was ended by {number.name}"):
        process.ask({"command": "start"}, LIMIT)
    process.kill()


def test_the_harness_inherits_no_ignored_signal() -> None:
    """The guard handles signals, and Python ignores SIGPIPE; neither may pass to the program."""
    rest = (
        "sys.stdin.readline(); lines = open('/proc/self/status').read().splitlines(); "
        "print('{\"ignored\": ' + str(int([x for x in lines if x.startswith('SigIgn')][0].split()[1], 16)) + '}', "
        "flush=True); sys.stdin.readline()"
    )
    if sys.platform != "linux":
        pytest.skip("only Linux tells which signals a process ignores")
    process = Process(says(rest=rest))
    ignored = process.ask({"command": "start"}, LIMIT)["ignored"]
    process.kill()
    by_python = 1 << (signal.SIGPIPE - 1) | 1 << (signal.SIGXFSZ - 1)  # this harness is a Python program itself
    own = [each for each in signal.valid_signals() if signal.getsignal(each) is signal.SIG_IGN]
    assert ignored & ~by_python & ~sum(1 << (each - 1) for each in own) == 0


# ---- what judging raises


@pytest.mark.parametrize("error", [OverflowError("math range"), FloatingPointError("x"), MemoryError(), KeyError("a")])
def test_whatever_judging_raises_is_an_outcome(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine, calls = judge_module.verify, []

    def verify(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 1:
            raise error
        return genuine(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(judge_module, "verify", verify)
    results, _ = ran(HONEST, "top-1", "window-1")
    assert [each.verdict for each in results.outcomes] == [CANNOT_JUDGE, CONFORMANT]
    assert type(error).__name__ in results.outcomes[0].reason
    assert "\n" not in results.outcomes[0].reason


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_not_an_outcome(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    def verify(*_: object) -> object:
        raise error

    monkeypatch.setattr(judge_module, "verify", verify)
    with pytest.raises(error):
        ran(HONEST, "window-1")


def test_an_explanation_that_fails_leaves_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    def diagnosed(*_: object) -> object:
        raise OverflowError("too large")

    monkeypatch.setattr(judge_module.Judge, "_diagnosed", diagnosed)
    results, _ = ran(hostile("gives_zero", "top-1"), "top-1", "window-1", diagnosing=True)
    assert [each.verdict for each in results.outcomes] == [NOT_CONFORMANT, CONFORMANT]
    assert "OverflowError" in results.outcomes[0].reason
    assert results.outcomes[0].first_wrong is not None


# ---- files that cannot be written


def test_a_trace_that_cannot_be_kept_is_said_and_leaves_nothing(
    refmoe: Refmoe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full after half of a file, the second time too."""
    monkeypatch.chdir(ROOT)

    def full(*_: object) -> None:
        raise InputError("no space left")

    def half(source: Path, target: Path) -> None:
        Path(target).write_bytes(Path(source).read_bytes()[:100])
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(run_case_module, "write_trace", full)
    monkeypatch.setattr(shutil, "copyfile", half)
    kept, out = tmp_path / "kept", tmp_path / "out.json"
    cases = ("--case", "top-1", "--case", "window-1", "--dtype", "float32")
    assert refmoe("conform", *cases, "--keep", kept, "--out", out, "--", *HONEST)[0] == 0
    assert not [*kept.iterdir()]
    outcomes = read_results(out).outcomes
    assert [each.verdict for each in outcomes] == [CONFORMANT] * 2
    assert all("could not be kept" in each.reason and os.strerror(28) in each.reason for each in outcomes)


def test_the_verdicts_are_said_where_the_results_cannot_be_written(
    refmoe: Refmoe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The harness puts a folder in the place of the file."""
    monkeypatch.chdir(ROOT)
    out = tmp_path / "out.json"
    script = (
        f"import sys, os; sys.path.insert(0, {str(ROOT)!r}); from tests.engines.harnesses import honest\n"
        f"def answer(request):\n    os.makedirs({str(out)!r}, exist_ok=True)\n    return honest.answer(request)\n"
        "honest.converse(answer)"
    )
    command = ("conform", "--case", "window-1", "--dtype", "float32", "--out", out)
    status, said, err = refmoe(*command, "--", sys.executable, "-c", script)
    assert status == 2
    assert "1 outcome: 1 conformant" in said
    assert str(out) in err
    out.rmdir()
    status, said, _ = refmoe(*command, "--json", "--", sys.executable, "-c", script)
    values = json.loads(said)
    assert status == values["status"] == 2
    assert str(out) in values["error"]
    assert [each["verdict"] for each in values["results"]["outcomes"]] == [CONFORMANT]


def test_the_file_is_valid_after_each_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from refmoe.engines.conform import Suite, Watch, conform
    from refmoe.engines.harness import Harness
    from refmoe.engines.judge import Judge
    from refmoe.engines.results import write_results
    from tests.engines.running import case_named

    out, seen = tmp_path / "out.json", []

    def save(results: object) -> None:
        write_results(out, results)  # type: ignore[arg-type]
        seen.append(read_results(out))

    suite = Suite([case_named("top-1"), case_named("window-1")], [], ["float32"], judge=Judge(diagnosing=False))
    results = conform(Harness(HONEST, LIMIT), {}, suite, Watch(save=save))
    assert [len(each.outcomes) for each in seen] in ([1, 2], [2])
    assert replace(seen[-1], notes=()) == results


def test_a_slow_disk_delays_no_verdict() -> None:
    """What is judged while the disk is busy is saved at once."""
    from refmoe.engines.conform import Suite, Watch, conform
    from refmoe.engines.harness import Harness
    from refmoe.engines.judge import Judge
    from refmoe.engines.results import Results
    from tests.engines.running import case_named

    verdicts: list[Outcome] = []
    saved: list[int] = []
    all_judged = Event()

    def log(outcome: Outcome, _said: str) -> None:
        verdicts.append(outcome)
        if len(verdicts) == 4:
            all_judged.set()

    def save(results: Results) -> None:
        assert all_judged.wait(LIMIT)
        saved.append(len(results.outcomes))

    cases = [case_named("top-1"), case_named("window-1")]
    suite = Suite(cases, [], ["float32", "bfloat16"], judge=Judge(diagnosing=False))
    conform(Harness(HONEST, LIMIT), {}, suite, Watch(log, save))
    assert saved[-1] == 4
    assert len(saved) <= 2


def test_results_that_cannot_be_saved_end_the_run() -> None:
    from refmoe.engines.conform import Suite, Watch, conform
    from refmoe.engines.harness import Harness
    from refmoe.engines.judge import Judge
    from refmoe.engines.results import Results
    from tests.engines.running import case_named

    saves: list[int] = []
    judged: list[Outcome] = []
    failed = Event()

    def save(results: Results) -> None:
        saves.append(len(results.outcomes))
        failed.set()
        raise OSError(28, "No space left on device")

    def log(outcome: Outcome, _said: str) -> None:
        judged.append(outcome)
        assert failed.wait(LIMIT)

    cases = [case_named(name) for name in ("top-1", "window-1", "square")]
    suite = Suite(cases, [], ["float32", "bfloat16"], judge=Judge(diagnosing=False))
    with pytest.raises(OSError, match="No space"):
        conform(Harness(HONEST, LIMIT), {}, suite, Watch(log, save))
    assert saves == [1]
    assert len(judged) < 6


def test_an_engine_may_end_as_slowly_as_it_may_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine delays the end of a process as it delays its answers. That is no observation about the engine."""
    monkeypatch.setattr(process_module, "GRACE", 0.2)
    for limit in (0.0, 60.0 * LIMIT):
        note = Process([sys.executable, "-c", SLOW_TO_END]).stop(limit)
        assert (note is None) == (limit > 0), note
