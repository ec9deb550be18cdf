# SPDX-License-Identifier: Apache-2.0
"""Settings of a step with other values: eps and gain of a norm, positions and base of the rotation, scale and mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.verifier.diagnosis.grammar.factors import FACTOR_BITS, scaled, simple
from refmoe.verifier.diagnosis.grammar.fault import CLOSE, Fault, Search
from refmoe.verifier.diagnosis.grammar.laboratory import NORMS, Laboratory
from refmoe.verifier.diagnosis.grammar.pointwise import least, rounded
from refmoe.verifier.diagnosis.grammar.views import layer
from refmoe.verifier.passes import Key

KNOWN_EPS = (1e-5, 1e-6, 1e-8, 1e-12, 0.0)
KNOWN_BASES = (1e4, 5e5, 1e6)
"""The defaults of `norm_eps` and `rope_theta` in models and libraries."""
FARTHEST = 4096
"""The largest distance at which a position is sought."""


def settings(search: Search) -> Iterator[Fault]:
    """The settings that explain a step."""
    if search.step in NORMS:
        yield from _norm(search)
    if search.step in ("attention.q_rope", "attention.k_rope"):
        yield from _positions(search)
        yield from _bases(search)
        yield from _rotations()
    if search.step == "attention.probs":
        yield from _scales(search)
        yield from _caps(search)
        yield from _masks(search)
        yield from _keys(search)
    if search.step == "router.weights":
        yield from _temperature(search, "logits")
        yield from _by_expert(search)
        yield from _other_weights()


def setting(name: str, about: str, fix: str, bits: float, **changes: Callable[[Laboratory, Key], Any]) -> Fault:
    """The step with some inputs replaced.   changes: per input, its value at a tap; None where it cannot act"""

    def predict(lab: Laboratory, key: Key) -> Enclosure | None:
        given = lab.inputs(key)
        for each, change in changes.items():
            value = change(lab, key)
            if value is None:
                return None
            given[each] = value
        found: Enclosure = lab.compute(key, given)
        return found

    return Fault(name, about, fix, bits, predict)


# ---- norms


def _norm(search: Search) -> Iterator[Fault]:
    config = search.lab.config
    for eps in dict.fromkeys((*KNOWN_EPS, *_fitted_eps(search))):
        if eps != config.norm_eps:
            yield setting(
                f"eps {eps:.4g}", f"the norm runs with eps {eps:.4g}, not {config.norm_eps:.4g}",
                "take norm_eps from the config", 4.0 if eps in KNOWN_EPS else FACTOR_BITS,
                eps=lambda lab, key, eps=eps: eps,
            )  # fmt: skip
    gains: tuple[tuple[str, Callable[[Laboratory, Key], Any]], ...] = (
        ("the gain left out", lambda lab, key: np.ones_like(lab.inputs(key)["gain"])),
        ("1 added to the gain", lambda lab, key: lab.inputs(key)["gain"] + 1.0),
        ("the gain applied twice", lambda lab, key: lab.inputs(key)["gain"] ** 2),
        ("the gain of attention_norm", lambda lab, key: _gain(lab, key, "attention_norm", 0)),
        ("the gain of moe_norm", lambda lab, key: _gain(lab, key, "moe_norm", 0)),
        ("the gain of final_norm", lambda lab, key: lab.weight("final_norm", None).values),
        ("the gain of the next layer", lambda lab, key: _gain(lab, key, None, 1)),
        ("the gain of the layer before", lambda lab, key: _gain(lab, key, None, -1)),
    )
    for words, gain in gains:
        yield setting(words, f"the norm runs with {words}", "look at which gain is loaded here", 4.0, gain=gain)
    yield from _other_norms()


def _gain(lab: Laboratory, key: Key, name: str | None, by: int) -> Any:
    at = layer(key)
    name = key[1].rpartition(".")[2] if name is None else name
    if at is None or not 0 <= at + by < lab.config.layers or (by == 0 and key[1].endswith(name)):
        return None
    return lab.weight(name, at + by).values


def _fitted_eps(search: Search) -> Iterator[float]:
    """The eps that fits best: from the size of each row."""
    found = []
    for key in search.failed:
        given, y = search.lab.inputs(key), search.lab.found(key)
        with np.errstate(all="ignore"):
            shape = given["x"].mid * given["gain"]
            factor = (y * shape).sum(-1) / (shape * shape).sum(-1)
            eps = factor**-2.0 - (given["x"].mid ** 2).mean(-1)
        wrong = search.wrong_tokens(key)
        found += eps[wrong & np.isfinite(eps)].tolist()
    if found:
        middle = float(np.median(found))
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

    def without(lab: Laboratory, key: Key) -> Enclosure:
        given = lab.inputs(key)
        return given["x"] * given["gain"]

    yield Fault(
        "the division left out", "the row is not divided by its root mean square", "normalise first", 3.0, without
    )

    def summed(lab: Laboratory, key: Key) -> Enclosure:
        given, right = lab.inputs(key), lab.right(key)
        count = given["x"].mid.shape[-1]
        square = (given["x"].mid ** 2).mean(-1, keepdims=True)
        scale = np.sqrt((square + given["eps"]) / (square * count + given["eps"]))
        return scaled(right, scale, scale * lab.policy.statistics.u * 4)

    yield Fault(
        "the sum of squares in place of their mean",
        "a row is divided by the root of a sum",
        "divide by the mean square",
        3.0,
        summed,
    )


# ---- rotation

Positions = Callable[[Laboratory, Key], Any]


def _run(lab: Laboratory, key: Key) -> Any:
    return lab.runs[key[0]]


def _positions(search: Search) -> Iterator[Fault]:
    laws: list[tuple[str, float, Positions]] = [
        ("positions left out: all zero", 3.0, lambda lab, key: np.zeros(len(_run(lab, key).positions), int)),
        ("positions from 0 in each call", 3.0, lambda lab, key: np.arange(len(_run(lab, key).positions))),
        (
            "positions as the first of each call",
            4.0,
            lambda lab, key: np.full(len(_run(lab, key).positions), _run(lab, key).positions[0]),
        ),
        (
            "positions as the last of each call",
            4.0,
            lambda lab, key: np.full(len(_run(lab, key).positions), _run(lab, key).positions[-1]),
        ),
        ("positions in reverse order", 4.0, lambda lab, key: np.asarray(_run(lab, key).positions)[::-1]),
        ("positions with the other sign", 3.0, lambda lab, key: -np.asarray(_run(lab, key).positions)),
    ]
    laws += [
        (f"positions divided by {by:g}", 5.0, lambda lab, key, by=by: np.asarray(_run(lab, key).positions) / by)
        for by in _scale_of(search)
    ]
    offsets = _offsets(search)
    several = len({run.sequence for run in search.lab.runs.values()}) > 1
    for offset in sorted(set(offsets.values())):
        laws.append(
            (
                f"positions off by {offset:+d}",
                5.0,
                lambda lab, key, by=offset: np.asarray(_run(lab, key).positions) + by,
            )
        )
    if several and len(set(offsets.values())) > 1:
        by_sequence = {search.lab.runs[name].sequence: offset for name, offset in offsets.items()}

        def own(lab: Laboratory, key: Key) -> Any:
            run = _run(lab, key)
            return np.asarray(run.positions) + by_sequence.get(run.sequence, 0)

        said = ", ".join(f"{s}: {o:+d}" for s, o in sorted(by_sequence.items()))
        laws.append((f"positions off by a number for each sequence ({said})", 4.0 + 5.0 * len(by_sequence), own))
    if len(set(offsets.values())) > 1:

        def each(lab: Laboratory, key: Key) -> Any:
            return np.asarray(_run(lab, key).positions) + offsets[key[0]] if key[0] in offsets else None

        said = ", ".join(f"{name}: {offset:+d}" for name, offset in list(offsets.items())[:6])
        laws.append((f"positions off by a number for each call ({said})", 6.0 + 6.0 * len(offsets), each))
    for words, bits, law in laws:
        yield setting(
            words,
            f"heads are turned with {words}",
            "look at the positions that this call gives to the rotation",
            bits,
            positions=law,
        )


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
    """The angle by which each pair of each token was turned, and its weight: [T, d/2] both. None if it cannot be told."""
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
                theta=lambda lab, key, theta=theta: theta,
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

    yield Fault("the rotation left out", "heads are not turned at all", "turn queries and keys", 3.0, unturned)

    def paired(lab: Laboratory, key: Key) -> Any:
        given = lab.inputs(key)
        width = given["x"].mid.shape[-1]
        order = np.concatenate([np.arange(0, width, 2), np.arange(1, width, 2)])
        x = given["x"][..., order]
        turned = lab.compute(key, {**given, "x": x})
        return turned[..., np.argsort(order)]

    yield Fault(
        "neighbours paired, not halves",
        "element 2i is turned with element 2i + 1",
        "pair element i with i + head_dim/2",
        3.0,
        paired,
    )

    def twice(lab: Laboratory, key: Key) -> Any:
        given = lab.inputs(key)
        once = lab.ops.cut("attention.q_rope", lab.compute(key, given))
        return lab.compute(key, {**given, "x": once})

    yield Fault("turned twice", "heads are turned twice", "rotate once, before the cache", 3.0, twice)
    for parts in (2, 4):

        def partial(lab: Laboratory, key: Key, parts: int = parts) -> Any:
            given = lab.inputs(key)
            width = given["x"].mid.shape[-1]
            if (width // 2) % parts:
                return None
            right, kept = lab.compute(key, given), given["x"]
            turned = np.arange(width) % (width // 2) < width // 2 // parts
            parts_ = [np.where(turned, np.broadcast_to(a, right.mid.shape), np.broadcast_to(b, right.mid.shape))
                      for a, b in ((right.mid, kept.mid), (right.settle().r, kept.r), (right.settle().v, kept.v))]  # fmt: skip
            return Enclosure(parts_[0], parts_[1], parts_[2], accumulation=right.accumulation)

        yield Fault(
            f"only 1/{parts} of the pairs turned",
            f"only the first 1/{parts} of the pairs is turned",
            "turn all of head_dim",
            4.0,
            partial,
        )


# ---- attention and weights


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
        number = np.maximum(shown.sum(-1, keepdims=True), 1)
        right, had = (
            np.where(shown, each - np.where(shown, each, 0.0).sum(-1, keepdims=True) / number, 0.0)
            for each in (right, had)
        )
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
        words = f"heads {which}: scores times {distinct[0]:.5g}" if same else "a factor for each head of the scores"
        yield setting(
            words, f"the scores have a factor of their own in heads {which}", "one scale for all heads: 1 / sqrt(head_dim)",
            FACTOR_BITS * len(distinct) + 3 * len(wrong) * same,
            scores=lambda lab, key: scaled(lab.inputs(key)["scores"], numbers[:, None, None], np.abs(numbers[:, None, None]) * lab.policy.storage.u * (numbers[:, None, None] != 1)),
        )  # fmt: skip


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
            "look for a scale or a temperature that is applied twice, or not at all", bits,
            **{name: lambda lab, key, n=number, r=radius: scaled(lab.inputs(key)[name], np.asarray(n), np.asarray(r))},
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
    factor = np.linalg.lstsq(effects, values, rcond=None)[0]
    seen = (effects != 0).any(0)
    factor = np.where(seen, factor, 1.0)
    radius = tolerance * np.abs(factor)
    yield setting(
        "a factor for each expert of the logits", "each expert's logit has a factor of its own before the softmax",
        "look for a scale of experts that this model does not have", FACTOR_BITS * int(seen.sum()),
        logits=lambda lab, key: scaled(lab.inputs(key)["logits"], factor, radius),
    )  # fmt: skip
    shift = np.linalg.lstsq(np.array(biases), values - effects.sum(1), rcond=None)[0]
    room = tolerance * (np.abs(shift) + np.abs(values).max())

    def biased(lab: Laboratory, key: Key) -> Enclosure:
        x: Enclosure = lab.inputs(key)["logits"] + Enclosure(shift, room, room**2 / 3)
        return x

    yield setting(
        "a bias for each expert of the logits", "each expert's logit has a bias before the softmax",
        "look for a bias of experts that this model does not have", FACTOR_BITS * int(seen.sum()), logits=biased,
    )  # fmt: skip


def _caps(search: Search) -> Iterator[Fault]:
    """The scores soft-capped or clamped: c by its effect on the probabilities."""
    lab = search.lab
    parts = []
    for key in search.failed[:4]:
        right, had, shown = _logits_of(search, key, "scores")
        parts.append(tuple(np.compress(search.wrong_tokens(key), each, axis=-2) for each in (right, had, shown)))
    top = max((float(np.abs(np.where(s, r, 0.0)).max(initial=0.0)) for r, _, s in parts), default=0.0)
    if not top:
        return

    def centred(x: Any, shown: Any) -> Any:
        return np.where(
            shown, x - np.where(shown, x, 0.0).sum(-1, keepdims=True) / np.maximum(shown.sum(-1, keepdims=True), 1), 0.0
        )

    def losses(function: Callable[[Any, float], Any], log: float) -> float:
        c = float(np.exp(log))
        return sum(float(((centred(h, s) - centred(function(r, c), s)) ** 2).sum()) for r, h, s in parts)

    kinds: tuple[tuple[str, Callable[[Any, float], Any]], ...] = (
        ("soft-capped at", lambda x, c: c * np.tanh(x / c)), ("clamped to the size of", lambda x, c: np.clip(x, -c, c)),
    )  # fmt: skip
    for words, function in kinds:
        best = least(lambda log, f=function: losses(f, log), np.linspace(np.log(top / 3e4), np.log(top * 100), 160))
        if best is None or not losses(function, best) <= CLOSE**2 * losses(lambda x, c: x, 0.0):
            continue
        for c in dict.fromkeys(rounded(float(np.exp(best)), tolerance) for tolerance in (3e-2, 1e-2, 1e-3, 1e-5)):

            def capped(lab_: Laboratory, key: Key, c: float = c, function: Any = function) -> Enclosure:
                x = lab_.inputs(key)["scores"].settle()
                mid = function(x.mid, c)
                room = 6 * lab_.policy.storage.u * np.abs(x.mid)
                return Enclosure(mid, x.r + room, x.v + room**2 / 3, accumulation=x.accumulation)

            yield setting(
                f"{words} {c:.5g} of the scores", f"the scores are {words} {c:.5g}", "look for a cap that this model does not have",
                FACTOR_BITS, scores=capped,
            )  # fmt: skip
    del lab


def _masks(search: Search) -> Iterator[Fault]:
    """Other masks by a law, and other windows."""

    def positions(lab: Laboratory, key: Key) -> tuple[Any, Any]:
        run = _run(lab, key)
        return np.asarray(run.positions)[:, None], np.asarray(lab.slots(run))[None, :]

    def law(see: Callable[[Any, Any, Any, Laboratory, Key], Any]) -> Callable[[Laboratory, Key], Any]:
        def mask(lab: Laboratory, key: Key) -> Any:
            shown = see(lab.mask(key), *positions(lab, key), lab, key)
            return shown if shown is not None and shown.any(-1).all() else None

        return mask

    choices: list[tuple[str, float, Any]] = [
        (
            "each query hides its own token",
            4.0,
            lambda m, p, s, lab, key: np.where((m & (s < p)).any(-1, keepdims=True), m & (s < p), m),
        ),
        ("every token of the call is seen", 3.0, lambda m, p, s, lab, key: np.ones_like(m)),
        ("one token too many is seen", 4.0, lambda m, p, s, lab, key: m | (s == p + 1)),
        (
            "the first cached token is hidden",
            4.0,
            lambda m, p, s, lab, key: _keeping(m & (np.arange(m.shape[1]) > 0), m),
        ),
        ("cached tokens are hidden", 3.0, lambda m, p, s, lab, key: m & (np.arange(m.shape[1]) >= _run(lab, key).past)),
        (
            "the newest cached token is hidden",
            4.0,
            lambda m, p, s, lab, key: _keeping(m & (np.arange(m.shape[1]) != _run(lab, key).past - 1), m),
        ),
        ("the mask aligned at the top left", 4.0, lambda m, p, s, lab, key: np.tril(np.ones_like(m))),
        ("no window", 3.0, lambda m, p, s, lab, key: lab.mask(key, None)),
    ]
    longest = max(len(search.lab.slots(run)) for run in search.lab.runs.values())
    own = search.lab.config.window
    for window in range(1, min(longest, 64) + 1):
        if window != own:
            choices.append(
                (f"a window of {window}", 4.0 + 0.02 * window, lambda m, p, s, lab, key, w=window: lab.mask(key, w))
            )
    seen = _seen_of(search)
    for words, bits, see in choices:
        mask = law(see)
        if all(
            (wanted := mask(search.lab, key)) is None or not (wanted == shown)[rows].all()
            for key, (shown, rows) in seen.items()
        ):
            continue
        yield setting(words, f"in attention, {words}", "look at how this call's mask is built", bits, mask=mask)
    slots = _hidden_slots(search, seen)
    if slots:

        def hidden(lab: Laboratory, key: Key) -> Any:
            m = lab.mask(key)
            return _keeping(m & ~np.isin(np.arange(m.shape[1]), slots), m)

        words = f"cached position{'s' * (len(slots) > 1)} {', '.join(map(str, slots))} hidden"
        yield setting(words, words, "look at how this call's mask is built", 4.0 + 3 * len(slots), mask=hidden)


def _keeping(mask: Any, right: Any) -> Any:
    """The mask, but the right one in rows that would see nothing."""
    return np.where(mask.any(-1, keepdims=True), mask, right)


def _seen_of(search: Search) -> dict[Key, tuple[Any, Any]]:
    """Per failed call: the positions with a probability, in any head, and the wrong tokens."""
    return {key: ((search.lab.found(key) > 0).any(0), search.wrong_tokens(key)) for key in search.failed}


def _hidden_slots(search: Search, seen: dict[Key, tuple[Any, Any]]) -> list[int]:
    """The cached positions that no wrong row gives a probability, though it should."""
    hidden: set[int] = set()
    for key, (shown, rows) in seen.items():
        lost = (search.lab.mask(key) & ~shown)[rows].any(0)
        hidden |= set(np.flatnonzero(lost).tolist())
    return sorted(hidden) if len(hidden) <= 4 else []


def _keys(search: Search) -> Iterator[Fault]:
    """Other keys and queries than rotated ones, and other heads."""

    def scores(lab: Laboratory, key: Key, q: Any = None, k: Any = None) -> Any:
        given = lab.inputs((key[0], key[1].replace("probs", "scores")))
        return lab.ops.cut(
            "attention.scores",
            lab.compute((key[0], key[1].replace("probs", "scores")), {"q": q or given["q"], "k": k or given["k"]}),
        )

    def of(lab: Laboratory, key: Key, tap: str) -> Any:
        return lab.read((key[0], f"layers.{layer(key)}.{tap}"))

    def past(lab: Laboratory, key: Key, tap: str, at: int | None = None) -> Any:
        return lab.cached(key[0], tap, layer(key) if at is None else at)

    def grouped(lab: Laboratory, key: Key, order: Callable[[int, int], Any]) -> Any:
        given = lab.inputs((key[0], key[1].replace("probs", "scores")))
        heads, groups = lab.config.heads, lab.config.kv_heads
        if groups == 1:
            return None
        wanted = np.asarray(order(heads, groups))
        own = np.arange(heads) // (heads // groups)
        out = None
        for g in range(groups):
            rolled = given["k"][:, (np.arange(groups) + g) % groups]
            part = scores(lab, key, k=rolled)
            here = ((own + g) % groups == wanted)[:, None, None]
            out = part if out is None else _where(here, part, out)
        return out

    choices: tuple[tuple[str, Any], ...] = (
        ("keys not rotated", lambda lab, key: scores(lab, key, k=past(lab, key, "attention.k"))),
        ("queries not rotated", lambda lab, key: scores(lab, key, q=of(lab, key, "attention.q"))),
        (
            "queries and keys not rotated",
            lambda lab, key: scores(lab, key, q=of(lab, key, "attention.q"), k=past(lab, key, "attention.k")),
        ),
        ("values in the place of keys", lambda lab, key: scores(lab, key, k=past(lab, key, "attention.v"))),
        (
            "the keys of the layer before",
            lambda lab, key: (
                scores(lab, key, k=past(lab, key, "attention.k_rope", layer(key) - 1)) if layer(key) else None
            ),
        ),
        (
            "the keys of the next layer",
            lambda lab, key: (
                scores(lab, key, k=past(lab, key, "attention.k_rope", layer(key) + 1))
                if (layer(key) or 0) + 1 < lab.config.layers
                else None
            ),
        ),
        (
            "query heads paired with key/value head h % K",
            lambda lab, key: grouped(lab, key, lambda heads, groups: np.arange(heads) % groups),
        ),
    )
    for words, change in choices:
        yield setting(
            words, f"the scores are computed with {words}", "look at what attention is called with", 4.0, scores=change
        )
    for name, dims in (("q", ("T", "H", "d")), ("k", ("S", "K", "d"))):
        yield from _moved_operands(search, name, dims, scores)


def _where(here: Any, one: Enclosure, two: Enclosure) -> Enclosure:
    one, two = one.settle(), two.settle()
    parts = [
        np.where(here, np.broadcast_to(a, one.mid.shape), np.broadcast_to(b, one.mid.shape))
        for a, b in ((one.mid, two.mid), (one.r, two.r), (one.v, two.v))
    ]
    return Enclosure(parts[0], parts[1], parts[2], accumulation=one.accumulation)


def _moved_operands(search: Search, name: str, dims: tuple[str, ...], scores: Any) -> Iterator[Fault]:
    """Queries or keys moved by a law, where the trace has no scores."""
    from refmoe.verifier.diagnosis.grammar.orders import orders
    from refmoe.verifier.diagnosis.grammar.views import View

    def base(lab: Laboratory, key: Key) -> Any:
        return lab.inputs((key[0], key[1].replace("probs", "scores")))[name]

    def lift(lab: Laboratory, key: Key, x: Enclosure) -> Any:
        return lab.compute(key, {**lab.inputs(key), "scores": scores(lab, key, **{name: x})})

    words = {"q": "the rotated queries", "k": "the cached keys"}[name]
    yield from orders(search, View(words, dims, {}, base, lift))


def _other_weights() -> Iterator[Fault]:
    def over_all(lab: Laboratory, key: Key) -> Enclosure:
        given = lab.inputs(key)
        whole = lab.ops.softmax(given["logits"], None)
        return lab.ops.gather(whole, given["experts"])

    yield Fault(
        "not renormalised over the chosen",
        "the weights are probabilities over all experts",
        "divide by the sum of the chosen",
        3.0,
        over_all,
    )

    def sigmoids(lab: Laboratory, key: Key) -> Enclosure:
        given = lab.inputs(key)
        return lab.ops.sigmoid(lab.ops.gather(given["logits"], given["experts"]))

    yield Fault(
        "sigmoids in place of a softmax",
        "the weights are sigmoids of the logits",
        "take a softmax of the chosen logits",
        4.0,
        sigmoids,
    )

    def raw(lab: Laboratory, key: Key) -> Enclosure:
        given = lab.inputs(key)
        chosen: Enclosure = lab.ops.gather(given["logits"], given["experts"])
        return chosen

    yield Fault("the raw logits", "the weights are the chosen logits", "take a softmax of the chosen logits", 4.0, raw)
