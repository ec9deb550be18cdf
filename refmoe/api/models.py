# SPDX-License-Identifier: Apache-2.0
"""Models: loaded from a checkpoint, a case or the weight formula, and run."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from refmoe.api.arguments import Tokens, calls_of, kind, name_of, path_of, shown, whole_number
from refmoe.api.policies import as_policy
from refmoe.arithmetic.exact.ops import ExactOps
from refmoe.arithmetic.native.ops import NativeOps
from refmoe.checkpoints.layout import Checkpoint
from refmoe.checkpoints.load import LAYOUTS, checkpoint_digest
from refmoe.checkpoints.write import DTYPE_NAMES, write_checkpoint
from refmoe.errors import InputError
from refmoe.jobs.source import Folder, Formula, Source
from refmoe.profiles.policy import Policy
from refmoe.spec.config import PRESETS, Config
from refmoe.spec.model import Model as SpecModel
from refmoe.spec.model import Parameters
from refmoe.steps.grouped import GROUPED_STEPS
from refmoe.steps.policy_ops import PolicyOps
from refmoe.steps.rounding import CUT_STEPS
from refmoe.suite import Case, case_source, find_cases, read_case, trace_path
from refmoe.suite.golden_folder import case_folders, golden_folder
from refmoe.traces.held import held_trace
from refmoe.traces.script import execute, plan
from refmoe.traces.trace import Header, Recorder, Run, Trace, read_trace

EXACT, NATIVE = "exact", ("float32", "float64")


class Model:
    """A Mixtral: its configuration and its weights, which are read when they are used.

    Made by `refmoe.load` and `refmoe.case`.

    >>> import refmoe
    >>> model = refmoe.load("walking-skeleton")
    >>> model
    <refmoe.Model walking-skeleton: dim 48, 2 layers, 5 experts, top 2, vocabulary 97>
    >>> trace = model.run([1, 31, 41], decode=[9])
    >>> trace["decode1", "logits"].shape
    (1, 97)
    """

    def __init__(self, source: Source, name: str, case: Case | None = None) -> None:
        """source: of the weights   name: for reports   case: whose model this is, or None"""
        if not isinstance(source, Folder | Formula):
            raise InputError(f"Model: is made of {kind(source)}, but refmoe.load and refmoe.case make models")
        self._source, self.name, self.case = source, name, case

    @cached_property
    def _checkpoint(self) -> Checkpoint:
        return self._source.load()

    @property
    def config(self) -> Config:
        """The dimensions and constants."""
        return self._checkpoint.config

    @property
    def parameters(self) -> Parameters:
        """The weights, in the records of `refmoe.spec.model`."""
        return self._checkpoint.parameters

    @property
    def unknown_fields(self) -> tuple[str, ...]:
        """The fields of config.json that refmoe does not know, and therefore does not obey."""
        return self._checkpoint.unknown

    @property
    def subject(self) -> str:
        """The model in words, as reports name it."""
        return f"{'checkpoint' if self.case is None else 'case'} {self.name}"

    def __repr__(self) -> str:
        c = self.config
        return (
            f"<refmoe.Model {self.name}: dim {c.dim}, {c.layers} layers, {c.experts} experts, top "
            f"{c.experts_per_token}, vocabulary {c.vocab}>"
        )

    def runs(
        self, tokens: Tokens | None = None, decode: Tokens | None = None, chunks: Sequence[Any] = ()
    ) -> tuple[Run, ...]:
        """The runs of these calls; without tokens those of the case. Raises InputError, as `run` does."""
        if tokens is not None:
            return plan(calls_of(tokens, decode, chunks), self.config.vocab)
        if decode is not None or not isinstance(chunks, Sequence) or len(chunks):
            raise InputError("tokens: none were given beside decode or chunks, but those of the prefill were expected")
        if self.case is None:
            raise InputError("tokens: none were given, but the token ids of the prefill were expected")
        return self.case.runs()

    def run(
        self,
        tokens: Tokens | None = None,
        *,
        decode: Tokens | None = None,
        chunks: Sequence[Any] = (),
        dtype: str = EXACT,
        policy: Policy | str | None = None,
        taps: str = "*",
    ) -> Trace:
        """Compute the taps of a prefill, of chunks after it, and of decoded tokens.

        tokens: of one sequence, or a list for several; None: the calls of the case
        decode: token ids that are decoded one by one at the end; for several sequences a list for each
        chunks: lists of token ids, one call each, between prefill and decode; for several sequences a list for each
        dtype: ``exact`` has the same bits on every machine; ``float32`` and ``float64`` are NumPy's
        policy: instead of dtype, the ideal run of an engine with this policy
        taps: shell patterns of the taps to keep, separated by commas, such as ``logits,layers.0.*``
        Raises InputError for token ids outside the vocabulary and unknown names.

        >>> import refmoe
        >>> trace = refmoe.load("walking-skeleton").run([[1, 31], [41, 9]], decode=[[5], [6]], taps="logits")
        >>> [run.run for run in trace.runs]
        ['prefill.row0', 'prefill.row1', 'decode1.row0', 'decode1.row1']
        """
        runs = self.runs(tokens, decode, chunks)
        recorder = Recorder(name_of(taps, "taps", "patterns of taps such as 'logits,layers.0.*'"))
        ops: Any
        if policy is not None:
            if dtype != EXACT:
                raise InputError(f"dtype is {shown(dtype)}, but none was expected beside a policy")
            rules = as_policy(policy)
            ops, steps, name = PolicyOps(rules, recorder), CUT_STEPS, rules.name
        elif dtype == EXACT:
            ops, steps, name = ExactOps(recorder), GROUPED_STEPS, "float64"
        elif isinstance(dtype, str) and dtype in NATIVE:
            ops, steps, name = NativeOps(dtype, recorder), GROUPED_STEPS, dtype
        else:
            raise InputError(f"dtype is {shown(dtype)}, but one of {', '.join((EXACT, *NATIVE))} was expected")
        with np.errstate(over="ignore", invalid="ignore"):
            execute(ops, SpecModel(self.config, self.parameters, steps), runs, recorder)
        if not recorder.arrays:
            raise InputError(f"taps is {shown(taps)}, but no tap of the model has such a name")
        of_case = self.case is not None and tokens is None
        header = Header(runs, self.case.name if self.case is not None and of_case else None, policy=name)
        return held_trace(header, recorder.arrays, f"run of {self.name}")

    def save(self, folder: str | os.PathLike[str], *, dtype: str = "bfloat16", layout: str = "hf") -> None:
        """Write the model as a checkpoint that other engines load.

        dtype: of the weights, ``bfloat16``, ``float16`` or ``float32``   layout: ``hf`` or ``mistral``
        Raises InputError when the folder cannot be written, or a weight has no value in this dtype.
        """
        if not isinstance(dtype, str) or dtype not in DTYPE_NAMES:
            raise InputError(f"dtype is {shown(dtype)}, but one of {', '.join(DTYPE_NAMES)} was expected")
        write_checkpoint(path_of(folder, "folder"), self.config, self.parameters, dtype, _layout(layout))

    def digest(self) -> str | None:
        """``sha256:`` and the digest of the checkpoint's files; None where there are none."""
        return checkpoint_digest(self._checkpoint)


