# SPDX-License-Identifier: Apache-2.0
"""Counts and reports of the GPU benchmark: bytes, operations, shares of the ceilings, the table, the JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from refmoe.checkpoints.size import active_parameters, total_parameters
from refmoe.spec.config import Config


@dataclass(frozen=True)
class Result:
    """One measurement.   share: of its ceiling, measured in the same run   goal: of the share, else of the value"""

    name: str
    value: float | None
    unit: str
    share: float | None = None
    goal: float | None = None
    note: str = ""


def decode_bytes(config: Config, past: int, weight_size: int = 2, cache_size: int = 4) -> int:
    """Bytes that a step on one token must read: each weight that it uses, one embedding row, keys and values."""
    weights = active_parameters(config) - (config.vocab - 1) * config.dim
    return weights * weight_size + past * config.layers * 2 * config.kv_heads * config.head_dim * cache_size


def prefill_operations(config: Config, tokens: int) -> int:
    """Multiplications and additions of a prompt: every product with a weight, and causal attention."""
    weights = active_parameters(config) - config.vocab * config.dim - (2 * config.layers + 1) * config.dim
    pairs = tokens * (tokens + 1) // 2
    return 2 * tokens * weights + 4 * config.layers * config.heads * config.head_dim * pairs


def gather_bytes(tokens: int, k: int, columns: int, size: int) -> int:
    """Bytes of a gather: every row is read and written once per slot, and its index is read."""
    return tokens * k * (2 * columns * size + 4)


def combine_bytes(tokens: int, k: int, columns: int, size: int) -> int:
    """Bytes of a combine: every output is read once, a row per token is written; positions and weights are read."""
    return tokens * ((k + 1) * columns * size + k * 8)


def layers_that_fit(config: Config, free: int, weight_size: int = 2, reserve: int = 10 << 30) -> int:
    """How many layers fit in memory with the embedding and the head. reserve: bytes to leave free"""
    head = 2 * config.vocab * config.dim + config.dim
    layer = (total_parameters(config) - head) // config.layers
    return max(0, min(config.layers, (free - reserve - head * weight_size) // (layer * weight_size)))


def met(result: Result) -> bool | None:
    """Whether the goal is reached; None where there is none or nothing was measured."""
    reached = result.value if result.share is None else result.share
    return None if result.goal is None or reached is None else reached >= result.goal


def table(results: Sequence[Result]) -> str:
    """One line per result, in columns."""
    rows = [("measurement", "value", "share", "goal", "")]
    for result in results:
        share = result.share is not None
        goal = "" if result.goal is None else f"{result.goal:.0%}" if share else f"{result.goal:g}"
        verdict = {True: "reached", False: "MISSED", None: ""}[met(result)]
        rows.append(
            (
                result.name,
                "not measured" if result.value is None else f"{result.value:,.4g} {result.unit}".rstrip(),
                f"{result.share:.1%}" if result.share is not None else "",
                goal,
                "; ".join(part for part in (verdict, result.note) if part),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]).rstrip()
        for row in rows
    )


def write(path: Path | None, facts: dict[str, Any], results: Sequence[Result]) -> None:
    """Write the results so far, so that an interrupted run leaves them."""
    if path is None:
        return
    found = {**facts, "results": [asdict(result) | {"met": met(result)} for result in results]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
