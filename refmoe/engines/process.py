# SPDX-License-Identifier: Apache-2.0
"""A harness as a process: started, asked one request at a time within a time limit, and killed with all it started.

No call here waits longer than its limit, whatever the process does. It may hang, flood its pipes, die in the middle of
a line, or leave a child behind that holds the pipes. A guard between the two (`guard`) ends with it all that it
started, also when refmoe itself is killed.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any
from uuid import uuid4

from refmoe.engines.marked import VARIABLE, end_marked
from refmoe.engines.protocol import Message, MessageError, encode, parse
from refmoe.errors import InputError
from refmoe.files.sentences import one_line

CRASHED, TIMED_OUT, BROKEN = "crashed", "timed out", "broken answer"
"""The kinds of failure of a harness."""

LONGEST_LINE = 1 << 20
"""Bytes of an answer, at most."""
KEPT = 4096
"""The last bytes of standard error are kept: this many."""
GRACE = 5.0
"""Seconds that a process may take to end after it was asked to stop, at least."""
SHARE = 60
"""It may take the time for a request over this number. On a busy machine, both take longer."""
PIECE = 1 << 16
"""Bytes that are read from a pipe at once."""
GUARD = Path(__file__).with_name("guard.py")
"""The program of the guard."""
LOOK = 0.05
"""Seconds between two checks that the process still lives. Open pipes prove nothing: a child may hold them."""


def new_pipe() -> tuple[int, int]:
    """A pipe beside the standard streams, whose places another process fills, also where some of them are closed."""
    low: list[int] = []
    ends = os.pipe()
    while min(ends) < 3:
        low += ends
        ends = os.pipe()
    for each in low:
        os.close(each)
    return ends


class HarnessError(Exception):
    """A harness has failed at a request."""

    def __init__(self, kind: str, reason: str) -> None:
        """kind: CRASHED, TIMED_OUT or BROKEN.   reason: one sentence, which a repetition of the failure gives again."""
        super().__init__(reason)
        self.kind = kind
        self.reason = reason


class Process:
    """One process that speaks the protocol."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """Start it. Raises InputError when there is no such program.

        environment: variables besides those of this process.
        """
        self._mark = uuid4().hex
        variables = {**os.environ, **(environment or {}), VARIABLE: self._mark}
        life, self._life = new_pipe()
        told, report = new_pipe()
        guarded = [sys.executable, "-I", "-S", str(GUARD), str(life), str(report), *command]
        try:
            self._process: subprocess.Popen[bytes] = subprocess.Popen(
                guarded, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                env=variables, start_new_session=True, pass_fds=(life, report),
            )  # fmt: skip
        except (OSError, ValueError) as error:
            os.close(self._life)
            os.close(told)
            raise _not_started(command, error) from None
        finally:
            os.close(life)
            os.close(report)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._in, self._out, self._err = self._process.stdin, self._process.stdout, self._process.stderr
        for pipe in (self._in, self._out, self._err):
            os.set_blocking(pipe.fileno(), False)
        self._received = b""
        self._errors = b""
        try:
            number = os.read(told, PIECE)  # ends when the program has been started, or cannot be
        finally:
            os.close(told)
        if number:
            self.kill()
            raise _not_started(command, OSError(int(number), os.strerror(int(number))))

    def ask(self, request: Mapping[str, Any], limit: float) -> Message:
        """The answer to a request, a JSON object.   limit: seconds.   Raises HarnessError."""
        command = request["command"]
        self._read()
        if self._received:
            raise HarnessError(BROKEN, f"it wrote before it was asked to {command}: {_start(self._received)}")
        line = self._exchange(encode(request), command, monotonic() + limit, limit)
        try:
            answer = parse(line)
        except MessageError as error:
            raise HarnessError(BROKEN, f"its answer to {command}: {error}") from None
        if self._received:
            raise HarnessError(BROKEN, f"it wrote more than one line in answer to {command}: {_start(self._received)}")
        return answer

    @property
    def errors(self) -> str:
        """The end of its standard error, at most 4 kB."""
        self._read()
        return self._errors.decode(errors="replace")

    @property
    def lives(self) -> bool:
        return self._process.poll() is None

    @property
    def status(self) -> int:
        """The status with which it has ended, as of `subprocess.Popen.returncode`; 0 while it lives."""
        return self._process.poll() or 0

    def stop(self, limit: float = 0.0) -> str | None:
        """Ask it to stop, and kill it if it does not.   returns: a sentence about an irregular end, or None

        limit: seconds that any other request may take
        """
        grace = max(GRACE, limit / SHARE)
        try:
            answer = self.ask({"command": "stop"}, grace)
            self._in.close()
            status = self._wait(grace)
        except HarnessError as error:
            return f"stop: {error.reason}"
        finally:
            self.kill()
        if status is None:
            return f"it was killed, as it had not ended {grace:g} seconds after stop"
        if status != 0:
            return f"after stop it {ending(status)}, but status 0 was expected"
        return None if answer == {"ok": True} else 'its answer to stop is not {"ok": true}'

    def kill(self) -> None:
        """End the process and all that it has started, at once."""
        if self._life >= 0:
            life, self._life = self._life, -1
            os.close(life)
        if self._wait(2 * GRACE) is None:  # the guard itself has been stopped; the process ends with it
            self._process.kill()
            self._process.wait()
        end_marked(self._mark)  # the guard has done so, unless the process has ended the guard
        self._read()  # its last words
        for pipe in (self._in, self._out, self._err):
            with suppress(OSError):
                pipe.close()

    def _exchange(self, request: bytes, command: str, deadline: float, limit: float) -> bytes:
        """Write a request and read a line."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._in, selectors.EVENT_WRITE)
            for pipe in (self._out, self._err):
                selector.register(pipe, selectors.EVENT_READ)
            while True:
                line, found, rest = self._received.partition(b"\n")
                if found:
                    self._received = rest
                    return line
                if len(line) > LONGEST_LINE:
                    raise HarnessError(BROKEN, f"its answer to {command} has no end: {LONGEST_LINE} bytes in one line")
                if monotonic() >= deadline:
                    raise HarnessError(TIMED_OUT, f"no answer to {command} within {limit:g} seconds")
                for key, _ in selector.select(min(LOOK, deadline - monotonic())):
                    if key.fileobj is self._in:
                        request = self._write(request)
                        if not request:
                            selector.unregister(self._in)
                    elif self._take(key.fileobj) == b"":
                        selector.unregister(key.fileobj)
                        if key.fileobj is self._out:
                            raise self._ended(command)
                if b"\n" not in self._received and not self.lives and not self._take(self._out):
                    raise self._ended(command)

    def _ended(self, command: str) -> HarnessError:
        """The error for a process whose output has ended."""
        status = self._wait(GRACE / 2)
        self._read()
        if status is None:
            return HarnessError(BROKEN, f"it closed its output instead of an answer to {command}")
        where = "in the middle of its answer" if self._received else "before it answered"
        return HarnessError(CRASHED, f"it {ending(status)} {where} to {command}")

    def _write(self, data: bytes) -> bytes:
        """Write as much as the pipe takes.   returns: the rest"""
        try:
            return data[os.write(self._in.fileno(), data) :]
        except BlockingIOError:
            return data
        except OSError:
            return b""  # it reads no more; `_exchange` sees whether it has ended or answers all the same

    def _read(self) -> None:
        """Read both pipes without waiting; of a pipe that never runs dry, only a few pieces."""
        for pipe in (self._out, self._err):
            for _ in range(2 * LONGEST_LINE // PIECE):
                if pipe.closed or not self._take(pipe):
                    break

    def _take(self, pipe: Any) -> bytes | None:
        """Read and keep a piece of one pipe.   returns: None where nothing is there yet, empty at its end"""
        try:
            data = os.read(pipe.fileno(), PIECE)
        except BlockingIOError:
            return None
        except OSError:
            return b""
        if pipe is self._err:
            self._errors = (self._errors + data)[-KEPT:]
        elif len(self._received) <= LONGEST_LINE:
            self._received += data
        return data

    def _wait(self, seconds: float) -> int | None:
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None


def ending(status: int) -> str:
    """The end of a process in words.   status: as of `subprocess.Popen.returncode`"""
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"


def _not_started(command: Sequence[str], error: OSError | ValueError) -> InputError:
    why = error.strerror if isinstance(error, OSError) else one_line(error)
    return InputError(f"harness '{command[0]}' cannot be started: {why}")


def _start(data: bytes) -> str:
    return repr(data[:60].decode(errors="replace"))
