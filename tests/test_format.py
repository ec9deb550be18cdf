"""The format document is true: its table of taps and its test vectors are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

from refmoe.checkpoint.synthetic import elements, gains
from refmoe.spec.taps import LAYER_TAPS, MODEL_TAPS

TEXT = (Path(__file__).parent.parent / "golden" / "FORMAT.md").read_text()


def test_the_table_of_taps_is_the_spec_s() -> None:
    found = dict(re.findall(r"^\| `([a-z_.{}]+)` \| ([A-Za-z ]+) \|$", TEXT, re.MULTILINE))
    assert found == {f"layers.{{i}}.{name}": shape for name, shape in LAYER_TAPS.items()} | MODEL_TAPS


def test_the_vectors_of_the_weight_formula_are_what_it_gives() -> None:
    vectors = re.findall(r"^\| `([a-z0-9_.]+)` \| (\d+) to (\d+) \| (-?\d+) \| ([-\d, ]+) times", TEXT, re.MULTILINE)
    assert len(vectors) == 4
    for name, first, last, exponent, values in vectors:
        found = elements(1, name, int(exponent), int(first), int(last) + 1)
        assert found.tolist() == [int(value) * 2.0 ** int(exponent) for value in values.split(",")]
    (listed,) = re.findall(r"^\| `layers.0.moe_norm` \| 0 to 3 \| \| (.*) \|$", TEXT, re.MULTILINE)
    numerators = [int(sign + k) for sign, k in re.findall(r"1 ([+-]) (\d+)/128", listed)]
    assert gains(1, "layers.0.moe_norm", 4).tolist() == [1 + k / 128 for k in numerators]
