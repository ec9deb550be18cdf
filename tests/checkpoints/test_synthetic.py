# SPDX-License-Identifier: Apache-2.0
"""The weight formula: it equals ten lines on plain integers, and any element can be computed without the others."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refmoe.checkpoints.names import named_weights
from refmoe.checkpoints.synthetic import synthetic_checkpoint
from refmoe.checkpoints.weight_formula import BLOCK, GAINS, default_exponent, elements, gains
from refmoe.errors import InputError
from tests.checkpoints.models import UNEVEN

SEEDS = st.integers(0, 2**64 - 1)
NAMES = st.text(max_size=20)


def plain_byte(seed: int, name: str, index: int) -> int:
    """The formula as the format document states it, on Python's integers: the top byte of the hash of an index."""

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    key = mix((seed + digest) % 2**64)
    return mix((key + (index + 1) * 0x9E3779B97F4A7C15) % 2**64) >> 56


@given(SEEDS, NAMES, st.integers(-126, 120), st.integers(0, 2**40))
def test_elements_follow_the_formula(seed: int, name: str, exponent: int, start: int) -> None:
    found = elements(seed, name, exponent, start, start + 5)
    assert found.dtype == np.float32
    expected = [(2 * plain_byte(seed, name, start + i) - 255) * Fraction(2) ** exponent for i in range(5)]
    assert [Fraction(float(value)) for value in found] == expected


