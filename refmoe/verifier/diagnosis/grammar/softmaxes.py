# SPDX-License-Identifier: Apache-2.0
"""The softmax of attention and of the router: scaled, capped, biased, or another function in its place."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.verifier.diagnosis.grammar.factors import FACTOR_BITS, VECTOR_BITS, scaled, simple
from refmoe.verifier.diagnosis.grammar.fault import CLOSE, Fault, Search
from refmoe.verifier.diagnosis.grammar.laboratory import Laboratory
from refmoe.verifier.diagnosis.grammar.pointwise import Function, least, rounded, soft_cap
from refmoe.verifier.diagnosis.grammar.settings import At, setting
from refmoe.verifier.diagnosis.grammar.views import least_squares
from refmoe.verifier.passes import Key


def softmaxes(search: Search) -> Iterator[Fault]:
    """The settings that explain a softmax."""
    if search.step == "attention.probs":
        yield from _scales(search)
        yield from _caps(search)
    if search.step == "router.weights":
        yield from _temperature(search, "logits")
        yield from _by_expert(search)
        yield from _other_weights()


def _logits_of(search: Search, key: Key, name: str) -> Any:
    """Right logits and those that the engine had, without the mean of each row, and the mask: [n, m] each."""
    lab = search.lab
    given, found = lab.inputs(key), lab.found(key)
    right = given[name].mid
    if name == "logits":
        right = np.take_along_axis(right, given["experts"], -1)
        shown = np.ones(right.shape, bool)
    else:
        shown = np.broadcast_to(given["mask"][None], right.shape)
    shown = shown & (found > 0)
    return right, np.log(np.where(shown, found, 1.0)), shown


def _fitted_scales(search: Search, name: str, heads: bool) -> Any:
    """The factor of the logits, by least squares: [1], or [H]. NaN where it cannot be told."""
    count = search.lab.config.heads if heads else 1
    along, size = np.zeros(count), np.zeros(count)
    for key in search.failed:
        right, had, shown = _logits_of(search, key, name)
        wrong = search.wrong_tokens(key)
        right, had, shown = (np.compress(wrong, each, axis=-2) for each in (right, had, shown))
        right, had = centred(right, shown), centred(had, shown)
        axes = (1, 2) if heads else None
        along += (right * had).sum(axes)
        size += (right * right).sum(axes)
    with np.errstate(all="ignore"):
        return np.where(size > 0, along / size, np.nan)


def _scales(search: Search) -> Iterator[Fault]:
    yield from _temperature(search, "scores")
    factors = _fitted_scales(search, "scores", heads=True)
    if len(factors) > 1 and np.isfinite(factors).all():
        numbers = np.array([_known(search, factor) for factor in factors])
        wrong = np.flatnonzero(numbers != 1)
        if not wrong.size:
            return
        distinct = sorted(set(numbers[wrong].tolist()))
        which = ", ".join(map(str, wrong.tolist()))
        same = len(distinct) == 1
        bits = FACTOR_BITS + 3 * len(wrong) if same else VECTOR_BITS * len(wrong)
        words = f"heads {which}: scores times {distinct[0]:.5g}" if same else "a factor for each head of the scores"
        scale = numbers[:, None, None]
        radius = np.where(scale == 1, 0.0, np.abs(scale) * search.u)
        yield setting(
            words, f"the scores have a factor of their own in heads {which}", "look for a scale of each head",
            bits, scores=_scaled("scores", scale, radius),
        )  # fmt: skip


def _scaled(name: str, scale: Any, radius: Any) -> At:
    return lambda lab, key: scaled(lab.inputs(key)[name], scale, radius)


def _known(search: Search, factor: float) -> float:
    number, _, _ = simple(factor, search.coarse, search.lab.config)
    return 1.0 if abs(factor - 1) < 1e-3 else number if number != factor else rounded(factor, 1e-4)


def _temperature(search: Search, name: str) -> Iterator[Fault]:
    """All logits of a softmax times a number."""
    fitted = float(_fitted_scales(search, name, heads=False)[0])
    if not np.isfinite(fitted) or abs(fitted - 1) < 1e-4:
        return
    seen = []
    for tolerance in (1e-2, 1e-3, 1e-4, 1e-6):
        number, said, bits = simple(fitted, search.coarse, search.lab.config)
        number = number if bits < FACTOR_BITS else rounded(fitted, tolerance)
        if number in seen:
            continue
        seen.append(number)
        radius = 0.0 if bits < FACTOR_BITS else abs(number) * search.u
        said = said if bits < FACTOR_BITS else f"{number:.6g}"
        yield setting(
            f"times {said} of the {name}", f"the {name} are {said} times what they should be",
            "look for a scale or a temperature that is applied twice, or not at all", bits + 4.0 * (number < 0),
            **{name: _scaled(name, np.asarray(number), np.asarray(radius))},
        )  # fmt: skip


def _by_expert(search: Search) -> Iterator[Fault]:
    """A factor or a bias for each expert in the logits that the weights are made of, by least squares."""
    count = search.lab.config.experts
    scales, biases, had = [], [], []
    for key in search.failed:
        given, found = search.lab.inputs(key), search.lab.found(key)
        right = np.take_along_axis(given["logits"].mid, given["experts"], -1)
        for t in np.flatnonzero(search.wrong_tokens(key)):
            if not (found[t] > 0).all():
                continue
            for j in range(1, right.shape[1]):
                scale, bias = np.zeros(count), np.zeros(count)
                first, other = given["experts"][t, 0], given["experts"][t, j]
                scale[first], scale[other] = right[t, 0], -right[t, j]
                bias[first], bias[other] = 1.0, -1.0
                scales.append(scale)
                biases.append(bias)
                had.append(np.log(found[t, 0] / found[t, j]))
    if len(had) < count + 2:
        return
    effects, values = np.array(scales), np.array(had)
    tolerance = 4 * search.u + 1e-6
    seen = (effects != 0).any(0)
    solved = least_squares(effects[:, seen], values)
    if solved is None:
        return
    factor = np.ones(count)
    factor[seen] = solved
    radius = tolerance * np.abs(factor)
    yield setting(
        "a factor for each expert of the logits", "each expert's logit has a factor of its own before the softmax",
        "look for a scale of experts that this model does not have", VECTOR_BITS * int(seen.sum()),
        logits=_scaled("logits", factor, radius),
    )  # fmt: skip
    shift = least_squares(np.array(biases), values - effects.sum(1), unique=False)
    if shift is None:
        return
    room = tolerance * (np.abs(shift) + np.abs(values).max())

    def biased(lab: Laboratory, key: Key) -> Enclosure:
        x: Enclosure = lab.inputs(key)["logits"] + Enclosure(shift, room, room**2 / 3)
        return x

    yield setting(
        "a bias for each expert of the logits", "each expert's logit has a bias before the softmax",
        "look for a bias of experts that this model does not have", VECTOR_BITS * int(seen.sum()), logits=biased,
    )  # fmt: skip


def _caps(search: Search) -> Iterator[Fault]:
    """The scores soft-capped or clamped: c by its effect on the probabilities."""
    parts = []
    for key in search.failed[:4]:
        arrays = _logits_of(search, key, "scores")
        parts.append(tuple(np.compress(search.wrong_tokens(key), each, axis=-2) for each in arrays))
    top = max((float(np.abs(np.where(s, r, 0.0)).max(initial=0.0)) for r, _, s in parts), default=0.0)
    if not top:
        return

    def loss(function: Function, log: float) -> float:
        c = float(np.exp(log))
        return sum(
            float(((centred(had, shown) - centred(function(x, c), shown)) ** 2).sum()) for x, had, shown in parts
        )

    kinds: tuple[tuple[str, Function], ...] = (
        ("soft-capped at", soft_cap), ("clamped to the size of", lambda x, c: np.clip(x, -c, c)),
    )  # fmt: skip
    for words, function in kinds:
        best = least(partial(loss, function), np.linspace(np.log(top / 3e4), np.log(top * 100), 160))
        if best is None or not loss(function, best) <= CLOSE**2 * loss(lambda x, c: x, 0.0):
            continue
        for c in dict.fromkeys(rounded(float(np.exp(best)), tolerance) for tolerance in (3e-2, 1e-2, 1e-3, 1e-5)):
            yield setting(
                f"{words} {c:.5g} of the scores", f"the scores are {words} {c:.5g}",
                "look for a cap that this model does not have", FACTOR_BITS, scores=_capped(function, c),
            )  # fmt: skip


def _capped(function: Function, c: float) -> At:
    def capped(lab: Laboratory, key: Key) -> Enclosure:
        x = lab.inputs(key)["scores"].settle()
        room = 6 * lab.policy.storage.u * np.abs(x.mid)
        return Enclosure(function(x.mid, c), x.r + room, x.v + room**2 / 3, accumulation=x.accumulation)

    return capped


def centred(x: Any, shown: Any) -> Any:
    """Logits without the mean of what is shown of each row, and zeros elsewhere."""
    count = np.maximum(shown.sum(-1, keepdims=True), 1)
    return np.where(shown, x - np.where(shown, x, 0.0).sum(-1, keepdims=True) / count, 0.0)


def _other_weights() -> Iterator[Fault]:
    def over_all(lab: Laboratory, key: Key) -> Enclosure:
        given = lab.inputs(key)
        whole = lab.ops.softmax(given["logits"], None)
        chosen: Enclosure = lab.ops.gather(whole, given["experts"])
        return chosen

    yield Fault(
        name="not renormalised over the chosen",
        about="the weights are probabilities over all experts",
        fix="divide by the sum of the chosen",
        bits=3.0,
        predict=over_all,
    )

    def sigmoids(lab: Laboratory, key: Key) -> Enclosure:
        given = lab.inputs(key)
        gates: Enclosure = lab.ops.sigmoid(lab.ops.gather(given["logits"], given["experts"]))
        return gates

    yield Fault(
        name="sigmoids in place of a softmax",
        about="the weights are sigmoids of the logits",
        fix="take a softmax of the chosen logits",
        bits=4.0,
        predict=sigmoids,
    )

    def raw(lab: Laboratory, key: Key) -> Enclosure:
        given = lab.inputs(key)
        chosen: Enclosure = lab.ops.gather(given["logits"], given["experts"])
        return chosen

    yield Fault(
        name="the raw logits",
        about="the weights are the chosen logits",
        fix="take a softmax of the chosen logits",
        bits=4.0,
        predict=raw,
    )
