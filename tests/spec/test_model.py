# SPDX-License-Identifier: Apache-2.0
"""The forward pass against an independent scalar one, and the laws that hold for every model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refmoe.arithmetic.exact.ops import ExactOps
from refmoe.arithmetic.native.ops import NativeOps
from refmoe.checkpoints.names import named_weights
from refmoe.spec.config import Config
from refmoe.spec.model import Model, forward
from refmoe.spec.taps import LAYER_TAPS, tap_names
from refmoe.traces.script import execute, plan
from refmoe.traces.trace import Recorder
from tests.models import SMALL, random_model, relative_rms
from tests.spec import scalar_mixtral

TOKENS = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 32]

SHAPES = {
    "small": SMALL,
    "square": replace(SMALL, dim=16, heads=4, kv_heads=4, head_dim=4, hidden_dim=16, experts=4, vocab=16),
    "one of each": replace(SMALL, layers=1, heads=1, kv_heads=1, head_dim=2, experts=1, experts_per_token=1),
    "top-3 of 11": replace(SMALL, experts=11, experts_per_token=3),
    "all experts": replace(SMALL, experts_per_token=5),
    "window": replace(SMALL, window=4),
    "window of one": replace(SMALL, window=1),
}


def taps(ops_kind: Any, model: Model, calls: Any, start: int = 0) -> dict[str, Any]:
    recorder = Recorder()
    ops = ops_kind(recorder)
    execute(ops, model, plan(calls, model.config.vocab, start), recorder)
    return recorder.arrays


def native(recorder: Recorder) -> NativeOps:
    return NativeOps(np.float64, recorder)


@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_an_independent_scalar_mixtral(shape: str) -> None:
    """By the result of the whole, of which 1e-13 is what float64 explains here: what each step computes.

    NORM-1 to NORM-3, ROPE-1, ROPE-3 to ROPE-5, ATTN-1 to ATTN-7, SOFTMAX-2, ROUTE-1, ROUTE-2, ROUTE-4, EXPERT-1,
    EXPERT-2, COMBINE-1, MOE-1, LAYER-1, LAYER-2, MODEL-1 to MODEL-4.
    """
    config = SHAPES[shape]
    model = random_model(config)
    tokens = [token % config.vocab for token in TOKENS]
    weights = {name: weight.read().tolist() for name, weight in named_weights(model.parameters).items()}
    expected = scalar_mixtral.run(config, weights, tokens, list(range(7, 7 + len(tokens))))
    found = taps(native, model, [("prefill", 0, tokens)], start=7)
    for name, values in expected.items():
        if name.endswith("experts"):
            assert found[f"prefill/{name}"].tolist() == values
        else:
            assert relative_rms(found[f"prefill/{name}"], values) < 1e-13, name


@pytest.mark.parametrize("shape", ["small", "window", "top-3 of 11"])
def test_one_call_chunks_and_single_tokens_give_the_same_bits(shape: str) -> None:
    """MODEL-4, CACHE-1, CACHE-2, with a window CACHE-3: bit for bit under exact ops, as no row depends on another."""
    model = random_model(SHAPES[shape])
    whole = taps(ExactOps, model, [("prefill", 0, TOKENS)])
    pieces = taps(
        ExactOps, model,
        [("prefill", 0, TOKENS[:5]), ("chunk", 0, TOKENS[5:8]), ("chunk", 0, TOKENS[8:9]), ("decode", 0, TOKENS[9:])],
    )  # fmt: skip
    runs = ["prefill", "chunk1", "chunk2", "decode1", "decode2"]
    for name in tap_names(model.config):
        if name.endswith(("scores", "probs")):
            continue  # their last axis is the cache
        joined = np.concatenate([pieces[f"{run}/{name}"] for run in runs])
        assert np.array_equal(joined, whole[f"prefill/{name}"]), name


def test_a_sequence_in_company_is_the_sequence_alone() -> None:
    """MODEL-5, with calls of two sequences interleaved."""
    model = random_model()
    together = taps(
        ExactOps, model,
        [("prefill", 0, TOKENS[:6]), ("prefill", 1, TOKENS[4:]), ("decode", 0, [1]), ("decode", 1, [2])],
    )  # fmt: skip
    alone = taps(ExactOps, model, [("prefill", 0, TOKENS[4:]), ("decode", 0, [2])])
    assert np.array_equal(together["prefill.row1/logits"], alone["prefill/logits"])
    assert np.array_equal(together["decode1.row1/logits"], alone["decode1/logits"])


def test_the_residual_of_a_token_ignores_what_comes_after() -> None:
    """ATTN-3: causal. The last token changes, and nothing before it does."""
    model = random_model()
    one = taps(ExactOps, model, [("prefill", 0, TOKENS)])["prefill/logits"]
    other = taps(ExactOps, model, [("prefill", 0, [*TOKENS[:-1], 1])])["prefill/logits"]
    assert np.array_equal(one[:-1], other[:-1])
    assert not np.array_equal(one[-1], other[-1])


def test_a_window_hides_exactly_what_is_out_of_it() -> None:
    """ATTN-4: with W = 3 and one layer, a token sees itself and the two before it, not the third."""
    model = random_model(replace(SMALL, layers=1, window=3))
    base = taps(ExactOps, model, [("prefill", 0, TOKENS)])["prefill/logits"]
    for changed in range(len(TOKENS)):
        tokens = [*TOKENS]
        tokens[changed] = (tokens[changed] + 1) % SMALL.vocab
        other = taps(ExactOps, model, [("prefill", 0, tokens)])["prefill/logits"]
        moved = [t for t in range(len(TOKENS)) if not np.array_equal(base[t], other[t])]
        assert moved == [t for t in range(changed, changed + 3) if t < len(TOKENS)]


def test_a_window_as_long_as_the_sequence_is_none() -> None:
    """ATTN-4."""
    model = random_model()
    wide = Model(replace(model.config, window=len(TOKENS)), model.parameters)
    calls = [("prefill", 0, TOKENS)]
    assert np.array_equal(taps(ExactOps, model, calls)["prefill/logits"], taps(ExactOps, wide, calls)["prefill/logits"])


@given(st.permutations(range(5)), st.integers(0, 3))
def test_experts_are_told_apart_by_their_weights_alone(permutation: list[int], seed: int) -> None:
    """ROUTE-2, EXPERT-3, COMBINE-1: experts renumbered, with the gate's rows, change nothing but the ids."""
    model = random_model(seed=seed)
    layers = []
    for layer in model.parameters.layers:
        gate = layer.router.read()[permutation]
        layers.append(replace(layer, router=_fixed(gate), experts=tuple(layer.experts[e] for e in permutation)))
    renumbered = Model(model.config, replace(model.parameters, layers=tuple(layers)))
    calls = [("prefill", 0, TOKENS)]
    one, other = taps(ExactOps, model, calls), taps(ExactOps, renumbered, calls)
    assert np.array_equal(one["prefill/logits"], other["prefill/logits"])
    ids = np.asarray(permutation)[other["prefill/layers.1.router.experts"]]
    assert np.array_equal(ids, one["prefill/layers.1.router.experts"])


