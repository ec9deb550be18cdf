# SPDX-License-Identifier: Apache-2.0
"""Traces written to a file: of a checkpoint of any size, or of a case."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from refmoe.api.facts import named_case
from refmoe.api.progress import Bars, silent
from refmoe.errors import InputError
from refmoe.files.writable import need_space
from refmoe.jobs.emission import Emission, check_emission, cpu_only, emit, require_memory
from refmoe.jobs.estimate import Estimate
from refmoe.jobs.job import POLICY
from refmoe.jobs.source import find_source, loaded
from refmoe.profiles.load import policy as named_policy
from refmoe.suite import case_source
from refmoe.traces.script import AnyCall, plan

ARITHMETICS = ("exact", "float64", "float32")


def case_emission(name: str, golden: Path | None, settings: Mapping[str, Any]) -> Emission:
    """The emission of a case: its model and its calls.

    golden: the folder of cases; None: the package's own.   settings: the other fields of the `Emission`
    Raises InputError for an unknown case.
    """
    case = named_case(name, golden)
    emission = Emission(source=case_source(case), runs=case.runs(), case=case.name, **settings)
    if case.layers is None:
        return emission
    if emission.layers is not None:
        raise InputError(f"--layers {emission.layers}: case {name} has layers of its own, so none were expected")
    return replace(emission, layers=f"{case.layers[0]}:{case.layers[1]}")


def checkpoint_emission(
    checkpoint: Path,
    layout: str | None,
    seed: int | None,
    calls: Callable[[], Sequence[AnyCall]],
    settings: Mapping[str, Any],
) -> Emission:
    """The emission of a checkpoint.

    checkpoint: a folder, or a published size with the seed of the weight formula
    calls: those of the model.   settings: the other fields of the `Emission`
    Raises InputError when there is no such model, or a call has a token outside the vocabulary.
    """
    source = find_source(checkpoint, layout, seed)
    config = loaded(source).config
    return Emission(source=source, runs=plan(calls(), config.vocab), **settings)


def arithmetic_of(dtype: str, policy: str | None) -> str:
    """The name of an arithmetic, from a dtype and a policy. Raises InputError for both, and for unknown policies."""
    if policy is None:
        return dtype
    if dtype != "exact":
        raise InputError(f"--policy {policy} rounds an exact run, but --dtype {dtype} was given")
    named_policy(policy)
    return POLICY + policy


def estimate_emission(emission: Emission) -> Estimate:
    """The cost of an emission on the CPU. Nothing is computed. Raises InputError, as `emit_trace` does."""
    if emission.place.on_gpu:
        raise cpu_only("--estimate", emission.place)
    return check_emission(emission)


def emit_trace(emission: Emission, bars: Bars = silent) -> Estimate:
    """Compute a trace and write it, whole or not at all. Returns the cost that was estimated before.

    Raises InputError when an input cannot be used, there is too little memory, or the trace cannot be written.
    """
    if emission.place.on_gpu and emission.arithmetic.startswith(POLICY):
        raise InputError(f"--policy is computed on the CPU, but --device {emission.place.name} was given")
    needed = check_emission(emission)
    require_memory(emission, needed)
    need_space(emission.out, needed.trace)
    with bars("emit", len(emission.runs) * len(emission.computed)) as advance:
        emit(emission, advance)
    return needed


__all__ = [
    "ARITHMETICS", "Emission", "Estimate", "arithmetic_of", "case_emission", "checkpoint_emission", "emit_trace",
    "estimate_emission",
]  # fmt: skip
