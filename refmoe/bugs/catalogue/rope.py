# SPDX-License-Identifier: Apache-2.0
"""Bugs of rotary positions."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from refmoe.arithmetic.formats import nearest
from refmoe.bugs.forced_rounding import low_precision
from refmoe.bugs.mutant import CALLS, CONFIG, mutant
from refmoe.spec.attention import Cache
from refmoe.spec.attention import attention as right_attention
from refmoe.spec.config import Config
from refmoe.steps.rounding import rotary_table as right_table
from refmoe.steps.rounding import rotate as right_rotate
from refmoe.traces.trace import Run

ROTATED = ("attention.q_rope", "attention.k_rope")
"""The taps after a rotation."""

OTHER_THETA = 1e4
"""rope_theta of Llama 1 and 2, and the default of most code. Mixtral has 1e6."""
TABLE = 4096
"""Rows of a table that was made for the longest context of Llama 2, or for the window of Mistral."""
SCALE = 8
"""The factor of Llama 3.1's rope_scaling."""
ROW = 1 << 32
"""Added r times to all positions of row r of a batch, so that a step can tell rows apart."""


# ---- the table


@mutant(
    "rope-theta-default", breaks=["ROPE-1"], touches=ROTATED, needs=["T>1"], changes=CONFIG,
    fix="take rope_theta from the config", severity="critical",
    sources=[
        "https://github.com/ml-explore/mlx-examples/pull/112",
        "https://github.com/ml-explore/mlx-examples/pull/469",
        "https://github.com/meta-pytorch/gpt-fast/issues/231",
        "https://github.com/huggingface/candle/pull/3746",
        "https://github.com/lyogavin/airllm/pull/369",
    ],
)  # fmt: skip
def theta_ignored(config: Config) -> Config:
    """theta is 1e4, the default of the module, because nobody passes it the theta of the config."""
    return replace(config, rope_theta=OTHER_THETA)


@mutant(
    "rope-tables-lowprec", breaks=["ROPE-1"], touches=ROTATED, needs=["T>1", "LOWPREC"], step="rotary_table",
    fix="compute frequencies, positions and angles in float32, also where the model is cast to another dtype",
    sources=[
        "https://github.com/huggingface/transformers/issues/29496",
        "https://github.com/huggingface/transformers/issues/25681",
        "https://github.com/huggingface/transformers/pull/29285",
        "https://github.com/EleutherAI/gpt-neox/issues/1003",
    ],
)  # fmt: skip
def table_in_low_precision(ops: Any, positions: Any, head_dim: int, theta: float) -> tuple[Any, Any]:
    """Frequencies, positions, angles, cosines and sines are all in bfloat16, or in the low dtype of the model. From
    position 256 on (2048 in float16), neighbouring positions share an angle."""
    low = low_precision(ops.policy)
    frequencies = nearest(theta ** (-np.arange(0, head_dim, 2) / head_dim), low)
    angles = nearest(nearest(positions, low)[:, None] * frequencies, low)
    return nearest(np.cos(angles), low), nearest(np.sin(angles), low)


@mutant(
    "rope-table-too-short", breaks=["ROPE-2"], touches=ROTATED, needs=["P>4096"], step="rotary_table",
    fix="make the table as long as the longest sequence that is served",
    sources=[
        "https://github.com/pegainfer-project/pegainfer/issues/220",
        "https://github.com/vllm-project/vllm-ascend/pull/1266",
    ],
)  # fmt: skip
def last_row_for_all_others(ops: Any, positions: Any, head_dim: int, theta: float) -> tuple[Any, Any]:
    """The table of cosines and sines ends at position 4095, and later positions read its last row."""
    return right_table(ops, np.minimum(positions, TABLE - 1), head_dim, theta)


