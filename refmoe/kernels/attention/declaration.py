# SPDX-License-Identifier: Apache-2.0
"""The claims of attention over a cache of pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from refmoe.contracts.declaring import Dtype, Framework, check_choices, check_least
from refmoe.contracts.formats import FORMATS, Format
from refmoe.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """The claims of f(q [S, H, C], keys [P, B, G, C], values [P, B, G, C], table [S, M], lengths [S]) -> [S, H, C].

    Each of S sequences has one query, that of its last token. Its token p lies in page table[s, p // B], place p % B.
    """

    dtype: Dtype = "float32"
    ids_dtype: Literal["int64", "int32"] = "int64"
    """The dtype of table and lengths."""
    framework: Framework = "numpy"
    window: int | None = None
    """The number of tokens that a query sees, its own counted (ATTN-4); all if not given."""
    scale: float | None = None
    """The factor of scores; C^-0.5 if not given."""
    page: int | None = None
    """The only number of tokens of a page (B), if there is one."""
    width: int | None = None
    """The only width of a head (C), if there is one."""
    held: Literal["finite", "anything"] = "anything"
    """The contents of memory without a token: finite numbers, or NaN and infinity too."""
    table_tail: Literal["pages", "anything"] = "pages"
    """The entries of the table behind a sequence's last page: any page's number, or any number."""
    batch_invariant: bool = False
    deterministic: bool = True
    policy: str | None = None

    def __post_init__(self) -> None:
        check_choices(self)
        check_least(self, window=1, page=1, width=8)
        if self.scale is not None and not self.scale > 0:
            raise InputError(f"declaration: scale is {self.scale}, a number above 0 was expected")

    @property
    def given(self) -> Format:
        """The format of queries, keys and values."""
        return FORMATS[self.dtype]

    def factor(self, width: int) -> float:
        """The factor of scores for heads of a width."""
        return float(width**-0.5) if self.scale is None else self.scale

    def first(self, length: int) -> int:
        """The first position that the query of a sequence sees."""
        return 0 if self.window is None else max(0, length - self.window)
