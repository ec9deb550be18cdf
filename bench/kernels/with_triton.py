# SPDX-License-Identifier: Apache-2.0
"""A product in Triton, run by its interpreter: TRITON_INTERPRET=1 must be set before triton is imported."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MISTAKES = ("", "no mask", "last block", "half sum")
TILE, DEPTH = 16, 32


@triton.jit
def product(  # type: ignore[no-untyped-def]
    x, w, y, rows, columns, terms, mistake: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr
):
    r = tl.program_id(0) * TILE + tl.arange(0, TILE)
    c = tl.program_id(1) * TILE + tl.arange(0, TILE)
    total = tl.zeros((TILE, TILE), tl.float16 if mistake == 3 else tl.float32)
    last = terms - DEPTH if mistake == 2 else terms
    for start in range(0, last, DEPTH):
        i = start + tl.arange(0, DEPTH)
        # 1: terms beyond the row are those of the next row
        here = i < terms if mistake != 1 else i < terms + DEPTH
        a = tl.load(x + r[:, None] * terms + i[None, :], mask=(r[:, None] < rows) & here[None, :], other=0.0)
        b = tl.load(w + c[None, :] * terms + i[:, None], mask=(c[None, :] < columns) & here[:, None], other=0.0)
        total += tl.dot(a, b, out_dtype=tl.float16) if mistake == 3 else tl.dot(a, b)
    inside = (r[:, None] < rows) & (c[None, :] < columns)
    tl.store(y + r[:, None] * columns + c[None, :], total.to(y.dtype.element_ty), mask=inside)


def linear(x: torch.Tensor, w: torch.Tensor, mistake: str = "") -> torch.Tensor:
    """x: [T, K]   w: [N, K]   returns: [T, N]"""
    (rows, terms), columns = x.shape, len(w)
    # memory after the arrays, which a kernel without a mask reads
    x, w = (torch.cat([each.flatten(), each.flatten()[:DEPTH]]) for each in (x, w))
    found = torch.empty(rows, columns, dtype=x.dtype)
    grid = (triton.cdiv(rows, TILE), triton.cdiv(columns, TILE))
    product[grid](x, w, found, rows, columns, terms, MISTAKES.index(mistake), TILE, DEPTH)
    return found
