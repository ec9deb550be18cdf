# SPDX-License-Identifier: Apache-2.0
"""mlx-lm on a CPU, judged by its profile. Tests measure the errors that the profile allows beyond float32."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refmoe.checkpoints.write import write_checkpoint
from refmoe.engines.adapter import Arrays, Skipped
from refmoe.engines.adapters import mlx_lm, mlx_lm_watch
from refmoe.engines.capture.names import tap_of
from refmoe.errors import InputError
from refmoe.profiles.load import policy
from refmoe.suite import Case, read_case
from refmoe.suite.manifest import trace_path
from refmoe.traces.trace import Header, read_trace, write_trace
from refmoe.verifier.findings import CONFORMANT, NOT_CONFORMANT, Report
from refmoe.verifier.verify import verify

GOLDEN = Path(__file__).parents[2] / "golden"
needs_engine = pytest.mark.skipif(
    find_spec("mlx_lm") is None or find_spec("mlx") is None, reason="mlx-lm not installed: pip install -e '.[mlx]'"
)

CASES = (
    "batch-ragged", "shared-prefix", "packed", "one-shot-chunked-stepwise", "positions-32768", "square", "token-sweep",
    "top-1", "top-all", "experts-12", "tie-second-third", "attention-underflow", "huge-activations", "zero-row",
)  # fmt: skip
"""Cases in which an adapter can go wrong: sequences, cuts of the cache, shapes of every kind, slots of sorted rows."""


def loaded(case: Case, folder: Path) -> mlx_lm.Adapter:
    """An adapter with the case's model."""
    write_checkpoint(folder / "model", case.config, case.checkpoint().parameters, dtype="bfloat16")
    adapter = mlx_lm.Adapter()
    adapter.load(folder / "model", "float32")
    return adapter


def judged(case: Case, arrays: Arrays, folder: Path) -> Report:
    """The report on arrays under the profile."""
    path, name = folder / "trace.safetensors", mlx_lm.Adapter.policies["float32"]
    write_trace(path, Header(case.runs(), case.name, policy=name), arrays)
    return verify(read_trace(path), case.name, case.config, case.checkpoint().parameters, case.runs(), policy(name))


def test_each_promised_tap_has_a_name_or_a_function() -> None:
    named = set(mlx_lm_watch.NAMES.values())
    assert len(named) == len(mlx_lm_watch.NAMES)
    assert set(mlx_lm.Adapter.taps) == named | {"attention.q_rope", "attention.k_rope", "router.weights"}
    down = "model.layers.3.block_sparse_moe.switch_mlp.down_proj:in0"
    assert tap_of(mlx_lm_watch.NAMES, down) == "layers.3.expert.hidden"


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    with pytest.raises((InputError, ModuleNotFoundError), match="mlx"):
        mlx_lm.Adapter()


@needs_engine
@pytest.mark.parametrize("name", CASES)
def test_mlx_lm_conforms_to_its_profile(name: str, tmp_path: Path) -> None:
    case = read_case(GOLDEN / name)
    adapter = loaded(case, tmp_path)
    report = judged(case, adapter.run(case.runs(), adapter.taps), tmp_path)
    assert report.verdict == CONFORMANT, report.headline
    assert set(report.missing) == set(mlx_lm.UNSEEN)
    assert report.unknown == ()


@needs_engine
def test_where_every_sum_is_exact_mlx_lm_has_the_golden_bits(tmp_path: Path) -> None:
    case = read_case(GOLDEN / "dyadic")
    adapter = loaded(case, tmp_path)
    golden = read_trace(trace_path(GOLDEN / "dyadic"))
    exact = ("embedding", "attention.v", "expert.up", "attention_residual", "residual", "logits")
    for key, array in adapter.run(case.runs(), exact).items():
        run, _, tap = key.partition("/")
        np.testing.assert_array_equal(array, golden.get(run, tap), err_msg=key)


