# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities: those of honest engines pass, wrong ones and lists that are no top n fail, and known bugs show.

The honest ones are those of torch's log_softmax, of logits that the specification computes and each policy rounds, and
of logits of unpatched transformers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.profiles.load import policy
from refmoe.spec.taps import IDS, LOGPROBS
from refmoe.suite.matrix.power import restricted
from refmoe.traces.held import HeldTensor
from refmoe.traces.trace import Trace
from refmoe.verifier.findings import CONFORMANT, FAIL, FREE, NOT_CONFORMANT, PASS, UNDECIDABLE, Report
from refmoe.verifier.ranking import Ranking, Swap, judge
from refmoe.verifier.verify import verify
from tests.bugs.judging import case_named, parameters_of, traced
from tests.verifier.engines import case_names, explained, honest, judged, only

DTYPES = ("float32", "bfloat16", "float16")
SMALL = "dims-distinct"
BUGS = (
    "attn-gqa-tile", "emb-scale-sqrt-d", "expert-w1-w3-swapped", "head-tied-wrongly", "head-final-norm-gain-missing",
    "norm-gain-plus-one", "rope-sign-flipped", "rope-theta-default", "router-no-renorm", "norm-eps-1e-6",
    "attn-scale-missing", "router-wrong-k-1",
)  # fmt: skip
LARGEST = 5
"""The entries that a list has."""


def log_softmax(logits: Any, dtype: str) -> Any:
    """The log-softmax of torch, computed and stored in this dtype, or computed in float32 and stored in a narrow one.

    logits: [T, V], of any dtype   returns: [T, V]
    """
    torch = pytest.importorskip("torch")
    found = torch.log_softmax(torch.from_numpy(np.asarray(logits, np.float64)).to(getattr(torch, dtype)), -1)
    values = found.double().numpy()
    return values.astype(np.float64 if dtype == "float64" else policy(dtype).storage.dtype)


def largest(logprobs: Any, count: int) -> tuple[Any, Any]:
    """The largest log-probabilities of each row and their ids, in no order, as `argpartition` gives them."""
    ids = np.argpartition(-logprobs.astype(np.float64), min(count, logprobs.shape[-1]) - 1, axis=-1)[:, :count]
    return np.take_along_axis(logprobs, ids, -1), ids.astype(np.int64)


def with_taps(trace: Trace, taps: dict[str, Any]) -> Trace:
    """The trace with more arrays.   taps: by key"""
    tensors: Any = {key: HeldTensor(key, np.ascontiguousarray(array)) for key, array in taps.items()}
    return replace(trace, tensors={**trace.tensors, **tensors})


def read_out(arrays: dict[str, Any], dtype: str, listed: bool) -> dict[str, Any]:
    """The log-probabilities of all runs.   arrays: logits, by key   listed: only the largest, with their ids"""
    found: dict[str, Any] = {}
    for key, logits in arrays.items():
        if not key.endswith("/logits"):
            continue
        run, values = key.rpartition("/")[0], log_softmax(logits, dtype)
        if listed:
            values, found[f"{run}/{IDS}"] = largest(values, LARGEST)
        found[f"{run}/{LOGPROBS}"] = values
    return found


def held(trace: Trace) -> dict[str, Any]:
    return {key: tensor.map() for key, tensor in trace.tensors.items()}


def verdict_of(trace: Trace, name: str, rules: str) -> Report:
    case = case_named(name)
    return verify(trace, name, case.config, parameters_of(name), case.runs(), policy(rules))


def not_failed(report: Report) -> None:
    """Assert that the log-probabilities and their lists were checked in some run, and did not fail in any."""
    checks = [check for check in report.checks if check.step in (LOGPROBS, IDS)]
    assert checks
    assert all(check.verdict != FAIL for check in checks), explained(report)


