# SPDX-License-Identifier: Apache-2.0
"""Rotations with other positions, another base, other pairs, or none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from refmoe.steps import rounding
from refmoe.verifier.diagnosis.grammar.factors import FACTOR_BITS
from refmoe.verifier.diagnosis.grammar.fault import CLOSE, Fault, Search
from refmoe.verifier.diagnosis.grammar.laboratory import Laboratory, only_where, spread
from refmoe.verifier.diagnosis.grammar.pointwise import least, rounded
from refmoe.verifier.diagnosis.grammar.settings import At, constant, setting
from refmoe.verifier.passes import Key

KNOWN_BASES = (1e4, 5e5, 1e6)
"""The defaults of `rope_theta` in models and libraries."""
FARTHEST = 4096
"""The largest distance at which a position is sought."""


def rotation(search: Search) -> Iterator[Fault]:
    """The settings that explain a rotation."""
    if search.step in ("attention.q_rope", "attention.k_rope"):
        yield from _positions(search)
        yield from _bases(search)
        yield from _rotations()


def _of_positions(law: Callable[[Any], Any]) -> At:
    """The positions of a call under a law.   law: from integers [T]"""
    return lambda lab, key: law(np.asarray(lab.runs[key[0]].positions))


def _added(by: Any) -> At:
    return _of_positions(lambda positions: positions + by)


def _divided(by: float) -> At:
    return _of_positions(lambda positions: positions / by)


LAWS: tuple[tuple[str, float, At], ...] = (
    ("positions left out: all zero", 3.0, _of_positions(lambda p: p * 0)),
    ("positions from 0 in each call", 3.0, _of_positions(lambda p: p - p[0])),
    ("positions as the first of each call", 4.0, _of_positions(lambda p: np.full_like(p, p[0]))),
    ("positions as the last of each call", 4.0, _of_positions(lambda p: np.full_like(p, p[-1]))),
    ("positions in reverse order", 4.0, _of_positions(lambda p: p[::-1])),
    ("positions with the other sign", 3.0, _of_positions(lambda p: -p)),
)
"""Positions by a law: in words, length in bits, positions."""


def _positions(search: Search) -> Iterator[Fault]:
    laws = [*LAWS, *((f"positions divided by {by:g}", 5.0, _divided(by)) for by in _scale_of(search))]
    offsets = _offsets(search)
    laws += [(f"positions off by {offset:+d}", 5.0, _added(offset)) for offset in sorted(set(offsets.values()))]
    if len(set(offsets.values())) > 1:
        sequences = {search.lab.runs[name].sequence: offset for name, offset in offsets.items()}
        if len({run.sequence for run in search.lab.runs.values()}) > 1:

            def own(lab: Laboratory, key: Key) -> Any:
                run = lab.runs[key[0]]
                return np.asarray(run.positions) + sequences.get(run.sequence, 0)

            said = ", ".join(f"{sequence}: {offset:+d}" for sequence, offset in sorted(sequences.items()))
            laws.append((f"positions off by a number for each sequence ({said})", 4.0 + 5.0 * len(sequences), own))

        def each(lab: Laboratory, key: Key) -> Any:
            return np.asarray(lab.runs[key[0]].positions) + offsets[key[0]] if key[0] in offsets else None

        said = ", ".join(f"{name}: {offset:+d}" for name, offset in list(offsets.items())[:6])
        laws.append((f"positions off by a number for each call ({said})", 6.0 + 6.0 * len(offsets), each))
    fix = "look at the positions that this call gives to the rotation"
    for words, bits, law in laws:
        yield setting(words, f"heads are turned with {words}", fix, bits, positions=law)


def _offsets(search: Search) -> dict[str, int]:
    """Per failed call, the number to add to all positions that fits best, if it fits well."""
    found: dict[str, int] = {}
    for key in search.failed:
        if key[0] in found:
            continue
        given, y = search.lab.inputs(key), search.lab.found(key)
        angles = _angles(given["x"].mid, y)
        if angles is None:
            continue
        turn, weight = angles
        wrong = search.wrong_tokens(key)
        theta, width = given["theta"], y.shape[-1]
        frequency = theta ** (-2 * np.arange(width // 2) / width)
        reach = max(64, min(FARTHEST, 2 * int(np.max(given["positions"])) + 8))
        offsets = np.arange(-reach, reach + 1)
        expected = given["positions"][wrong][:, None, None] + offsets[None, :, None]
        gap = turn[wrong][:, None, :] - expected * frequency
        score = ((1 - np.cos(gap)) * weight[wrong][:, None, :]).sum((0, 2))
        best = int(offsets[int(np.argmin(score))])
        if best and score.min() <= 0.05 * score[reach]:
            found[key[0]] = best
    return found


def _angles(x: Any, y: Any) -> Any:
    """The angle by which each pair of each token was turned, and its weight: [T, d/2] both. None if it is unknown."""
    half = x.shape[-1] // 2
    one, two = x[..., :half] + 1j * x[..., half:], y[..., :half] + 1j * y[..., half:]
    with np.errstate(all="ignore"):
        turned = (two * np.conj(one)).sum(1)
    if not np.isfinite(turned).all():
        return None
    return np.angle(turned), np.abs(turned)


def _scale_of(search: Search) -> list[float]:
    """The numbers by which positions may be divided: usual ones, and the one of the slowest pair."""
    usual = [2.0, 4.0, 8.0, 0.5]
    key = max(search.failed, key=lambda each: len(search.lab.runs[each[0]].tokens))
    given, y = search.lab.inputs(key), search.lab.found(key)
    angles = _angles(given["x"].mid, y)
    if angles is None:
        return usual
    width = y.shape[-1]
    slowest = given["theta"] ** (-2 * (width // 2 - 1) / width)
    wrong = search.wrong_tokens(key) & (given["positions"] > 0)
    with np.errstate(all="ignore"):
        factors = angles[0][wrong, -1] / (given["positions"][wrong] * slowest)
    factors = factors[np.isfinite(factors) & (factors > 0)]
    if factors.size:
        usual.append(rounded(1 / float(np.median(factors)), 1e-3))
    return list(dict.fromkeys(usual))


def _bases(search: Search) -> Iterator[Fault]:
    right = search.lab.config.rope_theta
    for theta in dict.fromkeys((*KNOWN_BASES, *_fitted_base(search))):
        if theta != right and theta > 0:
            yield setting(
                f"theta {theta:.6g}", f"heads are turned with theta {theta:.6g}, not {right:.6g}",
                "take rope_theta from the config", 4.0 if theta in KNOWN_BASES else FACTOR_BITS,
                theta=constant(theta),
            )  # fmt: skip


def _fitted_base(search: Search) -> Iterator[float]:
    """The base that fits the angles best."""
    turns, weights, positions = [], [], []
    for key in search.failed:
        given, y = search.lab.inputs(key), search.lab.found(key)
        angles = _angles(given["x"].mid, y)
        if angles is not None:
            wrong = search.wrong_tokens(key)
            turns.append(angles[0][wrong])
            weights.append(angles[1][wrong])
            positions.append(given["positions"][wrong])
    if not turns:
        return
    turn, weight, at = np.concatenate(turns), np.concatenate(weights), np.concatenate(positions)[:, None]
    width = 2 * turn.shape[1]
    steps = 2 * np.arange(width // 2) / width

    def loss(log: float) -> float:
        return float(((1 - np.cos(turn - at * np.exp(-log * steps))) * weight).sum())

    best = least(loss, np.linspace(np.log(10), np.log(1e9), 1500))
    theta = 0.0 if best is None else float(np.exp(best))
    if theta and loss(np.log(theta)) <= CLOSE**2 * loss(np.log(search.lab.config.rope_theta)):
        for tolerance in (1e-2, 1e-3, 1e-5):
            yield rounded(theta, tolerance)


def _rotations() -> Iterator[Fault]:
    def unturned(lab: Laboratory, key: Key) -> Any:
        return lab.inputs(key)["x"]

    yield Fault(
        name="the rotation left out",
        about="heads are not turned at all",
        fix="turn queries and keys",
        bits=3.0,
        predict=unturned,
    )

    def paired(lab: Laboratory, key: Key) -> Any:
        given = lab.inputs(key)
        width = given["x"].mid.shape[-1]
        order = np.concatenate([np.arange(0, width, 2), np.arange(1, width, 2)])
        x = given["x"][..., order]
        turned = lab.compute(key, {**given, "x": x})
        return turned[..., np.argsort(order)]

    yield Fault(
        name="neighbours paired, not halves",
        about="element 2i is turned with element 2i + 1",
        fix="pair element i with i + head_dim/2",
        bits=3.0,
        predict=paired,
    )

    def twice(lab: Laboratory, key: Key) -> Any:
        given = lab.inputs(key)
        once = lab.ops.cut("attention.q_rope", lab.compute(key, given))
        return lab.compute(key, {**given, "x": once})

    yield Fault(
        name="turned twice",
        about="heads are turned twice",
        fix="rotate once, before the cache",
        bits=3.0,
        predict=twice,
    )

    def normed(lab: Laboratory, key: Key) -> Any:
        given = lab.inputs(key)
        x, width = given["x"], given["x"].mid.shape[-1]
        heads = rounding.rms_norm(lab.ops, x.reshape(-1, width), np.ones(width), lab.config.norm_eps)
        return lab.compute(key, {**given, "x": heads.reshape(*x.mid.shape)})

    yield Fault(
        name="each head divided by its root mean square first",
        about="each head is divided by its root mean square, as models with a norm of queries and keys do",
        fix="turn the heads as they are: Mixtral has no norm there",
        bits=3.0,
        predict=normed,
    )
    for parts in (2, 4):
        yield Fault(
            name=f"only 1/{parts} of the pairs turned",
            about=f"only the first 1/{parts} of the pairs is turned",
            fix="turn all of head_dim",
            bits=4.0,
            predict=_partly(parts),
        )
        yield Fault(
            name=f"only the first 1/{parts} of the channels turned, as a head of that width",
            about=f"only the first 1/{parts} of the channels is turned, in pairs of its own and by its own angles",
            fix="turn all of head_dim: this model has no partial rotation",
            bits=4.0,
            predict=_narrowly(parts),
        )


def _partly(parts: int) -> At:
    """The rotation of the first pairs only."""

    def turned(lab: Laboratory, key: Key) -> Any:
        given = lab.inputs(key)
        width = given["x"].mid.shape[-1]
        if (width // 2) % parts:
            return None
        first = np.arange(width) % (width // 2) < width // 2 // parts
        right = lab.compute(key, given)
        return only_where(first, spread(right, right.mid.shape), spread(given["x"], right.mid.shape))

    return turned


def _narrowly(parts: int) -> At:
    """The first channels turned as if they were the whole head, as models with a partial rotation do."""

    def turned(lab: Laboratory, key: Key) -> Any:
        given = lab.inputs(key)
        x, width = given["x"], given["x"].mid.shape[-1]
        if width % (2 * parts):
            return None
        narrow = width // parts
        table = rounding.rotary_table(lab.ops, given["positions"], narrow, given["theta"])
        return lab.ops.concatenate([rounding.rotate(lab.ops, x[..., :narrow], table), x[..., narrow:]], axis=-1)

    return turned
