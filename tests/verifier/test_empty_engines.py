# SPDX-License-Identifier: Apache-2.0
"""Traces of engines that compute nothing, or something else: none may pass.

Each is made of the golden of a case, or of a neighbour's, by throwing away what an engine has to do. No engine is
needed. With every tap each must be called wrong, and with the logits alone each whose logits are not the right ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from refmoe.arithmetic.exact.ops import ExactOps
from refmoe.checkpoints.synthetic import synthetic_checkpoint
from refmoe.spec.model import Model
from refmoe.spec.taps import tap_names
from refmoe.suite import Case, read_case
from refmoe.suite.conditions import golden_arrays
from refmoe.traces.script import execute
from refmoe.traces.trace import Recorder, Run
from refmoe.verifier.findings import CONFORMANT, NOT_CONFORMANT
from tests.verifier.engines import GOLDEN, Arrays, explained, judged, only

CASES = ("edge-tokens", "head-dim-free")
MORE_CASES = ("window-decode", "walking-skeleton", "four-layers", "window-chunks", "batch-ragged")
EVERY_CASE = [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_CASES)]
POLICIES = ("float32", "bfloat16")


@cache
def golden(name: str) -> Arrays:
    return dict(golden_arrays(case(name)))


@cache
def case(name: str) -> Case:
    return read_case(GOLDEN / name)


def computed(name: str, seed: int | None = None, shift: int = 0) -> Arrays:
    """The exact taps of a case with weights of another seed, or on tokens shifted by some places."""
    of = case(name)
    weights = of.checkpoint() if seed is None else synthetic_checkpoint(of.config, seed, of.exponents, of.edits)
    runs = tuple(replace(run, tokens=tuple(np.roll(run.tokens, shift).tolist())) for run in of.runs())
    if shift and all(len(run.tokens) == 1 for run in runs):
        raise ValueError(f"{name} has nothing to shift")
    recorder = Recorder()
    execute(ExactOps(recorder), Model(of.config, weights.parameters), runs, recorder)
    return recorder.arrays


def of_floats(change: Callable[[Any], Any]) -> Callable[[str], Arrays]:
    """Every tap changed by itself; expert ids are zeros and ones in turn, which is a choice."""

    def make(name: str) -> Arrays:
        def ids(x: Any) -> Any:
            return np.broadcast_to(np.arange(x.shape[-1]), x.shape).copy()

        return {key: ids(x) if key.endswith("experts") else change(x) for key, x in golden(name).items()}

    return make


def echo(name: str) -> Arrays:
    """Each tap is the token's embedding, repeated until the shape is full."""
    found = of_floats(lambda x: x)(name)
    for key, x in found.items():
        if not key.endswith("experts"):
            found[key] = np.resize(golden(name)[key.partition("/")[0] + "/embedding"], x.shape)
    return found


def stutter(name: str) -> Arrays:
    """Each tap is the last one before it of the same shape, where there is one; else the golden's own."""
    found: Arrays = {}
    for run in case(name).runs():
        before: dict[tuple[int, ...], Any] = {}
        for tap in tap_names(case(name).config):
            key = f"{run.run}/{tap}"
            found[key] = x = golden(name)[key]
            if not key.endswith("experts"):
                found[key] = before.get(x.shape, x)
                before[x.shape] = x
    return found


def layers_swapped(name: str) -> Arrays:
    """Everything of layer 0 under the name of layer 1, and the other way round."""
    swap = {"layers.0.": "layers.1.", "layers.1.": "layers.0."}

    def other(key: str) -> str:
        return next((key.replace(a, b) for a, b in swap.items() if a in key), key)

    return {key: golden(name)[other(key)] for key in golden(name)}


def heads_permuted(name: str) -> Arrays:
    """The query heads in reverse, in every tap that has them; consistent with each other and with no weights."""
    axes = {"q": 1, "q_rope": 1, "context": 1, "scores": 0, "probs": 0}
    return {
        key: np.flip(x, axes[key.rpartition(".")[2]]) if ".attention." in key and key.rpartition(".")[2] in axes else x
        for key, x in golden(name).items()
    }


def logits_permuted(name: str) -> Arrays:
    return {key: np.roll(x, 1, -1) if key.endswith("/logits") else x for key, x in golden(name).items()}


EMPTY: dict[str, Callable[[str], Arrays]] = {
    "zeros": of_floats(np.zeros_like),
    "nan": of_floats(lambda x: np.full_like(x, np.nan)),
    "infinity": of_floats(lambda x: np.full_like(x, np.inf)),
    "one value everywhere": of_floats(lambda x: np.full_like(x, 0.25)),
    "noise": of_floats(lambda x: np.random.default_rng(1).standard_normal(x.shape)),
    "echo": echo,
    "the tap before": stutter,
    "tokens shifted by one": lambda name: computed(name, shift=1),
    "another seed": lambda name: computed(name, seed=999),
    "layers swapped": layers_swapped,
    "heads permuted": heads_permuted,
    "vocabulary shifted by one": logits_permuted,
}
RIGHT_LOGITS = {"layers swapped", "heads permuted", "the tap before"}
"""These leave the logits as they are."""


@cache
def made(kind: str, name: str, dtype: str) -> Arrays:
    """The trace of an empty engine in a dtype."""
    import ml_dtypes

    kinds: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
    return {key: x if x.dtype.kind == "i" else x.astype(kinds[dtype]) for key, x in EMPTY[kind](name).items()}


@pytest.mark.parametrize("rules", POLICIES)
@pytest.mark.parametrize("name", EVERY_CASE)
@pytest.mark.parametrize("kind", EMPTY)
def test_an_empty_engine_is_called_wrong(kind: str, name: str, rules: str) -> None:
    report = judged(name, made(kind, name, rules), rules)
    assert report.verdict == NOT_CONFORMANT, explained(report)


@pytest.mark.parametrize("rules", POLICIES)
@pytest.mark.parametrize(
    "name", [name if name == CASES[0] else pytest.param(name, marks=pytest.mark.slow) for name in (*CASES, *MORE_CASES)]
)
@pytest.mark.parametrize("kind", [kind for kind in EMPTY if kind not in RIGHT_LOGITS])
def test_an_empty_engine_is_called_wrong_by_its_logits_alone(kind: str, name: str, rules: str) -> None:
    report = judged(name, only(made(kind, name, rules), lambda step: step == "logits"), rules)
    assert report.verdict == NOT_CONFORMANT, explained(report)


@pytest.mark.parametrize("name", EVERY_CASE)
@pytest.mark.parametrize("taps", ["all", "logits"])
def test_the_golden_itself_is_legal_in_float64(name: str, taps: str) -> None:
    """The control: the same path with nothing thrown away."""
    found = golden(name) if taps == "all" else only(golden(name), lambda step: step == "logits")
    report = judged(name, found, "float64")
    assert report.verdict == CONFORMANT, explained(report)


def test_the_runs_of_a_case_have_tokens_to_shift() -> None:
    """A shift must change what is run."""
    for name in (*CASES, *MORE_CASES):
        runs: tuple[Run, ...] = case(name).runs()
        assert any(tuple(np.roll(run.tokens, 1).tolist()) != run.tokens for run in runs)
