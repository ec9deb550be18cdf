# SPDX-License-Identifier: Apache-2.0
"""The bounds of all traces of a run, per step and end to end, with the argument for them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from refmoe.engines.protocol import EVERY_TAP
from refmoe.evidence.given import Given
from refmoe.evidence.judged import Bounds, Judged, Width

ARGUMENT = (
    "allowed: the enclosure of a step holds every result that the policy allows, computed from the engine's own values "
    "before the step. Its ends are rounded to the stored dtype. The largest distance from the exact result on these "
    "values to an end is the bound. It is proven, and a step that passes has no value beyond it.",
    "accepted: a value that passes is also no more standard deviations from the exact result than the limit, which "
    "follows from the significance. The limit times the standard deviation, with the cell of the value, is the bound. "
    "Every value of a conformant trace was held against it.",
    "reached: the largest difference between a value of the engine and the golden value of the same element. Both are "
    "known, so this is no estimate. It is rounded up.",
    "proven: the certificate of the case. Ball arithmetic encloses the real number, so the golden value is no farther "
    "from it than this.",
    "total: for each tap, reached + proven. By the triangle inequality, the engine's value is no farther from the real "
    "number than this.",
    "relative: the largest total of a tap, over the root mean square of its golden values.",
    "end to end, total: the total of the logits, from the token ids to the last step, on the inputs of these cases.",
    "end to end, from_tokens: the enclosures of the whole model from the token ids on. Nothing of a trace is read "
    "except its choices of experts, each of which was judged by itself. So these bounds hold before any value is "
    "measured. allowed adds up worst cases, and may have no bound behind a norm. accepted adds up variances, as "
    "independent roundings do.",
    "null: nothing bounds the value. Examples are a case without a certificate, such as a fresh one, and an error "
    "bound that grows beyond every number on its way through the layers.",
    "A tap of the experts is compared for the tokens with the golden's choice of experts. Where the engine chose "
    "otherwise, and legally, the taps after it are compared all the same.",
    "The budgets of exp, of angles and of cosine and sine are tolerances with a source. They are part of allowed, of "
    "accepted and of from_tokens, and not of total.",
)
"""The argument for each figure, in the words of the document."""


def epsilon(given: Given, judged: Mapping[tuple[str, str], Judged]) -> dict[str, Any]:
    """The document.   judged: by case and dtype"""
    cases: dict[str, Any] = {}
    for (case, dtype), each in judged.items():
        entry = _steps(each.bounds) | {"from_tokens": _width(each.from_tokens)}
        cases.setdefault(case, {})[dtype] = entry
    return {
        "argument": list(ARGUMENT),
        "dtypes": {dtype: _of_dtype(given, dtype, judged) for dtype in given.dtypes},
        "cases": cases,
    }


def _of_dtype(given: Given, dtype: str, judged: Mapping[tuple[str, str], Judged]) -> dict[str, Any]:
    """The largest bounds of all cases at a dtype."""
    mine = {case: each for (case, other), each in judged.items() if other == dtype}
    worst: dict[str, Bounds] = {}
    for each in mine.values():
        for step, bounds in each.bounds.items():
            worst[step] = worst.get(step, Bounds()).worst(bounds)
    ends = [each for each in mine.values() if "logits" in each.bounds]
    return {
        "policy": given.dtypes[dtype],
        "cases": len(mine),
        **_steps(worst),
        "end_to_end": {
            "cases": len(ends),
            "total": _largest(each.bounds["logits"].total for each in ends),
            "relative": _largest(each.bounds["logits"].relative for each in ends),
            "from_tokens": _width(_widest(each.from_tokens for each in ends)),
        },
    }


def _steps(bounds: Mapping[str, Bounds]) -> dict[str, Any]:
    found = [step for step in EVERY_TAP if step in bounds]
    return {"steps": {step: {name: _number(x) for name, x in vars(bounds[step]).items()} for step in found}}


def _widest(widths: Iterable[Width | None]) -> Width | None:
    found = None
    for each in widths:
        found = each if found is None or each is None else found.worst(each)
    return found


def _width(width: Width | None) -> dict[str, float | None]:
    return {name: _number(value) for name, value in vars(width or Width(math.inf, math.inf)).items()}


def _largest(values: Iterable[float]) -> float | None:
    found = [*values]
    return _number(max(found)) if found else None


def _number(value: float) -> float | None:
    """A bound as JSON: null where there is none."""
    return value if math.isfinite(value) else None
