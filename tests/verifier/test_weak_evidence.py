# SPDX-License-Identifier: Apache-2.0
"""Logits alone in a low dtype: gross errors fail, honest engines pass, and no value that cannot fail counts as tested.

Expected values are the policy's own arithmetic. Errors are added to it at a stated size.
"""

from __future__ import annotations

import math
from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refmoe.bugs.run_engine import run
from refmoe.checkpoints.synthetic import synthetic_checkpoint
from refmoe.profiles.load import policy
from refmoe.spec.config import Config
from refmoe.steps.enclosure_ops import EnclosureOps
from refmoe.suite import Case, read_case
from refmoe.traces.held import held_trace
from refmoe.traces.trace import Run, Trace
from refmoe.verifier.findings import CANNOT_JUDGE, CONFORMANT, FREE, NOT_CONFORMANT, Report
from refmoe.verifier.free_running import Draw, Replica, other_way, rate, row_limit, whole_limit
from refmoe.verifier.subject import Subject
from refmoe.verifier.tally import Limits
from refmoe.verifier.verify import verify
from tests.verifier.engines import GOLDEN

RULES = policy("bfloat16")
SHOWS = ("experts-12", "tiny-embedding", pytest.param("walking-skeleton", marks=pytest.mark.slow))
"""Cases whose logits show errors, although rounding decides some experts."""
HIDES = "tie-second-third"
"""Every choice is a tie, so that the logits of an honest engine differ by half of their size."""


@cache
def case(name: str) -> Case:
    return read_case(GOLDEN / name)


@cache
def right(name: str) -> Trace:
    """The policy's own logits of a case."""
    of = case(name)
    trace = run(None, of.config, of.checkpoint().parameters, of.runs(), RULES)
    return with_logits(trace, {key: np.asarray(trace.tensors[key].map()) for key in trace.tensors if is_logits(key)})


def is_logits(key: str) -> bool:
    return key.partition("/")[2] == "logits"


def with_logits(trace: Trace, arrays: dict[str, Any]) -> Trace:
    return held_trace(trace.header, arrays, "logits")


def judged(name: str, trace: Trace) -> Report:
    of = case(name)
    return verify(trace, name, of.config, of.checkpoint().parameters, of.runs(), RULES)


def off(name: str, size: float) -> Trace:
    """Every row off by this share of its size, in a random direction."""
    generator, arrays = np.random.default_rng(1), dict[str, Any]()
    for key, tensor in right(name).tensors.items():
        x = np.asarray(tensor.map(), np.float64)
        error = generator.standard_normal(x.shape)
        error *= size * np.linalg.norm(x, axis=-1, keepdims=True) / np.linalg.norm(error, axis=-1, keepdims=True)
        arrays[key] = x + error
    return with_logits(right(name), arrays)


@pytest.mark.parametrize("size", [0.4, 0.98])
@pytest.mark.parametrize("name", SHOWS)
def test_logits_whose_rows_are_all_far_off_fail(name: str, size: float) -> None:
    report = judged(name, off(name, size))
    assert report.verdict == NOT_CONFORMANT, report.headline
    assert all(check.rung == FREE for check in report.checks)


@pytest.mark.parametrize("name", SHOWS)
def test_one_row_that_is_far_off_is_the_one_that_is_named(name: str) -> None:
    """The row with the least noise, so that the test of rows decides and no other one."""
    arrays = {key: np.array(tensor.map(), np.float64) for key, tensor in right(name).tensors.items()}
    report = judged(name, right(name))
    assert report.verdict == CONFORMANT, report.headline
    key = next(iter(arrays))
    for token in range(len(arrays[key])):
        changed = {**arrays, key: arrays[key].copy()}
        changed[key][token] = np.roll(changed[key][token], 1)
        found = judged(name, with_logits(right(name), changed))
        if found.verdict == NOT_CONFORMANT:
            assert found.first_wrong == tuple(key.split("/"))
            worst = next(check.worst for check in found.checks if check.worst and check.verdict == "fail")
            assert worst.where[0] == token
            return
    pytest.fail("no row is seen")


def test_logits_that_cannot_fail_are_not_called_tested() -> None:
    report = judged(HIDES, right(HIDES))
    assert report.verdict == CANNOT_JUDGE, report.headline
    tested = sum(check.values - check.undecided for check in report.checks)
    assert 2 * tested < sum(check.values for check in report.checks)


@pytest.mark.slow
def test_a_deep_model_whose_rows_are_mostly_open_cannot_be_judged_by_its_logits() -> None:
    """Six layers leave few rows without an open choice: the noise is up to 60 % of a row, and most rows cannot fail."""
    config = Config(
        dim=32, layers=6, heads=4, kv_heads=2, head_dim=8, hidden_dim=48, vocab=331, experts=8, experts_per_token=2
    )
    parameters = synthetic_checkpoint(config, seed=1).parameters
    tokens = tuple((7 + 29 * i) % config.vocab for i in range(16))
    runs = (Run("prefill", op="prefill", sequence=0, tokens=tokens, positions=tuple(range(16)), past=0),)
    whole = run(None, config, parameters, runs, RULES)
    trace = with_logits(whole, {"prefill/logits": np.asarray(whole.get("prefill", "logits"))})
    report = verify(trace, "a deep model", config, parameters, runs, RULES)
    assert report.verdict == CANNOT_JUDGE, report.headline
    assert 0 < report.checks[0].values - report.checks[0].undecided < report.checks[0].values / 2


