# SPDX-License-Identifier: Apache-2.0
"""Check a function in a process of its own, with a time limit: it may print, leave, crash or never end.

The process answers in JSON, so nothing that the function makes is executed here. What it prints is kept apart.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from refmoe.api.contracts import named_laws
from refmoe.api.progress import Bars, silent
from refmoe.errors import InputError
from refmoe.files.parsing import strict_json
from refmoe.parallel import ONE_THREAD, SPAWN, begin_worker, environment, lifeline

if TYPE_CHECKING:
    from refmoe.contracts.checking import Verdict
    from refmoe.contracts.law import Contract, Law

TIMEOUT = 120.0
"""Seconds for each law, and for the import of the module."""
PATIENCE = 5.0
"""Seconds for a process to end after it has closed its pipe."""
LONGEST_ANSWER = 64 << 20
KEPT = 20
"""The most lines of what a router printed that are kept: the last ones."""
WIDEST = 1000
NO_FOLDER = os.path.join(os.devnull, "none")
"""A path that can never be made."""


@dataclass(frozen=True)
class Asked:
    """A function, and how to check it. All values are of JSON."""

    function: str
    """``module:function`` or ``file.py:function``."""
    laws: tuple[str, ...] = ()
    """The names of the laws to try; empty: all."""
    examples: int | None = None
    """For each law; the number of the contract if not given."""
    claims: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the check: what is declared about the function."""


@dataclass
class Checked:
    """The verdicts about a function, and what it printed."""

    verdicts: list[Verdict] = field(default_factory=list)
    printed: list[str] = field(default_factory=list)
    """The last lines that it printed."""
    bytes_printed: int = 0


def check_apart(
    check: Callable[..., object], contract: Contract, asked: Asked, timeout: float = TIMEOUT, bars: Bars = silent
) -> Checked:
    """Check a function as `check` does, in a process of its own.

    check: as `refmoe.api.routing.check_router`, a function of a module   contract: the laws by which it judges
    timeout: seconds for each law, and for the import
    A function that ends its process, or needs more time, breaks the law that was being tried. No later law is judged.
    Raises InputError for an unknown law or claim, and for a function that cannot be imported.
    """
    names = named_laws(asked.laws, contract.laws)
    found = Checked()
    with environment(ONE_THREAD), lifeline() as line:
        (answers, answering), (prints, printing) = SPAWN.Pipe(duplex=False), SPAWN.Pipe(duplex=False)
        arguments = (check, json.dumps(asdict(asked)), line, answering, printing)
        process = SPAWN.Process(target=_work, args=arguments, daemon=True)
        process.start()
        answering.close()
        printing.close()
        reader = threading.Thread(target=_keep, args=(prints, found), daemon=True)
        reader.start()
        try:
            talk = _Talk(process, answers, contract.subject)
            _follow(asked, [contract.laws[name] for name in names], timeout, talk, found, bars)
        finally:
            _end(process)
            reader.join(PATIENCE)
            answers.close()
    return found


def _follow(asked: Asked, laws: Sequence[Law], timeout: float, talk: _Talk, found: Checked, bars: Bars) -> None:
    """Take the answers of the process: one after the import, then one for each law."""
    from refmoe.contracts.checking import Verdict

    _, problem = talk.next(timeout)
    if problem:
        raise InputError(f"{asked.function}: cannot be imported: it {problem}")
    with bars("laws", len(laws)) as advance:
        for number, law in enumerate(laws):
            answer, problem = talk.next(timeout)
            if problem:
                found.verdicts.append(Verdict(law, "fail", f"the {talk.subject} {problem}"))
                reason = f"the {talk.subject} {problem} at law {law.name}"
                found.verdicts += [Verdict(later, "not judged", reason) for later in laws[number + 1 :]]
                return
            found.verdicts.append(Verdict(law, **answer))
            advance()


class _Talk:
    """The answers of a process, one after the other."""

    def __init__(self, process: Any, answers: Connection, subject: str) -> None:
        self.process, self.answers, self.subject = process, answers, subject

    def next(self, timeout: float) -> tuple[dict[str, Any], str]:
        """The next answer, or in words why there is none. Raises the error that the process reports as refmoe's."""
        try:
            if not self.answers.poll(timeout):
                return {}, f"did not return within {timeout:g} s"
            answer = strict_json(self.answers.recv_bytes(LONGEST_ANSWER))
            kind, value = answer["kind"], answer["value"]
        except (EOFError, ConnectionError):
            return {}, f"ended its process, {self._how()}"
        except (OSError, ValueError, TypeError, KeyError):
            return {}, "broke the connection of its process"
        if kind == "refused":
            raise InputError(value)
        if kind == "defect":
            raise RuntimeError(f"the process of the {self.subject} failed:\n{value}")
        return value, ""

    def _how(self) -> str:
        self.process.join(PATIENCE)
        status = self.process.exitcode
        if status is None:
            return "or closed the connection"
        if status >= 0:
            return f"with exit status {status}"
        with suppress(ValueError):
            return f"by {signal.Signals(-status).name}"
        return f"by signal {-status}"


def _end(process: Any) -> None:
    """End the process, and those that it started in its session."""
    if hasattr(os, "killpg") and process.pid is not None:
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _keep(prints: Connection, found: Checked) -> None:
    """Read all that the process prints, and keep the last lines."""
    lines: deque[bytes] = deque([b""], maxlen=KEPT)
    with closing(prints):
        while True:
            try:
                block = os.read(prints.fileno(), 1 << 16)
            except OSError:
                break
            if not block:
                break
            found.bytes_printed += len(block)
            first, *others = block.split(b"\n")
            lines[-1] = (lines[-1] + first)[:WIDEST]
            lines.extend(line[:WIDEST] for line in others)
            found.printed = [line.decode("utf-8", "backslashreplace") for line in lines if line]


# ---- in the process of the function


def _work(
    check: Callable[..., object], text: str, line: Connection, answering: Connection, printing: Connection
) -> None:
    """Check the function and send a verdict for each law. What anybody prints goes into the pipe."""
    begin_worker(line)
    if hasattr(os, "setsid"):
        os.setsid()
    for number in (1, 2):
        os.dup2(printing.fileno(), number)
    os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", NO_FOLDER)  # else it keeps a cache in the working folder
    asked = Asked(**strict_json(text))

    def send(kind: str, value: Any = None) -> None:
        answering.send_bytes(json.dumps({"kind": kind, "value": value}).encode())

    def tell(verdict: Verdict) -> None:
        from refmoe.contracts.checking import printable

        example = None if verdict.example is None else printable(verdict.example)
        send("verdict", {
            "outcome": verdict.outcome, "words": verdict.words, "examples": verdict.examples, "example": example,
            "token": verdict.token,
        })  # fmt: skip

    try:
        check(
            asked.function, examples=asked.examples, laws=asked.laws, ready=lambda: send("ready"), tell=tell,
            **asked.claims,
        )  # fmt: skip
    except InputError as error:
        send("refused", str(error))
    except Exception:
        send("defect", traceback.format_exc())
