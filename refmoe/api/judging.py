"""Verification of an engine's values against a model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from refmoe.api.models import Model, Tokens
from refmoe.api.report import Report
from refmoe.api.values import read_values, to_trace
from refmoe.bugs.catalogue import MUTANTS
from refmoe.errors import InputError
from refmoe.profiles.load import policies as all_policies
from refmoe.profiles.load import policy as named_policy
from refmoe.profiles.policy import Policy
from refmoe.traces.trace import Run, Trace, read_trace
from refmoe.verifier.diagnosis import diagnose as find_explanations
from refmoe.verifier.diagnosis import explained
from refmoe.verifier.findings import NOT_CONFORMANT
from refmoe.verifier.verify import SIGNIFICANCE, Settings
from refmoe.verifier.verify import verify as judge

LEAST_SIGNIFICANCE = 1e-100


def verify(
    values: Mapping[Any, Any] | Trace | str | os.PathLike[str],
    model: Model | str,
    tokens: Tokens | None = None,
    *,
    decode: Tokens | None = None,
    chunks: Sequence[Sequence[int]] = (),
    policy: Policy | str | None = None,
    diagnose: bool = True,
    significance: float = SIGNIFICANCE,
) -> Report:
    """Hold an engine's values against a model, step by step.

    values: a dictionary from tap to array, a `Trace`, or the path of a trace, a ``.npz`` or a ``.pt`` file. Arrays may
        be of NumPy, PyTorch (any device), JAX, CuPy or MLX. With several runs the keys are ``run/tap``.
        ``logits[-1]`` and ``layers.0.residual[2:5]`` are arrays of some tokens only.
    model: as `refmoe.load` gives it, or a name that it takes
    tokens, decode, chunks: the calls that the engine made, as in `Model.run`; a trace has its own
    policy: a name of `refmoe.policies`, with changes if need be; default: the trace's own, or the dtype of the values
    diagnose: whether a failure is explained, which takes longer
    significance: the probability that a healthy engine fails
    Raises InputError when values, tokens and model do not fit each other.

    >>> import refmoe
    >>> model = refmoe.load("walking-skeleton")
    >>> right = model.run([1, 31, 41], dtype="float32")
    >>> wrong = {"logits": right["prefill", "logits"] * 1.001, "final_norm": right["prefill", "final_norm"]}
    >>> report = refmoe.verify(wrong, model, [1, 31, 41], diagnose=False)
    >>> bool(report), report.first_wrong_step.tap
    (False, 'logits')
    """
    if isinstance(model, str):
        from refmoe.api.models import load

        model = load(model)
    if not LEAST_SIGNIFICANCE <= significance < 1:
        raise InputError(f"significance is {significance!r}, but a probability from 1e-100 to below 1 was expected")
    if isinstance(values, str | os.PathLike):
        path = Path(values)
        held = read_values(path)
        values = read_trace(path) if held is None else held
    runs: tuple[Run, ...] | None
    if isinstance(values, Trace):
        trace, runs = values, None if tokens is None else model.runs(tokens, decode, chunks)
        rules = _policy(policy if policy is not None else trace.header.policy)
    else:
        made = model.runs(tokens, decode, chunks)
        rules = _policy(policy if policy is not None else _dtype_of(values))
        trace, runs = to_trace(values, made, model.config, rules.name, model.name), None
    settings = Settings(significance=significance)
    report = judge(trace, model.subject, model.config, model.parameters, runs, rules, settings)
    if diagnose and report.verdict == NOT_CONFORMANT:
        mutants = MUTANTS.values()
        found = find_explanations(trace, model.config, model.parameters, runs, rules, report, mutants, lambda: None)
        report = explained(report, found)
    return Report(report)


def _dtype_of(values: Mapping[Any, Any]) -> str:
    """The widest dtype of the values: the policy of an engine that stores nothing more precise."""
    order = ("float64", "float32", "float16", "bfloat16")
    names = {str(getattr(value, "dtype", "float64")).rpartition(".")[2] for value in values.values()}
    found = [name for name in order if name in names]
    if not found:
        raise InputError("policy: none was given, and no value has a floating-point dtype that would tell it")
    if found[0] == "bfloat16" or (found[0] != "float32" and "bfloat16" in found):
        return "bfloat16"
    return found[0]


def _policy(policy: Policy | str) -> Policy:
    return policy if isinstance(policy, Policy) else named_policy(policy)


def policy(name: str, **changes: str | bool) -> Policy:
    """A policy by name, with changes.

    name: one of `refmoe.policies`, or the path of a TOML file
    changes: a field or a cut point and its value; a dot in the name of a cut point is written as ``__``
    Raises InputError when the name or a change is unknown.

    >>> import refmoe
    >>> refmoe.policy("bfloat16", cache="float16").name
    'bfloat16+cache=float16'
    """
    words = [f"{field.replace('__', '.')}={str(value).lower()}" for field, value in changes.items()]
    return named_policy("+".join([name, *words]))


def policies() -> list[str]:
    """The names of all policies.

    >>> import refmoe
    >>> "bfloat16" in refmoe.policies()
    True
    """
    return [each.name for each in all_policies()]
