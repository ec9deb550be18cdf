# SPDX-License-Identifier: Apache-2.0
"""The parameters that each rank holds: slices, read when they are used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refmoe.checkpoints.weight import Weight
from refmoe.spec.config import Config
from refmoe.spec.experts import Expert
from refmoe.spec.model import Layer, Model, Parameters
from refmoe.steps.rounding import CUT_STEPS
from refmoe.steps.sharded.layout import Layout, block
from refmoe.steps.sharded.steps import sharded


@dataclass(frozen=True)
class AttentionRank:
    """The part of one layer's attention on one rank: h of the query heads, j of the key/value heads."""

    heads: range
    kv_heads: range
    wq: Weight  # [h d, D]
    wk: Weight  # [j d, D]
    wv: Weight  # [j d, D]
    wo: Weight  # [D, h d]


@dataclass(frozen=True)
class ExpertGroup:
    """The experts of one layer in one group.

    SHARD-10  The group's expert of local id i has the id first + i everywhere else.
    """

    first: int
    experts: tuple[tuple[Expert, ...], ...]
    """By local id, then by rank. w1, w3: [f, D]   w2: [D, f], f the rank's block of F"""


@dataclass(frozen=True)
class ShardedLayer:
    """One decoder layer over all ranks. It takes the place of `Layer`."""

    attention_norm: Any  # [D], on every rank
    attention: tuple[AttentionRank, ...]  # TP of them, the same in every group
    moe_norm: Any  # [D], on every rank
    router: Any  # [E, D], on every rank
    experts: tuple[ExpertGroup, ...]  # EP of them


class SplitTable:
    """A matrix of the vocabulary, with its rows split over the ranks. It takes the place of a `Weight`.

    SHARD-8  Embedding: each rank looks up the tokens whose rows it holds, and answers zeros for the others; the answers
             are added, which is exact. Output: the logits of a rank's own rows, one rank after another (SHARD-5).
    """

    grid, computed, most, read_block = None, False, None, None

    def __init__(self, table: Any, ranks: int) -> None:
        self.blocks = [block(table.shape[0], ranks, rank) for rank in range(ranks)]
        self.parts = [part(table, rows) for rows in self.blocks]
        self.shape, self.dtype = table.shape, table.dtype

    def read(self) -> Any:
        return np.concatenate([each.read() for each in self.parts])

    def rows(self, ids: Any) -> Any:
        """ids: integers [T]   returns: [T, D]"""
        total = np.zeros((len(ids), self.shape[1]), self.dtype)
        for rows, each in zip(self.blocks, self.parts, strict=True):
            mine = (ids >= rows.start) & (ids < rows.stop)
            answer = np.where(mine[:, None], each.rows(np.where(mine, ids - rows.start, 0)), np.zeros_like(total))
            total = total + answer
        return total


def part(weight: Any, rows: Sequence[int] | None = None, columns: Sequence[int] | None = None) -> Weight:
    """Contiguous rows and columns of a matrix; None: all rows, or all columns."""
    down, across = (slice(None) if which is None else slice(which[0], which[-1] + 1) for which in (rows, columns))
    shape = (len(range(weight.shape[0])[down]), len(range(weight.shape[1])[across]))
    origin = f"{weight.origin}, rows {shape[0]} and columns {shape[1]} of it"
    return Weight(
        name=weight.name,
        shape=shape,
        dtype=weight.dtype,
        source=lambda: np.ascontiguousarray(weight.read()[down, across]),
        origin=origin,
    )


def elements(heads: range, head_dim: int) -> range:
    """The rows of a projection that belong to consecutive heads (ATTN-6)."""
    return range(heads.start * head_dim, heads.stop * head_dim)


def attention_rank(config: Config, layer: Layer, heads: range, kv_heads: range) -> AttentionRank:
    """The slices of a rank that holds these heads.

    SHARD-5  Column parallel: wq, wk and wv are split by rows, which are heads; w1 and w3 by rows, which are elements of
             the hidden layer; embedding and output by rows, which are tokens of the vocabulary. A rank computes its own
             outputs whole, and nothing is added.
    SHARD-6  Row parallel: wo is split by columns, which are the same heads; w2 by columns, which are the same elements.
             A rank has a part of the sum of every output, and the output is the sum over ranks (all-reduce).
    """
    query, stored = elements(heads, config.head_dim), elements(kv_heads, config.head_dim)
    return AttentionRank(
        heads=heads,
        kv_heads=kv_heads,
        wq=part(layer.wq, query),
        wk=part(layer.wk, stored),
        wv=part(layer.wv, stored),
        wo=part(layer.wo, columns=query),
    )


def expert_rank(config: Config, expert: Expert, layout: Layout, rank: int) -> Expert:
    """The part of one expert on one rank (SHARD-5, SHARD-6)."""
    mine = block(config.hidden_dim, layout.tensor, rank)
    return Expert(w1=part(expert.w1, mine), w2=part(expert.w2, columns=mine), w3=part(expert.w3, mine))


def shard_layer(config: Config, layer: Layer, layout: Layout) -> ShardedLayer:
    """One decoder layer over the ranks of a layout."""
    ranks = range(layout.tensor)
    attention = tuple(
        attention_rank(config, layer, layout.query_heads(config, rank), layout.kv_heads(config, rank)) for rank in ranks
    )

    def group(ids: range) -> ExpertGroup:
        held = tuple(tuple(expert_rank(config, layer.experts[e], layout, rank) for rank in ranks) for e in ids)
        return ExpertGroup(ids.start, held)

    return ShardedLayer(
        attention_norm=layer.attention_norm,
        attention=attention,
        moe_norm=layer.moe_norm,
        router=layer.router,
        experts=tuple(group(block(config.experts, layout.expert, g)) for g in range(layout.expert)),
    )


def shard(config: Config, parameters: Parameters, layout: Layout) -> Model:
    """The model over the ranks of a layout. Raises InputError when the model does not fit."""
    layout.check(config)
    layers: Any = tuple(shard_layer(config, layer, layout) for layer in parameters.layers)
    embedding, output = (SplitTable(table, layout.tensor) for table in (parameters.embedding, parameters.output))
    return Model(config, Parameters(embedding, layers, parameters.final_norm, output), sharded(CUT_STEPS))
