# SPDX-License-Identifier: Apache-2.0
"""Mixtral spread over devices: tensor parallel and expert parallel, simulated rank by rank in one process.

Ranks are plain data, and a collective is a sum or a concatenation over a list of ranks. A sharded model is a `Model`
like any other, so that everything that runs the specification runs it. Read `layout`, then `parameters`, then `steps`.
The clauses SHARD-1 to SHARD-12 are stated there.

Sharding changes no clause of `refmoe.spec`, only the order of summation. A sum that is split over ranks (SHARD-6) is
the sum of the ranks' rounded sums. Let these be rounded to nearest and added in the order of ranks. Then an output
differs from that of one device by at most (TP + 1) u A. Here u is the unit roundoff, and A is the sum of the magnitudes
of its terms. Every tap before the first such sum has the same bits as on one device.

Shoeybi et al. 2019, "Megatron-LM" (tensor parallel); Lepikhin et al. 2020, "GShard" (expert parallel).
"""

from refmoe.steps.sharded.layout import Layout, block, layouts
from refmoe.steps.sharded.parameters import shard

__all__ = ["Layout", "block", "layouts", "shard"]
