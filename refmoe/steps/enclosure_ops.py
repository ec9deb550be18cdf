# SPDX-License-Identifier: Apache-2.0
"""The interface of the spec over enclosures: one forward pass encloses the results of all legal implementations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Self, cast

import numpy as np

from refmoe.arithmetic.arrays import ArrayOps, StoredWeight, Tap
from refmoe.arithmetic.codes import InputFormat
from refmoe.arithmetic.enclosure import functions
from refmoe.arithmetic.enclosure.array import (
    OWN,
    PIECE,
    SLACK,
    Enclosure,
    Most,
    Partial,
    bounded,
    concatenate,
    in_pieces,
    joined,
    quiet,
    stored,
    unbounded_beyond,
)
from refmoe.arithmetic.enclosure.coded import in_codes
from refmoe.arithmetic.enclosure.matrices import Matrix
from refmoe.arithmetic.enclosure.narrow import NotHeld, matrix_of, unread
from refmoe.arithmetic.enclosure.products import Accumulator, over_ranks, product, total
from refmoe.arithmetic.enclosure.turned import turned as turned_enclosure
from refmoe.arithmetic.exact import dot, elementary
from refmoe.arithmetic.formats import FLOAT32, Format, nearest, ulp
from refmoe.arithmetic.memory import lasting
from refmoe.arithmetic.streaming import UnreadRows, side_by_side
from refmoe.arithmetic.weight_cache import WeightCache
from refmoe.checkpoints.weight import Weight
from refmoe.profiles.cut_points import PRODUCTS, PROJECTIONS, ROW_PARALLEL, STATISTICS, product_of
from refmoe.profiles.policy import STAGES, Policy
from refmoe.steps.coded import RowNumbers, codes_of, enclosed, kept, turned
from refmoe.steps.rounding import CutOps, cut_again
from refmoe.steps.sharded import block
from refmoe.steps.sharded.parameters import part

MATRIX_BYTES = 256 << 20
"""The default memory for prepared weights."""

SPREADS = 32.0
"""A value this many standard deviations from overflow does not overflow, whatever its radius."""

FLASH_BLOCK = 16
"""The fewest keys that flash attention takes at a time. It rescales its sums between blocks."""


def own_accumulator(policy: Policy, step: str) -> Accumulator:
    """The arithmetic of a product that does not share the policy's `accumulation`."""
    format = policy.at(f"{step}.accumulation")
    rescales = step == "attention.context"  # flash attention rescales the sum when the largest score grows
    inputs = policy.storage if format.holds(policy.storage) else format
    return Accumulator(
        format=format, inputs=inputs, truncates=policy.truncates, flushes=policy.flushes, rescales=rescales
    )


def read_in(format: Format, x: Enclosure) -> Enclosure:
    """Factors as a product in this dtype reads them: rounded, unless it holds them."""
    result = x.cut(format)
    result.accumulation = x.accumulation
    return result


def row_parallel(weight: Any, ranks: int) -> list[tuple[range, Weight]]:
    """The columns of a matrix that each rank has, and that part of it (SHARD-2, SHARD-6)."""
    shares = (block(weight.shape[1], ranks, rank) for rank in range(ranks))
    return [(share, part(weight, columns=share)) for share in shares if share]


def only(x: Enclosure, share: range) -> Enclosure:
    """x with zeros outside of some columns, as the codes of a rank are that has these columns alone."""
    inside = np.isin(np.arange(x.shape[-1]), share)
    return x.map(lambda part: np.where(inside, part, 0.0))


def _stays_below(x: Enclosure, limit: float) -> bool:
    """Whether the largest magnitude and the largest spread show that no value reaches the limit."""
    found = x.most
    if found is None or not found.size + SPREADS * (math.sqrt(found.least_variance) + found.radius) <= limit:
        largest = float(max(x.mid.max(initial=0.0), -x.mid.min(initial=0.0)))
        least = 0.0 if x.least_variance is None else x.least_variance
        found = Most(largest, np.max(x.r, initial=0.0) if x.defers else 0.0, np.max(least, initial=0.0))
    # the part of the spread that is not computed yet is less than the radius
    return found.size + SPREADS * (math.sqrt(found.least_variance) + found.radius) <= limit


