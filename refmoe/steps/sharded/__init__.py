"""How Mixtral is spread over devices: tensor parallel and expert parallel, simulated rank by rank in one process.

Ranks are plain data, a collective is a sum or a concatenation over a list of them, and a model that is sharded is a
`Model` like any other: everything that runs the specification runs it. Read `layout`, then `parameters`, then `steps`;
the clauses SHARD-1 to SHARD-12 are stated there.

Sharding changes no clause of `refmoe.spec`, only the order of summation: where a sum is split over ranks (SHARD-6),
its value is the sum of the ranks' rounded sums. With partial sums rounded to nearest, added in the order of ranks, an
output differs from that of one device by at most (TP + 1) u A, u the unit roundoff and A the sum of the magnitudes of
its terms; every tap before the first such sum is the same bit for bit.

Shoeybi et al. 2019, "Megatron-LM" (tensor parallel); Lepikhin et al. 2020, "GShard" (expert parallel).
"""

from refmoe.steps.sharded.layout import Layout, block, layouts
from refmoe.steps.sharded.parameters import shard

__all__ = ["Layout", "block", "layouts", "shard"]
