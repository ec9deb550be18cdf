# SPDX-License-Identifier: Apache-2.0
"""Each bug of quantised matrices is what its words say, is killed, and is named first.

`python -m bench.quantised_bugs` prints the whole table, with the usual checks that each bug passes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from refmoe.arithmetic.codes import quantise
from refmoe.bugs.catalogue import MUTANTS
from refmoe.bugs.quantised.bug import CODED
from refmoe.bugs.quantised.catalogue import QUANTISED, bugs_of
from refmoe.checkpoints.ggml_blocks import FORMATS, Groups
from refmoe.checkpoints.names import named_weights
from refmoe.checkpoints.rows import RowWeight
from refmoe.profiles.cut_points import product_of
from refmoe.profiles.load import policy
from refmoe.verifier.findings import CONFORMANT, NOT_CONFORMANT
from tests.bugs.quantised_models import (
    CASE,
    RULES,
    computes,
    explained,
    judged,
    left_out,
    models_of,
    setting,
    traced,
)  # fmt: skip

pytestmark = pytest.mark.skipif(find_spec("gguf") is None, reason="gguf not installed: pip install -e '.[test]'")
ROOT = Path(__file__).parents[2]
K = {name for name in FORMATS if name.endswith("_K")}
engine = pytest.mark.skipif(
    find_spec("xllamacpp") is None, reason="xllamacpp not installed: pip install -e '.[llama-cpp]'"
)
PAIRS = [(bug.id, model) for bug in QUANTISED.values() for model in models_of(bug)]
FIRST = [(bug.id, models_of(bug)[0]) for bug in QUANTISED.values()]


def marked(pairs: list[tuple[str, str]]) -> list[Any]:
    return [pytest.param(*pair, marks=engine) if pair[1] in K else pair for pair in pairs]


def test_there_are_enough_and_each_has_a_source() -> None:
    assert len(QUANTISED) >= 30
    assert not QUANTISED.keys() & MUTANTS.keys()
    for bug in QUANTISED.values():
        assert bug.sources
        assert bug.formats
        assert models_of(bug), bug.id
        assert {*bug.touches} <= {*CODED}


def test_the_recorded_table_has_every_bug_killed_and_named() -> None:
    rows = json.loads((ROOT / "bench" / "results" / "quantised_bugs.json").read_text(encoding="utf-8"))
    assert [row["bug"] for row in rows] == [*QUANTISED]
    assert all(row["killed"] for row in rows)
    assert sum(row["right"] for row in rows) >= 0.9 * len(rows)
    assert [row["bug"] for row in rows if row["left_out_wrong"] or (row["named"] and not row["right"])] == []


def test_their_order_does_not_depend_on_what_is_imported_first() -> None:
    """Modules of bugs register them when they are imported, and a diagnosis imports what they are computed by."""
    order = "import refmoe.{}; from refmoe.bugs.quantised.catalogue import QUANTISED; print(*QUANTISED)"
    for first in ("verifier.diagnosis", "bugs.quantised.engine"):
        said = subprocess.run([sys.executable, "-c", order.format(first)], capture_output=True, text=True, check=True)
        assert said.stdout.split() == [*QUANTISED]


def test_a_model_without_quantised_matrices_has_none_of_them() -> None:
    from tests.bugs.judging import parameters_of

    assert bugs_of(parameters_of(CASE)) == ()


@pytest.mark.slow
@pytest.mark.parametrize("model", [pytest.param(each, marks=engine) if each in K else each for each in RULES])
def test_the_honest_engine_conforms(model: str) -> None:
    report = judged(traced(None, model), model)
    assert report.verdict == CONFORMANT, report.headline


SOME = [
    ("quantised-nibbles-in-pairs", "Q4_1"), ("quantised-scales-of-expert-0", "Q8_0"),
    ("quantised-input-truncated", "Q8_0"), ("quantised-fp8-scales-transposed", "fp8-block128"),
    ("quantised-fp8-input-rounded-twice", "fp8-block128+codes"),
    ("quantised-gptq-zero-of-version-1", "gptq-v2"),
]  # fmt: skip
"""For the default run."""


@pytest.mark.parametrize(("bug", "model"), SOME)
def test_a_bug_is_killed_and_named_first(bug: str, model: str) -> None:
    assert_named(bug, model)


@pytest.mark.slow
@pytest.mark.parametrize(("bug", "model"), marked([pair for pair in FIRST if pair not in SOME]))
def test_every_bug_is_killed_and_named_first(bug: str, model: str) -> None:
    assert_named(bug, model)


@pytest.mark.slow
@pytest.mark.parametrize(("bug", "model"), marked([pair for pair in PAIRS if pair not in FIRST]))
def test_every_bug_is_killed_in_every_format(bug: str, model: str) -> None:
    assert judged(traced(QUANTISED[bug], model), model).verdict == NOT_CONFORMANT


def assert_named(bug: str, model: str) -> None:
    trace = traced(QUANTISED[bug], model)
    report = judged(trace, model)
    assert report.verdict == NOT_CONFORMANT
    assert report.first_wrong is not None
    names = [each.name for each in explained(trace, model, report)]
    assert names, bug
    assert names[0] == bug or computes(names[0], trace, model), names


def test_codes_that_nothing_explains_are_given_no_name() -> None:
    """The sharded models are tried too, although they make no codes."""
    found = left_out("quantised-input-truncated", "Q8_0")
    assert not found.wrong, found


@pytest.mark.slow
@pytest.mark.parametrize(("bug", "model"), marked(FIRST))
def test_a_bug_that_is_left_out_is_given_no_other_name(bug: str, model: str) -> None:
    found = left_out(bug, model)
    assert not found.wrong, found


# ---- each reading is one


@pytest.mark.parametrize(("bug", "model"), marked(FIRST))
def test_a_matrix_that_is_read_wrongly_has_the_values_that_are_multiplied(bug: str, model: str) -> None:
    """Values and factors agree, rows by themselves are those of the whole, and some value is wrong, or a code is."""
    at, each = setting(model), QUANTISED[bug]
    right, wrong = named_weights(at.parameters), named_weights(each.model(at.config, at.parameters).parameters)
    changed = []
    for name, weight in wrong.items():
        if weight is right[name]:
            continue
        assert isinstance(weight, RowWeight)
        assert product_of(weight) in each.touches
        assert (weight.format, weight.name, weight.shape) == (right[name].format, name, right[name].shape)  # type: ignore[attr-defined]
        values, parts = np.asarray(weight.read(), np.float64), weight.factors(3, 7)
        made = parts.terms.astype(np.float64)
        if parts.offsets is not None:
            made = made + np.repeat(parts.offsets, made.shape[1] // parts.offsets.shape[1], axis=1)
        np.testing.assert_array_equal(values[3:7], made.astype(weight.dtype))
        changed.append(bool((values != right[name].read()).any()))
        if any(changed) and len(changed) > 3:
            break
    assert any(changed) == (each.changes == "parameters")


def blocks(name: str, count: int = 40) -> Any:
    """Random blocks whose float16 scales are numbers: [count, bytes]"""
    rng = np.random.default_rng(5)
    raw = rng.integers(0, 256, (count, FORMATS[name].nbytes), np.uint8)
    halves = rng.uniform(0.01, 1, (count, 2)).astype(np.float16).view(np.uint8)
    at = {"Q6_K": slice(208, 210), "Q8_0": slice(0, 2), "Q4_0": slice(0, 2), "Q5_0": slice(0, 2)}
    place = at.get(name, slice(0, 4))
    raw[:, place] = halves[:, : place.stop - place.start]
    return raw


def read_by(bug: str, name: str, raw: Any) -> list[list[float]]:
    from refmoe.bugs.quantised import blocks as module

    function = {
        "quantised-nibbles-in-pairs": module.nibbles_in_pairs,
        "quantised-k-codes-in-sequence": module.k_codes_in_sequence,
        "quantised-k-scales-in-sequence": module.scales_in_sequence,
        "quantised-k-scales-of-four-bits": module.scales_of_four_bits,
        "quantised-codes-as-twos-complement": module.twos_complement, "quantised-codes-unsigned": module.codes_unsigned,
        "quantised-fifth-bits-of-first-half": module.fifth_bits_of_first_half,
        "quantised-mx-subnormals-as-normals": module.subnormals_as_normals,
    }[bug]  # fmt: skip
    made: Groups = function(raw, FORMATS[name].parts(raw))
    values = made.codes.astype(np.float64) * made.scales[..., None]
    if made.offsets is not None:
        values = values + made.offsets[..., None]
    return values.reshape(len(raw), -1).tolist()  # type: ignore[no-any-return]


def half(raw: Any, at: int) -> float:
    return float(np.frombuffer(bytes(raw[at : at + 2]), "<f2")[0])


def test_blocks_of_four_bits_as_the_reports_describe_the_wrong_reading() -> None:
    """One value at a time, from the bytes."""
    raw = blocks("Q4_0")
    wrong = read_by("quantised-nibbles-in-pairs", "Q4_0", raw)
    signed = read_by("quantised-codes-as-twos-complement", "Q4_0", raw)
    for b, block in enumerate(raw):
        for i in range(32):
            in_pairs = int(block[2 + i // 2]) >> 4 * (i % 2) & 15
            assert wrong[b][i] == half(block, 0) * (in_pairs - 8)
            code = int(block[2 + i % 16]) >> 4 * (i // 16) & 15
            assert signed[b][i] == half(block, 0) * (code - 16 if code > 7 else code)


def test_blocks_of_eight_and_five_bits_as_the_reports_describe_the_wrong_reading() -> None:
    raw, five = blocks("Q8_0"), blocks("Q5_0")
    unsigned, halves = (
        read_by("quantised-codes-unsigned", "Q8_0", raw),
        read_by("quantised-fifth-bits-of-first-half", "Q5_0", five),
    )
    for b, block in enumerate(five):
        high = int.from_bytes(bytes(block[2:6]), "little")
        for i in range(32):
            assert unsigned[b][i] == half(raw[b], 0) * int(raw[b][2 + i])
            low = int(block[6 + i % 16]) >> 4 * (i // 16) & 15
            assert halves[b][i] == half(block, 0) * ((low | (high >> i % 16 & 1) << 4) - 16)


def test_k_blocks_as_the_reports_describe_the_wrong_reading() -> None:
    """ggml's loops, with the mistake in them."""
    raw = blocks("Q4_K")
    sequence = read_by("quantised-k-codes-in-sequence", "Q4_K", raw)
    packed = read_by("quantised-k-scales-in-sequence", "Q4_K", raw)
    four = read_by("quantised-k-scales-of-four-bits", "Q4_K", raw)
    for b, block in enumerate(raw):
        d, dmin, bytes_ = half(block, 0), half(block, 2), [int(each) for each in block[4:16]]
        whole = int.from_bytes(bytes(block[4:16]), "little")
        for i in range(256):
            group = i // 32
            if group < 4:
                scale, minimum = bytes_[group] & 63, bytes_[group + 4] & 63
                few = scale, minimum
            else:
                scale = bytes_[group + 4] & 15 | (bytes_[group - 4] >> 6) << 4
                minimum = bytes_[group + 4] >> 4 | (bytes_[group] >> 6) << 4
                few = bytes_[group + 4] & 15, bytes_[group + 4] >> 4
            code = int(block[16 + i // 64 * 32 + i % 32]) >> 4 * (i // 32 % 2) & 15
            next_to = int(block[16 + i // 2]) >> 4 * (i % 2) & 15
            assert sequence[b][i] == pytest.approx(d * scale * next_to - dmin * minimum, abs=1e-5)
            assert four[b][i] == pytest.approx(d * few[0] * code - dmin * few[1], abs=1e-5)
            pair = whole >> 12 * group & 4095
            assert packed[b][i] == pytest.approx(d * (pair & 63) * code - dmin * (pair >> 6), abs=1e-5)


def test_the_table_of_four_bit_floats_with_subnormals_taken_for_normals() -> None:
    raw = np.arange(16, dtype=np.uint8) * 17
    block = np.concatenate([[np.uint8(127)], raw])[None].astype(np.uint8)
    normal = [0.5, 0.75, 1, 1.5, 2, 3, 4, 6]
    assert read_by("quantised-mx-subnormals-as-normals", "MXFP4", block)[0][:16] == [
        *normal, *(-each for each in normal)
    ]  # fmt: skip


# ---- codes


def coded(bug: str, rows: Any, name: str = "llama.cpp-quantised", matrix: str = "Q8_0") -> Any:
    return quantise(rows, QUANTISED[bug].policy(policy(name)).inputs[matrix])  # type: ignore[arg-type]


def test_wrong_codes_as_their_words_say() -> None:
    rows = np.random.default_rng(3).standard_normal((3, 64)).astype(np.float32).astype(np.float64)
    rows[1] *= 8
    most = np.abs(rows.reshape(3, 2, 32)).max(-1)
    over = (rows.reshape(3, 2, 32) * 127 / most[..., None]).reshape(3, 64)
    far = np.abs(np.abs(over) % 1 - 0.5) < 0.49  # not next to an integer
    found = coded("quantised-input-truncated", rows).codes
    assert (found[far] == np.trunc(over)[far]).all()
    wrapped = coded("quantised-input-128-wraps", rows).codes
    assert wrapped.max() < 128
    top = np.isclose(np.abs(over), 127)
    assert (wrapped[top] == -128).all()
    shared = coded("quantised-input-one-scale-for-all-tokens", rows)
    assert len(np.unique(shared.scales)) == 1
    assert np.abs(shared.codes[0]).max() < 127
    before = coded("quantised-input-scale-of-the-token-before", rows)
    right = quantise(rows, policy("llama.cpp-quantised").inputs["Q8_0"])  # type: ignore[arg-type]
    assert (before.scales[1:] == right.scales[:-1]).all()
    assert (before.codes == right.codes).all()
    assert (coded("quantised-input-last-term-dropped", rows).codes[:, -1] == 0).all()
    assert (coded("quantised-input-last-block-dropped", rows).codes[:, 32:] == 0).all()
    signless = coded("quantised-input-scale-without-sign", np.resize(rows, (3, 256)), matrix="Q4_K")
    assert (signless.scales >= 0).all()


def test_wrong_fp8_codes_as_their_words_say() -> None:
    """The casts are those of ml_dtypes."""
    rules, matrix = "bfloat16+fp8-block128x128.input=e4m3-block128", "fp8-block128x128"
    rows = np.random.default_rng(6).standard_normal((3, 256)).astype(np.float32)
    rows[1] *= 8
    most = np.abs(rows.reshape(3, 2, 128)).max(-1)
    scales, wide = most / np.float32(448), lambda x: np.repeat(x, 128, axis=1)

    def made(bug: str) -> Any:
        return coded(f"quantised-fp8-input-{bug}", rows.astype(np.float64), rules, matrix)

    def cast(x: Any) -> Any:
        return x.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)

    right = quantise(rows.astype(np.float64), policy(rules).inputs[matrix])  # type: ignore[arg-type]
    np.testing.assert_array_equal(right.codes, cast(rows / wide(scales)))
    twice = cast((rows / wide(scales)).astype(ml_dtypes.bfloat16))
    assert (made("rounded-twice").codes != right.codes).any()
    np.testing.assert_array_equal(made("rounded-twice").codes, twice)
    short = np.abs(made("truncated").codes) <= np.abs(rows / wide(scales)) * (1 + 2.0**-20)
    assert short.all()
    assert (np.abs(made("cut-to-float16").codes) <= np.abs(right.codes)).all()
    shared = made("one-scale-for-all-tokens")
    np.testing.assert_array_equal(shared.scales, scales.max())
    np.testing.assert_array_equal(shared.codes, cast(rows / scales.max()))
    np.testing.assert_array_equal(made("scale-of-the-token-before").scales[1:], right.scales[:-1])
    for bug, whole in (("scale-to-power-of-two", np.ceil), ("scale-loses-its-fraction", np.floor)):
        np.testing.assert_array_equal(made(bug).scales, 2.0 ** whole(np.log2(right.scales)))
        np.testing.assert_array_equal(made(bug).codes, right.codes)
    down = made("scale-rounded-down")
    np.testing.assert_array_equal(down.codes, cast((rows / wide(2.0 ** np.floor(np.log2(scales)))).clip(-448, 448)))
    late = made("groups-one-late").values / right.values
    np.testing.assert_array_equal(np.flatnonzero((late != 1).any(0)), [128])
    np.testing.assert_array_equal(made("first-scale-for-a-token").scales[:, 1], right.scales[:, 0])
    assert np.abs(made("saturated-at-240").codes).max() == 240
    assert np.abs(made("scaled-to-240").codes).max() == 240
    at_most = (np.abs(made("scaled-to-480").codes) == 448).sum()
    assert at_most >= (np.abs(right.codes) == 448).sum()
    coarse = (most / np.float32(448)).astype(ml_dtypes.bfloat16).astype(np.float64)
    np.testing.assert_array_equal(made("scale-in-bfloat16").scales, coarse)
    assert (made("last-block-dropped").codes[:, 128:] == 0).all()