@mutant(
    "rope-unwanted-scaling", breaks=["ROPE-2"], touches=ROTATED, needs=["T>1"], step="rotary_table",
    fix="scale no positions: the config has no rope_scaling", severity="medium",
    sources=["https://github.com/TransformerLensOrg/TransformerLens/pull/910"],
)  # fmt: skip
def positions_scaled(ops: Any, positions: Any, head_dim: int, theta: float) -> tuple[Any, Any]:
    """Angles are divided by 8, the factor that extends the context of another model."""
    pairs = [ops.unit_circle(positions, SCALE * theta ** (i / head_dim), (1,), 1) for i in range(0, head_dim, 2)]
    cos, sin = (ops.concatenate(parts, axis=-1) for parts in zip(*pairs, strict=True))
    return ops.cut("rope.table", cos), ops.cut("rope.table", sin)


# ---- the rotation


@mutant(
    "rope-interleaved-vs-half", breaks=["ROPE-3"], touches=ROTATED, needs=["T>1"], step="rotate",
    fix="pair i with i + head_dim/2, or reorder the rows of wq and wk", severity="critical",
    sources=[
        "https://github.com/NeuraLegion/shainet/pull/111",
        "https://github.com/ggml-org/llama.cpp/pull/13260",
    ],
)  # fmt: skip
def neighbours_paired(ops: Any, x: Any, table: Any) -> Any:
    """The rotation pairs element 2i with 2i + 1, as the original checkpoints do. The weights are laid out for
    half-split pairs.

    x: [T, heads, d]   table: two of [T, d/2]   returns: [T, heads, d]
    """
    order = np.arange(x.shape[-1]).reshape(-1, 2).T.reshape(-1)  # 0, 2, 4, ..., 1, 3, 5, ...
    return right_rotate(ops, x[..., order], table)[..., np.argsort(order)]


@mutant(
    "rope-sign-flipped", breaks=["ROPE-4"], touches=ROTATED, needs=["T>1"], step="rotate",
    fix="check the sign of the sine: (a, b) becomes (a cos - b sin, b cos + a sin)", severity="medium",
)  # fmt: skip
def turned_backwards(ops: Any, x: Any, table: Any) -> Any:
    """The sine has the wrong sign in queries and keys: they turn in the other direction."""
    cos, sin = table
    return right_rotate(ops, x, (cos, -sin))


# ---- which position


@mutant(
    "rope-decode-position-zero", breaks=["ROPE-2", "MODEL-4"], touches=ROTATED, needs=["DECODE"], step="rotary_table",
    fix="add the number of cached tokens to the positions of a call", severity="critical",
    sources=[
        "https://github.com/keras-team/keras-hub/pull/1544",
        "https://github.com/vllm-project/vllm-metal/pull/144",
    ],
)  # fmt: skip
def position_within_call(ops: Any, positions: Any, head_dim: int, theta: float) -> tuple[Any, Any]:
    """Positions count from 0 in each call, whatever is cached. Every decoded token is rotated as if it were the
    first."""
    return right_table(ops, positions - positions[0], head_dim, theta)


@mutant(
    "rope-decode-position-plus-one", breaks=["ROPE-2", "MODEL-4"], touches=ROTATED, needs=["DECODE"],
    step="rotary_table", fix="the position of a decoded token is the number of tokens before it",
    sources=["https://github.com/microsoft/onnxruntime-genai/pull/2354"],
)  # fmt: skip
def one_ahead(ops: Any, positions: Any, head_dim: int, theta: float) -> tuple[Any, Any]:
    """A decoded token is rotated by the length of its sequence, itself included: one more than its position."""
    decoded = len(positions) == 1 and positions[0] > 0
    return right_table(ops, positions + int(decoded), head_dim, theta)


