# SPDX-License-Identifier: Apache-2.0
"""Verification of an engine's values against a model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from refmoe.api.arguments import Tokens, kind, path_of, probability, shown
from refmoe.api.arrays import REAL
from refmoe.api.dumps import read_values
from refmoe.api.models import GoldenCase, Model, load
from refmoe.api.policies import as_policy
from refmoe.api.report import Report
from refmoe.api.values import fit_heads, mapping, to_trace
from refmoe.bugs.quantised.catalogue import known_bugs
from refmoe.errors import InputError
from refmoe.files.sentences import quoted
from refmoe.profiles.load import policy as named_policy
from refmoe.profiles.policy import Policy
from refmoe.suite.power import with_power
from refmoe.traces.trace import Run, Trace
from refmoe.verifier.diagnosis import Keeper, explained, gather, search
from refmoe.verifier.findings import NOT_CONFORMANT
from refmoe.verifier.passes import Pass
from refmoe.verifier.segments import SIGNIFICANCE, Settings
from refmoe.verifier.verify import verify as judge


def verify(
    values: Mapping[Any, Any] | Trace | str | os.PathLike[str],
    model: Model | GoldenCase | str | os.PathLike[str],
    tokens: Tokens | None = None,
    *,
    decode: Tokens | None = None,
    chunks: Sequence[Any] = (),
    policy: Policy | str | None = None,
    diagnose: bool = True,
    significance: float = SIGNIFICANCE,
) -> Report:
    """Hold an engine's values against a model, step by step.

    values: a dictionary from tap to array, a `Trace`, or the path of a trace, a ``.safetensors``, ``.npz`` or ``.pt``
        file. Arrays may be of NumPy, PyTorch (any device), JAX, CuPy or MLX. With several runs the keys are
        ``run/tap``. ``logits[-1]`` and ``layers.0.residual[2:5]`` are arrays of some tokens only. Logits of shape [V]
        are those of the last token. An array of a batch, [B, T, ...], holds all sequences. ``logprobs`` are
        log-probabilities: of the whole vocabulary, or the n largest with their ``logprobs.ids``, both [T, n].
    model: as `refmoe.load` gives it, or a name or path that it takes
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
    subject = as_model(model)
    keeper = Keeper()
    settings = Settings(significance=probability(significance), passes=keeper if diagnose is True else Pass)
    if not isinstance(diagnose, bool):
        raise InputError(f"diagnose is {shown(diagnose)}, but True or False was expected")
    declared = None if policy is None else as_policy(policy)
    if isinstance(values, str | os.PathLike):
        values = read_values(path_of(values, "values"))
    notes: tuple[str, ...] = ()
    runs: tuple[Run, ...] | None
    if isinstance(values, Trace):
        trace, runs = values, runs_of(values, subject, tokens, decode, chunks)
        rules = declared or policy_of(trace)
        fit_heads(trace, subject.config)
    else:
        held, runs = mapping(values), None
        trace = to_trace(held, subject.runs(tokens, decode, chunks), subject.config)
        rules = declared or named_policy(dtype_of(trace))
        if declared is None:
            notes = (f"no policy was given: the values are held against {rules.name}, which is their dtype",)
    report = judge(trace, subject.subject, subject.config, subject.parameters, runs, rules, settings)
    report = replace(report, notes=(*notes, *report.notes, *note_of_unknown(subject.unknown_fields)))
    report = with_power(report, trace, subject.config, rules)
    if diagnose and report.verdict == NOT_CONFORMANT:
        evidence = gather(trace, subject.config, subject.parameters, runs, rules, report, keeper.first)
        report = explained(report, search(evidence, known_bugs(subject.parameters)))
    return Report(report)


def note_of_unknown(fields: Sequence[str]) -> tuple[str, ...]:
    """The note of a report about fields of config.json that refmoe does not know, if there are any."""
    if not fields:
        return ()
    names = ", ".join(map(quoted, fields[:10])) + (f" and {len(fields) - 10} more" if len(fields) > 10 else "")
    return (f"config.json has fields that refmoe does not know and does not obey: {names}",)


def as_model(model: object) -> Model:
    """A model, or the model of a case, or the one that `load` finds. Raises InputError for anything else."""
    if isinstance(model, Model):
        return model
    if isinstance(model, GoldenCase):
        return model.model
    if isinstance(model, str | os.PathLike):
        return load(model)
    raise InputError(f"model: is {kind(model)}, but a model of refmoe.load, or the name or path of one, was expected")


def policy_of(trace: Trace) -> Policy:
    """The policy that a trace names. It must be one of refmoe's own: a stranger's file could allow anything."""
    name = trace.header.policy
    if ".toml" in name:
        raise InputError(
            f"{trace.path}: metadata field 'policy' is {shown(name)}, but the name of a policy was expected; a file of "
            "one's own is given with --policy, or as policy= in Python"
        )
    try:
        return named_policy(name)
    except InputError as error:
        raise InputError(f"{trace.path}: metadata field 'policy': {error}") from None


def runs_of(
    trace: Trace, model: Model, tokens: Tokens | None, decode: Tokens | None, chunks: Sequence[Any]
) -> tuple[Run, ...] | None:
    """The runs that a trace is held against; None: its own.

    They are those of the arguments, else those of the case if the trace is of the model's case.
    Raises InputError when the trace is of another case or of another checkpoint.
    """
    digest = trace.header.checkpoint
    if digest is not None and digest != model.digest():
        raise InputError(
            f"{trace.path}: metadata field 'checkpoint' is {shown(digest)}, but {shown(model.digest())} was expected, "
            f"the digest of {model.name}"
        )
    if tokens is not None or decode is not None or not isinstance(chunks, Sequence) or len(chunks):
        return model.runs(tokens, decode, chunks)
    case = model.case
    if case is None:
        return None
    if trace.header.case not in (None, case.name):
        raise InputError(
            f"{trace.path}: metadata field 'case' is {shown(trace.header.case)}, but the model is that of {case.name}"
        )
    of_case = case.runs()
    return of_case if trace.header.case is not None or {*trace.runs} <= {*of_case} else None


def dtype_of(trace: Trace) -> str:
    """The one dtype of the values, which is the name of its generic policy.

    Raises InputError when the values have several: which of them the engine computes in cannot be told.
    """
    names = {str(tensor.map().dtype) for tensor in trace.tensors.values()} & {*REAL}
    if len(names) != 1:
        found = "several dtypes, " + ", ".join(sorted(names)) if names else "no dtype of real numbers"
        raise InputError(
            f"policy: none was given and the values have {found}, so one of refmoe.policies() was expected"
        )
    return names.pop()
