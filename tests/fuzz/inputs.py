# SPDX-License-Identifier: Apache-2.0
"""Run commands on the inputs of a stranger, in worker processes with limits, and judge each run by one oracle.

A trial has a folder of its own, which holds the inputs and a folder `out` for outputs. A run is without fault if it
keeps these rules. Its exit status is 0 to 3, and one that the command has. Status 2 has exactly one sentence on
standard error, or the usage error of click. With --json, standard output is JSON. There is no traceback and no
warning. No character acts on a terminal. No file has changed or appeared but the outputs, and each output is whole.
The run takes at most `SECONDS` of the processor, `WAIT` in all, and `MEMORY` more than the process had.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import re
import resource
import select
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
import unicodedata
import warnings
import xml.etree.ElementTree
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from refmoe.parallel import SET_DEATH_SIGNAL
from refmoe.report.neutral import LONGEST

SECONDS = 20.0
"""Seconds of the processor for a run. The slowest run of a good input takes one."""
WAIT = 150.0
"""Seconds after which a run counts as one that does not end. The machine may be busy with other work."""
MEMORY = 512 << 20
"""Bytes that a run may add to the memory of its process."""
ADDRESSES = 12 << 30
"""Bytes of addresses, so that a run that asks for all memory there is ends as one sentence."""
LONGEST_LINE = 10 * LONGEST + 100
"""Characters of a sentence: an encoding without a character writes up to ten for it."""
BATCH = 150
"""Trials of a worker, after which another takes its place."""
STYLES = re.compile(r"\x1b\[[0-9;]*m")
"""Colours, which a user may ask for."""
DIFFERENCE = {"verify", "conform", "router", "suite", "mutants"}
"""Commands that compare, so that their status may be 1."""
NO_VERDICT = {"verify", "conform", "router"}
"""Commands that judge, so that their status may be 3."""
CAPABILITIES = (1, 2)
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, by which root reads what it has no right to."""


@dataclass(frozen=True)
class Run:
    """A command line, run in the folder of a trial.

    encoding: of standard output and error   variables: if any, run in a process of its own with these
    writes: folders of inputs that it fills, as it is asked to
    """

    words: Sequence[str]
    encoding: str = "utf-8"
    variables: dict[str, str] | None = None
    writes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kind:
    """A kind of input.

    prepare: (number, dice, folder) -> the run; writes the inputs into the folder
    weight: its share of a campaign   size: how many inputs there are, where they are enumerated
    """

    prepare: Callable[[int, Random, Path], Run]
    weight: int
    size: int | None = None


@dataclass(frozen=True)
class Trial:
    """One input: the kind, its number, and the seed of the campaign."""

    kind: str
    number: int
    seed: int

    @property
    def dice(self) -> Random:
        return Random(f"{self.seed} {self.kind} {self.number}")

    def __str__(self) -> str:
        return f"{self.kind}:{self.number}:{self.seed}"


@dataclass
class Ended:
    """A run that has ended."""

    status: int | None
    out: bytes = b""
    err: bytes = b""
    seconds: float = 0.0
    memory: int = 0


@dataclass
class Judged:
    """A trial with its faults."""

    trial: Trial
    status: int | None
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0


# ---- the oracle


def faults(run: Run, ended: Ended, before: dict[str, Any], folder: Path) -> Iterator[str]:
    """The faults of a run, each a sentence."""
    encoding = run.encoding
    out, err = (text.decode(encoding, "surrogateescape") for text in (ended.out, ended.err))
    if run.variables is not None and "FORCE_COLOR" in run.variables:
        out, err = (STYLES.sub("", text) for text in (out, err))
    lines = err.splitlines()
    if ended.status not in range(4):
        yield f"its status is {ended.status}: {lines[-3:]}"
    command = next(iter(run.words), "")
    if (ended.status == 1 and command not in DIFFERENCE) or (ended.status == 3 and command not in NO_VERDICT):
        yield f"its status is {ended.status}, which this command does not have"
    if "Traceback" in out + err:
        yield "a traceback"
    if "Warning: " in err:
        yield f"a warning: {lines[:2]}"
    if acting := {c for c in out + err if acts(c)}:
        yield f"characters that act on a terminal: {sorted(map(ascii, acting))}"
    if (longest := max(map(len, lines), default=0)) > LONGEST_LINE:
        yield f"a line of {longest} characters on standard error"
    yield from _faults_of_streams(run, ended.status, out, lines)
    yield from _faults_of_files(run, ended.status, before, folder)
    if ended.seconds > SECONDS:
        yield f"it took {ended.seconds:.0f} seconds of the processor"
    if ended.memory > MEMORY:
        yield f"it took {ended.memory >> 20} MiB of memory"