@pytest.mark.parametrize("name", SHOWS)
def test_values_counted_as_tested_fail_when_they_are_zero(name: str) -> None:
    """A row whose values all count as tested fails when it alone is zero."""
    report = judged(name, right(name))
    for check in report.checks:
        if check.undecided:
            continue
        x = np.array(right(name).get(check.run, check.tap), np.float64)
        x[len(x) // 2] = 0.0
        arrays = {key: np.asarray(tensor.map()) for key, tensor in right(name).tensors.items()}
        arrays[f"{check.run}/{check.tap}"] = x
        found = judged(name, with_logits(right(name), arrays)).check(check.run, check.tap)
        assert found is not None
        assert found.verdict == "fail", (check.run, found.reason)
        break


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
@pytest.mark.parametrize("name", [*SHOWS, HIDES, "attention-underflow", "dyadic-top-1"])
def test_a_run_with_random_roundings_never_fails(name: str, seed: int) -> None:
    """An engine that rounds at random, and chooses experts by what it has then. Some of these attentions switch too."""
    of = case(name)
    subject = Subject(of.config, of.checkpoint().parameters, of.runs())
    wanted = {(each.run, "logits") for each in of.runs()}
    with np.errstate(all="ignore"):
        drawn = Replica(right(name), subject, RULES, wanted=wanted, draw=Draw(np.random.default_rng(seed))).arrays()
    report = judged(name, with_logits(right(name), {"/".join(key): x for key, x in drawn.items()}))
    assert report.verdict != NOT_CONFORMANT, report.headline


# ---- the limits


@given(st.floats(0, 40))
def test_the_rate_of_a_choice_is_what_the_limit_of_a_row_needs(z: float) -> None:
    """1 / rate <= 2 log2(1 / q), as the proof in `free_running` has it, and no rate below two of the replicas."""
    assert 1 / rate(z) <= 2 * math.log2(1 / other_way(z)) * (1 + 1e-12)
    assert 1 / 8 <= rate(z) <= 1 / 2


@given(st.floats(0, 20), st.floats(0, 20))
def test_a_wider_margin_is_less_often_decided_the_other_way(z: float, more: float) -> None:
    assert other_way(z + more) <= other_way(z) <= 0.5
    assert rate(z + more) <= rate(z)


@pytest.mark.parametrize("steadiness", [0.01, 0.1, 1.0, 10.0])
def test_the_limit_of_all_rows_is_passed_with_the_stated_probability_at_most(steadiness: float) -> None:
    """Held against the distribution itself, of a Gamma variable of mean 1 and of three times the variance seen."""
    stats = pytest.importorskip("scipy.stats")
    limits = Limits(1e-6, 1000, 10)
    shape = 1 / (3 * steadiness)
    passed = stats.gamma.sf(whole_limit(limits, 10, steadiness) ** 2, shape, scale=1 / shape)
    assert 0 < passed <= limits.part / 10


def test_the_limit_of_a_row_holds_for_normal_errors_and_for_rare_choices() -> None:
    """The sum of any effects whose choices have the probability of the limit, at worst all in one direction."""
    limits = Limits(1e-6, 1000, 10)
    limit, least = row_limit(limits, 1000), limits.part / 1000
    for z in (0.0, 0.5, 1.0, 2.0, 4.0, 8.0):
        count = math.floor(math.log(least) / math.log(other_way(z)))
        for effects in (1, count):
            noise = math.sqrt(effects * rate(z))  # of as many equal effects, drawn at their rate
            assert min(effects, count) / noise <= limit * (1 + 1e-12)


@pytest.mark.parametrize("ranks", [1, 2])
def test_each_weight_is_prepared_once_for_all_replicas(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    """Their prepared weights would else be as many times in memory as there are replicas."""
    name, prepared = "walking-skeleton", Counter[tuple[bytes, tuple[int, ...]]]()
    prepare = EnclosureOps._prepare

    def counting(self: EnclosureOps, rows: Any, *others: Any) -> Any:
        prepared[np.asarray(rows).tobytes()[:64], rows.shape] += 1
        return prepare(self, rows, *others)

    monkeypatch.setattr(EnclosureOps, "_prepare", counting)
    of = case(name)
    used = policy("bfloat16" if ranks == 1 else f"bfloat16+ranks={ranks}")
    report = verify(right(name), name, of.config, of.checkpoint().parameters, of.runs(), used)
    assert any(check.rung == FREE for check in report.checks)
    assert max(prepared.values()) == 1
