# SPDX-License-Identifier: Apache-2.0
"""The free-running rung: values without any bound are compared with the noise that the policy itself produces.

If the trace lacks the choice of experts and rounding alone can decide it, legal results form islands, one per choice.
Replicas of the policy show the distance between these islands. They round at random, and they draw an open choice the
more often, the likelier rounding is to decide it.

    z       the margin of a choice, in standard deviations of the margin, measured by replicas with fixed choices
    q(z)    the probability that rounding decides the choice the other way: the larger one of the normal tail and of
            exp(-2 z) / 2, which bounds the measured tail of sums
    rate    the share of the replicas that choose the other way: 1 / (2 log2(1 / q)), as a power of two from 1/8 to 1/2

The choices of an engine that differ are a set F of probability P, the product of their q. Their effects add up to at
most sum(d) <= sqrt(sum(1 / rate)) sqrt(sum(rate d^2)). The second root is at most the noise of the replicas. The first
is at most sqrt(2 log2(1 / P)), because 1 / rate <= 2 log2(1 / q). So sets of probability at least P stay within

    limit = sqrt(2 log2(1 / P))      times the noise, in the root mean square of a row.

Normal rounding errors of probability P stay within sqrt(2 ln(1 / P)), which is less. Another step than the router may
switch too, such as an attention with two equal scores. Replicas with fixed choices and larger rounding errors show it:
a row switches where its errors grow more than in proportion. It is held against the largest errors of these replicas.

All rows of a tap together are one mean. It is nearly a Gamma variable whose variance the replicas show, and Chernoff's
bound of a Gamma variable gives its limit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.arithmetic.formats import nearest, ulp
from refmoe.profiles.policy import Policy
from refmoe.spec.taps import step_of
from refmoe.traces.trace import Trace
from refmoe.verifier.findings import FAIL, FREE, PASS, UNDECIDABLE, Check, Element
from refmoe.verifier.passes import Key, Pass
from refmoe.verifier.routing import blur
from refmoe.verifier.subject import Findings, Subject
from refmoe.verifier.tally import LEAN, SNR, Limits

REPLICAS = 16
"""The number of replicas. A choice that an engine may make either way is drawn the other way by two or more of them."""
AMPLITUDES = (3.0, 6.0) * 12
"""The factors of the rounding errors of the replicas with fixed choices. They measure the margins, and find switches:
one of probability 1/50 escapes them, and the plain replicas, with probability 1e-4."""
GROWTH = 2.0
"""A row switches if its error in an amplified replica is this many times in proportion. Errors up to this times the
smallest factor, 6, are below the limit of a row, so that a switch that is not noticed does no harm."""
VALUE_GROWTH = 4.0
"""This factor for a single value, whose errors scatter more than those of a row."""
DOUBT = 3.0
"""A variance measured by `REPLICAS` draws is less than a third of the true one with probability 5e-4."""
MOST_VALUES = 4_000_000
"""The most values without bound that are tested. Each needs about 130 bytes of memory."""


@dataclass
class Choices:
    """The choices of a replica, per router tap."""

    ids: dict[Key, list[Any]] = field(default_factory=dict)
    """The chosen experts, integers [T, k], block by block."""
    margins: dict[Key, list[Any]] = field(default_factory=dict)
    """The distance between the last chosen and the best refused logit, [T], block by block."""

    def add(self, key: Key, ids: Any, margin: Any) -> None:
        """Record the choices of a block of tokens.   ids: integers [T, k]   margin: [T]"""
        self.ids.setdefault(key, []).append(ids)
        self.margins.setdefault(key, []).append(margin)


@dataclass(frozen=True)
class Draw:
    """The way a replica draws its rounding errors and its choices."""

    generator: np.random.Generator
    amplitude: float = 1.0
    """The factor of the rounding errors."""
    fixed: dict[Key, Any] | None = None
    """Per router tap the choices to make, integers [T, k]."""
    openness: Openness | None = None
    """The choices that rounding can decide; None: each is made as the sampled logits say."""
    number: int = 0
    """Of this replica, below `REPLICAS`."""


@dataclass(frozen=True)
class Openness:
    """The choices that rounding can decide, and the replicas that make each of them the other way."""

    spread: dict[Key, Any]
    """Per router tap the standard deviation of the margin of each token, [T]."""
    limit: float
    """The margin, in standard deviations, up to which a choice is open."""

    def turns(self, key: Key, token: int, z: float, number: int) -> bool:
        """Whether replica `number` makes a choice the other way. Exactly the share `rate` of the replicas does."""
        if z > self.limit:
            return False
        order = np.random.default_rng([*f"{key}/{token}".encode()]).permutation(REPLICAS)
        return bool(order[number % REPLICAS] < rate(z) * REPLICAS)


class Replica(Pass):
    """A run of the policy with random roundings, drawn by their variance. Without a draw nothing is rounded."""

    looks_beyond = True

    def __init__(self, trace: Trace, subject: Subject, policy: Policy, wanted: set[Key], draw: Draw | None) -> None:
        """wanted: the taps to keep"""
        super().__init__(trace, subject, policy, None)
        self.wanted, self.draw = wanted, draw
        self.kept: dict[Key, list[Any]] = {}
        self.choices = Choices()
        self.made = False
        self._compared: Any = None

    def arrays(self) -> dict[Key, Any]:
        """The wanted taps, [T, ...]. The run is made by the first call."""
        if not self.made:
            self.made = True
            with np.errstate(all="ignore"):
                self.go()
        return {key: np.concatenate(parts) for key, parts in self.kept.items()}

    def _tap(self, name: str, x: Any) -> Any:
        step, key = step_of(name), (self._run.run, name)
        if step == "router.experts":
            if name in self._present:
                return np.asarray(self._read(name, step)).astype(np.int64)
            return self._choose_experts(key, x)
        sampled = self._sample(x, step)
        values = np.asarray(self._read(name, step), np.float64) if name in self._present else sampled
        if step == "router.logits":
            # a router that compares logits before they are stored cannot be followed within that rounding
            unseen = name in self._present and self.policy.compared != "stored"
            half = ulp(values, self.policy.at(step)) / 2 if unseen else np.zeros_like(values)
            self._compared = values - half, values + half
        if key in self.wanted:
            self.kept.setdefault(key, []).append(sampled)
        return Enclosure(values, accumulation=self.policy.accumulation)

    def _sample(self, x: Enclosure, step: str) -> Any:
        if self.draw is None:
            return x.mid
        x = x.settle()
        noise = np.sqrt(np.broadcast_to(x.v, x.shape)) * self.draw.generator.standard_normal(x.shape)
        return nearest(x.mid + self.draw.amplitude * noise, self.policy.at(step))

    def _choose_experts(self, key: Key, chosen: Any) -> Any:
        """The choice of the sampled logits, or the other way where the draw says so.   chosen: integers [T, k]"""
        if chosen.shape[1] == self.subject.config.experts:
            return chosen
        if self.draw is not None and self.draw.fixed is not None:
            chosen = self.draw.fixed[key][self._start : self._start + len(chosen)]
        low, high = blur(self._compared[0], self._compared[1], self.policy)
        inside = np.zeros(low.shape, bool)
        np.put_along_axis(inside, chosen, True, axis=-1)
        last, best = np.where(inside, low, np.inf).min(-1), np.where(inside, -np.inf, high).max(-1)
        if self.draw is not None and self.draw.openness is not None:
            reach = Reach(inside=inside, low=low, high=high, last=last, best=best)
            chosen = self._turned(key, chosen, self.draw, reach)
        self.choices.add(key, chosen, last - best)
        return chosen

    def _turned(self, key: Key, chosen: Any, draw: Draw, reach: Reach) -> Any:
        """The choices, where those whose turn it is exchange an expert within reach for a refused one."""
        chosen, openness = np.array(chosen), draw.openness
        assert openness is not None
        spread = openness.spread[key][self._start : self._start + len(chosen)]
        for t, one in enumerate(spread):
            margin = in_spreads(reach.last[t] - reach.best[t], one)
            if openness.turns(key, self._start + t, margin, draw.number):
                out, into = reach.exchangeable(t, one * openness.limit)
                if out.size and into.size:  # logits that are NaN are not within reach of any other
                    chosen[t, chosen[t] == draw.generator.choice(out)] = draw.generator.choice(into)
        return chosen


@dataclass(frozen=True)
class Reach:
    """The logits of a block of tokens, and the ones that a choice may exchange."""

    inside: Any
    """Whether an expert is chosen, booleans [T, E]."""
    low: Any
    high: Any
    """The bounds that the router can tell apart, [T, E]."""
    last: Any
    """The lowest chosen logit, [T]."""
    best: Any
    """The highest refused logit, [T]."""

    def exchangeable(self, t: int, distance: float) -> tuple[Any, Any]:
        """The chosen experts of a token that may be refused, and the refused ones that may be chosen."""
        out = self.inside[t] & (self.low[t] <= max(self.best[t] + distance, self.last[t]))
        into = ~self.inside[t] & (self.high[t] >= min(self.last[t] - distance, self.best[t]))
        return np.flatnonzero(out), np.flatnonzero(into)


def in_spreads(margin: float, spread: float) -> float:
    """A margin in standard deviations, at least 0. A margin without spread is certain, unless it is 0."""
    if not margin > 0:
        return 0.0
    return float(margin / spread) if spread > 0 else math.inf


def other_way(z: float) -> float:
    """The probability that rounding decides a choice against a margin of `z` standard deviations."""
    normal, measured = math.erfc(z / math.sqrt(2)) / 2, math.exp(-2 * z) / 2
    return max(normal, measured)


def rate(z: float) -> float:
    """The share of the replicas that make a choice the other way."""
    wanted = 2 * math.log2(1 / max(other_way(z), 1e-300))
    return 0.5 ** min(max(math.floor(math.log2(wanted)), 1), 3)


@dataclass(frozen=True)
class Noise:
    """The values and the spread of the replicas at one tap. mid, square: [T, n]"""

    mid: Any
    """The values of the run without rounding."""
    square: Any
    """The mean square distance of the replicas from the run without rounding."""
    steadiness: float
    """The variance of the mean square of a replica, over the square of its mean."""


@dataclass
class Loud:
    """The square distances of the amplified replicas at one tap."""

    most: Any
    """The largest ones, [T, n]."""
    scaled: Any
    """The largest ones in proportion, so over the square of the amplitude, [T, n]."""
    rows: Any
    """The largest means of a row in proportion, [T, 1]."""

    def add(self, square: Any, amplitude: float) -> None:
        """Take in a replica.   square: [T, n]"""
        np.fmax(self.most, square, out=self.most)
        np.fmax(self.scaled, square / amplitude**2, out=self.scaled)
        np.fmax(self.rows, square.mean(-1, keepdims=True) / amplitude**2, out=self.rows)

    def switched(self, square: Any) -> Any:
        """The largest square distances where they are out of proportion to the plain ones, else 0.   square: [T, n]"""
        mean = square.mean(-1, keepdims=True)
        grown = (self.rows > GROWTH**2 * mean) | (self.scaled > VALUE_GROWTH**2 * np.maximum(square, mean))
        return np.where(grown, self.most, 0.0)


def replicate(trace: Trace, subject: Subject, policy: Policy, wanted: set[Key], limits: Limits) -> dict[Key, Noise]:
    """The noise at the wanted taps."""

    def drawn(draw: Draw | None) -> Replica:
        replica = Replica(trace, subject, policy, wanted, draw=draw)
        replica.arrays()
        return replica

    exact = drawn(None)
    centre = exact.arrays()
    fixed = {key: np.concatenate(parts) for key, parts in exact.choices.ids.items()}
    margins: dict[Key, list[Any]] = {key: [] for key in fixed}
    loud = {
        key: Loud(*(np.zeros((len(mid), size)) for size in (mid[0].size, mid[0].size, 1)))
        for key, mid in centre.items()
    }
    for number, amplitude in enumerate(AMPLITUDES):
        replica = drawn(Draw(np.random.default_rng([0, number]), amplitude=amplitude, fixed=fixed))
        for key, square in squares(replica, centre).items():
            loud[key].add(square, amplitude)
        for key, parts in replica.choices.margins.items():
            margins[key].append((np.concatenate(parts) - np.concatenate(exact.choices.margins[key])) / amplitude)
    openness = spreads(margins, limits)
    plain = {key: np.zeros((len(array), array[0].size)) for key, array in centre.items()}
    rows: dict[Key, list[Any]] = {key: [] for key in centre}
    for number in range(REPLICAS):
        replica = drawn(Draw(np.random.default_rng([1, number]), openness=openness, number=number))
        for key, square in squares(replica, centre).items():
            plain[key] += square / REPLICAS
            rows[key].append(square.mean(-1))
    found = {}
    with np.errstate(all="ignore"):
        for key, square in plain.items():
            usual = square.mean(-1)
            whole = (np.array(rows[key]) / np.where(usual > 0, usual, np.inf)).mean(-1)
            noise = np.maximum(square, loud[key].switched(square))
            found[key] = Noise(centre[key].reshape(square.shape), noise, float(whole.var(ddof=1)))
    return found


def squares(replica: Replica, centre: dict[Key, Any]) -> dict[Key, Any]:
    """The square distances of a replica from the run without rounding, [T, n]."""
    with np.errstate(all="ignore"):
        found = {key: (array - centre[key]) ** 2 for key, array in replica.arrays().items()}
    return {key: square.reshape(len(square), -1) for key, square in found.items()}


def spreads(margins: dict[Key, list[Any]], limits: Limits) -> Openness:
    """The spread of each margin.   margins: per router tap the changes of the margins in some replicas, [T] each"""
    spread, count = {}, 0
    with np.errstate(all="ignore"):
        for key, changes in margins.items():
            own = np.sqrt((np.array(changes) ** 2).mean(0))
            own = np.where(np.isfinite(own), own, np.inf)
            known = own[np.isfinite(own)]
            # a few draws may show too little, so the mean over the tokens is a lower limit
            spread[key] = np.maximum(own, np.sqrt((known**2).mean()) if known.size else 0.0)
            count += len(own)
    return Openness(spread, math.log(max(count, 1) / (2 * limits.part)) / 2)


def against_noise(
    checks: list[Check], findings: Findings, trace: Trace, subject: Subject, policy: Policy, limits: Limits
) -> list[Check]:
    """The checks, where unbounded values are judged by noise unless the check has already failed."""
    wanted = {
        (check.run, check.tap)
        for check in checks
        if check.rung == FREE and check.verdict != FAIL and findings.unbounded.get((check.run, check.tap))
    }
    held = sum(check.values for check in checks if (check.run, check.tap) in wanted)
    if not wanted or held > MOST_VALUES:
        return checks
    noise = replicate(trace, subject, policy, wanted, limits)
    return [
        _judge(check, noise[check.run, check.tap], findings, trace, policy, limits)
        if (check.run, check.tap) in noise
        else check
        for check in checks
    ]


def row_limit(limits: Limits, rows: int) -> float:
    """The largest root mean square of a row, in units of its noise."""
    return math.sqrt(2 * math.log2(rows / limits.part))


def whole_limit(limits: Limits, tests: int, steadiness: float) -> float:
    """The largest root mean square of all rows of a tap, in units of its noise; never above that of a row.

    A Gamma variable of mean 1 and shape k exceeds x with a probability of at most exp(-k (x - 1 - ln x)).
    """
    shape, wanted = 1 / max(DOUBT * steadiness, 1e-9), math.log(tests / limits.part)
    low, high = 1.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if shape * (middle - 1 - math.log(middle)) < wanted else (low, middle)
    return math.sqrt(high)


def _judge(check: Check, noise: Noise, findings: Findings, trace: Trace, policy: Policy, limits: Limits) -> Check:
    """The check with the verdict of a comparison with noise."""
    rows = np.array(sorted(findings.unbounded[check.run, check.tap]))
    found = np.asarray(trace.get(check.run, check.tap), np.float64).reshape(len(noise.mid), -1)
    mid, square = noise.mid, noise.square
    with np.errstate(all="ignore"):
        spacing = ulp(mid, policy.at(step_of(check.tap)))
        # the noise of one element over a few replicas may be far too small, so the mean of its row is a lower limit
        variance = np.maximum(square, square.mean(-1, keepdims=True)) + spacing**2 / 12
        usable = np.isfinite(variance) & np.isfinite(mid)
        error = found - mid
        distance = np.where(usable, np.maximum(np.abs(error) - spacing / 2, 0.0) / np.sqrt(variance), 0.0)
    here = np.zeros(found.shape, bool)
    here[rows] = True
    broken = here & usable & ~np.isfinite(found)
    counted = here & usable & ~broken
    # rounding errors of one value have the tail of `Limits.excess`, and choices add to them as they add to a row
    of_row = row_limit(limits, limits.values)
    limit = math.hypot(limits.excess, of_row)
    reasons = []
    if broken.any():
        reasons.append(f"{int(broken.sum())} of {check.values} values are not finite, and no replica's are")
    worst = np.unravel_index(int(np.argmax(np.where(here & ~broken, distance, -1.0))), found.shape)
    if distance[worst] > limit:
        reasons.append(f"a value is {distance[worst]:.4g} times the noise of the replicas away, limit {limit:.1f}")
    with np.errstate(all="ignore"):
        amount = np.maximum(counted.sum(-1), 1)
        sizes = np.sqrt(np.where(counted, error**2 / variance, 0.0).sum(-1) / amount)
        noises = np.sqrt(np.where(counted, variance, 0.0).sum(-1) / amount)
        signals = np.sqrt(np.where(counted, mid**2, 0.0).sum(-1) / amount)
    most = int(sizes.argmax())
    if sizes[most] > of_row:
        reasons.append(f"the errors of token {most} are {sizes[most]:.3g} times the noise, limit {of_row:.3g}")
    whole, of_whole = float(np.sqrt((sizes[rows] ** 2).mean())), whole_limit(limits, limits.tensors, noise.steadiness)
    if whole > of_whole:
        reasons.append(f"the errors of all tokens are {whole:.3g} times the noise, limit {of_whole:.3g}")
    reasons += resemblances(found, mid, variance, usable & np.isfinite(found))
    if reasons:
        token, column = (int(i) for i in worst)
        element = Element(
            where=(token, column),
            found=float(found[worst]),
            expected=float(mid[worst]),
            low=float("-inf"),
            high=float("inf"),
            sigma=float(math.sqrt(variance[worst])),
        )
        return replace(check, verdict=FAIL, reason="; ".join(reasons), worst=element)
    # a row counts as tested if it would fail were it zero
    able = noises * of_row < signals
    tested = int((counted & able[:, None]).sum())
    left = check.undecided - min(tested, check.undecided)
    reason = (
        f"{tested} of {check.values} values were held only against the noise of {REPLICAS} replicas: experts are not "
        "in the trace, and rounding decides them"
    )
    if able.any():
        share = noises[able] * of_row / signals[able]
        reason += f"; a row fails from {share.min():.0%} to {share.max():.0%} of its size"
    if left:
        reason += f"; {left} cannot fail"
    return replace(check, verdict=UNDECIDABLE if 2 * left > check.values else PASS, reason=reason, undecided=left)


def resemblances(found: Any, mid: Any, variance: Any, usable: Any) -> list[str]:
    """Sentences about the simple faults that the values resemble.

    found, mid, variance: [T, n]   usable: booleans [T, n]
    Each fault is a matched filter: zeros, equal rows, or the rows of another token. Right values give 0, the fault 1.
    """
    others = {"zero": np.zeros_like(mid), "one and the same row": np.broadcast_to(mid.mean(0), mid.shape)}
    if len(mid) > 1:
        others["the token before"] = np.roll(mid, 1, axis=0)
        others["the token after"] = np.roll(mid, -1, axis=0)
    said = []
    for name, other in others.items():
        with np.errstate(all="ignore"):
            delta = np.where(usable, other - mid, 0.0)
            error = np.where(usable, found - mid, 0.0)
            weight = np.where(usable, 1 / variance, 0.0)
            reach = float((delta**2 * weight).sum())
            lean = float((error * delta * weight).sum()) / reach if reach > 0 else 0.0
        if math.sqrt(reach) > SNR and lean > LEAN:
            said.append(f"the values lean to {name} ({lean:.2f}, where right ones give 0)")
    return said
