# SPDX-License-Identifier: Apache-2.0
"""The intervals of a free run: no healthy engine is outside, whatever it rounds and whichever open choice it makes."""

from __future__ import annotations

from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.pack import outside
from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.arithmetic.formats import FLOAT32, nearest
from refmoe.arithmetic.native.ops import NativeOps
from refmoe.bugs.run_engine import run
from refmoe.checkpoints.write import write_checkpoint
from refmoe.profiles.load import policy
from refmoe.spec.model import Model
from refmoe.steps.grouped import GROUPED_STEPS
from refmoe.steps.policy_ops import PolicyOps
from refmoe.steps.rounding import CUT_STEPS
from refmoe.suite import Case, find_cases, read_case
from refmoe.suite.pack.contents import Judged, taps_of
from refmoe.suite.pack.legal import DTYPES, MAY, MUST, NO, choices, legal
from refmoe.traces.held import held_trace
from refmoe.traces.script import execute
from refmoe.traces.trace import Header, Recorder
from tests.pack.packs import GOLDEN

CASES = ("window-1", "tie-second-third", "near-tie", "huge-activations", "four-layers", "window-decode")
"""Windows, ties, overflow in float16, and errors that add up over four layers."""


@pytest.fixture(scope="module")
def judged() -> Any:
    """The taps of a case, made once."""
    made: dict[str, tuple[Case, list[Judged]]] = {}

    def of(name: str) -> tuple[Case, list[Judged]]:
        if name not in made:
            case = read_case(GOLDEN / name)
            made[name] = case, taps_of(case)
        return made[name]

    return of


def trace_of(case: Case, arrays: dict[str, Any]) -> Any:
    return held_trace(Header(runs=case.runs()), arrays)


class Wavering(PolicyOps):
    """An engine that rounds as it likes: each value to its dtype or to float32, each sum in some order of float32."""

    def __init__(self, rules: Any, tap: Any, seed: int) -> None:
        super().__init__(rules, tap)
        self.random = np.random.default_rng(seed)

    def cut(self, name: str, x: Any) -> Any:
        format = self.policy.at(name)
        coarse = self.random.random(x.shape) < 0.75
        return np.where(coarse, nearest(x, format), nearest(x, FLOAT32 if FLOAT32.holds(format) else format))

    def linear(self, x: Any, weight: Any) -> Any:
        exact = super().linear(x, weight)
        sizes = np.abs(x) @ np.abs(np.asarray(weight.read(), np.float64)).T
        # rounding errors of a sum in float32 are of this size, and never above the proven bound, n units
        return exact + np.clip(self.random.standard_normal(exact.shape), -3, 3) * FLOAT32.u * sizes / 2


def wavering(case: Case, dtype: str, seed: int) -> Any:
    """The trace of an engine that rounds as it likes."""
    recorder = Recorder()
    with np.errstate(all="ignore"):
        model = Model(case.config, case.checkpoint().parameters, CUT_STEPS)
        execute(Wavering(policy(dtype), recorder, seed), model, case.runs(), recorder)
    return trace_of(case, recorder.arrays)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_roundings_stay_inside(name: str, dtype: str, judged: Any) -> None:
    case, taps = judged(name)
    for seed in range(4):
        assert outside(taps, wavering(case, dtype, seed), dtype) == {}


ARITHMETICS = {
    "float32": ("float32", "float64", "hf-float32", "hf-float64", "mlx-float32", "llama.cpp-float32"),
    "bfloat16": ("bfloat16", "float32", "hf-bfloat16", "mistral-bfloat16", "litgpt-bfloat16", "float16"),
    "float16": ("float16", "float32", "hf-float16", "litgpt-float16", "onnx-float16"),
}
"""Per dtype of a pack the policies of engines that it must accept: its own, finer ones and those of real engines."""


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "engine"), [(dtype, each) for dtype in DTYPES for each in ARITHMETICS[dtype]])
def test_ideal_runs_of_finer_policies_stay_inside(name: str, dtype: str, engine: str, judged: Any) -> None:
    case, taps = judged(name)
    if engine == "float16" != dtype and name == "huge-activations":
        pytest.skip("float16 overflows there, where bfloat16 does not")
    trace = run(None, case.config, case.checkpoint().parameters, case.runs(), policy(engine))
    assert outside(taps, trace, dtype) == {}


@pytest.mark.parametrize("name", CASES)
def test_the_native_arithmetic_stays_inside(name: str, judged: Any) -> None:
    case, taps = judged(name)
    recorder = Recorder()
    model = Model(case.config, case.checkpoint().parameters, GROUPED_STEPS)
    execute(NativeOps("float32", recorder), model, case.runs(), recorder)
    for dtype in DTYPES:
        assert outside(taps, trace_of(case, recorder.arrays), dtype) == {}


