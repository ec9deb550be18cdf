# SPDX-License-Identifier: Apache-2.0
"""Assertions on products with matrices of parameters: one matrix, or one for each expert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Unpack

import numpy as np
from numpy.typing import NDArray

from refmoe.arithmetic.enclosure.array import Enclosure, concatenate
from refmoe.errors import InputError
from refmoe.steps.enclosure_ops import EnclosureOps
from refmoe.testing.arguments import fit, integers, real
from refmoe.testing.judgement import Judgement, Output, judge, require
from refmoe.testing.options import Options, checked, chosen_rows, policy_for, significance_of
from refmoe.testing.parameters import Matrix, known

STEP = "expert.gate"
"""The step whose cut point stands for a product of no particular step."""


class LinearOptions(Options, total=False):
    """The options of `assert_linear`."""

    bias: Any
    """[N], added to each row."""
    transposed: bool
    """Whether w is [K, N] and not [N, K]."""


def assert_linear(found: Any, x: Any, w: Any, **options: Unpack[LinearOptions]) -> Judgement:
    """Assert that a kernel multiplied rows by a matrix, within the rounding that its dtypes allow.

    found: [..., N]   x: [..., K]   w: [N, K], as `torch.nn.Linear` has it
    options: those of `LinearOptions`
    Returns the figures. Raises AssertionError when a value is wrong, and InputError for arrays that do not fit.
    """
    __tracebackhide__ = True
    return require(judge_linear(found, x, w, **options))


def judge_linear(found: Any, x: Any, w: Any, **options: Unpack[LinearOptions]) -> Judgement:
    """The judgement of `assert_linear`, which also takes its arguments."""
    given = checked(options, LinearOptions, "assert_linear")
    arrays = {"x": flat(real(x, "x")), "w": real(w, "w"), "found": flat(real(found, "found"))}
    shapes = {"x": "T K", "w": "K N" if given.get("transposed") else "N K", "found": "T N"}
    if given.get("bias") is not None:
        arrays["bias"], shapes["bias"] = real(given["bias"], "bias"), "N"
    fit(arrays, shapes)
    rows = chosen_rows(given, len(arrays["x"]))
    inputs, values = arrays["x"][rows], arrays["found"][rows]
    matrix = Matrix("", arrays["w"].T if given.get("transposed") else arrays["w"])

    def enclose(ops: EnclosureOps) -> Enclosure:
        return with_bias(ops, ops.linear(known(ops, inputs), matrix), arrays.get("bias"))

    output = Output(
        what="linear",
        step=STEP,
        found=values,
        enclose=enclose,
        where=lambda at: f"row {rows[at[0]]}, column {at[1]}",
        reads=inputs,
    )
    policy = policy_for(given, STEP, values, {name: arrays[name] for name in arrays if name != "found"})
    return judge(output, policy, significance_of(given))


def with_bias(ops: EnclosureOps, x: Enclosure, bias: NDArray[Any] | None) -> Enclosure:
    """The product with a bias added, which an engine may do after it has stored the product."""
    return x if bias is None else ops.cut(STEP, x) + known(ops, bias)


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
    """The order of columns that are both gate and up."""


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
    arrays = {"x": real(x, "x"), "w": real(w, "w"), "found": real(found, "found")}
    transposed = bool(given.get("transposed"))
    sizes = fit(arrays, {"x": "T K", "w": "E K N" if transposed else "E N K", "found": "T N"})
    experts = expert_of_rows(given, sizes["T"], sizes["E"])
    rows = chosen_rows(given, sizes["T"])
    rows = rows[experts[rows] >= 0]
    inputs, values, mine = arrays["x"][rows], arrays["found"][rows], experts[rows]
    matrices = arrays["w"].transpose(0, 2, 1) if transposed else arrays["w"]

    def enclose(ops: EnclosureOps) -> Enclosure:
        return by_expert(mine, lambda e, at: ops.linear(known(ops, inputs[at]), Matrix("", matrices[e])))

    output = Output(
        what="grouped linear",
        step=STEP,
        found=values,
        enclose=enclose,
        where=lambda at: f"row {rows[at[0]]}, expert {mine[at[0]]}, column {at[1]}",
        reads=inputs,
    )
    policy = policy_for(given, STEP, values, {"x": arrays["x"], "w": arrays["w"]})
    return judge(output, policy, significance_of(given))


def by_expert(experts: NDArray[Any], run: Any) -> Enclosure:
    """The results of each expert's rows, in the order of the rows.

    experts: integers [n]   run: from an expert and the places of its m rows to their results [m, ...]
    """
    order = np.argsort(experts, kind="stable")
    present = np.unique(experts)
    parts = [run(int(e), np.flatnonzero(experts == e)) for e in present]
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
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
    hot = np.asarray(given[name]) if not hasattr(given[name], "detach") else given[name].detach().cpu().numpy()
    fit({name: hot}, {name: "T E"}, {"T": rows, "E": experts})
    hot = hot != 0
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
            f"expected, or these with a 0 before"
        )
    if (np.diff(ends, prepend=0) < 0).any() or (len(ends) and ends[-1] > rows):
        raise InputError(f"offsets: {ends.tolist()[:8]}, but rising numbers from 0 to {rows} were expected")
    return np.where(
        np.arange(rows) < (ends[-1] if len(ends) else 0), np.searchsorted(ends, np.arange(rows), "right"), -1
    )


def within(ids: NDArray[Any], experts: int, name: str) -> NDArray[Any]:
    """The ids. Raises InputError when one is neither an expert nor -1."""
    wrong = ids[(ids < -1) | (ids >= experts)]
    if wrong.size:
        raise InputError(f"{name}: has {int(wrong[0])} in it, but experts 0 to {experts - 1}, or -1, were expected")
    return ids


def flat(array: NDArray[Any]) -> NDArray[Any]:
    """Rows: [..., n] as [T, n]; a vector is one row."""
    return (
        array.reshape(-1, array.shape[-1])
        if array.ndim and array.size
        else array.reshape(int(np.prod(array.shape[:-1])), array.shape[-1] if array.ndim else 1)
    )
