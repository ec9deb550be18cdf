# SPDX-License-Identifier: Apache-2.0
"""Products with quantised matrices, and values kept in codes, under a policy: for the ideal engine and enclosures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import blake2b
from itertools import count
from typing import Any

import numpy as np

from refmoe.arithmetic.codes import Factors, InputFormat, quantise
from refmoe.arithmetic.enclosure.array import Enclosure, concatenate
from refmoe.arithmetic.enclosure.coded import (
    Left,
    coded_product,
    contested_rows,
    left_factor,
    with_choices,
)
from refmoe.arithmetic.weight_cache import WeightCache
from refmoe.checkpoints.rows import RowWeight
from refmoe.errors import InputError
from refmoe.profiles.cut_points import CODED_TOGETHER, PROJECTIONS, ROTATED, product_of
from refmoe.profiles.policy import HALVES, Policy

BLOCK = 1 << 20
"""Elements of a matrix that are multiplied at a time: several arrays of binary64 are made of them."""
FEWEST = 16
"""Rows of a matrix with which a product is worth its overhead."""


def codes_of(policy: Policy, weight: Any) -> InputFormat | None:
    """How a product with this matrix makes codes of its input; None where it makes none.

    Raises InputError where rows are no whole blocks of the codes.
    """
    how = policy.input_of(weight)
    if not isinstance(how, InputFormat) or not isinstance(weight, RowWeight):
        return None
    if how.block and weight.shape[1] % how.block:
        raise InputError(
            f"{weight.origin}: has rows of {weight.shape[1]}, but whole blocks of {how.block} were expected, which "
            f"policy {policy.name} makes of the input of products with {weight.format}"
        )
    return how


def kept(policy: Policy, cut: str, x: Any, code: Callable[[Any, InputFormat], Any]) -> Any:
    """Values [.., d] at a cut point that keeps them in codes.   code: gives what codes and scales stand for

    Raises InputError where heads are no whole blocks of the codes.
    """
    how, width = policy.kept[cut], x.shape[-1]
    if how.block and width % how.block:
        raise InputError(
            f"policy {policy.name}: {cut} keeps heads of {width} values, but whole blocks of {how.block} were "
            f"expected, of which {how.name} makes codes"
        )
    return _as_it_stands(policy, cut, x, lambda heads: code(heads, how))


def turned(policy: Policy, cut: str, x: Any, turn: Callable[[Any, int], Any]) -> Any:
    """Values [.., d] turned as the policy turns them before this cut point.   turn: gives blocks of some size turned"""
    block = policy.turned(cut, x.shape[-1])
    return _as_it_stands(policy, cut, x, lambda heads: turn(heads, block))


def _as_it_stands(policy: Policy, cut: str, x: Any, function: Callable[[Any], Any]) -> Any:
    """A function of heads [.., d] whose elements stand in the order that the engine has in memory."""
    if policy.pairs == HALVES or cut not in ROTATED:
        return function(x)
    order = np.arange(x.shape[-1]).reshape(2, -1).T.reshape(-1)  # the elements of a pair stand together
    return function(x[..., order])[..., np.argsort(order)]


def coded_values(x: Any, how: InputFormat) -> Any:
    """Values [.., n] as codes and scales give them back."""
    return quantise(x.reshape(-1, x.shape[-1]), how).values.reshape(x.shape)


def quantises(policy: Policy, weights: Any) -> bool:
    """Whether any product with these matrices makes codes of its input."""
    return any(isinstance(weight, RowWeight) and isinstance(policy.input_of(weight), InputFormat) for weight in weights)


def groups_of(weight: RowWeight) -> int:
    """The groups of a row that have an offset; 0: the format has none."""
    offsets = weight.factors(0, 1).offsets
    return 0 if offsets is None else int(offsets.shape[1])


def parts_of(weight: RowWeight, kept: WeightCache) -> Iterator[Factors]:
    """Some rows of a matrix at a time, as engines multiply them. What fits into the memory is kept for later."""
    height, width = weight.shape
    step = max(FEWEST, BLOCK // max(1, width))
    if height * width * np.dtype(np.float32).itemsize > kept.limit:
        yield from (weight.factors(start, min(start + step, height)) for start in range(0, height, step))
        return
    whole: Factors = kept.get(weight, lambda: weight.factors(0, height), lambda made: made.nbytes)
    for start in range(0, height, step):
        rows = slice(start, start + step)
        parts = (None if part is None else part[rows] for part in (whole.terms, whole.offsets, whole.sizes))
        terms, offsets, sizes = parts
        yield Factors(terms=terms, offsets=offsets, sizes=sizes)


class RowNumbers:
    """Numbers for rows with contestable codes. Products that read the same codes give a row the same number."""

    def __init__(self) -> None:
        self._next = count()
        self._known: dict[str, dict[Any, int]] = {}

    def of(self, weight: RowWeight, rows: Any, contested: list[int]) -> list[int]:
        """The numbers of the contested rows.   rows: the input of the product, [t, n]

        The first of several products that read a tap gives new numbers. A row is known again by its values and, of
        equal rows, by their order. Matrices in different formats read different codes.
        """
        step = product_of(weight)
        read = None if step is None else PROJECTIONS[step][1]
        if read not in CODED_TOGETHER.values():
            return [next(self._next) for _ in contested]
        place = f"{weight.name.rpartition('.')[0]}.{read}"
        if step in CODED_TOGETHER or place not in self._known:
            self._known[place] = {}
        known, seen, numbers = self._known[place], Counter[bytes](), []
        for row in contested:
            name = blake2b(np.ascontiguousarray(rows[row]).tobytes(), digest_size=16).digest()
            key = (weight.format, name, seen[name])
            seen[name] += 1
            numbers.append(known.setdefault(key, next(self._next)))
        return numbers


def enclosed(
    x: Enclosure, weight: RowWeight, how: InputFormat, kept: WeightCache, numbers: Callable[..., list[int]]
) -> Enclosure:
    """The enclosure of x [..., n] times the transpose of a quantised matrix [m, n], for an engine that codes x.

    kept: the memory for matrices   numbers: of `RowNumbers`
    """
    x = x.settle()
    flat = x.reshape(-1, x.shape[-1])
    left: Left = left_factor(flat, how, groups_of(weight))
    parts = [coded_product(left, part, how.depth(weight.shape[1])) for part in parts_of(weight, kept)]
    made = with_choices(concatenate(parts, axis=-1), left, numbers(weight, flat.mid, contested_rows(left)))
    made.accumulation = x.accumulation
    return made.reshape(*x.shape[:-1], weight.shape[0])
