# SPDX-License-Identifier: Apache-2.0
"""The model that a server is asked about.

Servers load it as it is: its heads have dim / heads = 32 columns, which vLLM, mlx-lm and flash attention take, and its
dimensions are multiples of 32. Every weight is exact in bfloat16, so that a server may compute in any dtype.

Its routers are clear. A token belongs to one of four groups, by a column of the embedding. The router of each layer
reads these columns, and so chooses the pair of experts of the token's group, by a margin that no rounding bridges. The
order within the pair, the weights of the two and everything else stay open.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from refmoe.spec.config import Config
from refmoe.suite import Case

NAME = "served"
CONFIG = Config(
    dim=192, layers=2, heads=6, kv_heads=2, head_dim=32, hidden_dim=64, vocab=101, experts=8, experts_per_token=2,
    rope_theta=50000.0,
)  # fmt: skip
SEED = 18
GROUPS = CONFIG.experts // CONFIG.experts_per_token
SMALL = -10
"""The power of two of the embedding. It is small, so that the first norm shows its epsilon."""
MARK, WEIGHTS = 2.0, (2.0, 4.0)
"""The embedding's entry in the column of a token's group, and the entry of each layer's router there."""
FAINT = -13
"""The power of two of the router's other entries. They tell the two experts of a pair apart."""


def edits() -> list[dict[str, Any]]:
    """The changes to the weights of the formula, which make the routers clear."""
    marks = [
        [token, group, MARK if group == token % GROUPS else 0.0]
        for token in range(CONFIG.vocab)
        for group in range(GROUPS)
    ]
    found: list[dict[str, Any]] = [
        {"parameter": "embedding", "exponent": SMALL},
        {"parameter": "embedding", "entries": marks},
        {"parameter": "layers.*.router.gate", "exponent": FAINT},
        {"parameter": "layers.*.moe_norm", "columns": [0, GROUPS], "value": 1.0},
    ]
    for group in range(GROUPS):  # no layer writes into these columns
        found += [{"parameter": name, "row": group, "value": 0.0} for name in ("layers.*.attention.wo", "layers.*.w2")]
    for layer in range(CONFIG.layers):
        # each layer has other experts for a group
        pairs = [(expert, (expert // CONFIG.experts_per_token + layer) % GROUPS) for expert in range(CONFIG.experts)]
        entries = [[expert, group, WEIGHTS[layer]] for expert, group in pairs]
        found.append({"parameter": f"layers.{layer}.router.gate", "entries": entries})
    return found


def digest() -> str:
    """The SHA-256 of all that defines the model."""
    defined = {"config": asdict(CONFIG), "seed": SEED, "edits": edits()}
    return hashlib.sha256(json.dumps(defined, sort_keys=True).encode()).hexdigest()


def served_case() -> Case:
    """The model, as a case without calls: what a server is asked depends on what it answers.

    Its digest is that of its definition, as it has no file.
    """
    return Case(
        folder=Path(NAME), why=__doc__ or "", clauses=(), bugs=(), conditions=(), config=CONFIG, seed=SEED, calls=(),
        edits=tuple(edits()), digest=digest(),
    )  # fmt: skip
