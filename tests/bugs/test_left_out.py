# SPDX-License-Identifier: Apache-2.0
"""Each bug, diagnosed by a catalogue without it, is given no other bug's name, and no other arithmetic.

`python -m bench.diagnosis --leave-one-out` prints the whole table.
"""

from __future__ import annotations

import pytest

from tests.bugs.left_out import DTYPES, TAPS, bugs, leave_out

FAST = (
    ("attn-softmax-lowprec", "float32", "all"), ("prec-combine-lowprec", "float32", "hidden states"),
    ("router-jitter-at-eval", "bfloat16", "all"), ("router-lowprec-logits", "float16", "no expert internals"),
    ("norm-eps-outside-sqrt", "float32", "logits"), ("expert-gelu", "bfloat16", "all"),
    ("load-sanitise-twice", "float32", "hidden states"), ("quant-prefill-path-lower-precision", "float32", "all"),
    ("rope-tables-lowprec", "float16", "all"), ("prec-fp16-ffn-overflow", "float32", "logits"),
    ("expert-rows-of-ranks-exchanged", "bfloat16", "logits"), ("quant-router-quantised", "float16", "logits"),
    ("quant-router-quantised", "bfloat16", "all"), ("router-lowprec-logits", "bfloat16", "all"),
)  # fmt: skip
"""Bug, dtype and taps: those that other arithmetic or a wide interval resembles most, for the default run."""


@pytest.mark.parametrize(("bug", "dtype", "taps"), FAST)
def test_a_bug_that_is_left_out_is_given_no_other_name(bug: str, dtype: str, taps: str) -> None:
    found = leave_out(bug, dtype, taps)
    assert found is not None
    assert not found.wrong, found


@pytest.mark.slow
@pytest.mark.parametrize("taps", TAPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_bug_that_is_left_out_is_given_another_name(dtype: str, taps: str) -> None:
    found = [leave_out(each.id, dtype, taps) for each in bugs()]
    assert [each for each in found if each is not None and each.wrong] == []
