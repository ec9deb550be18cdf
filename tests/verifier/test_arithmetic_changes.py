# SPDX-License-Identifier: Apache-2.0
"""Diagnosis proposes the change of a policy that describes an honest engine, and the narrowest that does."""

from __future__ import annotations

import numpy as np
import pytest

from refmoe.profiles.load import policy
from refmoe.spec.model import Model
from refmoe.steps.policy_ops import PolicyOps
from refmoe.steps.rounding import CUT_STEPS
from refmoe.traces.held import held_trace
from refmoe.traces.script import execute
from refmoe.traces.trace import Header, Recorder, Trace
from refmoe.verifier.diagnosis import diagnose
from refmoe.verifier.diagnosis.arithmetic import CHANGES, touched_by
from refmoe.verifier.findings import ARITHMETIC, NOT_CONFORMANT, Explanation
from tests.verifier.ranked_engines import FORMS, PARAMETERS, RANKED, RUNS, Ranks, judged, ranked_trace


def ideal_trace(name: str) -> Trace:
    """The ideal engine of a policy."""
    recorder = Recorder()
    execute(PolicyOps(policy(name), recorder), Model(RANKED, PARAMETERS, CUT_STEPS), RUNS, recorder)
    header = Header(runs=RUNS, case=None, checkpoint=None, policy=name, producer={"name": "ideal"})
    return held_trace(header, recorder.arrays, "ideal")


def explained(trace: Trace, declared: str) -> list[Explanation]:
    """The explanations that hold of a trace that its declared policy fails."""
    report = judged(trace, declared)
    assert report.verdict == NOT_CONFORMANT
    found = diagnose(trace, RANKED, PARAMETERS, None, policy(declared), report, ())
    return [each for each in found if each.explains]


@pytest.mark.parametrize(
    ("declared", "change"),
    [
        ("float32", "linear.input=float16+router.logits.input=float32"),
        ("float32", "linear.input=bfloat16"),
        ("float32", "cache=float16"),
        ("float64", "islands=float32"),
    ],
)
def test_the_change_of_an_ideal_engine_is_named_first(declared: str, change: str) -> None:
    found = explained(ideal_trace(f"{declared}+{change}"), declared)
    assert found
    assert (found[0].kind, found[0].name) == (ARITHMETIC, f"{declared}+{change}")


def names_on_eight_ranks(form: str) -> list[str]:
    """What is named of a healthy engine on eight ranks that declares none."""
    used = policy("bfloat16")
    found = explained(ranked_trace(form, used, Ranks(8, used, np.random.default_rng(8))), "bfloat16")
    return [each.name for each in found]


def test_an_engine_on_eight_ranks_is_named_so() -> None:
    assert names_on_eight_ranks("tensor")[0].startswith("bfloat16+ranks=")


@pytest.mark.slow
@pytest.mark.parametrize("form", [form for form in FORMS if form != "tensor"])
def test_where_one_step_alone_adds_parts_nothing_else_is_named(form: str) -> None:
    """These engines add the parts of `wo`, but those of `w2` elsewhere or never. One step does not speak for both."""
    assert all(name.startswith("bfloat16+ranks=") for name in names_on_eight_ranks(form))


@pytest.mark.parametrize("change", CHANGES)
def test_each_change_is_one_that_a_policy_can_have(change: str) -> None:
    """It differs from some policy that it is applied to, and says where its effect begins."""
    for base in ("float32", "float64", "bfloat16"):
        assert policy(f"{base}+{change}").name == f"{base}+{change}"
    assert touched_by(change)
