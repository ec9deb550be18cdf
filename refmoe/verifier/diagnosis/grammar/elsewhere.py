# SPDX-License-Identifier: Apache-2.0
"""Values taken from elsewhere, or added from there: another tap, layer, call or sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

import numpy as np

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.spec.taps import LAYER_TAPS, MODEL_TAPS
from refmoe.verifier.diagnosis.grammar.factors import KNOWN_BITS, scaled, simple
from refmoe.verifier.diagnosis.grammar.fault import CLOSE, Fault, Search
from refmoe.verifier.diagnosis.grammar.laboratory import Laboratory
from refmoe.verifier.diagnosis.grammar.views import View, layer, masked, stored_again
from refmoe.verifier.passes import Key

ROWS = {"T D", "T H d", "T K d", "T k F", "T k D", "T k", "T E", "T V", "H T S"}
MOST_SEQUENCES = 8
"""The most sequences of which any two may be exchanged."""
Source = Callable[[Laboratory, Key], Enclosure | None]
"""The values that take the place of a view's, or are added to it."""
FIX = "look at which buffer is read here, and when it is written"


def elsewhere(search: Search, view: View) -> Iterator[Fault]:
    """The sources that explain a view: in its place, or added to it."""
    own = _own_tap(search, view)
    for words, bits, source in _constants(view):
        yield _instead(view, words, bits, source)
    for words, bits, source in (
        *_other_taps(search, view),
        *_other_calls(search, view, own),
        *_batch(search, view, own),
        *_other_layers(search, view, own),
    ):
        yield _instead(view, words, bits, source)
        if view.pairs:
            yield from _added(search, view, words, bits, source)


def _instead(view: View, words: str, bits: float, source: Source) -> Fault:
    return Fault(
        name=f"{view.name or 'values'} taken from {words}",
        about=f"{view.name or 'its values'}: {words} is in the place",
        fix=FIX,
        bits=bits + 2.0 * bool(view.name),
        predict=view.predict(lambda lab, key, x: _shaped(source(lab, key), x)),
    )


def _added(search: Search, view: View, words: str, bits: float, source: Source) -> Iterator[Fault]:
    """The hypothesis that a multiple of the source is added."""
    along = size = whole = left = 0.0
    parts = []
    for key, (right, had) in view.pairs.items():
        base = view.base(search.lab, key)
        other = _shaped(source(search.lab, key), base)
        if other is None:
            continue
        one, two, three = (
            masked(view, search, key, each) for each in (right, had, np.broadcast_to(other.mid, right.shape))
        )
        along += float(((two - one) * three).sum())
        size += float((three * three).sum())
        parts.append((two - one, three))
    if not size or not np.isfinite(along / size):
        return
    factor = along / size
    for error, other in parts:
        whole += float((error**2).sum())
        left += float(((error - factor * other) ** 2).sum())
    if not whole or not left <= CLOSE**2 * whole:
        return
    number, name, cost = simple(factor, search.coarse, search.lab.config)
    if abs(factor - 1) <= 8 * search.u:
        number, name, cost = 1.0, "", 0.0
    radius = abs(number) * search.u if cost > KNOWN_BITS else 0.0

    def move(lab: Laboratory, key: Key, x: Enclosure) -> Enclosure | None:
        other = _shaped(source(lab, key), x)
        if other is None:
            return None
        x = x if view.name else lab.ops.cut(search.step, x)
        more: Enclosure = x + (other if number == 1.0 else scaled(other, np.asarray(number), np.asarray(radius)))
        return stored_again(search, view, more)

    what = {"": f"{words} added", "-1": f"{words} subtracted"}.get(name, f"{name} times {words} added")
    yield Fault(
        name=f"{what}{' to' + view.of[3:] if view.name else ''}",
        about=f"{what}{' to' + view.of[3:] if view.name else ''}",
        fix="look for a sum with one term too many, one missing, or of the wrong sign",
        bits=bits + cost + 2.0 + 2.0 * bool(view.name),
        predict=view.predict(move),
    )


def _shaped(other: Enclosure | None, x: Enclosure) -> Enclosure | None:
    """The source in the shape of the view, its values in order. None if it has another number of them."""
    if other is None or other.mid.size != x.mid.size or len(other.mid) != len(x.mid):
        return None
    shape = other.mid.shape
    return other if shape == x.mid.shape else other.map(lambda part: np.broadcast_to(part, shape).reshape(x.mid.shape))