def acts(character: str) -> bool:
    """Whether a character acts on a terminal: a control, or a change of direction."""
    kind = unicodedata.category(character)
    return (
        kind in ("Cc", "Zl", "Zp") and character not in "\n\t"
    ) or character in "\u202a\u202b\u202d\u202e\u2066\u2067\u2068"


def _faults_of_streams(run: Run, status: int | None, out: str, lines: list[str]) -> Iterator[str]:
    as_json = "--json" in (run.words[: run.words.index("--")] if "--" in run.words else run.words)
    usage = bool(lines) and lines[0].startswith("Usage: ")
    if status == 2 and not usage:
        said = [line for line in lines if not line.startswith("  ")]  # the log of a harness is indented
        if len(said) != 1 or not said[0].startswith("refmoe: "):
            yield f"status 2 with {len(said)} lines on standard error: {said[:3]}"
        if out and not as_json and "suite" not in run.words:
            yield f"status 2 with text on standard output: {out[:200]!r}"
    elif status == 2 and (len(lines) > 5 or not lines[-1].startswith("Error: ")):
        yield f"a usage error of another form: {lines[-3:]}"
    elif (
        status in (0, 1, 3)
        and lines
        and not all(line.startswith(("  ", "note", "refmoe: ", "the router printed")) for line in lines)
    ):
        yield f"status {status} with lines on standard error: {lines[:3]}"
    if (
        as_json
        and status in range(4)
        and "-h" not in run.words
        and "--help" not in run.words
        and "--version" not in run.words
    ):
        try:
            json.loads(out, parse_constant=_refuse)
        except ValueError as error:
            yield f"standard output is not JSON: {error}: {out[:100]!r}"


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def state(folder: Path) -> dict[str, Any]:
    """Every file below a folder: another inode, size or time of change tells that it was written."""
    found: dict[str, Any] = {}
    todo = [str(folder)]
    while todo:
        with suppress(PermissionError), os.scandir(todo.pop()) as entries:
            for entry in entries:
                facts = entry.stat(follow_symlinks=False)
                name = os.path.relpath(entry.path, folder)
                if stat.S_ISDIR(facts.st_mode):
                    found[name] = "folder"
                    todo.append(entry.path)
                else:
                    found[name] = (facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_mode)
    return found


def _faults_of_files(run: Run, status: int | None, before: dict[str, Any], folder: Path) -> Iterator[str]:
    after = state(folder)
    for name in before:
        if after.get(name) != before[name] and not name.startswith(run.writes):
            yield f"the input {name!r} was {'changed' if name in after else 'removed'}"
    outputs = [*run.writes, *(os.path.normpath(word) for word in run.words if word.startswith("out/"))]
    for name in after.keys() - before.keys():
        parts = name.partition(".parts")[0]
        if name not in outputs and (".tmp" in name or os.path.basename(name).startswith(".")):
            yield f"a temporary file {name!r} is left"
        elif name.endswith(".parts") and not any(
            each.startswith(f"{name}/") and each.endswith(".safetensors") for each in after
        ):
            yield f"{name!r} is left without a finished part"
        elif not any(each in (name, parts, ".") or name.startswith(f"{each}/") for each in outputs):
            yield f"the file {name!r} appeared"
        elif status != 1 and after[name] != "folder" and (why := _broken(folder / name)):
            yield f"the output {name!r} is broken: {why}"


def _broken(path: Path) -> str:
    """The reason for which a file is not what its name says, or nothing."""
    if path.is_symlink() or not path.is_file():
        return ""
    content = path.read_bytes()
    try:
        if path.suffix == ".json":
            json.loads(content, parse_constant=_refuse)
        elif path.suffix == ".html":
            return "" if content.rstrip().endswith(b"</html>") else "no end"
        elif path.suffix in (".xml", ".svg"):
            xml.etree.ElementTree.fromstring(content)
        elif path.suffix == ".safetensors":
            length = int.from_bytes(content[:8], "little")
            header = json.loads(content[8 : 8 + length])
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            return "" if max(ends, default=0) == len(content) - 8 - length else "its end is missing"
        return "" if content or not path.suffix else "empty"
    except (ValueError, KeyError, TypeError, xml.etree.ElementTree.ParseError) as error:
        return str(error)


