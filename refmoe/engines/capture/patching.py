# SPDX-License-Identifier: Apache-2.0
"""Replace an attribute of another package's module for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """While the context lasts, the attribute `name` of `owner` is `value`. Raises AttributeError when there is none.

    owner: a module or an object that holds the attribute itself; an inherited one would stay behind as a copy.
    """
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)
