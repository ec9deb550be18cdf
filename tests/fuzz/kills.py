# SPDX-License-Identifier: Apache-2.0
"""A campaign of kills: commands are killed at random moments, and then run again.

    python -m tests.fuzz.kills --count 200 --json counts.json
    python -m tests.fuzz.kills --count 20 --only emit --seed 7

Only the command itself gets the signal. What must hold: after ten seconds no process of its session is alive; the same
command, run again, ends well; its files are those of a command that nobody killed, byte for byte, and no others; the
folder for temporary files is empty. In half of the trials of a command that writes, the moment is that in which a
temporary file is seen. All other moments are determined by the seed.
"""

from __future__ import annotations

import argparse
import hashlib
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.fuzz.inputs_kinds import KERNEL

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "golden"
CASES = ("one-pair", "near-tie", "top-1")
GRACE = 10.0
"""Seconds after which no process may be alive."""
LONGEST = 600.0
"""Seconds after which a command counts as one that does not end."""
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)
"""Half of the signals cannot be caught."""
ROUTER = """\
import numpy as np

def route(x):
    ids = np.argsort(-x, axis=1, kind="stable")[:, :2]
    e = np.exp(np.take_along_axis(x, ids, 1) - x.max(axis=1, keepdims=True))
    return ids, e / e.sum(axis=1, keepdims=True)
"""


@dataclass(frozen=True)
class Command:
    """A command to kill. Its words are those after ``refmoe``; it runs in a folder of its own."""

    words: str
    prepare: Callable[[Path], None]
    writes: bool = True


def golden(folder: Path) -> None:
    """A golden folder of a few cases."""
    shutil.copytree(prepared() / "golden", folder / "golden")


def bare_golden(folder: Path) -> None:
    """A golden folder with the definitions of these cases only."""
    for name in CASES:
        (folder / "golden" / name).mkdir(parents=True)
        shutil.copy(GOLDEN / name / "case.toml", folder / "golden" / name)


def model(folder: Path) -> None:
    """A checkpoint and a trace of it."""
    shutil.copytree(prepared() / "model", folder / "model")
    shutil.copy(prepared() / "trace", folder / "trace")


def router(folder: Path) -> None:
    (folder / "router.py").write_text(ROUTER)


def kernel(folder: Path) -> None:
    (folder / "kernel.py").write_text(KERNEL)


def nothing(_folder: Path) -> None:
    """No input."""


COMMANDS = {
    "suite check": Command("suite check --golden golden --executor processes:2", golden, writes=False),
    "suite certify": Command("suite certify --golden golden --executor processes:2", golden),
    "suite pack": Command("suite pack out --size full --golden golden --executor processes:2", golden),
    "suite emit": Command("suite emit --golden golden --executor processes:2", bare_golden),
    "emit": Command("emit --checkpoint model --tokens 1,2,3,4,5 --decode 6,7 --out out", model),
    "emit processes": Command(
        "emit --checkpoint model --tokens 1,2,3,4,5 --decode 6,7 --out out --executor processes:2", model
    ),
    "materialise": Command("materialise walking-skeleton out", nothing),
    "verify": Command("verify trace --checkpoint model --policy float32 --html page --junit tests.xml", model),
    "verify processes": Command(
        "verify trace --checkpoint model --policy float32 --executor processes:2 --junit tests.xml", model
    ),
    "mutants matrix": Command(
        "mutants matrix --mutant rope-sign-flipped --mutant norm-eps-outside-sqrt --case one-pair "
        "--executor processes:2",
        nothing,
        writes=False,
    ),
    "kernel check": Command("kernel check kernel.py:experts --examples 10", kernel, writes=False),
    "router check": Command(
        "router check router.py:route --experts 8 --top-k 2 --examples 10", router, writes=False
    ),
}  # fmt: skip


@cache
def prepared() -> Path:
    """A golden folder of a few cases, a checkpoint, and a trace of it in float32."""
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    bare_golden(folder)
    for words in (
        "suite emit --golden golden",
        "materialise walking-skeleton model",
        "emit --checkpoint model --tokens 1,2,3,4,5 --dtype float32 --out trace",
    ):
        subprocess.run(program(words), cwd=folder, env=surroundings(folder), check=True, stdout=subprocess.DEVNULL)
    return folder


def program(words: str) -> list[str]:
    return [sys.executable, "-m", "refmoe", *words.split()]


def surroundings(folder: Path) -> dict[str, str]:
    """The environment of a command: refmoe of this clone, and a folder for temporary files that only it uses."""
    temporary = folder.with_name(folder.name + "-tmp")
    temporary.mkdir(exist_ok=True)
    return {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary), "PYTHONDONTWRITEBYTECODE": "1"}


@contextmanager
def workplace(command: Command) -> Iterator[Path]:
    """A folder with the inputs of a command."""
    with tempfile.TemporaryDirectory(prefix="kill-") as name:
        folder = Path(name) / "work"
        folder.mkdir()
        command.prepare(folder)
        yield folder


