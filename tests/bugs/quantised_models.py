# SPDX-License-Identifier: Apache-2.0
"""A golden case in each quantised format, and an honest engine for it, on which the bugs of that format are shown."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from refmoe.bugs.changed_weights import mapped
from refmoe.bugs.mutant import POLICY
from refmoe.bugs.quantised.bug import QuantisedBug
from refmoe.bugs.quantised.catalogue import QUANTISED, known_bugs
from refmoe.bugs.quantised.engine import run
from refmoe.bugs.run_engine import same
from refmoe.checkpoints.ggml_blocks import FORMATS
from refmoe.checkpoints.gguf_file import write_gguf
from refmoe.checkpoints.load import load_checkpoint
from refmoe.checkpoints.names import build_parameters, named_weights
from refmoe.checkpoints.quantise import RECIPES, write_quantised
from refmoe.checkpoints.weight import Weight
from refmoe.profiles.cut_points import product_of
from refmoe.profiles.load import policy
from refmoe.profiles.policy import Policy
from refmoe.spec.config import Config
from refmoe.spec.model import Parameters
from refmoe.suite import read_case
from refmoe.traces.trace import Run, Trace
from refmoe.verifier.diagnosis import Explanation, diagnose
from refmoe.verifier.findings import STRUCTURE, Report
from refmoe.verifier.verify import verify
from tests.checkpoints import quantised_folders

CASE = "production-head-32"
"""The smallest case whose rows are whole blocks of 256."""
CODES = "+codes"
"""After the name of a model in FP8, where the engine makes codes of inputs too."""
FP8_CODES = {
    "fp8-channel+codes": "bfloat16+consumers=stored+fp8-channel.input=e4m3-token",
    "fp8-block128+codes": "bfloat16+consumers=stored+fp8-block128x128.input=e4m3-block128",
}
INT8 = "bfloat16+consumers=stored+int8-channel.input=int8-token"
RULES = {
    **dict.fromkeys(FORMATS, "llama.cpp-quantised"), "ct-int8-channel": INT8,
    **FP8_CODES,
    **dict.fromkeys((*RECIPES, "ct-int8-zeros", "gptq", "gptq-v2", "gptq-act-order", "awq", "fp8-tensor"), "bfloat16"),
}  # fmt: skip
"""The quantised models, by a format of GGUF, a recipe or a variant of a folder, and the policy of an engine for each.

