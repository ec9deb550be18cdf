# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities: those of honest engines pass, wrong ones and lists that are no top n fail, and known bugs show.

The honest ones are those of torch's log_softmax, of logits that the specification computes and each policy rounds, and
of logits of unpatched transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.profiles.load import policy
from refmoe.spec.model import head
from refmoe.spec.taps import IDS, LOGPROBS
from refmoe.suite.matrix.power import restricted
from refmoe.traces.held import HeldTensor, held_trace
from refmoe.traces.trace import Header, Trace
from refmoe.verifier.diagnosis import diagnose
from refmoe.verifier.diagnosis.read_outs import WORDS
from refmoe.verifier.findings import CONFORMANT, FAIL, FREE, NOT_CONFORMANT, PASS, UNDECIDABLE, Report
from refmoe.verifier.intake import take_in
from refmoe.verifier.passes import Pass
from refmoe.verifier.ranking import Ranking, Swap, judge
from refmoe.verifier.segments import SIGNIFICANCE
from refmoe.verifier.subject import Subject
from refmoe.verifier.tally import Limits
from refmoe.verifier.verify import assemble, verify
from tests.bugs.judging import case_named, parameters_of, traced
from tests.verifier.engines import case_names, explained, honest

DTYPES = ("float32", "bfloat16", "float16")
SMALL = "dims-distinct"
BUGS = (
    "attn-gqa-tile", "emb-scale-sqrt-d", "expert-w1-w3-swapped", "head-tied-wrongly", "head-final-norm-missing",
    "norm-gain-plus-one", "rope-sign-flipped", "rope-theta-default", "router-no-renorm", "norm-eps-1e-6",
    "attn-scale-missing", "router-wrong-k",
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


class Head(Pass):
    """A pass over the steps after the last layer, from the hidden states of the trace."""

    def _block(self, model: Any, layers: range, tokens: Any, positions: Any, before: Any) -> Any:
        name = f"layers.{model.config.layers - 1}.residual"
        ops: Any = self.ops
        self._read_out(head(ops, model, self._taken("residual", name, self._read(name, "residual"))))
        return ()


def assert_read_outs_pass(arrays: dict[str, Any], name: str, rules: str) -> None:
    """Assert that log-probabilities, and their lists, are checked in every run, and fail in none.

    arrays: of a whole trace   The head keeps no cache, so that each run is a sequence of its own.
    """
    case, used = case_named(name), policy(rules)
    runs = tuple(replace(run, op="prefill", sequence=i, past=0) for i, run in enumerate(case.runs()))
    last = f"layers.{case.config.layers - 1}.residual"
    kept = {key: array for key, array in arrays.items() if key.partition("/")[2] in (last, "logits", LOGPROBS, IDS)}
    contents = take_in(held_trace(Header(runs), kept), case.config, None)
    limits = Limits(SIGNIFICANCE, contents.values, contents.tensors)
    judging = Head(contents.trace, Subject(case.config, parameters_of(name), contents.runs), used, limits)
    checks = [
        check for check in assemble(judging.go(), contents, case.config, used, limits) if check.step in (LOGPROBS, IDS)
    ]
    assert {check.run for check in checks} == {run.run for run in runs}
    allowed = {PASS, UNDECIDABLE} if (name, used.storage.name) == OVERFLOWS else {PASS}
    for check in checks:
        assert check.verdict in allowed, check


def forms(arrays: dict[str, Any], dtype: str) -> Iterator[tuple[dict[str, Any], str]]:
    """The arrays of a trace with log-probabilities in each form that engines give, and a change of the policy.

    In a narrow dtype torch stores the sum of exponentials and its logarithm in it, on a CPU.
    """
    without = {key: array for key, array in arrays.items() if not key.endswith("/logits")}
    computed = "float32" if dtype != "float64" else dtype
    narrow = f"+logprobs.sum={dtype}" if dtype != computed else ""
    yield arrays | read_out(arrays, computed, listed=False), ""
    yield without | read_out(arrays, computed, listed=False), ""
    yield without | read_out(arrays, computed, listed=True), ""
    yield without | read_out(arrays, dtype, listed=False), narrow
    yield arrays | read_out(arrays, dtype, listed=True), narrow


# ---- honest engines


OVERFLOWS = ("huge-activations", "float16")


@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
@pytest.mark.parametrize("name", case_names())
def test_log_probabilities_of_the_rounded_specification_pass(name: str, dtype: str) -> None:
    for arrays, change in forms(held(traced(None, name, dtype)), dtype):
        assert_read_outs_pass(arrays, name, dtype + change)


@pytest.mark.engines
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == SMALL else (pytest.mark.slow,)) for name in case_names()]
)
def test_log_probabilities_of_transformers_pass(name: str, dtype: str) -> None:
    for rules in (dtype, f"hf-{dtype}"):
        for arrays, change in forms(dict(honest(name, dtype)), dtype):
            assert_read_outs_pass(arrays, name, rules + change)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_sum_that_torch_stores_in_a_narrow_dtype_is_not_that_of_float32(dtype: str) -> None:
    """Without the change of the policy, the values that the tests above accept fail."""
    name = "token-sweep"
    arrays = held(traced(None, name, dtype))
    with pytest.raises(AssertionError):
        assert_read_outs_pass(arrays | read_out(arrays, dtype, listed=False), name, dtype)


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


