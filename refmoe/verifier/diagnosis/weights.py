# SPDX-License-Identifier: Apache-2.0
"""Structures of weights: experts with the matrices of others, square matrices used as their transposes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refmoe.bugs.changed_weights import mapped, with_experts, with_layers
from refmoe.spec.model import Parameters
from refmoe.verifier.diagnosis.evidence import Evidence, judge_again, middle
from refmoe.verifier.findings import FAIL, PASS, STRUCTURE, Explanation, proven
from refmoe.verifier.passes import Key
from refmoe.verifier.subject import Subject

MOST_EXPERTS = 64
"""The most experts for which a permutation is sought, because every expert computes every token."""
MATRICES = {
    "attention.q": "wq", "attention.k": "wk", "attention.v": "wv", "attention.output": "wo", "router.logits": "router",
    "expert.gate": "w1", "expert.up": "w3", "expert.output": "w2",
}  # fmt: skip
"""The matrix of each step that has one."""


@dataclass(frozen=True)
class Loaded:
    """A hypothesis: parameters as a wrong loader leaves them."""

    name: str
    about: str
    fix: str
    parameters: Parameters


def of_weights(evidence: Evidence) -> list[Explanation]:
    """The hypotheses that explain all failed taps of a step that has a matrix."""
    found = []
    for step in dict.fromkeys(check.step for check in evidence.failed if check.step in MATRICES):
        at = sorted({(check.run, check.tap) for check in evidence.failed if check.step == step})
        for hypothesis in _hypotheses(evidence, step):
            right = evidence.right
            wrong = Subject(right.config, hypothesis.parameters, right.runs, right.steps)
            verdicts = judge_again(evidence, wrong, evidence.policy)
            here = [verdicts[key] for key in at]
            if PASS in here and FAIL not in here:
                name = f"{step}: {hypothesis.name}"
                found.append(proven(name=name, kind=STRUCTURE, about=hypothesis.about, fix=hypothesis.fix))
                break
    return found


def _hypotheses(evidence: Evidence, step: str) -> Iterator[Loaded]:
    yield from transposed(evidence, step)
    if step.startswith("expert."):
        yield from permuted_experts(evidence, step)


def transposed(evidence: Evidence, step: str) -> Iterator[Loaded]:
    """The hypothesis that the matrix of the step is used as its transpose. Only a square matrix can be."""
    parameters, matrix = evidence.right.parameters, MATRICES[step]
    layer = parameters.layers[0]
    held = getattr(layer.experts[0] if step.startswith("expert.") else layer, matrix)
    if held.shape[0] != held.shape[1]:
        return
    each = with_experts if step.startswith("expert.") else with_layers
    change: Callable[[Any], Any] = lambda owner: replace(  # noqa: E731
        owner, **{matrix: mapped(getattr(owner, matrix), lambda values: values.T)}
    )
    yield Loaded(
        name=f"{matrix} transposed",
        about=f"{matrix} is used as its transpose",
        fix="a file holds [out, in]: y = x w^T",
        parameters=each(parameters, change),
    )


def permuted_experts(evidence: Evidence, step: str) -> Iterator[Loaded]:
    """The hypothesis that expert e has the matrix of expert p(e), found by trying every expert on every token."""
    right, matrix = evidence.right, MATRICES[step]
    count = right.config.experts
    key = next(
        ((c.run, c.tap) for c in evidence.failed if c.step == step and (c.run, c.tap) in evidence.expected), None
    )
    if key is None or count > MOST_EXPERTS:
        return
    experts = _experts_of(evidence, key)
    if experts is None:
        return
    found = np.asarray(evidence.trace.get(*key), np.float64)
    distances = []
    for by in range(count):
        rolled = _with_matrix_of(right.parameters, matrix, [(e + by) % count for e in range(count)])
        subject = Subject(right.config, rolled, right.runs, right.steps)
        values = middle(evidence, subject, evidence.policy, {key}).get(key)
        if values is None or values.shape != found.shape:
            return
        with np.errstate(all="ignore"):
            distances.append(((values - found) ** 2).sum(-1))
    nearest = (experts + np.argmin(np.nan_to_num(np.stack(distances), nan=np.inf), axis=0)) % count
    sources = list(range(count))
    for e in range(count):
        chosen = nearest[experts == e]
        if chosen.size:
            sources[e] = int(np.bincount(chosen).argmax())
    moved = [f"{e} has that of {p}" for e, p in enumerate(sources) if e != p]
    if moved:
        listed = ", ".join(moved[:6]) + (", ..." if len(moved) > 6 else "")
        yield Loaded(
            name="experts permuted",
            about=f"experts compute with another's {matrix}: {listed}",
            fix="look at the order in which the experts' weights are loaded or indexed",
            parameters=_with_matrix_of(right.parameters, matrix, sources),
        )


def _experts_of(evidence: Evidence, key: Key) -> Any:
    """The trace's choice of experts in the layer of a tap, integers [T, k]. None if the trace has none."""
    run, tap = key
    name = tap.rpartition("expert.")[0] + "router.experts"
    if name not in evidence.trace.names(run):
        return None
    return np.asarray(evidence.trace.get(run, name)).astype(np.int64)


def _with_matrix_of(parameters: Parameters, matrix: str, sources: list[int]) -> Parameters:
    """The parameters where expert e of each layer has the matrix of expert sources[e]."""

    def change(layer: Any) -> Any:
        experts = tuple(
            replace(expert, **{matrix: getattr(layer.experts[source], matrix)})
            for expert, source in zip(layer.experts, sources, strict=True)
        )
        return replace(layer, experts=experts)

    return with_layers(parameters, change)
