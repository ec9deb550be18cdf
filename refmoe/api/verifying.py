# SPDX-License-Identifier: Apache-2.0
"""Verification of a file: a trace, or the arrays of a ``.npz`` or ``.pt`` file, held against a case or a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from refmoe.api.dumps import read_values
from refmoe.api.facts import named_case
from refmoe.api.judging import dtype_of, note_of_unknown, policy_of
from refmoe.api.progress import Bars, silent
from refmoe.api.report import Report
from refmoe.api.values import fit_heads, to_trace
from refmoe.bugs.quantised.catalogue import known_bugs
from refmoe.checkpoints.load import checkpoint_digest
from refmoe.cuda.place import CPU, Place
from refmoe.errors import InputError
from refmoe.files.sentences import shown
from refmoe.jobs.source import Source, find_source, loaded
from refmoe.parallel import open_executor, parse_executor
from refmoe.profiles.load import policy as named_policy
from refmoe.profiles.policy import Policy
from refmoe.suite import case_source, trace_path
from refmoe.suite.golden_folder import case_folder, golden_folder
from refmoe.suite.power import with_power
from refmoe.traces.script import AnyCall, plan
from refmoe.traces.trace import Run, Trace, read_trace
from refmoe.verifier.diagnosis import Keeper, explained, gather, search
from refmoe.verifier.distances import Comparison, compare_traces
from refmoe.verifier.findings import NOT_CONFORMANT
from refmoe.verifier.passes import Pass
from refmoe.verifier.segments import SIGNIFICANCE, Settings, Spread
from refmoe.verifier.verify import verify


@dataclass(frozen=True)
class ModelChoice:
    """The model that the engine should have run: a case, or a checkpoint."""

    case: str | None = None
    """None, without a checkpoint: the one that the trace names."""
    golden: Path | None = None
    checkpoint: Path | None = None
    layout: str | None = None
    seed: int | None = None
    """Of the weight formula, where `checkpoint` is a published size."""


@dataclass(frozen=True)
class Judging:
    """How to judge."""

    policy: str | None = None
    """None: the one that the trace names, or the dtype of arrays."""
    significance: float = SIGNIFICANCE
    diagnose: bool = True
    place: Place = CPU
    executor: str | None = None
    """Judges layers side by side, as `open_executor` reads it; None: one by one."""


@dataclass(frozen=True)
class Against:
    """The model and the runs that values are held against."""

    name: str
    source: Source
    runs: tuple[Run, ...] | None
    """The runs of the case; None: the trace's own runs."""


def verify_file(
    path: Path, model: ModelChoice, judging: Judging, calls: Sequence[AnyCall] | None = None, bars: Bars = silent
) -> Report:
    """Judge the values in a file.

    calls: those that the engine made, for arrays held against a checkpoint; a trace and a case have their own
    Raises InputError when file, model and policy do not fit each other.
    """
    if judging.executor is not None:
        parse_executor(judging.executor)
    declared = None if judging.policy is None else named_policy(judging.policy)
    values = read_values(path)
    if isinstance(values, Trace):
        if calls is not None:
            raise InputError(f"{path}: a trace has its own calls, so --tokens, --chunk and --decode do not apply")
        rules = declared or policy_of(values)
        against = _against(values, model)
        fit_heads(values, loaded(against.source).config)
        return _judged(values, against, rules, judging, bars)
    against, runs = _against_arrays(path, model, calls)
    trace = to_trace(values, runs, loaded(against.source).config)
    return _judged(trace, against, declared or named_policy(dtype_of(trace)), judging, bars)


def _refuse_both(model: ModelChoice) -> None:
    if model.case is not None and model.checkpoint is not None:
        raise InputError("one of --case NAME and --checkpoint DIR was expected, but both were given")
    if model.checkpoint is None and model.seed is not None:
        raise InputError(f"--seed {model.seed} goes with --checkpoint, but none was given")


