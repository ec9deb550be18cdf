# SPDX-License-Identifier: Apache-2.0
"""Bugs of attention over pages."""

from __future__ import annotations

import numpy as np

from refmoe.arithmetic.arrays import Array
from refmoe.bugs.kernels.bug import bug
from refmoe.bugs.kernels.honest import attend, one_query, wide


@bug(
    "neighbours-in-the-table-are-none-in-memory",
    "Two pages are read at once from the place of the first, as if the second lay behind it.",
    "hw-native-sys/pypto/pull/470",
    "2026-03-13",
    "attention",
)
def neighbours_in_memory(q: Array, keys: Array, values: Array, table: Array, lengths: Array) -> Array:
    first = np.repeat(table[:, ::2], 2, axis=1)[:, : table.shape[1]]
    second = np.arange(table.shape[1]) % 2
    return attend(q, keys, values, np.minimum(first + second, len(keys) - 1), lengths)


@bug(
    "zero-times-the-tail-of-a-page",
    "Whole pages are multiplied, with weight 0 behind the last token: 0 times NaN is NaN.",
    "openvinotoolkit/openvino/pull/37377",
    "2026-08-11",
    "attention",
)
def zero_times_the_tail(q: Array, keys: Array, values: Array, table: Array, lengths: Array) -> Array:
    page = keys.shape[1]
    out = np.zeros_like(q)
    for s, length in enumerate(lengths.tolist()):
        whole = np.arange(-(-length // page) * page)
        k, v = (wide(each[table[s, whole // page], whole % page]) for each in (keys, values))
        out[s] = one_query(wide(q[s]), k[:length], v[:length], keys.shape[2])
        with np.errstate(all="ignore"):
            tail = np.repeat((0 * v[length:]).sum(axis=0), q.shape[1] // keys.shape[2], axis=0)
        out[s] += tail
    return out
