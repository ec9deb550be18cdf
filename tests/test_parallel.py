# SPDX-License-Identifier: Apache-2.0
"""Work in processes: a worker that dies costs its own item only, and no worker outlives its parent."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refmoe import parallel
from refmoe.errors import InputError
from refmoe.parallel import (
    SPAWN,
    WorkerDied,
    _ended,
    _until_a_death,
    end_with_parent,
    in_background,
    lifeline,
    process_pool,
    results,
)
from tests.command_line import Refmoe

ROOT = Path(__file__).parents[1]
linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


def square(number: int) -> int:
    return number * number


def dies_at_three(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def dies_in_company(place: Path) -> str:
    """Ends the first process that is given this item, and no later one, as if memory sufficed for one at a time."""
    if place.name == "large" and not place.exists():
        place.touch()
        os._exit(0)
    return place.name


def always_dies(number: int) -> int:
    os._exit(number)


def refuses(number: int) -> int:
    raise InputError(f"{number} is refused")


def collected(function: Callable[[int], int], count: int, jobs: int) -> tuple[dict[int, int], list[int]]:
    """The results, and the items whose worker died."""
    found: dict[int, int] = {}
    try:
        with results(function, range(count), jobs) as pairs:
            for item, result in pairs:
                found[item] = result
    except WorkerDied as death:
        return found, sorted(death.items)
    return found, []


@pytest.mark.parametrize("jobs", [1, 2])
def test_every_item_has_its_result(jobs: int) -> None:
    assert collected(square, 5, jobs) == ({i: i * i for i in range(5)}, [])


def test_a_death_costs_one_item() -> None:
    assert collected(dies_at_three, 6, 2) == ({i: i * i for i in range(6) if i != 3}, [3])


def test_an_item_that_dies_in_company_is_tried_alone(tmp_path: Path) -> None:
    with results(dies_in_company, [tmp_path / name for name in ("a", "large", "b", "c")], 2) as pairs:
        assert {item.name: result for item, result in pairs} == {name: name for name in ("a", "large", "b", "c")}


def test_where_every_worker_dies_the_rest_is_not_tried() -> None:
    """The test would take very long otherwise."""
    assert collected(always_dies, 2000, 2) == ({}, [*range(2000)])


def test_items_that_a_dead_pool_has_forgotten_are_lost_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "PATIENCE", 0.05)
    forgotten: Future[int] = Future()
    done: Future[int] = Future()
    done.set_result(7)
    with process_pool(1) as pool:
        with suppress(BrokenProcessPool):
            pool.submit(always_dies, 0).result()
        assert [*_ended(pool, [forgotten, done])] == [done]


class Forgetful(Executor):
    """A pool whose worker has died as the second item was handed in, and which has forgotten the first."""

    def __init__(self) -> None:
        self.handed_in = 0

    def submit(self, *_: Any, **__: Any) -> Future[Any]:
        self.handed_in += 1
        if self.handed_in > 1:
            raise BrokenProcessPool
        return Future()


def test_a_forgotten_item_is_tried_again_before_those_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "PATIENCE", 0.05)
    monkeypatch.setattr(parallel, "process_pool", lambda _jobs: Forgetful())
    with pytest.raises(StopIteration) as ended:
        next(_until_a_death(square, [5, 6, 7], 1))
    assert ended.value.value == ([5], [6, 7])


def test_an_error_of_an_item_is_raised_as_it_is() -> None:
    with pytest.raises(InputError, match="is refused"):
        collected(refuses, 4, 2)


def test_when_the_body_raises_running_work_ends_at_once() -> None:
    """The test would take an hour otherwise."""

    def body() -> None:
        with process_pool(2) as pool:
            pool.submit(time.sleep, 3600)
            pool.submit(square, 1).result()
            raise KeyError

    with pytest.raises(KeyError):
        body()


@pytest.mark.parametrize("as_json", [False, True])
def test_a_check_whose_worker_dies_reports_the_other_cases(
    refmoe: Refmoe, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    """Status 2, for no difference was found. The sentence names the case."""
    names = ["one-pair", "walking-skeleton", "near-tie"]
    monkeypatch.setattr("refmoe.suite.check", check_or_die)
    status, printed, said = refmoe("suite", "check", *names, "--executor", "processes:2", *["--json"] * as_json)
    assert status == 2
    if as_json:
        found = json.loads(printed)
        assert (found["ok"], {*found["cases"]}) == (False, {"one-pair", "near-tie"})
        assert ["walking-skeleton" in sentence for sentence in found["unchecked"]] == [True]
    else:
        assert "walking-skeleton" in said
        assert "ok    near-tie" in printed
    assert "Traceback" not in said


def check_or_die(folder: Path, *_: object, **__: object) -> list[object]:
    """The check of a case, which ends its worker at one of them."""
    if folder.name == "walking-skeleton" and multiprocessing.parent_process() is not None:
        os._exit(0)
    return []


# ---- no worker outlives its parent


def processes_of(session: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] not in "ZX":
                found.append(int(folder.name))
    return found


def gone(session: int, limit: float = 10.0) -> bool:
    """Whether all processes of a session end within a time."""
    deadline = time.monotonic() + limit
    while processes_of(session):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


BUSY = """
import os, sys, time
from refmoe.parallel import process_pool
if __name__ == "__main__":
    with process_pool(2) as pool:
        futures = [pool.submit(time.sleep, 0.01) for _ in range(4)]
        [future.result() for future in futures]
        pool.submit(time.sleep, 600)
        print("ready", flush=True)
        time.sleep(600)
"""


@linux
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_workers_end_with_their_parent_however_it_dies(tmp_path: Path, number: int) -> None:
    """One is idle, the other works. The tracker of resources, which multiprocessing starts, ends too."""
    (tmp_path / "busy.py").write_text(BUSY)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(
        [sys.executable, "busy.py"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, start_new_session=True
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"ready\n"
    assert len(processes_of(parent.pid)) >= 3
    parent.send_signal(number)
    parent.wait()
    parent.stdout.close()
    assert gone(parent.pid)


def hold(line: object, told: object) -> None:
    """A worker whose kernel does not end it, so that only the pipe can."""
    import refmoe.parallel

    refmoe.parallel.SET_DEATH_SIGNAL = 0
    end_with_parent(line)  # type: ignore[arg-type]
    told.send_bytes(b"ready")  # type: ignore[attr-defined]
    time.sleep(600)


def test_the_pipe_alone_ends_a_worker() -> None:
    """As on a system whose kernel has no signal for the death of a parent."""
    reader, writer = SPAWN.Pipe(duplex=False)
    with lifeline() as line:
        process = SPAWN.Process(target=hold, args=(line, writer))
        process.start()
        assert reader.poll(60)
    process.join(60)
    assert process.exitcode == 1


def test_a_call_in_the_background_has_its_result_or_its_error() -> None:
    assert in_background(lambda: square(3)).result() == 9
    with pytest.raises(InputError):
        in_background(lambda: refuses(3)).result()


def test_a_call_in_the_background_has_the_settings_of_its_owner() -> None:
    with np.errstate(divide="raise"):
        raised = in_background(lambda: np.ones(1) / np.zeros(1)).exception()
    assert isinstance(raised, FloatingPointError)


def test_a_call_in_the_background_keeps_no_process_alive() -> None:
    code = "import time; from refmoe.parallel import in_background; in_background(lambda: time.sleep(600))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False).returncode == 0
