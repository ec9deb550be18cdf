# SPDX-License-Identifier: Apache-2.0
"""Logits of the last position only, as engines compute them: judged there, in every run of every sequence.

The expected verdicts are those of the same values among logits of all positions.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refmoe.bugs.catalogue import MUTANTS
from refmoe.errors import InputError
from refmoe.parallel import open_executor
from refmoe.profiles.load import policy
from refmoe.spec.taps import IDS, LOGPROBS, step_of
from refmoe.suite import case_source
from refmoe.suite.matrix.power import restricted
from refmoe.suite.power import held_steps
from refmoe.traces.held import held_trace
from refmoe.traces.pieces import LAST_ONLY, by_pieces, call_of
from refmoe.traces.trace import Header, Trace, read_trace, write_trace
from refmoe.verifier.diagnosis import diagnose
from refmoe.verifier.distances import compare_traces
from refmoe.verifier.findings import CONFORMANT, NOT_CONFORMANT, Report
from refmoe.verifier.intake import take_in
from refmoe.verifier.routing import NO_PADDING
from refmoe.verifier.segments import Settings, Spread
from refmoe.verifier.verify import DEFAULTS, verify
from tests.bugs.judging import case_named, parameters_of, traced
from tests.command_line import Refmoe

CASES = ("walking-skeleton", "batch-ragged", "shared-prefix", "window-chunks")
"""Prefill, chunks and decode; several sequences; a cache that is cut; a window."""
FORMS = {"[1, V]": lambda array: array[-1:], "[V]": lambda array: array[-1]}


def last_only(trace: Trace, form: str = "[1, V]", taps: tuple[str, ...] = ("logits",)) -> dict[str, Any]:
    """The arrays of a trace, where these taps have the last position only."""
    return {
        key: np.ascontiguousarray(FORMS[form](array) if key.partition("/")[2] in taps else array)
        for key, array in ((key, tensor.map()) for key, tensor in trace.tensors.items())
    }


def written(path: Path, trace: Trace, arrays: dict[str, Any]) -> Trace:
    write_trace(path, Header(trace.runs, policy=trace.header.policy), arrays)
    return read_trace(path)


def judged(trace: Trace, name: str, rules: str = "float32", settings: Settings = DEFAULTS) -> Report:
    case = case_named(name)
    return verify(trace, name, case.config, parameters_of(name), case.runs(), policy(rules), settings)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_logits_of_the_last_position_are_judged_in_every_run(tmp_path: Path, name: str, form: str) -> None:
    trace = traced(None, name, "float32")
    report = judged(written(tmp_path / "t.safetensors", trace, last_only(trace, form)), name)
    assert report.verdict == CONFORMANT
    vocab = case_named(name).config.vocab
    checks = [check for check in report.checks if check.tap == "logits"]
    assert [check.values for check in checks] == [vocab] * len(trace.runs)
    whole = judged(trace, name)
    for tap in {check.tap for check in report.checks} - {"logits"}:
        counts = [sum(check.values for check in each.checks if check.tap == tap) for each in (report, whole)]
        # the tokens before the last are a piece of their own, which has no probabilities for the key of the last
        unseen = sum(len(run.tokens) - 1 for run in trace.runs) * case_named(name).config.heads
        assert counts[1] - counts[0] == (unseen if step_of(tap) == "attention.probs" else 0), tap
    positions = sum(len(run.tokens) for run in trace.runs)
    assert any(f"{len(trace.runs)} of {positions} positions" in note for note in report.notes)


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_value_there_is_found_in_its_run(tmp_path: Path, name: str) -> None:
    trace = traced(None, name, "float32")
    for run in trace.runs:
        arrays = last_only(trace)
        wrong = arrays[f"{run.run}/logits"].copy()
        wrong[0, 3] += 1e-3 * np.abs(wrong).max()
        report = judged(written(tmp_path / "t.safetensors", trace, arrays | {f"{run.run}/logits": wrong}), name)
        assert report.verdict == NOT_CONFORMANT
        assert report.first_wrong is not None
        piece = next(each for each in by_pieces(trace_of(trace, arrays), trace.runs, case_named(name).config)[1][::-1]
                     if call_of(each) == run.run)  # fmt: skip
        assert report.first_wrong == (piece.run, "logits")
        assert piece.tokens[-1] == run.tokens[-1]
        assert piece.positions[-1] == run.positions[-1]


def trace_of(trace: Trace, arrays: dict[str, Any]) -> Trace:
    return held_trace(trace.header, arrays)


def test_the_logits_of_another_position_fail(tmp_path: Path) -> None:
    trace = traced(None, "walking-skeleton", "float32")
    arrays = last_only(trace)
    arrays["prefill/logits"] = np.array(trace.get("prefill", "logits")[:1])
    assert judged(written(tmp_path / "t.safetensors", trace, arrays), "walking-skeleton").verdict == NOT_CONFORMANT


def test_processes_judge_the_same(tmp_path: Path) -> None:
    name = "walking-skeleton"
    trace = traced(None, name, "float32")
    found = written(tmp_path / "t.safetensors", trace, last_only(trace))
    with open_executor("processes:1") as executor:
        spread = Spread(executor, case_source(case_named(name)))
        here, there = judged(found, name), judged(found, name, settings=Settings(spread=spread))
        assert repr(here.checks) == repr(there.checks)


def test_a_bug_is_named_by_such_a_trace() -> None:
    name, bug = "walking-skeleton", "head-tied-wrongly"
    wrong = traced(bug, name, "float32")
    trace, case, rules = trace_of(wrong, last_only(wrong)), case_named(name), policy("float32")
    report = judged(trace, name)
    found = diagnose(trace, case.config, parameters_of(name), case.runs(), rules, report, [MUTANTS[bug]])
    assert [each.name for each in found if each.explains] == [bug]


def test_logits_of_some_positions_have_no_power_of_all() -> None:
    trace = traced(None, "walking-skeleton", "float32")
    logits = restricted(trace, frozenset(["logits"]))
    config = case_named("walking-skeleton").config
    assert held_steps(logits, config) == {"logits"}
    assert held_steps(trace_of(logits, last_only(logits)), config) == frozenset()
    divided = by_pieces(trace_of(logits, last_only(logits)), trace.runs, config)[0]
    assert held_steps(divided, config) == frozenset()


def test_distances_compare_the_last_position() -> None:
    trace = traced(None, "walking-skeleton", "float32")
    found = compare_traces(trace_of(trace, last_only(trace)), trace)
    last = [each for each in found.distances if each.tap == "logits"]
    assert len(last) == len(trace.runs)
    assert all(each.worst == 0 for each in last)
    assert [each.where[0] for each in last] == [len(run.tokens) - 1 for run in trace.runs]


@pytest.mark.parametrize("tap", ["final_norm", "layers.1.residual"])
def test_other_taps_need_all_positions(tap: str) -> None:
    trace = traced(None, "walking-skeleton", "float32")
    arrays = last_only(trace, taps=(tap,))
    arrays |= {key: array[-1:] for key, array in arrays.items() if key.partition("/")[2] == tap}
    with pytest.raises(InputError, match="shape"):
        take_in(trace_of(trace, arrays), case_named("walking-skeleton").config, trace.runs)


@pytest.mark.parametrize("rows", [2, 11, 13])
def test_another_number_of_rows_is_refused(rows: int) -> None:
    trace = traced(None, "walking-skeleton", "float32")
    arrays = last_only(trace) | {"prefill/logits": np.zeros((rows, 97), np.float32)}
    with pytest.raises(InputError) as raised:
        take_in(trace_of(trace, arrays), case_named("walking-skeleton").config, trace.runs)
    assert (NO_PADDING in str(raised.value)) == (rows == 13)


def test_a_run_with_the_name_of_a_piece_is_refused() -> None:
    trace = traced(None, "walking-skeleton", "float32")
    prefill, chunk = trace.runs[0], trace.runs[1]
    runs = (prefill, replace(chunk, run="prefill[11:12]"), *trace.runs[2:])
    arrays = {key.replace("chunk1/", "prefill[11:12]/"): array for key, array in last_only(trace).items()}
    with pytest.raises(InputError, match="piece"):
        take_in(trace_of(replace(trace, header=Header(runs)), arrays), case_named("walking-skeleton").config, None)


SHAPES: dict[str, dict[str, tuple[int, ...] | None]] = {
    "ids without values": {LOGPROBS: None, IDS: (12, 3)},
    "no entry": {LOGPROBS: (12, 0), IDS: (12, 0)},
    "more entries than the vocabulary has": {LOGPROBS: (12, 98), IDS: (12, 98)},
    "two shapes": {LOGPROBS: (12, 3), IDS: (12, 4)},
    "one row and all": {LOGPROBS: (12, 3), IDS: (1, 3)},
    "a few entries without ids": {LOGPROBS: (12, 3), IDS: None},
    "a number": {LOGPROBS: (), IDS: None},
    "a number of ids": {LOGPROBS: (), IDS: ()},
    "padded": {LOGPROBS: (13, 97), IDS: None},
}


@pytest.mark.parametrize("shapes", SHAPES)
def test_log_probabilities_of_other_shapes_are_refused(shapes: str) -> None:
    trace = traced(None, "walking-skeleton", "float32")
    arrays = {
        f"prefill/{tap}": np.zeros(shape, np.int64 if tap == IDS else np.float32)
        for tap, shape in SHAPES[shapes].items()
        if shape is not None
    }
    with pytest.raises(InputError, match="prefill/logprobs"):
        take_in(trace_of(trace, arrays), case_named("walking-skeleton").config, trace.runs)


@pytest.mark.parametrize(("tap", "dtype"), [(IDS, np.float32), (LOGPROBS, np.int64)])
def test_ids_are_integers_and_values_are_not(tap: str, dtype: Any) -> None:
    trace = traced(None, "walking-skeleton", "float32")
    arrays: dict[str, Any] = {
        f"prefill/{LOGPROBS}": np.zeros((12, 3), np.float32), f"prefill/{IDS}": np.zeros((12, 3), np.int64)
    }  # fmt: skip
    arrays[f"prefill/{tap}"] = arrays[f"prefill/{tap}"].astype(dtype)
    with pytest.raises(InputError, match="dtype"):
        take_in(trace_of(trace, arrays), case_named("walking-skeleton").config, trace.runs)


def test_every_tap_of_the_head_may_be_of_the_last_position() -> None:
    trace = traced(None, "walking-skeleton", "float32")
    arrays = {
        "prefill/logits": np.zeros(97, np.float32), f"prefill/{LOGPROBS}": np.zeros(3, np.float32),
        f"prefill/{IDS}": np.zeros(3, np.int64),
    }  # fmt: skip
    contents = take_in(trace_of(trace, arrays), case_named("walking-skeleton").config, trace.runs)
    assert contents.present["prefill[11:12]"] == {*LAST_ONLY}
    assert contents.values == 97 + 3 + 3


# ---- rows of -1


def test_a_row_of_minus_one_is_wrong_and_explained() -> None:
    """A trace has no padding, so that such a row is a token that no expert was given."""
    trace = traced(None, "walking-skeleton", "float32")
    arrays = {key: np.array(tensor.map()) for key, tensor in trace.tensors.items()}
    arrays["prefill/layers.0.router.experts"][4] = -1
    report = judged(trace_of(trace, arrays), "walking-skeleton")
    check = report.check("prefill", "layers.0.router.experts")
    assert check is not None
    assert (report.verdict, report.first_wrong) == (NOT_CONFORMANT, ("prefill", "layers.0.router.experts"))
    assert NO_PADDING in check.reason
    arrays["prefill/layers.0.router.experts"][5] = 999
    again = judged(trace_of(trace, arrays), "walking-skeleton").check("prefill", "layers.0.router.experts")
    assert again is not None
    assert NO_PADDING not in again.reason


# ---- the command line


def test_every_form_of_a_report_shows_log_probabilities(refmoe: Refmoe, tmp_path: Path) -> None:
    trace = traced(None, "dims-distinct", "float32")
    arrays = {key: np.array(tensor.map()) for key, tensor in trace.tensors.items()}
    ids = np.argsort(-arrays["prefill/logits"], -1)[:, :4]
    arrays |= {f"prefill/{LOGPROBS}": np.zeros((len(ids), 4), np.float32), f"prefill/{IDS}": np.ascontiguousarray(ids)}
    path, page, junit = (tmp_path / part for part in ("t.safetensors", "page.html", "junit.xml"))
    write_trace(path, Header(trace.runs, case="dims-distinct", policy="float32"), arrays)
    status, text, said = refmoe("verify", path, "--no-diagnose", "--html", page, "--junit", junit)
    assert (status, said) == (1, "")
    _, document, _ = refmoe("verify", path, "--no-diagnose", "--json")
    for shown in (text, document, page.read_text(), junit.read_text()):
        assert LOGPROBS in shown
        assert IDS in shown