# ---- under another name


def renamed(trace: Trace, wrong: str, change: Any) -> Trace:
    """The trace with other values under `wrong`.   change: from logits, in float64, to them"""
    tensors = {key: tensor for key, tensor in trace.tensors.items() if not key.endswith("/logits")}
    found = {
        key.replace("/logits", f"/{wrong}"): np.asarray(change(np.asarray(array, np.float64))).astype(array.dtype)
        for key, array in held(trace).items()
        if key.endswith("/logits")
    }
    return with_taps(replace(trace, tensors=tensors), found)


def explanations(trace: Trace, dtype: str) -> list[str]:
    report, case, rules = verdict_of(trace, SMALL, dtype), case_named(SMALL), policy(dtype)
    assert report.verdict == NOT_CONFORMANT
    found = diagnose(trace, case.config, parameters_of(SMALL), case.runs(), rules, report, ())
    return [each.name for each in found if each.explains]


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_log_probabilities_and_logits_under_each_other_s_name_are_named(dtype: str, alone: bool) -> None:
    trace = traced(None, SMALL, dtype)
    trace = restricted(trace, frozenset(["logits"])) if alone else trace
    assert explanations(renamed(trace, "logits", lambda x: log_softmax(x, "float32")), dtype) == [
        f"logits: {WORDS['logits'][0]}"
    ]
    assert explanations(renamed(trace, LOGPROBS, lambda x: x), dtype) == [f"{LOGPROBS}: {WORDS[LOGPROBS][0]}"]


@pytest.mark.parametrize("change", [lambda x: x + 1, lambda x: x - x.mean(-1, keepdims=True), lambda x: x * 1.01])
def test_other_wrong_logits_are_not_called_log_probabilities(change: Any) -> None:
    names = explanations(
        renamed(restricted(traced(None, SMALL, "float32"), frozenset(["logits"])), "logits", change), "float32"
    )
    assert f"logits: {WORDS['logits'][0]}" not in names


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_not_called_another_name(bug: str) -> None:
    trace = traced(bug, SMALL, "float32")
    for wrong, change in (("logits", lambda x: x), (LOGPROBS, lambda x: log_softmax(x, "float32"))):
        alone = renamed(restricted(trace, frozenset(["logits"])), wrong, change)
        assert not {f"{tap}: {words}" for tap, (words, _) in WORDS.items()} & {*explanations(alone, "float32")}
