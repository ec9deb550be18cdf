# SPDX-License-Identifier: Apache-2.0
"""The legal intervals of an engine that runs freely from the tokens: one for each value of a case.

A pack has no values of the engine. So no step is recomputed from the engine's own inputs, and the errors of all steps
add up. Enclosures carry them through the whole model, from the tokens on. The interval of a value is then the smaller
one of two:

    proven      mid +- radius: no order of operations leaves it
    improbable  mid +- (bias + DEVIATIONS * sigma): a healthy engine leaves it with a probability below `SIGNIFICANCE`,
                over all values of a pack together

Its ends are rounded to the dtype of the value, and contain the unrounded ends: more precision is always legal.

Where rounding can decide a choice of experts, the values that depend on it are not judged. The choice itself is: some
experts must be chosen, some may be, and all others must not.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from refmoe.arithmetic.enclosure.array import OWN, Enclosure
from refmoe.arithmetic.formats import Format, nearest
from refmoe.profiles.load import policy as named_policy
from refmoe.profiles.policy import Policy
from refmoe.spec.taps import layer_of, step_of
from refmoe.suite.case import Case
from refmoe.suite.free_pass import FreePass
from refmoe.verifier.passes import Key
from refmoe.verifier.routing import blur, sharper
from refmoe.verifier.segments import SIGNIFICANCE
from refmoe.verifier.subject import Subject, shape_of
from refmoe.verifier.tally import Limits

DTYPES = ("float32", "bfloat16", "float16")
"""The dtypes that a pack judges, in the order of its arrays."""
MOST_VALUES = 1 << 24
"""No pack has more values in a dtype."""
LIMITS = Limits(SIGNIFICANCE, values=MOST_VALUES, tensors=1)
DEVIATIONS = LIMITS.excess
"""The standard deviations beyond which a value is improbable."""
SLOTTED = ("router.weights", "expert.gate", "expert.up", "expert.hidden", "expert.output")
"""The taps whose second axis is the slots of the chosen experts."""
NO, MAY, MUST = 0, 1, 2
"""Of an expert: it must not be chosen for a token, it may be, it must be."""


@dataclass
class Legal:
    """The legal values and choices of a case at a dtype."""

    low: dict[Key, Any] = field(default_factory=dict)
    """Per run and tap the lower ends, in the shape of the tap; NaN where a value is not judged."""
    high: dict[Key, Any] = field(default_factory=dict)
    """The upper ends, in the same form."""
    experts: dict[Key, Any] = field(default_factory=dict)
    """Per run and router tap, integers [T, E]: `NO`, `MAY` or `MUST` for each expert."""


def rules(dtype: str) -> Policy:
    """The policy of any engine in a dtype. A router may compare logits, or probabilities that rounding makes equal."""
    return replace(named_policy(dtype), router_order="softmax-then-top-k")


def legal(case: Case, dtype: str) -> Legal:
    """The legal values and choices of a case at a dtype of `DTYPES`. Slots are in ascending order of expert ids."""
    subject = Subject(case.config, case.checkpoint().parameters, case.runs())
    return FreeRun(subject, rules(dtype)).result()


class FreeRun(FreePass):
    """A pass that reads no value of any engine, and keeps what is legal at each tap.

    It follows one choice of experts. A token is open from the step on where rounding can decide another one. So is a
    token that attends to keys and values of an open one. What an open token holds is not judged.
    """

    def __init__(self, subject: Subject, policy: Policy) -> None:
        super().__init__(subject, policy, LIMITS)
        self.legal = Legal()
        self._open: Any = None  # of the tokens of the block, booleans [T]
        self._cached: dict[tuple[int, int | None], Any] = {}  # per sequence and layer, booleans [S]
        self._order: Any = None  # of the slots of each token, by ids: integers [T, k]

    def result(self) -> Legal:
        """The legal values and choices. The pass is made by the call."""
        self.go()
        return self.legal

    def _tap(self, name: str, x: Any) -> Any:
        step = step_of(name)
        if step == "embedding":
            self._open = np.zeros(self._tokens, bool)
        elif step == "attention.k":
            cached = self._cached.get((self._run.sequence, layer_of(name)), self._open[:0])
            whole = np.concatenate([cached[: self._run.past + self._start], self._open])
            self._cached[self._run.sequence, layer_of(name)] = whole
        if step == "attention.scores":
            # masked scores are never read, so an engine may leave anything there
            reach = self._visible()
            self._keep(name, step, x, ~reach | self._open_keys(name))
        elif step == "attention.probs":
            reach = self._visible()
            self._open = (reach & self._open_keys(name)).any(-1)
            self._keep(name, step, x, reach & self._open[:, None])
        elif step != "router.experts":
            self._keep(name, step, x, self._open.reshape(-1, *[1] * (len(x.shape) - 1)))
        return super()._tap(name, x)

    def _open_keys(self, name: str) -> Any:
        """Whether a query or a key is open, booleans [T, S]."""
        return self._open[:, None] | self._cached[self._run.sequence, layer_of(name)]

    def _keep(self, name: str, step: str, x: Enclosure, hidden: Any) -> None:
        """Keep what is legal at a tap.   x: before the rounding of the tap   hidden: values that are not judged"""
        low, high = ends(x, self.policy.at(step), bool(self.ops.events))
        low, high = (np.where(hidden, np.nan, each) for each in (low, high))
        if step in SLOTTED:
            order = self._order.reshape(*self._order.shape, *[1] * (low.ndim - 2))
            low, high = (np.take_along_axis(each, order, axis=1) for each in (low, high))
        at: Any = slice(self._start, self._start + self._tokens)
        if step in ("attention.scores", "attention.probs"):
            at = (slice(None), at, slice(0, low.shape[-1]))
        for kept, end in ((self.legal.low, low), (self.legal.high, high)):
            self._room(kept, name, step)[at] = end

    def _room(self, kept: dict[Key, Any], name: str, step: str) -> Any:
        """The array of a tap. Keys after a block have no score and the probability 0."""
        key = (self._run.run, name)
        if key not in kept:
            empty = np.nan if step == "attention.scores" else 0.0
            kept[key] = np.full(shape_of(name, self.subject.config, self._run), empty)
        return kept[key]

    def _choose(self, name: str, expected: Any) -> Any:
        assert self._logits is not None
        config = self.subject.config
        states, logits = choices(self._logits[0], config.experts_per_token, self.policy), self._logits[0].settle()
        unknown = self._open
        if self.ops.events:  # an earlier step may have overflowed
            unknown = unknown | ~np.isfinite(np.broadcast_to(logits.r, logits.shape)).all(-1)
        states = np.where(unknown[:, None] & (config.experts_per_token < config.experts), MAY, states)
        kept = self.legal.experts.setdefault(
            (self._run.run, name), np.zeros((len(self._run.tokens), config.experts), np.uint8)
        )
        kept[self._start : self._start + self._tokens] = states
        chosen = super()._choose(name, expected)
        self._unknown = None  # it makes bounds of other tokens infinite, which `_open` does not
        self._open = self._open | (states == MAY).any(-1)
        self._order = np.argsort(chosen, axis=-1, kind="stable")
        return chosen


def ends(x: Enclosure, format: Format, overflows: bool) -> tuple[Any, Any]:
    """The ends of the legal intervals; NaN where nothing bounds a value, or it may be infinite.

    x: the enclosure before its last rounding   format: of that rounding
    overflows: whether an earlier step may have overflowed, so that a value without a proven bound may be anything
    """
    before = x if x.biased or (x.owed and format == x.accumulation) else x.settle()
    m = before.mid
    r, v = (np.broadcast_to(np.asarray(each, np.float64), m.shape) for each in (before.r, before.v))
    bias = np.broadcast_to(x.bias, m.shape) if x.biased else 0.0
    known = np.isfinite(v) & ((v > 0) | (r == 0))
    improbable = np.where(known, bias + DEVIATIONS * np.sqrt(v + (OWN * m) ** 2), np.inf)
    half = np.fmin(np.where(np.isnan(r), np.inf, r), improbable)
    half = half + np.where(half > 0, OWN * np.abs(m), 0.0)  # the ends are computed in binary64 themselves
    low, high = m - half, m + half
    low, high = np.fmin(low, nearest(low, format)), np.fmax(high, nearest(high, format))
    judged = np.isfinite(low) & np.isfinite(high) & (np.isfinite(r) | (not overflows))
    return np.where(judged, low, np.nan), np.where(judged, high, np.nan)


def choices(x: Enclosure, k: int, policy: Policy) -> Any:
    """`NO`, `MAY` or `MUST` for each expert.   x: the logits before they are stored, [T, E]   returns: [T, E]"""
    stored = sharper(x.settle(), DEVIATIONS).cut(policy.at("router.logits"))
    low, high = stored.mid - stored.r, stored.mid + stored.r
    bounded = np.isfinite(low + high).all(-1)
    low, high = blur(np.nan_to_num(low), np.nan_to_num(high), policy)
    others = ~np.eye(low.shape[-1], dtype=bool)
    rivals = ((high[:, None, :] >= low[:, :, None]) & others).sum(-1)  # those that may come before it
    ahead = ((low[:, None, :] > high[:, :, None]) & others).sum(-1)  # those that must come before it
    states = np.where(rivals < k, MUST, np.where(ahead >= k, NO, MAY))
    return np.where(bounded[:, None] | (k == low.shape[-1]), states, MAY)
