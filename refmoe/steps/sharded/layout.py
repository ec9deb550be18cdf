# SPDX-License-Identifier: Apache-2.0
"""The layout of ranks and groups, and the heads, experts and blocks that each one holds. Integers only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from refmoe.errors import InputError
from refmoe.spec.config import Config

TENSOR_DEGREES = (1, 2, 3, 4, 6, 8)
"""The degrees of tensor parallelism that `layouts` tries. They divide the heads of small and of real models."""


def block(count: int, holders: int, holder: int) -> range:
    """The block of `count` things that one of several holders has.

    SHARD-2  Block r of n things over p holders is r n // p up to, not including, (r + 1) n // p: blocks are contiguous
             and in order, and their sizes differ by at most one.
    """
    return range(holder * count // holders, (holder + 1) * count // holders)


@dataclass(frozen=True)
class Layout:
    """The number of devices, and the role of each.

    SHARD-1  There are EP groups of TP ranks. Rank r of every group holds part r of what is split over ranks, group g
             holds block g of the experts. The gains of the norms and the router matrix are on every rank.
    """

    tensor: int
    """TP: the ranks of a group. Attention, each expert and the vocabulary are split over them."""
    expert: int
    """EP: the groups. Experts and tokens are split over them."""

    def __str__(self) -> str:
        return f"TP {self.tensor}, EP {self.expert}"

    def query_heads(self, config: Config, rank: int) -> range:
        """SHARD-3  A rank holds its block of the query heads. TP divides H, so that all ranks hold equally many."""
        return block(config.heads, self.tensor, rank)

    def kv_heads(self, config: Config, rank: int) -> range:
        """The key/value heads that a rank holds, copies included.

        SHARD-4  They are those that its query heads read (ATTN-1). Where TP <= K, TP divides K and this is its block
                 of K / TP. Where TP > K, K divides TP and it is one head, r K // TP: TP / K consecutive ranks hold a
                 copy each. (Not r mod K: neighbours share a head, as neighbouring query heads do.)
        """
        return range(rank * config.kv_heads // self.tensor, ((rank + 1) * config.kv_heads - 1) // self.tensor + 1)

    def obstacle(self, config: Config) -> str:
        """The reason why a model does not fit this layout, in words; empty if it fits."""
        if min(self.tensor, self.expert) < 1:
            return f"{self}: at least one rank and one group are needed"
        if config.heads % self.tensor:
            return f"TP = {self.tensor} does not divide heads = {config.heads}"
        if config.kv_heads % self.tensor and self.tensor % config.kv_heads:
            return f"neither of TP = {self.tensor} and kv_heads = {config.kv_heads} divides the other"
        if self.tensor > min(config.hidden_dim, config.vocab):
            return f"TP = {self.tensor} leaves ranks without a part of hidden_dim or vocab"
        if self.expert > config.experts:
            return f"EP = {self.expert} leaves groups without an expert, as there are {config.experts}"
        return ""

    def check(self, config: Config) -> None:
        """Raises InputError when a model does not fit."""
        if reason := self.obstacle(config):
            raise InputError(reason)


def layouts(config: Config, tensor: Iterable[int] = TENSOR_DEGREES) -> Iterator[Layout]:
    """The layouts that a model fits, with these degrees of tensor parallelism and 1, 2 or E groups."""
    for ranks in tensor:
        for groups in sorted({1, 2, config.experts}):
            if not (layout := Layout(ranks, groups)).obstacle(config):
                yield layout
