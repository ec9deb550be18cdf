# SPDX-License-Identifier: Apache-2.0
"""A fault of one step as a hypothesis, the search for faults that explain a failed step, and the proof of one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from refmoe.arithmetic.enclosure.array import OWN, Enclosure
from refmoe.arithmetic.formats import OF_DTYPE, Format, cell, nearest, representable, ulp
from refmoe.spec.taps import LAYER_TAPS, MODEL_TAPS, layer_of
from refmoe.verifier.diagnosis.evidence import Evidence
from refmoe.verifier.diagnosis.grammar.evenness import Share, uneven
from refmoe.verifier.diagnosis.grammar.laboratory import Laboratory, only_where, spread
from refmoe.verifier.diagnosis.grammar.where import Rows, Where, describe
from refmoe.verifier.findings import FAIL, PASS
from refmoe.verifier.passes import Key
from refmoe.verifier.values import pair

CLOSE = 0.3
"""The largest residual with which a hypothesis is worth a proof."""
ENOUGH = 24.0
"""The least evidence for a name, in bits beyond its description. By chance one of 2^24 wrong ones comes as close."""
SPARE = 1.0
"""The bits by which a description may be longer than the shortest, and is still told."""
MOST_PER_VALUE = 20.0
"""The most evidence that one value counts for, in bits."""
MOST_TRIED = 4000
"""The most hypotheses of one step whose effect is computed."""
MOST_REFUTED = 60
"""The most proofs of one step that may fail before its search ends."""
AXES = {
    "T": "token", "H": "head", "K": "key/value head", "E": "expert", "k": "slot", "S": "cached position",
    "F": "hidden unit", "D": "channel", "d": "channel", "V": "vocabulary item", "R": "row", "C": "column",
}  # fmt: skip
"""The noun for one index along a dimension."""

Predict = Callable[[Laboratory, Key], Enclosure | None]


@dataclass(frozen=True)
class Fault:
    """A fault of a step."""

    name: str
    about: str
    fix: str
    bits: float
    """The free choices in it: the length of its description. Of two that explain as much, the shorter is named."""
    predict: Predict
    """The enclosure of a tap of the step under the fault, before its last rounding. None where it cannot act."""


@dataclass(frozen=True)
class Proof:
    """A fault with the rows that it acts in, under which every check of the step passes."""

    fault: Fault
    where: Where
    values: int
    """The number of wrong values that it accounts for."""
    evidence: float
    """In bits: how unlikely it is that a wrong hypothesis comes as close."""
    coefficient: float
    residual: float

    @property
    def bits(self) -> float:
        return self.fault.bits + self.where.bits


class Search:
    """A failed step: its checks, its right and wrong values, and the test of hypotheses about it."""

    def __init__(self, evidence: Evidence, step: str) -> None:
        self.evidence, self.step = evidence, step
        self.lab = Laboratory(evidence)
        self.labs = [self.lab]
        if evidence.policy.consumers == "unrounded":
            self.labs.append(Laboratory(evidence, unrounded=True))
        checks = [check for check in evidence.report.checks if check.step == step and check.verdict in (PASS, FAIL)]
        self.keys: list[Key] = [(check.run, check.tap) for check in checks]
        self.failed: list[Key] = [(check.run, check.tap) for check in checks if check.verdict == FAIL]
        self.dims = (LAYER_TAPS | MODEL_TAPS)[step].split()
        self.format: Format = evidence.policy.at(step)
        self.coarse: Format = max(self.format, evidence.policy.storage, key=lambda format: format.u)
        """The dtype of what the step reads or writes, the coarser of the two."""
        self.u = self.coarse.u
        self.rough = Laboratory(evidence, roughly=True)
        self.least = math.inf
        """The length of the shortest description that is proven so far, in bits. Longer ones are not tried."""
        self._right: dict[tuple[int, Key], Any] = {}
        self._errors: dict[Key, tuple[Any, float]] = {}

    @cached_property
    def usable(self) -> bool:
        """Whether all values of the failed taps are numbers, right and found, and not too large to be squared."""
        for key in self.failed:
            if key[1].endswith("router.experts"):
                return False
            sizes = [np.abs(each).max(initial=0.0) for each in (self.lab.found(key), self.lab.right(key).mid)]
            if not all(size < 1e100 for size in sizes):
                return False
        return bool(self.failed)

    # ---- the rows that are wrong

    def units(self, key: Key, values: Any) -> Any:
        """Whether all values of a row hold, for each row of a tap.   values: booleans of the tap's shape

        returns: booleans [T k] for steps with slots, else [T]
        """
        if self.dims[0] == "H":
            return values.all((0, 2))
        if self.dims[:2] == ["T", "k"]:
            return values.reshape(*values.shape[:2], -1).all(-1).reshape(-1)
        return values.reshape(len(values), -1).all(-1)

    def over_rows(self, key: Key, units: Any) -> Any:
        """Booleans of rows in a shape that broadcasts to the tap."""
        if self.dims[0] == "H":
            return units[None, :, None]
        if self.dims[:2] == ["T", "k"]:
            shape = self.lab.found(key).shape
            return units.reshape(*shape[:2], *[1] * (len(shape) - 2))
        return units.reshape(-1, *[1] * (self.lab.found(key).ndim - 1))

    def right_rows(self, key: Key, lab: Laboratory) -> Any:
        """Which rows are legal without any fault."""
        at = (self.labs.index(lab), key)
        if at not in self._right:
            self._right[at] = self.units(key, self.fits(lab, key, lab.right(key)))
        return self._right[at]

    def wrong_tokens(self, key: Key) -> Any:
        """Which tokens of a call have a wrong value: booleans [T]. All of them, if no single value is impossible."""
        wrong = ~self.right_rows(key, self.lab)
        if self.dims[:2] == ["T", "k"]:
            wrong = wrong.reshape(self.lab.found(key).shape[0], -1).any(1)
        return wrong if wrong.any() else np.ones(len(wrong), bool)

    @cached_property
    def rows(self) -> Rows:
        """The attributes of all rows of the step."""
        runs = list(self.lab.runs.values())
        parts: list[tuple[Any, ...]] = []
        for name, tap in self.keys:
            i = next(i for i, run in enumerate(runs) if run.run == name)
            run, layer = runs[i], layer_of(tap)
            tokens: Any = np.arange(len(run.tokens))
            expert: Any = np.full(len(tokens), -1)
            slot: Any = np.zeros(len(tokens), int)
            if self.dims[:2] == ["T", "k"]:
                chosen = self.lab.read((name, f"layers.{layer}.router.experts"))
                k = chosen.shape[1]
                expert, slot, tokens = chosen.reshape(-1), np.tile(np.arange(k), len(tokens)), np.repeat(tokens, k)
            facts = (i, run.op, run.sequence, len(run.tokens), run.past, -1 if layer is None else layer)
            parts.append((*(np.full(len(tokens), fact) for fact in facts), tokens, expert, slot))
        names = ("run", "op", "sequence", "length", "past", "layer", "token", "expert", "slot")
        joined = {name: np.concatenate(column) for name, column in zip(names, zip(*parts, strict=True), strict=True)}
        return Rows(**joined, names=[run.run for run in runs])

    def fits(self, lab: Laboratory, key: Key, x: Enclosure) -> Any:
        """Which values of a tap are legal under an enclosure: booleans of its shape."""
        found = lab.found(key)
        dtype = OF_DTYPE[self.evidence.trace.get(*key).dtype]
        with np.errstate(all="ignore"):
            x = spread(x, found.shape)
            settled = x.settle() if x.biased or not x.owed or self.format != x.accumulation else x
            mid, radius = settled.mid, np.broadcast_to(settled.r, found.shape)
            sigma = np.sqrt(np.broadcast_to(settled.v, found.shape) + (OWN * mid) ** 2)
            held = self.format.holds(dtype) | representable(found, self.format)
            legal = np.zeros(found.shape, bool)
            for mask, format in ((held, self.format), (~held, dtype)):
                if not np.any(mask):
                    continue
                low, high = nearest(pair(mid - radius, mid + radius), format)
                start, end = cell(np.where(np.isfinite(found), found, 0.0), format)
                beyond = np.maximum(mid - end, start - mid)
                inside = (found >= low) & (found <= high) & (beyond <= self.evidence.limits.excess * sigma)
                legal = np.where(mask, inside, legal)
            if self.step == "attention.scores":
                legal = legal | ~lab.mask(key)[None]
        return legal

    # ---- the proof

    @cached_property
    def by_size(self) -> list[Key]:
        """Up to three failed taps: the smallest ones first, and the largest, which says most."""
        ordered = sorted(self.failed, key=lambda key: len(self.lab.runs[key[0]].tokens))
        return list(dict.fromkeys([*ordered[:2], ordered[-1]]))

    @cached_property
    def hardest(self) -> list[Key]:
        """All taps of the step, in the order in which a proof reads them: small failed ones first."""
        return list(dict.fromkeys([*self.by_size, *self.failed, *self.keys]))

    def near(self, fault: Fault) -> bool:
        """Whether the fault comes close to the wrong rows of the failed taps, so that a proof is worth its time."""
        return all(self.left(key, fault.predict(self.rough, key)) <= CLOSE for key in self.by_size)

    def left(self, key: Key, x: Enclosure | None) -> float:
        """The part of the error in the wrong rows of a tap that an enclosure leaves; infinite where there is none."""
        if x is None:
            return math.inf
        if key not in self._errors:
            found, right = self.lab.found(key), self.lab.right(key).mid
            wrong = np.broadcast_to(self.over_rows(key, ~self.right_rows(key, self.lab)), found.shape)
            wrong = wrong if wrong.any() else np.ones(found.shape, bool)
            self._errors[key] = wrong, float(np.linalg.norm((found - right)[wrong]))
        wrong, whole = self._errors[key]
        with np.errstate(all="ignore"):
            rest = float(np.linalg.norm((self.lab.found(key) - np.broadcast_to(x.mid, wrong.shape))[wrong]))
        return rest / whole if whole and math.isfinite(rest) else math.inf

    def prove(self, fault: Fault) -> Proof | None:
        """The proof of a fault: every failed check passes, and no other check of the step fails."""
        for lab in self.labs:
            found = self._prove(fault, lab)
            if found is not None:
                return found
        return None

    def _prove(self, fault: Fault, lab: Laboratory) -> Proof | None:
        acting, resting, predicted = {}, {}, {}
        for key in self.hardest:  # a failed check refutes a hypothesis sooner than one that passed
            x, right = fault.predict(lab, key), self.right_rows(key, lab)
            must = ~right
            if key in self.failed and right.all():
                must = np.ones(len(right), bool)
            able = np.zeros(len(right), bool) if x is None else self.units(key, self.fits(lab, key, x))
            if (must & ~able).any():
                return None
            acting[key], resting[key], predicted[key] = must, right & ~able & ~must, x
        where = describe(
            self.rows,
            np.concatenate([acting[key] for key in self.keys]),
            np.concatenate([resting[key] for key in self.keys]),
        )
        if where is None:
            return None
        return self._checked(fault, lab, where, [predicted[key] for key in self.keys])

    def _checked(self, fault: Fault, lab: Laboratory, where: Where, predicted: list[Any]) -> Proof | None:
        start, passed, values, evidence = 0, False, 0, -fault.bits - where.bits
        size = along = reach = left = 0.0
        shares: list[Share] = []
        for key, x in zip(self.keys, predicted, strict=True):
            right, found = lab.right(key), lab.found(key)
            count = len(self.right_rows(key, lab))
            inside = where.inside[start : start + count]
            start += count
            if x is None or not inside.any():
                if key in self.failed:
                    return None
                continue
            here = self.over_rows(key, inside)
            x = x if inside.all() else only_where(here, spread(x, found.shape), spread(right, found.shape))
            verdict = lab.check(key, x).verdict
            if verdict == FAIL:
                return None
            if key not in self.failed:
                continue
            passed |= verdict == PASS
            with np.errstate(all="ignore"):
                x, right = spread(x, found.shape), spread(right, found.shape)
                unit = ulp(right.mid, self.format)
                error, effect = (found - right.mid) / unit, (x.mid - right.mid) / unit
                if self.step == "attention.scores":
                    shown = np.broadcast_to(lab.mask(key)[None], found.shape)
                    error, effect = np.where(shown, error, 0.0), np.where(shown, effect, 0.0)
                shares.append(self._share(key, x, right, here))
                size += float((error * error).sum())
                along += float((error * effect).sum())
                reach += float((effect * effect).sum())
                left += float(((error - effect) ** 2).sum())
                wrong = ~self.fits(lab, key, lab.right(key))
                values += int(wrong.sum())
                evidence += float(self._gain(x, right, found)[wrong].sum())
        if not passed or not evidence >= ENOUGH or not size or not reach or uneven(shares, self.u):
            return None
        coefficient, residual = along / reach, math.sqrt(left / size)
        return Proof(
            fault=fault, where=where, values=values, evidence=evidence, coefficient=coefficient, residual=residual
        )

    def _share(self, key: Key, x: Enclosure, right: Enclosure, here: Any) -> Share:
        """The errors of a tap beside the effect of a fault, with the groups that its rows are in.

        here: booleans that broadcast to the tap: the rows in which the fault acts
        """
        found, settled = self.lab.found(key), x.settle()
        shown: Any = np.broadcast_to(here, found.shape)
        if self.step == "attention.scores":
            shown = shown & self.lab.mask(key)[None]
        error, effect, mid = (np.where(shown, each, 0.0) for each in (found - right.mid, x.mid - right.mid, x.mid))
        groups: dict[str, Any] = {
            "call": np.array(list(self.lab.runs).index(key[0])),
            "layer": np.array(layer_of(key[1]) or 0),
        }
        for axis, dimension in enumerate(self.dims[:-1]):
            if dimension in ("H", "K", "k"):
                shape = [-1 if i == axis else 1 for i in range(found.ndim - 1)]
                groups[AXES[dimension]] = np.arange(found.shape[axis]).reshape(shape)
        if self.dims[:2] == ["T", "k"] and found.ndim > 2:
            chosen = self.lab.read((key[0], f"layers.{layer_of(key[1])}.router.experts"))
            groups["expert"] = chosen.reshape(*chosen.shape, *[1] * (found.ndim - 3))
        variance = np.broadcast_to(settled.v, found.shape) + ulp(x.mid, self.format) ** 2 / 12
        return Share(error=error, effect=effect, predicted=mid, variance=variance, groups=groups)

    def _gain(self, x: Enclosure, right: Enclosure, found: Any) -> Any:
        """The evidence of each value, in bits: its error over the room that the fault leaves it."""
        settled = x.settle()
        sigma = np.sqrt(np.broadcast_to(settled.v, found.shape))
        room = np.minimum(np.broadcast_to(settled.r, found.shape), self.evidence.limits.excess * sigma)
        room = room + ulp(found, self.format) / 2
        ratio = np.abs(found - right.mid) / np.where(np.isfinite(room), room, np.inf)
        return np.clip(np.log2(np.maximum(np.nan_to_num(ratio, nan=1.0), 1e-9)), 0.0, MOST_PER_VALUE)

    def proofs(self, faults: Iterator[Fault]) -> list[Proof]:
        """The faults that hold, the shortest description first. The search ends where too many are tried in vain."""
        found, tried, refuted = [], 0, 0
        for fault in faults:
            if fault.bits > self.least:
                continue
            tried += 1
            if self.near(fault):
                proof = self.prove(fault)
                if proof is not None:
                    found.append(proof)
                    self.least = min(self.least, proof.bits + SPARE)
                refuted += proof is None
            if tried >= MOST_TRIED or refuted >= MOST_REFUTED:
                break
        return sorted(found, key=lambda proof: (proof.bits, proof.fault.name))
