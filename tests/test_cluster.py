# SPDX-License-Identifier: Apache-2.0
"""Items of work on a Dask cluster: the results of one process, and one sentence where workers are lost."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from refmoe import parallel
from refmoe.errors import InputError
from refmoe.parallel import WorkerDied, open_executor, results
from tests.clusters import cluster
from tests.command_line import Refmoe

pytestmark = pytest.mark.slow
"""A cluster takes seconds to start."""
CASES = ("one-pair", "top-1", "window-1")


@pytest.fixture(scope="module")
def two() -> Iterator[str]:
    """The executor of a cluster with two workers."""
    with cluster(2) as (address, _):
        yield f"dask:{address}"


def square(number: int) -> int:
    return number * number


def refuses_three(number: int) -> int:
    if number == 3:
        raise InputError(f"{number} is refused")
    return number


def kills(place: Path) -> str:
    """Ends each worker that gets the item of this name."""
    if place.name == "deadly":
        os.kill(os.getpid(), signal.SIGKILL)
    return place.name


def ends_one(place: Path) -> str:
    """Ends the first worker that gets an item, and no later one."""
    if not place.exists():
        place.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return place.name


def test_every_item_has_its_result(two: str) -> None:
    with results(square, range(20), two) as pairs:
        assert {**dict(pairs)} == {i: i * i for i in range(20)}


def test_a_cluster_gets_as_many_calls_as_it_has_threads(two: str) -> None:
    """What waits is begun in its order, each as soon as one before it has ended."""
    with results(span, range(6), two) as pairs:
        spans = [times for _, times in sorted(pairs)]
    for i, (start, _) in enumerate(spans):
        assert sum(began <= start < ended for began, ended in spans) <= 2
        assert i < 2 or start >= max(began for began, _ in spans[: i - 1])


def span(_number: int) -> tuple[float, float]:
    """When a call of some time began and ended, by a clock that all processes have."""
    began = time.monotonic()
    time.sleep(0.2)
    return began, time.monotonic()


def test_calls_that_have_not_begun_are_dropped(two: str, tmp_path: Path) -> None:
    with open_executor(two) as executor:
        futures = [executor.submit(leaves_a_file, tmp_path / str(i)) for i in range(8)]
        futures[0].result()
    assert all(each.cancelled() for each in futures[4:])
    assert len([*tmp_path.iterdir()]) <= 4


def leaves_a_file(place: Path) -> None:
    place.touch()
    time.sleep(0.2)


def test_an_error_of_an_item_is_raised_as_it_is(two: str) -> None:
    with pytest.raises(InputError, match="3 is refused"), results(refuses_three, range(6), two) as pairs:
        assert 3 not in dict(pairs)


def test_the_items_of_a_dead_worker_are_done_by_another(tmp_path: Path) -> None:
    with cluster(2) as (address, workers), results(ends_one, [tmp_path / "a"] * 3, f"dask:{address}") as pairs:
        assert [found for _, found in pairs] == ["a"] * 3
        assert sorted(worker.poll() is None for worker in workers) == [False, True]


def test_an_item_that_ends_all_workers_is_named(tmp_path: Path) -> None:
    """After the fourth death Dask gives it up. The other items are done."""
    with cluster(5) as (address, _):
        items = [tmp_path / name for name in ("a", "deadly", "b")]
        done: list[str] = []
        with pytest.raises(WorkerDied) as death, results(kills, items, f"dask:{address}") as pairs:
            done.extend(name for _, name in pairs)
        assert death.value.items == [tmp_path / "deadly"]
        assert sorted(done) == ["a", "b"]


def test_a_cluster_without_workers_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "LONELY", 1.0)
    with (
        cluster(0) as (address, _),
        pytest.raises(InputError, match="had no worker for 1 seconds"),
        results(square, [1], f"dask:{address}") as pairs,
    ):
        next(pairs)


def test_a_cluster_that_loses_all_workers_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "LONELY", 1.0)
    monkeypatch.setattr(parallel, "PATIENCE", 0.2)
    with (
        cluster(1) as (address, _),
        pytest.raises(InputError, match="had no worker for 1 seconds"),
        results(ends_one, [tmp_path / "a"], f"dask:{address}") as pairs,
    ):
        next(pairs)


def test_a_scheduler_that_ends_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "PATIENCE", 0.2)
    with cluster(1) as (address, _):
        scheduler = int(address.rpartition(":")[2])
        with results(sleeps, [scheduler], f"dask:{address}") as pairs, pytest.raises(InputError, match="--executor"):
            next(pairs)


def sleeps(port: int) -> None:
    """Ends the scheduler that listens on a port, and goes on."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"distributed.cli.dask_scheduler" in words and str(port).encode() in words:
            os.kill(int(folder.name), signal.SIGKILL)
    time.sleep(600)


def test_check_and_matrix_are_those_of_one_process(two: str, refmoe: Refmoe) -> None:
    mutant = ("--mutant", "rope-sign-flipped", *(word for case in CASES for word in ("--case", case)))
    for command in (("suite", "check", *CASES), ("mutants", "matrix", *mutant, "--dtype", "float32")):
        alone, far = (refmoe(*command, "--json", "--executor", where) for where in ("processes:1", two))
        assert alone[:2] == far[:2]
        assert alone[0] == 0
        assert len(json.loads(alone[1])) > 0
