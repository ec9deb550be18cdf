# SPDX-License-Identifier: Apache-2.0
"""A clock that runs during some calls alone, the time of child processes, and their start as users have it."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from functools import wraps
from typing import Any


class Clock:
    """Seconds spent in calls."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        """now: the time of some clock, in seconds"""
        self.spent, self._now = 0.0, now

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, whose time is added."""

        @wraps(call)
        def within(*arguments: Any, **named: Any) -> Any:
            start = self._now()
            try:
                return call(*arguments, **named)
            finally:
                self.spent += self._now() - start

        return within


def of_children() -> float:
    """Seconds of a processor that all ended child processes of this one have used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def keep_bytecode() -> None:
    """Let child processes keep the bytecode of modules, as Python does for users. Some environments forbid it."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
