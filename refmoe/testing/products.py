# SPDX-License-Identifier: Apache-2.0
"""Assertions on products with matrices of parameters: one matrix, or one for each expert."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Unpack

import numpy as np
from numpy.typing import NDArray

from refmoe.arithmetic.enclosure.array import Enclosure, concatenate
from refmoe.arithmetic.formats import BFLOAT16, FLOAT16, OF_DTYPE, Format, nearest
from refmoe.errors import InputError
from refmoe.steps.enclosure_ops import EnclosureOps
from refmoe.testing.arguments import fit, flags, flat, integers, one_of, real
from refmoe.testing.call import Call, Change, Output, Plain
from refmoe.testing.judgement import Judgement, judge, require
from refmoe.testing.options import Options, checked, chosen_rows, policy_for, selection
from refmoe.testing.parameters import Matrix, known
from refmoe.testing.structures import Rearranged

STEP = "expert.gate"
"""The step whose cut point stands for a product of no particular step."""
TF32 = Format("TF32", 11, -126, 127)
"""The dtype of factors that tensor cores take for float32 unless told otherwise."""
FUSED = ("halves", "interleaved")
"""The orders of a fused gate and up: all rows of the gate first, or the rows of both in turn."""
ONE_TERM = 0.5
"""A term counts as missing or as counted twice from this share of itself on."""


# ---- one matrix


class LinearOptions(Options, total=False):
    """The options of `assert_linear`."""

    bias: Any
    """[N], added to each row."""
    transposed: bool
    """Whether w is [K, N] and not [N, K]."""


@dataclass(frozen=True)
class Linear(Plain):
    """Rows times the transpose of a matrix, and a bias."""

    x: NDArray[Any]
    """[T, K]"""
    w: NDArray[Any]
    """[N, K]"""
    bias: NDArray[Any] | None = None
    """[N]"""

    axis = 1

    @property
    def terms(self) -> int:
        return int(self.x.shape[1])

    def some(self, at: Any) -> Linear:
        return replace(self, x=self.x[at])

    def part(self, at: Any) -> Linear:
        return replace(self, w=self.w[at], bias=None if self.bias is None else self.bias[at])

    def plain(self, dtype: Any) -> NDArray[Any]:
        found = self.x.astype(dtype, copy=False) @ self.w.astype(dtype, copy=False).T
        return found if self.bias is None else np.asarray(found + self.bias.astype(dtype))

    def enclose(self, ops: EnclosureOps) -> Enclosure:
        product = ops.linear(known(ops, self.x), Matrix("", self.w))
        # the product may be stored before the bias is added
        return product if self.bias is None else ops.cut(STEP, product) + known(ops, self.bias)


def assert_linear(found: Any, x: Any, w: Any, **options: Unpack[LinearOptions]) -> Judgement:
    """Assert that a kernel multiplied rows by a matrix, within the rounding that its dtypes allow.

    found: [..., N]   x: [..., K]   w: [N, K], as `torch.nn.Linear` has it
    options: those of `LinearOptions`
    Returns the figures. Raises AssertionError when a value is wrong, and InputError for arrays that do not fit.

    >>> import numpy as np, refmoe
    >>> x, w = np.eye(4, 8, dtype=np.float32), np.ones((3, 8), np.float32)
    >>> refmoe.testing.assert_linear(x @ w.T, x, w).verdict
    'pass'
    """
    __tracebackhide__ = True
    return require(judge_linear(found, x, w, **options))


def judge_linear(found: Any, x: Any, w: Any, **options: Unpack[LinearOptions]) -> Judgement:
    """The judgement of `assert_linear`, which also takes its arguments."""
    given = checked(options, LinearOptions, "assert_linear")
    transposed = flags(given, "transposed")
    arrays = {"x": flat(real(x, "x")), "w": real(w, "w"), "found": flat(real(found, "found"))}
    shapes = {"x": "T K", "w": "K N" if transposed else "N K", "found": "T N"}
    if given.get("bias") is not None:
        arrays["bias"], shapes["bias"] = real(given["bias"], "bias"), "N"
    fit(arrays, shapes)
    rows = chosen_rows(given, len(arrays["x"]))
    at = selection(rows, len(arrays["x"]))
    values = arrays["found"][at]
    call = Linear(x=arrays["x"][at], w=arrays["w"].T if transposed else arrays["w"], bias=arrays.get("bias"))
    policy = policy_for(given, STEP, values, {name: arrays[name] for name in arrays if name != "found"})
    output = Output(
        what="linear",
        step=STEP,
        found=values,
        call=call,
        reads=(call.x,),
        inputs={"x": call.x},
        where=lambda at: f"row {rows[at[0]]}, column {at[1]}",
        changes=lambda: linear_changes(call, values),
        cost=call.w.size,
    )
    return judge(output, policy, given)


def linear_changes(call: Linear, found: NDArray[Any]) -> Iterator[Change]:
    """The mistakes of a product.   found: [T, N]"""
    yield Change("the matrix is read as its transpose", replace(call, w=as_transpose(call.w)))
    if call.bias is not None:
        yield Change("the bias is missing", replace(call, bias=None))
        twice = 2 * call.bias.astype(np.float64)
        yield Change("the bias is added twice", replace(call, bias=twice))
    for words, first, last, factor in odd_terms(call, found):
        x = call.x.astype(np.float64)
        x[:, first : last + 1] *= factor
        yield Change(words, replace(call, x=x))
    yield from shorter(call.x, lambda x: replace(call, x=x))
    for format in (TF32, FLOAT16, BFLOAT16):
        if not format.holds(OF_DTYPE[call.x.dtype]) or not format.holds(OF_DTYPE[call.w.dtype]):
            coarse = replace(call, x=nearest(call.x, format), w=nearest(call.w, format))
            yield Change(f"the factors are rounded to {format} before they are multiplied", coarse)


def shorter(x: NDArray[Any], changed: Callable[[NDArray[Any]], Call]) -> Iterator[Change]:
    """Sums without their last terms. x: [T, K]   changed: the call with other rows"""
    terms = x.shape[1]
    for count in sorted({1, min(32, terms // 2)} - {0, terms}):
        short = np.array(x)
        short[:, terms - count :] = 0
        yield Change(missing(terms - count, terms - 1, terms), changed(short), "expert-reduction-tail-lost")


def missing(first: int, last: int, terms: int) -> str:
    """Terms that are missing, in words. first, last: their numbers, from 0   terms: the number of all"""
    if last < terms - 1 or first == 0:
        return f"{_terms(first, last, terms)} missing"
    if first == last:
        return f"the last of {terms} terms of each sum is missing"
    return f"the last {terms - first} of {terms} terms of each sum are missing"


def _terms(first: int, last: int, terms: int) -> str:
    return f"term {first} of {terms} is" if first == last else f"terms {first} to {last} of {terms} are"


def as_transpose(w: NDArray[Any]) -> NDArray[Any]:
    """The matrix whose memory is read as that of the transpose. w: [N, K]"""
    return np.ascontiguousarray(w).reshape(w.shape[1], w.shape[0]).T


def odd_terms(call: Linear, found: NDArray[Any]) -> Iterator[tuple[str, int, int, float]]:
    """Terms that the values found suggest to be missing, or counted twice: in words, first, last, and their factor.

    The share of term i in the errors e is (sum of e x_i w_i) / (sum of the squares of x_i w_i): -1 where the term is
    missing everywhere. The products are taken in float32, because this is only a guess.
    """
    with np.errstate(all="ignore"):
        x, w = call.x.astype(np.float32), call.w.astype(np.float32)
        error = found.astype(np.float32) - x @ w.T
        if call.bias is not None:
            error = error - call.bias.astype(np.float32)
        share = ((error @ w) * x).sum(0) / ((x**2).sum(0) * (w**2).sum(0))
    for factor in (0.0, 2.0):
        odd = np.flatnonzero(share < -ONE_TERM if factor == 0 else share > ONE_TERM)
        if odd.size and odd.size < len(share) and odd[-1] - odd[0] + 1 == odd.size:
            first, last = int(odd[0]), int(odd[-1])
            twice = f"{_terms(first, last, len(share))} counted twice"
            yield twice if factor else missing(first, last, len(share)), first, last, factor


# ---- a matrix for each expert


class GroupedOptions(Options, total=False):
    """The options of `assert_grouped_linear`. Exactly one of `offsets`, `ids` and `one_hot` is needed."""

    offsets: Any
    """[E], the row after the last row of each expert, or [E + 1] with a 0 before. Rows after the last are padding."""
    ids: Any
    """[T], the expert of each row; -1 for a row of padding, which is not judged."""
    one_hot: Any
    """[T, E], 1 or True for the expert of each row."""
    transposed: bool
    """Whether w is [E, K, N] and not [E, N, K]."""
    fused: Literal["halves", "interleaved"] | None
    """The order of the N columns, if they are both gate and up."""


@dataclass(frozen=True)
class Grouped(Plain):
    """Each row times the transpose of the matrix of its expert."""

    x: NDArray[Any]
    """[T, K]"""
    w: NDArray[Any]
    """[E, N, K]"""
    experts: NDArray[Any]
    """Integers [T]"""

    axis = 1

    @property
    def terms(self) -> int:
        return int(self.x.shape[1])

    def some(self, at: Any) -> Grouped:
        return replace(self, x=self.x[at], experts=self.experts[at])

    def part(self, at: Any) -> Grouped:
        read, experts = np.unique(self.experts, return_inverse=True)
        return replace(self, w=np.stack([self.w[e][at] for e in read]), experts=experts.reshape(-1))

    def plain(self, dtype: Any) -> NDArray[Any]:
        found = np.empty((len(self.x), self.w.shape[1]), dtype)
        for expert in np.unique(self.experts):
            mine = self.experts == expert
            found[mine] = self.x[mine].astype(dtype, copy=False) @ self.w[expert].astype(dtype, copy=False).T
        return found

    def enclose(self, ops: EnclosureOps) -> Enclosure:
        return by_expert(self.experts, lambda e, at: ops.linear(known(ops, self.x[at]), Matrix("", self.w[e])))


def assert_grouped_linear(found: Any, x: Any, w: Any, **options: Unpack[GroupedOptions]) -> Judgement:
    """Assert that a kernel multiplied each row by the matrix of the row's expert.

    found: [T, N]   x: [T, K]   w: [E, N, K]
    options: those of `GroupedOptions`
    Returns the figures. Raises AssertionError when a value is wrong, and InputError for arrays that do not fit.
    """
    __tracebackhide__ = True
    return require(judge_grouped_linear(found, x, w, **options))


def judge_grouped_linear(found: Any, x: Any, w: Any, **options: Unpack[GroupedOptions]) -> Judgement:
    """The judgement of `assert_grouped_linear`, which also takes its arguments."""
    given = checked(options, GroupedOptions, "assert_grouped_linear")
    transposed, fused = flags(given, "transposed"), one_of(given, "fused", (None, *FUSED))
    arrays = {"x": real(x, "x"), "w": real(w, "w"), "found": real(found, "found")}
    sizes = fit(arrays, {"x": "T K", "w": "E K N" if transposed else "E N K", "found": "T N"})
    if fused and sizes["N"] % 2:
        raise InputError(f"w: has {sizes['N']} outputs, but an even number was expected for gate and up")
    experts = expert_of_rows(given, sizes["T"], sizes["E"])
    rows = chosen_rows(given, sizes["T"])
    rows = rows[experts[rows] >= 0]
    at = selection(rows, sizes["T"])
    values = arrays["found"][at]
    call = Grouped(
        x=arrays["x"][at], w=arrays["w"].transpose(0, 2, 1) if transposed else arrays["w"], experts=experts[at]
    )

    def where(at: tuple[int, ...]) -> str:
        return f"row {rows[at[0]]}, expert {call.experts[at[0]]}, {column(at[1], sizes['N'], fused)}"

    output = Output(
        what="grouped linear",
        step=STEP,
        found=values,
        call=call,
        reads=(call.x,),
        inputs={"x": call.x},
        where=where,
        changes=lambda: grouped_changes(call, values, fused),
        cost=sizes["N"] * sizes["K"],
    )
    return judge(output, policy_for(given, STEP, values, {"x": arrays["x"], "w": arrays["w"]}), given)


def column(at: int, columns: int, fused: str | None) -> str:
    """The place of a column in words, of gate and up if they are fused."""
    if fused is None:
        return f"column {at}"
    half = columns // 2
    part, place = (at // half, at % half) if fused == "halves" else (at % 2, at // 2)
    return f"column {at} ({'up' if part else 'gate'} {place})"


def grouped_changes(call: Grouped, found: NDArray[Any], fused: str | None) -> Iterator[Change]:
    """The mistakes of a product by expert.   found: [T, N]"""
    experts, columns = call.w.shape[:2]
    yield from expert_changes(experts, call.experts, lambda ids: replace(call, experts=ids))
    shifted = np.roll(call.experts, 1)
    shifted[:1] = call.experts[:1]
    yield Change("each expert's rows begin one row late", replace(call, experts=shifted))
    early = np.roll(call.experts, -1)
    early[-1:] = call.experts[-1:]
    yield Change("each expert's rows begin one row early", replace(call, experts=early))
    flipped = np.stack([as_transpose(each) for each in call.w]) if call.w.size < 1 << 26 else None
    if flipped is not None:
        yield Change("the matrices are read as their transposes", replace(call, w=flipped), "expert-w2-transposed")
    if fused:
        own = np.arange(len(call.x))
        for words, order in fused_orders(columns, fused):
            yield Change(words, Rearranged(call, own, order))
    yield from shorter(call.x, lambda x: replace(call, x=x))
    for expert in np.unique(call.experts)[:1]:
        at = np.flatnonzero(call.experts == expert)
        for words, first, last, factor in odd_terms(Linear(call.x[at], call.w[expert]), found[at]):
            x = call.x.astype(np.float64)
            x[:, first : last + 1] *= factor
            yield Change(words, replace(call, x=x))


def fused_orders(columns: int, fused: str) -> Iterator[tuple[str, NDArray[Any]]]:
    """Wrong orders of the columns of a fused gate and up: in words, and the right column that each has."""
    half, all_ = columns // 2, np.arange(columns)
    in_halves = np.concatenate([all_[0::2], all_[1::2]])  # of columns in turn
    in_turn = np.empty(columns, np.int64)
    in_turn[0::2], in_turn[1::2] = all_[:half], all_[half:]
    if fused == "halves":
        yield "gate and up are exchanged", np.roll(all_, half)
        yield "gate and up are interleaved, where halves are declared", in_turn
    else:
        yield "gate and up are exchanged", all_ ^ 1
        yield "gate and up are in halves, where interleaved is declared", in_halves


def expert_changes(experts: int, ids: NDArray[Any], changed: Callable[[NDArray[Any]], Call]) -> Iterator[Change]:
    """The mistakes in the choice of the matrix.   ids: integers [...]; -1 stays   changed: the call with other ids"""
    if experts == 1:
        return
    here = ids >= 0
    yield Change(
        "each row has the matrix of the next expert",
        changed(np.where(here, (ids + 1) % experts, ids)),
        "router-index-off-by-one",
    )
    yield Change(
        "each row has the matrix of the expert before",
        changed(np.where(here, (ids - 1) % experts, ids)),
        "router-index-off-by-one",
    )
    yield Change("all rows have the matrix of expert 0", changed(np.where(here, 0, ids)))
    yield Change("the experts are in reverse order", changed(np.where(here, experts - 1 - ids, ids)))


def by_expert(experts: NDArray[Any], run: Callable[[int, NDArray[Any]], Enclosure]) -> Enclosure:
    """The results of each expert's rows, in the order of the rows.

    experts: integers [n]   run: from an expert and the places of its m rows to their results [m, ...]
    """
    order = np.argsort(experts, kind="stable")
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    parts = [run(int(e), np.flatnonzero(experts == e)) for e in np.unique(experts)]
    return concatenate(parts, axis=0)[back]


def expert_of_rows(given: Mapping[str, Any], rows: int, experts: int) -> NDArray[Any]:
    """The expert of each row, -1 for padding: integers [rows]. Raises InputError when the arguments do not say it."""
    names = [name for name in ("offsets", "ids", "one_hot") if given.get(name) is not None]
    if len(names) != 1:
        found = " and ".join(names) if names else "none"
        raise InputError(
            f"assert_grouped_linear: {found} of offsets, ids and one_hot is given, but exactly one was expected"
        )
    name = names[0]
    if name == "offsets":
        return from_offsets(integers(given[name], name), rows, experts)
    if name == "ids":
        ids = integers(given[name], name)
        fit({"ids": ids}, {"ids": "T"}, {"T": rows})
        return within(ids, experts, name)
    hot = integers(given[name], name, truths=True) != 0
    fit({name: hot}, {name: "T E"}, {"T": rows, "E": experts})
    if (hot.sum(1) > 1).any():
        row = int(np.argmax(hot.sum(1) > 1))
        raise InputError(f"one_hot: row {row} has {int(hot[row].sum())} experts, but one was expected")
    return np.where(hot.any(1), hot.argmax(1), -1)


def from_offsets(offsets: NDArray[Any], rows: int, experts: int) -> NDArray[Any]:
    """The expert of each row from the ends of the experts' rows: integers [rows]."""
    ends = offsets[1:] if offsets.ndim == 1 and len(offsets) == experts + 1 else offsets
    if ends.ndim != 1 or len(ends) != experts or (len(offsets) > experts and offsets[0] != 0):
        raise InputError(
            f"offsets: has shape {list(offsets.shape)}, but the end of the rows of each of {experts} experts was "
            "expected, or these with a 0 before"
        )
    if (np.diff(ends, prepend=0) < 0).any() or (len(ends) and ends[-1] > rows):
        raise InputError(f"offsets: are {ends.tolist()[:8]}, but rising numbers from 0 to {rows} were expected")
    row = np.arange(rows)
    return np.where(row < (ends[-1] if len(ends) else 0), np.searchsorted(ends, row, "right"), -1)


def within(ids: NDArray[Any], experts: int, name: str) -> NDArray[Any]:
    """The ids. Raises InputError when one is neither an expert nor -1."""
    wrong = ids[(ids < -1) | (ids >= experts)]
    if wrong.size:
        raise InputError(f"{name}: has {int(wrong[0])} in it, but experts 0 to {experts - 1}, or -1, were expected")
    return ids
