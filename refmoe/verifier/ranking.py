# SPDX-License-Identifier: Apache-2.0
"""Listed log-probabilities: the entries that an engine lists must be the largest ones.

Each listed value is judged like any other. Nothing in a value says that a larger one was left out. So the list is
judged by itself: it must be the top n of log-probabilities that the policy can produce.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.arithmetic.enclosure.functions import log_softmax_apart
from refmoe.arithmetic.formats import ulp
from refmoe.profiles.policy import Policy
from refmoe.spec.taps import LOGPROBS
from refmoe.verifier.findings import FAIL, PASS, UNDECIDABLE, Check
from refmoe.verifier.routing import sharper

NAMED = 3
"""The most entries that a sentence lists."""


@dataclass(frozen=True)
class Swap:
    """An entry that is listed for a token, although a larger one is not."""

    token: int
    listed: int
    left_out: int
    """The largest entry that is not listed."""


@dataclass
class Ranking:
    """The lists of some tokens."""

    tokens: int = 0
    undecided: int = 0
    """The number of tokens whose list nothing can refute."""
    invalid: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    """The tokens whose ids are out of range or repeated, and the first of these ids."""
    swaps: list[Swap] = field(default_factory=list)

    def add(self, other: Ranking) -> None:
        """Take in the lists of more tokens."""
        self.tokens += other.tokens
        self.undecided += other.undecided
        self.invalid += other.invalid
        self.swaps += other.swaps

    def judged(self, check: Check) -> Check:
        """The check with its verdict.   check: one without verdict"""
        check = replace(check, values=self.tokens, undecided=self.undecided)
        if self.invalid:
            token, ids = self.invalid[0]
            reason = (
                f"{len(self.invalid)} of {self.tokens} tokens list no different entries of the vocabulary: token "
                f"{token} lists {', '.join(map(str, ids[:NAMED]))}"
            )
            return replace(check, verdict=FAIL, reason=reason, outside=len(self.invalid))
        if self.swaps:
            swap = self.swaps[0]
            reason = (
                f"{len(self.swaps)} of {self.tokens} tokens list others than the largest entries: token {swap.token} "
                f"lists entry {swap.listed} and leaves out entry {swap.left_out}, which is larger"
            )
            return replace(check, verdict=FAIL, reason=reason, outside=len(self.swaps))
        if 2 * self.undecided > self.tokens or not self.tokens:
            reason = f"{self.undecided} of {self.tokens} lists have no bound"
            return replace(check, verdict=UNDECIDABLE, reason=reason)
        return replace(check, verdict=PASS, reason="each list is a top n of legal log-probabilities")


def wrong_ids(ids: Any, vocab: int) -> Any:
    """Whether the ids of a token are out of range or repeated. ids: integers [T, n]   returns: booleans [T]"""
    ordered = np.sort(ids, axis=-1)
    return (ordered[:, 0] < 0) | (ordered[:, -1] >= vocab) | (np.diff(ordered, axis=-1) <= 0).any(-1)


def judge(logits: Enclosure, mid: Any, ids: Any, policy: Policy, spreads: float, start: int) -> Ranking:
    """Judge the lists of some tokens.

    logits: as the log-softmax reads them, [T, V]   mid: their log-softmax, [T, V]   ids: integers [T, n]
    spreads: standard deviations that count as certain where they are less than the radius
    start: the position of the first token in its run

    The sum of exponentials is common to a row and exchanges nothing. What remains are the errors of each logit, of its
    own log-probability, and of the dtypes that this is computed and stored in.
    """
    wrong = wrong_ids(ids, mid.shape[-1])
    invalid = [(start + int(t), tuple(int(i) for i in ids[t])) for t in np.flatnonzero(wrong)]
    x = sharper(logits.settle(), spreads)
    error = log_softmax_apart(x, mid, policy) + policy.statistics.u * np.abs(mid)
    error = error + ulp(np.abs(mid) + error, policy.at(LOGPROBS)) / 2 + x.r
    known = np.isfinite(mid) & np.isfinite(error)
    low, high = np.where(known, mid - error, -np.inf), np.where(known, mid + error, np.inf)
    listed = np.zeros(mid.shape, bool)
    np.put_along_axis(listed, np.where(wrong[:, None], 0, ids), True, axis=-1)
    least, largest = np.where(listed, high, np.inf), np.where(listed, -np.inf, low)
    swapped = ~wrong & (least.min(-1) < largest.max(-1))
    whole = listed.all(-1)
    return Ranking(
        tokens=len(ids),
        undecided=int((~wrong & ~swapped & ~whole & ~known.any(-1)).sum()),
        invalid=invalid,
        swaps=[
            Swap(token=start + int(t), listed=int(least[t].argmin()), left_out=int(largest[t].argmax()))
            for t in np.flatnonzero(swapped)
        ],
    )
