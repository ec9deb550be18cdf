# SPDX-License-Identifier: Apache-2.0
"""Statistics of a routing: the load of the experts, its evenness, and the dropped slots."""

from __future__ import annotations

from dataclasses import dataclass

from refmoe.arithmetic.arrays import Array, ArrayOps
from refmoe.routers.literature.record import Routing


@dataclass(frozen=True)
class LoadStatistics:
    """The load of one routing. Counts are of slots; in a slot one token asks for one expert."""

    asked: tuple[int, ...]
    """[E]: slots that ask for each expert."""
    kept: tuple[int, ...]
    """[E]: slots that each expert computes."""
    entropy: Array
    """Entropy of the asked slots over the experts, in nats: log E when even, 0 when all ask for one expert."""
    variation: Array
    """Coefficient of variation of the asked slots: 0 when even, sqrt(E - 1) when all ask for one expert."""
    drop_rate: Array
    """The part of the asked slots that is not kept."""
    uncomputed: int
    """Tokens without a single kept slot: the layer adds nothing to them."""


def load_statistics(ops: ArrayOps, routing: Routing) -> LoadStatistics:
    """Count the slots that ask for each expert, and those that it computes.

    LOAD-1  Load counts the asked slots, before capacity takes effect; kept <= asked, and kept <= the capacity.
    LOAD-2  entropy = -sum of p_e log p_e over the experts with load, p_e = asked_e / sum of asked.
    LOAD-3  variation = standard deviation over mean of the E loads, the deviation that of the population:
            sqrt(E * sum of asked_e^2 - n^2) / n with n = sum of asked, the integers exact.
    LOAD-4  drop rate = (asked - kept) / asked, of the sums.

    A routing without asked slots has entropy, variation and drop rate 0.
    """
    asked, kept = (
        tuple(ops.group(routing.ids[mask], routing.experts)[1]) for mask in (routing.asked, routing.kept)
    )  # fmt: skip
    total = sum(asked)
    uncomputed = sum(not any(row) for row in routing.kept.tolist())
    if not total:
        zero = ops.array(0.0)
        return LoadStatistics(
            asked=asked, kept=kept, entropy=zero, variation=zero, drop_rate=zero, uncomputed=uncomputed
        )
    share = ops.array([count for count in asked if count]) / total
    entropy = 0 - ops.sum(share * ops.log(share), axis=0)
    spread = len(asked) * sum(count * count for count in asked) - total * total
    variation = ops.sqrt(ops.array(spread)) / total
    return LoadStatistics(
        asked=asked,
        kept=kept,
        entropy=entropy,
        variation=variation,
        drop_rate=ops.array(total - sum(kept)) / total,
        uncomputed=uncomputed,
    )
