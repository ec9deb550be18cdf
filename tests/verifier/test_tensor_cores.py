# SPDX-License-Identifier: Apache-2.0
"""An engine whose products are the bits of a tensor core passes every test on one tap, however it stores them."""

from __future__ import annotations

import numpy as np
import pytest

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.arithmetic.formats import FLOAT32, nearest
from refmoe.arithmetic.tensor_core import TENSOR_CORES
from refmoe.profiles.load import policy
from refmoe.steps.enclosure_ops import EnclosureOps
from refmoe.verifier.findings import LOCAL, PASS
from refmoe.verifier.provenance import Origin
from refmoe.verifier.tally import LEAN, Limits, Tally

ROWS, TERMS, COLUMNS = 32, 2048, 16
CORES = [name for name in TENSOR_CORES if name.endswith("float16")]


@pytest.mark.parametrize("one_signed", [False, True])
@pytest.mark.parametrize("stored_wide", [False, True])
@pytest.mark.parametrize("name", CORES)
def test_honest_tensor_cores_pass_the_tests_of_size_and_lean(name: str, stored_wide: bool, one_signed: bool) -> None:
    """Stored in float32, every error is that of the accumulator: it leans towards zero, and is larger than by chance.

    Here truncation would change a value by a small part of a deviation, so that the filter says nothing. The bias of
    the accumulator explains the size.
    """
    core, rng = TENSOR_CORES[name], np.random.default_rng(3)
    x, w = rng.standard_normal((ROWS, TERMS)), rng.standard_normal((TERMS, COLUMNS))
    if one_signed:
        x, w = np.abs(x), np.abs(w)
    x, w = nearest(x, core.inputs), nearest(w, core.inputs)
    format = FLOAT32 if stored_wide else core.inputs
    found = nearest(core.run(x, w), format)
    legal = EnclosureOps(policy(core.inputs.name)).matmul(Enclosure(x), Enclosure(w))
    tally = Tally(rows=ROWS)
    tally.add(legal.reshape(-1), found.reshape(-1), core.inputs, format, lambda at: divmod(at, COLUMNS), False)
    limits, origin = Limits(1e-6, 10**6, 100), Origin(since=(), rung=LOCAL, spans=1, normalises=False)
    check = tally.check("prefill", "", origin, limits, alike=1.0, leans=True, why="")
    assert check.verdict == PASS, check.reason
    if stored_wide and one_signed:
        assert check.truncation > 10 * LEAN  # the lean alone would accuse it
