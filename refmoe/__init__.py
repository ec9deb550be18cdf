# SPDX-License-Identifier: Apache-2.0
"""Check whether an implementation of Mixtral is right, and if it is not, learn which step is wrong and why.

Start here. A model comes from the folder of a checkpoint, from a case, or as "mixtral-8x7b" with seed=1:

>>> import refmoe
>>> model = refmoe.load("walking-skeleton")
>>> trace = model.run([1, 31, 41], decode=[9, 79])      # exact; dtype="float32" is faster
>>> trace["prefill", "layers.0.router.logits"].shape    # an array of NumPy
(3, 5)

Values of an engine are arrays of NumPy, PyTorch, JAX, CuPy or MLX, as many or as few as there are:

>>> mine = {"final_norm": trace["prefill", "final_norm"], "logits": 2 * trace["prefill", "logits"]}
>>> report = refmoe.verify(mine, model, [1, 31, 41], policy="float32")
>>> bool(report)                                        # false as well when the engine cannot be judged
False
>>> report.first_wrong_step.tap                         # print(report) says what is wrong, and the bug that explains it
'logits'

A live PyTorch module is recorded by hooks:

    with refmoe.capture(torch_model) as trace:
        torch_model(input_ids)
    refmoe.verify(trace, model)

Names:

    load, Model                  a model: a checkpoint, a case, or weights from a formula
    case, cases                  the golden cases: small models with calls that make mistakes visible
    verify, Report               judge values of an engine, step by step
    capture, Trace               the taps of an engine: recorded, or as a file
    policy, policies             the rounding that is legal for an engine
    testing                      assertions for unit tests
    InputError                   raised for a wrong argument or file; the message is one sentence

Everything else in the package is private. The glossary in docs/glossary.md defines the terms.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refmoe import testing
    from refmoe.api.capturing import capture
    from refmoe.api.judging import verify
    from refmoe.api.models import Model, case, cases, load
    from refmoe.api.policies import policies, policy
    from refmoe.api.report import Report
    from refmoe.errors import InputError
    from refmoe.traces.trace import Trace

__version__ = "0.1.0"

__all__ = [
    "InputError", "Model", "Report", "Trace", "capture", "case", "cases", "load", "policies", "policy", "testing",
    "verify",
]  # fmt: skip

_PLACES = {
    "InputError": "errors", "Model": "api.models", "Report": "api.report", "Trace": "traces.trace",
    "capture": "api.capturing", "case": "api.models", "cases": "api.models", "load": "api.models",
    "policies": "api.policies", "policy": "api.policies", "verify": "api.judging",
}  # fmt: skip
"""The module of each name. It is imported when the name is first used: `import refmoe` costs next to nothing."""


def __getattr__(name: str) -> Any:
    if name == "testing":
        return import_module("refmoe.testing")
    if name not in _PLACES:
        raise AttributeError(f"module 'refmoe' has no attribute {name!r}")
    value = getattr(import_module(f"refmoe.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
