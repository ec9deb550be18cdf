# SPDX-License-Identifier: Apache-2.0
"""One step alone is enclosed as in a pass over the whole trace, under every policy that a diagnosis tries."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from refmoe.bugs.changed_weights import mapped, with_layers
from refmoe.bugs.run_engine import run
from refmoe.profiles.load import policy
from refmoe.spec.taps import step_of
from refmoe.traces.held import held_trace
from refmoe.verifier.diagnosis.arithmetic import other_arithmetic
from refmoe.verifier.diagnosis.evidence import Evidence, Judged, gather, judge_part, subject_of
from refmoe.verifier.diagnosis.known import Cause
from refmoe.verifier.diagnosis.one_step import OneStep, fails_alone
from refmoe.verifier.findings import FAIL, NOT_CONFORMANT
from tests.bugs.judging import case_named, judged, parameters_of, traced


@cache
def evidence_of(case: str, made: str, declared: str, bug: str | None = None) -> Evidence:
    """The evidence of a failed trace.   made: the policy of the engine   declared: the one that it is judged by"""
    if bug is not None:
        trace = traced(bug, case, made)
    else:
        trace = run(None, case_named(case).config, parameters_of(case), case_named(case).runs(), policy(made))
    arrays = {key: np.array(tensor.get()) for key, tensor in trace.tensors.items()}
    trace = held_trace(replace(trace.header, policy=declared), arrays)
    report = judged(trace, case, declared)
    assert report.verdict == NOT_CONFORMANT
    found = case_named(case)
    return gather(trace, found.config, parameters_of(case), found.runs(), policy(declared), report)


def under(evidence: Evidence, cause: Cause) -> Judged:
    """The whole trace, judged under a cause."""
    used = cause.variation.policy(evidence.policy)
    return judge_part(evidence, evidence.whole, subject_of(evidence, cause.variation), used)


FAILED = [
    ("dims-distinct", "float32", "float32", "attn-scale-missing"),
    ("window-chunks", "bfloat16", "bfloat16", "rope-sign-flipped"),
    ("dims-distinct", "float32", "float64", "expert-gelu"),
    ("dims-distinct", "float32+cache=float16", "float32", None),
]


@pytest.mark.parametrize(("case", "made", "declared", "bug"), FAILED)
def test_a_step_alone_has_the_enclosure_of_a_whole_pass(case: str, made: str, declared: str, bug: str | None) -> None:
    evidence = evidence_of(case, made, declared, bug)
    for cause in other_arithmetic(evidence.policy, evidence.right.config.head_dim):
        used = cause.variation.policy(evidence.policy)
        alone = OneStep(evidence, used)
        for key, whole in under(evidence, cause).recorded.items():
            x, step = alone.right(key), step_of(key[1])
            x = x if x.biased or (x.owed and used.at(step) == x.accumulation) else x.settle()
            for part, wanted in ((x.mid, whole.mid), (x.r, whole.radius), (x.v, whole.variance)):
                values: Any = np.broadcast_to(part, evidence.trace.get(*key).shape).reshape(-1)
                read = np.broadcast_to(whole.read, values.shape)
                np.testing.assert_allclose(values[read], wanted[read], rtol=1e-12, err_msg=f"{cause.name}: {key}")


@pytest.mark.parametrize(("case", "made", "declared", "bug"), FAILED)
def test_what_fails_alone_fails_in_the_whole_trace(case: str, made: str, declared: str, bug: str | None) -> None:
    evidence = evidence_of(case, made, declared, bug)
    causes = list(other_arithmetic(evidence.policy, evidence.right.config.head_dim))
    alone = [cause for cause in causes if fails_alone(evidence, cause.variation.policy(evidence.policy))]
    assert alone  # some policy is refuted by one step
    for cause in alone:
        assert FAIL in under(evidence, cause).verdicts.values(), cause.name


def test_the_arithmetic_of_the_engine_does_not_fail_alone() -> None:
    evidence = evidence_of("dims-distinct", "float32+cache=float16", "float32")
    assert fails_alone(evidence, policy("float32"))
    assert not fails_alone(evidence, policy("float32+cache=float16"))


def test_a_weight_prepared_for_one_product_is_not_read_by_another() -> None:
    """A product in float32 rounds its matrix to float32. Under plain float64 the same matrix keeps its digits."""
    shared = evidence_of("dims-distinct", "float32", "float64", "expert-gelu")

    def finer(layer: Any) -> Any:
        return replace(layer, router=mapped(layer.router, lambda values: values.astype(np.float64) * (1 + 2.0**-30)))

    right = replace(shared.right, parameters=with_layers(shared.right.parameters, finer))
    causes = {cause.name: cause for cause in other_arithmetic(shared.policy, shared.right.config.head_dim)}
    plain, own = causes["float64+flushes=true"], causes["float64+router.logits.accumulation=float32"]
    fresh = under(replace(shared, right=right, weights={}), plain).recorded
    evidence = replace(shared, right=right, weights={})
    under(evidence, own)
    again = under(evidence, plain).recorded
    for key, wanted in fresh.items():
        np.testing.assert_array_equal(again[key].mid, wanted.mid, err_msg=str(key))
        np.testing.assert_array_equal(again[key].radius, wanted.radius, err_msg=str(key))
