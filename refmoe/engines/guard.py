# SPDX-License-Identifier: Apache-2.0
"""A process between refmoe and a harness: it runs one program, and ends all processes that this program started.

    python -I -S guard.py LIFE REPORT PROGRAM [ARGUMENT ...]

LIFE and REPORT are descriptors of pipes. REPORT gets an error number where the program cannot be started, else nothing.
The end of LIFE is the order to end everything. It comes when refmoe closes it, and when refmoe dies, however it dies.
The program has the pipes of standard input, output and error for itself. The guard ends as the program has ended.

On Linux the guard adopts every process whose parent has ended. So it finds children that have left the process group.
On other systems it ends the process group. The file needs nothing but the standard library, so that it starts quickly.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import select
import signal
import sys
import time
from contextlib import suppress

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
"""Of prctl(2)."""
PATIENCE = 5.0
"""Seconds for which processes are ended, while they may go on starting new ones."""
LOOK = 1.0
"""Seconds between two checks that refmoe lives. A fork of refmoe may hold the other end of LIFE."""
NOT_STARTED = 127


def prctl(option: int, value: int) -> None:
    """Set an attribute of this process. Other systems than Linux have none."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def start(command: list[str], report: int) -> int:
    """Start the program in a session of its own.   returns: its process id"""
    child = os.fork()
    if child:
        return child
    os.setsid()
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)  # Python ignores both, and a program would inherit that
    try:
        os.execvp(command[0], command)
    except (OSError, ValueError) as error:
        os.write(report, str(getattr(error, "errno", errno.ENOENT)).encode())
    os._exit(NOT_STARTED)


def status_line(pid: int) -> bytes:
    """The line of a process in /proc. Raises OSError when it has ended."""
    handle = os.open(f"/proc/{pid}/stat", os.O_RDONLY)
    try:
        return os.read(handle, 1 << 12)
    finally:
        os.close(handle)


def descendants() -> list[int]:
    """The processes below this one that have not ended."""
    parents: dict[int, int] = {}
    ended = set()
    for name in os.listdir("/proc"):
        with suppress(OSError, ValueError, IndexError):
            # the name of a program may have blanks and parentheses, but nothing after it has
            state, parent, *_ = status_line(int(name)).rpartition(b")")[2].split()
            parents[int(name)] = int(parent)
            if state in (b"Z", b"X"):
                ended.add(int(name))
    below, last = {os.getpid()}, 0
    while len(below) > last:
        last = len(below)
        below |= {pid for pid, parent in parents.items() if parent in below}
    return sorted(below - ended - {os.getpid()})


def end_all(child: int) -> None:
    """End the program, its process group and, on Linux, all processes below this one."""
    with suppress(OSError):
        os.killpg(child, signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE
    while sys.platform == "linux" and (alive := descendants()) and time.monotonic() < deadline:
        for order in (signal.SIGSTOP, signal.SIGKILL):  # a process that is stopped starts no others
            for pid in alive:
                with suppress(OSError):
                    os.kill(pid, order)
        reap(child)
        time.sleep(0.002)


def reap(child: int) -> int | None:
    """Take leave of all children that have ended.   returns: the status of the program, if it was among them"""
    found = None
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == child:
                found = ended[1]
    return found


def end_alike(status: int) -> None:
    """End this process as another one has ended.   status: as `os.waitpid` gives it"""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with suppress(OSError, ValueError):  # the disposition of SIGKILL cannot be set
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        time.sleep(LOOK)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def main(life: int, report: int, command: list[str]) -> None:
    """Run the program until it ends, or LIFE does."""
    given, life = life, os.dup(life)  # `select` takes no descriptor above 1023, and refmoe may have many files open
    os.close(given)
    refmoe = os.getppid()
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        # a function and not SIG_IGN, which the program would inherit
        if signal.getsignal(number) is not signal.SIG_IGN or number == signal.SIGCHLD:
            signal.signal(number, lambda *_: None)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    for descriptor in (life, report):
        os.set_inheritable(descriptor, False)
    child = start(command, report)
    os.close(report)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    while True:
        readable, _, _ = select.select([life, woken], [], [], LOOK)
        if life in readable or os.getppid() != refmoe:
            end_all(child)
            os._exit(0)
        if woken in readable:
            os.read(woken, 1 << 12)
        status = reap(child)
        if status is not None:
            end_all(child)
            end_alike(status)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
