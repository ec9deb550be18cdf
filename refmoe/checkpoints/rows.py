# SPDX-License-Identifier: Apache-2.0
"""Quantised tensors: weights that are made row by row when they are read, and the checkpoint that holds them.

To every other module such a tensor is an ordinary one, whose values are the numbers that its format defines.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.arithmetic.codes import Factors
from refmoe.checkpoints.layout import Checkpoint, Found, Listing, match
from refmoe.checkpoints.names import build_parameters, named_weights
from refmoe.checkpoints.weight import Weight
from refmoe.files.safetensors_file import DTYPES, RowReader, StoredTensor, View
from refmoe.files.sentences import quoted

Rows = NDArray[np.int64]
"""Numbers of rows. A tensor [E, out, in] has rows 0 to E out - 1, and a vector is one row."""
TOGETHER = 1 << 22
"""About how many weights are made at a time: the parts of their blocks take several times their memory."""


@dataclass(frozen=True)
class Stored:
    """How a tensor is stored."""

    format: str
    values: int
    bits: int
    """Of all values together, with their scales and offsets."""


@dataclass(frozen=True)
class RowTensor(StoredTensor, ABC):
    """A tensor whose rows are computed from what is stored. `dtype` and `shape` are those of the weights.

    A view of it takes or reorders rows, and never cuts one.
    """

    @abstractmethod
    def take(self, rows: Rows) -> NDArray[Any]:
        """The weights of some rows: [n, in]. Raises InputError when they can no longer be read, or are no numbers."""

    def factors(self, rows: Rows) -> Factors:
        """Some rows of a matrix as engines multiply them, scale times code and offsets apart: [n, in].

        Raises InputError as `take` does.
        """
        return Factors(terms=self.take(rows))

    @property
    @abstractmethod
    def stored(self) -> Stored:
        """The format, and how many bits it takes."""

    def map(self) -> NDArray[Any]:
        return self._in_parts(np.arange(self.height)).reshape(self.shape)

    def rows_of(self, view: View) -> RowReader:
        return partial(self._rows, view)

    def _rows(self, view: View, start: int, stop: int) -> NDArray[Any]:
        if len(self.shape) == 1:
            return view(self.map())[start:stop]
        return self._in_parts(self.seen(view)[start:stop])

    def chosen(self, view: View, ids: Any) -> NDArray[Any]:
        """The rows `ids` of a view, as indexing an array gives them."""
        rows = self.seen(view)[ids]
        return self._in_parts(np.reshape(rows, -1)).reshape(*np.shape(rows), self.shape[-1])

    def seen(self, view: View) -> Rows:
        """The numbers of the rows that a view shows: [out]."""
        return view(np.arange(self.height).reshape(*self.shape[:-1], 1)).reshape(-1)

    @property
    def height(self) -> int:
        """How many rows there are."""
        return math.prod(self.shape[:-1])

    def _in_parts(self, rows: Rows) -> NDArray[Any]:
        """`take`, a few rows at a time: [n, in]."""
        made = np.empty((len(rows), self.shape[-1]), DTYPES[self.dtype])
        step = max(1, TOGETHER // max(1, self.shape[-1]))
        for start in range(0, len(rows), step):
            made[start : start + step] = self.take(rows[start : start + step])
        return made


class RowWeight(Weight):
    """A parameter in a tensor whose rows are computed. Only those that are asked for are."""

    computed = True

    def __init__(self, name: str, shape: tuple[int, ...], tensor: RowTensor, view: View) -> None:
        super().__init__(
            name=name, shape=shape, dtype=DTYPES[tensor.dtype],
            source=partial(tensor.rows_of(view), 0, shape[0]),
            origin=f"{tensor.path}: tensor {quoted(tensor.name)}",
            read_block=tensor.rows_of(view),
        )  # fmt: skip
        self.format = tensor.stored.format
        """The name of the format that it is stored in."""
        self.tensor, self.view = tensor, view

    def factors(self, start: int, stop: int) -> Factors:
        """Rows [start, stop) of a matrix as engines multiply them. Raises InputError where a value is no number."""
        made = self.tensor.factors(self.tensor.seen(self.view)[start:stop])
        for part in (made.terms, made.offsets):
            if part is not None:
                self._check(part)
        return made

    def rows(self, ids: Any) -> Any:
        if len(self.shape) == 1:
            return super().rows(ids)
        stored = self.tensor.chosen(self.view, ids)
        self._check(stored)
        return stored


@dataclass(frozen=True)
class QuantisedCheckpoint(Checkpoint):
    """A checkpoint with quantised tensors."""

    stored: Mapping[str, Stored] = field(default_factory=dict)
    """How each tensor is stored, by its name."""


def match_rows(found: Found, expected: Listing) -> QuantisedCheckpoint:
    """The checkpoint, as `layout.match` gives it, with quantised tensors among those found.

    Raises InputError where `layout.match` does.
    """
    plain = match(found, expected)
    weights = named_weights(plain.parameters)
    for name, wanted in expected():
        tensor = found.tensors.get(name)
        if isinstance(tensor, RowTensor):
            for canonical, view in wanted.parameters:
                weights[canonical] = RowWeight(canonical, weights[canonical].shape, tensor, view)
    if plain.tied:
        weights["output"] = weights["embedding"]
    rest = {each.name: getattr(plain, each.name) for each in fields(Checkpoint) if each.name != "parameters"}
    return QuantisedCheckpoint(
        **rest, parameters=build_parameters(plain.config, weights.__getitem__),
        stored={name: stored_as(tensor) for name, tensor in found.tensors.items()},
    )  # fmt: skip


def stored_as(tensor: StoredTensor) -> Stored:
    """How a tensor is stored, quantised or not."""
    if isinstance(tensor, RowTensor):
        return tensor.stored
    return Stored(format=tensor.dtype, values=math.prod(tensor.shape), bits=8 * tensor.nbytes)