class Contrary(PolicyOps):
    """An engine that makes each open choice the other way."""

    def __init__(self, rules: Any, recorder: Recorder, states: dict[tuple[str, str], Any]) -> None:
        super().__init__(rules, recorder)
        self.recorder, self.states = recorder, states
        self.turned: list[str] = []  # one list in all copies of the ops

    def top_k(self, x: Any, k: int) -> Any:
        ids, name = super().top_k(x, k), f"{self._prefix}router.experts"
        for t, state in enumerate(self.states[self.recorder.run, name]):
            may, must = ([int(e) for e in np.flatnonzero(state == kind)] for kind in (MAY, MUST))
            if may:
                # of the legal choices the one that has least in common with its own
                own = {*ids[t].tolist()}
                sets = [(*must, *each) for each in combinations(may, k - len(must))]
                ids[t] = min(sets, key=lambda each: len({*each} & own))
                self.turned.append(name)
        return ids


def contrary(case: Case, dtype: str) -> tuple[Any, list[str]]:
    """The trace of an engine that makes each open choice the other way, and the taps where it did."""
    recorder = Recorder()
    ops = Contrary(policy(dtype), recorder, legal(case, dtype).experts)
    with np.errstate(all="ignore"):
        execute(ops, Model(case.config, case.checkpoint().parameters, CUT_STEPS), case.runs(), recorder)
    return trace_of(case, recorder.arrays), ops.turned


@pytest.mark.parametrize("name", ["window-1", "tie-second-third", "near-tie", "window-decode", "batch-ragged"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_either_choice_is_legal_where_rounding_can_decide(name: str, dtype: str, judged: Any) -> None:
    """What an open choice of experts changes is not judged: in its token, nor in those that attend to it."""
    case, taps = judged(name)
    trace, turned = contrary(case, dtype)
    assert outside(taps, trace, dtype) == {}
    assert turned or dtype != "bfloat16"


@pytest.mark.engines
@pytest.mark.parametrize("name", [*CASES, "batch-ragged"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_transformers_stays_inside(name: str, dtype: str, judged: Any, tmp_path: Path) -> None:
    """Its router takes softmax first, and its attention is the eager one, which has all taps."""
    pytest.importorskip("transformers")
    from refmoe.engines.capture import transformers as engine

    case, taps = judged(name)
    write_checkpoint(tmp_path / "model", case.config, case.checkpoint().parameters, "float32")
    recorder = Recorder()
    engine.capture(engine.load_model(tmp_path / "model", dtype, "eager"), case.runs(), recorder)
    there = [each for each in taps if f"{each.run.run}/{each.tap}" in recorder.arrays]
    assert len(there) > len(taps) / 2
    assert outside(there, trace_of(case, recorder.arrays), dtype) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", [folder.name for folder in find_cases(GOLDEN)])
def test_no_honest_engine_is_outside_in_any_case(name: str) -> None:
    case = read_case(GOLDEN / name)
    taps, found = taps_of(case), {}
    for dtype in DTYPES:
        found[dtype, "contrary"] = outside(taps, contrary(case, dtype)[0], dtype)
        found[dtype, "wavering"] = outside(taps, wavering(case, dtype, 11), dtype)
        for engine in ARITHMETICS[dtype]:
            if engine == dtype or policy(engine).storage.name == dtype:
                trace = run(None, case.config, case.checkpoint().parameters, case.runs(), policy(engine))
                found[dtype, engine] = outside(taps, trace, dtype)
    assert {where: wrong for where, wrong in found.items() if wrong} == {}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-6, 6), st.integers(0, 3)), min_size=3, max_size=5), st.integers(1, 3))
def test_states_are_those_of_all_corners(logits: list[tuple[int, int]], k: int) -> None:
    """Every logit is at one of its ends, in all combinations, and equal ones may be chosen either way."""
    mid, radius = np.array([[m for m, _ in logits]], float), np.array([[r for _, r in logits]], float)
    k = min(k, len(logits) - 1)
    found = choices(Enclosure(mid, radius, None), k, policy("float64+router_order=top-k-then-softmax"))[0]
    sets = set()
    for ends in product(*[sorted({m - r, m + r}) for m, r in logits]):
        for each in combinations(range(len(logits)), k):
            rest = [end for e, end in enumerate(ends) if e not in each]
            if min(ends[e] for e in each) >= max(rest):
                sets.add(each)
    for e in range(len(logits)):
        within = [e in each for each in sets]
        assert found[e] == (MUST if all(within) else MAY if any(within) else NO)


def test_few_values_are_left_out() -> None:
    """In float32 all values of a case without ties are judged, but masked scores."""
    case = read_case(GOLDEN / "one-pair")
    for tap in taps_of(case):
        if tap.bases and not tap.tap.endswith("scores"):
            assert tap.judged[0] == np.prod(tap.shape), tap.tap
