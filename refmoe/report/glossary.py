# SPDX-License-Identifier: Apache-2.0
"""The terms that a report uses, each with a short definition. docs/glossary.md has them in the same words."""

from __future__ import annotations

TERMS = {
    "tap": "A named intermediate value of the forward pass, such as layers.0.router.logits.",
    "step": "One function of the model that turns taps into the next tap, such as the norm or the router.",
    "run": (
        "The record of one call in a trace: its tokens, its positions and its taps. Runs have names: prefill, decode1."
    ),
    "trace": "A file with the taps of one or more runs of an engine.",
    "policy": (
        "The rounding that is legal for an engine: the dtype at each cut point, and the budgets of its functions."
    ),
    "legal interval": (
        "The smallest and the largest value that a legal engine can store: the enclosure after the last rounding."
    ),
    "enclosure": "For one value, all results that a legal engine can compute: a midpoint, a radius and a variance.",
    "radius": ("A proven bound on the distance of any legal result from the midpoint, before the last rounding."),
    "variance": ("The expected square of that distance when roundings are independent. Its root is called sigma."),
    "cell": "All real numbers that round to the value that the engine stored.",
    "check": "The test of one tap of one run. Its verdict is pass, fail or undecidable.",
    "excess": ("The distance from the midpoint to the cell, in standard deviations. A large one is improbable."),
    "significance": "The probability that a healthy engine fails anywhere in the whole verification.",
    "power": "The number of known bugs that the taps of a trace would show at its dtype, as measured on golden cases.",
    "rung": "How much of a check's input is in the trace: local, routing-replayed or free-running.",
    "first wrong step": "The first failed check, in order of computation.",
    "decision": "The choice of experts for one token in one layer.",
    "forced": "A decision that the policy's rounding cannot change.",
    "tie": "A decision between experts whose logits are equal in exact arithmetic.",
    "contestable": "A decision, or a code, that rounding alone can change. Either choice is legal.",
    "margin": "The distance between the logits of the last chosen expert and of the best one left out.",
    "known bug": "A mistake that a real implementation has had, with its source.",
    "explanation": "A known bug, other arithmetic, two at once, or a structure, under which all failed checks pass.",
    "structure": (
        "A simple relation between the right values and those found, such as exchanged heads or a constant factor."
    ),
    "coefficient": "The part of the error that an explanation predicts: 1 is all of it, 0 is none.",
    "residual": "The part of the error that an explanation leaves over.",
}
"""Per term its definition, in the order of the page."""


def anchor(term: str) -> str:
    """The id of a term's definition on a page.   Raises KeyError for a word that is not a term."""
    TERMS[term]
    return "term-" + term.replace(" ", "-")