@needs_engine
def test_only_the_taps_asked_for(tmp_path: Path) -> None:
    case = read_case(GOLDEN / "token-sweep")
    adapter = loaded(case, tmp_path)
    every = adapter.run(case.runs(), adapter.taps)
    some = adapter.run(case.runs(), {"logits", "attention.k_rope", "expert.output"})
    assert some.keys() == {k for k in every if k.endswith(("/logits", ".attention.k_rope", ".expert.output"))}
    for key, array in some.items():
        np.testing.assert_array_equal(array, every[key])


@needs_engine
@pytest.mark.parametrize("name", ["window-decode", "window-chunks", "dyadic-top-4"])
def test_mlx_lm_does_not_know_the_window(name: str, tmp_path: Path) -> None:
    """With a window in the model, only attention is wrong; without it, nothing."""
    case = read_case(GOLDEN / name)
    adapter = loaded(case, tmp_path)
    arrays = adapter.run(case.runs(), adapter.taps)
    report = judged(case, arrays, tmp_path)
    assert report.verdict == NOT_CONFORMANT
    assert {check.step for check in report.checks if check.verdict == "fail"} == {"attention.context"}
    without = replace(case, config=replace(case.config, window=None))
    assert judged(without, arrays, tmp_path).verdict == CONFORMANT


@needs_engine
def test_a_head_dim_of_its_own_is_skipped(tmp_path: Path) -> None:
    with pytest.raises(Skipped, match=r"hidden_size / heads = 8; it is 10"):
        loaded(read_case(GOLDEN / "walking-skeleton"), tmp_path)


@needs_engine
def test_rope_and_exp_are_within_the_budgets_of_the_profile() -> None:
    """The frequencies of rope need more than float32's budget; exp does not."""
    import mlx.core as mx  # type: ignore[import-not-found, unused-ignore]

    mx.set_default_device(mx.cpu)
    unit = 2.0**-24
    allowed, usual = policy("mlx-float32"), policy("float32")

    def units(found: Any, exact: Any) -> Any:
        return np.abs(np.array(found).astype(np.float64) / exact - 1) / unit

    beyond = []
    for theta in (1e4, 3e4, 1e5, 5e5, 1e6, 1e7):
        for half in (2, 4, 8, 32, 40, 48, 64, 128):
            step = np.float32(np.log(np.float32(theta))) / np.float32(half)
            x = np.arange(half) * math.log(theta) / half
            error = units(mx.exp(mx.arange(0, -half, -1, dtype=mx.float32) * mx.array(step)), np.exp(-x))
            assert (error <= allowed.angles.constant + allowed.angles.slope * x).all(), (theta, half)
            beyond.append((error > usual.angles.constant + usual.angles.slope * x).any())
    assert any(beyond)
    x = np.linspace(-87.3, 0, 100_001, dtype=np.float32)
    error = units(mx.exp(mx.array(x)), np.exp(x.astype(np.float64)))
    assert (error <= usual.exp.constant + usual.exp.slope * np.abs(x)).all()


@needs_engine
def test_rope_is_made_as_the_profile_says() -> None:
    """mlx.fast.rope has the bits of exp, product, cos and sin in this order."""
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    theta, half, first = 1e6, 64, 4090
    x = mx.array(np.random.default_rng(1).standard_normal((1, 2, 7, 2 * half)).astype(np.float32))
    step = np.float32(np.log(np.float32(theta))) / np.float32(half)
    frequency = mx.exp(mx.arange(0, -half, -1, dtype=mx.float32) * mx.array(step))
    angle = (mx.arange(7, dtype=mx.float32) + first)[:, None] * frequency
    cos, sin, a, b = mx.cos(angle), mx.sin(angle), x[..., :half], x[..., half:]
    expected = mx.concatenate([a * cos - b * sin, a * sin + b * cos], -1)
    found = mx.fast.rope(x, 2 * half, traditional=False, base=theta, scale=1.0, offset=first)
    np.testing.assert_array_equal(np.array(found), np.array(expected))
