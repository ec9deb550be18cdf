# SPDX-License-Identifier: Apache-2.0
"""Prepared weights, kept while they fit, so that a weight is prepared once and not once per call."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import Any

STREAMED = 4
"""A weight of more than 1 / STREAMED of the limit is streamed, as keeping it would drive out most other weights."""


class WeightCache:
    """The most recently used prepared weights, up to a number of bytes."""

    def __init__(self, limit: int) -> None:
        """limit: bytes. A weight that is larger by itself is prepared anew at each use."""
        self.limit = limit
        self.held = 0
        self._entries: OrderedDict[int, tuple[Any, Any, int]] = OrderedDict()
        self._lock = Lock()  # experts ask for their weights side by side

    def find(self, weight: Any) -> Any:
        """The prepared form of the weight, or None if the cache does not have it."""
        entry = self._entry(weight)
        return None if entry is None else entry[1]

    def get(self, weight: Any, prepare: Callable[[], Any], size: Callable[[Any], int]) -> Any:
        """The prepared form of the weight, from the cache or else from `prepare`.   size: the bytes of that form

        The entry holds the weight itself, so that its id is not reused while it is a key.
        """
        entry = self._entry(weight)
        if entry is not None:
            return entry[1]
        prepared = prepare()
        key, bytes_needed = id(weight), size(prepared)
        if bytes_needed <= self.limit:
            with self._lock:
                before = self._entries.pop(key, None)  # another lane may have prepared it meanwhile
                self._entries[key] = (weight, prepared, bytes_needed)
                self.held += bytes_needed - (before[2] if before else 0)
                while self.held > self.limit:
                    self.held -= self._entries.popitem(last=False)[1][2]
        return prepared

    def _entry(self, weight: Any) -> tuple[Any, Any, int] | None:
        with self._lock:
            entry = self._entries.get(id(weight))
            if entry is not None:
                self._entries.move_to_end(id(weight))
            return entry