def forms(name: str, dtype: str) -> list[Trace]:
    """Traces of the rounded specification: logits and what follows from them, in each form that engines give."""
    trace = traced(None, name, dtype)
    arrays, without = held(trace), {key: t for key, t in trace.tensors.items() if not key.endswith("/logits")}
    computed = "float32" if dtype != "float64" else dtype
    return [
        with_taps(trace, read_out(arrays, computed, listed=False)),
        with_taps(replace(trace, tensors=without), read_out(arrays, dtype, listed=False)),
        with_taps(replace(trace, tensors=without), read_out(arrays, computed, listed=True)),
    ]


# ---- honest engines


QUICK = (SMALL, "walking-skeleton", "huge-activations")


@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else (pytest.mark.slow,)) for name in case_names()]
)
def test_log_probabilities_of_the_rounded_specification_pass(name: str, dtype: str) -> None:
    for trace in forms(name, dtype):
        not_failed(verdict_of(trace, name, dtype))


@pytest.mark.engines
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == SMALL else (pytest.mark.slow,)) for name in case_names()]
)
def test_log_probabilities_of_transformers_pass(name: str, dtype: str) -> None:
    arrays = honest(name, dtype)
    for listed in (False, True):
        taps = {
            **only(arrays, lambda step: step != "logits" or not listed),
            **read_out(dict(arrays), "float32", listed),
        }
        not_failed(judged(name, taps, f"hf-{dtype}"))


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_any_other_tap_they_are_judged_too(dtype: str, listed: bool) -> None:
    trace = traced(None, SMALL, dtype)
    report = verdict_of(
        with_taps(restricted(trace, frozenset()), read_out(held(trace), "float32", listed)), SMALL, dtype
    )
    assert report.verdict == CONFORMANT, explained(report)
    assert {check.rung for check in report.checks} == {FREE}


# ---- faults


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_that_logits_show_shows_in_all_log_probabilities(bug: str) -> None:
    trace = traced(bug, SMALL, "float32")
    assert verdict_of(restricted(trace, frozenset(["logits"])), SMALL, "float32").verdict == NOT_CONFORMANT
    alone = with_taps(restricted(trace, frozenset()), read_out(held(trace), "float32", listed=False))
    assert verdict_of(alone, SMALL, "float32").verdict == NOT_CONFORMANT


