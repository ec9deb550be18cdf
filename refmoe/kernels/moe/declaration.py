# SPDX-License-Identifier: Apache-2.0
"""The claims of a fused mixture of experts: its arguments, its dtypes, and what it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from refmoe.contracts.declaring import Dtype, Framework, check_choices, check_least
from refmoe.contracts.formats import FORMATS, Format
from refmoe.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """A kernel's claims. The defaults are those of f(x, w_gate, w_up, w_down, ids, weights) -> y with NumPy arrays."""

    dtype: Dtype = "float32"
    """The dtype of x and of the experts' matrices."""
    weights_dtype: Dtype | None = None
    """The dtype of the routing weights, if not `dtype`."""
    ids_dtype: Literal["int64", "int32"] = "int64"
    """The dtype of ids, offsets and expert maps."""
    framework: Framework = "numpy"
    """The framework of the arrays that the kernel takes."""
    fused: Literal["halves", "interleaved"] | None = None
    """Gate and up are one argument [E, 2 F, D] in place of two: one after the other, or in turn."""
    gate_first: bool = True
    """Gate stands before up; else up stands before gate."""
    transposed: bool = False
    """The matrices are [E, D, F] and [E, F, D]: inputs before outputs."""
    routing: Literal["ids", "offsets"] = "ids"
    """The arguments behind the matrices: ids and weights [T, k], or offsets [E + 1] of rows sorted by expert."""
    buffer: bool = False
    """The last argument is the output [T, D], which the kernel fills."""
    expert_map: bool = False
    """A further argument [E], before the output: the place of each expert here, -1 for an expert of another rank."""
    padding: bool = False
    """An id may be -1: an empty slot."""
    repeats: bool = True
    """A token may name one expert in several slots."""
    strided: bool = True
    """Arguments may be strided."""
    batch_invariant: bool = False
    """A token's bits do not depend on the batch."""
    deterministic: bool = True
    """Equal calls give equal bits."""
    nan: Literal["row", "unspecified"] = "row"
    """A token with a NaN gets a row of NaN (row), or anything. Other tokens never notice."""
    accumulation: Dtype | None = None
    """The dtype in which sums are kept, if it is neither `dtype` nor float32, whichever is wider."""
    block: int | None = None
    """The number of tokens of a block, if there is one: counts around it are tried."""
    multiple: int = 1
    """D and F are multiples of it."""
    least_tokens: int = 0
    most_tokens: int = 1025
    most_experts: int = 256
    most_slots: int = 256
    """The largest k."""
    policy: str | None = None
    """The name of the policy by which values are judged; that of the result's dtype if not given."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_least(self, block=1, multiple=1, least_tokens=0, most_tokens=1, most_experts=1, most_slots=1)
        if self.least_tokens > self.most_tokens:
            found = f"least_tokens is {self.least_tokens} and most_tokens is {self.most_tokens}"
            raise InputError(f"declaration: {found}, but the least was expected to be the smaller one")
        if self.routing == "offsets" and (self.expert_map or self.padding):
            raise InputError("declaration: offsets have no expert_map and no padding, which go with ids")
        if self.framework == "jax" and (self.buffer or self.strided):
            name = "buffer" if self.buffer else "strided"
            raise InputError(f"declaration: {name} is claimed, but arrays of jax can be neither written nor strided")

    @property
    def given(self) -> Format:
        """The format of x and of the matrices."""
        return FORMATS[self.dtype]

    @property
    def shares(self) -> Format:
        """The format of the routing weights."""
        return FORMATS[self.weights_dtype or self.dtype]

    @property
    def sums(self) -> Format:
        """The format in which sums are kept."""
        if self.accumulation is not None:
            return FORMATS[self.accumulation]
        return max(self.given, FORMATS["float32"], key=lambda each: each.precision)