def _layout(layout: object) -> str:
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise InputError(f"layout is {shown(layout)}, but one of {', '.join(LAYOUTS)} was expected")
    return layout


def load(path: str | os.PathLike[str], *, seed: int | None = None, layout: str | None = None) -> Model:
    """Load a model.

    path: the folder of a checkpoint, a GGUF file, the name of a case, or a published size (``mixtral-8x7b``,
    ``mixtral-8x22b``)
    seed: of the weight formula, for a published size: no download is needed
    layout: ``hf`` or ``mistral``; None: by the files of the folder
    Raises InputError, one sentence, when there is no such model or it does not fit its configuration.

    >>> import refmoe
    >>> refmoe.load("mixtral-8x7b", seed=1)
    <refmoe.Model mixtral-8x7b, seed 1: dim 4096, 32 layers, 8 experts, top 2, vocabulary 32000>
    """
    folder = path_of(path, "path")
    name = str(folder)
    if layout is not None:
        _layout(layout)
    if seed is not None:
        if name not in PRESETS or folder.exists():
            raise InputError(f"seed: goes with {' or '.join(PRESETS)}, but {shown(name)} was given")
        number = whole_number(seed, "seed")
        return Model(Formula(PRESETS[name], number), f"{name}, seed {number}")
    if not folder.exists():
        if name in PRESETS:
            raise InputError(f"{name}: is a published size without weights, but seed= was expected for the formula")
        if name in case_folders(golden_folder()):
            return case(name).model
        raise InputError(
            f"{name}: no such folder, "
            f"but a checkpoint's folder, a GGUF file or the name of a case was expected{_similar(name)}"
        )
    model = Model(Folder(folder, layout), name)
    _ = model.config  # opened now, so that its faults are reported here
    return model


class GoldenCase:
    """A case of the suite: a small model, its calls, and the golden taps.

    >>> import refmoe
    >>> case = refmoe.case("walking-skeleton")
    >>> case.golden["prefill", "logits"].dtype
    dtype('float64')
    """

    def __init__(self, case: Case) -> None:
        self._case = case
        self.name, self.why = case.name, case.why
        self.config, self.runs = case.config, case.runs()
        self.model = Model(case_source(case), case.name, case)

    @property
    def golden(self) -> Trace:
        """The golden taps. Those of a small case that stores only a fingerprint are computed.

        Raises InputError for a case of full size: that takes minutes and a disk, so ``refmoe emit`` does it.
        """
        if self._case.full_size:
            raise InputError(f"case {self.name}: is of full size and stores no trace; refmoe emit computes one")
        return read_trace(trace_path(self._case.folder)) if self._case.store == "trace" else self.model.run()

    def __repr__(self) -> str:
        return f"<refmoe case {self.name}: {self.why.splitlines()[0]}>"


def case(name: str) -> GoldenCase:
    """The case of this name. Raises InputError, with the similar names, when there is none.

    >>> import refmoe
    >>> refmoe.case("top-1").config.experts_per_token
    1
    """
    folders = case_folders(golden_folder())
    if name_of(name, "case", "the name of a case") not in folders:
        raise InputError(f"case {shown(name)} is unknown, expected one of refmoe.cases(){_similar(name)}")
    return GoldenCase(read_case(folders[name]))


def _similar(name: str) -> str:
    found = difflib.get_close_matches(name[:200], [*case_folders(golden_folder())], n=3, cutoff=0.5)
    return f", such as {', '.join(found)}" if found else ""


def cases() -> list[str]:
    """The names of all cases.

    >>> import refmoe
    >>> "walking-skeleton" in refmoe.cases()
    True
    """
    return [*case_folders(golden_folder())]


def small_cases() -> list[str]:
    """The names of the cases that are not of full size: each is computed within seconds."""
    return [path.name for path in find_cases(golden_folder())]
