"""Models: loaded from a checkpoint, a case or the weight formula, and run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from refmoe.arithmetic.exact.ops import ExactOps
from refmoe.arithmetic.native.ops import NativeOps
from refmoe.checkpoints.load import checkpoint_digest
from refmoe.errors import InputError
from refmoe.jobs.source import Folder, Formula, Source, loaded
from refmoe.profiles.load import policy as named_policy
from refmoe.spec.config import PRESETS, Config
from refmoe.spec.model import Model as SpecModel
from refmoe.spec.model import Parameters
from refmoe.steps.grouped import GROUPED_STEPS
from refmoe.steps.policy_ops import PolicyOps
from refmoe.steps.rounding import CUT_STEPS
from refmoe.suite import Case, case_source, find_cases, find_full_size_cases, read_case
from refmoe.suite.golden_folder import golden_folder
from refmoe.traces.held import held_trace
from refmoe.traces.script import AnyCall, Call, execute, plan
from refmoe.traces.trace import Header, Recorder, Run, Trace

Tokens = Sequence[int] | Sequence[Sequence[int]]
"""The token ids of one sequence, or of several."""
EXACT, NATIVE = "exact", ("float32", "float64")


class Model:
    """A Mixtral: its configuration and its weights, which are read when they are used.

    Made by `refmoe.load` and `refmoe.case`.

    >>> import refmoe
    >>> model = refmoe.load("walking-skeleton")
    >>> model
    <refmoe.Model walking-skeleton: dim 32, 2 layers, 5 experts, top 2, vocabulary 97>
    >>> trace = model.run([1, 31, 41], decode=[9])
    >>> trace["decode1", "logits"].shape
    (1, 97)
    """

    def __init__(self, source: Source, name: str, case: Case | None = None) -> None:
        """source: of the weights   name: for reports   case: whose model this is, or None"""
        self._source, self.name, self._case = source, name, case

    @property
    def config(self) -> Config:
        """The dimensions and constants."""
        return loaded(self._source).config

    @property
    def parameters(self) -> Parameters:
        """The weights, in the records of `refmoe.spec.model`."""
        return loaded(self._source).parameters

    @property
    def subject(self) -> str:
        """The model in words, as reports name it."""
        return f"{'checkpoint' if self._case is None else 'case'} {self.name}"

    def __repr__(self) -> str:
        c = self.config
        return (
            f"<refmoe.Model {self.name}: dim {c.dim}, {c.layers} layers, {c.experts} experts, top "
            f"{c.experts_per_token}, vocabulary {c.vocab}>"
        )

    def runs(
        self, tokens: Tokens | None = None, decode: Tokens | None = None, chunks: Sequence[Sequence[int]] = ()
    ) -> tuple[Run, ...]:
        """The runs of these calls; without tokens those of the case. Raises InputError, as `run` does."""
        if tokens is None:
            if self._case is None:
                raise InputError("tokens: none were given, but the token ids of the prefill were expected")
            if decode is not None or len(chunks):
                raise InputError(
                    "tokens: none were given beside decode or chunks, but those of the prefill were expected"
                )
            return self._case.runs()
        return plan(calls_of(tokens, decode, chunks), self.config.vocab)

    def run(
        self,
        tokens: Tokens | None = None,
        *,
        decode: Tokens | None = None,
        chunks: Sequence[Sequence[int]] = (),
        dtype: str = EXACT,
        policy: str | None = None,
        taps: str = "*",
    ) -> Trace:
        """Compute the taps of a prefill, of chunks after it, and of decoded tokens.

        tokens: of one sequence, or a list for several; None: the calls of the case
        decode: token ids that are decoded one by one after the prefill, per sequence if there are several
        chunks: lists of token ids, one call each, between prefill and decode; for a single sequence only
        dtype: ``exact`` has the same bits on every machine; ``float32`` and ``float64`` are NumPy's
        policy: instead of dtype, the ideal run of an engine with this policy
        taps: shell patterns of the taps to keep, separated by commas, such as ``logits,layers.0.*``
        Raises InputError for token ids outside the vocabulary and unknown names.
        """
        runs = self.runs(tokens, decode, chunks)
        recorder = Recorder(taps)
        if policy is not None:
            rules = named_policy(policy)
            ops, steps, name = PolicyOps(rules, recorder), CUT_STEPS, rules.name
        elif dtype == EXACT:
            ops, steps, name = ExactOps(recorder), GROUPED_STEPS, "float64"
        elif dtype in NATIVE:
            ops, steps, name = NativeOps(dtype, recorder), GROUPED_STEPS, dtype
        else:
            raise InputError(f"dtype is {dtype!r}, but one of {', '.join((EXACT, *NATIVE))} was expected")
        with np.errstate(over="ignore", invalid="ignore"):
            execute(ops, SpecModel(self.config, self.parameters, steps), runs, recorder)
        if not recorder.arrays:
            raise InputError(f"taps is {taps!r}, but no tap of the model has such a name")
        header = Header(runs, None if self._case is None else self._case.name, policy=name)
        return held_trace(header, recorder.arrays, f"run of {self.name}")

    def digest(self) -> str | None:
        """``sha256:`` and the digest of the checkpoint's files; None where there are none."""
        files = loaded(self._source).files
        return checkpoint_digest(files) if files else None


