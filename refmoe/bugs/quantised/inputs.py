# SPDX-License-Identifier: Apache-2.0
"""Bugs that make wrong codes of the input of a product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from refmoe.arithmetic.codes import Codes, InputFormat
from refmoe.arithmetic.formats import FLOAT32, nearest
from refmoe.bugs.mutant import POLICY
from refmoe.bugs.quantised.bug import register
from refmoe.checkpoints.ggml_blocks import FORMATS
from refmoe.profiles.policy import Policy

BLOCKS = (*FORMATS,)
K = ("Q4_K", "Q5_K", "Q6_K")
SUMMED = ("Q4_1", "Q5_1")
TOKENS = ("int8-channel", "int8-tensor")
ALL = (*BLOCKS, *TOKENS)

MOST = 127
"""The largest code: these bugs are of integers of eight bits."""

Change = Callable[[Codes, Any], Codes]
"""From the right codes of rows, and the rows [t, n], to the wrong ones."""


@dataclass(frozen=True)
class WrongCodes(InputFormat):
    """A format whose codes a bug changes."""

    change: Change | None = None

    @np.errstate(all="ignore")
    def quantised(self, x: Any) -> Codes:
        right = super().quantised(x)
        return right if self.change is None else self.change(right, np.asarray(x, np.float64))


def input_bug(id: str, kind: str = "int8", **facts: Any) -> Callable[[Change], Change]:
    """Decorates a function that makes wrong codes.   kind: of the codes"""

    def decorate(change: Change) -> Change:
        def wrong(how: Any) -> Any:
            if not isinstance(how, InputFormat) or how.kind != kind:
                return how
            return WrongCodes(**{each.name: getattr(how, each.name) for each in fields(InputFormat)}, change=change)

        def function(policy: Policy) -> Policy:
            named = {name: wrong(how) if name in facts["formats"] else how for name, how in policy.inputs.items()}
            return replace(policy, inputs=named)

        register(id, POLICY, function, change.__doc__ or "", **facts)
        return change

    return decorate


def spread(scales: Any, codes: Codes) -> Any:
    """Numbers of blocks for each value: [t, blocks] to [t, n]"""
    return np.repeat(scales, codes.width, axis=1)


def with_scales(right: Codes, x: Any, scales: Any) -> Codes:
    """Codes made with other scales.   scales: [t, blocks]"""
    over = np.divide(x, spread(scales, right), out=np.zeros(x.shape), where=spread(scales, right) != 0)
    codes = np.rint(over).clip(-MOST, MOST)
    return replace(right, codes=codes, scales=scales, unrounded=scales, ideal=np.where(np.abs(over) < MOST, over, MOST))


def powers_of_two(scales: Any, rounded: Callable[[Any], Any]) -> Any:
    """Positive scales as powers of two, and others as 0.   rounded: gives integers for the logarithms"""
    return np.where(scales > 0, 2.0 ** rounded(np.log2(scales)), 0.0)


def of_the_token_before(codes: Codes) -> Codes:
    """Codes with the scales of the token before. The first token keeps its own."""
    scales, unrounded = (np.concatenate([part[:1], part[:-1]]) for part in (codes.scales, codes.unrounded))
    return replace(codes, scales=scales, unrounded=unrounded)


# ---- codes


@input_bug(
    "quantised-input-truncated", formats=ALL, fix="round to nearest before the conversion to an integer",
    sources=["sgl-project/sglang-jax/pull/1598", "ROCm/aiter/pull/4637"],
)  # fmt: skip
def truncated(right: Codes, x: Any) -> Codes:
    """The input over its scale is cut off to an integer, and not rounded."""
    ideal = right.ideal * (1 + 2.0**-40)  # the largest value of a block is MOST, not less
    size = np.abs(ideal)
    # a value next to an integer may become either one; half a unit further in, the boundaries are those of rounding
    doubtful = np.where(size < MOST, np.copysign(np.maximum(size - 0.5, 0.0), ideal), ideal)
    return replace(right, codes=np.trunc(ideal), ideal=doubtful)


@input_bug(
    "quantised-input-128-wraps", formats=ALL, fix="clamp to 127 before the conversion to int8, or scale by 127",
    sources=["uxlfoundation/oneDNN/pull/5879"],
)  # fmt: skip
def wraps(right: Codes, x: Any) -> Codes:
    """The largest value of a block becomes 128, which an integer of eight bits takes for -128."""
    scales = right.unrounded * (MOST / (MOST + 1))
    over = np.divide(x, spread(scales, right), out=np.zeros(x.shape), where=spread(scales, right) != 0)
    codes = np.rint(over)
    stored, wrapped = nearest(scales, right.how.scale), np.where(codes > MOST, -MOST - 1, codes)
    return replace(right, codes=wrapped, scales=stored, unrounded=scales, ideal=over)


@input_bug(
    "quantised-input-offset-not-compensated", formats=("Q8_0", *TOKENS),
    fix="subtract 128 times the sum of the weights from each result",
    sources=["uxlfoundation/oneDNN/pull/5115"],
)  # fmt: skip
def not_compensated(right: Codes, x: Any) -> Codes:
    """Codes are made unsigned by adding 128, and the sum of weights that this adds is not subtracted."""
    return replace(right, codes=right.codes + (MOST + 1), ideal=right.ideal + (MOST + 1))


@input_bug(
    "quantised-input-last-term-dropped", formats=ALL, fix="run the loop over the inputs to the last one",
    sources=["ml-explore/mlx/pull/3445", "1bit-MONSTER/1bit-MONSTER/issues/301"],
)  # fmt: skip
def last_term_dropped(right: Codes, x: Any) -> Codes:
    """The last input of a row is not multiplied."""
    return without(right, np.arange(x.shape[1]) == x.shape[1] - 1)


@input_bug(
    "quantised-input-last-block-dropped", formats=ALL, fix="round the number of blocks up",
    sources=["1bit-MONSTER/1bit-MONSTER/issues/301", "ml-explore/mlx/pull/3445"],
)  # fmt: skip
def last_block_dropped(right: Codes, x: Any) -> Codes:
    """The last 32 inputs of a row are not multiplied."""
    return without(right, np.arange(x.shape[1]) >= x.shape[1] - 32)


def without(right: Codes, dropped: Any) -> Codes:
    """Codes of which some are zero.   dropped: booleans [n]"""
    return replace(right, codes=np.where(dropped, 0.0, right.codes), ideal=np.where(dropped, 0.0, right.ideal))


# ---- scales


@input_bug(
    "quantised-input-one-scale-for-all-tokens", formats=ALL, fix="take the largest value of each token by itself",
    sources=["pytorch/executorch/pull/22432", "vllm-project/compressed-tensors/pull/106"],
)  # fmt: skip
def one_scale_for_all_tokens(right: Codes, x: Any) -> Codes:
    """All tokens of a call share the scale of the largest value among them."""
    most = np.abs(right.scales).max()
    return with_scales(right, x, np.full_like(right.scales, most))


@input_bug(
    "quantised-input-scale-of-the-token-before", formats=ALL, fix="address the scales by their own row stride",
    sources=["sgl-project/sglang/pull/36237", "ROCm/composable_kernel/pull/2391"],
)  # fmt: skip
def scale_of_the_token_before(right: Codes, x: Any) -> Codes:
    """The codes of each token are multiplied by the scales of the token before it."""
    return of_the_token_before(right)


@input_bug(
    "quantised-input-scale-of-the-first-block", formats=("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4"),
    fix="take the largest value of each block by itself", sources=["intel/torch-xpu-ops/pull/5001"],
)  # fmt: skip
def scale_of_the_first_block(right: Codes, x: Any) -> Codes:
    """All blocks of a row are made with the scale of the first block, and larger values are clamped."""
    return with_scales(right, x, np.broadcast_to(right.scales[:, :1], right.scales.shape))


@input_bug(
    "quantised-input-scale-to-power-of-two", formats=TOKENS,
    fix="round the scale before the codes are made with it",
    sources=["sgl-project/sglang/pull/28418", "sgl-project/sglang/pull/26766"],
)  # fmt: skip
def scale_to_power_of_two(right: Codes, x: Any) -> Codes:
    """The scale is rounded up to a power of two after the codes were made with the scale as it was."""
    return replace(right, scales=powers_of_two(right.scales, np.ceil))


@input_bug(
    "quantised-input-scale-rounded-down", formats=(*TOKENS, "Q8_0"),
    fix="round the exponent of the scale up, or take it from the largest value itself",
    sources=["vllm-project/vllm/pull/43557"],
)  # fmt: skip
def scale_rounded_down(right: Codes, x: Any) -> Codes:
    """The scale is rounded down to a power of two, so that the largest values of a block are clamped."""
    made = with_scales(right, x, powers_of_two(right.unrounded, np.floor))
    return replace(made, ideal=made.codes)  # a quotient by a power of two is exact, so that no code is contestable


@input_bug(
    "quantised-input-scale-without-sign", formats=K, fix="keep the sign of the scale of Q8_K",
    sources=["vllm-project/vllm/issues/48905", "Xilinx/brevitas/pull/1308"],
)  # fmt: skip
def scale_without_sign(right: Codes, x: Any) -> Codes:
    """The scale of a block has the sign of its largest value, but is taken for positive."""
    return replace(right, scales=np.abs(right.scales), unrounded=np.abs(right.unrounded))


@dataclass(frozen=True)
class UnscaledSums(Codes):
    """Codes whose sums lack the scale."""

    def sums(self, groups: int) -> Any:
        return self.codes.reshape(len(self.codes), groups, -1).sum(-1)


@input_bug(
    "quantised-input-sum-without-scale", formats=SUMMED, fix="multiply the sum of the codes of a block by its scale",
    sources=["kekzl/imp/pull/722"],
)  # fmt: skip
def sum_without_scale(right: Codes, x: Any) -> Codes:
    """The offset of a block is multiplied by the sum of codes, without their scale."""
    return UnscaledSums(**{each.name: getattr(right, each.name) for each in fields(Codes)})


# ---- no codes at all


def not_quantised(policy: Policy) -> Policy:
    """Inputs are multiplied as they are: no codes are made of them."""
    return replace(policy, inputs={
        name: FLOAT32 if isinstance(how, InputFormat) else how for name, how in policy.inputs.items()
    })  # fmt: skip


register(
    "quantised-input-not-quantised", POLICY, not_quantised, not_quantised.__doc__ or "", formats=ALL,
    fix="make codes of the inputs, as the checkpoint asks for", sources=["vllm-project/vllm/pull/50833"],
)  # fmt: skip
