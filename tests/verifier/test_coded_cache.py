# SPDX-License-Identifier: Apache-2.0
"""A cache of keys and values in codes: the ideal engine and llama.cpp conform, and planted faults are seen there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refmoe.arithmetic.codes import InputFormat, quantise
from refmoe.arithmetic.formats import BFLOAT16, nearest
from refmoe.arithmetic.turning import matrix, turn
from refmoe.bugs.catalogue import MUTANTS
from refmoe.checkpoints.load import load_checkpoint
from refmoe.checkpoints.synthetic import synthetic_checkpoint
from refmoe.checkpoints.write import write_checkpoint
from refmoe.engines.adapters import llama_cpp
from refmoe.errors import InputError
from refmoe.profiles.load import policy
from refmoe.profiles.policy import Policy
from refmoe.spec.config import Config
from refmoe.spec.model import Model, Parameters
from refmoe.steps.policy_ops import PolicyOps
from refmoe.steps.rounding import CUT_STEPS
from refmoe.suite import read_case
from refmoe.traces.script import execute, plan
from refmoe.traces.trace import Header, Recorder, Run, read_trace, write_trace
from refmoe.verifier.diagnosis.arithmetic import WIDE_SUMS
from refmoe.verifier.diagnosis.diagnose import diagnose
from refmoe.verifier.findings import CONFORMANT, Report
from refmoe.verifier.verify import verify

engine = pytest.mark.skipif(
    find_spec("xllamacpp") is None or find_spec("gguf") is None,
    reason="xllamacpp or gguf not installed: pip install -e '.[llama-cpp]'",
)
GOLDEN = Path(__file__).parents[2] / "golden"
CONFIG = Config(
    dim=128, layers=2, heads=4, kv_heads=2, head_dim=64, hidden_dim=64, vocab=64, experts=3, experts_per_token=2,
    norm_eps=1e-5, rope_theta=1e4,
)  # fmt: skip
RUNS: tuple[Run, ...] = plan([("prefill", 0, [3, 14, 15, 9, 26, 5, 35, 8]), ("decode", 0, [2])], CONFIG.vocab)
FIRST = ("prefill", "layers.0.attention.context")
NAMES = (
    "llama.cpp-cache-q8_0", "llama.cpp-cache-q4_0", "llama.cpp-cache-q8_0+turn=none",
    "llama.cpp-cache-q4_0+turn=stages", "llama.cpp-cache-q8_0+cache.k=float16",
    "bfloat16+consumers=stored+cache=e4m3-cache",
    "float32+cache=e5m2-cache", "float32+cache.k=int8-token", "float32+cache.v=q8_0",
)  # fmt: skip


@pytest.fixture(scope="module")
def parameters() -> Parameters:
    return synthetic_checkpoint(CONFIG, 4).parameters


def trace_of(ops: PolicyOps, parameters: Parameters, recorder: Recorder) -> dict[str, Any]:
    execute(ops, Model(CONFIG, parameters, CUT_STEPS), RUNS, recorder)
    return {key: array for key, array in recorder.arrays.items() if not key.endswith(UNSEEN)}


UNSEEN = ("attention.scores", "attention.probs")
"""What no fused attention shows."""


def judged(arrays: dict[str, Any], parameters: Parameters, name: str, folder: Path) -> Report:
    path = folder / "trace.safetensors"
    write_trace(path, Header(RUNS, "test", policy=name), arrays)
    return verify(read_trace(path), "test", CONFIG, parameters, RUNS, policy(name))


def ideal(rules: Policy, parameters: Parameters) -> dict[str, Any]:
    recorder = Recorder()
    return trace_of(PolicyOps(rules, recorder), parameters, recorder)


@pytest.mark.parametrize("name", NAMES)
def test_the_ideal_engine_conforms_and_one_with_another_cache_does_not(
    name: str, parameters: Parameters, tmp_path: Path
) -> None:
    report = judged(ideal(policy(name), parameters), parameters, name, tmp_path)
    assert report.verdict == CONFORMANT, report.headline
    for other in (f"{name}+cache=float32", f"{name}+cache=q8_2"):
        assert judged(ideal(policy(other), parameters), parameters, name, tmp_path).first_wrong == FIRST


@pytest.mark.parametrize("cache", ["q8_0", "q4_0"])
def test_heads_that_are_turned_and_those_that_are_not_are_told_apart(
    cache: str, parameters: Parameters, tmp_path: Path
) -> None:
    turned, other = f"llama.cpp-cache-{cache}", f"llama.cpp-cache-{cache}+turn=none"
    for made, name in ((turned, other), (other, turned)):
        report = judged(ideal(policy(made), parameters), parameters, name, tmp_path)
        assert report.first_wrong == FIRST
        check = next(each for each in report.checks if (each.run, each.tap) == FIRST)
        assert check.outside > 0.8 * check.values


class ByProduct(PolicyOps):
    """An engine that turns heads by a product with the matrix, in float32."""

    def turned(self, cut: str, x: Any) -> Any:
        rows = x.reshape(-1, 64).astype(np.float32) @ matrix(64).astype(np.float32)
        return rows.reshape(x.shape).astype(np.float64)


@pytest.mark.parametrize("engine_of", [PolicyOps, ByProduct])
@pytest.mark.parametrize("name", ["llama.cpp-cache-q8_0", "llama.cpp-cache-q4_0"])
def test_stages_and_products_are_some_of_the_orders(
    name: str, engine_of: type[PolicyOps], parameters: Parameters, tmp_path: Path
) -> None:
    recorder = Recorder()
    arrays = trace_of(engine_of(policy(f"{name}+turn=stages"), recorder), parameters, recorder)
    report = judged(arrays, parameters, name, tmp_path)
    assert report.verdict == CONFORMANT, report.headline


def test_without_the_keys_the_report_is_wide_and_accuses_nobody(parameters: Parameters, tmp_path: Path) -> None:
    """Rotated keys are not in the trace, so that their codes are not known."""
    name = "llama.cpp-cache-q8_0"
    for dropped in (("k_rope",), ("k_rope", "q_rope"), ("k_rope", "attention.k"), ("attention.v",), ("k_rope", ".v")):
        arrays = ideal(policy(name), parameters)
        some = {key: array for key, array in arrays.items() if not key.endswith(dropped)}
        assert judged(some, parameters, name, tmp_path).verdict == CONFORMANT, dropped


# ---- faults


Code = Callable[[Any, InputFormat], Any]


def by_another_rule(**changes: Any) -> Code:
    def code(x: Any, how: InputFormat) -> Any:
        return quantise(x, replace(how, **changes)).values

    return code


def one_code_off(x: Any, how: InputFormat) -> Any:
    codes = quantise(x, how)
    codes.codes[0, 5] += np.where(codes.codes[0, 5] > 0, -1, 1)
    return codes.values


def scale_of_the_neighbour(x: Any, how: InputFormat) -> Any:
    codes = quantise(x, how)
    return codes.codes * np.repeat(np.roll(codes.scales, 1, axis=1), codes.width, axis=1)


def truncated(x: Any, how: InputFormat) -> Any:
    codes = quantise(x, how)
    return np.trunc(codes.ideal) * np.repeat(codes.scales, codes.width, axis=1)


def halves(x: Any, how: InputFormat) -> Any:
    """Scales shared by values whose pairs stand half a head apart."""
    order = np.arange(x.shape[-1]).reshape(-1, 2).T.reshape(-1)
    return quantise(x[:, order], how).values[:, np.argsort(order)]


FAULTS: dict[str, tuple[str, Code]] = {
    "one code off": ("cache.k", one_code_off),
    "one code of a value off": ("cache.v", one_code_off),
    "scale of the neighbour": ("cache.k", scale_of_the_neighbour),
    "scale of a value's neighbour": ("cache.v", scale_of_the_neighbour),
    "keys truncated": ("cache.k", truncated),
    "values truncated": ("cache.v", truncated),
    "another maximum": ("cache.k", by_another_rule(most=126.0)),
    "scale in float32": ("cache.v", by_another_rule(scale=policy("float32").storage)),
    "queries not coded": ("attention.query", lambda x, how: x),
    "queries truncated": ("attention.query", truncated),
    "order of pairs": ("cache.k", halves),
}


TURNS: dict[str, Callable[[str, Any], Any]] = {
    "queries not turned": lambda _, x: x,
    "values turned in other blocks": lambda _, x: turn(x, 32, np.float32),
    "turned with another factor": lambda _, x: turn(x, 64, np.float32) * 2.0**-1,
    "turned in bfloat16": lambda _, x: nearest(turn(x, 64, np.float32), BFLOAT16),
}


class WronglyTurned(PolicyOps):
    """An engine that turns heads in another way at one place."""

    def __init__(self, rules: Policy, recorder: Recorder, fault: str) -> None:
        super().__init__(rules, recorder)
        self.fault, self.calls = fault, 0

    def turned(self, cut: str, x: Any) -> Any:
        """Keys and values, then queries, then the context, in each layer."""
        self.calls += 1
        wrong = 3 if self.fault == "queries not turned" else 2
        return TURNS[self.fault](cut, x) if self.calls % 4 == wrong else super().turned(cut, x)


@pytest.mark.parametrize("fault", TURNS)
def test_a_wrong_turn_is_seen(fault: str, parameters: Parameters, tmp_path: Path) -> None:
    name, recorder = "llama.cpp-cache-q8_0", Recorder()
    arrays = trace_of(WronglyTurned(policy(name), recorder, fault), parameters, recorder)
    assert judged(arrays, parameters, name, tmp_path).first_wrong == FIRST


class Faulty(PolicyOps):
    """An engine with a fault in what it keeps at one cut point."""

    def __init__(self, rules: Policy, recorder: Recorder, fault: str) -> None:
        super().__init__(rules, recorder)
        self.at, self.code = FAULTS[fault]

    def cut(self, name: str, x: Any) -> Any:
        if name != self.at:
            return super().cut(name, x)
        how, order = self.policy.kept[name], np.arange(x.shape[-1])
        if name != "cache.v":
            order = order.reshape(2, -1).T.reshape(-1)
        flat = self.code(x.reshape(-1, x.shape[-1])[:, order], how)
        return flat[:, np.argsort(order)].reshape(x.shape)


@pytest.mark.parametrize("order", ["any-order", "none"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen_where_it_is(fault: str, order: str, parameters: Parameters, tmp_path: Path) -> None:
    name, recorder = f"llama.cpp-cache-q8_0+turn={order}", Recorder()
    arrays = trace_of(Faulty(policy(name), recorder, fault), parameters, recorder)
    assert judged(arrays, parameters, name, tmp_path).first_wrong == FIRST


# ---- names


def named(arrays: dict[str, Any], parameters: Parameters, declared: str, folder: Path) -> list[str]:
    """The causes that explain a trace, of all that there are."""
    report = judged(arrays, parameters, declared, folder)
    assert report.first_wrong == FIRST
    trace = read_trace(folder / "trace.safetensors")
    found = diagnose(trace, CONFIG, parameters, RUNS, policy(declared), report, MUTANTS.values())
    return [each.name for each in found if each.explains]


Q8_0, Q4_0, FLASH = "llama.cpp-cache-q8_0", "llama.cpp-cache-q4_0", "llama.cpp-float32-flash"
FP8 = "bfloat16+consumers=stored+cache=e4m3-cache"


@pytest.mark.parametrize(
    ("made", "declared", "change"),
    [
        pytest.param(Q8_0, f"{Q8_0}+turn=none", "turn=any-order"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (
                (f"{Q8_0}+turn=none", Q8_0, "turn=none"),
                (Q4_0, Q8_0, f"cache=q4_0+attention.query=q8_0+{WIDE_SUMS}+turn=any-order"),
                (Q8_0, Q4_0, f"cache=q8_0+attention.query=q8_0+{WIDE_SUMS}+turn=any-order"),
                (f"{Q4_0}+turn=none", Q8_0, f"cache=q4_0+attention.query=q8_0+{WIDE_SUMS}+turn=none"),
                (Q8_0, FLASH, f"cache=q8_0+attention.query=q8_0+{WIDE_SUMS}+turn=any-order"),
                (f"{FP8}-truncated", FP8, "cache=e4m3-cache-truncated"),
                (FP8, f"{FP8}-truncated", "cache=e4m3-cache"),
            )
        ),
    ],
)
def test_another_cache_is_named(made: str, declared: str, change: str, parameters: Parameters, tmp_path: Path) -> None:
    assert named(ideal(policy(made), parameters), parameters, declared, tmp_path) == [f"{declared}+{change}"]


@pytest.mark.slow
def test_a_cache_of_float16_is_named(parameters: Parameters, tmp_path: Path) -> None:
    """The sums of llama.cpp's own cache may be those of float16 or not: an ideal engine rounds none of them."""
    found = named(ideal(policy(FLASH), parameters), parameters, Q8_0, tmp_path)
    assert found
    assert all("+cache=float16" in name for name in found)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["any-order", "stages", "none"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_codes_has_no_name(fault: str, order: str, parameters: Parameters, tmp_path: Path) -> None:
    """No rule that refmoe knows makes these codes."""
    name, recorder = f"{Q8_0}+turn={order}", Recorder()
    arrays = trace_of(Faulty(policy(name), recorder, fault), parameters, recorder)
    assert named(arrays, parameters, name, tmp_path) == []


def test_heads_that_are_no_whole_blocks_are_refused() -> None:
    with pytest.raises(InputError, match=r"heads of 24.*whole blocks of 32"):
        PolicyOps(policy("float32+cache=q8_0")).cut("cache.k", np.ones((2, 1, 24)))


# ---- a real engine


@engine
@pytest.mark.parametrize(
    ("case", "cache", "turned"),
    [
        ("production-head-32", "q8_0", "on"), ("production-one-pair", "q8_0", "on"),
        ("production-one-pair", "q4_0", "off"), ("production-head-128", "q4_0", "on"),
    ],
)  # fmt: skip
def test_llama_cpp_conforms(case: str, cache: str, turned: str, tmp_path: Path) -> None:
    """Heads of 32, 64 and 128. Under policies of another cache the same trace does not conform."""
    model = read_case(GOLDEN / case)
    write_checkpoint(tmp_path / "model", model.config, model.checkpoint().parameters, dtype="bfloat16")
    adapter = llama_cpp.Adapter(cache=cache, flash="on", turn=turned)
    adapter.load(tmp_path / "model", "float32")
    runs, loaded = model.runs(), load_checkpoint(tmp_path / "model")
    arrays = adapter.run(runs, adapter.taps)
    own = adapter.policies["float32"]
    others = [f"{own}+turn={'none' if turned == 'on' else 'any-order'}"] if model.config.head_dim % 64 == 0 else []
    others += ["llama.cpp-float32-flash", f"{own}+cache={'q4_0' if cache == 'q8_0' else 'q8_0'}"]
    base = own.replace("+turn=stages", "")
    for name, right in ((own, True), (base, True), *((other, False) for other in others)):
        write_trace(tmp_path / "t.safetensors", Header(runs, case, policy=name), arrays)
        trace = read_trace(tmp_path / "t.safetensors")
        report = verify(trace, case, loaded.config, loaded.parameters, runs, policy(name))
        assert (report.verdict == CONFORMANT) == right, report.headline
        assert right or report.first_wrong == ("prefill", "layers.0.attention.context")
