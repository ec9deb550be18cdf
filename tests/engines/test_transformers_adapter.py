# SPDX-License-Identifier: Apache-2.0
"""The adapter of transformers: three cases in each setting that people run it in; all dtypes are slow tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from refmoe.engines.protocol import TAPS
from refmoe.engines.results import Results, read_results
from refmoe.suite import read_case
from tests.command_line import Refmoe

pytestmark = pytest.mark.engines

CASES = ("walking-skeleton", "batch-ragged", "window-chunks")
"""Chunks and decoding, several sequences, a window."""
PROBS = {"attention.scores", "attention.probs"}
EXPERTS = {tap for tap in TAPS if tap.startswith("expert.")}
SETTINGS = {
    "attention=eager": {"attention.scores"},
    "attention=sdpa": PROBS,
    "attention=sdpa experts=batched_mm": PROBS | EXPERTS,
    "cache=static": PROBS,
    "attention=sdpa cache=static": PROBS,
    "attention=sdpa batch=left-padded": PROBS,
}
"""Per setting the taps that are not seen."""


def results_of(setting: str, cases: tuple[str, ...], refmoe: Refmoe, folder: Path, *more: str) -> Results:
    """The results of a run without failures."""
    golden, out = Path(__file__).parents[2] / "golden", folder / "results.json"
    words = [word for option in setting.split() for word in ("--option", option)]
    words += [word for case in cases for word in ("--case", case)]
    status, said, err = refmoe("conform", "--adapter", "transformers", "--golden", golden, *words, *more, "--out", out)
    assert status == 0, said + err
    return read_results(out)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(
    "dtypes", [("bfloat16",), pytest.param(("float64", "float32", "float16"), marks=pytest.mark.slow)]
)
def test_it_is_conformant(setting: str, dtypes: tuple[str, ...], refmoe: Refmoe, tmp_path: Path) -> None:
    words = [word for dtype in dtypes for word in ("--dtype", dtype)]
    results = results_of(setting, CASES, refmoe, tmp_path, *words)
    assert results.counts == {"conformant": 3 * len(dtypes)}
    assert {each.policy for each in results.outcomes} == {f"hf-{each.dtype}" for each in results.outcomes}
    seen = set(results.outcomes[0].worst_errors) | {"router.experts"}
    assert set(TAPS) - seen == SETTINGS[setting]


def test_grouped_products_run_where_their_rows_are_aligned(refmoe: Refmoe, tmp_path: Path) -> None:
    """A row of torch's grouped_mm is a whole number of 16 bytes. There is no kernel in float64."""
    results = results_of("experts=grouped_mm", ("square", "one-pair"), refmoe, tmp_path)
    assert {each.dtype for each in results.outcomes} == {"float32", "bfloat16", "float16"}
    found = {(each.case, each.dtype): each.verdict for each in results.outcomes}
    for name in ("square", "one-pair"):
        config = read_case(Path(__file__).parents[2] / "golden" / name).config
        for dtype, size in (("float32", 4), ("bfloat16", 2), ("float16", 2)):
            aligned = config.dim * size % 16 == 0 == config.hidden_dim * size % 16
            assert found[name, dtype] == ("conformant" if aligned else "skipped"), (name, dtype)
    assert {*found.values()} == {"conformant", "skipped"}


@pytest.mark.slow
def test_compiled_layers_conform(refmoe: Refmoe, tmp_path: Path) -> None:
    results = results_of("attention=sdpa compile=layers", ("walking-skeleton",), refmoe, tmp_path, "--dtype", "float32")
    assert results.counts == {"conformant": 1}
    assert {*results.outcomes[0].worst_errors} == {"embedding", "residual", "final_norm", "logits"}


@pytest.mark.slow
def test_flex_attention_conforms_where_it_has_kernels(refmoe: Refmoe, tmp_path: Path) -> None:
    """Torch compiles it. Its kernels for a CPU are of three dtypes."""
    results = results_of("attention=flex_attention", ("dims-distinct",), refmoe, tmp_path)
    assert [each.dtype for each in results.outcomes] == ["float32", "bfloat16", "float16"]
    assert results.counts == {"conformant": 3}
    assert set(TAPS) - set(results.outcomes[0].worst_errors) - {"router.experts"} == PROBS


def test_settings_that_exclude_each_other_are_one_sentence(refmoe: Refmoe) -> None:
    words = ("--option", "batch=left-padded", "--option", "cache=static")
    status, _, err = refmoe("conform", "--adapter", "transformers", *words, "--case", "top-1")
    assert status == 2
    assert "single was expected" in err


def test_an_option_that_is_none_is_one_sentence(refmoe: Refmoe) -> None:
    golden = Path(__file__).parents[2] / "golden"
    for option, words in (("attention=flash", "option attention is 'flash'"), ("threads=0", "option threads is '0'")):
        status, _, err = refmoe("conform", "--adapter", "transformers", "--golden", golden, "--option", option)
        assert status == 2
        assert words in err