def _own_tap(search: Search, view: View) -> str | None:
    """The tap that the view is: the step's own, or the one that the input comes from. Without its layer."""
    if not view.name:
        return search.step
    return {
        "the contexts that it reads": "attention.context", "the logits that it reads": "router.logits",
        "the gate": "expert.gate", "the factor of the gate": "expert.up",
        "the hidden units that it reads": "expert.hidden",
        "the experts' outputs": "expert.output", "the weights that it reads": "router.weights",
        "the rotated queries": "attention.q_rope", "the scores": "attention.scores",
        "the mixing probabilities": "attention.probs",
        ("the input" if search.step == "attention.q_rope" else "?"): "attention.q",
        ("the input" if search.step == "attention.k_rope" else "?"): "attention.k",
        ("the input" if search.step in ("attention.q", "attention.k", "attention.v") else "?"): "attention_norm",
        ("the input" if search.step in ("router.logits", "expert.gate", "expert.up") else "?"): "moe_norm",
        ("the input" if search.step == "moe_norm" else "?"): "attention_residual",
        ("the input" if search.step == "logits" else "?"): "final_norm",
        ("the input" if search.step in ("attention_norm", "final_norm") else "?"): "residual",
        ("what is added to the hidden state" if search.step == "attention_residual" else "?"): "attention.output",
        ("what is added to the hidden state" if search.step == "residual" else "?"): "moe.output",
        ("the hidden state" if search.step == "residual" else "?"): "attention_residual",
        ("the hidden state" if search.step == "attention_residual" else "?"): "residual",
    }.get(view.name)  # fmt: skip


def _other_taps(search: Search, view: View) -> Iterator[tuple[str, float, Source]]:
    """Every other tap of the same call with as many values per token, in its layer or outside the layers."""
    dims, kinds = (
        "".join(view.dims),
        {"TD": ("T D",), "THd": ("T H d",), "TKd": ("T K d",), "TkF": ("T k F",), "TkD": ("T k D",)},
    )
    for tap, shape in (LAYER_TAPS | MODEL_TAPS).items():
        if shape not in kinds.get(dims, ()) or (tap == search.step and not view.name):
            continue
        if tap == "logits":
            continue

        def source(lab: Laboratory, key: Key, tap: str = tap) -> Enclosure | None:
            at = layer(key)
            name = tap if tap in MODEL_TAPS else None if at is None else f"layers.{at}.{tap}"
            if name is None or not lab.present((key[0], name)):
                return None
            return None if name == key[1] else lab.read((key[0], name))

        yield tap, 5.0, source
    if dims == "TD":

        def entering(lab: Laboratory, key: Key) -> Enclosure | None:
            at = layer(key)
            at = lab.config.layers if at is None else at
            name = "embedding" if at == 0 else f"layers.{at - 1}.residual"
            return lab.read((key[0], name)) if lab.present((key[0], name)) else None

        yield "the hidden state that enters the layer", 4.5, entering


def _constants(view: View) -> Iterator[tuple[str, float, Source]]:
    """Weights that do not depend on the token."""
    if view.dims == ("T", "k"):

        def even(lab: Laboratory, key: Key) -> Enclosure:
            even = np.full(
                (len(lab.runs[key[0]].tokens), lab.config.experts_per_token), 1 / lab.config.experts_per_token
            )
            room = even * lab.policy.statistics.u
            return Enclosure(even, room, room**2 / 3)

        def ones(lab: Laboratory, key: Key) -> Enclosure:
            return Enclosure(np.ones((len(lab.runs[key[0]].tokens), lab.config.experts_per_token)))

        yield "equal weights", 0.5, even
        yield "ones", 4.0, ones


def _as_computed(search: Search, view: View, lab: Laboratory, key: Key) -> Enclosure:
    """The value of a tap of this step before the fault, or of another step as it is stored."""
    if view.name or key not in search.failed:
        read: Enclosure = lab.read(key)
        return read
    stored: Enclosure = lab.ops.cut(search.step, lab.right(key))
    return stored


