# SPDX-License-Identifier: Apache-2.0
"""The ideal run of a policy: at float64 the specification itself, elsewhere values of each cut point's dtype."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from refmoe import suite as golden
from refmoe.arithmetic.exact.ops import ExactOps
from refmoe.checkpoints.weight import Weight
from refmoe.profiles.cut_points import CUT_POINTS, INNER_CUTS, INPUT_CUTS
from refmoe.profiles.load import policies, policy
from refmoe.profiles.policy import Policy
from refmoe.spec.model import Model, forward
from refmoe.steps.policy_ops import PolicyOps
from refmoe.steps.rounding import CUT_STEPS
from refmoe.traces.script import execute, plan
from refmoe.traces.trace import Recorder, read_trace
from tests.models import SMALL, random_model

GOLDEN = Path(__file__).parent.parent.parent / "golden"
CALLS = [("prefill", 0, [3, 14, 15, 9, 26, 5, 35]), ("chunk", 0, [7, 9, 32]), ("decode", 0, [3])]


def run(rules: Policy, model: Model | None = None) -> dict[str, Any]:
    """Every tap of a small model, prefill, chunk and decode."""
    model = model or random_model()
    recorder = Recorder()
    rules = replace(rules, kept={cut: replace(how, block=SMALL.head_dim) for cut, how in rules.kept.items()})
    runs = plan(CALLS, SMALL.vocab)
    execute(PolicyOps(rules, recorder), Model(model.config, model.parameters, CUT_STEPS), runs, recorder)
    return recorder.arrays


@pytest.mark.parametrize("folder", golden.find_cases(GOLDEN), ids=lambda path: path.name)
def test_at_float64_the_steps_with_cut_points_are_the_specification_bit_for_bit(folder: Path) -> None:
    case = golden.read_case(folder)
    if case.store != "trace":
        pytest.skip("a large case, of which only fingerprints are kept")
    recorder = Recorder()
    model = Model(case.config, case.checkpoint().parameters, CUT_STEPS)
    execute(PolicyOps(policy("float64"), recorder), model, case.runs(), recorder)
    expected = read_trace(golden.trace_path(folder)).tensors
    assert recorder.arrays.keys() == expected.keys()
    for key, tensor in expected.items():
        assert recorder.arrays[key].tobytes() == tensor.map().tobytes(), key


def test_without_a_tap_the_logits_are_the_same() -> None:
    model = Model(SMALL, random_model().parameters, CUT_STEPS)
    rules = policy("hf-bfloat16")
    tokens = np.array([3, 14, 15])
    silent, _ = forward(PolicyOps(rules), model, tokens, np.arange(3))
    watched, _ = forward(PolicyOps(rules, Recorder()), model, tokens, np.arange(3))
    assert silent.tobytes() == watched.tobytes()
    exact, _ = forward(ExactOps(), random_model(), tokens, np.arange(3))
    assert not np.array_equal(silent, exact)


@pytest.mark.parametrize("rules", policies(), ids=lambda each: each.name)
def test_a_tap_has_the_dtype_of_its_cut_point(rules: Policy) -> None:
    """The values of a float64 model are near under every policy: 2^-8 is the coarsest rounding."""
    found, exact = run(rules), run(policy("float64"))
    for key, array in found.items():
        name = key.partition("/")[2]
        step = name.split(".", 2)[2] if name.startswith("layers.") else name
        if step == "router.experts":
            assert array.dtype == np.int64
        else:
            assert array.dtype == rules.at(step).dtype, step
    assert np.allclose(found["prefill/embedding"].astype(float), exact["prefill/embedding"], rtol=2**-8, atol=0)


def test_each_cut_point_inside_a_step_is_one() -> None:
    """A cut point changed to bfloat16 changes some tap, and no tap before its own step."""
    base = policy("hf-float32")
    before = run(base)
    first = {
        "weights": "embedding", "norm.input": "attention_norm", "norm.normed": "attention_norm",
        "rope.table": "attention.q_rope", "rope.products": "attention.q_rope", "cache.k": "attention.scores",
        "cache.v": "attention.context", "attention.query": "attention.scores", "attention.dots": "attention.scores",
        "attention.softmax_input": "attention.probs", "attention.mixing": "attention.context",
        "router.softmax_input": "router.weights", "router.probs": "router.weights", "expert.sigmoid": "expert.hidden",
        "expert.silu": "expert.hidden", "combine.weighted": "moe.output", "combine.partial": None,
    }  # fmt: skip
    assert first.keys() == INNER_CUTS.keys()
    for cut, step in first.items():
        # with two experts per token there is no partial sum
        assert first_changed(before, run(policy(f"hf-float32+{cut}=bfloat16"))) == step, cut
        assert step is None or step in CUT_POINTS[cut].shown_by, cut


def first_changed(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """The first tap of the first layer that differs, without run and layer."""
    changed = [key for key in before if not np.array_equal(before[key], after[key])]
    return changed[0].removeprefix("prefill/layers.0.").removeprefix("prefill/") if changed else None


@pytest.mark.parametrize("cut", INPUT_CUTS)
def test_the_input_of_one_product_changes_that_product_and_not_the_tap_that_it_reads(cut: str) -> None:
    base = policy("hf-float32")
    assert first_changed(run(base), run(policy(f"hf-float32+{cut}=bfloat16"))) == cut.removesuffix(".input")


def test_parts_of_ranks_are_stored_and_added_in_their_dtype() -> None:
    """Four ranks with 256, 1, 1, 1 in bfloat16: 256 in the order of ranks. Exactly it is 259."""
    stored = np.array([[256.0, 1.0, 1.0, 1.0]])
    weight = Weight("layers.0.attention.wo", stored.shape, np.float64, source=lambda: stored, origin="w")
    for rules, total in (("bfloat16+ranks=4", 256.0), ("bfloat16+ranks=4+rank.partial=float32", 259.0)):
        assert PolicyOps(policy(rules)).linear(np.ones((1, 4)), weight).tolist() == [[total]]
    assert PolicyOps(policy("bfloat16")).linear(np.ones((1, 4)), weight).tolist() == [[259.0]]
    terms = stored.reshape(1, 4, 1)
    assert PolicyOps(policy("bfloat16+ranks=4+combine.partial=float32")).accumulate(terms, axis=1).tolist() == [[256.0]]


def test_what_a_tap_returns_is_what_the_run_goes_on_with() -> None:
    """An engine's bfloat16 array in place of the run's own."""
    rules = policy("hf-bfloat16")
    seen = {}

    def tap(name: str, x: Any) -> Any:
        seen[name] = x
        return np.ones(x.shape, ml_dtypes.bfloat16) if name == "layers.0.attention.context" else None

    model = Model(SMALL, random_model().parameters, CUT_STEPS)
    forward(PolicyOps(rules, tap), model, np.array([3, 14, 15]), np.arange(3))
    rows = seen["layers.0.attention.output"].astype(float)
    assert np.ptp(rows, axis=0).max() == 0
    assert np.ptp(rows, axis=1).max() > 0


def test_the_order_of_softmax_and_choice() -> None:
    """Logits (200, 0, 1, -3): after a float32 softmax all but the first are 0, and the lower id comes second."""
    logits = np.array([[200.0, 0.0, 1.0, -3.0]])
    chosen = {}
    for order in ("top-k-then-softmax", "softmax-then-top-k"):
        ops = PolicyOps(policy(f"float32+router_order={order}"))
        chosen[order] = ops.top_k(logits, 2)
        assert np.allclose(ops.weigh(logits, chosen[order]), [[1, 0]])
    assert chosen["top-k-then-softmax"].tolist() == [[0, 2]]
    assert chosen["softmax-then-top-k"].tolist() == [[0, 1]]


def test_partial_sums_are_rounded_and_the_last_is_not() -> None:
    """256 + 1 is 256 in bfloat16, so 256 + 1 + 1 is 257 before it is stored; exactly it is 258."""
    terms = np.array([[[256.0], [1.0], [1.0]]])
    for rules, total in (("bfloat16", 257.0), ("bfloat16+combine.partial=float32", 258.0), ("float64", 258.0)):
        assert PolicyOps(policy(rules)).accumulate(terms, axis=1).tolist() == [[total]]


def test_weights_are_rounded_before_they_are_used() -> None:
    """In a product, in a table, in a gain: to the dtype that the engine holds them in."""
    stored = np.array([[1 + 2**-9, 1 + 3 * 2**-9]])
    held, ops = [1.0, 1 + 2**-7], PolicyOps(policy("bfloat16"))
    weight = Weight("w", stored.shape, np.float64, source=lambda: stored, origin="w")
    assert ops.linear(np.eye(2), weight)[:, 0].tolist() == held
    assert ops.embed(weight, np.array([0]))[0].tolist() == held
    assert ops.vector(Weight("g", (2,), np.float64, source=lambda: stored[0], origin="g")).tolist() == held


def test_a_value_beyond_the_dtype_is_infinite() -> None:
    ops = PolicyOps(policy("float16"))
    assert ops.cut("attention.dots", np.array([65519.0, -65520.0])).tolist() == [65504.0, -np.inf]
    assert np.isposinf(ops.tap("moe.output", np.array([7e4])))
