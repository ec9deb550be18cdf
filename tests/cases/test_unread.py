# SPDX-License-Identifier: Apache-2.0
"""Calls that nobody reads: they fill the cache, and all that comes after them has the bits of the whole script."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from refmoe.arithmetic.exact.ops import ExactOps
from refmoe.arithmetic.native.ops import NativeOps
from refmoe.bugs.catalogue import MUTANTS
from refmoe.bugs.run_engine import run as run_engine
from refmoe.engines.protocol import UNREAD
from refmoe.engines.run_case import elements_per_key, lacks
from refmoe.engines.serve import Server
from refmoe.errors import InputError
from refmoe.jobs.emission import Emission, check_emission, emit
from refmoe.profiles.load import policy
from refmoe.spec.model import Model, Steps, embed, run_layers
from refmoe.steps.enclosure_ops import EnclosureOps
from refmoe.steps.grouped import GROUPED_STEPS
from refmoe.steps.rounding import CUT_STEPS
from refmoe.suite import Case, case_source, compute, read_case, trace_path
from refmoe.suite.certify import certify
from refmoe.suite.conditions import holding
from refmoe.suite.emission import emit as emit_case
from refmoe.suite.fresh import fresh_case
from refmoe.traces.held import held_trace
from refmoe.traces.script import Call, execute, fill, plan
from refmoe.traces.trace import Header, Recorder, Trace, parse_header, read_trace
from refmoe.verifier.findings import CONFORMANT, NOT_CONFORMANT
from refmoe.verifier.verify import verify
from tests.golden_cases import write_case

GOLDEN = Path(__file__).parents[2] / "golden"
NAMES = ("walking-skeleton", "window-chunks", "shared-prefix", "four-layers", "positions-32768", "batch-ragged")
"""One and several layers, a window, caches that are cut, a start beyond position 0, several sequences."""
each_case = pytest.mark.parametrize("name", NAMES)


def all_but_the_last(name: str) -> Case:
    """The case, of which only the last call of each sequence is read."""
    case = read_case(GOLDEN / name)
    calls = [call for call in case.calls if isinstance(call, Call)]
    last = {call.sequence: i for i, call in enumerate(calls)}
    return replace(case, calls=tuple(call._replace(read=last[call.sequence] == i) for i, call in enumerate(calls)))


def golden_of(case: Case) -> dict[str, Any]:
    """The golden's arrays of the runs that are read. They were computed whole."""
    read = {run.run for run in case.runs() if run.read}
    tensors = read_trace(trace_path(GOLDEN / case.name)).tensors
    return {key: np.array(tensor.map()) for key, tensor in tensors.items() if key.partition("/")[0] in read}