def content(folder: Path) -> dict[str, str]:
    """The digest of every file, and the name of every folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def start(command: Command, folder: Path) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own."""
    with (folder.parent / "printed").open("wb") as printed:
        return subprocess.Popen(
            program(command.words), cwd=folder, env=surroundings(folder), start_new_session=True, stdout=printed,
            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip


@cache
def undisturbed(name: str) -> tuple[float, dict[str, str]]:
    """How many seconds a command takes, and the files that it leaves."""
    command = COMMANDS[name]
    with workplace(command) as folder:
        began = time.monotonic()
        assert start(command, folder).wait(LONGEST) == 0, (folder.parent / "printed").read_text()
        return time.monotonic() - began, content(folder)


# ---- a kill


def living(session: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == session and fields[0] not in "ZX":
                    found.append(int(entry.name))
    return found


def end_of(session: int) -> list[int]:
    """The processes of a session that are alive after the time of grace. They are killed."""
    deadline = time.monotonic() + GRACE
    while (left := living(session)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in left:
        with suppress(OSError):
            os.kill(process, signal.SIGKILL)
    return left


def wait_for_moment(process: subprocess.Popen[bytes], folder: Path, seconds: float, until_writing: bool) -> None:
    """Wait for some seconds, or until a temporary file is in the folder, or the process ends."""
    deadline = time.monotonic() + (LONGEST if until_writing else seconds)
    while process.poll() is None and time.monotonic() < deadline:
        if until_writing and next(folder.rglob(".*.tmp"), None) is not None:
            return
        time.sleep(min(0.002, seconds))


@dataclass(frozen=True)
class Trial:
    """One kill."""

    name: str
    seed: int

    def run(self) -> tuple[bool, list[str]]:
        """Whether the signal met a living command, and the faults."""
        command, dice = COMMANDS[self.name], random.Random(f"{self.name} {self.seed}")
        seconds, expected = undisturbed(self.name)
        number, moment = dice.choice(SIGNALS), dice.uniform(0.05, seconds)
        until_writing = command.writes and dice.random() < 0.5
        with workplace(command) as folder:
            process = start(command, folder)
            wait_for_moment(process, folder, moment, until_writing)
            process.send_signal(number)
            status = process.wait(LONGEST)
            hit = status in (-number, 128 + number)
            alive = end_of(process.pid)
            faults = [f"{len(alive)} processes outlive it"] if alive else []
            if not hit and status != 0:
                faults.append(f"status {status} after {number.name}: {said(folder)}")
            again = start(command, folder)
            if again.wait(LONGEST):
                faults.append(f"run again, its status is {again.returncode}: {said(folder)}")
            found = content(folder)
            faults += [f"{path} is left over" for path in found.keys() - expected.keys()]
            faults += [f"{path} is missing" for path in expected.keys() - found.keys()]
            faults += [f"{path} differs" for path in found.keys() & expected.keys() if found[path] != expected[path]]
            temporary = Path(surroundings(folder)["TMPDIR"])
            faults += [f"{path.name} is left in TMPDIR" for path in temporary.iterdir()]
        return hit, faults


def said(folder: Path) -> str:
    """The end of what the command has printed."""
    return (folder.parent / "printed").read_text(errors="replace")[-300:]


def trials(count: int, seed: int, only: str = "") -> Iterator[Trial]:
    """Trials of all commands in turn."""
    names = [name for name in COMMANDS if only in name]
    for number in range(count):
        yield Trial(names[number % len(names)], seed + number)


def totals(tried: Counter[str], hits: Counter[str], faulty: Counter[str]) -> dict[str, int]:
    """The sums over all commands."""
    return {"tried": tried.total(), "killed": hits.total(), "faults": faulty.total()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20, help="kills that meet a living command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="a part of the names of commands")
    parser.add_argument("--json", type=Path, help="where to write the counts")
    parser.add_argument("--resume", action="store_true", help="go on from the counts in the file of --json")
    options = parser.parse_args()
    tried, hits, faulty = Counter[str](), Counter[str](), Counter[str]()
    if options.resume:
        for name, counts in json.loads(options.json.read_text())["commands"].items():
            tried[name], hits[name], faulty[name] = counts["tried"], counts["killed"], counts["faults"]
    for trial in list(trials(2 * options.count, options.seed, options.only))[tried.total() :]:
        if hits.total() >= options.count:
            break
        hit, faults = trial.run()
        tried[trial.name] += 1
        hits[trial.name] += hit
        faulty[trial.name] += bool(faults)
        for fault in faults:
            print(f"{trial.name}, seed {trial.seed}: {fault}", flush=True)
        if options.json is not None:
            facts = {
                each: {"tried": tried[each], "killed": hits[each], "faults": faulty[each]}
                for each in COMMANDS
                if tried[each]
            }
            counts = {"seed": options.seed, "total": totals(tried, hits, faulty), "commands": facts}
            options.json.write_text(json.dumps(counts, indent=1) + "\n")
    print(json.dumps(totals(tried, hits, faulty)))
    shutil.rmtree(prepared(), ignore_errors=True)
    sys.exit(bool(faulty.total()))


if __name__ == "__main__":
    main()
