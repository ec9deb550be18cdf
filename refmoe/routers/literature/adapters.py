# SPDX-License-Identifier: Apache-2.0
"""Every router that decides from logits alone, as a plain function of NumPy arrays.

Each is `logits [T, E] -> (ids [T, k], weights [T, k])`, float64 in and out, with the bits of `ExactOps`. Without a
capacity, a token's result does not depend on the other tokens or their number. With one, a dropped slot keeps its id
and has weight 0. Noise and chance, which only training adds, are left out. Expert choice has no adapter, because a
token's number of experts depends on the other tokens (CHOICE-4).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refmoe.arithmetic.arrays import Array
from refmoe.arithmetic.exact.ops import ExactOps
from refmoe.routers.literature import deepseek_v3 as deepseek
from refmoe.routers.literature import gshard as top_2
from refmoe.routers.literature import mixtral as top_k
from refmoe.routers.literature import noisy_top_k as noisy
from refmoe.routers.literature import st_moe as top_n
from refmoe.routers.literature import switch as top_1
from refmoe.routers.literature.record import Routing

Choice = tuple[Any, Any]
"""Expert ids, integers [T, k], and weights [T, k]."""

OPS: Any = ExactOps()


def _plain(route: Callable[[Array], Routing], logits: Any) -> Choice:
    routing = route(OPS.array(np.asarray(logits)))
    return routing.ids, routing.weights


def mixtral(logits: Any, k: int = 2) -> Choice:
    """ROUTE-2 to ROUTE-4. Falling logits, ties to the lower id, weights that sum to 1."""
    return _plain(lambda x: top_k.mixtral(OPS, x, k), logits)


def noisy_top_k(logits: Any, k: int = 2) -> Choice:
    """NOISY-2 without noise, which equals `mixtral`."""
    quiet = OPS.array(np.zeros(np.shape(logits)))  # not logits * 0, which is NaN where a logit is infinite
    return _plain(lambda x: noisy.noisy_top_k(OPS, x, quiet, quiet, k), logits)


def switch(logits: Any, capacity: int | None = None) -> Choice:
    """SWITCH-1 to SWITCH-3: k = 1, and the weight is the probability, not normalised to 1."""
    return _plain(lambda x: top_1.switch(OPS, x, capacity), logits)


def gshard(logits: Any, capacity: int | None = None) -> Choice:
    """GSHARD-1, GSHARD-2, GSHARD-5, always both experts, as in GLaM: k = 2, weights sum to 1 where none is dropped."""
    return _plain(lambda x: top_2.gshard(OPS, x, capacity), logits)


def st_moe(logits: Any, k: int = 2, capacity: int | None = None) -> Choice:
    """STMOE-1, STMOE-4, always all choices: weights that sum to 1 where none is dropped."""
    return _plain(lambda x: top_n.st_moe(OPS, x, capacity, k=k), logits)


def deepseek_v3(
    logits: Any, k: int = 2, bias: Any = None, groups: int = 1, top_groups: int = 1, scaling: float = 1.0
) -> Choice:
    """DEEPSEEK-1 to DEEPSEEK-5: falling biased sigmoid, weights that sum to `scaling`.

    Adding a constant to the logits changes the result. Logits whose sigmoids round to one float64 are ties: above 37
    all sigmoids are 1.
    """
    given = None if bias is None else OPS.array(bias)
    return _plain(lambda x: deepseek.deepseek_v3(OPS, x, k, given, groups, top_groups, scaling), logits)


ADAPTERS: dict[str, Callable[..., Choice]] = {
    "mixtral": mixtral,
    "noisy-top-k": noisy_top_k,
    "switch": switch,
    "gshard": gshard,
    "st-moe": st_moe,
    "deepseek-v3": deepseek_v3,
}
"""The adapters by the names of `refmoe.routers.literature.family.FAMILY`."""