FAULTS = {
    "logits": lambda x, lp: x,
    "probabilities": lambda x, lp: np.exp(lp),
    "base 2": lambda x, lp: lp / np.log(2),
    "temperature": lambda x, lp: log_softmax(x / 0.9, "float32"),
    "one entry left out of the sum": lambda x, lp: lp - np.log1p(-np.exp(lp[:, 7:8])),
    "off by 1e-4": lambda x, lp: lp + 1e-4,
    "shifted by one position": lambda x, lp: np.roll(lp, 1, 0),
    "two entries exchanged": lambda x, lp: np.concatenate([lp[:, 1:2], lp[:, :1], lp[:, 2:]], -1),
    "one NaN": lambda x, lp: np.where(np.arange(lp.shape[-1]) == 3, np.nan, lp),
    "a softmax of the chosen few": lambda x, lp: lp - np.log(np.exp(lp[:, :40]).sum(-1, keepdims=True)),
}
"""Wrong log-probabilities, from the logits and the right ones."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_log_softmax_fails_at_its_own_step(fault: str) -> None:
    trace = traced(None, SMALL, "float32")
    key = "prefill/logits"
    logits = np.asarray(held(trace)[key], np.float64)
    wrong = FAULTS[fault](logits, log_softmax(logits, "float32").astype(np.float64))
    report = verdict_of(with_taps(trace, {f"prefill/{LOGPROBS}": wrong.astype(np.float32)}), SMALL, "float32")
    assert report.verdict == NOT_CONFORMANT
    assert report.first_wrong == ("prefill", LOGPROBS)


def test_the_worst_listed_value_is_named_by_its_entry_of_the_vocabulary() -> None:
    trace = traced(None, SMALL, "float32")
    values, ids = largest(log_softmax(held(trace)["prefill/logits"], "float32"), LARGEST)
    values[1, 2] += 0.25
    report = verdict_of(with_taps(trace, {f"prefill/{LOGPROBS}": values, f"prefill/{IDS}": ids}), SMALL, "float32")
    check = report.check("prefill", LOGPROBS)
    assert check is not None
    assert check.worst is not None
    assert check.worst.where == (1, ids[1, 2])


# ---- lists


def ranked(logits: Any, ids: Any, rules: str = "float32", radius: Any = None) -> Ranking:
    """The judgement of lists.   logits: [T, V]   ids: [T, n]"""
    x = np.asarray(logits, np.float64)
    mid = x - x.max(-1, keepdims=True)
    mid = mid - np.log(np.exp(mid).sum(-1, keepdims=True))
    spread = None if radius is None else np.broadcast_to(radius, x.shape)
    found = Enclosure(x, spread, None if spread is None else spread**2 / 3)
    return judge(found, mid, np.asarray(ids), policy(rules), 1e3, 10)


def test_a_list_must_have_the_largest_entries_in_any_order() -> None:
    logits = [[1.0, 5.0, 3.0, 4.0]]
    for right in ([1, 3], [3, 1]):
        assert ranked(logits, [right]) == Ranking(tokens=1)
    assert ranked(logits, [[1, 2]]).swaps == [Swap(token=10, listed=2, left_out=3)]
    assert ranked(logits, [[0, 1, 2, 3]]) == Ranking(tokens=1)


@pytest.mark.parametrize("ids", [[1, 1], [1, 4], [-1, 1], [-1, -1]])
def test_entries_that_do_not_exist_or_repeat_are_no_list(ids: list[int]) -> None:
    assert [token for token, _ in ranked([[1.0, 5.0, 3.0, 4.0]], [ids]).invalid] == [10]


def test_either_of_two_equal_entries_may_be_listed_and_so_may_one_within_rounding() -> None:
    u = 2.0**-24
    assert not ranked([[1.0, 2.0, 2.0]], [[1]]).swaps
    assert not ranked([[1.0, 2.0, 2.0]], [[2]]).swaps
    assert not ranked([[1.0, 2.0, 2.0 + 2 * u]], [[1]]).swaps
    assert ranked([[1.0, 2.0, 2.001]], [[1]]).swaps
    # a dtype that cannot tell the two log-probabilities apart may list either
    assert not ranked([[1.0, 2.0, 2.001]], [[1]], "float32+logprobs=bfloat16").swaps
    assert not ranked([[1.0, 2.0, 2.001]], [[1]], radius=1e-3).swaps
    assert ranked([[1.0, 2.0, 2.001]], [[1]], radius=1e-4).swaps


def test_a_list_without_any_bound_is_not_decided() -> None:
    found = ranked([[1.0, 2.0, 3.0]], [[0]], radius=np.inf)
    assert (found.swaps, found.undecided) == ([], 1)


@pytest.mark.parametrize(("change", "reason"), [("swap", "leaves out"), ("repeat", "no different entries")])
def test_a_wrong_list_fails_though_its_values_are_right(change: str, reason: str) -> None:
    trace = traced(None, SMALL, "bfloat16")
    whole = log_softmax(held(trace)["prefill/logits"], "float32")
    values, ids = largest(whole, LARGEST)
    ids = ids.copy()
    ids[2, 0] = int(whole[2].argmin()) if change == "swap" else ids[2, 1]
    values = np.take_along_axis(whole, ids, -1)
    report = verdict_of(with_taps(trace, {f"prefill/{LOGPROBS}": values, f"prefill/{IDS}": ids}), SMALL, "bfloat16")
    check, of_values = report.check("prefill", IDS), report.check("prefill", LOGPROBS)
    assert check is not None
    assert of_values is not None
    assert (check.verdict, of_values.verdict) == (FAIL, PASS)
    assert reason in check.reason
    assert check.outside == 1


def test_where_an_engine_may_overflow_the_log_probabilities_are_not_decided() -> None:
    """`huge-activations` in float16, whose logits have no bound."""
    name = "huge-activations"
    report = verdict_of(forms(name, "float16")[2], name, "float16")
    found = {check.verdict for check in report.checks if check.step in (LOGPROBS, IDS)}
    assert found <= {PASS, UNDECIDABLE}
