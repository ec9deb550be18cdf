# SPDX-License-Identifier: Apache-2.0
"""Progress of long work: the type of a function that opens a bar, and the one that shows nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Bars = Callable[[str, int], AbstractContextManager[Callable[[], None]]]
"""Opens a bar with a title and a number of items. It gives a function to call after each item."""


@contextmanager
def silent(_title: str, _total: int) -> Iterator[Callable[[], None]]:
    """A bar that shows nothing."""
    yield lambda: None
