# SPDX-License-Identifier: Apache-2.0
"""A key/value cache with room for more tokens: appending a token writes one row, where the spec copies all rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from refmoe.arithmetic.arrays import Array
from refmoe.spec.attention import Cache

GROWTH = 2
"""A new room has GROWTH times the rows in use, so that appending a token costs constant time on average."""


@dataclass
class Room:
    """Arrays with spare rows, shared by a cache and its extensions."""

    arrays: tuple[Array, Array, Array]
    """Keys, values and positions."""
    used: int
    """The rows in use."""


@dataclass(frozen=True)
class RoomyCache(Cache):
    """A cache whose arrays are the first S rows of a room."""

    room: Room


def extend_cache(ops: Any, cache: Cache | None, k: Array, v: Array, positions: Array) -> Cache:
    """`refmoe.spec.attention.extend_cache`. The given cache does not change and may later be extended differently.

    k, v: [T, K, d]   positions: integers [T]   returns: a cache of S = past + T tokens
    """
    extended = with_room(cache, positions, k.shape[1], k.shape[2], k.dtype)
    extended.k[-len(k) :], extended.v[-len(k) :] = k, v
    return extended


def with_room(cache: Cache | None, positions: Array, kv_heads: int, head_dim: int, dtype: Any) -> Cache:
    """A cache extended by tokens at these positions, integers [T].

    The caller must write their keys and values, the last T rows.
    """
    if cache is None:
        k, v = np.empty((2, len(positions), kv_heads, head_dim), dtype)
        return Cache(k, v, positions)
    past = len(cache.positions)
    total = past + len(positions)
    room = cache.room if isinstance(cache, RoomyCache) else None
    # used rows beyond `past` belong to another extension of this cache
    if room is None or room.used != past or total > len(room.arrays[0]):
        room = Room(_copied(cache, GROWTH * total), past)
    room.arrays[2][past:total] = positions
    room.used = total
    k, v, positions = (array[:total] for array in room.arrays)
    return RoomyCache(k, v, positions, room)


def _copied(cache: Cache, rows: int) -> tuple[Array, Array, Array]:
    """The cache's arrays, copied to new ones with this number of rows."""

    def longer(old: Array) -> Array:
        new = np.empty((rows, *old.shape[1:]), old.dtype)
        new[: len(old)] = old
        return new

    return longer(cache.k), longer(cache.v), longer(cache.positions)
