# SPDX-License-Identifier: Apache-2.0
"""litgpt, ibm-fms, keras-hub, tinygrad, TransformerLens: what adapters record, as profiles judge it, and skip."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refmoe.checkpoints.write import write_checkpoint
from refmoe.engines.adapter import Adapter, Arrays, Skipped, adapter_class
from refmoe.engines.adapters import ibm_fms, keras_hub, litgpt, tinygrad, transformer_lens
from refmoe.engines.protocol import TAPS
from refmoe.profiles.load import policy
from refmoe.suite import Case, read_case
from refmoe.traces.trace import Header, Run, read_trace, write_trace
from refmoe.verifier.findings import CONFORMANT, NOT_CONFORMANT, Report
from refmoe.verifier.verify import verify

GOLDEN = Path(__file__).parents[2] / "golden"
PACKAGES = {
    "litgpt": "litgpt", "ibm_fms": "fms", "keras_hub": "keras_hub", "tinygrad": "tinygrad",
    "transformer_lens": "transformer_lens",
}  # fmt: skip
"""Per adapter the module of its engine."""
HEALTHY = ("litgpt", "ibm_fms", "keras_hub", "transformer_lens")
"""The adapters whose engines conform to their profiles."""
CASES = ("square", "one-shot-chunked-stepwise", "batch-ragged", "shared-prefix", "top-1", "top-all", "tie-second-third")
"""Cases in which an adapter can go wrong: shapes that look alike, cuts of the cache, sequences, slots of every kind."""


def needs(name: str) -> Any:
    missing = find_spec(PACKAGES[name]) is None
    return pytest.mark.skipif(missing, reason=f"the engine of the adapter {name} is not installed: {PACKAGES[name]}")


needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CC", "clang")) is None, reason="tinygrad compiles with clang: set CC to its name"
)


def case_named(name: str) -> Case:
    return read_case(GOLDEN / name)


def ran(adapter: Adapter, case: Case, dtype: str, folder: Path) -> Arrays:
    """What an adapter records of a case."""
    write_checkpoint(folder / "model", case.config, case.checkpoint().parameters, dtype="bfloat16")
    adapter.load(folder / "model", dtype)
    return adapter.run(case.runs(), adapter.taps)


def judged(adapter: Adapter, case: Case, dtype: str, arrays: Arrays, folder: Path) -> Report:
    """The report on what was recorded, under the policy of the adapter."""
    path, name = folder / "trace.safetensors", adapter.policies.get(dtype, dtype)
    write_trace(path, Header(case.runs(), case.name, policy=name), arrays)
    return verify(read_trace(path), case.name, case.config, case.checkpoint().parameters, case.runs(), policy(name))


def failed(report: Report) -> set[str]:
    return {check.step for check in report.checks if check.verdict == "fail"}


def run(past: int, tokens: int, start: int) -> Run:
    return Run("prefill", "chunk", 0, (1,) * tokens, tuple(range(start, start + tokens)), past)


# ---- what is recorded


def test_each_promised_tap_has_a_name_or_a_function() -> None:
    """A tap without either would make every run a broken answer."""
    by_functions = {"attention.q_rope", "attention.k_rope", "router.experts", "router.weights"}
    experts = {tap for tap in TAPS if tap.startswith("expert.")}
    split = {"attention.q", "attention.k", "attention.v"}
    assert set(litgpt.Adapter.taps) == {*litgpt.NAMES.values()} - {"attention.qkv"} | split | by_functions | experts
    assert set(ibm_fms.Adapter.taps) == {*ibm_fms.NAMES.values()} | by_functions | experts | {"residual"}
    recorded = {*tinygrad.OUTPUTS.values(), *tinygrad.INPUTS.values()} | by_functions
    assert set(tinygrad.Adapter.taps) == recorded | {*tinygrad.STATES}
    assert keras_hub.Adapter.taps == TAPS
    named = {*transformer_lens.NAMES.values()}
    assert set(transformer_lens.Adapter.taps) == named | experts | {"attention.scores", "router.weights"}


@pytest.mark.parametrize("name", PACKAGES)
def test_every_policy_of_an_adapter_is_one(name: str) -> None:
    named = {"keras_hub": {**keras_hub.POLICIES, "on JAX": keras_hub.ON_JAX["float64"]}}
    for text in (named.get(name) or dict(adapter_class(name).policies)).values():  # type: ignore[attr-defined]
        assert policy(text).name == text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", [pytest.param(n, marks=needs(n)) for n in HEALTHY])
def test_a_healthy_engine_conforms_to_its_profile(name: str, case: str, dtype: str, tmp_path: Path) -> None:
    adapter = adapter_class(name)()
    arrays = ran(adapter, case_named(case), dtype, tmp_path)
    report = judged(adapter, case_named(case), dtype, arrays, tmp_path)
    assert report.verdict == CONFORMANT, failed(report)


@pytest.mark.parametrize("name", [pytest.param(n, marks=needs(n)) for n in HEALTHY])
def test_fewer_taps_have_the_same_values(name: str, tmp_path: Path) -> None:
    adapter, case = adapter_class(name)(), case_named("one-pair")
    every = ran(adapter, case, "float32", tmp_path)
    some = adapter.run(case.runs(), ("expert.output", "router.weights", "logits"))
    kept = {key for key in every if key.endswith(("expert.output", "router.weights", "/logits"))}
    assert kept
    for key in kept:
        np.testing.assert_array_equal(some[key], every[key])


# ---- what deviates


@needs("litgpt")
def test_litgpt_writes_its_ring_before_a_chunk_is_attended_to(tmp_path: Path) -> None:
    """A call of one token is right. In a chunk beyond the window, early tokens see what has overwritten their past."""
    adapter, case = litgpt.Adapter(), case_named("dyadic-top-4")
    assert case.config.window is not None
    report = judged(adapter, case, "float32", ran(adapter, case, "float32", tmp_path), tmp_path)
    assert report.verdict == NOT_CONFORMANT
    assert failed(report) == {"attention.context"}
    chunks = {r.run for r in case.runs() if r.op == "chunk" and r.past + len(r.tokens) > case.config.window}
    assert {check.run for check in report.checks if check.verdict == "fail"} == chunks


@needs("ibm_fms")
def test_ibm_fms_takes_tokens_for_heads_where_there_are_as_many(tmp_path: Path) -> None:
    """Only without a cache, and only in calls of as many tokens as key/value heads."""
    adapter, case = ibm_fms.Adapter(cache="no"), case_named("token-sweep")
    report = judged(adapter, case, "float32", ran(adapter, case, "float32", tmp_path), tmp_path)
    assert failed(report) == {"attention.context"}
    as_many = {r.run for r in case.runs() if len(r.tokens) == case.config.kv_heads}
    assert {check.run for check in report.checks if check.verdict == "fail"} == as_many


@needs("keras_hub")
def test_products_of_matrices_in_keras_are_float32_where_the_model_is_float64(tmp_path: Path) -> None:
    adapter = keras_hub.Adapter("torch")
    arrays = ran(adapter, case_named("one-pair"), "float64", tmp_path)
    narrow = {key.rpartition("/")[2] for key, array in arrays.items() if array.dtype == np.float32}
    assert {"layers.0.router.logits", "logits"} <= narrow
    assert {"layers.0.attention.q", "layers.0.expert.gate"}.isdisjoint(narrow)


@needs("keras_hub")
def test_keras_hub_rounds_the_factor_of_the_scores(tmp_path: Path) -> None:
    """Scores are float16 dots times a float16 factor, bit for bit. A head of 6 has a factor that float16 lacks."""
    adapter, case = keras_hub.Adapter("torch"), case_named("dims-distinct")
    arrays = ran(adapter, case, "float16", tmp_path)
    q, k = (arrays[f"prefill/layers.0.attention.{name}_rope"].astype(np.float64) for name in "qk")
    dots = np.einsum("thd,shd->hts", q, np.repeat(k, q.shape[1] // k.shape[1], axis=1)).astype(np.float16)
    visible = np.tril(np.ones(dots.shape[1:], bool))
    found = arrays["prefill/layers.0.attention.scores"]
    factor = case.config.head_dim**-0.5
    assert (found == dots * np.float16(factor))[:, visible].all()
    assert (found != (dots * np.float64(factor)).astype(np.float16))[:, visible].any()


@pytest.mark.slow  # tinygrad compiles every operation
@needs("tinygrad")
@needs_compiler
def test_tinygrad_deviates_in_rotations_alone(tmp_path: Path) -> None:
    """Its cosine of x is the sine of pi / 2 - x, rounded first."""
    adapter, case = tinygrad.Adapter(), case_named("one-pair")
    report = judged(adapter, case, "float32", ran(adapter, case, "float32", tmp_path), tmp_path)
    assert failed(report) == {"attention.q_rope", "attention.k_rope"}


# ---- what is skipped


def test_litgpt_skips_what_its_cache_cannot_hold() -> None:
    litgpt.refuse_early([run(0, 4, 0), run(4, 2, 4), run(1, 3, 1)], context=8, window=None)
    litgpt.refuse_early([run(0, 4, 0), run(1, 3, 1)], context=8, window=4)
    with pytest.raises(Skipped, match="starts at position 4"):
        litgpt.refuse_early([run(0, 4, 4)], context=8, window=None)
    with pytest.raises(Skipped, match="has position 8"):
        litgpt.refuse_early([run(0, 9, 0)], context=8, window=None)
    with pytest.raises(Skipped, match="ring of 4 slots"):
        litgpt.refuse_early([run(0, 4, 0), run(4, 1, 4), run(3, 1, 3)], context=8, window=4)


@needs("ibm_fms")
@pytest.mark.parametrize(("name", "reason"), [("window-decode", "no window"), ("positions-32768", "32768 positions")])
def test_ibm_fms_skips_what_it_has_not(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(Skipped, match=reason):
        ran(ibm_fms.Adapter(), case_named(name), "float32", tmp_path)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=needs(n)) for n in ("ibm_fms", "keras_hub", "transformer_lens")]
)
def test_a_head_dim_of_its_own_is_skipped(name: str, tmp_path: Path) -> None:
    with pytest.raises(Skipped, match=r"dim / heads = 8( for head_dim)?; it is 10"):
        ran(adapter_class(name)(), case_named("walking-skeleton"), "float32", tmp_path)


@pytest.mark.parametrize("name", [pytest.param(n, marks=needs(n)) for n in ("litgpt", "keras_hub", "transformer_lens")])
def test_a_start_above_position_0_is_skipped(name: str, tmp_path: Path) -> None:
    with pytest.raises(Skipped, match="starts at position 252"):
        ran(adapter_class(name)(), case_named("positions-256"), "float32", tmp_path)
