# SPDX-License-Identifier: Apache-2.0
"""The words about an outcome of a case, which the reports of a run share."""

from __future__ import annotations

from collections.abc import Iterable

from refmoe.engines.results import Engine, Outcome, Results
from refmoe.report.wording import NOUNS, visible
from refmoe.spec.taps import layer_of, step_of


def engine_words(engine: Engine) -> str:
    """The name, version and options of an engine."""
    return visible(
        " ".join([engine.name, engine.version, *(f"{key}={value}" for key, value in engine.options.items())])
    )


def about_weights(results: Results) -> Iterable[str]:
    """How the weights of the cases were changed, a sentence each. Empty where they are the suite's own."""
    if results.fresh is not None:
        yield f"fresh cases: other weights and tokens, by seed {results.fresh}"
    if results.quantised:
        yield f"quantised weights: {results.quantised}"


def where(outcome: Outcome) -> str:
    """The place of the first wrong step in words: ``run prefill, layer 0, token 2``. Empty without one."""
    if outcome.first_wrong is None:
        return ""
    run, tap = outcome.first_wrong
    layer = layer_of(tap)
    parts = [f"run {run}"] + [f"layer {layer}"] * (layer is not None)
    return visible(", ".join([*parts, *([] if outcome.token is None else [f"token {outcome.token}"])]))


def what(outcome: Outcome) -> str:
    """The failure in one sentence without its full stop: ``the rotated query is wrong: one-pair in float32, ...``."""
    place = f"{outcome.case} in {outcome.dtype}"
    if outcome.first_wrong is None:
        return visible(f"{outcome.verdict}: {place}")
    step = step_of(outcome.first_wrong[1])
    return visible(f"{NOUNS.get(step, step)} is wrong: {place}, {where(outcome)}")


def cause(outcome: Outcome) -> Iterable[str]:
    """The best explanation, a sentence each: its kind, name and description, then the fix. Empty without one."""
    for each in outcome.explanations[:1]:
        yield visible(f"{each.kind}: {each.name}: {each.about}")
        if each.fix:
            yield visible(f"fix: {each.fix}")
