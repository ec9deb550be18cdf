# SPDX-License-Identifier: Apache-2.0
"""The message of a failed assertion: that of `torch.testing.assert_close`, and what refmoe knows beyond it."""

from __future__ import annotations

import numpy as np

from refmoe.testing.explanation import Explanation, Failure
from refmoe.verifier.findings import UNDECIDABLE

UNSEEN = 6
"""The most mistakes that a message lists as not visible."""


def message_of(failure: Failure, seen: Explanation | None) -> str:
    """The message.   seen: what the search for the cause found; None where there was none"""
    output, check = failure.output, failure.check
    if check.verdict == UNDECIDABLE:
        return f"{output.what}: cannot judge under {failure.policy.name}: {check.reason}"
    lines = [f"{output.what}: not legal under {failure.policy.name}", "", *_figures(failure), *_worst(failure)]
    lines.append(f"Tests that fail: {check.reason}")
    if seen is not None:
        lines += ["", *_explained(seen), *_sight(failure, seen)]
    return "\n".join(lines)


def _figures(failure: Failure) -> list[str]:
    """The lines that `torch.testing` has too."""
    wrong, found, mid = failure.wrong, failure.found, failure.right.mid
    count, size = int(wrong.sum()), wrong.size
    lines = [f"Mismatched elements: {count} / {size} ({100 * count / size:.1f}%)"]
    with np.errstate(all="ignore"):
        error = np.abs(found - mid)
        error = np.where(np.isnan(error), np.inf, error) * np.isfinite(mid) if np.isfinite(mid).any() else error
        at = np.unravel_index(int(np.nanargmax(np.where(np.isfinite(mid), error, -1.0))), error.shape)
        share = error / np.abs(mid)
        most = np.unravel_index(int(np.argmax(np.where(np.isfinite(share), share, -1.0))), share.shape)
    place, other = (failure.output.where(tuple(int(i) for i in each)) for each in (at, most))
    lines.append(f"Greatest absolute difference: {error[at]:.6g} at {place} (up to {failure.room[at]:.3g} is legal)")
    if np.isfinite(share[most]):
        lines.append(f"Greatest relative difference: {share[most]:.6g} at {other}")
    return lines


def _worst(failure: Failure) -> list[str]:
    """The worst element."""
    worst = failure.check.worst
    if worst is None:
        return []
    sigmas = abs(worst.found - worst.expected) / worst.sigma if worst.sigma > 0 else float("inf")
    return [
        f"Worst element: {failure.output.where(worst.where)}",
        f"    found {worst.found:.9g}, legal {worst.low:.9g} to {worst.high:.9g}, exact {worst.expected:.9g}",
        f"    {sigmas:.4g} standard deviations from the exact value, one is {worst.sigma:.3g}",
    ]


def _explained(seen: Explanation) -> list[str]:
    """The mistakes that explain the failure."""
    if not seen.names:
        size = f"; the errors have the size of arithmetic in {seen.size}" if seen.size else ""
        return [f"Explained by: nothing that refmoe knows ({seen.tried} mistakes tried){size}"]
    if len(seen.names) == 1:
        return [f"Explained by: {seen.names[0]}"]
    return ["Explained by one of these, which the arrays cannot tell apart:", *(f"    {name}" for name in seen.names)]


def _sight(failure: Failure, seen: Explanation) -> list[str]:
    """The errors that the check sees on these arrays, and the mistakes that it does not see."""
    with np.errstate(all="ignore"):
        share = failure.room / np.abs(failure.right.mid)
    known = share[np.isfinite(share)]
    lines = []
    if known.size:
        lines.append(f"This check sees: an error of {known.min():.2g} of a value, or more, where it sees most")
    if seen.tried:
        lines.append(
            f"    {seen.tried - len(seen.unseen)} of the {seen.tried} mistakes tried would show in these arrays"
        )
    if seen.unseen:
        more = f", and {len(seen.unseen) - UNSEEN} more" if len(seen.unseen) > UNSEEN else ""
        lines.append(f"It does not see: {'; '.join(seen.unseen[:UNSEEN])}{more}")
    return lines