# ---- a run, in this process


def execute(run: Run, folder: Path) -> Ended:
    """Run a command in this process, in a folder, with streams of its own."""
    if run.variables is not None:
        return _execute_apart(run, folder)
    from refmoe.cli import main
    from refmoe.jobs.source import loaded

    loaded.cache_clear()  # it keeps models by their paths, which are the same in every folder
    before_fds, streams = [os.dup(each) for each in (1, 2)], [os.memfd_create(each) for each in ("out", "err")]
    before = sys.argv, sys.stdout, sys.stderr, os.getcwd()
    for number, each in enumerate(streams, 1):
        os.dup2(each, number)
    own = [open(number, "w", encoding=run.encoding, errors="strict", closefd=False) for number in (1, 2)]  # noqa: SIM115
    sys.argv, sys.stdout, sys.stderr = ["refmoe", *run.words], own[0], own[1]
    os.chdir(folder)
    at_rest, used = _reset_peak(), _processor()
    status: int | None = None
    try:
        with warnings.catch_warnings():
            for category in (UserWarning, RuntimeWarning, FutureWarning):
                warnings.simplefilter("always", category)
            main()
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else 0 if left.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        seconds, memory = _processor() - used, _peak() - at_rest
        for each in own:
            with suppress(OSError, ValueError):
                each.flush()
        sys.argv, sys.stdout, sys.stderr = before[:3]
        os.chdir(before[3])
        for number, fd in enumerate(before_fds, 1):
            os.dup2(fd, number)
            os.close(fd)
    said = []
    for each in streams:
        said.append(os.pread(each, 1 << 24, 0))
        os.close(each)
    return Ended(status, said[0], said[1], seconds, memory)


def _execute_apart(run: Run, folder: Path) -> Ended:
    import subprocess

    command = [sys.executable, "-m", "refmoe", *(os.fsencode(word) for word in run.words)]
    used = _processor()
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **(run.variables or {})}, capture_output=True, check=False
    )
    return Ended(done.returncode, done.stdout, done.stderr, _processor() - used)


def _processor() -> float:
    """Seconds of the processor of this process and the children that have ended."""
    found = os.times()
    return found.user + found.system + found.children_user + found.children_system


def _reset_peak() -> int:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    """The most memory of this process, in bytes."""
    with suppress(OSError, AttributeError):
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10  # type: ignore[index]
    return 0


# ---- workers


