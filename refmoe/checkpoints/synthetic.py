# SPDX-License-Identifier: Apache-2.0
"""A model whose weights come from a formula: `weight_formula`, with deliberate changes by `weight_edits`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from refmoe.arithmetic.arrays import Grid
from refmoe.checkpoints.layout import Checkpoint
from refmoe.checkpoints.names import build_parameters, parameter_shapes
from refmoe.checkpoints.weight import Weight
from refmoe.checkpoints.weight_edits import Edit, parse_edits
from refmoe.checkpoints.weight_formula import EXPONENTS, GAINS, LARGEST, MASK, default_exponent, elements, gains
from refmoe.errors import InputError
from refmoe.spec.config import Config


class SyntheticWeight(Weight):
    """A parameter that is computed when it is read, whole or by rows."""

    computed = True

    def __init__(
        self, seed: int, name: str, shape: tuple[int, ...], exponent: int, edits: tuple[Edit, ...] = ()
    ) -> None:
        super().__init__(
            name=name, shape=shape, dtype=np.float32, source=self._values, origin=f"synthetic parameter '{name}'"
        )
        self.seed = seed
        self.exponent = exponent
        self.edits = edits
        if len(shape) == 2 and not edits:
            self.grid = Grid(exponent, LARGEST)

    def block(self, start: int, stop: int, dtype: Any = None) -> Any:
        if self.grid is None:
            return super().block(start, stop, dtype)
        # the formula's own values are finite
        width = self.shape[1]
        made = elements(self.seed, self.name, self.exponent, start * width, stop * width, dtype or self.dtype)
        return made.reshape(-1, width)

    def _values(self) -> np.ndarray[Any, Any]:
        height = self.shape[0] if len(self.shape) == 2 else 1
        return self._edited(np.arange(height), self.edits).reshape(self.shape)

    def rows(self, ids: Any) -> np.ndarray[Any, Any]:
        # chooses rows as indexing an array does, with its IndexError
        return self._edited(np.arange(self.shape[0])[ids], self.edits)

    def _edited(self, rows: np.ndarray[Any, Any], edits: tuple[Edit, ...]) -> np.ndarray[Any, Any]:
        """Rows of the matrix after some of the edits. A gain is a matrix of one row."""
        block = self._formula(rows, self.exponent)
        for i, edit in enumerate(edits):
            formula = self._formula(rows, edit.given) if edit.action == "exponent" else None
            copied = self._edited(np.array([edit.given]), edits[:i])[0] if edit.action == "copy" else None
            edit.apply(block, rows, formula, copied)
        return block

    def _formula(self, rows: np.ndarray[Any, Any], exponent: int) -> np.ndarray[Any, Any]:
        if len(self.shape) == 1:
            return gains(self.seed, self.name, self.shape[0])[None]
        width = self.shape[1]
        if len(rows) and np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))):
            first = int(rows[0]) * width
            return elements(self.seed, self.name, exponent, first, first + len(rows) * width).reshape(-1, width)
        result = np.empty((len(rows), width), np.float32)
        for i, row in enumerate(rows.tolist()):
            result[i] = elements(self.seed, self.name, exponent, row * width, (row + 1) * width)
        return result


def synthetic_checkpoint(
    config: Config,
    seed: int,
    exponents: Mapping[str, int] | None = None,
    edits: Sequence[Mapping[str, Any]] = (),
) -> Checkpoint:
    """A model of the given dimensions with weights from the formula.

    exponents: kind of parameter (the last part of its name) to the power of two, where it is not the default.
    edits: changes to the formula's values, as tables; `weight_edits` describes them.
    Raises InputError for an unknown kind, an exponent outside float32's, a seed outside 64 bits or a malformed edit.
    """
    given = exponents or {}
    for kind in sorted(given.keys() - GAINS.keys()):
        raise InputError(f"exponents: unknown kind of parameter '{kind}', expected one of {', '.join(GAINS)}")
    for kind, exponent in given.items():
        if isinstance(exponent, bool) or not isinstance(exponent, int) or exponent not in EXPONENTS:
            raise InputError(f"exponents: {kind} = {exponent!r}, but an integer from -126 to 120 was expected")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MASK:
        raise InputError(f"seed = {seed!r}, but an integer from 0 to 2^64 - 1 was expected")
    shapes = parameter_shapes(config)
    changes = parse_edits(edits, shapes)

    def weight(name: str) -> Weight:
        shape = shapes[name]
        kind = name.rpartition(".")[2]
        exponent = 0 if len(shape) == 1 else given.get(kind, default_exponent(name, shape))
        return SyntheticWeight(seed=seed, name=name, shape=shape, exponent=exponent, edits=tuple(changes.get(name, ())))

    return Checkpoint(
        config=config, parameters=build_parameters(config, weight), layout="synthetic", files=(), dtypes=("F32",)
    )
