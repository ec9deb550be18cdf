# SPDX-License-Identifier: Apache-2.0
"""Predictions: the values of a changed specification in plain binary64, each step from the trace's own inputs.

A prediction costs a fraction of a pass of enclosures, so that every hypothesis gets one. It proves nothing by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

import numpy as np

from refmoe.arithmetic.arrays import StoredWeight, Tap
from refmoe.arithmetic.codes import InputFormat, quantise
from refmoe.arithmetic.exact import elementary
from refmoe.arithmetic.formats import Format, nearest
from refmoe.arithmetic.weight_cache import WeightCache
from refmoe.profiles.cut_points import PROJECTIONS, product_of
from refmoe.profiles.policy import Policy
from refmoe.spec.taps import step_of
from refmoe.steps.coded import coded_values, codes_of, groups_of, kept, parts_of
from refmoe.steps.policy_ops import PolicyOps
from refmoe.steps.rounding import CutOps, cut_again
from refmoe.traces.trace import Trace
from refmoe.verifier.diagnosis.observed import sampled, size_of
from refmoe.verifier.passes import Key, Pass
from refmoe.verifier.routing import valid
from refmoe.verifier.subject import Subject

WEIGHT_BYTES = 256 << 20
"""The memory for weights in binary64 that predictions share."""


MOST_TURNED = 1024
"""The most positions whose cosines and sines are kept for the next prediction."""


@lru_cache(maxsize=32)
def _unit_circle(
    positions: bytes, dtype: str, shape: tuple[int, ...], base: float, numerators: tuple[int, ...], denominator: int
) -> Any:
    """Cosines and sines as `elementary.unit_circle` has them. Nearly all predictions ask for the same."""
    at = np.frombuffer(positions, dtype).reshape(shape)
    return elementary.unit_circle(at, base, numerators, denominator)


class PlainOps(PolicyOps):
    """Ops in binary64 that round only at some cut points."""

    def __init__(
        self, policy: Policy, tap: Tap | None, forced: frozenset[str], weights: WeightCache, factors: WeightCache
    ) -> None:
        """forced: the cut points at which values are rounded   weights: shared by passes with one dtype of weights

        factors: quantised matrices as engines multiply them, shared by all passes
        """
        super().__init__(policy, tap)
        self._forced, self._weights, self._factors = forced, weights, factors

    def cut(self, name: str, x: Any) -> Any:
        if name in self.policy.kept:
            return kept(self.policy, name, x, coded_values)
        return nearest(x, self.policy.at(name)) if name in self._forced else x

    def tap(self, name: str, x: Any) -> Any:
        x = x if name == "router.experts" else self.cut(name, x)
        return x if self._tap is None else self._tap(self._prefix + name, x)

    def _held(self, stored: Any) -> Any:
        return nearest(stored, self.policy.at("weights"))

    def vector(self, weight: StoredWeight) -> Any:
        return self._kept(weight)

    def linear(self, x: Any, weight: StoredWeight) -> Any:
        step, coded = product_of(weight) if self._forced else None, codes_of(self.policy, weight)
        if coded is not None:
            return self._times_codes(x, weight, coded)
        read = self.policy.input_of(weight)
        if isinstance(read, Format):
            x = nearest(x, read)
        if step is not None:
            x = cut_again(cast(CutOps, self), f"{step}.input", PROJECTIONS[step][1], x)
        return x @ self._kept(weight).T

    def _times_codes(self, x: Any, weight: Any, coded: InputFormat) -> Any:
        groups, codes = groups_of(weight), quantise(x.reshape(-1, x.shape[-1]), coded)
        values, sums = codes.values, codes.sums(groups) if groups else None
        made = [
            values @ part.terms.T + (0.0 if sums is None else sums @ part.offsets.T)
            for part in parts_of(weight, self._factors)
        ]
        return np.concatenate(made, axis=-1).reshape(*x.shape[:-1], -1)

    def _kept(self, weight: StoredWeight) -> Any:
        """The values of a parameter, rounded once for all passes."""
        return self._weights.get(weight, lambda: self._held(weight.read()), lambda made: int(made.nbytes))

    def unit_circle(self, positions: Any, base: float, numerators: Sequence[int], denominator: int) -> Any:
        positions = np.asarray(positions)
        if positions.size > MOST_TURNED:
            return elementary.unit_circle(positions, base, numerators, denominator)
        turned = positions.tobytes(), str(positions.dtype), positions.shape
        return _unit_circle(*turned, base, tuple(numerators), denominator)

    def matmul(self, a: Any, b: Any) -> Any:
        return a @ b

    def sum(self, x: Any, axis: int) -> Any:
        return x.sum(axis)

    def exp(self, x: Any) -> Any:
        return np.exp(x)

    def log(self, x: Any) -> Any:
        return np.log(x)

    def sigmoid(self, x: Any) -> Any:
        small = np.exp(-np.abs(x))
        return np.where(x >= 0, 1.0, small) / (1 + small)


class Prediction(Pass):
    """A pass in plain binary64 that keeps the results at all taps, or at those it is asked for.

    It replaces a choice of experts that is invalid by its own.
    """

    looks_beyond = True

    def __init__(self, trace: Trace, subject: Subject, policy: Policy, wanted: frozenset[str] | None = None) -> None:
        """wanted: the steps to keep, in the trace or not; None: all steps that the trace has"""
        super().__init__(trace, subject, policy, None)
        self.kept: dict[Key, list[Any]] = {}
        self._wanted = wanted

    def _tap(self, name: str, x: Any) -> Any:
        step, present = step_of(name), name in self._present
        if present if self._wanted is None else step in self._wanted:
            self.kept.setdefault((self._run.run, name), []).append(self._compared(name, step, x))
        if not present:
            return x
        values = self._read(name, step)
        if step == "router.experts":
            found = np.asarray(values).astype(np.int64)
            right = valid(found, self.subject.config.experts)[:, None] & (found.shape == x.shape)
            return np.where(right, found, x) if found.shape == x.shape else x
        return self._taken(step, name, values)

    def _compared(self, name: str, step: str, x: Any) -> Any:
        """The values that are compared, [n]; of experts the sorted ids, [T, k]."""
        if step == "router.experts":
            return np.sort(x, axis=-1)
        return sampled(x.reshape(-1), size_of(self.trace, (self._run.run, name)) if name in self._present else x.size)

    def values(self) -> dict[Key, Any]:
        """The kept values of all runs so far, in the order of `Recorded`."""
        return {key: np.concatenate(parts) if len(parts) > 1 else parts[0] for key, parts in self.kept.items()}

    def _taken(self, step: str, name: str, dumped: Any) -> Any:
        values = np.asarray(dumped, np.float64)
        return np.where(self._visible()[None], values, 0.0) if step == "attention.scores" else values
