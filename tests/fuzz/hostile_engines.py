# SPDX-License-Identifier: Apache-2.0
"""A campaign of hostile engines: each behaviour at each moment of a run, through the real ``refmoe conform``.

    python -m tests.fuzz.hostile_engines --all --seeds 2 --json counts.json
    python -m tests.fuzz.hostile_engines --only hangs

A run has three cases, and the engine misbehaves once. What must hold: the command ends by itself, with the status that
its outcomes call for and without a traceback; the file of results is valid and has every outcome; the case in which
the engine acts gets a verdict that fits, and the others are conformant; no process is alive and no temporary folder
is left. Kills of refmoe itself, at random moments, are a part of it. All is determined by the seeds.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refmoe.engines.conform import UNFINISHED
from refmoe.engines.guard import PR_SET_CHILD_SUBREAPER, descendants
from refmoe.engines.results import GOOD, Results, read_results
from refmoe.errors import InputError
from refmoe.files import scratch
from refmoe.files.parsing import strict_json
from refmoe.suite import read_case
from refmoe.verifier.findings import CANNOT_JUDGE, CONFORMANT
from tests.fuzz import hostile_engine
from tests.fuzz.hostile_engine import BEHAVIOURS, PHASES, SETTINGS

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "golden"
ENGINE = Path(hostile_engine.__file__)
SMOKE = "window-1"
"""The smallest case, which the smoke test chooses."""
CASES = ("near-tie", "top-1", "top-3", "top-all", "window-decode", "zero-row")
"""Three of these are run, by the seed."""
LIMIT = 6.0
"""Seconds for each request. An honest answer takes a tenth of a second, on a busy machine one."""
LONGEST = 300.0
"""Seconds after which a command counts as one that does not end."""
GRACE = 10.0
"""Seconds after which no process may be alive."""
SMALL_DISK = 24 << 20
"""Bytes of the disk that some behaviours fill."""
LEFT = "junk"
"""How the names of files begin that the engine itself leaves beside the folders of refmoe."""


@dataclass(frozen=True)
class Trial:
    """One behaviour at one moment, by one seed."""

    behaviour: str
    phase: str
    seed: int

    @property
    def dice(self) -> random.Random:
        return random.Random(f"trial {self.behaviour} {self.phase} {self.seed}")


def trials(seeds: Sequence[int], only: str = "") -> list[Trial]:
    """All trials of these seeds, mixed, so that a part of them has some of each.   only: a part of behaviours' names"""
    found = [
        Trial(name, phase, seed)
        for seed in seeds
        for name, found in BEHAVIOURS.items()
        if only in name
        for phase in PHASES[found.kind]
    ]
    return random.Random(0).sample(found, len(found))


def sample(count: int) -> list[Trial]:
    """Some trials, the same at each call: one of each kind of behaviour in turn, at varying moments."""
    everything = [each for each in trials([0]) if not slow(each)]
    return random.Random(0).sample(everything, count)


def slow(trial: Trial) -> bool:
    """Whether a trial waits for a time limit, or writes a gigabyte."""
    found = BEHAVIOURS[trial.behaviour]
    waits = hostile_engine.TIMED_OUT in found.verdicts or trial.behaviour == "stops_its_parent"
    return waits or trial.phase == "stop" or found.needs_small_disk


# ---- one trial


@dataclass
class Ended:
    """A command that has ended, and what it left."""

    status: int | None
    out: str
    err: str
    alive: list[str]
    left: list[str]
    work: Path
    results: Path


@contextmanager
def workplace(trial: Trial, disk: Path | None) -> Iterator[Path]:
    """A folder with the cases of a trial, and a folder for temporary files.   disk: the small one"""
    with tempfile.TemporaryDirectory(prefix="hostile-") as name:
        work = Path(name)
        for each in ("golden", "state", "results", "kept", "tmp"):
            (work / each).mkdir()
        if disk is not None and BEHAVIOURS[trial.behaviour].needs_small_disk:
            for each in ("tmp", "kept"):
                (work / each).rmdir()
                shutil.rmtree(disk / each, ignore_errors=True)
                (disk / each).mkdir()
                (work / each).symlink_to(disk / each)
        cases = sorted(trial.dice.sample(CASES, 3))
        for each in (SMOKE, *cases):
            (work / "golden" / each).symlink_to(GOLDEN / each)
        (work / "state" / "cases").write_text(json.dumps(cases))
        try:
            yield work
        finally:
            if disk is not None:
                for each in ("tmp", "kept"):
                    shutil.rmtree(disk / each, ignore_errors=True)