@given(SEEDS, NAMES)
def test_gains_follow_the_formula(seed: int, name: str) -> None:
    found = gains(seed, name, 7)
    assert found.dtype == np.float32
    expected = [1 + Fraction(max(plain_byte(seed, name, i) // 2, 1) - 64, 128) for i in range(7)]
    assert [Fraction(float(value)) for value in found] == expected
    assert all(Fraction(1, 2) < value < Fraction(3, 2) for value in expected)


def test_known_values() -> None:
    """Vectors for other languages. They may never change, as every golden depends on them."""
    assert elements(0, "embedding", 0, 0, 6).tolist() == [-247, -5, 255, -119, -187, 1]
    assert (gains(1, "layers.0.moe_norm", 4) * 128).tolist() == [108, 112, 174, 146]


@given(st.data())
def test_any_slice_equals_the_whole(data: st.DataObject) -> None:
    size = 2 * BLOCK + 77
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    assert np.array_equal(elements(9, "w1", -8, start, stop), WHOLE[start:stop])


WHOLE = elements(9, "w1", -8, 0, 2 * BLOCK + 77)


def test_rows_are_those_of_the_whole() -> None:
    embedding = named_weights(synthetic_checkpoint(UNEVEN, 4).parameters)["embedding"]
    whole = embedding.read()
    for ids in ([0], [36, 3, 3, 0], [-1], []):
        chosen = np.array(ids, dtype=np.int64)
        assert np.array_equal(embedding.rows(chosen), whole[chosen])
    for outside in (37, -38):
        with pytest.raises(IndexError):
            embedding.rows(np.array([outside]))


def test_values_are_exact_in_every_dtype() -> None:
    """With the default exponents, also at the published sizes, no dtype rounds an element."""
    for config in (UNEVEN, replace(UNEVEN, dim=6144, hidden_dim=16384, heads=48, kv_heads=8, head_dim=128, layers=1)):
        for name, weight in named_weights(synthetic_checkpoint(config, 2).parameters).items():
            if len(weight.shape) == 1:
                values = weight.read()
            else:
                values = elements(2, name, default_exponent(name, weight.shape), 0, 3000)
                odd = np.ldexp(values.astype(np.float64), -default_exponent(name, weight.shape))
                assert (abs(odd) <= 255).all()
                assert (odd % 2 == 1).all()
            for dtype in (ml_dtypes.bfloat16, np.float16):
                assert np.array_equal(values.astype(dtype).astype(np.float64), values.astype(np.float64)), name


@pytest.mark.parametrize("kind", GAINS)
def test_the_default_exponent_is_the_largest_that_keeps_the_gain(kind: str) -> None:
    """The exponent meets the inequality of its docstring, in rational arithmetic."""

    def fits(exponent: int, fan_in: int) -> bool:
        return Fraction(4) ** exponent * 21845 * fan_in <= Fraction(4) ** GAINS[kind]

    for fan_in in [*range(1, 300), 4096, 14336, 6144, 16384, 2**20 - 1, 2**20, 2**20 + 1, 2**60 + 1, 4**64 // 21845]:
        exponent = default_exponent(f"layers.0.{kind}", (3, fan_in))
        used = 1 if kind == "embedding" else fan_in
        assert fits(exponent, used)
        assert not fits(exponent + 1, used)


def test_names_and_seeds_give_other_values() -> None:
    streams = [elements(seed, name, 0, 0, 64) for seed in (0, 1, 2**64 - 1) for name in ("w1", "w2", "layers.0.w1")]
    for i, one in enumerate(streams):
        for other in streams[:i]:
            assert (one == other).mean() < 0.2


def test_values_are_spread_evenly() -> None:
    """Every value appears, the mean is near zero, and neighbours and bytes of two streams are not correlated."""
    n = 1 << 18
    values = elements(5, "layers.1.experts.3.w2", 0, 0, n).astype(np.float64)
    counts = np.unique(values, return_counts=True)[1]
    assert len(counts) == 256
    # six standard deviations: of a mean, of a count (n p (1 - p)), of a correlation
    assert abs(values.mean()) < 6 * np.sqrt(21845 / n)
    assert (abs(counts - n / 256) < 6 * np.sqrt(n / 256)).all()
    other = elements(6, "layers.1.experts.3.w2", 0, 0, n).astype(np.float64)
    for shifted in (values[1:], values[26:], other):
        assert abs(np.mean(values[: len(shifted)] * shifted)) / 21845 < 6 / np.sqrt(n - 26)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": -1}, "seed = -1"),
        ({"seed": 2**64}, "2\\^64 - 1"),
        ({"seed": 1.5}, "seed = 1.5"),
        ({"seed": True}, "seed = True"),
        ({"exponents": {"w4": 1}}, "unknown kind of parameter 'w4'"),
        ({"exponents": {"w1": 1.0}}, "w1 = 1.0"),
        ({"exponents": {"w1": 121}}, "-126 to 120"),
        ({"exponents": {"wq": -127}}, "wq = -127"),
    ],
)
def test_what_the_formula_does_not_take(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        synthetic_checkpoint(UNEVEN, **{"seed": 0, **changes})


def test_given_exponents_are_used() -> None:
    for exponent in (-126, -3, 0, 120):
        weights = named_weights(synthetic_checkpoint(UNEVEN, 1, {"w2": exponent}).parameters)
        for kind, used in (("w2", exponent), ("w1", default_exponent("w1", (UNEVEN.hidden_dim, UNEVEN.dim)))):
            name = f"layers.0.experts.2.{kind}"
            expected = elements(1, name, used, 0, UNEVEN.dim * UNEVEN.hidden_dim)
            assert np.array_equal(weights[name].read().ravel(), expected)


# --- edits ----------------------------------------------------------------------------------------------------------

GATE = "layers.0.router.gate"


def edited(*edits: dict[str, Any]) -> dict[str, Any]:
    return named_weights(synthetic_checkpoint(UNEVEN, 1, edits=edits).parameters)


PLAIN = edited()


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        ({"value": 2.0}, lambda x: np.full_like(x, 2)),
        ({"row": 1, "value": -0.5}, lambda x: np.where(np.arange(len(x))[:, None] == 1, -0.5, x)),
        ({"columns": [2, 5], "value": 0.0}, lambda x: np.concatenate([x[:, :2], 0 * x[:, :3], x[:, 5:]], 1)),
        ({"row": 2, "columns": [1, 4], "values": [1, -2, 0.25]}, lambda x: changed(x, 2, slice(1, 4), [1, -2, 0.25])),
        ({"magnitude": 4.0}, lambda x: 4 * np.sign(x)),
        ({"row": 0, "columns": [0, 3], "magnitude": 4.0}, lambda x: changed(x, 0, slice(3), 4 * np.sign(x[0, :3]))),
        ({"row": 3, "copy": 1}, lambda x: changed(x, 3, slice(None), x[1])),
        ({"row": 3, "columns": [4, 6], "copy": 1}, lambda x: changed(x, 3, slice(4, 6), x[1, 4:6])),
        ({"row": 3, "copy": 3}, lambda x: x),
        ({"entries": [[0, 3, 1.5], [4, 0, -8]]}, lambda x: changed(changed(x, 0, 3, 1.5), 4, 0, -8)),
    ],
)  # fmt: skip
def test_an_edit_changes_what_it_names_and_nothing_else(edit: dict[str, Any], expected: Any) -> None:
    found = edited({"parameter": GATE, **edit})
    assert np.array_equal(found[GATE].read(), expected(PLAIN[GATE].read()))
    for name in PLAIN.keys() - {GATE}:
        assert np.array_equal(found[name].read(), PLAIN[name].read())


def changed(x: Any, row: int, columns: Any, values: Any) -> Any:
    x = x.copy()
    x[row, columns] = values
    return x


def test_an_exponent_for_a_row_is_the_formula_s_at_that_scale() -> None:
    """Edits before it have no effect on the row."""
    found = edited(
        {"parameter": "embedding", "value": 1.0}, {"parameter": "embedding", "row": 5, "exponent": 3}
    )["embedding"].read()  # fmt: skip
    assert (np.delete(found, 5, axis=0) == 1).all()
    width = UNEVEN.dim
    assert np.array_equal(found[5], elements(1, "embedding", 3, 5 * width, 6 * width))


def test_edits_apply_in_order_each_on_what_the_ones_before_left() -> None:
    first = {"parameter": GATE, "row": 1, "value": 1.0}
    copied = {"parameter": GATE, "row": 3, "copy": 1}
    later = {"parameter": GATE, "row": 1, "value": 2.0}
    gate = edited(first, copied, later)[GATE].read()
    assert (gate[3] == 1).all()
    assert (gate[1] == 2).all()
    assert (edited(first, later, copied)[GATE].read()[3] == 2).all()


def test_a_pattern_edits_every_parameter_that_it_matches() -> None:
    found = edited({"parameter": "layers.*.experts.?.w2", "row": 0, "value": 0.0}, {"parameter": "*norm", "value": 1.0})
    for name, weight in found.items():
        changes = name.endswith((".w2", "norm"))
        assert np.array_equal(weight.read(), PLAIN[name].read()) != changes, name
        if name.endswith("norm"):
            assert (weight.read() == 1).all()


@given(st.data())
def test_rows_of_an_edited_table_are_those_of_the_whole(data: st.DataObject) -> None:
    """Rows equal those of the whole table, also for chains of copies."""
    rows, columns = st.integers(0, 36), st.sampled_from([None, [0, 1], [3, 9]])
    actions = st.one_of(
        st.fixed_dictionaries({"copy": rows}), st.fixed_dictionaries({"value": st.integers(-9, 9)}),
        st.fixed_dictionaries({"magnitude": st.integers(0, 9)}),
        st.fixed_dictionaries({"exponent": st.integers(-9, 9)}),
    )  # fmt: skip
    edits = [
        {"parameter": "embedding", "row": data.draw(rows), **({"columns": c} if c else {}), **action}
        for c, action in data.draw(st.lists(st.tuples(columns, actions), max_size=6))
    ]
    table = edited(*edits)["embedding"]
    ids = np.array(data.draw(st.lists(rows, max_size=5)), dtype=np.int64)
    assert np.array_equal(table.rows(ids), table.read()[ids])


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ("zero", "edits\\[1\\]: 'zero' is not a table"),
        ({"parameter": GATE}, "has none of value, values"),
        ({"parameter": GATE, "value": 1, "row": 1, "copy": 2}, "has value and copy of"),
        ({"parameter": GATE, "value": 1, "rows": 1}, "unknown field 'rows'"),
        ({"parameter": "layers.9.*", "value": 1}, "'layers.9.\\*' matches no parameter"),
        ({"value": 1}, "parameter = None matches no parameter"),
        ({"parameter": GATE, "row": 5, "value": 1}, "row = 5, but layers.0.router.gate has rows 0 to 4"),
        ({"parameter": GATE, "row": True, "value": 1}, "row = True"),
        ({"parameter": "final_norm", "row": 0, "value": 1}, "final_norm has no rows"),
        ({"parameter": GATE, "columns": [3, 3], "value": 1}, "columns = \\[3, 3\\], but \\[first, stop\\]"),
        ({"parameter": GATE, "columns": [0, 1000], "value": 1}, "columns = \\[0, 1000\\]"),
        ({"parameter": GATE, "columns": 3, "value": 1}, "columns = 3"),
        ({"parameter": GATE, "copy": 1}, "copy needs a 'row'"),
        ({"parameter": GATE, "row": 1, "copy": 5}, "copy = 5, but layers.0.router.gate has rows 0 to 4"),
        ({"parameter": GATE, "value": 0.1}, "0.1 is not exact in bfloat16"),
        ({"parameter": GATE, "value": 1e39}, "1e\\+39 is not exact"),
        ({"parameter": GATE, "value": float("nan")}, "nan is not a finite number"),
        ({"parameter": GATE, "value": "1"}, "'1' is not a finite number"),
        ({"parameter": GATE, "magnitude": -1}, "magnitude = -1 is negative"),
        ({"parameter": GATE, "values": [1]}, "values need a 'row'"),
        ({"parameter": GATE, "row": 0, "values": [1]}, "must be a list of"),
        ({"parameter": GATE, "row": 0, "columns": [0, 1], "values": [257]}, "257 is not exact"),
        ({"parameter": GATE, "exponent": 121}, "exponent = 121, but an integer from -126 to 120"),
        ({"parameter": GATE, "exponent": 1.0}, "exponent = 1.0"),
        ({"parameter": "*norm", "exponent": 1}, "attention_norm is a gain, which has none"),
        ({"parameter": GATE, "row": 1, "entries": []}, "'row' and 'columns' have no place"),
        ({"parameter": GATE, "entries": 3}, "entries must be a list"),
        ({"parameter": "final_norm", "entries": []}, "final_norm a matrix"),
        ({"parameter": GATE, "entries": [[0, 1]]}, "entry \\[0, 1\\] is not \\[row, column, number\\]"),
        ({"parameter": GATE, "entries": [[5, 1, 1.0]]}, "entry \\[5, 1, 1.0\\]"),
        ({"parameter": GATE, "entries": [[0, 1, 0.3]]}, "0.3 is not exact"),
    ],
)  # fmt: skip
def test_a_malformed_edit_is_refused_in_one_sentence(edit: Any, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        synthetic_checkpoint(UNEVEN, 1, edits=[{"parameter": GATE, "value": 1}, edit])
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("edits[1]: ")


def test_a_weight_that_is_held_is_computed_once_and_cannot_be_changed() -> None:
    weight = synthetic_checkpoint(UNEVEN, seed=7).parameters.output
    before = weight.read()
    weight.hold()
    held = weight.read()
    assert held is weight.read()
    assert held is not before
    np.testing.assert_array_equal(held, before)
    with pytest.raises(ValueError, match="read-only"):
        held[0, 0] = 0