def same_bits(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    assert found.keys() == expected.keys()
    return all(found[key].tobytes() == array.tobytes() for key, array in expected.items())


@each_case
def test_what_follows_unread_calls_has_the_bits_of_the_whole_emission(name: str) -> None:
    case = all_but_the_last(name)
    assert not all(run.read for run in case.runs())
    assert same_bits(compute(case), golden_of(case))


@each_case
@pytest.mark.parametrize("arithmetic", ["exact", "policy:bfloat16"])
def test_layer_by_layer_too(tmp_path: Path, name: str, arithmetic: str) -> None:
    case = all_but_the_last(name)
    made = {}
    for label, of in (("unread", case), ("whole", read_case(GOLDEN / name))):
        emission = Emission(
            source=case_source(of), runs=of.runs(), out=tmp_path / label, arithmetic=arithmetic, digest=False
        )
        emit(emission)
        made[label] = {key: np.array(tensor.map()) for key, tensor in read_trace(tmp_path / label).tensors.items()}
    assert same_bits(made["unread"], {key: made["whole"][key] for key in golden_of(case)})


@each_case
@pytest.mark.parametrize("steps", [Steps(), GROUPED_STEPS, CUT_STEPS], ids=["spec", "grouped", "cut"])
def test_the_caches_are_those_of_a_call_that_is_read(name: str, steps: Any) -> None:
    """In every layer, whatever its steps; so a bug in the steps leaves its mark in the cache."""
    case = read_case(GOLDEN / name)
    run = case.runs()[0]
    ops: Any = NativeOps(np.float64) if steps is not CUT_STEPS else EnclosureOps(policy("float32"), lambda _, x: x)
    model = Model(case.config, case.checkpoint().parameters, steps)
    layers = range(case.config.layers)

    def caches(filled: bool) -> Iterator[bytes]:
        x, positions = embed(ops, model, ops.integers(run.tokens)), ops.integers(run.positions)
        whole = run_layers(ops, model, layers, x, positions)[1]
        for cache in fill(ops, model, layers, x, positions, None) if filled else whole:
            for part in (cache.k, cache.v):
                yield np.asarray(getattr(part, "mid", part)).tobytes()

    assert [*caches(True)] == [*caches(False)]


def test_of_the_last_layer_no_expert_runs_and_nothing_attends() -> None:
    """This is why a long prefix is cheap."""
    case = all_but_the_last("four-layers")
    seen: dict[str, set[str]] = {}

    class Listed(Recorder):
        def __call__(self, name: str, x: Any) -> None:
            seen.setdefault(self.run, set()).add(name)

    recorder = Listed()
    execute(ExactOps(recorder), Model(case.config, case.checkpoint().parameters), case.runs(), recorder)
    whole = seen[case.runs()[-1].run]
    skipped = {name for name in whole if name.startswith("layers.3.") and "attention" not in name} - {
        "layers.3.moe_norm", "layers.3.residual",
    } | {f"layers.3.attention.{tap}" for tap in ("scores", "probs", "context")} | {"final_norm", "logits"}  # fmt: skip
    assert whole - seen[case.runs()[0].run] == skipped


# ---- the files


def test_a_header_has_the_field_only_where_a_run_is_unread() -> None:
    """Files that are older than the field keep their bytes."""
    runs = plan([Call("prefill", 0, (1, 2), read=False), Call("decode", 0, (3,))], 10)
    first, second = Header(runs).to_json()["runs"]
    assert (first["read"], "read" in second) == (False, False)
    assert parse_header(Path("t"), json.dumps(Header(runs).to_json())).runs == runs
    with pytest.raises(InputError, match=r"'runs\[0\].read' is 0"):
        parse_header(Path("t"), json.dumps(Header(runs).to_json()).replace("false", "0"))


def test_a_script_that_nobody_reads_is_refused() -> None:
    with pytest.raises(InputError, match="no call has outputs that are read"):
        plan([Call("prefill", 0, (1,), read=False)], 10)


@pytest.mark.parametrize("store", ["trace", "fingerprint"])
def test_a_case_with_an_unread_call_is_emitted_checked_and_certified(tmp_path: Path, store: str) -> None:
    """The bounds of what is read are those of the whole case, whose golden has the same values."""
    bounds = []
    for name, field in (("whole", ""), ("unread", "read = false\n")):
        folder = write_case(tmp_path / name, more=f'store = "{store}"')
        text = (folder / "case.toml").read_text()
        (folder / "case.toml").write_text(text.replace('op = "prefill"\n', f'op = "prefill"\n{field}'))
        case = read_case(folder)
        emit_case(case)
        bounds.append(certify(case).bounds)
    whole, unread = bounds
    assert {key.partition("/")[0] for key in unread} == {"decode1"}
    assert unread == {key: bound for key, bound in whole.items() if key in unread}


def test_conditions_are_those_of_the_calls_that_are_read() -> None:
    case = all_but_the_last("walking-skeleton")
    assert {"DECODE", "CHUNK"} <= set(holding(case, compute(case)))


def test_a_fresh_case_is_unread_in_the_same_calls() -> None:
    case = all_but_the_last("walking-skeleton")
    assert [run.read for run in fresh_case(case, 7).runs()] == [run.read for run in case.runs()]


def test_the_estimate_of_an_emission_counts_what_is_written() -> None:
    case = all_but_the_last("window-chunks")
    emission = Emission(source=case_source(case), runs=case.runs(), out=Path("t"), arithmetic="float64")
    written = sum(array.nbytes for key, array in compute(case).items() if not key.endswith("router.experts"))
    assert 0.9 * written < check_emission(emission).trace < 1.2 * written


def test_a_long_prefix_needs_little_memory() -> None:
    """32764 tokens are 1 GiB of scores for each thousand of them that would be kept."""
    case = read_case(GOLDEN / "production-positions-32768-decoded")
    emission = Emission(source=case_source(case), runs=case.runs(), out=Path("t"), arithmetic="float32")
    assert check_emission(emission).memory < 1 << 30


# ---- verification


def late(trace: Trace, case: Case) -> Trace:
    """What a trace holds of the runs that are read."""
    read = {run.run for run in case.runs() if run.read}
    arrays = {key: tensor.map() for key, tensor in trace.tensors.items() if key.partition("/")[0] in read}
    return held_trace(replace(trace.header, runs=case.runs()), arrays, "late")


@each_case
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_of_which_late_calls_are_recorded_is_conformant(name: str, dtype: str) -> None:
    case, rules = all_but_the_last(name), policy(dtype)
    parameters = case.checkpoint().parameters
    trace = run_engine(None, case.config, parameters, case.runs(), rules)
    report = verify(trace, name, case.config, parameters, case.runs(), rules)
    assert report.verdict == CONFORMANT
    assert {check.run for check in report.checks} == {run.run for run in case.runs() if run.read}
    assert not any("holds nothing" in note for note in report.notes)


@pytest.mark.parametrize("bug", ["rope-theta-default", "rope-tables-lowprec", "cache-prefill-skips-tokens"])
def test_a_bug_is_seen_in_the_late_calls_alone(bug: str) -> None:
    case, rules = all_but_the_last("positions-32768"), policy("float32")
    parameters = case.checkpoint().parameters
    trace = run_engine(MUTANTS[bug], case.config, parameters, case.runs(), rules)
    assert verify(trace, case.name, case.config, parameters, case.runs(), rules).verdict == NOT_CONFORMANT


@pytest.mark.parametrize("name", ["walking-skeleton", "four-layers", "window-chunks"])
def test_a_mutant_leaves_the_same_late_calls_whether_the_early_ones_are_read_or_not(name: str) -> None:
    """The steps of a bug fill the cache as they would in a call that is read."""
    case, rules = all_but_the_last(name), policy("float32")
    parameters, read = case.checkpoint().parameters, read_case(GOLDEN / name).runs()
    changing = [each for each in MUTANTS.values() if each.in_one_pass and each.steps][::9]
    assert len(changing) > 5
    for each in changing:
        whole = late(run_engine(each, case.config, parameters, read, rules), case)
        found = run_engine(each, case.config, parameters, case.runs(), rules)
        assert same_bits(
            {key: tensor.map() for key, tensor in found.tensors.items()},
            {key: tensor.map() for key, tensor in whole.tensors.items()},
        ), each.id


# ---- engines


class Talkative:
    """An adapter that gives arrays of every run, whether it is read or not."""

    name, version, dtypes, taps, abilities = "talkative", "1", ("float32",), ("logits",), ("decode",)
    policies: dict[str, str] = {}  # noqa: RUF012

    def load(self, checkpoint: Path, dtype: str) -> None:
        pass

    def run(self, runs: Any, taps: Any) -> Any:
        return {f"{run.run}/logits": np.zeros((len(run.tokens), 11), np.float32) for run in runs}


def test_an_adapter_has_the_ability_and_its_arrays_of_unread_runs_are_left_out(tmp_path: Path) -> None:
    server, out = Server(Talkative), tmp_path / "out.safetensors"
    started = server.answer(b'{"command": "start", "protocol": "1"}')
    assert started["abilities"] == ["decode", UNREAD]
    runs = plan([Call("prefill", 0, (1, 2), read=False), Call("decode", 0, (3,))], 11)
    listed = [{**run.to_json(), "tokens": [*run.tokens], "positions": [*run.positions]} for run in runs]
    request = {"command": "run", "runs": listed, "taps": ["logits"], "out": str(out)}
    assert server.answer(json.dumps(request).encode()) == {"ok": True}
    config = read_case(GOLDEN / "walking-skeleton").config
    assert load_file(out).keys() == {"decode1/logits"} == elements_per_key(runs, config, ("logits",)).keys()


def test_a_harness_without_the_ability_is_not_asked() -> None:
    runs = all_but_the_last("window-decode").runs()
    assert lacks(runs, ("chunk", "decode", UNREAD)) is None
    assert "needs unread" in str(lacks(runs, ("chunk", "decode")))