def _other_calls(search: Search, view: View, own: str | None) -> Iterator[tuple[str, float, Source]]:
    """Sources in an earlier call: the same tap."""
    if own is None or view.dims[0] != "T":
        return
    for words, bits, same, pick in (
        ("the call before", 4.5, False, "same"), ("the call before of its sequence", 4.5, True, "same"),
        ("the last token of the call before of its sequence", 5.0, True, "last"),
        ("the first tokens of the call before of its sequence", 5.0, True, "first"),
        ("the last tokens of the call before of its sequence", 5.0, True, "tail"),
        ("the last token of the call before", 5.0, False, "last"),
        ("the first tokens of the call before", 5.0, False, "first"),
        ("the first call", 5.5, False, "origin"), ("the first call with as many tokens", 5.0, False, "alike"),
    ):  # fmt: skip

        def source(lab: Laboratory, key: Key, same: bool = same, pick: str = pick) -> Enclosure | None:
            runs = list(lab.runs.values())
            i = next(i for i, run in enumerate(runs) if run.run == key[0])
            earlier = [run for run in runs[:i] if not same or run.sequence == runs[i].sequence]
            if pick == "alike":  # a recorded graph keeps the input of the call that it was recorded in
                earlier = [run for run in earlier if len(run.tokens) == len(runs[i].tokens)]
            if not earlier:
                return None
            other = earlier[0] if pick in ("origin", "alike") else earlier[-1]
            name = _name(lab, key, own)
            if not lab.present((other.run, name)):
                return None
            x, count = _as_computed(search, view, lab, (other.run, name)), len(runs[i].tokens)
            if pick in ("same", "alike"):
                return x if len(x.mid) == count else None
            if pick == "last":
                return x[np.full(count, len(x.mid) - 1)]
            if len(x.mid) < count:
                return None
            return x[len(x.mid) - count :] if pick == "tail" else x[:count]

        yield words, bits, source


def _name(lab: Laboratory, key: Key, own: str) -> str:
    """The tap of a view in the layer of a key, or before it where the view is what enters the layer."""
    at = layer(key)
    if own in MODEL_TAPS:
        return own
    if at is None:
        return f"layers.{lab.config.layers - 1}.{own}"
    if own == "residual" and not key[1].endswith(".residual"):
        return "embedding" if at == 0 else f"layers.{at - 1}.residual"
    return f"layers.{at}.{own}"


def _batch(search: Search, view: View, own: str | None) -> Iterator[tuple[str, float, Source]]:
    """Sources in the same call of another sequence: the rows of a batch, exchanged or off by one."""
    runs = search.lab.runs.values()
    sequences = sorted({run.sequence for run in runs})
    if own is None or view.dims[0] != "T" or len(sequences) < 2:
        return

    def source(other: Callable[[int], int]) -> Source:
        def at(lab: Laboratory, key: Key) -> Enclosure | None:
            run = lab.runs[key[0]]
            batch, _, _ = run.run.partition(".")
            to = other(sequences.index(run.sequence))
            if to < 0:
                return None
            mates = [each for each in lab.runs.values() if each.run.partition(".")[0] == batch]
            mate = next((each for each in mates if each.sequence == sequences[to]), None)
            if mate is None or len(mate.tokens) != len(run.tokens) or mate.run == run.run:
                return None
            name = _name(lab, key, own)
            return _as_computed(search, view, lab, (mate.run, name)) if lab.present((mate.run, name)) else None

        return at

    count = len(sequences)
    if count > 2:
        yield "the next sequence of the batch", 5.0, source(lambda i: (i + 1) % count)
        yield "the sequence before of the batch", 5.0, source(lambda i: (i - 1) % count)
    for i, j in combinations(range(min(count, MOST_SEQUENCES)), 2):
        words = f"the other one of sequences {sequences[i]} and {sequences[j]}"
        yield words, 6.0, source(lambda at, i=i, j=j: {i: j, j: i}.get(at, -1))  # type: ignore[misc]


def _other_layers(search: Search, view: View, own: str | None) -> Iterator[tuple[str, float, Source]]:
    """Sources in another layer: the same tap."""
    if own is None or own in MODEL_TAPS or search.lab.config.layers < 2 or not search.step or search.step in MODEL_TAPS:
        return
    count = search.lab.config.layers
    choices: list[tuple[str, float, Callable[[int], int]]] = [
        ("the layer before", 4.0, lambda i: i - 1), ("the next layer", 4.0, lambda i: i + 1),
        *((f"layer {j}", 5.0, _always(j)) for j in range(min(count, 8))),
    ]  # fmt: skip
    for words, bits, other in choices:

        def source(lab: Laboratory, key: Key, other: Any = other) -> Enclosure | None:
            at = layer(key)
            if at is None:
                return None
            name = f"layers.{other(at)}.{own}"
            if not 0 <= other(at) < count or other(at) == at or not lab.present((key[0], name)):
                return None
            return _as_computed(search, view, lab, (key[0], name))

        yield words, bits, source


def _always(number: int) -> Callable[[int], int]:
    return lambda _: number