class EnclosureOps(ArrayOps):
    """Ops on `Enclosure` arrays, under a policy. A tap receives the enclosure before the tap's own rounding."""

    def __init__(self, policy: Policy, tap: Tap | None = None, matrix_bytes: int = MATRIX_BYTES) -> None:
        """matrix_bytes: the memory for prepared weights that are kept for later calls"""
        super().__init__(np.float64, tap)
        self.policy = policy
        self._exact = policy.accumulation.precision == 53 or policy.storage.precision == 53
        self.matrices = WeightCache(matrix_bytes)
        """The prepared weights."""
        self._products = Accumulator(
            format=policy.accumulation, inputs=policy.storage, truncates=policy.truncates, flushes=policy.flushes
        )
        self._sums = Accumulator(policy.statistics, policy.statistics)
        self._own = {step: own_accumulator(policy, step) for step in PRODUCTS if f"{step}.accumulation" in policy.cuts}
        self._shares = WeightCache(1 << 62)
        self.factors = WeightCache(matrix_bytes)
        """Quantised matrices as engines multiply them."""
        self._numbers = RowNumbers()
        self.any_offset = False
        """Whether the engine may count positions from another start, because no value shows its start."""
        self.repeats: Any = 1
        """How often each new token occurs in its sequence, [T] or one number."""
        self.events: list[str] = []
        """The cut points and sums at which a legal implementation may have overflowed."""

    def share_weights(self, other: Self) -> None:
        """Keep prepared weights where `other` keeps its own. Both have one class and one policy."""
        self.matrices, self._shares, self.factors = other.matrices, other._shares, other.factors

    # ---- parameters

    def vector(self, weight: StoredWeight) -> Any:
        return nearest(weight.read(), self.policy.at("weights"))

    def embed(self, table: StoredWeight, ids: Any) -> Enclosure:
        return stored(table.rows(ids), self.policy.at("weights"), self.policy.accumulation)

    def linear(self, x: Enclosure, weight: StoredWeight) -> Enclosure:
        step, coded = product_of(weight), codes_of(self.policy, weight)
        if coded is not None:
            return self._times_codes(x, weight, coded, step)
        read = self.policy.input_of(weight)
        if isinstance(read, Format):
            x = read_in(read, self._watch(f"{step}.input", x, read))
        if step is None:
            return self.times_weight(x, weight, self._products)
        how, ops = self._own.get(step, self._products), cast(CutOps, self)
        if not isinstance(read, Format):
            x = cut_again(ops, f"{step}.input", PROJECTIONS[step][1], x)
        if step in self._own:
            x = read_in(how.format, x)
        if self.policy.ranks == 1 or step not in ROW_PARALLEL:
            return self.times_weight(x, weight, how)
        shares = self._shares.get(weight, lambda: row_parallel(weight, self.policy.ranks), lambda _: 0)
        parts = [self.times_weight(x[..., share.start : share.stop], part, how) for share, part in shares]
        return over_ranks(parts, self.policy.at("rank.partial"), self.policy.flushes)

    def _times_codes(self, x: Enclosure, weight: Any, coded: InputFormat, step: str | None) -> Enclosure:
        """x times the transpose of a quantised matrix, by an engine that makes codes of x."""
        if self.policy.ranks == 1 or step not in ROW_PARALLEL:
            made = enclosed(x, weight, coded, self.factors, self._numbers.of)
        else:
            shares = [share for share, _ in row_parallel(weight, self.policy.ranks)]
            parts = [enclosed(only(x, share), weight, coded, self.factors, self._numbers.of) for share in shares]
            made = over_ranks(parts, self.policy.at("rank.partial"), self.policy.flushes)
        return self._watch("linear", made, self.policy.accumulation)

    def times_weight(self, x: Enclosure, weight: StoredWeight, how: Accumulator) -> Enclosure:
        """x times the transpose of a stored weight.   how: the arithmetic of the product"""

        def nbytes(made: tuple[Matrix, Any]) -> int:
            return made[0].nbytes + (made[1].nbytes if self._exact else 0)

        def prepare(rows: Any, most: float | None = None) -> tuple[Matrix, Any]:
            return self._prepare(rows, how, most)

        def prepared() -> tuple[Matrix, Any]:
            values = lasting(weight.read())
            return prepare(values, weight.most)

        if math.prod(weight.shape) * self.dtype.itemsize > self.matrices.limit:
            return self._watch("linear", self._unkept(x.settle(), weight, prepare, how), how.format)
        made = self.matrices.get(weight, prepared, nbytes)
        return self._watch("linear", self._times(x, made, how), how.format)

    def _unkept(
        self, x: Enclosure, weight: StoredWeight, prepare: Callable[[Any], tuple[Matrix, Any]], how: Accumulator
    ) -> Enclosure:
        """x times the transpose of a weight that is too large to be kept."""
        held, read = self.policy.at("weights"), weight.read_block
        # what is computed, not read, is computed once
        if read is not None and not (weight.computed or self._exact) and how.format.holds(held):
            matrix = unread(UnreadRows(weight.shape, weight.dtype, read), held)
            if matrix is not None:
                with suppress(NotHeld):  # also where a value is no number, which reading blocks tells
                    return product(x, matrix, how)
        return self._streamed(x, weight, prepare, how)

    def _streamed(
        self, x: Enclosure, weight: StoredWeight, prepare: Callable[[Any], tuple[Matrix, Any]], how: Accumulator
    ) -> Enclosure:
        """x times the transpose of a weight that is read block after block.

        What is deferred reads all blocks again, because none is kept.
        """

        def over_blocks(take: Callable[[Enclosure], Any]) -> list[Any]:
            return side_by_side(weight, prepare, quiet(lambda ready: take(self._times(x, ready, how))))

        def again(part: str) -> Callable[[], Any]:
            return lambda: np.concatenate(over_blocks(lambda each: getattr(each, part)), -1)

        exact = x.variance is None  # asked before several threads do
        known = concatenate(over_blocks(lambda each: each.known()), axis=-1)
        return Enclosure(
            known.mid,
            known.radius,
            Partial(known.variance, again("variance")) if exact else known.variance,
            accumulation=known.accumulation,
            bias=again("bias") if how.truncates else None,
        )

    def _prepare(self, rows: Any, how: Accumulator, most: float | None = None) -> tuple[Matrix, Any]:
        """Rows of a stored weight, prepared for products.   most: their largest magnitude, if it is known"""
        held = self.policy.at("weights")
        exact = dot.prepare(nearest(rows, held)) if self._exact else None
        if how.format.holds(held):
            return matrix_of(rows, held, most=most), exact
        return Matrix(read_in(how.format, Enclosure(nearest(rows, held).T))), exact

    def _times(self, x: Enclosure, made: tuple[Matrix, Any], how: Accumulator) -> Enclosure:
        matrix, prepared = made
        exact = dot.linear(x.mid, prepared) if self._exact else None
        return product(x, matrix, how, exact)

    # ---- products and sums

    def matmul(self, a: Enclosure, b: Enclosure) -> Enclosure:
        return self._matmul(a, b, self._products)

    def product(self, step: str, a: Enclosure, b: Enclosure) -> Enclosure:
        how = self._own.get(step)
        if how is None:
            return self._matmul(a, b, self._products)
        return self._matmul(read_in(how.format, a), read_in(how.format, b), how)

    def _matmul(self, a: Enclosure, b: Enclosure, how: Accumulator) -> Enclosure:
        exact = dot.matmul(a.mid, b.mid) if self._exact else None
        return self._watch("matmul", product(a, Matrix(b), how, exact), how.format)

    def sum(self, x: Enclosure, axis: int) -> Enclosure:
        exact = dot.sum(x.mid, axis) if self._exact else None
        return self._watch("sum", total(x, axis, self._sums, exact), self._sums.format)

    @quiet
    def accumulate(self, x: Enclosure, axis: int) -> Enclosure:
        """The sum of a few values in any order. Each partial sum but the last is cut as `combine.partial`."""
        x, policy = x.settle(), self.policy
        n = x.shape[axis]
        stored = {policy.at("combine.partial"), *([policy.at("rank.partial")] if policy.ranks > 1 else [])}
        coarse = [format for format in stored if format != x.accumulation]
        terms = [x[(slice(None),) * axis + (i,)] for i in range(n)]
        if n == 1:
            return terms[0]
        if n == 2:
            return self._reduced(terms[0] + terms[1])
        # n - 2 partial sums are rounded, and cut if their dtype differs. In any order, none is larger than the sum of
        # the positive or of the negative terms, plus the roundings of these
        mid = x.mid.sum(axis)
        inherited = 0.0 if x.radius is None else x.radius.sum(axis)
        unit = x.accumulation.u + sum(format.u for format in coarse)
        reach = ((np.abs(x.mid).sum(axis) + np.abs(mid)) / 2 + inherited) * math.exp(min(n * unit, 700.0))
        step = ulp(reach, x.accumulation) / 2 + sum(ulp(reach, format) / 2 for format in coarse)
        radius = bounded((inherited + (n - 2) * step + (n + 2) * OWN * reach) * SLACK)
        for format in coarse or [x.accumulation]:
            radius = unbounded_beyond(reach, radius, format)
        variance = (n - 2) * step**2 / 3 + (0.0 if x.variance is None else x.variance.sum(axis))
        return self._reduced(Enclosure(mid, radius, bounded(variance), accumulation=x.accumulation, owed=True))

    def _reduced(self, total: Enclosure) -> Enclosure:
        """A sum of several parts. With several ranks its last addition is in the dtype of partial sums over ranks."""
        stored = self.policy.at("rank.partial")
        if self.policy.ranks == 1 or stored == total.accumulation:
            return total
        total = total.settle()
        return Enclosure(total.mid, total.radius, total.variance, accumulation=stored, owed=True)

    def max(self, x: Enclosure, axis: int) -> Any:
        # it is only subtracted before exp, where any number is valid: a constant keeps the enclosures small
        return x.mid.max(axis=axis)

    # ---- functions

    def exp(self, x: Enclosure) -> Enclosure:
        return functions.exp(x, self._exp(x.mid), self.policy)

    def sqrt(self, x: Any) -> Any:
        return functions.sqrt(x) if isinstance(x, Enclosure) else np.sqrt(x)

    def sigmoid(self, x: Enclosure) -> Enclosure:
        return functions.sigmoid(x, self._sigmoid(x.mid), self.policy)

    def silu(self, x: Enclosure) -> Enclosure:
        return in_pieces(self._silu, x)

    def _silu(self, x: Enclosure) -> Enclosure:
        budgets = self.policy
        if "expert.silu.accumulation" in budgets.cuts:
            budgets = replace(budgets, accumulation=budgets.at("expert.silu.accumulation"))
            x = read_in(budgets.accumulation, x)
            x.accumulation = budgets.accumulation
        result = functions.silu(x, self._sigmoid(x.mid), budgets, self.policy.at("expert.sigmoid"))
        return self.cut("expert.silu", result)

    def softmax(self, x: Enclosure, mask: Any) -> Enclosure:
        """Of many tokens, [H, T, S] with a mask [1, T, S], a few go at a time: their arrays stay in the cache."""
        step = max(1, PIECE * x.shape[-2] // max(x.mid.size, 1))
        if x.mid.ndim != 3 or mask is None or step >= x.shape[1]:
            return self._softmax(x, mask, 0.0)
        some = [(slice(None), slice(start, start + step)) for start in range(0, x.shape[1], step)]
        return joined((self._softmax(x[part], mask[part], 0.0) for part in some), some, *x.shape)

    @quiet
    def _softmax(self, x: Enclosure, mask: Any, above: Any) -> Enclosure:
        shown = x.mid if mask is None else np.where(mask, x.mid, -np.inf)
        exponentials = self._exp(shown - shown.max(-1, keepdims=True))
        return functions.softmax(x, mask, exponentials, self.policy, above)

    @quiet
    def log_softmax(self, x: Enclosure) -> Enclosure:
        exponentials = self._exp(x.mid - x.mid.max(-1, keepdims=True))
        return functions.log_softmax(x, exponentials, self.policy, self.policy.at("logprobs.sum"))

    @quiet
    def weigh(self, logits: Enclosure, experts: Any) -> Enclosure:
        """The softmax over the chosen logits, or over all logits and then renormalised.

        The second order has six roundings at most: of each probability, their sum and its inverse.
        """
        chosen = self.gather(logits, experts)
        above = np.maximum(logits.mid.max(-1) - chosen.mid.max(-1), 0.0)[:, None]
        weights = self._softmax(chosen, None, above)
        low, statistics, mid = self.policy.at("router.probs"), self.policy.statistics, weights.mid
        relative, lost = 6 * statistics.u, statistics.tiny
        if low.precision < statistics.precision:
            # stored probabilities round once in the quotient and once in the divisor; a sum of k has k - 1 roundings
            relative += (experts.shape[-1] + 1) * low.u
            lost = low.tiny if self.policy.flushes else low.u * low.tiny
        # the absolute error of a probability is divided by the sum of the chosen, which is at least 1 / E
        lost *= logits.shape[-1]
        radius = weights.r + relative * (1 + relative) * (mid + weights.r) + lost
        variance = weights.v + ((relative * mid) ** 2 + lost**2) / 3
        return Enclosure(mid, radius * SLACK, variance, accumulation=weights.accumulation)

    def unit_circle(self, positions: Any, base: float, numerators: Sequence[int], denominator: int) -> Any:
        cos, sin = elementary.unit_circle(positions, base, numerators, denominator)
        logarithms = np.asarray(numerators, np.float64) / denominator * math.log(base)
        return functions.unit_circle(positions, logarithms, cos, sin, self.policy, self.any_offset)

    def at_any_offset(self, turned: Enclosure, x: Enclosure, table: tuple[Enclosure, Enclosure]) -> Enclosure:
        if any(getattr(part, "length", None) is None for part in table):  # a bug may make its table of plain numbers
            return turned
        return functions.turned(turned.mid, x, table, self.policy.at("rope.products"))

    def remembered(self, x: Enclosure) -> Enclosure:
        """The keys or values of new tokens, whose unknown errors are alike where tokens are.

        Equal tokens are rounded alike, so that n equal errors add up to n of them, and not to root n. By Cauchy and
        Schwarz the square of n weighted errors that are equal is at most n times the sum of their squares.
        """
        if np.all(self.repeats == 1) or (x.variance is None and not x.owed and not x.biased):
            return x
        x = x.settle()
        times = np.reshape(self.repeats, (-1, *[1] * (len(x.shape) - 1)))
        return Enclosure(x.mid, x.radius, x.v * times, accumulation=x.accumulation, length=x.length)

    @quiet
    def _exp(self, x: Any) -> Any:
        return elementary.exp(x) if self._exact else np.exp(x)

    @quiet
    def _sigmoid(self, x: Any) -> Any:
        if self._exact:
            return elementary.sigmoid(x)
        small = np.exp(-np.abs(x))
        return np.where(x >= 0, 1, small) / (1 + small)

    # ---- selection

    def where(self, condition: Any, x: Any, otherwise: Any) -> Any:
        x, otherwise = (
            part if isinstance(part, Enclosure) else Enclosure(part, accumulation=self.policy.accumulation)
            for part in (x, otherwise)
        )
        x, otherwise = x.settle(), otherwise.settle()
        radius, variance = np.where(condition, x.r, otherwise.r), np.where(condition, x.v, otherwise.v)
        return Enclosure(np.where(condition, x.mid, otherwise.mid), radius, variance, accumulation=x.accumulation)

    def concatenate(self, arrays: Sequence[Any], axis: int = 0) -> Any:
        if isinstance(arrays[0], Enclosure):
            return concatenate(arrays, axis)
        return np.concatenate(arrays, axis=axis)

    def placed(self, parts: Sequence[Any], order: Any) -> Enclosure:
        return concatenate(parts, axis=0, order=order)

    def top_k(self, x: Enclosure, k: int) -> Any:
        return np.argsort(-x.mid, axis=-1, kind="stable")[:, :k]

    def gather(self, x: Enclosure, index: Any) -> Enclosure:
        return x.map(lambda part: np.take_along_axis(np.broadcast_to(part, x.shape), index, axis=-1))

    # ---- cut points

    @quiet
    def cut(self, name: str, x: Enclosure) -> Enclosure:
        policy = self.policy
        if name in policy.kept:
            return cast(Enclosure, kept(policy, name, x, in_codes))
        format = policy.at(name)
        result = x.cut(format, any_scale=name == "attention.probs")
        if name == "attention.probs":
            # flash attention divides at the end, and rescales its sums by an exponential for each block
            rescaled = x.shape[-1] / FLASH_BLOCK
            relative = (4 + rescaled * (policy.exp.constant + 2)) * policy.accumulation.u
            result.radius = result.r + relative * (np.abs(result.mid) + result.r)
            result.variance = result.v + (relative * result.mid) ** 2 / 3
        self._watch(name, x, format)
        result.accumulation = policy.statistics if name in STATISTICS else policy.accumulation
        return result

    def turned(self, cut: str, x: Enclosure) -> Enclosure:
        policy = self.policy

        def turn(heads: Enclosure, block: int) -> Enclosure:
            return turned_enclosure(heads, block, policy.turn == STAGES)

        return self._watch(cut, cast(Enclosure, turned(policy, cut, x, turn)), FLOAT32)

    def _watch(self, name: str, x: Enclosure, format: Format) -> Enclosure:
        """Record `name` as an event if a legal implementation may overflow here."""
        if not _stays_below(x, format.largest):
            with np.errstate(all="ignore"):
                if not (np.abs(x.mid) + SPREADS * np.sqrt(x.v) <= format.largest).all():
                    self.events.append(name)
        return x

    def tap(self, name: str, x: Any) -> Any:
        if self._tap is not None:
            replacement = self._tap(self._prefix + name, x)
            if replacement is not None:
                return replacement
        return self.cut(name, x) if isinstance(x, Enclosure) else x
