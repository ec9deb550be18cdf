# SPDX-License-Identifier: Apache-2.0
"""Engines with quantised matrices: the ideal one and llama.cpp conform, and each planted fault is seen where it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refmoe.arithmetic.codes import Codes, Factors, InputFormat, quantise
from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.arithmetic.formats import FLOAT16, FLOAT32, nearest
from refmoe.bugs.catalogue import MUTANTS
from refmoe.checkpoints.gguf_file import write_gguf
from refmoe.checkpoints.layout import Checkpoint
from refmoe.checkpoints.load import load_checkpoint
from refmoe.checkpoints.synthetic import synthetic_checkpoint
from refmoe.engines.adapters import llama_cpp
from refmoe.errors import InputError
from refmoe.profiles.load import policy
from refmoe.profiles.policy import Policy
from refmoe.spec.config import Config
from refmoe.spec.model import Model
from refmoe.steps.coded import groups_of
from refmoe.steps.enclosure_ops import EnclosureOps
from refmoe.steps.policy_ops import PolicyOps
from refmoe.steps.rounding import CUT_STEPS
from refmoe.suite import read_case
from refmoe.traces.script import execute, plan
from refmoe.traces.trace import Header, Recorder, Run, read_trace, write_trace
from refmoe.verifier.contested import Contested
from refmoe.verifier.diagnosis.diagnose import diagnose
from refmoe.verifier.findings import CONFORMANT, FAIL, NOT_CONFORMANT, Check, Explanation, Report
from refmoe.verifier.verify import verify
from tests.checkpoints import quantised_folders

pytestmark = pytest.mark.skipif(find_spec("gguf") is None, reason="gguf not installed: pip install -e '.[test]'")
engine = pytest.mark.skipif(
    find_spec("xllamacpp") is None, reason="xllamacpp not installed: pip install -e '.[llama-cpp]'"
)
NAME = "llama.cpp-quantised+attention.context.accumulation=float32"
CONFIG = Config(
    dim=256, layers=1, heads=4, kv_heads=2, head_dim=64, hidden_dim=512, vocab=64, experts=3, experts_per_token=2,
    norm_eps=1e-5, rope_theta=1e4,
)  # fmt: skip
RUNS: tuple[Run, ...] = plan([("prefill", 0, [3, 14, 15, 9, 26, 5, 35, 8]), ("decode", 0, [2])], CONFIG.vocab)
PLAIN = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4")
"""Formats that the package gguf writes by itself."""
KINDS = (*PLAIN, *(pytest.param(kind, marks=engine) for kind in ("Q4_K", "Q5_K", "Q6_K", "Q4_K_M")))


@pytest.fixture(scope="module")
def model_in(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """The same model in a format."""

    @cache
    def made(kind: str) -> Checkpoint:
        path = tmp_path_factory.mktemp("model") / "model.gguf"
        write_gguf(path, CONFIG, synthetic_checkpoint(CONFIG, 4).parameters, kind)
        return load_checkpoint(path)

    return made


def trace_of(ops: Callable[[Policy, Any], PolicyOps], model: Checkpoint, rules: Policy) -> dict[str, Any]:
    recorder = Recorder()
    execute(ops(rules, recorder), Model(model.config, model.parameters, CUT_STEPS), RUNS, recorder)
    return recorder.arrays


def judged(arrays: dict[str, Any], model: Checkpoint, name: str, folder: Path) -> Report:
    path = folder / "trace.safetensors"
    write_trace(path, Header(RUNS, "test", policy=name), arrays)
    return verify(read_trace(path), "test", model.config, model.parameters, RUNS, policy(name))


@pytest.mark.parametrize("kind", KINDS)
def test_the_ideal_engine_conforms(kind: str, model_in: Callable[[str], Checkpoint], tmp_path: Path) -> None:
    for rules in (NAME, "llama.cpp-quantised-sse42", "ik-llama.cpp-quantised", f"{NAME}+ranks=2"):
        model = model_in(kind)
        report = judged(trace_of(PolicyOps, model, policy(rules)), model, rules, tmp_path)
        assert report.verdict == CONFORMANT, report.headline


def test_codes_of_another_engine_are_seen_at_the_first_product(
    model_in: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    model = model_in("Q8_0")
    arrays = trace_of(PolicyOps, model, policy("ik-llama.cpp-quantised+attention.context.accumulation=float32"))
    report = judged(arrays, model, NAME, tmp_path)
    assert report.first_wrong == ("prefill", "layers.0.attention.q")
    plain = trace_of(PolicyOps, model, policy("llama.cpp-float32-flash+Q8_0.input=float32"))
    assert judged(plain, model, NAME, tmp_path).first_wrong == ("prefill", "layers.0.attention.q")


OTHER_RULES = {
    "ik-llama.cpp-quantised+attention.context.accumulation=float32": "codes=q8_2",
    f"{NAME}+codes=float32": "codes=float32",
    f"{NAME}+codes=float16": "codes=float16",
    f"{NAME}+codes=q8_0": "codes=q8_0",
}


@pytest.mark.slow
@pytest.mark.parametrize("rules", OTHER_RULES)
def test_codes_of_another_engine_are_named(rules: str, model_in: Callable[[str], Checkpoint], tmp_path: Path) -> None:
    model = model_in("Q4_1")
    found = explanations(trace_of(PolicyOps, model, policy(rules)), model, tmp_path)
    assert [each.name.rpartition("+")[2] for each in found if each.explains][:1] == [OTHER_RULES[rules]]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["last term dropped", "codes truncated", "one code off by one"])
def test_a_fault_that_no_rule_explains_gets_no_name(
    fault: str, model_in: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    model = model_in("Q8_0")
    arrays = trace_of(lambda *a: Faulty(*a, EVERYWHERE[fault]), model, policy(NAME))
    assert [each.name for each in explanations(arrays, model, tmp_path) if each.explains] == []


def explanations(arrays: dict[str, Any], model: Checkpoint, folder: Path) -> tuple[Explanation, ...]:
    report, trace = judged(arrays, model, NAME, folder), read_trace(folder / "trace.safetensors")
    return diagnose(trace, model.config, model.parameters, RUNS, policy(NAME), report, MUTANTS.values())


# ---- planted faults


@dataclass(frozen=True)
class Parts:
    """What an engine multiplies: codes, the sums of groups, and a matrix."""

    codes: Codes
    values: Any
    """[t, n]"""
    sums: Any
    """[t, groups], or None."""
    factors: Factors


Fault = Callable[[Parts], Parts]


def dropped_term(parts: Parts) -> Parts:
    values = parts.values.copy()
    values[:, -1] = 0
    return replace(parts, values=values)


def other_rule(**changes: Any) -> Fault:
    """Another rule for the codes of the same rows."""

    def fault(parts: Parts) -> Parts:
        ideal, how = parts.codes.ideal, replace(parts.codes.how, **changes)
        rows = nearest(ideal * np.repeat(parts.codes.unrounded, parts.codes.width, axis=1), FLOAT32)
        made = quantise(rows, how)
        return replace(parts, values=made.values, sums=None if parts.sums is None else made.sums(parts.sums.shape[1]))

    return fault


def truncated(parts: Parts) -> Parts:
    codes = parts.codes
    made = replace(codes, codes=np.trunc(codes.ideal))
    return replace(parts, values=made.values, sums=None if parts.sums is None else made.sums(parts.sums.shape[1]))


def one_code_off(parts: Parts) -> Parts:
    codes = parts.codes.codes.copy()
    codes[:, 0] += np.where(codes[:, 0] < 127, 1, -1)
    return replace(parts, values=replace(parts.codes, codes=codes).values)


def one_scale_off(parts: Parts) -> Parts:
    scales = parts.codes.scales.copy()
    scales[:, -1] = np.nextafter(scales[:, -1].astype(np.float16), np.float16(np.inf))
    return replace(parts, values=replace(parts.codes, scales=scales).values)


def not_quantised(parts: Parts) -> Parts:
    values = parts.codes.ideal * np.repeat(parts.codes.unrounded, parts.codes.width, axis=1)
    sums = None if parts.sums is None else values.reshape(len(values), parts.sums.shape[1], -1).sum(-1)
    return replace(parts, values=values, sums=sums)


def dropped_offset(parts: Parts) -> Parts:
    sums = parts.sums.copy()
    sums[:, -1] = 0
    return replace(parts, sums=sums)


EVERYWHERE: dict[str, Fault] = {
    "last term dropped": dropped_term,
    "codes truncated": truncated,
    "one code off by one": one_code_off,
    "inputs not quantised": not_quantised,
}
FAULTS: list[tuple[str, str, Fault]] = [
    *((kind, name, fault) for kind in ("Q8_0", "Q4_1", "MXFP4") for name, fault in EVERYWHERE.items()),
    ("Q8_0", "scale kept in float32", other_rule(scale=FLOAT32)),
    ("Q8_0", "one scale to its neighbour", one_scale_off),
    ("Q5_1", "scale kept in float32", other_rule(scale=FLOAT32)),
    ("Q5_1", "sums not rounded to float16", other_rule(sums=None)),
    ("Q4_1", "offset of the last group dropped", dropped_offset),
]
K_FAULTS: list[tuple[str, str, Fault]] = [
    *((kind, name, fault) for kind in ("Q4_K", "Q6_K") for name, fault in EVERYWHERE.items()),
    ("Q4_K", "scale stored as float16", other_rule(scale=FLOAT16)),
    ("Q5_K", "offset of the last group dropped", dropped_offset),
]


class Faulty(PolicyOps):
    """The ideal engine with one fault in every product, or with an accumulator of another dtype."""

    def __init__(self, rules: Policy, tap: Any, fault: Fault, accumulator: Any = None) -> None:
        super().__init__(rules, tap)
        self._fault, self._accumulator = fault, accumulator

    def _times_codes(self, x: Any, weight: Any, coded: InputFormat) -> Any:
        groups, codes = groups_of(weight), quantise(x.reshape(-1, x.shape[-1]), coded)
        sums = codes.sums(groups) if groups else None
        parts = self._fault(Parts(codes, codes.values, sums, weight.factors(0, weight.shape[0])))
        blocks = parts.values.reshape(len(parts.values), -1, 32), parts.factors.terms.reshape(weight.shape[0], -1, 32)
        terms = np.einsum("tbk,mbk->btm", *blocks, optimize=True)
        if groups:
            terms = terms + np.einsum("tb,mb->btm", parts.sums, parts.factors.offsets)
        if self._accumulator is None:
            made = terms.sum(0)
        else:
            made = np.zeros(terms.shape[1:], self._accumulator)
            for term in terms:
                made = (made + term.astype(self._accumulator)).astype(self._accumulator)
        return np.asarray(made, np.float64).reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize(
    ("kind", "name", "fault"), [*FAULTS, *(pytest.param(*each, marks=engine) for each in K_FAULTS)]
)  # fmt: skip
def test_a_planted_fault_is_seen_where_it_is(
    kind: str, name: str, fault: Fault, model_in: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    """A limit of 5e-4 on the normalised error, as llama.cpp's own tests have it, passes most of them."""
    model = model_in(kind)
    report = judged(trace_of(lambda *a: Faulty(*a, fault), model, policy(NAME)), model, NAME, tmp_path)
    assert (report.verdict, report.first_wrong) == (NOT_CONFORMANT, ("prefill", "layers.0.attention.q")), name
    wrong = {check.step for check in report.checks if check.verdict == FAIL}
    assert wrong >= {"attention.q", "attention.k", "attention.v", "attention.output", "logits"}, name
    assert wrong <= {"attention.q", "attention.k", "attention.v", "attention.output", "expert.gate", "expert.up",
                     "expert.output", "logits"}, name  # fmt: skip


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", pytest.param("Q4_K", marks=engine)])
def test_a_float16_accumulator_is_seen_and_a_float32_one_is_not(
    kind: str, model_in: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    model, seen = model_in(kind), {}
    for dtype in (np.float16, np.float32):
        arrays = trace_of(lambda *a, d=dtype: Faulty(*a, lambda parts: parts, d), model, policy(NAME))
        seen[dtype] = judged(arrays, model, NAME, tmp_path)
    assert seen[np.float16].first_wrong == ("prefill", "layers.0.attention.q")
    assert seen[np.float32].verdict == CONFORMANT, seen[np.float32].headline


# ---- contestable codes


def test_one_choice_of_a_contestable_code_explains_every_product_of_the_row(
    model_in: Callable[[str], Checkpoint],
) -> None:
    """Half-even or half-away are both legal, but not half-even in the queries and half-away in the keys."""
    layer, rules = model_in("Q8_0").parameters.layers[0], policy(NAME)
    rows = np.random.default_rng(1).integers(-60, 60, (2, CONFIG.dim)).astype(np.float64)
    rows[:, ::32], rows[0, 5] = 127, 6.5
    outputs = {
        name: PolicyOps(policy(each)).linear(rows, layer.wq) for name, each in
        (("even", NAME), ("away", "llama.cpp-quantised-sse42"))
    }  # fmt: skip
    assert (outputs["even"][0] != outputs["away"][0]).any()
    for first, second, legal in (("even", "even", True), ("away", "away", True), ("even", "away", False)):
        ops, contested = EnclosureOps(rules), Contested()
        assert inside(
            contested.explained(ops.linear(Enclosure(rows), layer.wq), outputs[first], FLOAT32), outputs[first]
        )
        keys = PolicyOps(policy(NAME if second == "even" else "llama.cpp-quantised-sse42")).linear(rows, layer.wk)
        assert inside(contested.explained(ops.linear(Enclosure(rows), layer.wk), keys, FLOAT32), keys) == legal


def inside(x: Enclosure, found: Any) -> bool:
    assert x.choices is None
    return bool((np.abs(nearest(found, FLOAT32) - x.mid) <= x.r).all())


def test_a_row_that_no_choice_explains_leaves_all_choices_to_the_next_product(
    model_in: Callable[[str], Checkpoint],
) -> None:
    """Wrong queries say nothing about the codes that the keys read."""
    layer, rules = model_in("Q8_0").parameters.layers[0], policy(NAME)
    rows = np.full((1, CONFIG.dim), 6.5)
    rows[:, ::32], rows[0, 2::32] = 127, 3
    rows[0, 7:] = np.rint(rows[0, 7:])
    ops, contested = EnclosureOps(rules), Contested()
    queries = ops.linear(Enclosure(rows), layer.wq)
    contested.explained(queries, queries.mid + 1e3, FLOAT32)
    keys = PolicyOps(policy("llama.cpp-quantised-sse42")).linear(rows, layer.wk)
    assert inside(contested.explained(ops.linear(Enclosure(rows), layer.wk), keys, FLOAT32), keys)


@pytest.mark.parametrize(("kind", "seed"), [("Q8_0", 4), pytest.param("Q6_K", 2, marks=engine)])
def test_two_legal_engines_whose_logits_differ_by_one_code(kind: str, seed: int, tmp_path: Path) -> None:
    """A public dispute: two honest builds, a code of an input at a boundary, and other logits.

    Each step of both is legal. The reports name the first such code and what each engine made of it. All codes before
    it are equal, and logits alone cannot tell.
    """
    write_gguf(tmp_path / "model.gguf", CONFIG, synthetic_checkpoint(CONFIG, seed).parameters, kind)
    model = load_checkpoint(tmp_path / "model.gguf")
    traces = [trace_of(ops, model, policy(NAME)) for ops in (PolicyOps, OtherCodes)]
    one, other = (judged(arrays, model, NAME, tmp_path) for arrays in traces)
    assert one.verdict == other.verdict == CONFORMANT, other.headline
    assert [code.deviates for code in one.codes] == [False] * len(one.codes) != []
    first, same = one.codes[0], other.codes[0]
    assert (same.run, same.tap, same.where, same.ideal) == (first.run, first.tap, first.where, first.ideal)
    assert (first.found, same.found) == (first.rule, first.other)
    assert abs(first.ideal - (first.rule + first.other) / 2) < 1e-4
    rows = (array[f"{first.run}/{first.tap}"].reshape(-1, CONFIG.dim)[first.where[0]] for array in traces)
    np.testing.assert_array_equal(*rows)
    right, wrong = (array["prefill/logits"] for array in traces)
    apart = np.abs(right - wrong).max() / np.abs(right).max()
    assert apart > 1000 * FLOAT32.u
    alone = judged({"prefill/logits": wrong}, model, NAME, tmp_path)
    assert (alone.verdict == NOT_CONFORMANT, alone.codes) == (False, ())


class OtherCodes(PolicyOps):
    """The ideal engine, but each code at a boundary is the one that the rule does not give."""

    def _times_codes(self, x: Any, weight: Any, coded: InputFormat) -> Any:
        made, groups = quantise(x.reshape(-1, x.shape[-1]), coded), groups_of(weight)
        codes, doubt = made.codes.copy(), made.contestable()
        for row in np.flatnonzero(doubt.any(-1)):
            codes[row] = made.alternatives(int(row), np.flatnonzero(doubt[row]))[-1].codes[0]
        flipped, factors = replace(made, codes=codes), weight.factors(0, weight.shape[0])
        values = flipped.values @ factors.terms.T.astype(np.float64)
        if groups:
            values = values + flipped.sums(groups) @ factors.offsets.T.astype(np.float64)
        return values.reshape(*x.shape[:-1], -1)


# ---- one scale for each token


@pytest.mark.parametrize("variant", ["ct-int8-channel", "ct-int8-zeros"])
def test_codes_of_a_whole_row_are_judged_too(variant: str, tmp_path: Path) -> None:
    """A folder of safetensors, where every matrix has codes of eight bits and every token one scale."""
    quantised_folders.write(tmp_path, quantised_folders.VARIANTS[variant])
    model = load_checkpoint(tmp_path)
    name = "bfloat16+consumers=stored+int8-channel.input=int8-token"
    arrays = trace_of(PolicyOps, model, policy(name))
    report = judged(arrays, model, name, tmp_path)
    assert report.verdict == CONFORMANT, report.headline
    other = trace_of(PolicyOps, model, policy(f"{name}+int8-channel.input=bfloat16"))
    assert judged(other, model, name, tmp_path).first_wrong == ("prefill", "layers.0.attention.q")


# ---- what is not in the trace


def test_without_the_input_of_a_product_the_report_says_why_it_is_wide(
    model_in: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    model = model_in("Q8_0")
    arrays = trace_of(PolicyOps, model, policy(NAME))
    whole = judged(arrays, model, NAME, tmp_path)
    some = {key: array for key, array in arrays.items() if not key.endswith("attention_norm")}
    report = judged(some, model, NAME, tmp_path)
    assert report.verdict == CONFORMANT
    assert len(report.notes) == len(whole.notes) - len(whole.codes[:1]) + 2
    check, before = (each.check("prefill", "layers.0.attention.q") for each in (report, whole))
    assert width(check) > 100 * width(before)


def width(check: Check | None) -> float:
    """The width of the legal interval of the worst value."""
    assert check is not None
    assert check.worst is not None
    return check.worst.high - check.worst.low


def test_logits_alone_get_no_narrow_verdict(model_in: Callable[[str], Checkpoint], tmp_path: Path) -> None:
    """A flipped code moves logits by more than all rounding, and 16 replicas need not show it."""
    model = model_in("Q8_0")
    arrays = trace_of(PolicyOps, model, policy(NAME))
    logits = {key: array for key, array in arrays.items() if key.endswith("logits") and "router" not in key}
    flipped = {key: array + np.float32(1e-2) * array.std() for key, array in logits.items()}
    for found in (logits, flipped):
        assert judged(found, model, NAME, tmp_path).verdict != NOT_CONFORMANT


def test_rows_that_are_no_whole_blocks_are_refused(tmp_path: Path) -> None:
    config = replace(CONFIG, dim=96, head_dim=24, hidden_dim=64)
    write_gguf(tmp_path / "model.gguf", config, synthetic_checkpoint(config, 1).parameters, "Q8_0")
    weight = load_checkpoint(tmp_path / "model.gguf").parameters.output
    with pytest.raises(InputError, match=r"96.*whole blocks of 256"):
        EnclosureOps(policy(f"{NAME}+Q8_0.input=q8_k")).linear(Enclosure(np.ones((1, 96))), weight)


# ---- a real engine


@engine
@pytest.mark.slow
@pytest.mark.parametrize("flash", ["on", "off"])
@pytest.mark.parametrize("case", ["production-sequences", "production-first"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "MXFP4", "Q4_K_M"])
def test_llama_cpp_conforms(kind: str, case: str, flash: str, tmp_path: Path) -> None:
    """Every product of every call, in each format and in a mixture of formats."""
    model = read_case(Path(__file__).parents[2] / "golden" / case)
    write_gguf(tmp_path / "model.gguf", model.config, model.checkpoint().parameters, kind)
    adapter = llama_cpp.Adapter(cache="float16" if flash == "on" else "float32", flash=flash)
    adapter.load(tmp_path / "model.gguf", "float32")
    name, runs = adapter.policies["float32"], model.runs()
    write_trace(tmp_path / "t.safetensors", Header(runs, case, policy=name), adapter.run(runs, adapter.taps))
    loaded = load_checkpoint(tmp_path / "model.gguf")
    trace = read_trace(tmp_path / "t.safetensors")
    report = verify(trace, case, loaded.config, loaded.parameters, runs, policy(name))
    assert report.verdict == CONFORMANT, report.headline
