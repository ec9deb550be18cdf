# SPDX-License-Identifier: Apache-2.0
"""The profiles of transformers, held against what transformers computes, bit by bit.

The ideal run takes the engine's own value at every tap, so that each step is compared alone. It rounds at the cut
points and nowhere else; the engine also rounds inside its sums. Where storage is narrow, this moves a stored value only
if the exact one lies within that error of a tie. The error of n float32 additions is about sqrt(n) 2^-25 of the result,
here 2^-21.6; twice that over a spacing of at least 2^-8 (bfloat16) or 2^-11 (float16) is one value in 6200 or 780. Ten
times as many are allowed, for terms that cancel and for other machines. A cut point in the wrong place moves every
value whose two roundings disagree: about a quarter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from refmoe.checkpoints.load import load_checkpoint
from refmoe.profiles.load import policy
from refmoe.spec.model import Model
from refmoe.steps.policy_ops import PolicyOps
from refmoe.steps.rounding import CUT_STEPS
from refmoe.traces.script import execute, plan
from refmoe.traces.trace import Recorder, Run
from tests.capture.test_transformers import save_tiny_mixtral

pytestmark = pytest.mark.engines

VOCAB = 64
TOKENS = np.random.default_rng(0).integers(0, VOCAB, 40).tolist()
RUNS: tuple[Run, ...] = plan([("prefill", 0, TOKENS), ("chunk", 0, TOKENS[:8]), ("decode", 0, [3, 8, 5])], VOCAB)

Agreement = Callable[[str], dict[str, Any]]

ONE_IN = {"bfloat16": 620, "float16": 78}
"""At most one value in so many differs, as said above; and two more, in a step of few values."""


@pytest.fixture(scope="module")
def agreement(tmp_path_factory: pytest.TempPathFactory) -> Agreement:
    """Per step, which of the engine's values the ideal run of a profile of transformers has as well: booleans.

    Three experts per token, so that there is a partial sum; 1 / sqrt(head_dim) is no power of two, so that scaling
    rounds.
    """
    folder = tmp_path_factory.mktemp("engine")
    save_tiny_mixtral(
        folder, hidden_size=64, intermediate_size=112, num_attention_heads=4, num_key_value_heads=2, head_dim=24,
        vocab_size=VOCAB, num_experts_per_tok=3,
    )  # fmt: skip
    loaded = load_checkpoint(folder)
    captured: dict[str, dict[str, Any]] = {}

    def measure(name: str) -> dict[str, Any]:
        from refmoe.engines.capture.transformers import capture, header, load_model

        dtype = name.partition("+")[0].removeprefix("hf-")
        if dtype not in captured:
            recorder, engine = Recorder(), load_model(folder, dtype)
            capture(engine, RUNS, recorder)
            assert header(engine, RUNS).policy == f"hf-{dtype}"
            captured[dtype] = recorder.arrays
        return compare(name, loaded, captured[dtype])

    return measure


def compare(name: str, loaded: Any, engine: dict[str, Any]) -> dict[str, Any]:
    """Per step, over all layers and runs, which values are equal: booleans [n]."""
    same: dict[str, list[Any]] = {}
    recorder = Recorder("")

    def tap(tap_name: str, ideal: Any) -> Any:
        recorder(tap_name, ideal)
        found = engine.get(f"{recorder.run}/{tap_name}")
        if found is not None:
            step = tap_name.split(".", 2)[2] if tap_name.startswith("layers.") else tap_name
            prefix = tap_name.removesuffix(step)
            compared = found == ideal
            if step == "attention.probs":
                compared = compared[:, np.tri(*ideal.shape[1:], ideal.shape[2] - ideal.shape[1], dtype=bool)]
            if step == "moe.output":
                # transformers adds in the order of ids, the specification in the order of slots
                chosen = engine[f"{recorder.run}/{prefix}router.experts"]
                compared = compared[chosen.argmax(-1) == chosen.shape[1] - 1]
            same.setdefault(step, []).append(compared.ravel())
        return found

    execute(PolicyOps(policy(name), tap), Model(loaded.config, loaded.parameters, CUT_STEPS), RUNS, recorder)
    return {step: np.concatenate(parts) for step, parts in same.items()}


@pytest.mark.parametrize("dtype", ONE_IN)
def test_the_engine_stores_what_the_ideal_run_stores(agreement: Agreement, dtype: str) -> None:
    """Every step in 16 bits, the router's weights aside: they are float32, and see `test_in_wide_dtypes`."""
    found = agreement(f"hf-{dtype}")
    assert len(found) == 23
    for step, same in found.items():
        if step != "router.weights":
            assert (~same).sum() <= 2 + same.size / ONE_IN[dtype], (step, same.mean())
    for step in ("embedding", "attention_residual", "router.experts", "residual"):
        assert found[step].all(), step


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_in_wide_dtypes_a_step_of_single_operations_agrees_entirely(agreement: Agreement, dtype: str) -> None:
    """Where the accumulation dtype is the storage dtype, only what rounds no more often than it is cut can agree.

    At float64 that leaves out the combination: three exact terms are summed exactly, as the specification has it.
    """
    found = agreement(f"hf-{dtype}")
    for step in ("embedding", "attention_residual", "router.experts", "residual"):
        assert found[step].all(), step
    assert found["moe.output"].all() == (dtype == "float32")


NARROW_CUTS = {
    "norm.normed=float32": "attention_norm",
    "rope.table=float32": "attention.q_rope",
    "rope.products=float32": "attention.k_rope",
    "attention.dots=float32": "attention.probs",
    "scale=query": "attention.probs",
    "expert.sigmoid=float16": "expert.hidden",
    "expert.silu=float32": "expert.hidden",
    "combine.weighted=float32": "moe.output",
    "combine.partial=float32": "moe.output",
    "weights=float32": "expert.gate",
}


@pytest.mark.parametrize("dtype", ONE_IN)
@pytest.mark.parametrize("change", NARROW_CUTS)
def test_with_one_cut_point_changed_clearly_fewer_values_agree(agreement: Agreement, dtype: str, change: str) -> None:
    """At least one in fifty is lost; a float16 sigmoid under bfloat16 costs one in thirty, the others one in seven."""
    step = NARROW_CUTS[change]
    lost = agreement(f"hf-{dtype}")[step].mean() - agreement(f"hf-{dtype}+{change}")[step].mean()
    assert lost > 0.02, lost


WIDE_CUTS = {
    "hf-bfloat16+router.probs=bfloat16": "router.weights",
    "hf-float16+norm.input=bfloat16": "attention_norm",
    "hf-float64+norm.normed=float64": "attention_norm",
    "hf-float64+rope.table=float64": "attention.q_rope",
    "hf-float64+attention.probs=float64": "attention.probs",
    "hf-float64+router.weights=float64": "router.weights",
    "hf-float64+norm.input=float64": "attention_norm",
    "hf-float64+attention.softmax_input=float64": "attention.probs",
}


@pytest.mark.parametrize("changed", WIDE_CUTS)
def test_casts_to_float32_are_where_the_profile_says(agreement: Agreement, changed: str) -> None:
    """These steps compute in float32, so a part of their values agrees with the cast in place, and fewer without."""
    step = WIDE_CUTS[changed]
    with_cast, without = (agreement(name)[step].mean() for name in (changed.partition("+")[0], changed))
    assert with_cast - without > 0.02, (with_cast, without)