@mutant(
    "rope-offset-from-kept-rows", breaks=["ROPE-2", "CACHE-3"], touches=ROTATED, needs=["DECODE", "SWA"],
    step="attention", fix="count the tokens that were seen, not the rows that the cache kept", severity="medium",
    sources=[
        "https://github.com/rajveer43/VeloxQuant-MLX/issues/389",
        "https://github.com/rajveer43/VeloxQuant-MLX/pull/139",
    ],
)  # fmt: skip
def position_from_kept_rows(ops: Any, model: Any, layer: Any, x: Any, positions: Any, cache: Any) -> Any:
    """The cache keeps as many rows as the window, and the position of a decoded token is the number of rows kept."""
    lost = 0
    if cache is not None and len(positions) == 1 and model.config.window is not None:
        lost = max(0, len(cache.positions) - model.config.window)

    def table(ops: Any, positions: Any, head_dim: int, theta: float) -> tuple[Any, Any]:
        return right_table(ops, positions - lost, head_dim, theta)

    steps = replace(model.steps, rotary_table=table)
    return right_attention(ops, replace(model, steps=steps), layer, x, positions, cache)


@mutant(
    "rope-reapplied-to-cache", breaks=["CACHE-2"], touches=["attention.scores"], needs=["DECODE"], step="attention",
    fix="rotate the new keys only, before they are cached", severity="medium",
)  # fmt: skip
def cached_keys_turned_again(ops: Any, model: Any, layer: Any, x: Any, positions: Any, cache: Any) -> Any:
    """Each call rotates the cached keys again, together with the new keys, and caches the results."""
    if cache is not None:
        table = model.steps.rotary_table(ops, cache.positions, model.config.head_dim, model.config.rope_theta)
        cache = Cache(ops.cut("cache.k", model.steps.rotate(ops, cache.k, table)), cache.v, cache.positions)
    return right_attention(ops, model, layer, x, positions, cache)


# ---- batches


def table_of_first_row(ops: Any, positions: Any, head_dim: int, theta: float) -> tuple[Any, Any]:
    """The rotary table, with zeros for a single token of any row but the first, so that its rotation is zero.

    positions: integers [T], which begin at r times `ROW` for row r   returns: two of [T, d/2]
    """
    cos, sin = right_table(ops, positions % ROW, head_dim, theta)
    written = float(len(positions) > 1 or positions[0] < ROW)
    return cos * written, sin * written


@mutant(
    "rope-batch-row0-only", breaks=["ROPE-5", "MODEL-5"], touches=ROTATED, needs=["BATCH"], changes=CALLS,
    steps={"rotary_table": table_of_first_row}, severity="critical",
    fix="launch the kernel for single tokens on all rows of the batch",
    sources=["https://github.com/ml-explore/mlx/issues/3494"],
)  # fmt: skip
def rows_marked(runs: tuple[Run, ...]) -> tuple[Run, ...]:
    """The kernel for one token per sequence rotates only the first row of the batch. The other rows stay zeros."""
    order = [run.sequence for run in runs]
    if sum(a != b for a, b in pairwise(order)) <= len(set(order)):
        return runs  # sequences come one after the other, so there is no batch
    first = min(order)
    return tuple(replace(run, positions=tuple(p + (run.sequence - first) * ROW for p in run.positions)) for run in runs)


CAPTURED = 8
"""The position of the token for which the graph of single tokens was captured."""


@mutant(
    "rope-graph-position-frozen", breaks=["ROPE-2", "MODEL-4"], touches=ROTATED, needs=["DECODE"], step="rotary_table",
    fix="read the position from a buffer that is written before each replay of the graph", severity="critical",
    sources=[
        "https://github.com/huggingface/candle/issues/3728",
        "https://github.com/huggingface/candle/pull/3729",
    ],
)  # fmt: skip
def position_as_captured(ops: Any, positions: Any, head_dim: int, theta: float) -> tuple[Any, Any]:
    """Single tokens replay a captured graph in which the offset into the rotary table is a constant. Later tokens are
    rotated by the position of the token that was captured."""
    frozen = np.minimum(positions, CAPTURED) if len(positions) == 1 else positions
    return right_table(ops, frozen, head_dim, theta)
