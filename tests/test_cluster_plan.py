# SPDX-License-Identifier: Apache-2.0
"""The plan for several machines: bytes from the shapes, and times from the slower rate."""

from __future__ import annotations

import pytest

from bench.cluster_plan import Rates, head_bytes, layer_bytes, planned, plans, trace_bytes
from refmoe.checkpoints.size import total_parameters
from refmoe.spec.config import PRESETS
from refmoe.spec.taps import LAYER_TAPS

CONFIG = PRESETS["mixtral-8x7b"]


def test_the_bytes_are_those_of_all_parameters() -> None:
    """Beside the layers and the head there is the embedding, as large as the output matrix."""
    embedding = 2 * CONFIG.vocab * CONFIG.dim
    assert 32 * layer_bytes(CONFIG) + head_bytes(CONFIG) + embedding == 2 * total_parameters(CONFIG)


def test_the_trace_of_a_layer_is_the_sum_of_its_taps() -> None:
    sizes = {"T": 8, "S": 8, "D": 4096, "H": 32, "K": 8, "d": 128, "E": 8, "k": 2, "F": 14336}
    elements = 8 * 4096  # the input of the layer
    for axes in LAYER_TAPS.values():
        product = 1
        for axis in axes.split():
            product *= sizes[axis]
        elements += product
    assert trace_bytes(CONFIG, 8) == 4 * elements


@pytest.mark.parametrize(("disk", "judged"), [(1e9, 4e9), (4e9, 1e9)])
def test_the_slower_rate_sets_the_time(disk: float, judged: float) -> None:
    one = planned(CONFIG, 8, 1, Rates(disk, judged))
    assert one.seconds == (32 * layer_bytes(CONFIG) + head_bytes(CONFIG)) / 1e9


def test_the_machine_with_most_layers_ends_last() -> None:
    found = plans(CONFIG, 8, Rates(1e9, 1e9), (1, 5, 32, 64))
    assert [each.layers for each in found] == [32, 7, 1, 1]
    assert found[2].seconds == found[3].seconds < found[1].seconds < found[0].seconds
