# SPDX-License-Identifier: Apache-2.0
"""The pages of figures: rounding and budgets, certificates, and the errors of engines."""

from __future__ import annotations

from docs.bookmaker.case_pages import certificate_words
from docs.bookmaker.evidence import (
    Evidence,
    failures_at,
    title,
)
from docs.bookmaker.markdown import (
    code,
    link,
    listed,
    page,
    table,
    text,
)
from docs.bookmaker.step_pages import case_link, errors_table
from refmoe.profiles.cut_points import CUT_POINTS
from refmoe.profiles.load import BUDGETS, budget_in_words, policies, policy
from refmoe.spec.taps import LAYER_TAPS, MODEL_TAPS
from refmoe.suite.matrix.outcomes import POLICIES


def rounding_page() -> str:
    """Every cut point and budget under the generic policies, and the list of policies."""
    generic = [policy(name) for name in POLICIES]
    return page(
        "# What may round, and how far functions may be off",
        "A policy says which dtype an engine may round to at each cut point. A value may always be more precise. The "
        f"three generic policies are below; {link('policies', '/docs/policies.md')} says how to change one.",
        "## Cut points",
        table(
            ["cut point", "what is rounded", "shown by", *POLICIES],
            [
                [
                    code(name),
                    text(cut.about),
                    ", ".join(map(text, cut.shown_by)),
                    *(str(each.at(name)) for each in generic),
                ]
                for name, cut in CUT_POINTS.items()
            ],
        ),
        "## Budgets of functions",
        "Nothing but its author bounds the exp of an engine. So these are tolerances, in units of the roundoff of the "
        "dtype of statistics.",
        table(
            ["budget", *POLICIES, "source"],
            [
                [
                    each,
                    *(text(budget_in_words(getattr(p, each))) for p in generic),
                    text(getattr(generic[0], each).source),
                ]
                for each in BUDGETS
            ],
        ),
        "## All policies",
        table(
            ["policy", "whose arithmetic", "read from"],
            [[code(p.name), text(p.about), text(p.source)] for p in policies()],
        ),
    )


def certificates_page(every: Evidence) -> str:
    """The certificate of each case."""
    return page(
        "# How far goldens are from the real numbers",
        "A certificate is a proven bound on the distance between each golden value and the real number that it stands "
        "for. Arb computes it in ball arithmetic, from the same specification. "
        f"Command: {code('refmoe suite certify')}; code: {code('refmoe/suite/certify.py')}. The bounds of each tap are "
        f"in the manifest of the case ({link('format', '/golden/FORMAT.md#manifests')}).",
        table(
            ["case", "certificate", "its worst tap", "decisions that are not proven"],
            [
                [
                    case_link(every, case.name), certificate_words(certificate),
                    code(certificate["worst"]["tensor"]),  # type: ignore[index]
                    ", ".join(map(code, certificate["decisions"]["unproven"][:3]))  # type: ignore[index]
                    + (" …" if len(certificate["decisions"]["unproven"]) > 3 else ""),  # type: ignore[index]
                ]
                for case, certificate in every.certificates()
            ],
        ),
        "A decision that is not proven is an exact tie, made on purpose.",
    )  # fmt: skip


def engines_page(every: Evidence) -> str:
    """The worst error of each engine at each tap."""
    parts = []
    for tap in ("embedding", *LAYER_TAPS, "final_norm", "logits"):
        errors = errors_table(every, (tap,))
        parts += [f"## {tap}", errors or "No engine shows it, or it has no size of error."]
        parts.append(
            listed(
                f"First wrong here: {text(title(results))} at {outcome.dtype}, case {case_link(every, outcome.case)}: "
                f"{text(known.reason)}"
                for results, outcome, known in failures_at(every, (tap,))
            )
        )
    assert {*MODEL_TAPS} == {"embedding", "final_norm", "logits"}
    return page(
        "# Engines, step by step",
        "The worst error of each engine at each tap, over all cases in which it conforms. 1 is the largest error that "
        "its policy allows. An empty cell was not run, or does not show the tap. "
        f"{link('All verdicts', '/docs/measurements.md#real-engines')}; {link('findings', '/docs/findings.md')}. "
        f"The files are in {code('bench/results/conform')}.",
        *parts,
    )
