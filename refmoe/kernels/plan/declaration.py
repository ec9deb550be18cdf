# SPDX-License-Identifier: Apache-2.0
"""The claims of a dispatch plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from refmoe.contracts.declaring import Framework, check_choices, check_least


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """The claims of a function from ids [T, k] to a plan. S is the number of slots, T k."""

    kind: Literal["blocks", "histogram", "offsets", "permutation"] = "blocks"
    """The form of its result.

    blocks       f(ids, block, experts) -> (slots [P], experts of blocks [>= P / block], P): padded to whole blocks
    histogram    f(ids, experts) -> the number of slots of each expert [E]
    offsets      f(ids, experts) -> the first row of each expert, and the number of all rows [E + 1]
    permutation  f(ids, experts) -> (slots in the experts' order, offsets [E + 1])
    """
    ids_dtype: Literal["int64", "int32"] = "int64"
    framework: Framework = "numpy"
    stable: bool = True
    """An expert's slots are in rising order."""
    padding: bool = False
    """An id may be -1: an empty slot, which is in no block."""
    spare: Literal["absent", "unspecified"] = "unspecified"
    """The experts of blocks behind the last one are -1 (absent), or anything."""
    block: int | None = None
    """The only number of slots of a block, if there is one."""
    most_tokens: int = 1025
    most_experts: int = 256

    def __post_init__(self) -> None:
        check_choices(self)
        check_least(self, block=1, most_tokens=1, most_experts=1)
