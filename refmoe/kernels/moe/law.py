# SPDX-License-Identifier: Apache-2.0
"""The contract of mixtures of experts, in which each module of laws registers its own, and the needs they share."""

from __future__ import annotations

from dataclasses import replace

from refmoe.contracts.law import Contract, Example, Need
from refmoe.kernels.moe.declaration import Declaration


def sketch(d: Declaration) -> Declaration:
    """The part of a declaration that its examples depend on: not the layout of arguments."""
    return replace(
        d, weights_dtype=None, ids_dtype="int64", framework="numpy", fused=None, gate_first=True, transposed=False,
        buffer=False, strided=False, batch_invariant=False, deterministic=True, policy=None, accumulation=None,
        expert_map=False,
    )  # fmt: skip


def tokens(example: Example) -> int:
    """The number of tokens of an example."""
    return int(example["sizes"]["tokens"]) if "sizes" in example else 0


CONTRACT = Contract(subject="kernel", shape_law="form", sketch=sketch, tokens=tokens, number=100)
LAWS = CONTRACT.laws
"""All laws by name, in the order of `laws.py`."""
law = CONTRACT.law

IDS = Need("routing by ids and weights", lambda s: s.declaration.routing == "ids")
STRIDED = Need("strided arguments, as declared", lambda s: s.declaration.strided)
