# SPDX-License-Identifier: Apache-2.0
"""An emission that is killed at any moment leaves the old case or the new one. Started again, it goes on."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from refmoe import suite as golden
from refmoe.traces.trace import read_trace
from tests.golden_cases import write_case

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["refmoe.suite", "tests.test_golden_emission"])
"""Its processes begin with everything imported: a kill falls into the work and not into the start of Python."""
STEPS = {"open", "os.rename", "os.remove", "os.chmod", "tempfile.mkstemp"}
"""Python's audit events that change files."""


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A case that has been emitted, and then changed."""
    folder = write_case(tmp_path_factory.mktemp("old") / "small")
    golden.emit(golden.read_case(folder))
    write_case(folder, seed=2)
    return folder


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The changed case, emitted again: the expected result."""
    folder = write_case(tmp_path_factory.mktemp("new") / "small", seed=2)
    golden.emit(golden.read_case(folder))
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """The bytes of the manifest and of every file that it names."""
    named = golden.read_manifest(folder)["files"]
    return {name: (folder / name).read_bytes() for name in (*named, golden.MANIFEST_FILE)}


def emit_in(folder: Path, stop_at: int | None = None, most_bytes: int | None = None) -> None:
    """Emit, and die before the given step that changes files, or on writing past so many bytes of a file."""
    count = 0

    def audit(event: str, _arguments: Any) -> None:
        nonlocal count
        if event in STEPS:
            if count == stop_at:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    case = golden.read_case(folder)
    if stop_at is not None:
        sys.addaudithook(audit)
    if most_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it; by default it kills
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    golden.emit(case)


def killed(folder: Path, after: float | None = None, **when: int) -> bool:
    """Emit in another process that is killed after some seconds or as `emit_in` says. Returns whether it was killed."""
    process = FORKSERVER.Process(target=emit_in, args=(folder,), kwargs=when)
    process.start()
    if after is not None:
        time.sleep(after)
        process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL, -signal.SIGXFSZ)
    return process.exitcode != 0


def assert_old_or_new(folder: Path, old: Path, new: Path) -> bool:
    """Check that the case is the whole old one or the whole new one. Returns whether it is the new one."""
    found = files(folder)
    assert found in (files(old), files(new))
    differences = [difference.what for difference in golden.verify_case_files(folder)]
    assert read_trace(golden.trace_path(folder)).header.case == "small"
    if found == files(new):
        assert differences == []
        assert golden.check(folder) == []
        return True
    assert differences == [f"{folder / golden.CASE_FILE}: SHA-256 differs from the manifest's"]
    return False


def test_killed_at_random_moments_it_leaves_the_old_case_or_the_new_one(tmp_path: Path, old: Path, new: Path) -> None:
    """Kill at fifty moments, from the start to a little after the end. The next emission then succeeds."""
    whole = Path(shutil.copytree(old, tmp_path / "whole" / "small"))
    killed(whole)  # the server starts
    begin = time.perf_counter()
    killed(whole)
    length = time.perf_counter() - begin
    rng = random.Random(4)
    kills = results = 0
    for i in range(50):
        folder = Path(shutil.copytree(old, tmp_path / str(i) / "small"))
        kills += killed(folder, after=rng.uniform(0, 1.2 * length))
        results += assert_old_or_new(folder, old, new)
        golden.emit(golden.read_case(folder))
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == files(new)
    assert kills >= 10
    assert results >= 1


def test_killed_before_every_single_step_it_leaves_the_old_case_or_the_new_one(
    tmp_path: Path, old: Path, new: Path
) -> None:
    """Kill before each opening, renaming and removal of a file, so that no moment is left to chance."""
    results = []
    for step in range(1000):
        folder = Path(shutil.copytree(old, tmp_path / str(step) / "small"))
        if not killed(folder, stop_at=step):
            break
        results.append(assert_old_or_new(folder, old, new))
    assert len(results) > 8
    assert sorted(results) == results
    assert {*results} == {False, True}


@pytest.mark.parametrize("most_bytes", [0, 1, 1000, 4096, 10_000])
def test_killed_in_the_middle_of_a_write_it_leaves_the_old_case(
    tmp_path: Path, old: Path, new: Path, most_bytes: int
) -> None:
    """A case that has changed since it was emitted, and one that has not."""
    for place in (old, new):
        folder = Path(shutil.copytree(place, tmp_path / place.parent.name / "small"))
        assert killed(folder, most_bytes=most_bytes)
        assert files(folder) == files(place)


def test_killed_on_an_unchanged_case_it_leaves_that(tmp_path: Path, new: Path) -> None:
    for step in range(1000):
        folder = Path(shutil.copytree(new, tmp_path / str(step) / "small"))
        if not killed(folder, stop_at=step):
            break
        assert golden.check(folder) == []
    assert step > 8


def test_killed_on_a_case_never_emitted_it_leaves_none_or_the_new_one(tmp_path: Path, new: Path) -> None:
    done = False
    for step in range(1000):
        folder = write_case(tmp_path / str(step), seed=2).rename(tmp_path / "small")
        died = killed(folder, stop_at=step)
        if done or (folder / golden.MANIFEST_FILE).exists():
            assert files(folder) == files(new)
            done = True
        shutil.rmtree(folder)
        if not died:
            break
    assert done


def test_a_case_that_changes_while_it_is_emitted_is_not_taken_for_the_changed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_case(tmp_path / "small")
    case = golden.read_case(folder)
    compute = golden.compute

    def and_meanwhile(*arguments: Any) -> Any:
        write_case(folder, seed=2)
        return compute(*arguments)

    monkeypatch.setattr("refmoe.suite.emission.compute", and_meanwhile)
    golden.emit(case)
    assert "case.toml: SHA-256 differs" in golden.verify_case_files(folder)[0].what
