# SPDX-License-Identifier: Apache-2.0
"""Norms with another eps or gain, without their division, or of the mean."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.verifier.diagnosis.grammar.factors import FACTOR_BITS, scaled
from refmoe.verifier.diagnosis.grammar.fault import Fault, Search
from refmoe.verifier.diagnosis.grammar.laboratory import NORMS, Laboratory
from refmoe.verifier.diagnosis.grammar.pointwise import rounded
from refmoe.verifier.diagnosis.grammar.settings import At, constant, setting
from refmoe.verifier.diagnosis.grammar.views import layer
from refmoe.verifier.passes import Key

KNOWN_EPS = (1e-5, 1e-6, 1e-8, 1e-12, 0.0)
"""The defaults of `norm_eps` in models and libraries."""


def norms(search: Search) -> Iterator[Fault]:
    """The settings that explain a norm."""
    if search.step not in NORMS:
        return
    config = search.lab.config
    for eps in dict.fromkeys((*KNOWN_EPS, *_fitted_eps(search))):
        if eps != config.norm_eps:
            yield setting(
                f"eps {eps:.4g}", f"the norm runs with eps {eps:.4g}, not {config.norm_eps:.4g}",
                "take norm_eps from the config", 4.0 if eps in KNOWN_EPS else FACTOR_BITS,
                eps=constant(eps),
            )  # fmt: skip
    gains: tuple[tuple[str, At], ...] = (
        ("the gain left out", lambda lab, key: np.ones_like(lab.inputs(key)["gain"])),
        ("1 added to the gain", lambda lab, key: _stored(lab, lab.inputs(key)["gain"] + 1.0)),
        ("the gain applied twice", lambda lab, key: _stored(lab, lab.inputs(key)["gain"] ** 2)),
        ("the gain of attention_norm", lambda lab, key: _gain(lab, key, "attention_norm", 0)),
        ("the gain of moe_norm", lambda lab, key: _gain(lab, key, "moe_norm", 0)),
        ("the gain of final_norm", lambda lab, key: lab.weight("final_norm", None).values),
        ("the gain of the next layer", lambda lab, key: _gain(lab, key, None, 1)),
        ("the gain of the layer before", lambda lab, key: _gain(lab, key, None, -1)),
    )
    for words, gain in gains:
        yield setting(words, f"the norm runs with {words}", "look at which gain is loaded here", 4.0, gain=gain)
    yield from _other_norms()


def _stored(lab: Laboratory, gain: Any) -> Enclosure:
    """A computed gain, rounded to the storage dtype or not. gain: [D]"""
    room = lab.policy.storage.u * np.abs(gain)
    return Enclosure(gain, room, room**2 / 3, accumulation=lab.policy.accumulation)


def _gain(lab: Laboratory, key: Key, name: str | None, by: int) -> Any:
    at = layer(key)
    name = key[1].rpartition(".")[2] if name is None else name
    if at is None or not 0 <= at + by < lab.config.layers or (by == 0 and key[1].endswith(name)):
        return None
    return lab.weight(name, at + by).values


def _fitted_eps(search: Search) -> Iterator[float]:
    """The eps that fits best: from the size of each row."""
    found, weights = [], []
    for key in search.failed:
        given, y = search.lab.inputs(key), search.lab.found(key)
        with np.errstate(all="ignore"):
            shape, square = given["x"].mid * given["gain"], (given["x"].mid ** 2).mean(-1)
            eps = ((y * shape).sum(-1) / (shape * shape).sum(-1)) ** -2.0 - square
            weight = (eps + square) ** -2.0  # the size of a row is known up to a relative error
        able = search.wrong_tokens(key) & np.isfinite(eps) & np.isfinite(weight)
        found += eps[able].tolist()
        weights += weight[able].tolist()
    if found:
        for middle in (float(np.average(found, weights=weights)), float(np.median(found))):
            if middle > 0:
                yield from dict.fromkeys(rounded(middle, tolerance) for tolerance in (0.2, 3e-2, 1e-2, 1e-3, 1e-5))


def _other_norms() -> Iterator[Fault]:
    def centred(lab: Laboratory, key: Key) -> Any:
        x = lab.inputs(key)["x"].settle()
        room = lab.policy.statistics.u * x.mid.shape[-1] * np.abs(x.mid).mean(-1, keepdims=True)
        return x - Enclosure(x.mid.mean(-1, keepdims=True), room, room**2 / 3, accumulation=x.accumulation)

    yield setting(
        "the mean subtracted first",
        "the mean of a row is subtracted, as LayerNorm does",
        "RMSNorm subtracts no mean",
        3.0,
        x=centred,
    )

    def twice(lab: Laboratory, key: Key) -> Enclosure:
        given = lab.inputs(key)
        once: Enclosure = lab.ops.cut(key[1].rpartition(".")[2], lab.compute(key, given))
        again: Enclosure = lab.compute(key, {**given, "x": once})
        return again

    yield Fault(
        name="the norm applied twice",
        about="the row is normalised, and the result once more",
        fix="normalise once",
        bits=3.0,
        predict=twice,
    )

    def without(lab: Laboratory, key: Key) -> Enclosure:
        given = lab.inputs(key)
        plain: Enclosure = given["x"] * given["gain"]
        return plain

    yield Fault(
        name="the division left out",
        about="the row is not divided by its root mean square",
        fix="normalise first",
        bits=3.0,
        predict=without,
    )

    def summed(lab: Laboratory, key: Key) -> Enclosure:
        given, right = lab.inputs(key), lab.right(key)
        count = given["x"].mid.shape[-1]
        square = (given["x"].mid ** 2).mean(-1, keepdims=True)
        scale = np.sqrt((square + given["eps"]) / (square * count + given["eps"]))
        return scaled(right, scale, scale * lab.policy.statistics.u * 4)

    yield Fault(
        name="the sum of squares in place of their mean",
        about="a row is divided by the root of a sum",
        fix="divide by the mean square",
        bits=3.0,
        predict=summed,
    )