def test_every_tap_is_offered_once_with_its_shape() -> None:
    """The table of taps and what the spec offers are the same, in the order of computation."""
    config = SMALL
    seen: list[tuple[str, tuple[int, ...]]] = []
    ops = NativeOps(np.float64, lambda name, x: seen.append((name, x.shape)))
    tokens = ops.integers(TOKENS)
    forward(ops, random_model(config), tokens, ops.integers(range(len(TOKENS))))
    assert [name for name, _ in seen] == list(tap_names(config))
    sizes = {
        "T": 11, "S": 11, "D": 20, "H": 6, "K": 3, "d": 8, "E": 5, "k": 2, "F": 28, "V": 37,
    }  # fmt: skip
    for name, shape in seen:
        tap = name.partition("layers.")[2].partition(".")[2]
        if tap:
            assert shape == tuple(sizes[letter] for letter in LAYER_TAPS[tap].split()), name


def test_what_a_tap_returns_is_what_the_model_goes_on_with() -> None:
    """A step can be replayed from given values: here the routing of layer 0."""
    model = random_model()
    forced = np.array([[4, 0]] * len(TOKENS))
    recorder = Recorder()

    def tap(name: str, x: Any) -> Any:
        recorder(name, x)
        return forced if name == "layers.0.router.experts" else None

    ops = NativeOps(np.float64, tap)
    forward(ops, model, ops.integers(TOKENS), ops.integers(range(len(TOKENS))))
    logits = recorder.arrays["/layers.0.router.logits"]
    weights = np.exp(logits[:, [4, 0]]) / np.exp(logits[:, [4, 0]]).sum(-1, keepdims=True)
    assert relative_rms(recorder.arrays["/layers.0.router.weights"], weights) < 1e-15


def test_a_single_expert_is_never_evaluated_for_nobody() -> None:
    """EXPERT-3: an expert without tokens is not read at all."""
    config: Config = replace(SMALL, layers=1, experts_per_token=1)
    model = random_model(config)
    layer = model.parameters.layers[0]
    gate = np.zeros((5, config.dim))
    broken = replace(layer.experts[3], w1=_fixed(np.full((28, 20), np.nan)))
    experts = tuple(broken if e == 3 else expert for e, expert in enumerate(layer.experts))
    altered = replace(model.parameters, layers=(replace(layer, router=_fixed(gate), experts=experts),))
    logits = taps(native, Model(config, altered), [("prefill", 0, TOKENS)])["prefill/logits"]
    assert np.isfinite(logits).all()


def _fixed(values: Any) -> Any:
    from refmoe.checkpoints.weight import Weight

    return Weight("fixed", values.shape, np.float64, lambda: values, "fixed")
