"""A harness as a process: started, asked one request at a time within a time limit, and killed with all it started.

Nothing that the process does (hang, flood, die half way through a line, leave a child behind that holds its pipes) can
make a call here wait longer than its limit.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from time import monotonic
from typing import Any

from refmoe.engines.messages import Message, MessageError, encode, parse
from refmoe.errors import InputError
from refmoe.files.safetensors_file import one_line

CRASHED, TIMED_OUT, BROKEN = "crashed", "timed out", "broken answer"
"""How a harness can fail."""

LONGEST_LINE = 1 << 20
"""Bytes of an answer."""
KEPT = 4096
"""Bytes of standard error that are kept, the last ones."""
GRACE = 5.0
"""Seconds that a process may take to end when it has been asked to stop."""
PIECE = 1 << 16
LOOK = 0.05
"""Seconds between two looks at whether the process still lives: a child of its may keep the pipes open."""


class HarnessError(Exception):
    """A harness has failed at a request."""

    def __init__(self, kind: str, reason: str) -> None:
        """kind: CRASHED, TIMED_OUT or BROKEN.   reason: one sentence, the same each time for the same failure."""
        super().__init__(reason)
        self.kind = kind
        self.reason = reason


class Process:
    """One process that speaks the protocol."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """environment: variables besides those of this process.   Raises InputError when there is no such program."""
        try:
            self._process: subprocess.Popen[bytes] = subprocess.Popen(
                command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                env={**os.environ, **(environment or {})}, start_new_session=True,
            )  # fmt: skip
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else one_line(error)
            raise InputError(f"harness '{command[0]}' cannot be started: {why}") from None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._in, self._out, self._err = self._process.stdin, self._process.stdout, self._process.stderr
        for pipe in (self._in, self._out, self._err):
            os.set_blocking(pipe.fileno(), False)
        self._received = b""
        self._errors = b""

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
        """The last of what it wrote to standard error, at most 4 kB."""
        self._read()
        return self._errors.decode(errors="replace")

    @property
    def lives(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> str | None:
        """Ask it to stop, and kill it if it does not.   returns: what was wrong with its end, in a sentence"""
        try:
            answer = self.ask({"command": "stop"}, GRACE)
            self._in.close()
            status = self._wait(GRACE)
        except HarnessError as error:
            return f"stop: {error.reason}"
        finally:
            self.kill()
        if status is None:
            return f"it was killed, as it had not ended {GRACE:g} seconds after stop"
        if status != 0:
            return f"after stop it {ending(status)}, but status 0 was expected"
        return None if answer == {"ok": True} else 'its answer to stop is not {"ok": true}'

    def kill(self) -> None:
        """End the process and its group, at once."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._read()  # the last words
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
        """What to say when no more can come."""
        status = self._wait(1.0)
        self._read()
        if status is None:
            return HarnessError(BROKEN, f"it closed its output instead of an answer to {command}")
        where = "in the middle of its answer" if self._received else "before it answered"
        return HarnessError(CRASHED, f"it {ending(status)} {where} to {command}")

    def _write(self, data: bytes) -> bytes:
        """Write what fits.   returns: the rest"""
        try:
            return data[os.write(self._in.fileno(), data) :]
        except BlockingIOError:
            return data
        except OSError:
            return b""  # it reads no more; that it has ended, or answers all the same, is seen elsewhere

    def _read(self) -> None:
        """Take what is there without waiting, a few pieces of it where it does not end."""
        for pipe in (self._out, self._err):
            for _ in range(2 * LONGEST_LINE // PIECE):
                if pipe.closed or not self._take(pipe):
                    break

    def _take(self, pipe: Any) -> bytes | None:
        """A piece of one pipe, which is kept: None where nothing is there now, empty where nothing can come."""
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
    """How a process ended, in words."""
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"


def _start(data: bytes) -> str:
    return repr(data[:60].decode(errors="replace"))
