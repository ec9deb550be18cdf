# SPDX-License-Identifier: Apache-2.0
"""The signals that end a run, as exceptions: so harnesses end, and temporary folders are removed."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from types import FrameType

ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""A request to end, and the end of the terminal. SIGINT is an exception already."""

PATIENCE = 10.0
"""Seconds that cleaning up may take, before a second signal raises again."""


class EndedBySignal(SystemExit):
    """A signal asks this process to end. Its code is the conventional exit status, 128 + number."""


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """While the context lasts, these signals raise `EndedBySignal`.

    A second one soon after changes nothing, so that it cannot interrupt the cleaning up. A signal that is ignored, or
    that the program handles itself, is left alone. So are all in another thread than the main one, which gets none.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = [each for each in ENDING if signal.getsignal(each) is signal.SIG_DFL]

    last = -math.inf

    def end(number: int, _frame: FrameType | None) -> None:
        nonlocal last
        now = monotonic()
        if now - last > PATIENCE:
            last = now
            raise EndedBySignal(128 + number)

    for each in ours:
        signal.signal(each, end)
    try:
        yield
    finally:
        for each in ours:
            signal.signal(each, signal.SIG_DFL)
