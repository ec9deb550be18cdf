# SPDX-License-Identifier: Apache-2.0
"""The free-running rung: values without any bound are compared with the noise that the policy itself produces.

If the trace lacks the choice of experts and rounding alone can decide it, legal results form islands, one per choice.
Replicas of the policy, with random roundings and random open choices, show the distance between these islands.
This test is much weaker than the others, and the report says so. It still fails an engine that computes nothing, or
the values of another token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.arithmetic.formats import nearest, ulp
from refmoe.profiles.policy import Policy
from refmoe.spec.taps import step_of
from refmoe.traces.trace import Trace
from refmoe.verifier.findings import FAIL, FREE, PASS, UNDECIDABLE, Check, Element
from refmoe.verifier.passes import Key, Pass
from refmoe.verifier.subject import Findings, Subject
from refmoe.verifier.tally import LEAN, SNR, Limits

REPLICAS = 12
"""The number of replicas with random roundings."""
MOST_VALUES = 4_000_000
"""The most values without bound that are tested. Each needs about 130 bytes of memory."""


class Replica(Pass):
    """A run of the policy with random roundings, drawn by their variance. Without a generator nothing is rounded."""

    def __init__(
        self,
        trace: Trace,
        subject: Subject,
        policy: Policy,
        open_choices: dict[Key, set[int]],
        wanted: set[Key],
        generator: np.random.Generator | None,
    ) -> None:
        """open_choices: per router tap, the tokens whose last expert is drawn   wanted: the taps to keep"""
        super().__init__(trace, subject, policy, 0.0)
        self.open_choices, self.wanted, self.generator = open_choices, wanted, generator
        self.kept: dict[Key, list[Any]] = {}
        self._sampled_logits: Any = None

    def arrays(self) -> dict[Key, Any]:
        """The wanted taps, [T, ...]."""
        self.go()
        return {key: np.concatenate(parts) for key, parts in self.kept.items()}

    def _tap(self, name: str, x: Any) -> Any:
        step, key = step_of(name), (self._run.run, name)
        if step == "router.experts":
            if name in self._present:
                return np.asarray(self._read(name, step)).astype(np.int64)
            return self._draw(key, x)
        sampled = self._sample(x, step)
        if step == "router.logits":
            self._sampled_logits = sampled
        if key in self.wanted:
            self.kept.setdefault(key, []).append(sampled)
        values = np.asarray(self._read(name, step), np.float64) if name in self._present else sampled
        return Enclosure(values, accumulation=self.policy.accumulation)

    def _sample(self, x: Enclosure, step: str) -> Any:
        if self.generator is None:
            return x.mid
        x = x.settle()
        noise = np.sqrt(np.broadcast_to(x.v, x.shape)) * self.generator.standard_normal(x.shape)
        return nearest(x.mid + noise, self.policy.at(step))

    def _draw(self, key: Key, chosen: Any) -> Any:
        """The choice of the sampled logits. Where rounding alone can decide, either way is drawn with equal chance."""
        if self.generator is None or chosen.shape[1] == self._sampled_logits.shape[1]:
            return chosen
        rest = np.array(self._sampled_logits)
        last = np.take_along_axis(rest, chosen[:, -1:], axis=-1)[:, 0]
        np.put_along_axis(rest, chosen, -np.inf, axis=-1)
        tokens = {t - self._start for t in self.open_choices.get(key, ())} & {*range(len(chosen))}
        if self.policy.ties == "any":
            # equal rows of the router matrix give equal logits, however they are sampled
            tokens |= {int(t) for t in np.flatnonzero(last == rest.max(-1))}
        chosen = np.array(chosen)
        for token in sorted(tokens):
            if self.generator.integers(2):
                chosen[token, -1] = int(rest[token].argmax())
        return chosen


@dataclass(frozen=True)
class Noise:
    """The values and the spread of the replicas at one tap. mid, square: [T, ...]"""

    mid: Any
    """The values of the run without rounding."""
    square: Any
    """The mean square distance of the replicas from the run without rounding."""
    choices: int
    """The number of choices that are drawn in one run."""


def replicate(trace: Trace, subject: Subject, policy: Policy, findings: Findings, wanted: set[Key]) -> dict[Key, Noise]:
    """The noise at the wanted taps, from `REPLICAS` replicas."""
    choices = findings.open_choices
    centre = Replica(trace, subject, policy, open_choices=choices, wanted=wanted, generator=None).arrays()
    squares = {key: np.zeros(array.shape) for key, array in centre.items()}
    for seed in range(REPLICAS):
        drawn = Replica(
            trace, subject, policy, open_choices=choices, wanted=wanted, generator=np.random.default_rng(seed)
        ).arrays()
        with np.errstate(all="ignore"):
            for key, array in drawn.items():
                array -= centre[key]
                array *= array
                squares[key] += array / REPLICAS
    count = sum(map(len, choices.values()))
    return {key: Noise(centre[key], squares[key], count) for key in centre}


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
    noise = replicate(trace, subject, policy, findings, wanted)
    return [
        _judge(check, noise[check.run, check.tap], findings, trace, policy, limits)
        if (check.run, check.tap) in noise
        else check
        for check in checks
    ]


def _judge(check: Check, noise: Noise, findings: Findings, trace: Trace, policy: Policy, limits: Limits) -> Check:
    """The check with the verdict of a comparison with noise."""
    rows = np.array(sorted(findings.unbounded[check.run, check.tap]))
    found = np.asarray(trace.get(check.run, check.tap), np.float64).reshape(len(noise.mid), -1)
    mid, square = noise.mid.reshape(found.shape), noise.square.reshape(found.shape)
    with np.errstate(all="ignore"):
        spacing = ulp(mid, policy.at(step_of(check.tap)))
        # the noise of one element over 12 replicas may be far too small, so the mean of its row is a lower limit
        variance = np.maximum(square, square.mean(-1, keepdims=True)) + spacing**2 / 12
        usable = np.isfinite(variance) & np.isfinite(mid)
        error = found - mid
        distance = np.where(usable, np.maximum(np.abs(error) - spacing / 2, 0.0) / np.sqrt(variance), 0.0)
    here = np.zeros(found.shape, bool)
    here[rows] = True
    # n choices, each drawn either way, lie at most sqrt(2 n) standard deviations from the run without rounding
    limit = limits.excess + math.sqrt(2 * noise.choices)
    broken = here & usable & ~np.isfinite(found)
    decided = int((here & usable).sum())
    reasons = []
    if broken.any():
        reasons.append(f"{int(broken.sum())} of {check.values} values are not finite, and no replica's are")
    worst = np.unravel_index(int(np.argmax(np.where(here & ~broken, distance, -1.0))), found.shape)
    if distance[worst] > limit:
        reasons.append(
            f"a value is {distance[worst]:.4g} times the noise of {REPLICAS} replicas away, limit {limit:.1f}"
        )
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
    left = check.undecided - min(decided, check.undecided)
    size = math.sqrt(float(variance[here & usable].mean())) if decided else float("nan")
    signal = math.sqrt(float((mid[here & usable] ** 2).mean())) if decided else float("nan")
    verdict = UNDECIDABLE if 2 * left > check.values else PASS
    reason = (
        f"{decided} of {check.values} values were held only against the noise of {REPLICAS} replicas, which is "
        f"{size / signal if signal else math.inf:.2g} of their size: experts are not in the trace, and rounding "
        "decides them"
    )
    return replace(check, verdict=verdict, reason=reason, undecided=left)


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