Engines for FP8 weights, int4, GPTQ and AWQ are taken to compute in bfloat16 with the weights made whole.
"""
OF_FORMAT = {
    "fp8-block128x128": "fp8-block128", "int8-channel": "ct-int8-channel", "gptq-int4-group32": "gptq",
    "awq-int4-group32": "awq",
}  # fmt: skip
"""The model for bugs of a format, where its name is another one."""
SHOWN_BY = {
    "quantised-zero-points-ignored": "ct-int8-zeros", "quantised-gptq-zero-of-version-1": "gptq-v2",
    "quantised-gptq-order-ignored": "gptq-act-order",
}  # fmt: skip
"""The models for bugs that their format alone does not show."""


@dataclass(frozen=True)
class Setting:
    """A quantised model, the calls of the case, and the policy of an honest engine."""

    config: Config
    parameters: Parameters
    runs: tuple[Run, ...]
    rules: Policy


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """A folder for the files of models, which are read when weights are. It goes with the process."""
    return tempfile.TemporaryDirectory()


def uneven(config: Config, parameters: Parameters) -> Parameters:
    """The parameters with rows and blocks of 32 x 32 of different sizes, as trained matrices have them.

    Synthetic matrices are so even that a scale does not tell from which block it is. The factors are powers of two.
    """
    weights = named_weights(parameters)

    def changed(name: str) -> Weight:
        weight = weights[name]
        if product_of(weight) in (None, "router.logits"):
            return weight
        rng = np.random.default_rng(list(name.encode()))
        high, wide = weight.shape
        blocks = rng.integers(-1, 2, (-(-high // 32), -(-wide // 32)))
        power = np.repeat(np.repeat(blocks, 32, 0), 32, 1)[:high, :wide] + rng.integers(-1, 2, (high, 1))
        return mapped(weight, lambda values: (values.astype(np.float32) * np.exp2(power)).astype(values.dtype))

    return build_parameters(config, changed)


@cache
def setting(name: str) -> Setting:
    """The model of this name.   name: one of `RULES`"""
    case = read_case(Path(__file__).parents[2] / "golden" / CASE)
    path, parameters = Path(_folder().name) / name, uneven(case.config, case.checkpoint().parameters)
    if name in FORMATS:
        write_gguf(path, case.config, parameters, name)
    elif (recipe := name.removesuffix(CODES)) in RECIPES:
        write_quantised(path, case.config, parameters, recipe, "bfloat16")
    else:
        quantised_folders.write(path, quantised_folders.VARIANTS[name], case.config, parameters)
    loaded = load_checkpoint(path)
    return Setting(config=loaded.config, parameters=loaded.parameters, runs=case.runs(), rules=policy(RULES[name]))


def models_of(bug: QuantisedBug) -> list[str]:
    """The models that can show a bug."""
    if bug.id in SHOWN_BY:
        return [SHOWN_BY[bug.id]]
    models = [OF_FORMAT.get(each, each) for each in bug.formats]
    if bug.changes == POLICY:  # a bug of inputs shows where codes are made of them
        models = [model + CODES if model + CODES in RULES else model for model in models]
        models = [model for model in models if model.endswith(CODES) or "fp8" not in model]
    return [model for model in models if model in RULES]


def traced(bug: QuantisedBug | None, model: str) -> Trace:
    """The trace of an engine with this bug; None: without any bug."""
    at = setting(model)
    return run(bug, at.config, at.parameters, at.runs, at.rules)


def judged(trace: Trace, model: str) -> Report:
    at = setting(model)
    return verify(trace, model, at.config, at.parameters, at.runs, at.rules)


def explained(trace: Trace, model: str, report: Report, without: tuple[str, ...] = ()) -> list[Explanation]:
    """What explains a trace, best first.   without: the names of known bugs that are not tried"""
    at = setting(model)
    known = [each for each in known_bugs(at.parameters) if each.id not in without]
    found = diagnose(trace, at.config, at.parameters, at.runs, at.rules, report, known)
    return [each for each in found if each.explains]


def computes(name: str, trace: Trace, model: str) -> bool:
    """Whether the bug or the policy of this name computes the values of a trace, bit by bit."""
    at = setting(model)
    known = {each.id: each for each in known_bugs(at.parameters)}
    if name in known:
        return same(run(known[name], at.config, at.parameters, at.runs, at.rules), trace)
    if "+" not in name or " " in name:
        return False
    return same(run(None, at.config, at.parameters, at.runs, policy(name)), trace)


@dataclass(frozen=True)
class Left:
    """The diagnosis of a bug by all known bugs but itself."""

    alike: tuple[str, ...]
    """The names of what computes the same values, which are left out too."""
    named: str
    kind: str
    residual: float

    @property
    def wrong(self) -> bool:
        """Whether another known bug, or other arithmetic, is named. A structure describes; it names no cause."""
        return self.named != "" and self.kind != STRUCTURE


def left_out(bug: str, model: str) -> Left:
    """The diagnosis of a bug by all known bugs but itself, and but those that compute the same."""
    trace = traced(QUANTISED[bug], model)
    report, alike = judged(trace, model), list[str]()
    while True:
        found = [each for each in explained(trace, model, report, (bug, *alike)) if each.name not in alike]
        first = found[0] if found else None
        if first is None or first.kind == STRUCTURE or not computes(first.name, trace, model):
            return Left(
                alike=tuple(alike), named=first.name if first else "", kind=first.kind if first else "",
                residual=first.residual if first else math.nan,
            )  # fmt: skip
        alike.append(first.name)
