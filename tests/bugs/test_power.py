# SPDX-License-Identifier: Apache-2.0
"""The power of a verification: the measured table is that of this catalogue, and reports state their line of it."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refmoe.bugs.catalogue import MUTANTS
from refmoe.cli.verify import exit_status
from refmoe.profiles.load import policy
from refmoe.report.junit import to_junit
from refmoe.report.verification_json import to_json
from refmoe.spec.taps import LOGPROBS, tap_names
from refmoe.suite.matrix.outcomes import POLICIES, runnable, setting
from refmoe.suite.matrix.power import compute_power, plan, restricted, seen_by, traces, write_power
from refmoe.suite.power import FORMAT_VERSION, STEPS, TAP_SETS, held_steps, in_words, power_of, table, with_power
from refmoe.traces.held import HeldTensor
from refmoe.verifier.findings import ALL_TAPS, CONFORMANT, NOT_CONFORMANT, Power
from refmoe.verifier.verify import verify
from tests.bugs.judging import GOLDEN, case_named, parameters_of, traced

SAMPLE = (
    ("rope-sign-flipped", "float32"), ("expert-weight-before-w2", "float32"), ("attn-gqa-tile", "float32"),
    ("hidden-tap-off-by-one", "float32"), ("router-index-off-by-one", "bfloat16"), ("norm-gain-plus-one", "float16"),
)  # fmt: skip
"""Mutants that are seen with few taps and with many."""
SIZES = [frozenset(taps) for taps in TAP_SETS.values()]


def test_the_sets_are_nested_and_the_first_has_every_tap() -> None:
    assert all(smaller < larger for larger, smaller in pairwise(SIZES))
    assert SIZES[0] == set(STEPS)


def test_the_table_is_of_this_catalogue() -> None:
    """`refmoe mutants power --measure refmoe/suite/power.json` measures what it lacks."""
    assert [*table()] == [*runnable()]
    for name, found in table().items():
        assert {*found} == {each for each in POLICIES if each not in MUTANTS[name].unseen}


def test_every_mutant_is_seen_with_all_taps_and_a_larger_set_sees_what_a_smaller_one_does() -> None:
    for name, found in table().items():
        for at in found.values():
            assert at["seen"], name
            assert at["seen"] == [*TAP_SETS][: len(at["seen"])]
            assert (GOLDEN / at["case"] / "case.toml").exists()


@pytest.mark.parametrize(("bug", "dtype"), SAMPLE)
def test_the_table_says_what_is_measured_now(bug: str, dtype: str) -> None:
    recorded = table()[bug][dtype]
    assert seen_by(bug, case_named(recorded["case"]), dtype) == recorded["seen"]


@pytest.mark.parametrize(
    ("bug", "dtype"),
    [
        pytest.param(bug, dtype, marks=() if (bug, dtype) in SAMPLE else pytest.mark.slow)
        for bug, found in table().items()
        for dtype, at in found.items()
        if "logits" in at["seen"]
    ],
)
def test_log_probabilities_of_the_whole_vocabulary_show_what_logits_show(bug: str, dtype: str) -> None:
    """So they count as logits (`held_steps`). They are those of float32, whatever the dtype of the logits is."""
    case = case_named(table()[bug][dtype]["case"])
    rules, parameters = setting(bug, case, dtype)
    for trace in traces(bug, case, rules, parameters):
        tensors: dict[str, Any] = {}
        for run in trace.runs:
            x = np.asarray(trace.get(run.run, "logits"), np.float64)
            x = x - x.max(-1, keepdims=True)
            values = (x - np.log(np.exp(x).sum(-1, keepdims=True))).astype(np.float32)
            tensors[f"{run.run}/{LOGPROBS}"] = HeldTensor(f"{run.run}/{LOGPROBS}", values)
        alone = replace(trace, tensors=tensors)
        assert held_steps(alone, case.config) == {"logits"}
        if verify(alone, case.name, case.config, parameters, case.runs(), rules).verdict == NOT_CONFORMANT:
            return
    pytest.fail("no trace of the engine with this bug is rejected")


def test_a_plan_begins_with_the_cheapest_deep_case_and_leaves_out_what_nothing_can_show() -> None:
    cases = [case_named(name) for name in ("dims-distinct", "four-layers", "one-pair")]
    unseen = next(each.id for each in MUTANTS.values() if each.unseen)
    work = plan([unseen, "rope-sign-flipped"], cases, None)
    assert {each.policy for each in work if each.mutant == unseen} == set(POLICIES) - {*MUTANTS[unseen].unseen}
    assert [path.name for path in work[-1].cases] == ["one-pair", "four-layers", "dims-distinct"]


def test_measured_lines_replace_those_of_the_same_mutant_and_keep_the_others(tmp_path: Path) -> None:
    name = "emb-scale-sqrt-d"
    before = {name: {"float32": {"case": "", "seen": []}}, "rope-sign-flipped": table()["rope-sign-flipped"]}
    work = [each for each in plan([name], [case_named("one-pair")], None) if each.policy == "float32"]
    found = compute_power(work, before, executor="processes:1")
    assert found["rope-sign-flipped"] == before["rope-sign-flipped"]
    assert found[name]["float32"]["case"] == "one-pair"
    assert found[name]["float32"]["seen"][0] == ALL_TAPS
    write_power(tmp_path / "power.json", found)
    document = json.loads((tmp_path / "power.json").read_text())
    assert document == {"format_version": FORMAT_VERSION, "mutants": found}


# ---- a report


@pytest.mark.parametrize(("taps", "steps"), [*TAP_SETS.items()])
def test_the_largest_set_within_the_taps_counts(taps: str, steps: tuple[str, ...]) -> None:
    found = power_of(frozenset(steps), policy("bfloat16"))
    assert (found.taps, found.dtype, found.known) == (taps, "bfloat16", len(runnable()))
    assert found.seen + len(found.unseen) == found.known
    assert found.seen == sum(taps in at.get("bfloat16", {}).get("seen", ()) for at in table().values())


def test_fewer_taps_see_less_and_a_finer_dtype_more() -> None:
    for dtype in POLICIES:
        seen = [power_of(frozenset(steps), policy(dtype)).seen for steps in TAP_SETS.values()]
        assert seen == sorted(seen, reverse=True)
        assert seen[0] > seen[-1]
    logits = frozenset(TAP_SETS["logits"])
    assert power_of(logits, policy("float64")) == power_of(logits, policy("float32"))
    assert power_of(logits, policy("hf-bfloat16")) == power_of(logits, policy("bfloat16"))


def test_a_set_that_a_layer_or_a_run_lacks_is_not_held() -> None:
    trace, config = traced(None, "one-pair", "float32"), case_named("one-pair").config
    assert held_steps(trace, config) == frozenset(STEPS)
    assert len({*tap_names(config)}) > len(STEPS)
    part = replace(trace, tensors={k: t for k, t in trace.tensors.items() if k != "prefill/layers.1.residual"})
    assert held_steps(part, config) == frozenset(STEPS) - {"residual"}
    assert held_steps(restricted(trace, frozenset()), config) == frozenset()
    assert power_of(frozenset(["embedding"]), policy("float32")).taps == ""


@pytest.mark.parametrize("taps", [*TAP_SETS])
def test_a_conformant_report_says_how_far_its_taps_show_that(taps: str) -> None:
    case = case_named("dims-distinct")
    trace = restricted(traced(None, case.name, "float32"), frozenset(TAP_SETS[taps]))
    rules = policy("float32")
    plain = verify(trace, case.name, case.config, parameters_of(case.name), case.runs(), rules)
    report = with_power(plain, trace, case.config, rules)
    assert report.verdict == CONFORMANT
    assert report.power == power_of(frozenset(TAP_SETS[taps]), rules)
    assert report.headline.startswith(in_words(report))
    assert (in_words(report) == CONFORMANT) == (taps == ALL_TAPS)
    assert (f"{report.power.seen} of {report.power.known}" in report.headline) == (taps != ALL_TAPS)
    assert json.loads(to_json(report))["power"]["seen"] == report.power.seen
    assert 'name="power"' in to_junit(report)


def test_weak_evidence_has_the_exit_status_of_no_verdict() -> None:
    case = case_named("dims-distinct")
    trace, rules = traced(None, case.name, "float32"), policy("float32")
    report = verify(trace, case.name, case.config, parameters_of(case.name), case.runs(), rules)

    def at(seen: int) -> int:
        from refmoe.api.report import Report

        return exit_status(Report(replace(report, power=Power("logits", "float32", seen, 10, ()))))

    assert (at(4), at(5), at(10)) == (3, 0, 0)
    assert exit_status_without_power(report) == 0


def exit_status_without_power(report: object) -> int:
    from refmoe.api.report import Report

    return exit_status(Report(report))  # type: ignore[arg-type]