def settings(trial: Trial, work: Path) -> dict[str, Any]:
    return {
        "behaviour": trial.behaviour, "phase": trial.phase, "seed": trial.seed, "state": str(work / "state"),
        "golden": str(work / "golden"), "temporary": str((work / "tmp").resolve()),
        "results": str(work / "results" / "results.json"),
    }  # fmt: skip


def arguments(trial: Trial, work: Path) -> list[str]:
    cases = json.loads((work / "state" / "cases").read_text())
    words = ["refmoe", "conform", "--json", "--golden", str(work / "golden"), "--timeout", str(LIMIT)]
    words += [word for case in cases for word in ("--case", case)]
    words += ["--out", str(work / "results" / "results.json"), "--keep", str(work / "kept")]
    # one in 24 is diagnosed, which takes much longer
    words += [] if trial.dice.randrange(24) == 0 else ["--no-diagnose"]
    return [*words, "--", sys.executable, str(ENGINE)]


def start(words: Sequence[str], work: Path, variables: dict[str, str]) -> int:
    """Start the command in a process that has refmoe imported already.   returns: its process id"""
    child = os.fork()
    if child:
        return child
    status = 99
    try:
        os.setsid()
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(work / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.environ.update(variables)
        tempfile.tempdir = None
        scratch.YOUNGEST = 0.0
        sys.argv = [*words]
        from refmoe.cli import main

        try:
            main()
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        sys.stdout.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with suppress(OSError, ValueError):
            sys.stderr.flush()
        os._exit(status)


def wait(child: int, seconds: float) -> int | None:
    """The status of a process, negative for a signal; None where it does not end."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return None


def still_alive() -> list[str]:
    """The command lines of processes that the command has left. They are ended."""
    end = time.monotonic() + GRACE
    while descendants() and time.monotonic() < end:
        with suppress(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
        time.sleep(0.01)
    found = []
    for pid in descendants():
        with suppress(OSError):
            found.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
            os.kill(pid, signal.SIGKILL)
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    return found


def run(trial: Trial, work: Path, kill: tuple[float, int] | None = None) -> Ended:
    """Run a trial.   kill: after how many seconds the command gets which signal"""
    variables = {SETTINGS: json.dumps(settings(trial, work)), "TMPDIR": str((work / "tmp").resolve())}
    child = start(arguments(trial, work), work, variables)
    status = wait(child, LONGEST if kill is None else kill[0])
    if status is None:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL if kill is None else kill[1])
        ended = wait(child, LONGEST)
        status = None if kill is None else ended
    alive = still_alive()
    temporary = work / "tmp"
    left = [path.name for path in temporary.iterdir()] if temporary.is_dir() else []
    return Ended(
        status=status,
        out=(work / "out").read_text(errors="replace"),
        err=(work / "err").read_text(errors="replace"),
        alive=alive,
        left=[name for name in left if not name.startswith(LEFT)],
        work=work,
        results=work / "results" / "results.json",
    )


# ---- what must hold


def faults(trial: Trial, ended: Ended) -> Iterator[str]:
    """The faults of a run, each a sentence."""
    if ended.status is None:
        yield f"it did not end in {LONGEST:g} seconds"
    elif ended.status not in range(4):
        yield f"its status is {ended.status}"
    if "Traceback" in ended.err + ended.out:
        yield f"a traceback: {ended.err.strip().splitlines()[-1:]}"
    if "\x1b" in ended.err + ended.out:
        yield "an escape sequence was printed"
    if ended.alive:
        yield f"processes are alive: {ended.alive}"
    if ended.left:
        yield f"temporary folders are left: {ended.left}"
    precious = ended.work / "state" / "precious"
    if precious.is_dir() and [each.name for each in precious.iterdir()] != [hostile_engine.PRECIOUS]:
        yield "refmoe has followed a link out of its folder"
    for path in (ended.work / "kept").glob(".*"):
        yield f"a half-written file is left: {path.name}"
    if ended.status in range(4):
        yield from _faults_of_results(trial, ended)


def _faults_of_results(trial: Trial, ended: Ended) -> Iterator[str]:
    try:
        said = strict_json(ended.out)
    except ValueError as error:
        yield f"standard output is not one JSON object: {error}"
        return
    if ended.status == 2 and "results" not in said:
        if trial.phase not in ("start", "smoke") or "error" not in said:
            yield f"it gave up: {ended.err.strip()[-200:]}"
        return
    copy = ended.work / "said.json"
    copy.write_text(json.dumps(said["results"]))
    results = read_results(copy)
    if ended.status == 2:
        if not BEHAVIOURS[trial.behaviour].spoils_results:
            yield f"the results were not written: {said.get('error')}"
    else:
        try:
            if read_results(ended.results) != results:
                yield "the file of results is not what was printed"
        except InputError as error:
            yield f"the file of results cannot be read: {error}"
        if ended.status != proper_status(results):
            yield f"its status is {ended.status}, but {proper_status(results)} belongs to these outcomes"
    if UNFINISHED in results.notes:
        yield "the results say that the run has not ended"
    yield from _faults_of_outcomes(trial, results)


def proper_status(results: Results) -> int:
    """The exit status that belongs to outcomes, as PROTOCOL.md has it."""
    bad = {each.verdict for each in results.outcomes if each.verdict not in GOOD}
    return 1 if bad - {CANNOT_JUDGE} else 3 if bad else 0


def _faults_of_outcomes(trial: Trial, results: Results) -> Iterator[str]:
    found = BEHAVIOURS[trial.behaviour]
    places = {"first": {0}, "load": {1}, "run": {1}, "written": {1}, "answered": {1, 2}}.get(trial.phase, set())
    if len(results.outcomes) != 3:
        yield f"there are {len(results.outcomes)} outcomes of 3 cases"
    for i, outcome in enumerate(results.outcomes):
        allowed = {CONFORMANT} if i not in places else {*found.verdicts}
        if trial.phase == "answered":
            allowed |= {CONFORMANT, hostile_engine.BROKEN} if i in places else set()
        if found.lasting and i >= min(places, default=0):
            allowed |= {CONFORMANT, *found.verdicts}
        if outcome.verdict not in allowed:
            yield f"case {i}, {outcome.case} in {outcome.dtype}, is {outcome.verdict}: {outcome.reason[:200]}"
        if "refmoe-" in outcome.reason:
            yield f"the reason names a temporary folder: {outcome.reason[:200]}"


# ---- kills of refmoe itself

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGKILL, signal.SIGINT)
KILLED_WITH = (
    "hangs",
    "leaves_a_daemon_and_hangs",
    "hangs_and_ignores_signals",
    "lowers_its_limits",
    "leaves_a_family",
)


def killed(seed: int) -> tuple[str, list[str]]:
    """A run that gets a signal at a random moment, and another run after it.   returns: a name, and the faults"""
    dice = random.Random(f"kill {seed}")
    number, trial = dice.choice(SIGNALS), Trial(dice.choice(KILLED_WITH), dice.choice(["smoke", "load", "run"]), seed)
    moment = dice.uniform(0.0, 2.5)
    found = []
    with workplace(trial, None) as work:
        ended = run(trial, work, (moment, number))
        statuses = {*range(4), 128 + number, -number}
        if number == signal.SIGINT:
            statuses.add(130)
        if ended.status not in statuses:
            found.append(f"its status is {ended.status}: {ended.err[-300:]}")
        if ended.alive:
            found.append(f"processes are alive: {ended.alive}")
        if number in (signal.SIGTERM, signal.SIGHUP) and ended.left and ended.status != -number:
            found.append(f"temporary folders are left: {ended.left}")
        if ended.results.exists():
            try:
                read_results(ended.results)
            except InputError as error:
                found.append(f"the file of results is broken: {error}")
        honest = Trial("lowers_its_limits", "stop", seed)
        shutil.rmtree(work / "state")
        (work / "state").mkdir()
        (work / "state" / "cases").write_text(json.dumps(sorted(trial.dice.sample(CASES, 3))))
        found += [f"the next run: {fault}" for fault in faults(honest, run(honest, work))]
    return f"{number.name} {trial.behaviour} {trial.phase} after {moment:.2f} s", found


# ---- the campaign


@dataclass
class Counts:
    """The counts of a campaign."""

    seeds: list[int]
    runs: int = 0
    kills: int = 0
    behaviours: int = 0
    by_kind: Counter[str] = field(default_factory=Counter)
    by_phase: Counter[str] = field(default_factory=Counter)
    verdicts: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    not_tried: int = 0
    faults: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        return {key: dict(value) if isinstance(value, Counter) else value for key, value in vars(self).items()}


@contextmanager
def small_disk() -> Iterator[Path | None]:
    """A disk of `SMALL_DISK` bytes; None where this user cannot mount one."""
    with tempfile.TemporaryDirectory(prefix="disk-") as name:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "tmpfs", name]
        try:
            mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
        except OSError:
            mounted = False
        try:
            yield Path(name) if mounted else None
        finally:
            if mounted:
                subprocess.run(["umount", "-l", name], check=False)


def attempt(trial: Trial, disk: Path | None, counts: Counts) -> None:
    """Run one trial, and count."""
    found = BEHAVIOURS[trial.behaviour]
    if found.needs_small_disk and disk is None:
        counts.not_tried += 1
        return
    with workplace(trial, disk) as work:
        ended = run(trial, work)
        counts.faults += [f"{trial.behaviour} {trial.phase} {trial.seed}: {each}" for each in faults(trial, ended)]
        counts.runs += 1
        counts.by_kind[found.kind] += 1
        counts.by_phase[trial.phase] += 1
        counts.statuses[str(ended.status)] += 1
        with suppress(ValueError, KeyError, InputError):
            counts.verdicts.update(each["verdict"] for each in strict_json(ended.out)["results"]["outcomes"])


def campaign(
    chosen: Sequence[Trial], kills: int, seeds: Sequence[int], progress: Callable[[Counts], None] = lambda _: None
) -> Counts:
    """Run trials and kills, one after the other. This process adopts what the commands leave.

    progress: called after each
    """
    for case in (SMOKE, *CASES):
        read_case(GOLDEN / case)
    import refmoe.bugs.catalogue
    import refmoe.cli
    import refmoe.verifier.diagnosis  # noqa: F401  (imported before the forks, so that each run need not)

    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    counts = Counts([*seeds], behaviours=len({each.behaviour for each in chosen}))
    with small_disk() as disk:
        for trial in chosen:
            attempt(trial, disk, counts)
            progress(counts)
        for seed in range(kills):
            name, found = killed(seed)
            counts.kills += 1
            counts.faults += [f"{name}: {each}" for each in found]
            progress(counts)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="every behaviour at every moment; else a sample")
    parser.add_argument("--only", default="", help="a part of the names of behaviours")
    parser.add_argument("--seeds", type=int, default=1, help="the number of seeds")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--kills", type=int, default=0, help="the number of kills of refmoe itself")
    parser.add_argument("--sample", type=int, default=12, help="the number of trials without --all")
    parser.add_argument("--json", type=Path, help="write the counts")
    given = parser.parse_args()
    seeds = range(given.first, given.first + given.seeds)
    chosen = trials(seeds, given.only) if given.all or given.only else sample(given.sample)
    began, printed = time.monotonic(), 0

    def progress(counts: Counts) -> None:
        nonlocal printed
        for fault in counts.faults[printed:]:
            print(fault, file=sys.stderr, flush=True)
        printed = len(counts.faults)
        if (counts.runs + counts.kills) % 20 == 0:
            done = f"{counts.runs} of {len(chosen)} runs, {counts.kills} of {given.kills} kills"
            print(f"{done}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
            write(counts)

    def write(counts: Counts) -> None:
        if given.json is not None:
            given.json.write_text(f"{json.dumps(counts.facts(), indent=1)}\n")

    counts = campaign(chosen, given.kills, seeds, progress)
    write(counts)
    print(json.dumps(counts.facts(), indent=1))
    return 1 if counts.faults else 0


if __name__ == "__main__":
    sys.exit(main())