def _against_arrays(path: Path, model: ModelChoice, calls: Sequence[AnyCall] | None) -> tuple[Against, tuple[Run, ...]]:
    """The model and the runs of arrays, which name neither."""
    _refuse_both(model)
    if model.checkpoint is None:
        if model.case is None:
            raise InputError(f"{path}: arrays name no model, so --case NAME or --checkpoint DIR was expected")
        case = named_case(model.case, model.golden)
        runs = case.runs() if calls is None else plan(calls, case.config.vocab)
        return Against(f"case {case.name}", case_source(case), None), runs
    source = find_source(model.checkpoint, model.layout, model.seed)
    if calls is None:
        raise InputError(f"{path}: arrays name no calls, so --tokens IDS was expected, the token ids of the prefill")
    return Against(f"checkpoint {model.checkpoint}", source, None), plan(calls, loaded(source).config.vocab)


def _against(trace: Trace, model: ModelChoice) -> Against:
    _refuse_both(model)
    if model.checkpoint is None:
        case = named_case(model.case if model.case is not None else _named_case(trace), model.golden)
        if trace.header.case not in (None, case.name):
            raise InputError(
                f"{trace.path}: metadata field 'case' is {shown(trace.header.case)}, but --case is {shown(case.name)}"
            )
        return Against(f"case {case.name}", case_source(case), case.runs())
    source = find_source(model.checkpoint, model.layout, model.seed)
    found = trace.header.checkpoint
    if found is not None and found != (own := checkpoint_digest(loaded(source))):
        digest = "null, as there are no files," if own is None else f'"{own}", the digest of {model.checkpoint},'
        raise InputError(f"{trace.path}: metadata field 'checkpoint' is {shown(found)}, but {digest} was expected")
    return Against(f"checkpoint {model.checkpoint}", source, None)


def _named_case(trace: Trace) -> str:
    """The case that the trace names. It must be a plain name: a path could read any file of this machine."""
    name = trace.header.case
    if name is None:
        raise InputError(f"{trace.path}: names no case, so --case NAME or --checkpoint DIR was expected")
    if Path(name).name != name or name in ("", ".", ".."):
        raise InputError(f"{trace.path}: metadata field 'case' is {shown(name)}, but the name of a case was expected")
    return name


def _judged(trace: Trace, against: Against, rules: Policy, judging: Judging, bars: Bars) -> Report:
    config, parameters = loaded(against.source).config, loaded(against.source).parameters
    runs = against.runs
    total = len(runs if runs is not None else trace.header.runs) * config.layers
    place = nullcontext() if judging.executor is None else open_executor(judging.executor)
    keeper = Keeper()
    keeps = judging.diagnose and judging.place == CPU and judging.executor is None
    with bars("verify", total) as advance, place as opened:
        settings = Settings(
            significance=judging.significance,
            progress=advance,
            ops=judging.place.enclosures(),
            spread=None if opened is None else Spread(opened, against.source),
            passes=keeper if keeps else Pass,
        )
        report = verify(trace, against.name, config, parameters, runs, rules, settings)
    report = replace(report, notes=(*report.notes, *note_of_unknown(loaded(against.source).unknown)))
    report = with_power(report, trace, config, rules)
    if judging.diagnose and report.verdict == NOT_CONFORMANT:
        known = known_bugs(parameters)
        with bars("diagnose", 2 * len(known)) as advance:
            evidence = gather(trace, config, parameters, runs, rules, report, keeper.first)
            report = explained(report, search(evidence, known, advance))
    return Report(report)


def distances(path: Path, reference: Path, golden: Path | None = None) -> Comparison:
    """The distance of a trace from another, per layer and tap, without a verdict.

    reference: a trace, or the name of a case, whose golden is meant.   Raises InputError.
    """
    trace = read_trace(path)
    if not reference.exists() and reference.name == str(reference):
        reference = trace_path(case_folder(str(reference), golden_folder(golden)))
    elif reference.is_dir():
        reference = trace_path(reference)
    return compare_traces(trace, read_trace(reference))


__all__ = [
    "SIGNIFICANCE", "Comparison", "Judging", "ModelChoice", "distances", "verify_file",
]  # fmt: skip
