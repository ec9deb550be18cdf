# SPDX-License-Identifier: Apache-2.0
"""A router under test: called with NumPy arrays, for every framework, and for logits or hidden states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from refmoe.arithmetic.exact import dot
from refmoe.contracts.broken import Malformed, first_line, foreign
from refmoe.contracts.formats import Floats, Ints, rounded
from refmoe.contracts.frameworks import to_framework, to_numpy
from refmoe.routers.contract.arithmetic import REFERENCE_UNIT
from refmoe.routers.contract.declaration import Declaration

Router = Callable[[Any], tuple[Any, Any]]


@dataclass(frozen=True)
class Routing:
    """One call. The router saw logits within `radius` of `logits` (0 if it was given them) and returned the rest."""

    logits: Floats
    radius: Floats
    ids: Ints
    weights: Floats


@dataclass(frozen=True)
class Subject:
    """A router, its declaration, and further functions to test.

    router        logits [T, E] (or hidden states, if a gate is declared) -> ids [T, k], weights [T, k]
    with_top_k    the same router for another k: k -> router
    dispatch      x [T, D], ids [T, k] -> (rows in the experts' order, plan)
    combine       rows, plan, weights [T, k] -> y [T, D]
    balance_loss  logits [T, E] -> a number that is `balanced` for balanced loads (AUX-1: k)
    z_loss        logits [T, E] -> a number
    """

    router: Router
    declaration: Declaration
    with_top_k: Callable[[int], Router] | None = None
    dispatch: Callable[[Any, Any], tuple[Any, Any]] | None = None
    combine: Callable[[Any, Any, Any], Any] | None = None
    balance_loss: Callable[[Any], Any] | None = None
    z_loss: Callable[[Any], Any] | None = None
    balanced: float | None = None

    def array(self, values: Floats | Ints) -> Any:
        """The values as an array of the router's framework and dtype."""
        return to_framework(values, self.declaration.given, self.declaration.framework)

    def at_top_k(self, k: int) -> Subject:
        """This router with another k, if `with_top_k` is given."""
        if k == self.declaration.top_k or self.with_top_k is None:
            return self
        return replace(self, router=self.with_top_k(k), declaration=replace(self.declaration, top_k=k))

    def call(self, given: Any, tokens: int) -> tuple[Any, Any]:
        """The router's own result. Raises LawBroken when it raises, or Malformed for a result that is no pair."""
        with np.errstate(all="ignore"), foreign("the router", f" on {tokens} tokens"):
            answer = self.router(given)
        with foreign("the router's result"):
            pair = [*answer] if isinstance(answer, tuple | list) else []
        if len(pair) != 2:
            raise Malformed(f"found {type(answer).__name__}, a pair (ids, weights) was expected")
        return pair[0], pair[1]

    def route(self, logits: Floats, together: bool = False) -> Routing:
        """Route a batch. With a capacity, tokens compete, so they are routed one by one unless `together`."""
        if self.declaration.capacity is not None and not together and len(logits) > 1:
            each = [self.route(row[None]) for row in logits]
            columns = zip(*((r.logits, r.radius, r.ids, r.weights) for r in each), strict=True)
            return Routing(*(np.concatenate(column) for column in columns))
        values, seen, radius = self.input(logits)
        ids, weights = self.call(self.array(values), len(logits))
        return Routing(seen, radius, *self.well_formed(ids, weights, len(logits), together))

    def input(self, logits: Floats) -> tuple[Floats, Floats, Floats]:
        """The router's input for these logits, the exact logits of that input, and the radius around them.

        The logits that the router itself computes from that input are within the radius.
        """
        if self.declaration.gate is None:
            return logits, logits, self.conversion(logits)
        inverse, exact = right_inverse(self.declaration)
        with np.errstate(all="ignore"):
            if exact:
                hidden = np.zeros((len(logits), inverse.shape[1]))
                hidden[:, inverse.any(axis=0)] = (logits[:, :, None] * inverse[None]).sum(axis=1)[
                    :, inverse.any(axis=0)
                ]
                seen = logits if np.isfinite(logits).all() else hidden @ self.declaration.gate_matrix.T
                return hidden, seen, self.conversion(seen)
            gate = self.declaration.gate_matrix
            hidden = rounded(logits @ inverse, self.declaration.given)
            seen = dot.matmul(hidden, np.ascontiguousarray(gate.T))
            terms = gate.shape[1] + 1
            unit = self.declaration.working.unit + REFERENCE_UNIT
            radius = np.expm1(terms * np.log1p(unit)) * (np.abs(hidden) @ np.abs(gate).T)
            radius += self.declaration.given.unit * (np.abs(seen) + radius)
            return hidden, seen, radius + self.conversion(np.abs(seen) + radius)

    def conversion(self, logits: Floats) -> Floats:
        """The error [T, E] of converting logits to the router's arithmetic, where that is coarser than the input."""
        d = self.declaration
        if d.working.precision >= d.given.precision:
            return np.zeros_like(logits)
        with np.errstate(all="ignore"):
            return np.where(np.isfinite(logits), d.working.unit * np.abs(logits) + d.working.underflow, 0.0)

    def well_formed(self, ids: Any, weights: Any, tokens: int, drops: bool) -> tuple[Ints, Floats]:
        """Ids and weights as NumPy arrays. Raises Malformed where only the law of the ids can be judged."""
        shape = (tokens, self.declaration.top_k)
        try:
            found, shares = to_numpy(ids), to_numpy(weights)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # of the user's own array class
            raise Malformed(f"the result is no pair of arrays: {first_line(error)}") from error
        for name, array, kinds in (("ids", found, "i"), ("weights", shares, "f")):
            if array.dtype.kind not in kinds:
                wanted = "integers" if kinds == "i" else "floating-point numbers"
                raise Malformed(f"found {name} of {array.dtype}, {wanted} were expected")
            if array.shape != shape:
                raise Malformed(f"found {name} of shape {list(array.shape)}, {list(shape)} was expected")
        if not drops:
            ordered = np.sort(found, axis=1)
            inside = f"ids in 0 .. {self.declaration.experts - 1}"
            outside = (ordered[:, 0] < 0) | (ordered[:, -1] >= self.declaration.experts)
            for wrong, wanted in ((outside, inside), (ordered[:, 1:] == ordered[:, :-1], "distinct ids")):
                if wrong.any():
                    token = int(np.argwhere(wrong)[0, 0])
                    raise Malformed(f"found ids {found[token].tolist()}, {wanted} were expected", token)
        return found, shares


@lru_cache(maxsize=64)
def right_inverse(declaration: Declaration) -> tuple[Floats, bool]:
    """A matrix that turns logits [T, E] into hidden states [T, D], and whether the router then sees exactly the logits.

    It does where every expert has a column of the router matrix to itself that holds a power of two.
    """
    gate = declaration.gate_matrix
    inverse = np.zeros_like(gate)
    for expert, row in enumerate(gate):
        mantissa, _ = np.frexp(np.abs(row))
        alone = (mantissa == 0.5) & (np.count_nonzero(gate, axis=0) == 1)
        if not alone.any():
            return np.ascontiguousarray(np.linalg.pinv(gate).T), False
        column = int(np.argmax(alone))
        inverse[expert, column] = 1.0 / row[column]
    return inverse, True
