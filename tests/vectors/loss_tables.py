# SPDX-License-Identifier: Apache-2.0
"""The hand-made router-logit tables of `golden/vectors/losses.json`.

A table is [layer][sequence][position][expert], written as rows of numbers; a mask is a string for each sequence, "1" a
token and "0" padding.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, NamedTuple

Rows = list[list[Any]]
"""The positions of one sequence in one layer: a list of rows of E numbers."""

CYCLE: Rows = [[3, 1, 0, -1], [-1, 3, 1, 0], [0, -1, 3, 1], [1, 0, -1, 3]]
MIXED: Rows = [[1.5, -0.5, 0.25], [0.125, 2, -1], [-0.75, 0.5, 0.375], [2.5, 0.75, -3]]
FIRST: list[Rows] = [[[2, 1, -1, 0.5], [0.25, 1.75, 3, -2], [-1, 0.5, 0, 1.25]], [[1, -2, 0.75, 1.5]]]
SECOND: list[Rows] = [[[-1, 2, 0.5, 0], [1.25, 0, -0.5, 2.5], [3, -1.5, 0.25, 1]], [[0.5, 2.25, -1, 1.75]]]
PAD: Rows = [[9, -9, 9, -9], [9, 8, -9, -9]]
STAIRS: list[Rows] = [[[4, 0, 1], [0, 2, 1]], [[1, 0, 3], [0, 1, 2]], [[2, 3, 0], [3, 0, 1]]]
STEPS: list[Rows] = [[[0, 1, 5], [1, 0, 2]], [[3, 1, 0], [0, 4, 1]], [[1, 2, 0], [2, 0, 6]]]


class Table(NamedTuple):
    """One vector before its expected value is computed."""

    name: str
    why: str
    layers: list[list[Rows]]
    k: int = 0  # 0: a router z-loss
    mask: list[str] | None = None
    bugs: tuple[str, ...] = ()
    exact: Fraction | None = None  # the value that `why` derives, which the balls must enclose


CONSTANT, REDUCTION = "aux-constant", "aux-wrong-reduction"
PADDING, MASK, TWICE = "aux-includes-padding", "aux-mask-misaligned", "aux-double-softmax"

BALANCING = [
    Table("all-logits-equal", "P is uniform, so the loss is k whatever the ties give: every tie rule agrees.",
          [[[[0, 0, 0, 0]] * 4]], 2, exact=Fraction(2)),
    Table("cyclic-top-1", "Each expert is chosen once and P is uniform by symmetry: perfect balance is k.",
          [[CYCLE]], 1, exact=Fraction(1)),
    Table("cyclic-top-2", "Perfect balance with two choices: 2, where an f that sums to 1 gives 1.",
          [[CYCLE]], 2, exact=Fraction(2)),
    Table("every-expert-chosen", "k = E: each f is 1 and P sums to 1, so the loss is E.",
          [[MIXED]], 3, exact=Fraction(3)),
    Table("collapsed", "All tokens choose one expert: near E, the supremum.",
          [[[[8, 0, 0, 0], [7.5, 0.5, 0, -1], [9, 1, 2, 0]]]], 1, bugs=(CONSTANT, REDUCTION, TWICE)),
    Table("collapsed-top-2", "All tokens choose the same two experts, in either order.",
          [[[[4, 3, 0, 0], [3.5, 4.5, 1, -1], [5, 3, 2, 0]]]], 2, bugs=(CONSTANT, REDUCTION, TWICE)),
    Table("mixed", "An ordinary table, its values by no symmetry.", [[MIXED]], 2, bugs=(CONSTANT, REDUCTION, TWICE)),
    Table("below-k", "Below the balanced value of 1: three tokens barely choose expert 0, one is certain of expert 1.",
          [[[[0.0625, 0], [0.0625, 0], [0.0625, 0], [-8, 0]]]], 1, bugs=(CONSTANT, TWICE)),
    Table("eight-experts-top-1", "Switch's loss, without its alpha.",
          [[[[1, 0, 2, -1, 0.5, 0.25, -2, 0.75], [3, 0, 1, 1.5, -1, 0.5, 2, -0.5], [0, 0.5, 1, -1, 2, 4, -3, 1.5]]]], 1,
          bugs=(CONSTANT, REDUCTION, TWICE)),
    Table("rows-that-sum-to-1", "Logits that look like probabilities are logits all the same: one softmax.",
          [[[[0.5, 0.25, 0.1875, 0.0625], [0.375, 0.5, 0.125, 0]]]], 2, bugs=(CONSTANT, REDUCTION, TWICE)),
    Table("large-logits", "exp(1000) overflows every format unless the largest is subtracted.",
          [[[[1000, 999, 0], [-1000, -998, -999]]]], 1, bugs=(CONSTANT, TWICE)),
    Table("tie-at-rank-k", "The k-th place is a tie, which the lower id takes (ROUTE-3).",
          [[[[1, 1, 0], [2, 2, 2], [0, 1, 3]]]], 1, bugs=(CONSTANT, REDUCTION, TWICE)),
    Table("layers-pooled", "Each layer collapses onto another expert: as a pool, 1; the layers' mean is near 2.",
          [[[[6, 0], [6, 0]]], [[[0, 6], [0, 6]]]], 1, exact=Fraction(1)),
    Table("layers-mixed", "Two layers of four tokens.",
          [[FIRST[0] + FIRST[1]], [SECOND[0] + SECOND[1]]], 2, bugs=(CONSTANT, TWICE)),
    Table("layers-mixed-padded", "The tokens of layers-mixed as two sequences, the second one padded: equal value.",
          [[FIRST[0], FIRST[1] + PAD], [SECOND[0], SECOND[1] + PAD]], k=2, mask=["111", "100"],
          bugs=(CONSTANT, PADDING, MASK, TWICE)),
    Table("layers-mixed-padded-left", "The same, the padding on the left: equal value again.",
          [[FIRST[0], PAD + FIRST[1]], [SECOND[0], PAD + SECOND[1]]], k=2, mask=["111", "001"],
          bugs=(CONSTANT, PADDING, MASK, TWICE)),
    Table("mask-layout", "Three sequences of two, two layers: a mask repeated or transposed the wrong way hits others.",
          [STAIRS, STEPS], k=1, mask=["11", "10", "01"], bugs=(CONSTANT, REDUCTION, PADDING, MASK, TWICE)),
]  # fmt: skip

Z_LOSS = [
    Table("z-equal-logits", "(c + log E)^2 for c = 0 and c = -1.", [[[[0, 0, 0, 0], [-1, -1, -1, -1]]]]),
    Table("z-one-expert", "With one expert log-sum-exp is the logit: the mean of 9 and 1.",
          [[[[3], [-1]]]], exact=Fraction(5)),
    Table("z-minimum", "One expert at logit 0: its exponential is 1, the least loss.", [[[[0]]]], exact=Fraction(0)),
    Table("z-opposite-signs", "The mean of the squares, not the square of the mean, which is 0.",
          [[[[2], [-2]]]], exact=Fraction(4)),
    Table("z-mixed", "An ordinary table.", [[MIXED]]),
    Table("z-mixed-shifted", "z-mixed with 1 added to every logit: another loss, for the same probabilities.",
          [[[[value + 1 for value in row] for row in MIXED]]]),
    Table("z-large", "exp(1000) overflows every format.", [[[[1000, 999.5, -1000]]]]),
    Table("z-small", "exp(-1000) is 0 in binary64, whose logarithm is -inf.", [[[[-1000, -1000.25, -1001]]]]),
    Table("z-padded", "Padding with large logits that count nowhere.",
          [[FIRST[0], FIRST[1] + PAD]], mask=["111", "100"]),
]  # fmt: skip
