# SPDX-License-Identifier: Apache-2.0
"""The models, captures and verdicts that the tests of the verifier share. transformers is loaded once per model
and dtype."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from refmoe.checkpoints.layout import Checkpoint
from refmoe.checkpoints.synthetic import synthetic_checkpoint
from refmoe.checkpoints.write import write_checkpoint
from refmoe.engines.capture import transformers as engine
from refmoe.profiles.load import policy
from refmoe.spec.config import Config
from refmoe.spec.taps import step_of
from refmoe.suite import find_cases, read_case
from refmoe.traces.script import AnyCall, plan
from refmoe.traces.trace import Header, Recorder, Run, read_trace, write_trace
from refmoe.verifier.findings import FAIL, NOT_CONFORMANT, Report
from refmoe.verifier.verify import verify

Arrays = dict[str, np.ndarray[Any, Any]]

GOLDEN = Path(__file__).parents[2] / "golden"


@dataclass(frozen=True)
class Model:
    """A model and the calls made on it: a golden case, or one of `SYNTHETIC`."""

    name: str
    checkpoint: Checkpoint
    runs: tuple[Run, ...]
    of_a_case: bool

    @property
    def config(self) -> Config:
        return self.checkpoint.config


def tokens(count: int, vocab: int) -> list[int]:
    """Tokens that differ as far as the vocabulary goes, in no order. vocab: not a multiple of 29"""
    return [(7 + 29 * i) % vocab for i in range(count)]


WIDE = Config(
    dim=64, layers=1, heads=4, kv_heads=2, head_dim=16, hidden_dim=320, vocab=97, experts=4, experts_per_token=2,
    rope_theta=3e4,
)  # fmt: skip
"""Sums of up to 320 terms."""

DEEP = Config(
    dim=48, layers=6, heads=6, kv_heads=3, head_dim=8, hidden_dim=40, vocab=97, experts=7, experts_per_token=2,
    rope_theta=3e4,
)  # fmt: skip
"""A model with more layers than any golden case, so that rounding can change choices."""

SYNTHETIC: dict[str, tuple[Config, dict[str, int], list[AnyCall]]] = {
    "wide": (WIDE, {}, [("prefill", 0, tokens(48, 97)), ("decode", 0, [5])]),
    "small-embeddings": (DEEP, {"embedding": -16, "gate": -9}, [("prefill", 0, tokens(96, 97))]),
}
"""Models that are no golden case: config, powers of two of the weights, calls."""


def case_names() -> list[str]:
    """Every golden case."""
    return [folder.name for folder in find_cases(GOLDEN)]


@cache
def model_named(name: str) -> Model:
    """A golden case, or one of `SYNTHETIC`."""
    if name in SYNTHETIC:
        config, exponents, calls = SYNTHETIC[name]
        return Model(name, synthetic_checkpoint(config, 1, exponents), plan(calls, config.vocab), False)
    case = read_case(GOLDEN / name)
    return Model(name, case.checkpoint(), case.runs(), True)


@cache
def loaded(name: str, dtype: str) -> Any:
    """The model in transformers, shared by all tests: a test must undo its patches."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = model_named(name).checkpoint
        write_checkpoint(Path(folder) / "model", checkpoint.config, checkpoint.parameters, "float32")
        return engine.load_model(Path(folder) / "model", dtype)


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread, because on matrices this small its threads mostly wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def captured(name: str, dtype: str, attention: str = "eager", runs: tuple[Run, ...] = ()) -> Arrays:
    """Every tap that hooks see, with the model's current patches.   runs: other calls than the case's, if any"""
    model = loaded(name, dtype)
    model.set_attn_implementation(attention)
    recorder = Recorder()
    with one_thread():
        engine.capture(model, runs or model_named(name).runs, recorder)
    return recorder.arrays


@cache
def honest(name: str, dtype: str, attention: str = "eager") -> Arrays:
    """The arrays of `captured` from unpatched transformers. They are shared and must not be changed."""
    return captured(name, dtype, attention)


def judged(name: str, arrays: Mapping[str, Any], rules: str, runs: tuple[Run, ...] | None = None) -> Report:
    """The verdict about a trace with these arrays.   rules: the policy   runs: the runs in the header of the trace"""
    model = model_named(name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.safetensors"
        write_trace(path, Header(runs or model.runs, policy=rules), dict(arrays))
        expected = model.runs if model.of_a_case else None
        return verify(read_trace(path), name, model.config, model.checkpoint.parameters, expected, policy(rules))


def only(arrays: Mapping[str, Any], wanted: Callable[[str], bool]) -> Arrays:
    """The arrays of some steps.   wanted: of a step's name"""
    return {key: array for key, array in arrays.items() if wanted(step_of(key.partition("/")[2]))}


def failed_steps(report: Report) -> set[str]:
    """The failed steps, without run and layer. Asserts that some check fails exactly if the trace is not conformant."""
    steps = {check.step for check in report.checks if check.verdict == FAIL}
    assert bool(steps) == (report.verdict == NOT_CONFORMANT), report.headline
    return steps


def first_wrong_step(report: Report) -> str | None:
    """The first failed step of the report, without run and layer."""
    return None if report.first_wrong is None else step_of(report.first_wrong[1])


def explained(report: Report) -> str:
    """The headline and the first failed checks, for the message of an assertion."""
    checks = [check for check in report.checks if check.verdict == FAIL]
    return "\n".join([report.headline, *(f"{c.run}/{c.tap} {c.rung}: {c.reason}; {c.worst}" for c in checks[:8])])
