# SPDX-License-Identifier: Apache-2.0
"""Processes that can be told by a variable in their environment, which a process hands on to all that it starts.

The guard ends all that a harness has started. A harness that ends the guard first would leave its children, which then
belong to nobody. They still have the variable.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

VARIABLE = "REFMOE_HARNESS"
"""The name of the variable."""
PATIENCE = 5.0
"""Seconds for which processes are ended, while they may go on starting new ones."""


def end_marked(mark: str) -> None:
    """End all processes whose variable has this value. Only Linux tells which they are."""
    deadline = time.monotonic() + PATIENCE
    while sys.platform == "linux" and (found := [*_marked(mark)]) and time.monotonic() < deadline:
        for order in (signal.SIGSTOP, signal.SIGKILL):  # a process that is stopped starts no others
            for pid in found:
                with suppress(OSError):
                    os.kill(pid, order)
        time.sleep(0.002)


def _marked(mark: str) -> Iterator[int]:
    """The processes of this value that have not ended."""
    entry = f"{VARIABLE}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is of another user
            handle = os.open(folder / "environ", os.O_RDONLY)
            try:
                # of a process that has ended, and waits for its parent, it is empty
                if entry in os.read(handle, 1 << 20).split(b"\0"):
                    yield int(folder.name)
            finally:
                os.close(handle)