def drop_rights() -> bool:
    """Give up the rights of root to read any file. Returns whether this process has none now."""
    if os.geteuid() != 0:
        return True

    class Header(ctypes.Structure):
        _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]

    class Data(ctypes.Structure):
        _fields_ = [("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32)]

    library = ctypes.CDLL(None, use_errno=True)
    header, data = Header(0x20080522, 0), (Data * 2)()
    if library.capget(ctypes.byref(header), data):
        return False
    for each in CAPABILITIES:
        for name in ("effective", "permitted", "inheritable"):
            setattr(data[0], name, getattr(data[0], name) & ~(1 << each))
    return library.capset(ctypes.byref(header), data) == 0


def attempt(trial: Trial, kinds: dict[str, Kind], keep: Path | None = None) -> Judged:
    """Prepare, run and judge a trial in this process.   keep: a folder for the inputs of trials with faults"""
    folder = Path(tempfile.mkdtemp(prefix="input-", dir=room()))
    try:
        (folder / "out").mkdir()
        run = kinds[trial.kind].prepare(trial.number, trial.dice, folder)
        before = state(folder)
        ended = execute(run, folder)
        found = [*faults(run, ended, before, folder)]
        if found and keep is not None:
            store(trial, run, ended, found, folder, keep)
        return Judged(trial, ended.status, found, ended.seconds)
    finally:
        remove(folder)


def store(trial: Trial, run: Run, ended: Ended, found: list[str], folder: Path, keep: Path) -> None:
    """Keep what is needed to see a fault again."""
    place = keep / str(trial).replace(":", "-").replace(" ", "-").replace("/", "-")
    place.mkdir(parents=True, exist_ok=True)
    command = [f"python -m tests.fuzz --repeat '{trial}'", f"in its folder: refmoe {' '.join(map(ascii, run.words))}"]
    (place / "command.txt").write_text("\n".join([*command, *found, ""]), encoding="utf-8", errors="backslashreplace")
    (place / "stdout").write_bytes(ended.out)
    (place / "stderr").write_bytes(ended.err)
    for each in folder.rglob("*"):
        with suppress(OSError):
            if each.is_file() and not each.is_symlink() and each.stat().st_size < 1 << 22:
                target = place / "inputs" / each.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(each, target)


def remove(folder: Path) -> None:
    """Remove a folder, whatever rights its folders have."""
    for name in (folder, *folder.rglob("*")):
        if name.is_dir() and not name.is_symlink():
            with suppress(OSError):
                name.chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)


@cache
def room() -> Path:
    """A folder for all trials of this process and its workers, in memory if possible. This process removes it."""
    memory = Path("/dev/shm")
    place = Path(tempfile.mkdtemp(prefix="fuzz-", dir=memory if os.access(memory, os.W_OK) else None))
    owner = os.getpid()
    atexit.register(lambda: remove(place) if os.getpid() == owner else None)
    return place


class Worker:
    """A process that attempts trials one after the other, and says what it begins and what it has found."""

    def __init__(self, trials: list[Trial], kinds: dict[str, Kind], keep: Path | None) -> None:
        self.left, self.keep = trials, keep
        self.began, self.used, self.text, self.closed = time.monotonic(), 0.0, b"", False
        self.reader, writer = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            _work(writer, trials, kinds, keep)
        os.close(writer)

    def poll(self) -> Iterator[Judged]:
        """The trials that have ended since, also when the worker died or had to be ended."""
        if not select.select([self.reader], [], [], 0.05)[0]:
            if time.monotonic() - self.began > WAIT or processor_of(self.pid) - self.used > 3 * SECONDS:
                yield self._end("it does not end")
            return
        piece = os.read(self.reader, 1 << 16)
        if not piece:
            if self.left:
                yield self._end("its process died")
            else:
                self.close()
            return
        *lines, self.text = (self.text + piece).split(b"\n")
        for line in lines:
            self.began, self.used = time.monotonic(), processor_of(self.pid)
            facts = json.loads(line)
            yield Judged(self.left.pop(0), facts["status"], facts["faults"], facts["seconds"])

    def _end(self, why: str) -> Judged:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        status = self.close()
        trial = self.left.pop(0)
        return Judged(trial, None, [f"{why} (worker's status {status})"], time.monotonic() - self.began)

    def close(self) -> int:
        """Wait for the end of the process."""
        os.close(self.reader)
        self.closed = True
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def processor_of(pid: int) -> float:
    """Seconds of the processor that a process and its ended children have used."""
    with suppress(OSError, ValueError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _work(writer: int, trials: list[Trial], kinds: dict[str, Kind], keep: Path | None) -> None:
    """The life of a worker."""
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, signal.SIGKILL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        drop_rights()
        for trial in trials:
            found = attempt(trial, kinds, keep)
            facts = {"status": found.status, "faults": found.faults, "seconds": round(found.seconds, 3)}
            os.write(writer, json.dumps(facts).encode() + b"\n")
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(99)


def campaign(
    trials: Iterator[Trial], kinds: dict[str, Kind], jobs: int = 1, keep: Path | None = None
) -> Iterator[Judged]:
    """Attempt trials in `jobs` workers. A worker that dies or hangs is a fault of its trial, and the others go on."""
    workers: list[Worker] = []
    try:
        while True:
            while len(workers) < jobs and (batch := [trial for trial, _ in zip(trials, range(BATCH), strict=False)]):
                workers.append(Worker(batch, kinds, keep))
            if not workers:
                return
            for worker in [*workers]:
                yield from worker.poll()
                if worker.closed:
                    workers.remove(worker)
                    if worker.left:
                        workers.append(Worker(worker.left, kinds, keep))
    finally:
        for worker in workers:
            with suppress(OSError):
                os.killpg(worker.pid, signal.SIGKILL)
            worker.close()
