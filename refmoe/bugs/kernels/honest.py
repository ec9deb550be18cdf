# SPDX-License-Identifier: Apache-2.0
"""Right kernels in NumPy, as engines have them: sums in float32, intermediates in the dtype of x.

The faulty kernels are made from their parts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.arithmetic.arrays import Array


def wide(values: Array) -> NDArray[Any]:
    """The values in the format of sums: float32, or float64 for float64."""
    array = np.asarray(values)
    return array if array.dtype == np.float64 else array.astype(np.float32)


def expert(rows: Array, w_gate: Array, w_up: Array, w_down: Array) -> NDArray[Any]:
    """One expert: rows [n, D], matrices [F, D], [F, D] and [D, F] -> [n, D] in the format of sums."""
    x = wide(rows)
    with np.errstate(all="ignore"):
        hidden = swiglu(x @ wide(w_gate).T, x @ wide(w_up).T).astype(np.asarray(rows).dtype)
        result: NDArray[Any] = wide(hidden) @ wide(w_down).T
    return result


def swiglu(gate: NDArray[Any], up: NDArray[Any]) -> NDArray[Any]:
    """silu(gate) * up."""
    with np.errstate(all="ignore"):
        activated: NDArray[Any] = gate / (1 + np.exp(-gate)) * up
    return activated


def mixture(x: Array, w_gate: Array, w_up: Array, w_down: Array, ids: Array, weights: Array) -> NDArray[Any]:
    """A mixture of experts, f(x [T, D], w_gate, w_up [E, F, D], w_down [E, D, F], ids, weights [T, k]) -> [T, D].

    An id of -1 is an empty slot.
    """
    total = np.zeros(x.shape, wide(x[:0]).dtype)
    for chosen in np.unique(ids[ids >= 0]):
        tokens, slots = np.nonzero(ids == chosen)
        out = expert(x[tokens], w_gate[chosen], w_up[chosen], w_down[chosen])
        np.add.at(total, tokens, wide(weights[tokens, slots])[:, None] * out)
    return total.astype(x.dtype)


def mapped(x: Array, w_gate: Array, w_up: Array, w_down: Array, ids: Array, weights: Array, places: Array) -> Array:
    """A mixture of the experts that are here: places [E of all ranks] are theirs, or -1."""
    local = np.where(ids >= 0, places[np.maximum(ids, 0)], -1)
    return mixture(x, w_gate, w_up, w_down, local, weights)


def grouped(x: Array, w_gate: Array, w_up: Array, w_down: Array, offsets: Array) -> Array:
    """Rows sorted by expert, [n, D] and offsets [E + 1] -> [n, D]."""
    out = np.empty_like(x)
    for number in range(len(w_gate)):
        rows = slice(int(offsets[number]), int(offsets[number + 1]))
        out[rows] = expert(x[rows], w_gate[number], w_up[number], w_down[number]).astype(x.dtype)
    return out


def align(ids: Array, block: int, experts: int) -> tuple[Array, Array, Array]:
    """Blocks of slots, padded with the number of all slots, as vLLM's moe_align_block_size has them."""
    flat = ids.reshape(-1)
    slots, owners = [], []
    for number in range(experts):
        own = np.flatnonzero(flat == number)
        count = -(-len(own) // block)
        slots.append(np.concatenate([own, np.full(count * block - len(own), flat.size)]))
        owners += [number] * count
    spare = -(-flat.size // block)
    total = sum(map(len, slots))
    fill = np.full(spare * block, flat.size)
    return (
        np.concatenate([*slots, fill]).astype(np.int64), np.array(owners + [-1] * spare, np.int64), np.array([total]),
    )  # fmt: skip


def attend(q: Array, keys: Array, values: Array, table: Array, lengths: Array, window: int | None = None) -> Array:
    """Attention of one query per sequence over pages: q [S, H, C], pages [P, B, G, C] -> [S, H, C]."""
    page, groups = keys.shape[1], keys.shape[2]
    out = np.zeros_like(q)
    for s, length in enumerate(lengths.tolist()):
        at = np.arange(max(0, length - window) if window else 0, length)
        k, v = (wide(pages[table[s, at // page], at % page]) for pages in (keys, values))
        out[s] = one_query(wide(q[s]), k, v, groups).astype(q.dtype)
    return out


def one_query(q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], groups: int) -> NDArray[Any]:
    """Attention of one token: q [H, C], k and v [L, G, C] -> [H, C]."""
    sharing = len(q) // groups
    k, v = (np.repeat(each, sharing, axis=1) for each in (k, v))
    scores = np.einsum("hc,lhc->hl", q, k) * q.dtype.type(q.shape[1] ** -0.5)
    with np.errstate(all="ignore"):
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        result: NDArray[Any] = np.einsum("hl,lhc->hc", shares / shares.sum(axis=1, keepdims=True), v)
    return result


def route(logits: Array, k: int = 2) -> tuple[Array, Array]:
    """Softmax over the k largest logits; of equal ones the lower id."""
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    chosen = np.take_along_axis(logits, ids, axis=1)
    with np.errstate(all="ignore"):
        shares = np.exp(chosen - chosen[:, :1])
    return ids, shares / shares.sum(axis=1, keepdims=True)
