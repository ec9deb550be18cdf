# SPDX-License-Identifier: Apache-2.0
"""Quantised matrices as a wrong engine reads them. What is stored stays, and so does the format of the inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.bugs.mutant import PARAMETERS
from refmoe.bugs.quantised.bug import STEPS, register
from refmoe.checkpoints.ggml_blocks import Bytes, Groups
from refmoe.checkpoints.gguf_load import BlockTensor
from refmoe.checkpoints.names import build_parameters, named_weights
from refmoe.checkpoints.rows import Rows, RowTensor, RowWeight
from refmoe.checkpoints.scaled import Parts, ScaledTensor
from refmoe.checkpoints.weight import Weight
from refmoe.spec.config import Config
from refmoe.spec.model import Parameters


class Misread(RowWeight):
    """A parameter as a wrong engine reads it. Its values may be no numbers."""

    def _check(self, stored: Any) -> None:
        return None


def misread(weight: RowWeight, tensor: RowTensor) -> Misread:
    """The parameter, read from another tensor, or otherwise from its own."""
    return Misread(name=weight.name, shape=weight.shape, tensor=tensor, view=weight.view)


Change = Callable[[RowWeight, dict[str, Weight]], Weight]
"""From a parameter, and all parameters by their names, to the parameter as it is read."""


def with_matrices(
    config: Config, parameters: Parameters, formats: Iterable[str], only: Iterable[str], change: Change
) -> Parameters:
    """The parameters with quantised matrices changed.

    only: the last parts of the names of these matrices; empty: all that products read
    """
    wanted, weights = {*only} or {*STEPS}, named_weights(parameters)

    def read(name: str) -> Weight:
        weight = weights[name]
        if not isinstance(weight, RowWeight) or weight.name != name or name.rpartition(".")[2] not in wanted:
            return weight
        return change(weight, weights) if weight.format in formats else weight

    return build_parameters(config, read)


def matrix_bug(id: str, **facts: Any) -> Callable[[Change], Change]:
    """Decorates a function that reads a matrix wrongly, perhaps with parts of another one."""

    def decorate(change: Change) -> Change:
        def function(config: Config, parameters: Parameters) -> Parameters:
            return with_matrices(config, parameters, facts["formats"], facts.get("only", ()), change)

        register(id, PARAMETERS, function, change.__doc__ or "", **facts)
        return change

    return decorate


# ---- the blocks of GGUF


@dataclass(frozen=True)
class MisreadBlocks(BlockTensor):
    """A tensor of blocks that are read elsewhere, or taken apart otherwise."""

    place: Callable[[BlockTensor, Rows], Bytes] | None = None
    """From the right tensor and rows to the bytes of all their blocks: [blocks, bytes of a block]; None: the right."""

    def blocks(self, rows: Rows) -> Bytes:
        right = BlockTensor(**{each.name: getattr(self, each.name) for each in fields(BlockTensor)})
        return right.blocks(rows) if self.place is None else self.place(right, rows)

    def take(self, rows: Rows) -> NDArray[Any]:
        made = self.factors(rows)
        whole = made.terms.astype(np.float64)
        if made.offsets is not None:
            whole += np.repeat(made.offsets, whole.shape[1] // made.offsets.shape[1], axis=1)
        return np.asarray(whole, np.float32)


def _as_blocks(tensor: RowTensor, **changed: Any) -> MisreadBlocks:
    return MisreadBlocks(**{each.name: getattr(tensor, each.name) for each in fields(BlockTensor)} | changed)


def block_bug(id: str, **facts: Any) -> Callable[[Callable[..., Groups]], Callable[..., Groups]]:
    """Decorates a function that takes blocks apart wrongly.

    It maps the bytes of blocks [n, bytes], and their right parts, to the parts as they are read.
    """

    def decorate(parts: Callable[[Bytes, Groups], Groups]) -> Callable[[Bytes, Groups], Groups]:
        def change(weight: RowWeight, _: dict[str, Weight]) -> Weight:
            right = weight.tensor
            if not isinstance(right, BlockTensor):
                return weight
            format = right.format
            return misread(weight, _as_blocks(right, format=replace(format, parts=lambda b: parts(b, format.parts(b)))))

        change.__doc__ = parts.__doc__
        matrix_bug(id, **facts)(change)
        return parts

    return decorate


def place_bug(id: str, **facts: Any) -> Callable[[Callable[..., Bytes]], Callable[..., Bytes]]:
    """Decorates a function that reads blocks at a wrong place: from a right tensor and rows to [blocks, bytes]."""

    def decorate(place: Callable[[BlockTensor, Rows], Bytes]) -> Callable[[BlockTensor, Rows], Bytes]:
        def change(weight: RowWeight, _: dict[str, Weight]) -> Weight:
            right = weight.tensor
            return misread(weight, _as_blocks(right, place=place)) if isinstance(right, BlockTensor) else weight

        change.__doc__ = place.__doc__
        matrix_bug(id, **facts)(change)
        return place

    return decorate


# ---- the scales of safetensors


@dataclass(frozen=True)
class MisreadScales(ScaledTensor):
    """A matrix of codes with scales, whose parts are put together wrongly."""

    change: Callable[[ScaledTensor, Rows, Parts], Parts] | None = None
    """From the right tensor, rows, and their codes, zero points and scales, each [n, in], to those that are read."""

    def parts(self, rows: Rows, dtype: Any) -> Parts:
        right = super().parts(rows, dtype)
        return right if self.change is None else self.change(self, rows, right)


Scaled = Callable[[ScaledTensor, Rows, Parts], Parts]


def misread_scales(weight: RowWeight, tensor: ScaledTensor, change: Scaled) -> Misread:
    """The parameter, whose codes, zero points and scales are changed."""
    own = {each.name: getattr(tensor, each.name) for each in fields(ScaledTensor)}
    return misread(weight, MisreadScales(**own, change=change))


def scale_bug(id: str, **facts: Any) -> Callable[[Scaled], Scaled]:
    """Decorates a function that puts the parts of a matrix together wrongly."""

    def decorate(parts: Scaled) -> Scaled:
        def change(weight: RowWeight, _: dict[str, Weight]) -> Weight:
            right = weight.tensor
            return misread_scales(weight, right, parts) if isinstance(right, ScaledTensor) else weight

        change.__doc__ = parts.__doc__
        matrix_bug(id, **facts)(change)
        return parts

    return decorate
