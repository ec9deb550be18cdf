# SPDX-License-Identifier: Apache-2.0
"""The options that all assertions on kernels take, and the policy that follows from the arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from refmoe.api.arguments import kind, probability, shown, whole_number
from refmoe.api.policies import as_policy
from refmoe.arithmetic.formats import OF_DTYPE, Format
from refmoe.errors import InputError
from refmoe.profiles.policy import Policy
from refmoe.verifier.segments import SIGNIFICANCE


class Options(TypedDict, total=False):
    """The options of every assertion. They come after its arrays."""

    policy: Policy | str | None
    """The rounding that is legal; None: any kernel that stores its output in the dtype of the array found."""
    rows: int | Sequence[int] | None
    """Judge only this many rows, or these rows. None: all rows."""
    seed: int
    """Chooses the rows where `rows` is a number."""
    significance: float
    """The probability that a healthy kernel fails is less than this."""
    explain: bool
    """Whether a failure is searched for its cause, which takes time."""


def checked(options: Mapping[str, Any], allowed: Any, function: str) -> dict[str, Any]:
    """The options of a call. Raises InputError for a name that is not among the keys of the TypedDict `allowed`."""
    names = list(allowed.__annotations__)
    for name in options:
        if name not in names:
            raise InputError(f"{function}: {name!r} is no option, but one of {', '.join(names)} was expected")
    return dict(options)


def policy_for(options: Mapping[str, Any], step: str, found: Any, inputs: Mapping[str, Any]) -> Policy:
    """The policy of a call.

    step: the tap whose dtype the output has   found: the output   inputs: the arrays that the kernel read

    Without a policy it is the one of the output's dtype: any kernel that stores it. All inputs may be narrower, as
    where a kernel returns its float32 accumulator. Then it is that of the widest input, with the output as found.
    Parameters are known as the kernel has them, so no policy rounds them before they are used.
    """
    given, dtypes = options.get("policy"), tuple(each.dtype for each in inputs.values())
    if given is None:
        return _default(step, found.dtype, dtypes)
    policy = as_policy(given)
    return replace(policy, cuts={**policy.cuts, "weights": widest(dtypes, policy.at("weights"))})


@cache
def _default(step: str, found: Any, inputs: tuple[Any, ...]) -> Policy:
    """The policy of a call that names none.   found, inputs: dtypes"""
    out = OF_DTYPE[found]
    wide = max((OF_DTYPE[each] for each in inputs), key=lambda f: f.precision, default=out)
    narrower = wide.precision < out.precision
    policy = as_policy(wide.name if narrower else out.name)
    cuts = {**policy.cuts, **({step: out} if narrower else {})}
    return replace(policy, cuts={**cuts, "weights": widest(inputs, policy.at("weights"))})


def widest(dtypes: Sequence[Any], least: Format) -> Format:
    """A dtype that holds the values of all these, as far as there is one: the most precise of theirs and `least`."""
    formats = [least, *(OF_DTYPE[each] for each in dtypes)]
    most = max(formats, key=lambda f: f.precision)
    return most if all(most.holds(each) for each in formats) else OF_DTYPE[np.dtype(np.float32)]


def chosen_rows(options: Mapping[str, Any], count: int) -> Any:
    """The rows to judge: integers [n], rising. Raises InputError when they are none of 0 .. count - 1."""
    rows = options.get("rows")
    if rows is None:
        return np.arange(count)
    seed = whole_number(options.get("seed", 0), "seed")
    if isinstance(rows, int | np.integer) and not isinstance(rows, bool):
        wanted = whole_number(rows, "rows")
        if wanted >= count:
            return np.arange(count)
        return np.sort(np.random.default_rng(seed).choice(count, wanted, replace=False))
    try:
        listed = np.asarray(rows)
        fits = listed.ndim == 1 and (listed.size == 0 or listed.dtype.kind in "iu")
    except Exception:  # of any array library
        fits = False
    if not fits:
        raise InputError(f"rows: is {kind(rows)} {shown(rows)}, but a number of rows or a list of them was expected")
    listed = listed.astype(np.int64)
    wrong = listed[(listed < 0) | (listed >= count)]
    if wrong.size:
        raise InputError(f"rows: has {int(wrong[0])} in it, but rows from 0 to {count - 1} were expected")
    return np.unique(listed)


def selection(rows: NDArray[Any], count: int) -> Any:
    """The index of rows, without a copy where it selects all.   rows: integers [n], rising   count: of all rows"""
    return slice(None) if len(rows) == count else rows


def significance_of(options: Mapping[str, Any]) -> float:
    """The significance of a call. Raises InputError when it is no probability."""
    return probability(options.get("significance", SIGNIFICANCE))