def calls_of(tokens: Tokens, decode: Tokens | None, chunks: Sequence[Sequence[int]]) -> list[AnyCall]:
    """The script of `Model.run`. Raises InputError when the arguments do not fit each other."""
    sequences = [integers(each, f"tokens of sequence {i}") for i, each in enumerate(tokens)] if nested(tokens) else None
    if sequences is None:
        pieces = [Call("chunk", 0, integers(piece, f"chunk {i}")) for i, piece in enumerate(chunks)]
        last = [Call("decode", 0, integers(decode, "decode"))] if decode is not None and len(decode) else []
        return [Call("prefill", 0, integers(tokens, "tokens")), *pieces, *last]
    if len(chunks):
        raise InputError("chunks: goes with the tokens of one sequence, but several sequences were given")
    calls: list[AnyCall] = [Call("prefill", i, each) for i, each in enumerate(sequences)]
    if decode is not None:
        if not nested(decode) or len(decode) != len(sequences):
            raise InputError(f"decode: a list of token ids for each of the {len(sequences)} sequences was expected")
        calls += [Call("decode", i, integers(each, f"decode of sequence {i}")) for i, each in enumerate(decode)]
    return calls


def nested(tokens: object) -> bool:
    """Whether these are the tokens of several sequences."""
    return np.ndim(tokens[0]) > 0 if isinstance(tokens, Sequence | np.ndarray) and len(tokens) else False  # type: ignore[arg-type]


def integers(tokens: object, name: str) -> tuple[int, ...]:
    """Token ids as integers. Raises InputError for anything else; the vocabulary is checked by `plan`."""
    array = np.asarray(tokens if not hasattr(tokens, "tolist") else tokens.tolist())
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InputError(f"{name}: a list of token ids was expected, but {type(tokens).__name__} was given")
    return tuple(int(token) for token in array)


def load(path: str | os.PathLike[str], *, seed: int | None = None, layout: str | None = None) -> Model:
    """Load a model.

    path: the folder of a checkpoint, the name of a case, or a published size (``mixtral-8x7b``, ``mixtral-8x22b``)
    seed: of the weight formula, for a published size: no download is needed
    layout: ``hf`` or ``mistral``; None: by the files of the folder
    Raises InputError, one sentence, when there is no such model or it does not fit its configuration.

    >>> import refmoe
    >>> refmoe.load("mixtral-8x7b", seed=1)
    <refmoe.Model mixtral-8x7b, seed 1: dim 4096, 32 layers, 8 experts, top 2, vocabulary 32000>
    """
    name = os.fspath(path)
    folder = Path(name)
    if name in PRESETS and not folder.exists():
        if seed is None:
            raise InputError(f"{name}: is a published size without weights, but seed= was expected for the formula")
        return Model(Formula(PRESETS[name], seed), f"{name}, seed {seed}")
    if seed is not None:
        raise InputError(f"seed = {seed} goes with {' or '.join(PRESETS)}, but {name!r} was given")
    if not folder.exists() and name in case_names():
        return case(name).model
    source = Folder(folder, layout)
    loaded(source)
    return Model(source, name)


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
        """The golden taps. A case that stores only a fingerprint is computed."""
        return self.model.run()

    def __repr__(self) -> str:
        return f"<refmoe case {self.name}: {self.why.splitlines()[0]}>"


def case(name: str) -> GoldenCase:
    """The case of this name. Raises InputError, with the similar names, when there is none.

    >>> import refmoe
    >>> refmoe.case("top-1").config.experts_per_token
    1
    """
    if name not in case_names():
        raise InputError(f"case '{name}' is unknown; refmoe.cases() has all {len(case_names())}")
    return GoldenCase(read_case(golden_folder() / name))


def cases() -> list[str]:
    """The names of all cases.

    >>> import refmoe
    >>> "walking-skeleton" in refmoe.cases()
    True
    """
    return [*case_names()]


def case_names() -> Mapping[str, Path]:
    """The folder of each case, by its name."""
    golden = golden_folder()
    return {path.name: path for path in sorted([*find_cases(golden), *find_full_size_cases(golden)])}
